"""Checkpoint tensors: safetensors files read through mmap, and the filling of a program's weight slots from them.

models/loader.py opens a `Checkpoint` and calls `fill_store` (native: addresses of mapped memory go to the core,
which packs them) or `slot_array` (reference: numpy). No tensor is copied on the way, but for one that a file leaves
misaligned.

The format (8 bytes of header length, a JSON header, the data) is read here rather than by the `safetensors` package
because that one hands out copies in a framework's tensors; what is wanted is addresses. A header is untrusted input:
every number in it is checked before it becomes an address.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import mmap
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sapwood import _core
from sapwood.errors import InvalidRequest, UnsupportedModel
from sapwood.layers.rotary import RopeTable
from sapwood.program.ir import ActDType, ArrayPart, Program, TensorPart, WeightSlot

log = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 64
_DTYPES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {"F32": ("float32", 4), "BF16": ("bfloat16", 2), "F16": ("float16", 2)}
)
_ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F8_E5M2": 1,
        "F8_E4M3": 1,
        "F8_E8M0": 1,
        "I16": 2,
        "U16": 2,
        "F16": 2,
        "BF16": 2,
        "I32": 4,
        "U32": 4,
        "F32": 4,
        "F64": 8,
        "I64": 8,
        "U64": 8,
    }
)
# Buffers old checkpoints carry and nothing needs: they are recomputed.
_RECOMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "attn.masked_bias", "attn.bias")


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of a file. `data` is its raw bytes, mapped. dtype: float32, bfloat16, float16, or the file's name
    for others.
    """

    name: str
    file: SafetensorsFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    data: np.ndarray[Any, np.dtype[np.uint8]]

    @property
    def item_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2


