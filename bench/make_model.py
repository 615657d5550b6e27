"""Write a checkpoint of a named public shape with random weights and a working tokenizer.

    python bench/make_model.py qwen3-0.6b /tmp/qwen3-0.6b
    python bench/make_model.py --list

Speed depends on shapes, not on what the weights say; so a benchmark needs no download. The weights are written tensor
by tensor, in files of --shard-gb: a model larger than memory can be made. The tokenizer has exactly as many ids as the
public model: the model's own where the data folder has it (SAPWOOD_DATA, default ../shared/data beside the checkout),
else a byte-level BPE of made-up words (`word_tokenizer`). Needs numpy only.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parent.parent
Shape = Mapping[str, Any]


def _shape(family: str, hidden: int, inter: int, layers: int, heads: int, kv_heads: int, **fields: Any) -> Shape:
    """config.json of one public model; the values are those of the models' own files."""
    families: dict[str, dict[str, Any]] = {
        "qwen3": {"vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
                  "head_dim": 128, "attention_bias": False},
        "qwen2": {"vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
                  "use_sliding_window": False},
        "llama": {"vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131072,
                  "attention_bias": False},
        "mistral": {"vocab_size": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768,
                    "sliding_window": None},
        "phi3": {"vocab_size": 32064, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 4096,
                 "original_max_position_embeddings": 4096, "sliding_window": 2047},
    }  # fmt: skip
    return MappingProxyType(
        {
            "architectures": [family.capitalize() + "ForCausalLM"], "model_type": family, "hidden_size": hidden,
            "intermediate_size": inter, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "hidden_act": "silu", "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        | families[family] | fields
    )  # fmt: skip


def _llama3(factor: float) -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip


SHAPES: Final[Mapping[str, Shape]] = MappingProxyType({
    # Not public models: the first is for tests, the second small enough to measure a server rather than a matrix.
    "tiny": _shape("llama", 64, 160, 2, 4, 2, vocab_size=1024, max_position_embeddings=4096),
    "small": _shape("llama", 256, 768, 4, 8, 4, vocab_size=4096, max_position_embeddings=8192),
    "qwen3-0.6b": _shape("qwen3", 1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    "qwen3-0.6b-32k": _shape("qwen3", 1024, 3072, 28, 16, 8, tie_word_embeddings=True, vocab_size=32768),
    "qwen3-1.7b": _shape("qwen3", 2048, 6144, 28, 16, 8, tie_word_embeddings=True),
    "qwen3-4b": _shape("qwen3", 2560, 9728, 36, 32, 8, tie_word_embeddings=True),
    "qwen3-8b": _shape("qwen3", 4096, 12288, 36, 32, 8),
    "qwen3-14b": _shape("qwen3", 5120, 17408, 40, 40, 8),
    "qwen3-32b": _shape("qwen3", 5120, 25600, 64, 64, 8),
    "qwen2.5-0.5b": _shape("qwen2", 896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "qwen2.5-1.5b": _shape("qwen2", 1536, 8960, 28, 12, 2, tie_word_embeddings=True),
    "qwen2.5-3b": _shape("qwen2", 2048, 11008, 36, 16, 2, tie_word_embeddings=True),
    "qwen2.5-7b": _shape("qwen2", 3584, 18944, 28, 28, 4, vocab_size=152064),
    "llama-2-7b": _shape("llama", 4096, 11008, 32, 32, 32, vocab_size=32000, rope_theta=1e4,
                         max_position_embeddings=4096),
    "llama-3.1-8b": _shape("llama", 4096, 14336, 32, 32, 8, rope_scaling=_llama3(8.0)),
    "llama-3.1-70b": _shape("llama", 8192, 28672, 80, 64, 8, rope_scaling=_llama3(8.0)),
    "llama-3.2-1b": _shape("llama", 2048, 8192, 16, 32, 8, tie_word_embeddings=True, rope_scaling=_llama3(32.0)),
    "llama-3.2-3b": _shape("llama", 3072, 8192, 28, 24, 8, tie_word_embeddings=True, rope_scaling=_llama3(32.0)),
    "mistral-7b-v0.3": _shape("mistral", 4096, 14336, 32, 32, 8),
    "phi-3-mini-4k": _shape("phi3", 3072, 8192, 32, 32, 32),
})  # fmt: skip
# Shapes whose own tokenizer is in the data folder: its name under tokenizers/hf.
OWN_TOKENIZERS: Final = MappingProxyType({"llama-2-7b": "llama2", "phi-3-mini-4k": "phi-3-mini"})

BOS: Final = "<s>"
EOS: Final = "</s>"
NUM_BYTES: Final = 256
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}" + EOS + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


# --- weights
def tensor_shapes(c: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors, in file order."""
    h, inter, family = c["hidden_size"], c["intermediate_size"], c["model_type"]
    d = c.get("head_dim") or h // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], h)}
    for i in range(c["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (h,)}
        if family == "phi3":
            layer |= {"self_attn.qkv_proj.weight": (q + 2 * kv, h)}
        else:
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                layer[f"self_attn.{name}_proj.weight"] = (rows, h)
                if family == "qwen2":
                    layer[f"self_attn.{name}_proj.bias"] = (rows,)
        if family == "qwen3":
            layer |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
        layer |= {"self_attn.o_proj.weight": (h, q), "post_attention_layernorm.weight": (h,)}
        if family == "phi3":
            layer |= {"mlp.gate_up_proj.weight": (2 * inter, h)}
        else:
            layer |= {"mlp.gate_proj.weight": (inter, h), "mlp.up_proj.weight": (inter, h)}
        layer |= {"mlp.down_proj.weight": (h, inter)}
        out |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    out["model.norm.weight"] = (h,)
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (c["vocab_size"], h)
    return out


def num_weight_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of these tensors in bf16."""
    return 2 * sum(math.prod(shape) for shape in shapes.values())


def shards(shapes: Mapping[str, tuple[int, ...]], shard_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors in order, cut into groups of at most shard_bytes; a larger tensor is alone."""
    group: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        added = num_weight_bytes({name: shape})
        if group and size + added > shard_bytes:
            yield group
            group, size = {}, 0
        group[name] = shape
        size += added
    if group:
        yield group


def write_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator, std: float | None = 0.02
) -> None:
    """One safetensors file of bf16: norms are 1, everything else is normal. Holds 16M values at most.

    std   of the values; None: 1 / sqrt(row length), which keeps a product as large as its input
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            if name.endswith("norm.weight"):
                file.write(np.full(shape, 0x3F80, np.uint16).tobytes())
                continue
            remaining = math.prod(shape)
            while remaining:
                values = rng.standard_normal(min(remaining, 1 << 24), dtype=np.float32)
                values *= np.float32(std if std is not None else shape[-1] ** -0.5)
                # bf16 is the upper half of a float32; cut instead of rounded, which nobody can tell from noise.
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                remaining -= len(values)


def write_weights(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, shard_bytes: int, std: float | None = 0.02
) -> int:
    """model.safetensors, or numbered files and their index where there are several; std as in write_shard. Returns the
    weight bytes.
    """
    rng = np.random.default_rng(seed)
    groups = list(shards(shapes, shard_bytes))
    total = num_weight_bytes(shapes)
    if len(groups) == 1:
        write_shard(directory / "model.safetensors", groups[0], rng, std)
        return total
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        write_shard(directory / name, group, rng, std)
        weight_map |= dict.fromkeys(group, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


# --- tokenizer
def _byte_chars() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself where it is visible, else one from U+0100 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    invisible = itertools.count(256)
    return [chr(b) if b in visible else chr(next(invisible)) for b in range(NUM_BYTES)]


def _words(space: str) -> Iterator[tuple[str, str]]:
    """Merges of byte-level BPE, best first, that make words up: syllables, pairs of them, and with a space in front one
    pair or two.

    Every result encodes to itself. A pair takes its first syllable from one half of them and its second from the other,
    so that a word falls into pairs in one way only; and no space is merged with less than a pair.
    """
    syllables = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxyz" for vowel in "aeiou"]
    yield from ((syllable[0], syllable[1]) for syllable in syllables)
    pairs = list(itertools.product(syllables[::2], syllables[1::2]))
    for first, second in pairs:
        yield first, second
        yield space, first + second
    yield from ((space + a + b, c + d) for (a, b), (c, d) in itertools.product(pairs, pairs))


def word_tokenizer(vocab_size: int) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE with exactly vocab_size ids: 256 bytes, <s>, </s>, and made-up words.

    Any text can be encoded, and every word's text encodes to its id: random words are text of as many tokens, which
    costs a tokenizer and a detokenizer what real text does. Raises ValueError for fewer than 258 ids.
    """
    num_words = vocab_size - NUM_BYTES - 2
    if num_words < 0:
        raise ValueError(f"vocab_size must be at least {NUM_BYTES + 2} (bytes, {BOS} and {EOS}), got {vocab_size}")
    chars = _byte_chars()
    merges = list(itertools.islice(_words(chars[ord(" ")]), num_words))
    vocab = {char: i for i, char in enumerate(chars)} | {BOS: NUM_BYTES, EOS: NUM_BYTES + 1}
    vocab |= {a + b: NUM_BYTES + 2 + i for i, (a, b) in enumerate(merges)}
    special = [
        {"id": vocab[text], "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for text in (BOS, EOS)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": merges},
    }  # fmt: skip


def data_folder() -> Path | None:
    """The data folder (SAPWOOD_DATA, default ../shared/data beside the checkout), None where there is none."""
    folder = Path(os.environ.get("SAPWOOD_DATA") or ROOT.parent / "shared" / "data")
    return folder if folder.is_dir() else None


def write_tokenizer(shape: str, directory: Path) -> tuple[int, int]:
    """tokenizer.json, and tokenizer_config.json with a chat template. Returns the ids that begin and end a text."""
    data, own = data_folder(), OWN_TOKENIZERS.get(shape)
    source = data / "tokenizers" / "hf" / own if data is not None and own is not None else None
    if source is None or not (source / "tokenizer.json.gz").is_file():
        content = word_tokenizer(SHAPES[shape]["vocab_size"])
        config: dict[str, Any] = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        content = json.loads(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
        # Merges of literal spaces have no one-string form, which the library refuses; no text reaches them.
        content["model"]["merges"] = [m for m in content["model"]["merges"] if isinstance(m, list) or m.count(" ") == 1]
        config = json.loads((source / "tokenizer_config.json").read_bytes())
    config.setdefault("chat_template", CHAT_TEMPLATE)
    ids = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    begin, end = (
        token["content"] if isinstance(token, dict) else token for token in (config["bos_token"], config["eos_token"])
    )
    return ids[begin], ids[end]


def make_model(shape: str, directory: Path, seed: int = 0, shard_bytes: int = 4 << 30) -> int:
    """Write config, tokenizer and weights of a shape of SHAPES to directory. Returns the weight bytes.

    Raises FileExistsError where the directory has weights already.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.glob("*.safetensors")):
        raise FileExistsError(f"{directory} has weights already; name another directory or remove them")
    bos, eos = write_tokenizer(shape, directory)
    token_ids = {"bos_token_id": bos, "eos_token_id": eos}
    (directory / "config.json").write_text(json.dumps({**SHAPES[shape], **token_ids}, indent=1))
    (directory / "generation_config.json").write_text(json.dumps(token_ids))
    return write_weights(directory, tensor_shapes(SHAPES[shape]), seed, shard_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=sorted(SHAPES), metavar="SHAPE", help="one of --list")
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--list", action="store_true", help="list the shapes and their sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=4.0, help="size of a weight file in GiB (default 4)")
    args = parser.parse_args()
    if args.list:
        for name, shape in SHAPES.items():
            size = num_weight_bytes(tensor_shapes(shape))
            print(f"{name:18s} {size / 2e9:6.2f} G parameters  {size / 1e9:7.2f} GB  vocabulary {shape['vocab_size']}")
        return 0
    if args.shape is None or args.directory is None:
        parser.error("name a shape and a directory, or ask with --list")
    if args.shard_gb <= 0:
        parser.error(f"--shard-gb must be positive, got {args.shard_gb}")
    try:
        num_bytes = make_model(args.shape, args.directory, args.seed, int(args.shard_gb * 2**30))
    except FileExistsError as error:
        parser.error(str(error))
    print(f"{args.directory}: {args.shape}, {num_bytes / 1e9:.2f} GB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
