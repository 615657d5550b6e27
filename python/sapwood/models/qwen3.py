"""Qwen3, dense: RMSNorm on every q and k head before rope, an explicit head_dim, no bias unless attention_bias."""

from __future__ import annotations

from sapwood.models.config import DecoderConfig, HfConfig, decoder_config
from sapwood.models.decoder import record_decoder
from sapwood.models.registry import ModelFamily


def configure(raw: HfConfig) -> DecoderConfig:
    """head_dim is 128 where the config is silent, whatever hidden_size / num_attention_heads gives."""
    raw = raw.filled(sliding_window=4096, num_key_value_heads=32, max_position_embeddings=32768)
    bias = raw.flag("attention_bias")
    return decoder_config(raw, windows="by_layer", default_head_dim=128, qk_norm=True, qkv_bias=bias, o_bias=bias)


MODEL = ModelFamily(configure, record_decoder)
