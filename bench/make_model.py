"""Write a checkpoint of a named public shape with random weights and a byte-level tokenizer.

    python bench/make_model.py qwen3-0.6b-32k /tmp/qwen3-0.6b-32k

Speed depends on shapes, not on what the weights say; so a benchmark needs no download. Needs numpy only.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from pathlib import Path

import numpy as np

_QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "attention_bias": False, "vocab_size": 151936, "torch_dtype": "bfloat16",
}  # fmt: skip
_LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
    "tie_word_embeddings": True, "attention_bias": False, "vocab_size": 128256, "torch_dtype": "bfloat16",
}  # fmt: skip
_LLAMA31_8B = _LLAMA32_1B | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
    "rope_scaling": _LLAMA32_1B["rope_scaling"] | {"factor": 8.0}, "tie_word_embeddings": False,
}  # fmt: skip

SHAPES = {
    "qwen3-0.6b": _QWEN3_06B,
    "qwen3-0.6b-32k": _QWEN3_06B | {"vocab_size": 32768},
    "llama-3.2-1b": _LLAMA32_1B,
    "llama-3.1-8b": _LLAMA31_8B,
}


def tensor_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors, in file order."""
    h, inter, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], h)}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        out |= {
            p + "input_layernorm.weight": (h,), p + "self_attn.q_proj.weight": (q, h),
            p + "self_attn.k_proj.weight": (kv, h), p + "self_attn.v_proj.weight": (kv, h),
            p + "self_attn.o_proj.weight": (h, q), p + "post_attention_layernorm.weight": (h,),
            p + "mlp.gate_proj.weight": (inter, h), p + "mlp.up_proj.weight": (inter, h),
            p + "mlp.down_proj.weight": (h, inter),
        }  # fmt: skip
        if c["model_type"] == "qwen3":
            out |= {p + "self_attn.q_norm.weight": (d,), p + "self_attn.k_norm.weight": (d,)}
    out["model.norm.weight"] = (h,)
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (c["vocab_size"], h)
    return out


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> int:
    """One safetensors file of bf16: norms are 1, matrices normal with std 0.02. Returns bytes."""
    header: dict[str, dict] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            if len(shape) == 1:
                file.write(np.full(shape, 0x3F80, np.uint16).tobytes())
                continue
            rows_at_once = max(1, (1 << 24) // shape[1])
            for begin in range(0, shape[0], rows_at_once):
                rows = min(rows_at_once, shape[0] - begin)
                values = rng.standard_normal((rows, shape[1]), dtype=np.float32) * 0.02
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return offset


def byte_tokenizer(vocab_size: int) -> dict:
    """tokenizer.json: 256 byte tokens, <s> and </s>, and fillers so that every id decodes to something."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = {b: chr(b) for b in keep}
    chars |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in keep)}
    vocab = {chars[b]: b for b in range(256)} | {"<s>": 256, "</s>": 257}
    vocab |= {f"w{i}": i for i in range(258, vocab_size)}
    special = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for text, i in (("<s>", 256), ("</s>", 257))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": []},
    }  # fmt: skip


def make_model(shape: str, directory: Path, seed: int = 0) -> int:
    """Write config, tokenizer and weights of a shape of SHAPES to directory. Returns the weight bytes."""
    config = SHAPES[shape] | {"bos_token_id": 256, "eos_token_id": 257}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": 257}))
    (directory / "tokenizer.json").write_text(json.dumps(byte_tokenizer(config["vocab_size"]), ensure_ascii=False))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return write_weights(directory / "model.safetensors", tensor_shapes(config), seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    num_bytes = make_model(args.shape, args.directory, args.seed)
    print(f"{args.directory}: {args.shape}, {num_bytes / 1e9:.2f} GB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
