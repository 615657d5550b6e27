"""Rotary position embedding (Su et al., arXiv 2104.09864): frequencies, their scalings, and the tables the `qkv`
node reads.

models/config.py parses a checkpoint's fields into `RopeConfig`; models/decoder.py turns it into two weight slots
here. Half-split pairs: (i, i + rotary_dim/2). Everything is computed in float64 and stored once in float32.

A *mode* is a set of frequencies. longrope has two, short and long, and a request keeps the one it was admitted with:
were it to change at the boundary, the K already in the cache would have been rotated by other angles.

Sources: linear (kaiokendev; Chen et al., arXiv 2306.15595), yarn (Peng et al., arXiv 2309.00071), llama3 (the Llama
3.1 model card), longrope (Ding et al., arXiv 2402.13753); field names and defaults are those of Hugging Face configs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from sapwood.program.ir import ArrayPart, Recorder, WeightSlot

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn", "longrope")
F64 = np.ndarray[Any, np.dtype[np.float64]]
F32 = np.ndarray[Any, np.dtype[np.float32]]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Parameters of the rotation; those a kind does not use are left at their defaults.

    rotary_dim              leading dimensions of a head that turn; even
    original_max_position   positions of the pretraining (llama3, yarn, longrope)
    attention_factor        multiplies cos and sin; None = the kind's own formula
    short_factor, long_factor   divisors per frequency (longrope), rotary_dim/2 each
    """

    kind: RopeKind
    theta: float
    rotary_dim: int
    factor: float = 1.0
    original_max_position: int = 0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def num_modes(self, context_len: int) -> int:
        """Modes that requests of at most context_len tokens can have."""
        return 2 if self.kind == "longrope" and context_len > self.original_max_position else 1

    def mode(self, total_len: int) -> int:
        """The mode of a request of total_len tokens (prompt and all it may generate): 1 is longrope's long one."""
        return int(self.kind == "longrope" and total_len > self.original_max_position)


@dataclasses.dataclass(frozen=True)
class RopeSlots:
    """The tables of a program: float32 [num_modes * context_len, rotary_dim / 2], mode by mode."""

    cos: WeightSlot
    sin: WeightSlot
    rotary_dim: int
    num_modes: int


def inv_freq(rope: RopeConfig, mode: int = 0) -> F64:
    """Angle per position of each pair, [rotary_dim / 2]."""
    dim = rope.rotary_dim
    base = rope.theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    match rope.kind:
        case "default":
            return base
        case "linear":
            return base / rope.factor
        case "llama3":
            return _llama3(rope, base)
        case "yarn":
            return _yarn(rope, base)
        case "longrope":
            return base / np.asarray(rope.long_factor if mode else rope.short_factor, np.float64)


def _llama3(rope: RopeConfig, base: F64) -> F64:
    """Long wavelengths are divided by factor, short ones kept, those between blended."""
    turns = rope.original_max_position * base / (2 * math.pi)  # full turns over the pretraining length
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return blend * base + (1 - blend) * base / rope.factor


def _yarn(rope: RopeConfig, base: F64) -> F64:
    """A ramp over the pairs: fast ones (beta_fast turns and more) keep their speed, slow ones are divided by factor."""
    dim = rope.rotary_dim

    def pair_with(turns: float) -> float:
        return dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)
    return ramp * base / rope.factor + (1 - ramp) * base


def attention_factor(rope: RopeConfig) -> float:
    """What multiplies cos and sin (so scores get its square)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "yarn":

        def magnitude(mscale: float) -> float:
            return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

        if rope.mscale and rope.mscale_all_dim:
            return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
        return magnitude(1.0)
    if rope.kind == "longrope" and rope.factor > 1:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))
    return 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class RopeTable(ArrayPart):
    """One of the two tables, computed when its slot is filled and not kept.

    array   NaN of the table's shape that takes no memory: what the recorder's checks of shapes look at. `values` has
            the numbers.
    """

    rope: RopeConfig
    context_len: int
    which: Literal["cos", "sin"]

    @classmethod
    def of(cls, rope: RopeConfig, context_len: int, which: Literal["cos", "sin"]) -> RopeTable:
        shape = (rope.num_modes(context_len) * context_len, rope.rotary_dim // 2)
        return cls(np.broadcast_to(np.float32(math.nan), shape), rope, context_len, which)

    def values(self, num_positions: int | None = None) -> F32:
        """[num_modes * n, rotary_dim / 2], mode by mode; n = the first num_positions positions, None = all."""
        n = self.context_len if num_positions is None else min(num_positions, self.context_len)
        cos, sin = rope_tables(self.rope, n, num_modes=self.rope.num_modes(self.context_len))
        return cos if self.which == "cos" else sin

    def num_bytes(self, num_positions: int) -> int:
        """Bytes of `values`."""
        n = min(num_positions, self.context_len)
        return 4 * self.rope.num_modes(self.context_len) * n * (self.rope.rotary_dim // 2)


def rope_tables(rope: RopeConfig, context_len: int, *, num_modes: int | None = None) -> tuple[F32, F32]:
    """cos and sin of every position below context_len in every mode: [num_modes * context_len, rotary_dim / 2].

    num_modes   None = those that requests of context_len tokens can have
    """
    modes = rope.num_modes(context_len) if num_modes is None else num_modes
    shape = (modes * context_len, rope.rotary_dim // 2)
    cos, sin = np.empty(shape, np.float32), np.empty(shape, np.float32)
    factor = attention_factor(rope)
    # By the addition theorem from every 256th position and the 256 offsets: a long context has millions of angles, and
    # evaluating each took longer than all other work on a small model's start. The float64 products are exact to
    # 1e-15, far below what float32 keeps.
    block = 256
    for mode in range(modes):
        speeds = inv_freq(rope, mode)
        offsets = np.arange(min(block, context_len), dtype=np.float64)[:, None] * speeds
        cos_offset, sin_offset = np.cos(offsets), np.sin(offsets)
        for begin in range(0, context_len, block):
            size = min(block, context_len - begin)
            cos_begin, sin_begin = np.cos(begin * speeds) * factor, np.sin(begin * speeds) * factor
            rows = slice(mode * context_len + begin, mode * context_len + begin + size)
            cos[rows] = cos_begin * cos_offset[:size] - sin_begin * sin_offset[:size]
            sin[rows] = sin_begin * cos_offset[:size] + cos_begin * sin_offset[:size]
    return cos, sin


def rope_slots(rec: Recorder, rope: RopeConfig, context_len: int) -> RopeSlots:
    """The two slots that every layer's `qkv` node shares."""
    cos, sin = RopeTable.of(rope, context_len, "cos"), RopeTable.of(rope, context_len, "sin")
    return RopeSlots(
        rec.slot("rope.cos", "f32", [cos]), rec.slot("rope.sin", "f32", [sin]), rope.rotary_dim,
        rope.num_modes(context_len),
    )  # fmt: skip
