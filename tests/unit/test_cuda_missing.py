"""Device "cuda" where there is no GPU, no library, or the wrong one: what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from sapwood.config import EngineConfig  # noqa: E402
from sapwood.errors import InvalidRequest, SapwoodError  # noqa: E402
from sapwood.models.loader import load  # noqa: E402
from sapwood.program import cuda  # noqa: E402
from sapwood.program.cuda_library import CudaLibrary  # noqa: E402

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1,
    "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 64, "torch_dtype": "bfloat16",
    "model_type": "llama", "eos_token_id": 2,
}  # fmt: skip


def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = EngineConfig.from_kwargs(str(tmp_path), device="cuda", load_format="dummy", skip_tokenizer_init=True)
    with pytest.raises(InvalidRequest, match="finds no GPU; use --device cpu") as caught:
        load(config)
    assert caught.value.param == "device"


def test_built_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "__file__", str(tmp_path / "program" / "cuda.py"))
    with pytest.raises(InvalidRequest, match="SAPWOOD_BUILD_CUDA=on pip install"):
        cuda.open_device()


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "libsapwood_cuda.so"
    path.write_text("no library")
    with pytest.raises(SapwoodError, match=f"{path} does not load as a library"):
        CudaLibrary(path)
