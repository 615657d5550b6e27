"""The two ends of a decoder: token ids to hidden states, and hidden states to logits and tokens.

Called by models/decoder.py while it records; hands nodes to the Recorder.
"""

from __future__ import annotations

from sapwood.program.ir import L, Recorder, T, TensorPart, Value
from sapwood.program.ops import LOGIT_BLOCK


def embedding(rec: Recorder, tensor: str, vocab_size: int, hidden: int, *, scale: float = 1.0) -> Value:
    """Rows of the embedding table: [T, hidden] float32, the beginning of the residual stream."""
    table = rec.slot("embed.table", "table", [TensorPart(tensor, (vocab_size, hidden))])
    (x,) = rec.op("embedding", "embed", (), [("float32", T, hidden)], [table], scale=scale)
    return x


def gather_logit_rows(rec: Recorder, x: Value) -> Value:
    """The tokens whose next token is wanted: [T, hidden] to [L, hidden], float32. Opens the head segment."""
    rec.segment("head")
    (rows,) = rec.op("gather_logit_rows", "head.gather", [x], [("float32", L, x.cols)])
    return rows


def lm_head(rec: Recorder, y: Value, tensor: str, *, scale: float = 1.0, softcap: float = 0.0) -> None:
    """Logits of [L, hidden] and the drawing of tokens. With tied embeddings `tensor` is the embedding table's."""
    vocab = rec.vocab_size
    weight = rec.slot("head.lm_head.w", "linear", [TensorPart(tensor, (vocab, y.cols))])
    blocks = -(-vocab // LOGIT_BLOCK)
    logits, block_max = rec.op(
        "lm_head",
        "head.lm_head",
        [y],
        [("float32", L, vocab), ("float32", L, blocks)],
        [weight],
        scale=scale,
        softcap=softcap,
    )
    rec.tap("logits", logits)
    rec.segment("sample")
    rec.op("sample", "sample", [logits, block_max], [])
