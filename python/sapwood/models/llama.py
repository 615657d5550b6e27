"""Llama 2, 3, 3.1, 3.2, 3.3 and whatever shares their architecture (models/registry.py names this file)."""

from __future__ import annotations

from sapwood.models.config import DecoderConfig, HfConfig, decoder_config
from sapwood.models.decoder import record_decoder
from sapwood.models.registry import ModelFamily


def configure(raw: HfConfig) -> DecoderConfig:
    """attention_bias puts a bias on all four attention projections."""
    raw = raw.filled(max_position_embeddings=2048)
    bias = raw.flag("attention_bias")
    return decoder_config(raw, qkv_bias=bias, o_bias=bias)


MODEL = ModelFamily(configure, record_decoder)