class SafetensorsFile:
    """One mapped file. The mapping lives as long as the object; tensors point into it."""

    def __init__(self, path: Path) -> None:
        """Map and check the header. InvalidRequest, naming the file and what is wrong, for anything not well formed."""
        self.path = path
        try:
            with open(path, "rb") as handle:
                self.size = handle.seek(0, 2)
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be read: {error}", "model") from None
        if self._map is None or self.size < 8:
            raise self._bad(f"{self.size} bytes are too few for a safetensors file; is the download complete?")
        header_len = int.from_bytes(self._map[:8], "little")
        if header_len > min(MAX_HEADER_BYTES, self.size - 8):
            what = (
                "a Git LFS pointer, not the file itself: run git lfs pull"
                if self._map[:8] == b"version "
                else "truncated or foreign"
            )
            raise self._bad(f"the header would have {header_len} bytes in a file of {self.size}: {what}")
        self.header = bytes(self._map[8 : 8 + header_len])
        self._data_begin = 8 + header_len
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.tensors = self._parse()

    def prefetch(self) -> None:
        """Ask the kernel to read ahead: the slots are filled in file order."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_WILLNEED)

    def _parse(self) -> dict[str, Tensor]:
        try:
            entries = json.loads(self.header.decode("utf-8"), object_pairs_hook=_unique_keys)
        except (ValueError, _DuplicateKey, RecursionError) as error:  # ValueError: a number too long, too
            raise self._bad(f"the header is not valid JSON: {error}") from None
        if not isinstance(entries, dict):
            raise self._bad("the header is not a JSON object")
        tensors = {name: self._tensor(name, entry) for name, entry in entries.items() if name != "__metadata__"}
        end = 0
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if tensor.offset < end and tensor.data.size:
                raise self._bad(f"tensor {tensor.name!r} overlaps the one before it")
            end = max(end, tensor.offset + tensor.data.size)
        return tensors

    def _tensor(self, name: str, entry: Any) -> Tensor:
        available = self.size - self._data_begin
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sane = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and isinstance(dtype, str)
        except (TypeError, KeyError, ValueError):
            sane = False
        if not sane:
            raise self._bad(
                f"tensor {name!r} needs dtype, shape and data_offsets [begin, end], got {reprlib.repr(entry)}"
            )
        if not begin <= end <= available:
            raise self._bad(
                f"tensor {name!r} lies at [{begin}, {end}) of {available} bytes of data: "
                "the file is truncated or corrupt"
            )
        if dtype not in _ITEM_BYTES:
            raise self._bad(f"tensor {name!r} has unknown dtype {dtype!r}")
        # Nothing in the file is larger than the file, not even beside a 0; without that, the product has no bound.
        if len(shape) > MAX_DIMS or any(n > self.size for n in shape):
            raise self._bad(
                f"tensor {name!r} of shape {reprlib.repr(list(shape))} must have at most {MAX_DIMS} dimensions, none "
                f"above the file's {self.size} bytes"
            )
        expected = math.prod(shape) * _ITEM_BYTES[dtype]
        if end - begin != expected:
            raise self._bad(f"tensor {name!r} of {dtype} {list(shape)} needs {expected} bytes, got {end - begin}")
        offset = self._data_begin + begin
        return Tensor(
            name, self, _DTYPES.get(dtype, (dtype, 0))[0], shape, offset, self._bytes[offset : offset + expected]
        )

    def _bad(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"{self.path}: {what}", "model")


class Checkpoint:
    """All tensors of a model directory, by name, over one or several files."""

    def __init__(self, files: list[SafetensorsFile]) -> None:
        self.files = files
        self.tensors: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in file.tensors.items():
                if name in self.tensors:
                    other = self.tensors[name].file.path.name
                    raise InvalidRequest(
                        f"tensor {name!r} is in two files: {other} and {file.path.name}; remove the one left over",
                        "model",
                    )
                self.tensors[name] = tensor

    @classmethod
    def open(cls, model_dir: Path) -> Checkpoint:
        """model.safetensors, or the files its index names, or whatever *.safetensors there is."""
        index, single = model_dir / INDEX_NAME, model_dir / "model.safetensors"
        if index.is_file():
            return cls._from_index(index)
        paths = [single] if single.is_file() else sorted(p for p in model_dir.glob("*.safetensors"))
        if not paths:
            others = sorted(p.name for p in model_dir.glob("*.bin")) + sorted(p.name for p in model_dir.glob("*.gguf"))
            found = f"found {', '.join(others[:4])}; convert to safetensors" if others else "is the download complete?"
            raise InvalidRequest(
                f"{model_dir} holds no *.safetensors: {found}. load_format='dummy' runs without weights", "model"
            )
        return cls([SafetensorsFile(path) for path in paths])

    @classmethod
    def _from_index(cls, index: Path) -> Checkpoint:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            good = bool(names) and all(isinstance(n, str) and n == Path(n).name for n in names)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            good = False
        if not good:
            raise InvalidRequest(f"{index} must hold weight_map: tensor name to file name in the same folder", "model")
        if missing := [n for n in names if not (index.parent / n).is_file()]:
            raise InvalidRequest(
                f"{index.parent} lacks {', '.join(missing)}, named by {index.name}; is the download complete?", "model"
            )
        checkpoint = cls([SafetensorsFile(index.parent / n) for n in names])
        if lost := [n for n, file in weight_map.items() if n not in checkpoint.files[names.index(file)].tensors]:
            raise InvalidRequest(
                f"{index} puts {lost[0]!r} into {weight_map[lost[0]]}, which does not hold it ({len(lost)} such)",
                "model",
            )
        return checkpoint

    def dtype(self) -> str:
        """The dtype most of the weights have: float32, bfloat16 or float16."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + math.prod(tensor.shape)
        return max(counts, key=lambda d: counts[d], default="float32")

    def identity(self) -> bytes:
        """A digest that changes with the weights: every file's header, size and time of change. Reads no tensor."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            digest.update(file.header)
            digest.update(f"{file.path.name} {file.size} {file.path.stat().st_mtime_ns}".encode())
        return digest.digest()

    def check(self, program: Program) -> None:
        """Every tensor the program names is there with the shape and a dtype it expects, and none is left that matters.

        InvalidRequest lists the missing and the misshapen; UnsupportedModel for dtypes and for left-over parameters of
        modules the program uses (a bias or scale that would silently change results).
        """
        parts = [p for slot in program.slots for p in slot.parts if isinstance(p, TensorPart)]
        names = {p.tensor for p in parts}
        if missing := sorted(names - self.tensors.keys()):
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            where = self.files[0].path.parent if self.files else "the checkpoint"
            raise InvalidRequest(
                f"{where} lacks tensors: {', '.join(missing[:8])}{more}; it holds {len(self.tensors)}", "model"
            )
        for part in parts:
            tensor = self.tensors[part.tensor]
            if tensor.shape != part.shape:
                raise InvalidRequest(
                    f"{tensor.file.path}: tensor {part.tensor!r} must have shape {list(part.shape)} by config.json, "
                    f"got {list(tensor.shape)}", "model",
                )  # fmt: skip
            if tensor.dtype not in ("float32", "bfloat16", "float16"):
                raise UnsupportedModel(
                    f"{tensor.file.path}: tensor {part.tensor!r} has dtype {tensor.dtype}; supported: F32, BF16, F16",
                    "model",
                )
        self._check_leftovers(names)

    def _check_leftovers(self, used: set[str]) -> None:
        left = sorted(n for n in self.tensors if n not in used and not n.endswith(_RECOMPUTED))
        modules = {name.rpartition(".")[0] for name in used}
        if harmful := [n for n in left if n.rpartition(".")[0] in modules]:
            raise UnsupportedModel(
                f"the checkpoint has {len(harmful)} parameters that config.json does not announce or this "
                f"version does not have: {', '.join(harmful[:4])}",
                "model",
            )
        if left:
            log.info(
                "%d tensors of the checkpoint are not used: %s%s",
                len(left),
                ", ".join(left[:4]),
                ", ..." if left[4:] else "",
            )


class _DuplicateKey(Exception):
    pass


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise _DuplicateKey(f"{key!r} occurs twice")
        out[key] = value
    return out


def resolve_dtype(requested: str, checkpoint_dtype: str) -> ActDType:
    """The compute dtype: the one asked for, or the checkpoint's; float16 becomes bfloat16, with a logged note."""
    if requested in ("float32", "bfloat16"):
        return requested  # type: ignore[return-value]
    if checkpoint_dtype == "float16":
        log.warning("the checkpoint is float16: computing in bfloat16 (dtype='float32' keeps every bit of it)")
        return "bfloat16"
    if checkpoint_dtype not in ("float32", "bfloat16"):
        raise UnsupportedModel(
            f"checkpoint dtype {checkpoint_dtype!r} is not supported; supported: float32, bfloat16, float16", "dtype"
        )
    return checkpoint_dtype  # type: ignore[return-value]


