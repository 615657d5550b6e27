"""The model IR: symbols refuse to be numbers, the recorder refuses wrong nodes, and a decoder records to what the
core expects.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest

from sapwood.config import EngineConfig
from sapwood.errors import InternalError, InvalidRequest
from sapwood.layers.rotary import RopeConfig
from sapwood.models.config import DecoderConfig
from sapwood.models.decoder import record_decoder
from sapwood.program import native
from sapwood.program.ir import ArrayPart, GroupSpec, L, Program, Recorder, Sym, T, TensorPart
from sapwood.program.ops import OPS


def tiny(**changes: Any) -> DecoderConfig:
    fields: dict[str, Any] = {
        "vocab_size": 130,
        "hidden": 24,
        "intermediate": 40,
        "num_layers": 3,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "norm_eps": 1e-5,
        "rope": RopeConfig("default", 10000.0, 6),
        "layer_windows": (0, 0, 0),
        "context_len": 64,
        "tied": False,
    }
    return DecoderConfig(**{**fields, **changes})


def record(**changes: Any) -> Program:
    return record_decoder(tiny(**changes), "float32", 64)


# --- symbols


@pytest.mark.parametrize("convert", [bool, int, float, operator.index, range, lambda s: [0][s]])
def test_a_symbol_cannot_become_a_number(convert: Any) -> None:
    for symbol in (T, L):
        with pytest.raises(TypeError):
            convert(symbol)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("other", [0, 1.5, None, T, L])
def test_a_symbol_cannot_be_compared(name: str, other: Any) -> None:
    with pytest.raises(TypeError, match="symbol T"):
        getattr(operator, name)(T, other)
    with pytest.raises(TypeError):
        getattr(operator, name)(other, T)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "floordiv", "mod", "neg"])
def test_a_symbol_has_no_arithmetic(name: str) -> None:
    with pytest.raises(TypeError):
        getattr(operator, name)(*([T] if name == "neg" else [T, 1]))


def test_symbols_have_identity_and_a_name() -> None:
    assert T is T and repr(T) == "T" and repr(Sym("X")) == "X"
    assert len({T: 1, L: 2}) == 2


# --- the recorder


def embedded(vocab: int = 10, hidden: int = 8) -> tuple[Recorder, Any]:
    rec = Recorder("float32", vocab)
    table = rec.slot("table", "table", [TensorPart("e", (vocab, hidden))])
    return rec, rec.op("embedding", "embed", (), [("float32", T, hidden)], [table], scale=1.0)[0]


def test_recorder_refuses_what_does_not_fit() -> None:
    rec, x = embedded()
    w8, w9 = (rec.slot(f"w{n}", "vector", [TensorPart(f"w{n}", (n,))]) for n in (8, 9))
    good: dict[str, Any] = {"plus_one": 0, "eps": 1e-5}
    out = [("act", T, 8)]
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("unknown op", ("rms_norn", "a", [x], out, [w8]), good),
        ("weight", ("rms_norm", "a", [x], out, [w9]), good),
        ("output", ("rms_norm", "a", [x], [("act", T, 9)], [w8]), good),
        ("rows", ("rms_norm", "a", [x], [("act", L, 8)], [w8]), good),
        ("outputs must be", ("rms_norm", "a", [x], [("float32", T, 8)], [w8]), good),
        ("inputs must be", ("rms_norm", "a", [], out, [w8]), good),
        ("parameters must be", ("rms_norm", "a", [x], out, [w8]), {"eps": 1e-5}),
        ("integer", ("rms_norm", "a", [x], out, [w8]), {"plus_one": 0.5, "eps": 1e-5}),
        ("not optional", ("rms_norm", "a", [x], out, [None]), good),
        ("takes 1 weights", ("rms_norm", "a", [x], out, [w8, w8]), good),
        ("two nodes are called", ("rms_norm", "embed", [x], out, [w8]), good),
        ("belongs to", ("gather_logit_rows", "a", [x], [("float32", L, 8)]), {}),
    ]
    for message, args, params in cases:
        with pytest.raises(InternalError, match=message):
            rec.op(*args, **params)
    rec.op("rms_norm", "a", [x], out, [w8], **good)  # and the right one is taken


def test_recorder_refuses_values_of_another_program() -> None:
    _, foreign = embedded()
    rec, _ = embedded()
    w = rec.slot("w", "vector", [TensorPart("w", (8,))])
    with pytest.raises(InternalError, match="another program"):
        rec.op("rms_norm", "a", [foreign], [("act", T, 8)], [w], plus_one=0, eps=1e-5)


def test_segments_and_taps() -> None:
    rec, x = embedded()
    rec.segment("head")
    with pytest.raises(InternalError, match="cannot follow"):
        rec.segment("forward")
    assert rec.tap("hidden", x) is x
    with pytest.raises(InternalError, match="two taps"):
        rec.tap("hidden", x)


def test_slots_stack_parts() -> None:
    rec, _ = embedded()
    slot = rec.slot("w", "linear", [TensorPart("a", (6, 4), 2, 5), TensorPart("b", (2, 4))])
    assert slot.shape == (5, 4)
    for parts in (
        [],
        [TensorPart("a", (6, 4)), TensorPart("b", (6, 5))],
        [TensorPart("a", (6, 4), 4, 9)],
        [TensorPart("a", (6, 4), 5, 5)],
    ):
        with pytest.raises(InternalError):
            rec.slot("w", "linear", parts)
    with pytest.raises(InternalError, match="cannot have shape"):
        rec.slot("w", "vector", [TensorPart("a", (6, 4))])


# --- the decoder


def test_decoder_nodes_in_order() -> None:
    program = record()
    layer = ["rms_norm", "qkv", "attention", "linear_residual", "rms_norm", "gate_up", "linear_residual"]
    assert [n.op for n in program.nodes] == [
        "embedding",
        *layer * 3,
        "gather_logit_rows",
        "rms_norm",
        "lm_head",
        "sample",
    ]
    assert program.nodes[2].name == "layers.0.qkv" and program.nodes[2].layer == 0
    assert [n.segment for n in program.nodes[-4:]] == ["head", "head", "head", "sample"]
    assert program.groups == (GroupSpec(0, 3),)
    assert set(program.taps) == {"layers.0", "layers.1", "layers.2", "last_hidden", "logits"}
    assert program.writer(program.taps["layers.1"]).name == "layers.1.down_proj"
    # tensor parallelism is in the model at size 1
    assert [n.params["all_reduce"] for n in program.nodes if n.op == "linear_residual"] == [1] * 6
    with pytest.raises(KeyError, match=r"layers\.0\.qkv"):
        program.node("layers.0.qvk")


def test_windows_make_groups() -> None:
    program = record(layer_windows=(16, 0, 16))
    assert program.groups == (GroupSpec(0, 1), GroupSpec(16, 2))
    assert [g.kind for g in program.groups] == ["full", "window"]
    placed = [
        (n.params["kv_group"], n.params["layer_in_group"], n.params["window"])
        for n in program.nodes
        if n.op == "attention"
    ]
    assert placed == [(1, 0, 16), (0, 0, 0), (1, 1, 16)]
    # a window that no request can outgrow is none; one that the longest request can is kept
    assert record(layer_windows=(64, 64, 64)).groups == (GroupSpec(0, 3),)
    assert record(layer_windows=(63, 63, 63)).groups == (GroupSpec(63, 3),)


def test_weight_slots_name_checkpoint_tensors() -> None:
    program = record(qkv_bias=True, o_bias=True, qk_norm=True)
    by_name = {slot.name: slot for slot in program.slots}
    assert [p.tensor for p in by_name["layers.1.qkv.w"].parts] == [
        f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkv"
    ]
    assert by_name["layers.1.qkv.w"].shape == (48, 24) and by_name["layers.1.qkv.bias"].shape == (48,)
    assert by_name["layers.0.qkv.k_norm"].parts[0].tensor == "model.layers.0.self_attn.k_norm.weight"
    assert by_name["layers.0.o_proj.bias"].init == "zeros" and by_name["layers.0.mlp_norm.w"].init == "ones"
    assert by_name["head.lm_head.w"].parts[0].tensor == "lm_head.weight"
    tied = {slot.name: slot for slot in record(tied=True).slots}
    assert tied["head.lm_head.w"].parts[0].tensor == tied["embed.table"].parts[0].tensor == "model.embed_tokens.weight"


def test_fused_tensors_are_cut_by_rows() -> None:
    slots = {s.name: s for s in record(fused_qkv=True, fused_gate_up=True).slots}
    assert [(p.tensor, p.shape) for p in slots["layers.2.qkv.w"].parts] == [
        ("model.layers.2.self_attn.qkv_proj.weight", (48, 24))
    ]
    parts = slots["layers.2.gate_up.w"].parts
    assert [(p.row_begin, p.row_end, p.shape) for p in parts] == [(0, 40, (80, 24)), (40, 80, (80, 24))]


def test_rope_tables_are_shared_by_all_layers() -> None:
    program = record()
    tables = {tuple(w.id for w in n.weights[4:]) for n in program.nodes if n.op == "qkv"}
    assert len(tables) == 1
    cos = next(s for s in program.slots if s.name == "rope.cos")
    assert cos.shape == (64, 3) and isinstance(cos.parts[0], ArrayPart) and cos.parts[0].array.dtype == np.float32


def test_kv_layers_must_be_written_once() -> None:
    rec, _ = embedded()
    with pytest.raises(InternalError, match="KV layers"):
        rec.finish([GroupSpec(0, 1)], 1, 8)


# --- lowering


def test_lowering_keeps_ids_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named parameters become lists in the order that cpp/program/program.h documents."""
    calls: list[tuple[Any, ...]] = []

    class Builder:
        def __init__(self, act: str, vocab: int) -> None:
            calls.append(("program", act, vocab))

        def value(self, dtype: str, rows: str, cols: int) -> None:
            calls.append(("value", dtype, rows, cols))

        def slot(self) -> None:
            calls.append(("slot",))

        def node(self, *args: Any) -> None:
            calls.append(args)

    monkeypatch.setattr(native._core, "ProgramBuilder", Builder)
    program = record_decoder(tiny(layer_windows=(0, 16, 0), qk_norm=True), "bfloat16", 64)
    native.lower(program)
    assert calls[0] == ("program", "bfloat16", 130)
    assert ("value", "bfloat16", "T", 24) in calls and ("value", "float32", "L", 130) in calls
    assert calls.count(("slot",)) == len(program.slots)
    nodes = {c[7]: c for c in calls if len(c) == 8}
    assert len(nodes) == len(program.nodes)
    op, segment, inputs, outputs, weights, ints, floats, _ = nodes["layers.1.qkv"]
    assert (op, segment, ints, floats) == ("qkv", "forward", [4, 2, 6, 6, 1, 0, 1], [1e-5])
    assert weights[1] == -1 and min(weights[0], *weights[2:]) >= 0 and len(inputs) == len(outputs) == 1
    assert nodes["layers.1.attention"][5:7] == ([4, 2, 6, 1, 0, 16], [6**-0.5, 0.0])
    assert nodes["layers.2.attention"][5] == [4, 2, 6, 0, 1, 0]
    assert nodes["layers.0.gate_up"][5] == [40] and nodes["layers.0.o_proj"][5] == [1]
    assert nodes["head.lm_head"][6] == [1.0, 0.0] and nodes["embed"][6] == [1.0]
    assert nodes["sample"][1:3] == ("sample", nodes["head.lm_head"][3])


