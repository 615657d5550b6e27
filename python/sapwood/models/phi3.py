"""Phi-3, Phi-3.5 mini and Phi-4 (mini): fused qkv_proj and gate_up_proj, partial rotary, longrope.

longrope has short and long frequencies. Hugging Face switches when the longest sequence of a batch passes
original_max_position_embeddings; here a request has one mode from its first token to its last, fixed at admission by
the most tokens it can reach, because the K of earlier tokens stays in the cache as it was rotated.
"""

from __future__ import annotations

import dataclasses

from sapwood.models.config import DecoderConfig, HfConfig, decoder_config
from sapwood.models.decoder import record_decoder
from sapwood.models.registry import ModelFamily


def configure(raw: HfConfig) -> DecoderConfig:
    """In Phi-3's configs "su" and "yarn" are earlier names of longrope."""
    raw = raw.filled(rms_norm_eps=1e-5, max_position_embeddings=4096, original_max_position_embeddings=4096)
    for layout in ("rope_scaling", "rope_parameters"):
        fields = raw.table(layout)
        if (fields.get("rope_type") or fields.get("type")) == "yarn":
            raw = dataclasses.replace(raw, values={**raw.values, layout: {**fields, "rope_type": "longrope"}})
    return decoder_config(raw, windows="every_layer", partial_rotary=True, fused_qkv=True, fused_gate_up=True)


MODEL = ModelFamily(configure, record_decoder)