def fill_store(
    program: Program,
    store: _core.WeightStore,
    checkpoint: Checkpoint | None,
    *,
    num_threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill every slot of the program but the rope tables, in the order the files hold them, so that a cold disk is read
    once, forwards.

    checkpoint   checked by `Checkpoint.check`; None = load_format "dummy"
    progress     called with (bytes done, bytes in all) after each slot
    """
    if checkpoint is not None:
        for file in checkpoint.files:
            file.prefetch()
    tables = {slot.id for slot in rope_table_slots(program)}
    order = sorted((s for s in program.slots if s.id not in tables), key=lambda slot: _place(slot, checkpoint))
    sizes = [4 * math.prod(slot.shape) for slot in order]
    done = 0
    for slot, size in zip(order, sizes, strict=True):
        keep: list[np.ndarray[Any, Any]] = []  # arrays whose addresses the call below reads
        if checkpoint is None and not isinstance(slot.parts[0], ArrayPart) and slot.init == "random":
            rows, cols = slot.shape
            # Unit variance into unit variance: logits of a dummy model stay finite at any depth.
            scale = math.sqrt(3.0) if slot.kind == "table" else math.sqrt(3.0 / cols)
            parts = [(0, "float32", p.num_rows, cols, cols) for p in slot.parts]
            store.fill(slot.id, slot.kind, parts, dummy_scale=scale, num_threads=num_threads, format=slot.format)
        else:
            parts = [_address(slot, p, checkpoint, keep) for p in slot.parts]
            store.fill(slot.id, slot.kind, parts, num_threads=num_threads, format=slot.format)
        done += size
        if progress is not None:
            progress(done, sum(sizes))


def rope_table_slots(program: Program) -> list[WeightSlot]:
    """The slots `fill_rope_tables` fills."""
    return [slot for slot in program.slots if isinstance(slot.parts[0], RopeTable)]


def rope_table_bytes(program: Program, num_positions: int) -> int:
    """Bytes `fill_rope_tables` takes."""
    parts = [part for slot in rope_table_slots(program) for part in slot.parts]
    return sum(part.num_bytes(num_positions) for part in parts if isinstance(part, RopeTable))


def fill_rope_tables(program: Program, store: _core.WeightStore, num_positions: int, *, num_threads: int = 0) -> None:
    """Fill the rope tables with the first num_positions positions: after the pool is sized, because no request can be
    longer than a pool that keeps all its tokens. The numbers are dropped once the store has them.
    """
    for slot in rope_table_slots(program):
        for part in slot.parts:
            assert isinstance(part, RopeTable)
            values = part.values(num_positions)
            rows, cols = values.shape
            store.fill(slot.id, slot.kind, [(values.ctypes.data, "float32", rows, cols, cols)], num_threads=num_threads)


def _place(slot: WeightSlot, checkpoint: Checkpoint | None) -> tuple[int, int]:
    part = slot.parts[0]
    if checkpoint is None or isinstance(part, ArrayPart):
        return (-1, slot.id)
    tensor = checkpoint.tensors[part.tensor]
    return (checkpoint.files.index(tensor.file), tensor.offset)


def _address(
    slot: WeightSlot, part: TensorPart | ArrayPart, checkpoint: Checkpoint | None, keep: list[np.ndarray[Any, Any]]
) -> tuple[int, str, int, int, int]:
    """(address, dtype, rows, cols, stride) of a part; vectors are [n, 1]. Arrays made on the way are put into
    `keep`.
    """
    cols = slot.shape[1] if len(slot.shape) == 2 else 1
    if isinstance(part, TensorPart) and checkpoint is not None:
        tensor = checkpoint.tensors[part.tensor]
        row_bytes = cols * tensor.item_bytes
        data = tensor.data[part.row_begin * row_bytes : (part.row_begin + part.num_rows) * row_bytes]
        if data.ctypes.data % tensor.item_bytes:
            data = data.copy()
        keep.append(data)
        return (data.ctypes.data, tensor.dtype, part.num_rows, cols, cols)
    if isinstance(part, ArrayPart):
        array = np.ascontiguousarray(part.array, np.float32)
    else:
        array = np.full((part.num_rows, cols), 1.0 if slot.init == "ones" else 0.0, np.float32)
    keep.append(array)
    return (array.ctypes.data, "float32", part.num_rows, cols, cols)


def slot_array(slot: WeightSlot, checkpoint: Checkpoint | None, act: ActDType) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A slot's values as float32 [shape], rounded as the core holds them: to the compute dtype or to the slot's format
    (the reference's weights).

    Without a checkpoint: reproducible random values, not the ones the core draws.
    """
    rng = np.random.default_rng(slot.id)
    arrays = []
    for part in slot.parts:
        shape = (part.num_rows, *slot.shape[1:])
        if isinstance(part, RopeTable):
            arrays.append(part.values())
        elif isinstance(part, ArrayPart):
            arrays.append(part.array)
        elif checkpoint is not None:
            whole = _as_float32(checkpoint.tensors[part.tensor])
            arrays.append(whole[part.row_begin : part.row_begin + part.num_rows])
        elif slot.init == "random":
            scale = 1.0 if slot.kind == "table" else shape[-1] ** -0.5
            arrays.append((rng.standard_normal(shape) * scale).astype(np.float32))
        else:
            arrays.append(np.full(shape, 1.0 if slot.init == "ones" else 0.0, np.float32))
    array = np.concatenate(arrays)
    if slot.format != "act":
        return _core.quantized_weight(array, slot.format)
    in_act = slot.kind in ("linear", "gate_up", "table")
    return round_to_bfloat16(array) if act == "bfloat16" and in_act else array


def part_rows(part: TensorPart, checkpoint: Checkpoint) -> np.ndarray[Any, Any]:
    """A part's rows as the file has them: the bits of bfloat16 as uint16, mapped and read-only; float16, widened, and
    float32 as float32.
    """
    tensor = checkpoint.tensors[part.tensor]
    if tensor.dtype != "bfloat16":
        return _as_float32(tensor)[part.row_begin : part.row_begin + part.num_rows]
    raw = tensor.data if tensor.data.ctypes.data % 2 == 0 else tensor.data.copy()
    return raw.view(np.uint16).reshape(tensor.shape)[part.row_begin : part.row_begin + part.num_rows]


def _as_float32(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    raw = tensor.data if tensor.data.ctypes.data % tensor.item_bytes == 0 else tensor.data.copy()
    match tensor.dtype:
        case "float32":
            out = raw.view(np.float32)
        case "float16":
            out = raw.view(np.float16).astype(np.float32)
        case _:
            out = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return out.reshape(tensor.shape)


def round_to_bfloat16(array: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Finite float32 values rounded to the nearest bfloat16, ties to even, and back."""
    bits = np.ascontiguousarray(array).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)
