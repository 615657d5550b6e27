"""From a checkpoint's config.json to what the decoder needs: every field read once, checked, and named in errors.

`HfConfig` is the JSON with typed access; `decoder_config` reads what all families share, a family's file (llama.py,
...) adds what is its own. models/loader.py drives both.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

from sapwood.errors import InvalidRequest, UnsupportedModel
from sapwood.layers.rotary import ROPE_KINDS, RopeConfig, RopeKind, attention_factor, inv_freq

log = logging.getLogger(__name__)

MAX_INT = 2**31 - 1  # sizes and token ids are int32 in the core
MAX_HEAD_DIM = 2**16
# Names in configs for one kind; "su" was longrope's first name, "mrope" on text alone would be default but is refused.
_ROPE_ALIASES = (("su", "longrope"), ("none", "default"))
_MISSING: Any = object()
WindowRule = Literal["none", "every_layer", "by_layer"]


@dataclasses.dataclass(frozen=True)
class HfConfig:
    """A JSON object of a checkpoint (config.json), with the path its errors name."""

    values: dict[str, Any]
    path: Path

    @classmethod
    def read(cls, path: Path) -> HfConfig:
        """Parse the file. InvalidRequest when it is absent or not a JSON object."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InvalidRequest(
                f"{path} not found: a model directory holds config.json and *.safetensors", "model"
            ) from None
        except (OSError, ValueError, RecursionError) as error:  # ValueError: also a number too long
            raise InvalidRequest(f"{path} cannot be read as JSON: {error}", "model") from None
        if not isinstance(values, dict):
            raise InvalidRequest(f"{path} must hold a JSON object, got {type(values).__name__}", "model")
        return cls(values, path)

    def filled(self, **defaults: Any) -> HfConfig:
        """With a family's defaults for the keys that are absent. A key that is there with null stays null: Hugging
        Face's configs tell the two apart (sliding_window null is no window).
        """
        return HfConfig({**defaults, **self.values}, self.path)

    def integer(self, name: str, default: Any = _MISSING, *, low: int = 1) -> int:
        """An integer of at least `low` and below 2**31. Absent or null: the default, else InvalidRequest."""
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InvalidRequest(f"{self.path}: {name} must be an integer >= {low}, got {value!r:.80}", "model")
        if value > MAX_INT:
            raise InvalidRequest(f"{self.path}: {name} must be an integer <= {MAX_INT}, got {value!r:.80}", "model")
        return value

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A positive, finite number."""
        value = self._get(name, default)
        number = _finite(value)
        if number is None or number <= 0:
            raise InvalidRequest(f"{self.path}: {name} must be a positive number, got {value!r:.80}", "model")
        return number

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise InvalidRequest(f"{self.path}: {name} must be true or false, got {value!r}", "model")
        return value

    def text(self, name: str, default: Any = _MISSING) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise InvalidRequest(f"{self.path}: {name} must be a string, got {value!r}", "model")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """A JSON object; {} where absent or null."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise InvalidRequest(f"{self.path}: {name} must be an object, got {value!r}", "model")
        return value

    @property
    def architecture(self) -> str:
        names = self.values.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise InvalidRequest(f"{self.path}: architectures must be a list of one name, got {names!r}", "model")
        return names[0]

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is _MISSING:
                raise InvalidRequest(f"{self.path}: {name} is missing", "model")
            return default
        return value


def _finite(value: Any) -> float | None:
    """A JSON number as a float; None for what is none, or beyond a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer of the Llama kind: pre-norm RMSNorm, grouped-query attention, rope, SwiGLU.

    layer_windows       per layer: tokens a query sees, itself included; 0 = all
    context_len         tokens a request may have, by the checkpoint
    qkv_bias, o_bias    projections with a bias
    qk_norm             RMSNorm of each q and k head before rope
    fused_qkv, fused_gate_up   the checkpoint keeps those projections in one tensor
    """

    vocab_size: int
    hidden: int
    intermediate: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    layer_windows: tuple[int, ...]
    context_len: int
    tied: bool
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False

    def rope_mode(self, total_len: int) -> int:
        """Which rope tables a request of total_len tokens (prompt and maximum output) uses from its first token to
        its last.
        """
        return self.rope.mode(total_len)


