"""Tiny random checkpoints of every family, made with transformers and saved in Hugging Face's layout.

Each has the shape of some trouble: query/KV ratios 1, 2, 4, 7, odd head dims, tied or not, windows shorter than a
prompt, mixed layers, every rope scaling, shards. Weights are drawn so that nothing is degenerate: norms are not 1,
biases not 0, attention not flat.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

PROMPT_LENS = (90, 5, 37)  # past every window and the short rope; less than a page; less than a chunk
VOCAB = 211  # not a multiple of the logit block
# Attention a little sharper than flat, MLPs loud enough that a tied model does not just repeat its input, logits of a
# deviation of about 0.5: a bfloat16 forward is off by a percent or two of it whatever the engine.
GAINS = (("q_proj", 1.25), ("k_proj", 1.25), ("qkv_proj", 1.25), ("down_proj", 1.6), ("lm_head", 0.5))


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One checkpoint. legacy: config.json in the layout of transformers 4. original: where longrope changes its
    mode.
    """

    name: str
    family: str  # Llama, Mistral, ...
    fields: dict[str, Any]
    shard: str = "1GB"
    legacy: bool = False

    def __str__(self) -> str:
        return self.name


def _shape(heads: int, kv: int, hidden: int, layers: int = 3, **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": heads, "num_key_value_heads": kv, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden + 14, "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **more,
    }  # fmt: skip


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


def _long(rotary: int, original: int, **more: Any) -> dict[str, Any]:
    half = rotary // 2
    return {
        **_rope(
            "longrope",
            short_factor=[1.0 + 0.05 * i for i in range(half)],
            long_factor=[1.5 + 0.4 * i for i in range(half)],
            original_max_position_embeddings=original,
        ),
        "original_max_position_embeddings": original,
        **more,
    }


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
TINY = (
    Tiny("llama-mha", "Llama", _shape(4, 4, 64, tie_word_embeddings=False)),
    Tiny("llama-gqa2-tied", "Llama", _shape(8, 4, 64, tie_word_embeddings=True), shard="60KB", legacy=True),
    Tiny(
        "llama3-rope-bias",
        "Llama",
        _shape(
            4,
            1,
            48,
            head_dim=24,
            attention_bias=True,
            **_rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
            ),
        ),
        legacy=True,
    ),
    # Llama turns whole heads whatever this factor says.
    Tiny("llama-partial-ignored", "Llama", _shape(4, 2, 64, **_rope("default", partial_rotary_factor=0.5))),
    Tiny("llama-linear-hd10", "Llama", _shape(6, 3, 60, **_rope("linear", factor=3.0))),
    Tiny("llama-yarn-gqa7-hd40", "Llama", _shape(7, 1, 70, head_dim=40, **_rope("yarn", **YARN)), legacy=True),
    Tiny(
        "llama-yarn-mscale",
        "Llama",
        _shape(4, 2, 64, **_rope("yarn", **YARN, mscale=1.2, mscale_all_dim=0.5, truncate=False)),
    ),
    Tiny("mistral-window", "Mistral", _shape(8, 2, 64, sliding_window=21, head_dim=16), shard="100KB"),
    Tiny("mistral-hd80", "Mistral", _shape(2, 1, 96, sliding_window=None, head_dim=80)),
    Tiny("qwen2-gqa7-tied", "Qwen2", _shape(14, 2, 112, tie_word_embeddings=True)),
    Tiny(
        "qwen2-mixed",
        "Qwen2",
        _shape(4, 2, 64, 4, use_sliding_window=True, sliding_window=17, max_window_layers=2, tie_word_embeddings=False),
        shard="80KB",
    ),
    Tiny("qwen3-tied-hd24", "Qwen3", _shape(4, 2, 64, head_dim=24, tie_word_embeddings=True)),
    Tiny(
        "qwen3-mixed",
        "Qwen3",
        _shape(
            4,
            1,
            64,
            4,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=33,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        shard="80KB",
    ),
    Tiny("qwen3-yarn", "Qwen3", _shape(8, 2, 64, head_dim=16, **_rope("yarn", **YARN)), legacy=True),
    Tiny("phi3-mha", "Phi3", _shape(4, 4, 64)),
    Tiny("phi3-window", "Phi3", _shape(4, 2, 64, sliding_window=30, tie_word_embeddings=True), shard="80KB"),
    Tiny("phi3-longrope-short", "Phi3", _shape(4, 2, 160, **_long(30, 256, partial_rotary_factor=0.75)), legacy=True),
    Tiny("phi3-longrope-long", "Phi3", _shape(4, 1, 96, **_long(18, 64, partial_rotary_factor=0.75))),
)


@dataclasses.dataclass
class Built:
    """A checkpoint on disk in float32 and in bfloat16, and transformers' model of each in float32 on the same
    weights.
    """

    tiny: Tiny
    f32_dir: Path
    bf16_dir: Path
    f32: Any
    bf16: Any


def build(tiny: Tiny, folder: Path) -> Built:
    """Make and save both checkpoints below `folder`."""
    config = getattr(transformers, f"{tiny.family}Config")(**json.loads(json.dumps(tiny.fields)))
    config._attn_implementation = "eager"
    model_class = getattr(transformers, f"{tiny.family}ForCausalLM")
    seed = sum(tiny.name.encode())
    models, dirs = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = model_class(config).eval()
        _draw_weights(model, seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype).float())
        path = folder / f"{tiny.name}-{str(dtype).removeprefix('torch.')}"
        state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        model.save_pretrained(path, state_dict=state, max_shard_size=tiny.shard)
        if tiny.legacy:
            _to_legacy(path / "config.json")
        models.append(model)
        dirs.append(path)
    return Built(tiny, dirs[0], dirs[1], models[0], models[1])


def _draw_weights(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "norm" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_((0.06 if tied else 0.7) * noise)
            else:
                gain = next((g for part, g in GAINS if part in name), 1.0)
                parameter.copy_(gain / math.sqrt(parameter.shape[1]) * noise)


def _to_legacy(path: Path) -> None:
    """Rewrite config.json as transformers 4 wrote it: rope_scaling, rope_theta, torch_dtype, type for rope_type."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = rope.pop("rope_theta", 10000.0)
    partial = rope.pop("partial_rotary_factor", None)
    if partial is not None:
        config["partial_rotary_factor"] = partial
    kind = rope.pop("rope_type", "default")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype", "float32")
    path.write_text(json.dumps(config))


@torch.inference_mode()
def hf_logits(model: Any, tokens: list[int]) -> Any:
    """Logits [len(tokens), vocab] float32 of one forward over all tokens (row i predicts token i + 1)."""
    return model(torch.tensor([tokens])).logits[0].float().numpy()


def prompts_of(seed: int = 0) -> list[list[int]]:
    """The same prompts for the same seed."""
    rng = np.random.default_rng(seed)
    return [[int(t) for t in rng.integers(3, VOCAB, n)] for n in PROMPT_LENS]


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def rms(x: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.square(x).mean()))
