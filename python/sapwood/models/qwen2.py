"""Qwen2 and Qwen2.5, dense: Llama with a bias on q, k and v, and windows on the later layers where the config asks."""

from __future__ import annotations

from sapwood.models.config import DecoderConfig, HfConfig, decoder_config
from sapwood.models.decoder import record_decoder
from sapwood.models.registry import ModelFamily


def configure(raw: HfConfig) -> DecoderConfig:
    """The bias is always there; no config field turns it off."""
    raw = raw.filled(sliding_window=4096, num_key_value_heads=32, max_position_embeddings=32768)
    return decoder_config(raw, windows="by_layer", qkv_bias=True)


MODEL = ModelFamily(configure, record_decoder)
