"""Device "cuda" against transformers: executor, torch and kernels, on a GPU or the CPU (tests/cuda/emulator)."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from golden_checkpoints import TINY, Built, build, hf_logits, log_softmax, prompts_of
from golden_driver import Driver
from golden_flashinfer import install

from sapwood.errors import InvalidRequest, MissingExtra
from sapwood.program import cuda, cuda_attention
from sapwood.program.cuda_library import CudaLibrary

NUM_NEW = 6  # emulated threads are slow
BF16_TOLERANCE = 3e-2


@pytest.fixture(autouse=True)
def _device(cuda_device: tuple[CudaLibrary, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "open_device", lambda: cuda_device)


def supported(built: Built) -> bool:
    fields = built.tiny.fields
    dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    return bool(dim % 8 == 0)


def named(name: str) -> Any:
    return pytest.mark.parametrize("built", [t for t in TINY if t.name == name], indirect=True, ids=str)


def check(built: Built, **settings: Any) -> dict[str, int]:
    """Prompts in chunks beside decodes; transformers in float32 on the same bfloat16 weights. Returns how many steps
    went which way."""
    with Driver(built.bf16_dir, device="cuda", **settings) as driver:
        prompts = prompts_of(1)
        results = driver.generate(prompts, NUM_NEW)
        ways: dict[str, int] = driver.model.executor.launcher.num_steps
    for prompt, result in zip(prompts, results, strict=True):
        expected = log_softmax(hf_logits(built.bf16, prompt + result.tokens)[len(prompt) - 1 : -1])
        chosen = expected[np.arange(NUM_NEW), result.tokens]
        assert np.abs(np.asarray(result.logprobs) - chosen).max() < BF16_TOLERANCE
        # A token may differ from the oracle's only where the two are a near tie.
        assert (expected.max(-1) - chosen).max() < 2 * BF16_TOLERANCE
    return ways


def test_logprobs_are_close_to_transformers(built: Built) -> None:
    if supported(built):
        ways = check(built)
        assert ways["decode graph"] >= NUM_NEW - 1 and ways["run graphs"] >= 2  # 90 tokens in chunks of 48
    else:
        with pytest.raises(InvalidRequest, match="head_dim that is a multiple of 8"):
            Driver(built.bf16_dir, device="cuda")


@named("llama-mha")
@pytest.mark.parametrize("page_size", [1, 5])
def test_any_page_size(built: Built, page_size: int) -> None:
    check(built, page_size=page_size)


@named("qwen3-mixed")
def test_every_graph_is_counted_before_it_is_captured(built: Built) -> None:
    with Driver(built.bf16_dir, device="cuda") as driver:
        launcher = driver.model.executor.launcher
        captures = launcher.largest_captures()
        assert len(captures) == 2 and sum(count for _, count in captures) == launcher.num_graphs > 50


@named("qwen3-mixed")  # a window, and two groups of pages
def test_launch_by_launch(built: Built) -> None:
    ways = check(built, disable_cuda_graph=True)
    assert set(ways) == {"launches"}


@named("qwen3-mixed")
def test_steps_of_more_rows_than_a_graph_has(built: Built) -> None:
    ways = check(built, cuda_graph_max_bs=1)  # of three
    assert ways["decode graph"] <= 1 and ways["run graphs"] >= NUM_NEW


@named("qwen3-mixed")
def test_attention_that_no_graph_has_room_for(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention.SapwoodAttention, "_most_items", lambda self, tiling: 1)
    ways = check(built)
    assert ways["decode graph"] <= 1 and ways["run graphs"] >= NUM_NEW


@named("qwen3-mixed")
def test_what_attention_takes_for_a_step_was_reckoned_with(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "PARTIAL_BYTES", 4096)
    taken: list[int] = []
    with Driver(built.bf16_dir, device="cuda", disable_cuda_graph=True) as driver:
        attention = driver.model.executor.launcher.attention
        take = attention._take

        def keep(*args: Any) -> Any:
            work = take(*args)
            taken.append(work.partial_o.nbytes)
            return work

        attention._take = keep
        driver.generate([list(range(4, 94))], 2, chunk=48)
        per_window = attention.step_bytes(48, 90) // 2  # of two windows
        assert taken and max(taken) <= per_window < 3 * max(taken)
        assert attention.step_bytes(1, 1) == 0


@pytest.mark.parametrize("name", ["qwen3-mixed", "mistral-window", "llama-mha"])
def test_reference_attention(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny = next(t for t in TINY if t.name == name)
    ways = check(build(tiny, tmp_path_factory.mktemp("tiny")), attention_backend="reference")
    assert ways["decode graph"] == 0


@named("llama-mha")
def test_tokens_do_not_depend_on_the_batch(built: Built) -> None:
    """Alone and beside others: the same tokens, and nearly the same log-probabilities."""
    prompts = prompts_of(6)
    with Driver(built.bf16_dir, device="cuda") as driver:
        together = driver.generate(prompts, NUM_NEW, chunk=8)
        alone = [driver.generate([prompt], NUM_NEW, chunk=8)[0] for prompt in prompts]
    for one, among in zip(alone, together, strict=True):
        assert one.tokens == among.tokens and np.allclose(one.logprobs, among.logprobs, atol=1e-2)


@named("qwen3-mixed")
def test_deterministic_inference_is_bitwise(built: Built) -> None:
    """However a prompt is cut, whoever is beside it, with graphs and without."""
    prompts = prompts_of(6)
    answers = []
    for settings in ({}, {"disable_cuda_graph": True}):
        with Driver(built.bf16_dir, device="cuda", enable_deterministic_inference=True, **settings) as driver:
            answers.append(driver.generate(prompts, NUM_NEW, chunk=8))
            driver.cache.flush()
            answers.append([driver.generate([prompt], NUM_NEW, chunk=33)[0] for prompt in prompts])
    for other in answers[1:]:
        for one, two in zip(answers[0], other, strict=True):
            assert one.tokens == two.tokens and one.logprobs == two.logprobs


@named("qwen3-mixed")
def test_flashinfer_is_planned_as_it_expects(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(InvalidRequest, match=r"kernels for head_dim \(64, 128, 256\), this model has 16"):
        Driver(built.bf16_dir, device="cuda", attention_backend="flashinfer")
    monkeypatch.setattr(cuda_attention.FlashInferAttention, "HEAD_DIMS", (16,))
    ways = check(built, attention_backend="flashinfer")
    assert ways["decode graph"] == 0 and ways["run graphs"] >= NUM_NEW


@named("llama-mha")
def test_flashinfer_that_is_not_installed(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sapwood\[flashinfer\]'"):
        Driver(built.bf16_dir, device="cuda", attention_backend="flashinfer")


@pytest.mark.parametrize("built", [t for t in TINY if t.name == "llama-mha"], indirect=True, ids=str)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "float32"}, "computes in bfloat16, not float32; set --dtype bfloat16"),
        ({"quantization": "int8"}, "quantization 'int8' is not possible on device 'cuda' yet"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype must be auto or bfloat16 on device 'cuda', got int8"),
    ],
)
def test_what_it_cannot_do_is_refused(built: Built, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        Driver(built.bf16_dir, device="cuda", **settings)


SHORT_CHUNKS = (cuda_attention.Tiling(1, 32, 16, 64), cuda_attention.Tiling(33, 2**30, 128, 64))


class Packer:
    """A PlanPacker whose shared prefixes are the test's business."""

    def __init__(self, inner: Any, find: Any) -> None:
        self.inner, self.find = inner, find

    def shared_prefixes(self, plan: Any, chunk_len: int) -> Any:
        return self.find(self.inner.shared_prefixes(plan, chunk_len))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def generate_sharing(built: Built, find: Any, **settings: Any) -> list[Any]:
    """Prompts behind 150 and 100 tokens of one that came before."""
    base = prompts_of(1)[0] * 60
    prompts = [base[:150] + own for own in prompts_of(3)] + [base[:100] + prompts_of(1)[0]]
    with Driver(built.bf16_dir, device="cuda", **settings) as driver:
        driver.model.executor._packer = Packer(driver.model.executor._packer, find)
        driver.generate([base[:150]], 1)
        return driver.generate(prompts, NUM_NEW)


