"""Where values live on a GPU, and which graphs there are: what can be said of them without one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from sapwood.models import registry
from sapwood.models.config import HfConfig
from sapwood.program.cuda_executor import runs_between_attention, segments
from sapwood.program.cuda_graphs import RUN_BUCKETS, bucket_of, decode_buckets, run_buckets
from sapwood.program.cuda_model import FIXED_ROWS, CudaModel, plan_buffers, scratch_cols
from sapwood.program.cuda_rows import DeviceRows, StepShape
from sapwood.program.ir import Program, T


@pytest.fixture(scope="module")
def program() -> Program:
    config = {
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_hidden_layers": 5, "intermediate_size": 96, "vocab_size": 100, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64, "model_type": "qwen3", "rope_theta": 1e4, "tie_word_embeddings": False,
    }  # fmt: skip
    family = registry.resolve("Qwen3ForCausalLM")
    return family.record(family.configure(HfConfig(config, Path("config.json"))), "bfloat16", 64)


def test_no_buffer_holds_two_values_that_are_needed(program: Program) -> None:
    plan = plan_buffers(program)
    last_use = {value.id: i for i, node in enumerate(program.nodes) for value in node.inputs}
    held: dict[int, int] = {}  # buffer to value
    for i, node in enumerate(program.nodes):
        if node.op == "sample":
            continue
        for value in node.inputs:
            assert held[plan.of_value[value.id]] == value.id, f"{node.name} reads {value.name}, which is gone"
        output = node.outputs[0]
        taken = [(plan.of_value[output.id], output.cols * (4 if output.dtype == "float32" else 2))]
        if scratch := scratch_cols(node):
            taken.append((plan.of_scratch[node.name], 2 * scratch))
        assert len({buffer for buffer, _ in taken}) == len(taken)
        for buffer, num_bytes in taken:
            # What is in it is not read by this node, nor by a later one.
            assert buffer not in held or last_use.get(held[buffer], -1) < i, f"{node.name} writes over what is needed"
            assert num_bytes <= plan.row_bytes[buffer] and plan.of_tokens[buffer] == (output.rows is T)
            held[buffer] = -1
        held[taken[0][0]] = output.id


def test_layers_share_buffers(program: Program) -> None:
    plan = plan_buffers(program)
    # Residual stream twice, a norm's output or a product, a query: no more however many layers there are.
    assert sum(plan.of_tokens) <= 5
    largest = 4 * 64 + 4 * 64 + 2 * 192 + 2 * 96 + 2 * 64
    assert sum(n for n, of_tokens in zip(plan.row_bytes, plan.of_tokens, strict=True) if of_tokens) <= largest


def test_nothing_that_a_step_computes_reaches_what_is_kept_of_held_rows(program: Program) -> None:
    rows = DeviceRows(
        1, max_rows=5, page_size=16, max_pages=4, max_stop_ids=0, max_tokens=70, blob_bytes=64, vocab_size=100,
        device="cpu", library=None, stream=None,  # type: ignore[arg-type]
    )  # fmt: skip
    weights = [torch.zeros(slot.shape) for slot in program.slots]
    model = CudaModel(program, weights, rows, max_tokens=70, library=None, stream=None)  # type: ignore[arg-type]
    largest = StepShape(FIXED_ROWS, FIXED_ROWS, FIXED_ROWS)
    (gathered,) = [node.inputs[0] for node in program.nodes if node.op == "gather_logit_rows"]
    hidden = model.value(gathered, largest)
    hidden.copy_(torch.randn(hidden.shape))
    kept = hidden[[127, 0, 69]].clone()
    model.keep_hidden(torch.tensor([127, 0, 69]), torch.tensor([4, 1, 0]))
    for node in program.nodes:
        if node.op != "sample":
            model.value(node.outputs[0], largest).fill_(float("nan"))
            if scratch_cols(node):
                model._scratch(node, largest).fill_(float("nan"))
    (gather,) = [node for node in program.nodes if node.op == "gather_logit_rows"]
    rows.arrays.logit_src[:3] = model.kept_begin + torch.tensor([4, 1, 0])
    shape = StepShape(1, 3, 3)
    model.launch([gather], shape, None)  # type: ignore[arg-type]
    assert torch.equal(model.value(gather.outputs[0], shape), kept)


def test_runs_lie_between_attention_nodes(program: Program) -> None:
    forward, head = segments(program)
    runs = runs_between_attention(forward)
    assert len(runs) == 6 and [len(attention) for _, attention in runs] == [1] * 5 + [0]
    assert [node for nodes, attention in runs for node in (*nodes, *attention)] == forward
    assert all(node.op != "attention" for nodes, _ in runs for node in nodes)
    assert [node.op for node in head] == ["gather_logit_rows", "rms_norm", "lm_head"]


@pytest.mark.parametrize(
    ("most", "expected"),
    [(0, []), (1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20])],
)
def test_decode_buckets_end_where_rows_do(most: int, expected: list[int]) -> None:
    assert decode_buckets(most) == expected


def test_a_bucket_is_the_smallest_that_holds() -> None:
    buckets = decode_buckets(256)
    assert [bucket_of(n, buckets) for n in (1, 3, 8, 9, 256, 257)] == [1, 4, 8, 16, 256, None]
    assert buckets == sorted(set(buckets)) and len(buckets) == 35
    assert run_buckets(200) == [n for n in RUN_BUCKETS if n <= 200] and run_buckets(15) == []
    # Padding of a run is at most half of its tokens, and a third from 32 on.
    for n in range(16, 513):
        bucket = bucket_of(n, RUN_BUCKETS)
        assert bucket is not None and bucket < 2 * n and (n < 33 or bucket <= 1.5 * n)
