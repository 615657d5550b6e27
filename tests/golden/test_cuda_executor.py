"""Device "cuda" against transformers: the executor, torch and the kernels, on the CPU (tests/cuda/emulator)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_checkpoints import TINY, Built, hf_logits, log_softmax, prompts_of
from golden_driver import Driver

from sapwood.errors import InvalidRequest
from sapwood.program import cuda
from sapwood.program.cuda_library import CudaLibrary

NUM_NEW = 6  # emulated threads are slow
BF16_TOLERANCE = 3e-2


@pytest.fixture(autouse=True)
def _emulated_device(emulated: CudaLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "open_device", lambda: (emulated, "cpu"))


def supported(built: Built) -> bool:
    fields = built.tiny.fields
    dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    return bool(dim % 8 == 0)


def check(built: Built, page_size: int) -> None:
    """Prompts in chunks beside decodes; transformers in float32 on the same bfloat16 weights."""
    with Driver(built.bf16_dir, device="cuda", page_size=page_size) as driver:
        prompts = prompts_of(1)
        results = driver.generate(prompts, NUM_NEW)
    for prompt, result in zip(prompts, results, strict=True):
        expected = log_softmax(hf_logits(built.bf16, prompt + result.tokens)[len(prompt) - 1 : -1])
        chosen = expected[np.arange(NUM_NEW), result.tokens]
        assert np.abs(np.asarray(result.logprobs) - chosen).max() < BF16_TOLERANCE
        # A token may differ from the oracle's only where the two are a near tie.
        assert (expected.max(-1) - chosen).max() < 2 * BF16_TOLERANCE


def test_logprobs_are_close_to_transformers(built: Built) -> None:
    if supported(built):
        check(built, page_size=16)
    else:
        with pytest.raises(InvalidRequest, match="head_dim that is a multiple of 8"):
            Driver(built.bf16_dir, device="cuda")


@pytest.mark.parametrize("built", [t for t in TINY if t.name == "llama-mha"], indirect=True, ids=str)
@pytest.mark.parametrize("page_size", [1, 5])
def test_any_page_size(built: Built, page_size: int) -> None:
    check(built, page_size)


@pytest.mark.parametrize("built", [t for t in TINY if t.name == "llama-mha"], indirect=True, ids=str)
def test_tokens_do_not_depend_on_the_batch(built: Built) -> None:
    """Alone and beside others: the same tokens, and the same log-probabilities to the last bit while all rows of the
    product go the same way."""
    prompts = prompts_of(6)
    with Driver(built.bf16_dir, device="cuda") as driver:
        together = driver.generate(prompts, NUM_NEW, chunk=8)
        alone = [driver.generate([prompt], NUM_NEW, chunk=8)[0] for prompt in prompts]
    for one, among in zip(alone, together, strict=True):
        assert one.tokens == among.tokens and np.allclose(one.logprobs, among.logprobs, atol=1e-2)


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
