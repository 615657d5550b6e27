"""What the machine's ceilings allow at best for the measures of bench/compare.py: a token's bytes and operations.

Ceilings are bench/machine.py's, of the same run. A decoding step reads every matrix's weights once, and each row's keys
and values in 16 bits; a token costs a multiply and an add for each weight, and those of attention. int4 weights are
multiplied as int8; bf16 ones, and keys and values, in fp32 where the CPU has no bf16 dot product.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import peer_weights

# Of bench/machine.py's kinds, those that bound a measure.
CEILINGS: Final = ("read", "fp32", "bf16", "int8")
# Of a weight as it is stored; int4 has a bf16 scale for each 128 weights.
WEIGHT_BYTES: Final[Mapping[str, float]] = MappingProxyType({"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 128})


def num_weights(checkpoint: Path) -> tuple[int, int]:
    """Weights of the layers' matrices, and of the LM head."""
    config = json.loads((checkpoint / "config.json").read_bytes())
    head = "embed_tokens.weight" if config.get("tie_word_embeddings", False) else "lm_head.weight"
    layers = head_weights = 0
    for file in peer_weights.weight_files(checkpoint):
        for name, entry in peer_weights.read_header(file)[0].items():
            size = math.prod(entry["shape"])
            if name.endswith(head):
                head_weights = size
            elif ".layers." in name and len(entry["shape"]) == 2:
                layers += size
    return layers, head_weights


def attention_operations(checkpoint: Path, prompt_len: int) -> float:
    """Multiplies and adds of attention for a token of a causal prompt, on average."""
    config = json.loads((checkpoint / "config.json").read_bytes())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return 2.0 * 2 * config["num_hidden_layers"] * heads * head_dim * prompt_len / 2


def limits(
    checkpoint: Path,
    ceilings: Mapping[str, float | None],
    precision: str,
    streams: int,
    prompt_len: int,
    context_len: int,
) -> dict[str, float]:
    """Tokens a second at best.

    ceilings     GB/s of "read", G operations a second of "fp32", "bf16", "int8", with all threads; None where unknown
    precision    of the weights, one of WEIGHT_BYTES
    context_len  tokens that a row which decodes has on average
    Returns "decode-1", "decode-N" (N streams) and "prefill" (a prompt of prompt_len); those that are known.
    """
    layers, head = num_weights(checkpoint)
    read = ceilings.get("read")
    act_peak = ceilings.get("bf16") or ceilings.get("fp32")
    peak = act_peak if precision == "bf16" else ceilings.get("int8")
    # Of a causal prompt, so half of what a row with all of it behind it costs.
    attention = attention_operations(checkpoint, 2 * context_len)
    row_bytes = context_len * peer_weights.kv_bytes_per_token(checkpoint) / 2  # which counts 4 bytes an element
    found: dict[str, Any] = {}

    def seconds(rows: int) -> float:
        """Of a decoding step: the bytes, or the operations."""
        assert read and peak and act_peak
        num_bytes = (layers + head) * WEIGHT_BYTES[precision] + rows * row_bytes
        return max(num_bytes / read, rows * (2 * (layers + head) / peak + attention / act_peak)) / 1e9

    if peak and act_peak:
        found["prefill"] = 1e9 / (2 * layers / peak + attention_operations(checkpoint, prompt_len) / act_peak)
        if read:
            found["decode-1"] = 1 / seconds(1)
            found[f"decode-{streams}"] = streams / seconds(streams)
    return found