def test_every_op_of_the_table_is_lowered_by_the_core() -> None:
    """The core parses each op's name (a wrong one raises)."""
    from sapwood import _core

    builder = _core.ProgramBuilder("float32", 10)
    for op in OPS:
        builder.node(op, "forward", [], [], [], [], [], op)
    with pytest.raises(ValueError, match="nonsense"):
        builder.node("nonsense", "forward", [], [], [], [], [], "x")


def test_groups_count_padded_bytes() -> None:
    groups = native.kv_groups(record_decoder(tiny(layer_windows=(0, 16, 0)), "bfloat16", 64), 32)
    assert [(g.kind, g.window, g.num_layers, g.page_size) for g in groups] == [
        ("full", 0, 2, 32),
        ("window", 16, 1, 32),
    ]
    # K and V, 32 tokens, 2 heads of 6 padded to 16, 2 bytes
    assert [g.page_bytes for g in groups] == [2 * 2 * 32 * 2 * 16 * 2, 2 * 32 * 2 * 16 * 2]
    # int8: 1 byte, and a float32 for each token's head of K and of V
    groups = native.kv_groups(record_decoder(tiny(layer_windows=(0, 16, 0)), "bfloat16", 64), 32, int8_kv=True)
    assert [g.page_bytes for g in groups] == [2 * 2 * 32 * 2 * (16 + 4), 2 * 32 * 2 * (16 + 4)]
    with pytest.raises(InvalidRequest, match="page_size must be 16, 32 or 64"):
        native.kv_groups(record(), 8)


@pytest.mark.parametrize(("act", "asked", "int8"), [
    ("float32", "auto", False), ("bfloat16", "auto", False), ("float32", "float32", False),
    ("bfloat16", "bfloat16", False), ("float32", "int8", True), ("bfloat16", "int8", True),
])  # fmt: skip
def test_kv_cache_dtype(act: str, asked: str, int8: bool) -> None:
    program = record_decoder(tiny(), act, 64)
    assert native.has_int8_kv(program, EngineConfig.from_kwargs("m", kv_cache_dtype=asked)) is int8


@pytest.mark.parametrize(("act", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_kv_cache_dtype_is_the_models_or_int8(act: str, asked: str) -> None:
    config = EngineConfig.from_kwargs("m", kv_cache_dtype=asked)
    with pytest.raises(InvalidRequest, match=f"int8 or the model's dtype {act}, got {asked}") as caught:
        native.has_int8_kv(record_decoder(tiny(), act, 64), config)
    assert caught.value.param == "kv_cache_dtype"
