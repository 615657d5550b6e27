"""The one parametrised decoder: what Llama, Mistral, Qwen2, Qwen3 and Phi-3 have in common, written once against the
IR.

A family's file parses its config into `DecoderConfig` and calls `record_decoder`; executors run the Program it returns.

    x = embedding
    per layer:  x += o_proj(attention(qkv(rms_norm(x))));  x += down(silu(gate) * up)(rms_norm(x))
    logits = lm_head(rms_norm(x)) of the tokens whose next token is wanted
"""

from __future__ import annotations

from sapwood.layers import attention as attn
from sapwood.layers.embedding import embedding, gather_logit_rows, lm_head
from sapwood.layers.linear import gate_up, linear_residual
from sapwood.layers.norm import rms_norm
from sapwood.layers.rotary import RopeSlots, rope_slots
from sapwood.models.config import DecoderConfig
from sapwood.program.ir import ActDType, GroupSpec, Program, Recorder, TensorPart, Value

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


def record_decoder(config: DecoderConfig, act: ActDType, context_len: int) -> Program:
    """The program of a decoder for requests of at most context_len tokens.

    A window that no request can outgrow is no window: those layers join the full group.
    """
    windows = [w if w < context_len else 0 for w in config.layer_windows]
    kinds = sorted(set(windows))  # full (0) first
    rec = Recorder(act, config.vocab_size)
    x = embedding(rec, EMBEDDING, config.vocab_size, config.hidden)
    rope = rope_slots(rec, config.rope, context_len)
    for i, window in enumerate(windows):
        shape = attn.AttentionShape(
            config.num_q_heads,
            config.num_kv_heads,
            config.head_dim,
            kinds.index(window),
            windows[:i].count(window),
            window,
        )
        with rec.layer(i):
            x = rec.tap(f"layers.{i}", _layer(rec, config, x, shape, rope, f"model.layers.{i}"))
    x = rec.tap(
        "last_hidden", rms_norm(rec, "head.norm", gather_logit_rows(rec, x), "model.norm.weight", config.norm_eps)
    )
    lm_head(rec, x, EMBEDDING if config.tied else LM_HEAD)
    groups = [GroupSpec(window, windows.count(window)) for window in kinds]
    return rec.finish(groups, config.num_kv_heads, config.head_dim)


def _layer(
    rec: Recorder, config: DecoderConfig, x: Value, shape: attn.AttentionShape, rope: RopeSlots, prefix: str
) -> Value:
    self_attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    y = rms_norm(rec, "attention_norm", x, f"{prefix}.input_layernorm.weight", config.norm_eps)
    q = attn.qkv(
        rec, y, shape, rope,
        _qkv_parts(config, self_attn, "weight", config.hidden),
        _qkv_parts(config, self_attn, "bias") if config.qkv_bias else (),
        (f"{self_attn}.q_norm.weight", f"{self_attn}.k_norm.weight") if config.qk_norm else None,
        config.norm_eps,
    )  # fmt: skip
    o = attn.attention(rec, q, shape)
    x = linear_residual(
        rec, "o_proj", o, x, f"{self_attn}.o_proj.weight", f"{self_attn}.o_proj.bias" if config.o_bias else None
    )
    y = rms_norm(rec, "mlp_norm", x, f"{prefix}.post_attention_layernorm.weight", config.norm_eps)
    h = gate_up(rec, "gate_up", y, config.intermediate, _gate_up_parts(config, mlp))
    return linear_residual(rec, "down_proj", h, x, f"{mlp}.down_proj.weight")


def _qkv_parts(config: DecoderConfig, prefix: str, what: str, *cols: int) -> list[TensorPart]:
    """Rows of q, k, v: of one fused tensor or of three."""
    q_rows, kv_rows = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if config.fused_qkv:
        return [TensorPart(f"{prefix}.qkv_proj.{what}", (q_rows + 2 * kv_rows, *cols))]
    return [
        TensorPart(f"{prefix}.{n}_proj.{what}", (rows, *cols))
        for n, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
    ]


def _gate_up_parts(config: DecoderConfig, prefix: str) -> list[TensorPart]:
    """Gate rows, then up rows."""
    rows, cols = config.intermediate, config.hidden
    if config.fused_gate_up:
        fused = f"{prefix}.gate_up_proj.weight"
        return [TensorPart(fused, (2 * rows, cols), 0, rows), TensorPart(fused, (2 * rows, cols), rows, 2 * rows)]
    return [TensorPart(f"{prefix}.{n}_proj.weight", (rows, cols)) for n in ("gate", "up")]