@named("llama-gqa2-tied")
@pytest.mark.parametrize("graphs", [True, False])
def test_shared_prefixes_change_no_bit(built: Built, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that decode behind pages of one earlier prompt read these once, and compute what each would alone."""
    monkeypatch.setattr(cuda_attention, "tilings", lambda head_dim, deterministic: SHORT_CHUNKS)
    found = []

    def keep(prefixes: Any) -> Any:
        found.append(prefixes)
        return prefixes

    shared = generate_sharing(built, keep, disable_cuda_graph=not graphs)
    assert max(lens[0] for _, _, lens in found if len(lens)) == 128
    assert any(len(lens) == 0 for _, _, lens in found)  # with prefixes and without, through the same graphs
    assert shared == generate_sharing(built, lambda _: None, disable_cuda_graph=not graphs)


@named("llama-gqa2-tied")
def test_a_plan_that_fails_ends_the_step(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose lists of attention's work were wrong is an error, not tokens."""
    monkeypatch.setattr(cuda_attention, "tilings", lambda head_dim, deterministic: SHORT_CHUNKS)
    wrong = np.array([0, 2], np.int32), np.array([0, 99], np.int32), np.array([64], np.int32)
    with pytest.raises(AssertionError, match="attention_plan failed with 2"):
        generate_sharing(built, lambda _: wrong)
