"""Safetensors files as they should be and as they should not, checkpoints over several files, and the filling of
slots.
"""

from __future__ import annotations

import ctypes
import json
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapwood.errors import InvalidRequest, UnsupportedModel
from sapwood.layers.rotary import RopeConfig, RopeTable, rope_tables
from sapwood.models.config import DecoderConfig
from sapwood.models.decoder import record_decoder
from sapwood.models.weights import (
    INDEX_NAME,
    Checkpoint,
    SafetensorsFile,
    fill_rope_tables,
    fill_store,
    resolve_dtype,
    rope_table_bytes,
    rope_table_slots,
    round_to_bfloat16,
    slot_array,
)  # fmt: skip
from sapwood.program.ir import Program, TensorPart

NAMES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "float64": "F64"}


def pack(tensors: dict[str, np.ndarray], *, raw_header: str | None = None, pad: int = 0, **changes: Any) -> bytes:
    """A safetensors file; uint16 arrays are bfloat16 bits. changes: entries of the header to replace."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        entries[name] = {
            "dtype": NAMES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    for name, change in changes.items():
        entries[name] = {**entries[name], **change}
    header = (raw_header if raw_header is not None else json.dumps(entries)).encode() + b" " * pad
    return struct.pack("<Q", len(header)) + header + data


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


A = np.arange(12, dtype=np.float32).reshape(3, 4)


# --- one file


def test_reads_names_shapes_and_bytes(tmp_path: Path) -> None:
    half = np.array([1.5, -2.0], np.float16)
    file = SafetensorsFile(write(tmp_path / "m.safetensors", pack({"a": A, "h": half})))
    assert {n: (t.dtype, t.shape) for n, t in file.tensors.items()} == {
        "a": ("float32", (3, 4)),
        "h": ("float16", (2,)),
    }
    np.testing.assert_array_equal(file.tensors["a"].data.view(np.float32).reshape(3, 4), A)
    assert file.tensors["h"].data.tobytes() == half.tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few"),
        (b"1234567", "too few"),
        (struct.pack("<Q", 2**63), "truncated or foreign"),
        (struct.pack("<Q", 100) + b"{}", "truncated or foreign"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (pack({}, raw_header="{"), "not valid JSON"),
        (pack({}, raw_header="[1]"), "not a JSON object"),
        (pack({}, raw_header="[" * 100_000), "not valid JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "not valid JSON"),
        (pack({}, raw_header='{"a": 1, "a": 2}'), "occurs twice"),
        (pack({}, raw_header='{"a": {"dtype": "F32"}}'), "needs dtype, shape"),
        (pack({}, raw_header='{"a": 7}'), "needs dtype, shape"),
        (pack({"a": A}, a={"shape": [-3, 4]}), "needs dtype, shape"),
        (pack({"a": A}, a={"shape": [True, 12]}), "needs dtype, shape"),
        (pack({"a": A}, a={"shape": [3.0, 4]}), "needs dtype, shape"),
        (pack({"a": A}, a={"data_offsets": [0, 48, 1]}), "needs dtype, shape"),
        (pack({"a": A}, a={"data_offsets": [-48, 0]}), "needs dtype, shape"),
        (pack({"a": A}, a={"data_offsets": [48, 0]}), "truncated or corrupt"),
        (pack({"a": A}, a={"data_offsets": [1, 49]}), "truncated or corrupt"),
        (pack({"a": A})[:-1], "truncated or corrupt"),
        (pack({"a": A}, a={"shape": [3, 5]}), "needs 60 bytes, got 48"),
        (pack({"a": A}, a={"shape": [12, 12]}), "needs 576 bytes, got 48"),
        (pack({"a": A}, a={"shape": [2**40, 2**40]}), r"of shape \[1099511627776, .* none above the file's \d+ bytes"),
        (pack({"a": A}, a={"shape": [0, 2**40], "data_offsets": [0, 0]}), "none above the file's"),
        (pack({"a": A}, a={"shape": [10**300] * 64}), "none above the file's"),
        (pack({"a": A}, a={"shape": [1] * 65}), "at most 64 dimensions"),
        (pack({}, raw_header='{"a": ' + "9" * 5000 + "}"), "not valid JSON"),
        (pack({"a": A}, a={"data_offsets": [0, 10**4000]}), "truncated or corrupt"),
        (pack({}, raw_header='{"a": {"dtype": ' + "[" * 200 + "]" * 200 + "}}"), "needs dtype, shape"),
        (pack({"a": A}, a={"dtype": "F31"}), "unknown dtype"),
        (pack({"a": A, "b": A}, b={"data_offsets": [24, 72]}), "overlaps"),
    ],
)
def test_refuses_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "m.safetensors", content)
    with pytest.raises(InvalidRequest, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    content = pack({"a": A, "b": A})
    for cut in range(len(content)):
        with pytest.raises(InvalidRequest):
            SafetensorsFile(write(tmp_path / "m.safetensors", content[:cut]))


def test_random_headers_never_escape_as_other_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = bytearray(pack({"a": A, "b": A}))
    for _ in range(300):
        broken = bytearray(content)
        for at in rng.integers(0, len(broken) - 96, rng.integers(1, 4)):
            broken[at] = rng.integers(0, 256)
        try:
            SafetensorsFile(write(tmp_path / "m.safetensors", bytes(broken)))
        except InvalidRequest:
            pass


# --- directories


def test_single_file_wins_over_others(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", pack({"a": A}))
    write(tmp_path / "consolidated.safetensors", pack({"a": A}))
    assert [f.path.name for f in Checkpoint.open(tmp_path).files] == ["model.safetensors"]


def test_index_names_the_files(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", pack({"a": A}))
    write(tmp_path / "y.safetensors", pack({"b": A}))
    write(tmp_path / "stray.safetensors", pack({"a": A}))
    write(tmp_path / INDEX_NAME, json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}).encode())
    assert sorted(Checkpoint.open(tmp_path).tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "weight_map"),
        ("{", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "b": "gone.safetensors"}}', "lacks gone.safetensors"),
        ('{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}', "does not hold it"),
    ],
)
def test_refuses_a_broken_index(tmp_path: Path, index: str, message: str) -> None:
    write(tmp_path / "x.safetensors", pack({"a": A}))
    write(tmp_path / INDEX_NAME, index.encode())
    with pytest.raises(InvalidRequest, match=message):
        Checkpoint.open(tmp_path)


def test_refuses_duplicates_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no \\*.safetensors"):
        Checkpoint.open(tmp_path)
    write(tmp_path / "pytorch_model.bin", b"x")
    with pytest.raises(InvalidRequest, match="pytorch_model.bin; convert"):
        Checkpoint.open(tmp_path)
    write(tmp_path / "x.safetensors", pack({"a": A}))
    write(tmp_path / "y.safetensors", pack({"a": A}))
    with pytest.raises(InvalidRequest, match="'a' is in two files: x.safetensors and y.safetensors"):
        Checkpoint.open(tmp_path)


# --- against a program


def tiny_program(act: Any = "float32", rope: RopeConfig | None = None, **changes: Any) -> Program:
    config = DecoderConfig(
        vocab_size=20,
        hidden=8,
        intermediate=12,
        num_layers=1,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=4,
        norm_eps=1e-5,
        rope=rope or RopeConfig("default", 1e4, 4),
        layer_windows=(0,),
        context_len=16,
        tied=True,
        **changes,
    )
    return record_decoder(config, act, 16)


def tensors_of(program: Program, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {p.tensor: p.shape for s in program.slots for p in s.parts if isinstance(p, TensorPart)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def checkpoint_of(tmp_path: Path, tensors: dict[str, np.ndarray], **how: Any) -> Checkpoint:
    write(tmp_path / "model.safetensors", pack(tensors, **how))
    return Checkpoint.open(tmp_path)


def test_check_names_missing_tensors(tmp_path: Path) -> None:
    program = tiny_program()
    tensors = tensors_of(program)
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(
        InvalidRequest, match=r"lacks tensors: model\.layers\.0\.mlp\.up_proj\.weight, model\.norm\.weight; it holds 9"
    ):
        checkpoint_of(tmp_path, tensors).check(program)


def test_check_names_shapes_and_dtypes(tmp_path: Path) -> None:
    program = tiny_program()
    tensors = tensors_of(program)
    with pytest.raises(InvalidRequest, match=r"'model\.norm\.weight' must have shape \[8\] by config.json, got \[9\]"):
        checkpoint_of(tmp_path, {**tensors, "model.norm.weight": np.zeros(9, np.float32)}).check(program)
    with pytest.raises(UnsupportedModel, match="dtype F64; supported: F32, BF16, F16"):
        checkpoint_of(tmp_path, {**tensors, "model.norm.weight": np.zeros(8, np.float64)}).check(program)


def test_check_refuses_parameters_that_would_be_ignored(tmp_path: Path) -> None:
    program = tiny_program()
    tensors = tensors_of(program)
    harmless = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
        "lm_head.weight": np.zeros((20, 8), np.float32),
    }
    checkpoint_of(tmp_path, {**tensors, **harmless}).check(program)
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(8, np.float32)}
    with pytest.raises(UnsupportedModel, match=r"q_proj\.bias"):
        checkpoint_of(tmp_path, {**tensors, **bias}).check(program)


def test_dtype_auto(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_dtype("auto", "float32") == "float32"
    assert resolve_dtype("auto", "bfloat16") == "bfloat16"
    assert resolve_dtype("float32", "float16") == "float32"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert resolve_dtype("auto", "float16") == "bfloat16"
    assert "float16: computing in bfloat16" in caplog.text
    with pytest.raises(UnsupportedModel, match="F8_E4M3"):
        resolve_dtype("auto", "F8_E4M3")


class RecordingStore:
    """Stands in for _core.WeightStore: copies what the addresses hold while they must be valid."""

    def __init__(self) -> None:
        self.filled: dict[int, tuple[str, np.ndarray | None, float]] = {}
        self.order: list[int] = []

    def fill(
        self, slot: int, kind: str, parts: list[Any], *, dummy_scale: float = 0.0, num_threads: int = 0,
        format: str = "act",
    ) -> None:  # fmt: skip
        assert format == "act"
        arrays = []
        for address, dtype, rows, cols, stride in parts:
            assert stride == cols
            if not address:
                continue
            item = 4 if dtype == "float32" else 2
            assert address % item == 0
            raw = np.frombuffer(ctypes.string_at(address, rows * cols * item), np.float32 if item == 4 else np.uint16)
            if dtype == "float16":
                raw = raw.view(np.float16).astype(np.float32)
            elif dtype == "bfloat16":
                raw = (raw.astype(np.uint32) << 16).view(np.float32)
            arrays.append(raw.reshape(rows, cols))
        self.filled[slot] = (kind, np.concatenate(arrays) if arrays else None, dummy_scale)
        self.order.append(slot)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("pad", [0, 1])
def test_fill_hands_over_the_right_bytes(tmp_path: Path, dtype: str, pad: int) -> None:
    """pad 1 leaves every tensor misaligned in the file."""
    program = tiny_program(fused_gate_up=True)
    tensors = tensors_of(program, dtype)
    header = len(pack(tensors)) - sum(t.nbytes for t in tensors.values())
    checkpoint = checkpoint_of(tmp_path, tensors, pad=pad - header % 4 + 4)
    assert checkpoint.tensors["model.norm.weight"].offset % 4 == pad
    store, seen = RecordingStore(), []
    fill_store(program, store, checkpoint, progress=lambda done, total: seen.append((done, total)))  # type: ignore[arg-type]
    assert set(store.filled) == {s.id for s in program.slots} - {s.id for s in rope_table_slots(program)}
    fill_rope_tables(program, store, 16)  # type: ignore[arg-type]
    assert set(store.filled) == {s.id for s in program.slots}
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    for slot in program.slots:
        kind, values, _ = store.filled[slot.id]
        assert kind == slot.kind and values is not None
        np.testing.assert_array_equal(
            values.reshape(slot.shape), slot_array(slot, checkpoint, "float32"), err_msg=slot.name
        )
    names = {s.name: s for s in program.slots}
    qkv = store.filled[names["layers.0.qkv.w"].id][1]
    np.testing.assert_array_equal(
        qkv, np.concatenate([tensors[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"])
    )


def test_fill_goes_through_the_file_in_order(tmp_path: Path) -> None:
    program = tiny_program()
    tensors = dict(sorted(tensors_of(program).items(), reverse=True))
    checkpoint = checkpoint_of(tmp_path, tensors)
    store = RecordingStore()
    fill_store(program, store, checkpoint)  # type: ignore[arg-type]
    slots = {s.id: s for s in program.slots}
    places = [
        checkpoint.tensors[p.tensor].offset
        for i in store.order
        for p in slots[i].parts[:1]
        if isinstance(p, TensorPart)
    ]
    assert places == sorted(places)


def test_dummy_needs_no_files() -> None:
    program = tiny_program(qkv_bias=True)
    store = RecordingStore()
    fill_store(program, store, None)  # type: ignore[arg-type]
    fill_rope_tables(program, store, 16)  # type: ignore[arg-type]
    names = {s.name: store.filled[s.id] for s in program.slots}
    np.testing.assert_array_equal(names["layers.0.mlp_norm.w"][1], np.ones((8, 1)))
    np.testing.assert_array_equal(names["layers.0.qkv.bias"][1], np.zeros((16, 1)))
    assert names["layers.0.qkv.w"][1] is None and names["layers.0.qkv.w"][2] == pytest.approx((3 / 8) ** 0.5)
    assert names["rope.cos"][1] is not None


def test_rope_tables_are_filled_as_far_as_a_request_can_reach() -> None:
    """longrope's second mode begins where the first, shortened, ends; nothing of the tables stays with the program."""
    factors = {"short_factor": (1.0, 1.5), "long_factor": (2.0, 3.0)}
    rope = RopeConfig("longrope", 1e4, 4, factor=2.0, original_max_position=8, **factors)
    program = tiny_program(rope=rope)
    store = RecordingStore()
    fill_rope_tables(program, store, 5)  # type: ignore[arg-type]
    assert rope_table_bytes(program, 5) == 2 * (2 * 5) * 2 * 4
    whole = dict(zip(("rope.cos", "rope.sin"), rope_tables(rope, 16), strict=True))
    for slot in rope_table_slots(program):
        filled = store.filled[slot.id][1]
        assert filled is not None and filled.shape == (10, 2) and slot.shape == (32, 2)
        np.testing.assert_array_equal(filled[:5], whole[slot.name][:5])
        np.testing.assert_array_equal(filled[5:], whole[slot.name][16:21])
        part = slot.parts[0]
        assert isinstance(part, RopeTable) and part.array.base is not None and part.array.strides == (0, 0)
        np.testing.assert_array_equal(slot_array(slot, None, "float32"), whole[slot.name])
    fill_rope_tables(program, store, 1000)  # type: ignore[arg-type]
    assert store.filled[rope_table_slots(program)[0].id][1].shape == (32, 2)  # type: ignore[union-attr]


def test_bfloat16_rounds_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    values = np.concatenate(
        [rng.standard_normal(1000) * 10.0 ** rng.integers(-30, 30, 1000), [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]]
    )
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(round_to_bfloat16(values), expected)


def test_reference_rounds_matrices_but_not_vectors(tmp_path: Path) -> None:
    program = tiny_program("bfloat16")
    checkpoint = checkpoint_of(tmp_path, tensors_of(program))
    slots = {s.name: s for s in program.slots}
    norm, weight = (slot_array(slots[n], checkpoint, "bfloat16") for n in ("head.norm.w", "layers.0.qkv.w"))
    assert not np.array_equal(norm, round_to_bfloat16(norm)) and np.array_equal(weight, round_to_bfloat16(weight))


def test_identity_changes_with_the_weights(tmp_path: Path) -> None:
    import os

    path = write(tmp_path / "model.safetensors", pack({"a": A}))
    first = Checkpoint.open(tmp_path).identity()
    assert Checkpoint.open(tmp_path).identity() == first
    write(path, pack({"a": A + 1}))
    os.utime(path, ns=(1, 1))
    assert Checkpoint.open(tmp_path).identity() != first
