"""The Llama decoder in torch that train.py trains: the architecture of transformers' LlamaForCausalLM, its parameter
names included, so that `state_dict()` is a checkpoint.

It exists beside transformers' own because it is short enough to read in one go, and because it computes the loss over
the tokens that count only: in a chat those are the assistant's, a fraction of the batch, and the output layer is the
largest matrix of so small a model.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the target of a position that has no loss, as in F.cross_entropy


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a decoder; the names are config.json's. hidden_size = num_attention_heads * head_dim."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) with a learned scale."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), halves paired as in Hugging Face's Llama. x [batch, heads, length, dim]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention; several query heads share one key and value head (Ainslie et al. 2023)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, kv = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = (
            proj(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = turn(k, cos, sin).repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(turn(q, cos, sin), k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, hidden))


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, final norm; the output layer is the embedding again (tied)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape)
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        angles = torch.outer(torch.arange(shape.max_position_embeddings), shape.rope_theta**-half)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        # The output projections start smaller by the depth, so that the residual stream starts near the embedding.
        depth = math.sqrt(2 * self.shape.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scale = depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids int64 [batch, length] -> float32 [batch, length, hidden], after the final norm."""
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [batch, length] -> logits float32 [batch, length, vocab]."""
        return F.linear(self.hidden(ids), self.embed_tokens.weight)

    def loss(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """(sum of the cross-entropies in nats, how many tokens it is over).

        ids, targets   int64 [batch, length]; targets[b, t] is the token to follow ids[b, t], or IGNORED
        """
        counted = targets.flatten() != IGNORED
        hidden = self.hidden(ids).flatten(0, 1)[counted]
        logits = F.linear(hidden, self.embed_tokens.weight)
        return F.cross_entropy(logits, targets.flatten()[counted], reduction="sum"), len(hidden)
