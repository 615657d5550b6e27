"""Mistral 7B, Nemo, Small: Llama with a sliding window where the config sets one (v0.1) and an explicit head_dim."""

from __future__ import annotations

from sapwood.models.config import DecoderConfig, HfConfig, decoder_config
from sapwood.models.decoder import record_decoder
from sapwood.models.registry import ModelFamily


def configure(raw: HfConfig) -> DecoderConfig:
    """sliding_window holds for every layer; null is none, and 4096 where the config is silent."""
    raw = raw.filled(sliding_window=4096, num_key_value_heads=8, max_position_embeddings=131072)
    return decoder_config(raw, windows="every_layer")


MODEL = ModelFamily(configure, record_decoder)
