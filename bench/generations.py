"""Requests of the APIs that bench/serving.py speaks, and the times at which their chunks arrive.

Made from a workloads.Request; bench/http_client.py feeds the response, and bench/serving_metrics.py computes from the
times. While tokens come, nothing is computed here but what cannot wait.
"""

from __future__ import annotations

import abc
import json
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import workloads
from http_client import Client, EventParser, HttpError, ResponseParser

MAX_ERROR_CHARS: Final = 500
# Of /generate's fields, those that are no sampling parameters.
NATIVE_FIELDS: Final = frozenset({"sampling_params", "return_logprob", "rid", "lora_path"})


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    """What is read of an OpenAI chunk; the rest is skipped undecoded."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Meta(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: Any = None


class _NativeChunk(msgspec.Struct):
    """What is read of a chunk of SGLang's /generate."""

    meta_info: _Meta | None = None
    error: Any = None


def error_text(error: Any) -> str:
    """The words of an error object, in any of the forms servers give it."""
    if isinstance(error, dict):
        for name in ("message", "error", "detail"):
            if error.get(name):
                return error_text(error[name])
    text = error if isinstance(error, str) else json.dumps(error)
    return text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + "..."


class Generation(abc.ABC):
    """One request and what came of it; subclasses know an API. All times are time.perf_counter()'s.

    start_time     just before the request was sent
    chunk_times    when each chunk with a choice arrived
    prompt_tokens, output_tokens, cached_tokens    by the server's usage; None where it gave none
    error          why it failed; "" for one that succeeded, or has not ended
    ended          it came to an end, good or bad
    """

    path = ""
    sends_ids = True

    def __init__(self, request: workloads.Request) -> None:
        self.request = request
        self.arrival_time = 0.0
        self.start_time = 0.0
        self.chunk_times: list[float] = []
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.error = ""
        self.ended = False
        self._events = EventParser()
        self._other: list[bytes] = []
        self._streams = False
        self._status = 0
        self._reason = ""
        self._complete = False

    @abc.abstractmethod
    def payload(self, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON to send: to generate request.output_len tokens, with further fields on top."""

    @abc.abstractmethod
    def event(self, payload: bytes, now: float) -> None:
        """Take in one event; raises msgspec.DecodeError (or its ValidationError) where it is not this API's."""

    @property
    @abc.abstractmethod
    def text(self) -> str:
        """What was generated so far."""

    async def run(self, client: Client, model: str, fields: Mapping[str, Any]) -> None:
        """Send and read to the end. Never raises but CancelledError; what goes wrong is in `error`."""
        body = msgspec.json.encode(self.payload(model, fields))
        self.start_time = time.perf_counter()
        try:
            await client.post(self.path, body, self)
            self._end()
        except (OSError, HttpError, msgspec.DecodeError) as error:
            self._fail(f"{type(error).__name__}: {error}")
        self.ended = True

    def head(self, parser: ResponseParser) -> None:
        self._status, self._reason = parser.status, parser.reason
        self._streams = parser.headers.get("content-type", "").lower().startswith("text/event-stream")

    def body(self, data: bytes, now: float) -> None:
        if self._status != 200 or not self._streams:
            self._other.append(data)
            return
        for payload in self._events.feed(data):
            self._take(payload, now)

    def _take(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self._complete = True
        else:
            self.event(payload, now)

    def _end(self) -> None:
        """The response is complete; whether it is an answer."""
        now = time.perf_counter()
        for payload in self._events.finish():
            self._take(payload, now)
        if self._status != 200:
            body = b"".join(self._other)
            try:
                words = error_text(msgspec.json.decode(body))
            except msgspec.DecodeError:
                words = body.decode("utf-8", "replace")[:MAX_ERROR_CHARS]
            self._fail(f"HTTP {self._status} {self._reason}: {words}")
        elif not self._streams:
            self._fail(f"an event stream was asked for, but this came: {b''.join(self._other)[:200]!r}")
        elif not self.chunk_times:
            self._fail("the stream ended without a token")
        elif not self._complete:
            self._fail("the stream broke off: no finish reason and no [DONE]")

    def _fail(self, error: str) -> None:
        self.error = self.error or error

    def _refuse(self, error: Any) -> None:
        """The server said in the stream that something went wrong."""
        self._fail(f"error in the stream: {error_text(error)}")

    # --- what is measured
    @property
    def success(self) -> bool:
        return self.ended and not self.error

    @property
    def ttft(self) -> float:
        """Seconds to the first chunk; 0 where there was none."""
        return self.chunk_times[0] - self.start_time if self.chunk_times else 0.0

    @property
    def latency(self) -> float:
        """Seconds to the last chunk."""
        return self.chunk_times[-1] - self.start_time if self.chunk_times else 0.0

    @property
    def itl(self) -> list[float]:
        """Seconds between chunks."""
        times = self.chunk_times
        return [after - before for before, after in zip(times, times[1:], strict=False)]


_decode_chunk: Final = msgspec.json.Decoder(_Chunk).decode
_decode_native: Final = msgspec.json.Decoder(_NativeChunk).decode


class _OpenAI(Generation):
    def __init__(self, request: workloads.Request) -> None:
        super().__init__(request)
        self._texts: list[str] = []

    def event(self, payload: bytes, now: float) -> None:
        chunk = _decode_chunk(payload)
        if chunk.choices:
            self.chunk_times.append(now)
            choice = chunk.choices[0]
            if choice.text:
                self._texts.append(choice.text)
            elif choice.delta is not None:
                self._texts.append(choice.delta.content or choice.delta.reasoning_content or "")
            if choice.finish_reason is not None:
                self._complete = True
        if chunk.usage is not None:
            usage = chunk.usage
            self.prompt_tokens, self.output_tokens = usage.prompt_tokens, usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                self.cached_tokens = usage.prompt_tokens_details.cached_tokens
        if chunk.error is not None:
            self._refuse(chunk.error)

    @property
    def text(self) -> str:
        return "".join(self._texts)


class Completion(_OpenAI):
    """/v1/completions"""

    path = "/v1/completions"

    def payload(self, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model": model, "prompt": self.request.prompt, "max_tokens": self.request.output_len, "stream": True,
            "stream_options": {"include_usage": True}, **fields,
        }  # fmt: skip


class ChatCompletion(_OpenAI):
    """/v1/chat/completions; the prompt is the user's only message, and must be text."""

    path = "/v1/chat/completions"
    sends_ids = False

    def payload(self, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model": model, "messages": [{"role": "user", "content": self.request.prompt}],
            "max_completion_tokens": self.request.output_len, "stream": True,
            "stream_options": {"include_usage": True}, **fields,
        }  # fmt: skip


class NativeGenerate(Generation):
    """SGLang's /generate. Its text is the last event's, which is all of it unless the server streams it piecemeal."""

    path = "/generate"

    def __init__(self, request: workloads.Request) -> None:
        super().__init__(request)
        self._last = b"{}"

    def payload(self, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of OpenAI's API other than /generate's own are sampling parameters."""
        prompt = self.request.prompt
        own = {name: value for name, value in fields.items() if name in NATIVE_FIELDS}
        sampling = {name: value for name, value in fields.items() if name not in own}
        sampling = {"max_new_tokens": self.request.output_len, **sampling, **own.pop("sampling_params", {})}
        where = "text" if isinstance(prompt, str) else "input_ids"
        return {where: prompt, "sampling_params": sampling, "stream": True, **own}

    def event(self, payload: bytes, now: float) -> None:
        chunk = _decode_native(payload)
        if chunk.error is not None:
            self._refuse(chunk.error)
        if chunk.meta_info is not None:
            meta = chunk.meta_info
            self.chunk_times.append(now)
            self._last = payload
            self.prompt_tokens, self.output_tokens = meta.prompt_tokens, meta.completion_tokens
            self.cached_tokens = meta.cached_tokens
            if meta.finish_reason is not None:
                self._complete = True

    @property
    def text(self) -> str:
        return str(json.loads(self._last).get("text") or "")


BACKENDS: Final[Mapping[str, type[Generation]]] = {
    "openai": Completion,
    "openai-chat": ChatCompletion,
    "sglang": NativeGenerate,
}


def model_cards(body: bytes) -> list[Mapping[str, Any]]:
    """The models that the answer of /v1/models names; none where it is something else."""
    try:
        cards = json.loads(body)["data"]
        return [card for card in cards if isinstance(card["id"], str)]
    except (ValueError, KeyError, TypeError):
        return []
