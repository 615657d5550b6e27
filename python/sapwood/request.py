"""What a caller asks for and what comes back: plain data, shared by every layer (floor 0)."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from sapwood.errors import InvalidRequest

MAX_SEED = 2**64 - 1
MAX_N = 128
FLAGS = ("ignore_eos", "return_logprob", "skip_special_tokens")


class FinishReason(enum.StrEnum):
    """Why a request ended. `ABORT` covers aborts by the caller, deadlines and errors; see `RequestOutput.error`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are drawn and when a request ends. Field names are SGLang's.

    temperature      >= 0; 0 is greedy
    top_k            keep the k most likely tokens, exactly k, ties by lowest id; <= 0 (SGLang's -1) is off, and so is
                     any k that the vocabulary does not reach
    top_p            keep the smallest set of most likely tokens whose probability reaches top_p; (0, 1]
    min_p            keep tokens at least min_p times as likely as the likeliest; [0, 1]
    max_new_tokens   tokens to generate at most; None = up to the context length
    min_new_tokens   end tokens cannot be drawn before so many tokens; the context length still ends the request
    stop             strings that end the text; the text is cut before the first of them
    stop_token_ids   token ids that end the request, besides the model's own end tokens
    ignore_eos       do not end on the model's end tokens (stop_token_ids still end)
    seed             0 .. 2**64-1; None draws one, reported in the output, so that any result can be repeated
    n                choices to generate for the prompt, 1..MAX_N; they share its tokens in the prefix cache, and differ
                     with one seed, too
    return_logprob   report log-probabilities of the chosen tokens (raw distribution, before temperature)
    skip_special_tokens  leave special tokens out of the text

    Filters apply in the order temperature, top_k, top_p (on what top_k left, renormalised), min_p.
    Raises InvalidRequest naming the field (call `verify()`; the engine does).
    """

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    return_logprob: bool = False
    skip_special_tokens: bool = True

    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def verify(self, vocab_size: int | None = None) -> None:
        """Raise InvalidRequest for the first field out of range."""
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if not _is_finite(value):
                raise InvalidRequest(f"{name} must be a finite number, got {value!r}", name)
        for name in ("top_k", "min_new_tokens"):
            value = getattr(self, name)
            if not _is_int(value):
                raise InvalidRequest(f"{name} must be an integer, got {value!r}", name)
        if not _is_int(self.n) or not 1 <= self.n <= MAX_N:
            raise InvalidRequest(f"n must be an integer in [1, {MAX_N}], got {self.n!r}", "n")
        for name in FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidRequest(f"{name} must be True or False, got {value!r}", name)
        if self.temperature < 0:
            raise InvalidRequest(f"temperature must be >= 0 (0 is greedy), got {self.temperature}", "temperature")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p must be in (0, 1], got {self.top_p}", "top_p")
        if not 0 <= self.min_p <= 1:
            raise InvalidRequest(f"min_p must be in [0, 1], got {self.min_p}", "min_p")
        if self.max_new_tokens is not None:
            if not _is_int(self.max_new_tokens):
                raise InvalidRequest(
                    f"max_new_tokens must be an integer, got {self.max_new_tokens!r}", "max_new_tokens"
                )
            if self.max_new_tokens < 1:
                raise InvalidRequest(f"max_new_tokens must be >= 1, got {self.max_new_tokens}", "max_new_tokens")
        if self.min_new_tokens < 0:
            raise InvalidRequest(f"min_new_tokens must be >= 0, got {self.min_new_tokens}", "min_new_tokens")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InvalidRequest(
                f"min_new_tokens ({self.min_new_tokens}) must not exceed max_new_tokens ({self.max_new_tokens})",
                "min_new_tokens",
            )
        is_list = self.stop is None or isinstance(self.stop, Sequence)
        stops = self.stop_strings() if is_list else []
        if not is_list or any(not isinstance(s, str) or not s for s in stops):
            raise InvalidRequest(f"stop must be a non-empty string or a list of them, got {self.stop!r}", "stop")
        if len(stops) > 64:
            raise InvalidRequest(f"stop takes at most 64 strings, got {len(stops)}", "stop")
        ids = self.stop_token_ids
        if ids is not None:
            if not isinstance(ids, Sequence):
                raise InvalidRequest(f"stop_token_ids must be a list of integers, got {ids!r}", "stop_token_ids")
            for i in ids:
                if not _is_int(i) or i < 0 or (vocab_size is not None and i >= vocab_size):
                    end = vocab_size if vocab_size is not None else "vocab"
                    raise InvalidRequest(f"stop_token_ids must be integers in [0, {end}), got {i!r}", "stop_token_ids")
            if len(ids) > 256:
                raise InvalidRequest(f"stop_token_ids takes at most 256 ids, got {len(ids)}", "stop_token_ids")
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed <= MAX_SEED):
            raise InvalidRequest(f"seed must be an integer in [0, 2**64), got {self.seed!r}", "seed")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    """Whether value is a number that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """Chat messages with what the template shall do with them; bare lists of messages are ChatPrompt's defaults.

    messages                 [{"role": ..., "content": ...}, ...]
    add_generation_prompt    end with the opening of the assistant's turn
    continue_final_message   leave the last message open, so that the model continues it (no generation prompt then)
    template_kwargs          further variables of the template, such as enable_thinking
    """

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = MappingProxyType({})


class ErrorType(enum.StrEnum):
    """What kind of trouble ended a request with ABORT. TIMEOUT: its deadline; CAPACITY: the KV pool cannot hold it."""

    TIMEOUT = "timeout"
    CAPACITY = "capacity"
    INTERNAL = "internal"


class Usage(msgspec.Struct, frozen=True):
    """Token counts. cached_tokens: prompt tokens whose KV was found in the prefix cache (at first admission)."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Timing(msgspec.Struct, frozen=True):
    """A request's times in seconds since its submission; None where it did not get so far.

    admitted_s      it got a row (until then it was tokenised and waited)
    first_token_s   its first token was known
    total_s         its end
    """

    admitted_s: float | None
    first_token_s: float | None
    total_s: float


class RequestOutput(msgspec.Struct):
    """One output of a request; with stream=True one per step, the last with `finish_reason` set.

    text, token_ids, logprobs   what is new since the last output when streaming (deltas), else everything
    error, error_type           what went wrong, where finish_reason is ABORT and the caller did not abort it
    """

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    usage: Usage
    index: int = 0  # which prompt of a list this belongs to
    choice: int = 0  # which of its n choices
    seed: int = 0
    matched_stop: str | int | None = None
    logprobs: list[float] | None = None
    error: str | None = None
    error_type: ErrorType | None = None
    timing: Timing | None = None  # of the final output
