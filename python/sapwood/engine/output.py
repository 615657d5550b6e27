"""What a request says: its tokens turned into text, ended by its stop rules, handed out in outputs.

Receives (token, flags) of each committed row from engine/engine.py; hands RequestOutputs to the request's sink. Which
token ends a request by id or length was decided by the sampler (flags); stop strings are decided here.

Streaming and not streaming run the same code on the same tokens, one by one: the deltas joined are the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sapwood import _core
from sapwood.request import ErrorType, FinishReason, RequestOutput, SamplingParams, Usage

_STOP = _core.FINISHED_STOP
_LENGTH = _core.FINISHED_LENGTH


class TextDecoder(Protocol):
    """engine/detokenizer.py's Detokenizer, as far as this file needs it."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class _Pattern:
    """One stop string followed through the text. Source: Knuth, Morris, Pratt 1977."""

    __slots__ = ("fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # how much of `text` the end of the output matches
        self.fallback = [0] * len(text)
        k = 0
        for i in range(1, len(text)):
            while k and text[k] != text[i]:
                k = self.fallback[k - 1]
            if text[k] == text[i]:
                k += 1
            self.fallback[i] = k

    def advance(self, piece: str, armed: bool) -> int:
        """Follow piece; return the position in it behind the first complete occurrence, 0 where there is none.

        When not armed, complete occurrences do not count.
        """
        text, fallback, k = self.text, self.fallback, self.matched
        i, end = 0, len(piece)
        while i < end:
            if k == 0:
                i = piece.find(text[0], i)
                if i < 0:
                    break
            char = piece[i]
            while k and text[k] != char:
                k = fallback[k - 1]
            if text[k] == char:
                k += 1
            i += 1
            if k == len(text):
                if armed:
                    self.matched = 0
                    return i
                k = fallback[k - 1]
        self.matched = k
        return 0


class StopMatcher:
    """Finds the stop string that is complete first, however tokens cut the text; holds back what may still become one.

    Of several complete at the same character the longest counts. What is held back is always shorter than the longest
    stop.
    """

    __slots__ = ("_held", "_patterns")

    def __init__(self, stops: Sequence[str]) -> None:
        self._patterns = [_Pattern(s) for s in stops]
        self._held = ""

    def feed(self, piece: str, armed: bool = True) -> tuple[str, str | None]:
        """Append piece. Returns the text that is certain now, and the stop string that ended it, if one did.

        After a stop nothing is held, and feed must not be called again.
        """
        end, stop, held = 0, None, 0
        for pattern in self._patterns:
            at = pattern.advance(piece, armed)
            if at and (not end or at < end or (at == end and len(pattern.text) > len(stop or ""))):
                end, stop = at, pattern.text
            if pattern.matched > held:
                held = pattern.matched
        text = self._held + piece
        if stop is not None:
            cut = len(self._held) + end - len(stop)
            self._held = ""
            return text[:cut], stop
        if not held:
            self._held = ""
            return text, None
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """The end of the output has come: what was held back is text."""
        held, self._held = self._held, ""
        return held


class OutputProcessor:
    """One request's outputs, from its first token to the final one.

    token_ids holds every generated token, a final EOS or stop id included; its text is not part of the text. push() may
    raise what the decoder raises; finish() never does.
    """

    __slots__ = (
        "_armed_after",
        "_choice",
        "_decoder",
        "_index",
        "_logprobs",
        "_matcher",
        "_num_sent",
        "_request_id",
        "_seed",
        "_stream",
        "_texts",
        "cached_len",
        "error",
        "error_type",
        "finish_reason",
        "matched_stop",
        "num_prompt",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        params: SamplingParams,
        *,
        num_prompt: int,
        decoder: TextDecoder | None,
        stream: bool,
        seed: int = 0,
        index: int = 0,
        choice: int = 0,
    ) -> None:
        stops = params.stop_strings()
        self._request_id = request_id
        self._index = index
        self._choice = choice
        self._seed = seed
        self._stream = stream
        self._decoder = decoder
        self._matcher = StopMatcher(stops) if stops and decoder is not None else None
        self._armed_after = params.min_new_tokens
        self._texts: list[str] = []  # not handed out yet
        self._num_sent = 0
        self._logprobs: list[float] | None = [] if params.return_logprob else None
        self.num_prompt = num_prompt
        self.cached_len = 0
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.matched_stop: str | int | None = None
        self.error: str | None = None
        self.error_type: ErrorType | None = None

    def push(self, token: int, flags: int, logprob: float) -> bool:
        """A token was committed; True when it ended the request."""
        self.token_ids.append(token)
        if self._logprobs is not None:
            self._logprobs.append(logprob)
        if flags & _STOP:
            self.matched_stop = token
            self.finish(FinishReason.STOP)
            return True
        if self._decoder is not None:
            piece = self._decoder.push(token)
            if piece:
                if self._matcher is None:
                    self._texts.append(piece)
                elif self._match(piece, len(self.token_ids) > self._armed_after):
                    return True
        if flags & _LENGTH:
            self.finish(FinishReason.LENGTH)
            return True
        return False

    def _match(self, piece: str, armed: bool) -> bool:
        assert self._matcher is not None
        text, stop = self._matcher.feed(piece, armed)
        if text:
            self._texts.append(text)
        if stop is None:
            return False
        self.matched_stop = stop
        self.finish_reason = FinishReason.STOP
        return True

    def finish(
        self, reason: FinishReason, error: str | None = None, error_type: ErrorType = ErrorType.INTERNAL
    ) -> None:
        """End the request, where push() has not: the text still held back is text after all. Never raises."""
        if self.finish_reason is not None:
            return
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            try:
                tail = decoder.flush()
            except Exception as problem:  # the request ends either way; its error says why, if nothing else does
                tail = ""
                if error is None:
                    error, error_type = f"detokenizer: {type(problem).__name__}: {problem}", ErrorType.INTERNAL
                reason = FinishReason.ABORT
            if self._matcher is not None:
                # Bytes that never became a character turn into text only now, and may complete a stop string.
                armed = reason != FinishReason.ABORT and len(self.token_ids) > self._armed_after
                if tail and self._match(tail, armed):
                    return
                tail = self._matcher.flush()
            if tail:
                self._texts.append(tail)
        self.finish_reason = reason
        self.error = error
        self.error_type = error_type if error is not None else None

    def take(self) -> RequestOutput:
        """The next output: what is new since the last when streaming, else everything so far."""
        texts = self._texts
        text = texts[0] if len(texts) == 1 else "".join(texts)
        ids, logprobs = self.token_ids, self._logprobs
        if self._stream:
            texts.clear()
            start, self._num_sent = self._num_sent, len(ids)
            ids = ids[start:]
            if logprobs is not None:
                logprobs = logprobs[start:]
        return RequestOutput(
            self._request_id,
            text,
            ids,
            self.finish_reason,
            Usage(self.num_prompt, len(self.token_ids), self.cached_len),
            self._index,
            self._choice,
            self._seed,
            self.matched_stop,
            logprobs,
            self.error,
            self.error_type,
        )
