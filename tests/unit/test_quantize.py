"""program/quantize.py: which slots and values of a recorded model change, and what the core makes of weights."""

from __future__ import annotations

import numpy as np
import pytest
from test_program import record

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.errors import InvalidRequest
from sapwood.program import native
from sapwood.program.ir import Program
from sapwood.program.ops import OPS
from sapwood.program.quantize import quantize


def formats(program: Program) -> dict[str, str]:
    return {slot.name: slot.format for slot in program.slots if slot.format != "act"}


def dtypes(program: Program) -> dict[str, str]:
    return {value.name: value.dtype for value in program.values if value.name.startswith(("layers.1.", "head"))}


def test_every_matrix_but_the_table() -> None:
    program = quantize(record(), "int4", "int8")
    names = [f"layers.{i}.{n}.w" for i in range(3) for n in ("qkv", "o_proj", "gate_up", "down_proj")]
    assert formats(program) == dict.fromkeys(names, "int4") | {"head.lm_head.w": "int8"}


def test_who_makes_int8() -> None:
    """Norms and gate_up do it themselves; for attention's output, and for a tapped value, a node is put between."""
    program = quantize(record(), "int8", "int8")
    assert dtypes(program) == {
        "layers.1.attention_norm": "q8",
        "layers.1.qkv": "act",
        "layers.1.attention": "act",
        "layers.1.o_proj.input": "q8",
        "layers.1.o_proj": "float32",
        "layers.1.mlp_norm": "q8",
        "layers.1.gate_up": "q8",
        "layers.1.down_proj": "float32",
        "head.gather": "float32",
        "head.norm": "act",
        "head.lm_head.input": "q8",
        "head.lm_head": "float32",
        "head.lm_head.1": "float32",
    }
    assert program.taps["last_hidden"].dtype == "act"
    assert program.taps["layers.2"] is program.node("layers.2.down_proj").outputs[0]


def test_the_result_is_a_program() -> None:
    program = quantize(record(), "int8", "act")
    assert formats(program).keys() & {"head.lm_head.w"} == set()
    assert [value.id for value in program.values] == list(range(len(program.values)))
    written: set[int] = set()
    for node in program.nodes:
        assert all(value is program.values[value.id] and value.id in written for value in node.inputs)
        written |= {value.id for value in node.outputs}
        if node.op in ("qkv", "linear_residual", "gate_up"):
            assert node.inputs[0].dtype == "q8"
            assert node.weights[0] is not None and node.weights[0].format == "int8"
        # Everything else is as the signature says.
        expected = list(OPS[node.op].inputs)
        if node.op in ("qkv", "linear_residual", "gate_up"):
            expected[0] = "q8"
        assert [value.dtype for value in node.inputs] == expected
    native.lower(program)


def test_nothing_to_do() -> None:
    before = record()
    after = quantize(before, "act", "act")
    assert formats(after) == {}
    assert [node.name for node in after.nodes] == [node.name for node in before.nodes]


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_weight_bytes_are_the_store_s(fmt: str) -> None:
    program = quantize(record(), fmt, "int8")  # type: ignore[arg-type]
    slots = [s for s in program.slots if s.kind in ("linear", "gate_up")]
    store = _core.WeightStore(program.act, len(program.slots))
    for slot in slots:
        store.fill(slot.id, slot.kind, [(0, "float32", *slot.shape, slot.shape[1])], dummy_scale=1, format=slot.format)
    others = sum(4 * int(np.prod(s.shape)) for s in program.slots if s.kind in ("vector", "table"))
    assert native.weight_bytes(program) - others == store.total_bytes


def test_int8_is_within_half_a_step() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((70, 100)).astype(np.float32)
    got = _core.quantized_weight(weight, "int8")
    padded = np.pad(weight, ((0, 0), (0, 28))).reshape(70, 4, 32)
    step = np.abs(padded).max(-1, keepdims=True) / 127
    error = np.abs(np.pad(got, ((0, 0), (0, 28))).reshape(70, 4, 32) - padded)
    assert (error <= 0.502 * step + 1e-7).all()  # the scale is rounded to float16
    assert error.max() > 0.3 * step.min()


def test_int4_beats_plain_rounding() -> None:
    """ggml's Q4_0: the extreme element becomes -8."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((64, 256)).astype(np.float32)
    blocks = weight.reshape(64, 8, 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scale = (extreme / -8).astype(np.float16).astype(np.float32)
    plain = np.clip(np.rint(blocks / scale), -8, 7) * scale
    ours = _core.quantized_weight(weight, "int4").reshape(64, 8, 32)
    error, plain_error = ((ours - blocks) ** 2).sum(-1), ((plain - blocks) ** 2).sum(-1)
    assert (error <= 1.01 * plain_error).all()
    assert error.sum() < 0.92 * plain_error.sum()


def test_unknown_settings() -> None:
    with pytest.raises(InvalidRequest, match="quantization"):
        EngineConfig.from_kwargs("x", quantization="fp8")