def decoder_config(
    raw: HfConfig,
    *,
    windows: WindowRule = "none",
    default_head_dim: int | None = None,
    partial_rotary: bool = False,
    **family: bool,
) -> DecoderConfig:
    """What the families share.

    raw              `filled` with the family's defaults
    windows          how the family's configs say windows
    partial_rotary   the family reads partial_rotary_factor
    family           its own flags (qk_norm, fused_qkv, ...)

    Raises InvalidRequest for a missing or wrong field, UnsupportedModel for one whose value this version does not have.
    """
    refuse_features(raw)
    hidden, heads = raw.integer("hidden_size"), raw.integer("num_attention_heads")
    kv_heads = raw.integer("num_key_value_heads", heads)
    if raw.values.get("head_dim") is None and default_head_dim is None and hidden % heads:
        raise InvalidRequest(
            f"{raw.path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}; set head_dim", "model"
        )
    head_dim = raw.integer("head_dim", default_head_dim or hidden // heads)
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedModel(
            f"{raw.path}: head_dim {head_dim} is not supported; supported: at most {MAX_HEAD_DIM}", "head_dim"
        )
    if heads % kv_heads:
        raise InvalidRequest(
            f"{raw.path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}", "model"
        )
    num_layers = raw.integer("num_hidden_layers")
    rope = rope_config(raw, head_dim, partial_rotary=partial_rotary)
    context_len = raw.integer("max_position_embeddings")
    if rope.kind == "yarn":  # Qwen's recipe adds yarn without raising max_position_embeddings
        stretched = rope.original_max_position * rope.factor
        if stretched > MAX_INT:
            raise InvalidRequest(
                f"{raw.path}: yarn's factor {rope.factor} times original_max_position_embeddings "
                f"{rope.original_max_position} must be a context of at most {MAX_INT} tokens, got {stretched:.3g}",
                "model",
            )
        context_len = max(context_len, int(stretched))
    return DecoderConfig(
        vocab_size=raw.integer("vocab_size"),
        hidden=hidden,
        intermediate=raw.integer("intermediate_size"),
        num_layers=num_layers,
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=raw.number("rms_norm_eps", 1e-6),
        rope=rope,
        layer_windows=layer_windows(raw, num_layers, windows),
        context_len=context_len,
        tied=raw.flag("tie_word_embeddings"),
        **family,
    )


def refuse_features(raw: HfConfig) -> None:
    """UnsupportedModel for what no family of this version has."""
    act = raw.text("hidden_act", "silu")
    if act != "silu":
        raise UnsupportedModel(f"{raw.path}: hidden_act {act!r} is not supported; supported: 'silu'", "hidden_act")
    if raw.values.get("quantization_config"):
        method = raw.table("quantization_config").get("quant_method", "unknown")
        raise UnsupportedModel(
            f"{raw.path}: quantization_config ({method}) is not supported; "
            "use a float32, float16 or bfloat16 checkpoint",
            "quantization_config",
        )
    if raw.flag("mlp_bias"):
        raise UnsupportedModel(f"{raw.path}: mlp_bias true is not supported; supported: MLPs without bias", "mlp_bias")


def layer_windows(raw: HfConfig, num_layers: int, rule: WindowRule) -> tuple[int, ...]:
    """The window of every layer, 0 where it sees all.

    rule   "none": the family has no windows; "every_layer": sliding_window holds for all layers; "by_layer": only with
           use_sliding_window, then layer_types says it layer by layer, or else the first max_window_layers layers
           see all
    """
    if rule == "none" or (rule == "by_layer" and not raw.flag("use_sliding_window")):
        return (0,) * num_layers
    window = raw.integer("sliding_window", 0, low=0)
    types = raw.values.get("layer_types")
    if types is None:
        first = raw.integer("max_window_layers", 28, low=0) if rule == "by_layer" else 0
        return tuple(window if i >= first else 0 for i in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers:
        raise InvalidRequest(f"{raw.path}: layer_types must list {num_layers} layers, got {types!r}", "model")
    if bad := [t for t in types if t not in known]:
        raise UnsupportedModel(
            f"{raw.path}: layer_types {bad[0]!r} is not supported; supported: {', '.join(known)}", "layer_types"
        )
    if "sliding_attention" in types and not window:
        raise InvalidRequest(f"{raw.path}: layer_types names sliding_attention but sliding_window is not set", "model")
    windows = tuple(window if t == "sliding_attention" else 0 for t in types)
    if rule == "every_layer" and windows != (window,) * num_layers:
        raise UnsupportedModel(
            f"{raw.path}: layer_types that mix full and sliding attention are not supported for "
            f"{raw.architecture}; supported: one sliding_window for all layers",
            "layer_types",
        )
    return windows


def rope_config(raw: HfConfig, head_dim: int, *, partial_rotary: bool = False) -> RopeConfig:
    """The rotation, from `rope_scaling` + `rope_theta` or from the newer `rope_parameters`.

    Families without partial_rotary turn whole heads, whatever partial_rotary_factor says: so does Hugging Face for
    the default rope, and for a scaled one it cannot run such a checkpoint at all.
    """
    fields = _rope_fields(raw)
    kind = str(fields.values.get("rope_type") or fields.values.get("type") or "default")
    kind = dict(_ROPE_ALIASES).get(kind, kind)
    if kind not in ROPE_KINDS:
        hint = " (its frequencies would change with the longest request of a batch)" if kind == "dynamic" else ""
        raise UnsupportedModel(
            f"{raw.path}: rope type {kind!r} is not supported{hint}; supported: {', '.join(ROPE_KINDS)}", "rope_scaling"
        )
    theta = fields.number("rope_theta", raw.number("rope_theta", 10000.0))
    if theta <= 1:
        raise InvalidRequest(f"{raw.path}: rope_theta must be above 1, got {theta}", "model")
    partial = fields.number("partial_rotary_factor", raw.number("partial_rotary_factor", 1.0))
    if partial != 1 and not partial_rotary:
        if kind != "default":
            raise UnsupportedModel(
                f"{raw.path}: partial_rotary_factor {partial} with rope type {kind!r} is not supported for "
                f"{raw.architecture}; supported: 1.0",
                "partial_rotary_factor",
            )
        log.info("%s: partial_rotary_factor %s is not used by %s", raw.path, partial, raw.architecture)
        partial = 1.0
    rotary_dim = int(min(head_dim * partial, MAX_INT))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise UnsupportedModel(
            f"{raw.path}: head_dim {head_dim} with partial_rotary_factor {partial} turns {rotary_dim} dimensions "
            "of a head; supported: an even number, at most head_dim",
            "head_dim",
        )
    rope = _scaled_rope(raw, fields, kind, theta, rotary_dim)
    try:
        finite = math.isfinite(attention_factor(rope)) and all(
            bool((abs(inv_freq(rope, mode)) < math.inf).all()) for mode in range(2 if kind == "longrope" else 1)
        )
    except (ArithmeticError, ValueError):  # what is left: numbers whose products leave the range of a float
        finite = False
    if not finite:
        raise InvalidRequest(
            f"{raw.path}: the {kind} rope's fields give no finite frequencies: "
            f"{ {k: v for k, v in fields.values.items() if not isinstance(v, list)}!r:.200}",
            "model",
        )
    return rope


def _rope_fields(raw: HfConfig) -> HfConfig:
    """The object that holds the rope's fields, whichever layout the config has."""
    fields = raw.table("rope_scaling") or raw.table("rope_parameters")
    nested = [v for v in fields.values() if isinstance(v, dict)]
    if nested:  # one object per layer type
        if any(v != nested[0] for v in nested) or len(nested) != len(fields):
            raise UnsupportedModel(
                f"{raw.path}: rope_parameters differ by layer type ({', '.join(fields)}); "
                "supported: the same for all layers",
                "rope_parameters",
            )
        fields = nested[0]
    return HfConfig(fields, raw.path)


def _scaled_rope(raw: HfConfig, fields: HfConfig, kind: RopeKind, theta: float, rotary_dim: int) -> RopeConfig:
    max_position = raw.integer("max_position_embeddings")
    # Phi-3 keeps the pretraining length next to the rope's fields, and there it wins.
    original = raw.integer(
        "original_max_position_embeddings", fields.integer("original_max_position_embeddings", max_position)
    )
    if kind == "longrope" and original < 2:
        raise InvalidRequest(
            f"{raw.path}: original_max_position_embeddings must be at least 2 for longrope, got {original}", "model"
        )
    stretch = fields.number("factor", max_position / original) if kind in ("yarn", "longrope") else None
    given = fields.values.get("attention_factor")
    match kind:
        case "default":
            return RopeConfig(kind, theta, rotary_dim)
        case "linear":
            return RopeConfig(kind, theta, rotary_dim, factor=fields.number("factor"))
        case "llama3":
            low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
            if high <= low:
                raise InvalidRequest(
                    f"{raw.path}: high_freq_factor {high} must be above low_freq_factor {low}", "model"
                )
            return RopeConfig(
                kind,
                theta,
                rotary_dim,
                factor=fields.number("factor"),
                original_max_position=original,
                low_freq_factor=low,
                high_freq_factor=high,
            )
        case "yarn":
            return RopeConfig(
                kind,
                theta,
                rotary_dim,
                factor=stretch or 1.0,
                original_max_position=original,
                attention_factor=None if given is None else fields.number("attention_factor"),
                beta_fast=_number_or_zero(fields, "beta_fast") or 32.0,
                beta_slow=_number_or_zero(fields, "beta_slow") or 1.0,
                mscale=_number_or_zero(fields, "mscale"),
                mscale_all_dim=_number_or_zero(fields, "mscale_all_dim"),
                truncate=fields.flag("truncate", True),
            )
        case "longrope":
            return RopeConfig(
                kind,
                theta,
                rotary_dim,
                factor=stretch or 1.0,
                original_max_position=original,
                attention_factor=None if given is None else fields.number("attention_factor"),
                short_factor=_factors(fields, "short_factor", rotary_dim // 2),
                long_factor=_factors(fields, "long_factor", rotary_dim // 2),
            )


def _number_or_zero(fields: HfConfig, name: str) -> float:
    """A positive number; 0 where it is absent, null or 0, which all mean the default here."""
    value = fields.values.get(name)
    return 0.0 if value is None or (value == 0 and not isinstance(value, bool)) else fields.number(name)


def _factors(fields: HfConfig, name: str, count: int) -> tuple[float, ...]:
    value: Any = fields.values.get(name)
    good = isinstance(value, list) and all((_finite(f) or 0.0) > 0 for f in value)
    if not good or len(value) != count:
        got = f"{len(value)} entries" if isinstance(value, list) else f"{value!r:.80}"
        raise InvalidRequest(f"{fields.path}: {name} must list {count} positive numbers, got {got}", "model")
    return tuple(float(f) for f in value)


def eos_token_ids(raw: HfConfig, generation: HfConfig) -> tuple[int, ...]:
    """Every id that ends a text, by config.json or generation_config.json (each an id or a list), ascending.

    -1 is how some checkpoints say "none" and is skipped; 2.0 is 2.
    """
    ids: set[int] = set()
    for source in (raw, generation):
        value = source.values.get("eos_token_id")
        for i in value if isinstance(value, list) else [] if value is None else [value]:
            number = _finite(i)
            if number is None or not number.is_integer() or not -1 <= number <= MAX_INT:
                raise InvalidRequest(f"{source.path}: eos_token_id must be token ids, got {value!r:.80}", "model")
            if number >= 0:
                ids.add(int(number))
    return tuple(sorted(ids))


def generation_defaults(generation: HfConfig) -> dict[str, float | int]:
    """The sampling settings generation_config.json recommends, by the names of SamplingParams; {} where it is silent.

    do_sample false with no temperature means greedy: temperature 0. A value no request could have is left out, with a
    logged note: nobody asked for it, and as a default it would fail every request.
    """
    out: dict[str, float | int] = {}
    for name, allowed, wanted in (
        ("temperature", lambda v: v >= 0, "a number >= 0"),
        ("top_p", lambda v: 0 < v <= 1, "in (0, 1]"),
        ("top_k", lambda v: v.is_integer() and -1 <= v <= MAX_INT, "an integer >= -1 below 2**31"),
        ("min_p", lambda v: 0 <= v <= 1, "in [0, 1]"),
    ):
        value = generation.values.get(name)
        if value is None:
            continue
        number = _finite(value)
        if number is None or not allowed(number):
            log.warning("%s: %s must be %s, got %.80r: not used", generation.path, name, wanted, value)
            continue
        out[name] = int(number) if name == "top_k" else number
    if generation.values.get("do_sample") is False:
        out["temperature"] = 0.0
    return out
