"""Token ids to text, one id at a time.

engine/output.py pushes each generated id and hands on the text that comes back; the last push of a request is followed
by `flush`. What the pushes and the flush return, joined, *is* the request's text, streamed or not.

Text after a prompt keeps its leading space: the rules by which SentencePiece-style decoders strip one concern the start
of a whole text only.
"""

from __future__ import annotations

from codecs import utf_8_decode
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sapwood.engine.tokenizer import Tokenizer

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes and a token at least one, so a text whose end is still broken after four tokens is
# not going to heal. Twice that, as special tokens between them may say nothing.
MAX_HELD_TOKENS: Final = 8
NO_TEXTS: Final = MappingProxyType[int, str]({})


class Detokenizer:
    """Incremental decoding of one request's output.

    Never returns half a character: bytes of one that is merely incomplete wait; bytes that can no longer become one
    turn into U+FFFD (one per maximal invalid part, as Python's "replace"), at the latest in `flush`. For ids whose
    bytes are valid UTF-8 the text equals decode(prompt + ids) without decode(prompt).

    push and flush raise InvalidRequest for an id outside the vocabulary; the state is then unchanged.
    Cost of a push: a dictionary lookup for a token of whole characters; a few us where the decoder looks at
    neighbouring tokens (WordPiece and the like) and the window is decoded again. Not thread-safe; cheap to make.
    """

    __slots__ = ("_pending", "_table", "_texts", "_window")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._table = tokenizer.table(skip_special_tokens)
        self._texts = NO_TEXTS if self._table is None else self._table.texts
        self._window = _Window(tokenizer, skip_special_tokens) if self._table is None else None
        self._pending = b""  # the bytes of an incomplete character

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; may be empty."""
        if not self._pending:
            text = self._texts.get(token_id)
            if text is not None:
                return text
        if self._table is None:
            assert self._window is not None
            return self._window.push(token_id)
        data = self._pending + self._table.bytes_of(token_id)
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        """What still waited, incomplete bytes as U+FFFD. The detokenizer is then as new."""
        if self._window is not None:
            return self._window.flush()
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class _Window:
    """Any decoder, by decoding a window of ids twice: with and without the new ones, and taking the difference.

    The window starts with the tokens whose text was emitted last, so that the new ones are never the first, whose
    treatment differs. At the very start an anchor, the tokens of a plain letter, takes their place.
    Source: the prefix/read-offset scheme of HF text-generation-inference.
    """

    __slots__ = ("_anchor", "_emitted", "_ids", "_read", "_skip_special_tokens", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._anchor = tokenizer.encode("a", add_special_tokens=False)
        self._reset()

    def _reset(self) -> None:
        self._ids = list(self._anchor)
        self._read = len(self._ids)
        self._emitted = self._decode(self._ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)

    def push(self, token_id: int) -> str:
        ids = [*self._ids, token_id]
        text = self._decode(ids)  # raises for a bad id before anything has changed
        self._ids = ids
        held = len(ids) - self._read
        if text.endswith(REPLACEMENT) and held < MAX_HELD_TOKENS:
            return ""
        new = text[len(self._emitted) :]
        if new:  # a token that says nothing is no context: keep the window until something was said
            self._ids = ids[self._read :]
            self._read = held
            self._emitted = self._decode(self._ids)
        return new

    def flush(self) -> str:
        text = self._decode(self._ids)[len(self._emitted) :]
        self._reset()
        return text


def detokenize(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> str:
    """The text of ids generated after a prompt: what a Detokenizer says in all."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    return "".join([*map(detokenizer.push, ids), detokenizer.flush()])
