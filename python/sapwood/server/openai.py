"""OpenAI's API: /v1/models, /v1/completions, /v1/chat/completions.

Receives exchanges from server/app.py; parses bodies with server/fields.py, asks and answers through
server/generation.py. Fields beyond OpenAI's have the names that vLLM's and SGLang's users know.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from sapwood import __version__
from sapwood.chat.template import RESERVED
from sapwood.engine.tokenizer import Tokenizer
from sapwood.errors import InvalidRequest
from sapwood.request import ChatPrompt, FinishReason, RequestOutput
from sapwood.server.exchange import Exchange
from sapwood.server.fields import Sampling, holds_prompts, parse
from sapwood.server.generation import run
from sapwood.server.problems import Problem
from sapwood.server.service import Service

FINGERPRINT: Final = f"sapwood-{__version__}"
COMPLETION_MAX_TOKENS: Final = 16  # OpenAI's default for completions; a chat answer may fill the context
# The engine's names -> the names that these routes' clients used
CLIENT_NAMES: Final = MappingProxyType({"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"})
ALIASES: Final = MappingProxyType({"request_id": "rid", "min_new_tokens": "min_tokens", "max_new_tokens": "max_tokens"})

# A client's own id of a call. It becomes a header of the answer.
RequestId = Annotated[str, msgspec.Meta(pattern="^[!-~]{1,256}$")]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_usage: one more event with the token counts. continuous_usage_stats: counts in every event."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: bool | None = None  # OpenAI's padding against traffic analysis; never done here


class Request(Sampling, kw_only=True):
    """What both routes take."""

    model: str | UnsetType = UNSET
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | UnsetType = UNSET
    min_tokens: int | UnsetType = UNSET
    priority: int = 0
    cache_salt: str | None = None
    rid: RequestId | None = None

    def engine_params(self, max_tokens: int | None) -> dict[str, Any]:
        """SamplingParams' fields; max_tokens where the client gave none."""
        params = self.params()
        params["max_new_tokens"] = self.max_tokens if self.max_tokens is not UNSET else max_tokens
        if self.min_tokens is not UNSET:
            params["min_new_tokens"] = self.min_tokens
        return params


class CompletionRequest(Request, kw_only=True):
    """POST /v1/completions. prompt: text, token ids, or a list of either."""

    prompt: str | list[Any]
    echo: bool = False
    logprobs: int | UnsetType = UNSET


class ChatRequest(Request, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | UnsetType = UNSET
    logprobs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}


async def list_models(exchange: Exchange) -> None:
    """GET /v1/models"""
    exchange.service.ready_engine()
    await exchange.answer({"object": "list", "data": [_card(exchange.service)]})


async def get_model(exchange: Exchange) -> None:
    """GET /v1/models/{id}"""
    exchange.service.ready_engine()
    exchange.service.check_model(exchange.scope["path_params"]["model"])
    await exchange.answer(_card(exchange.service))


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "sapwood",
        "root": service.config.model,
        "max_model_len": service.context_len(),
    }


async def completions(exchange: Exchange) -> None:
    """POST /v1/completions"""
    request = parse(await exchange.body(), CompletionRequest, aliases=ALIASES)
    service = exchange.service
    service.ready_engine()
    params = request.engine_params(COMPLETION_MAX_TOKENS)
    if request.logprobs is not UNSET:
        if request.logprobs != 0 or request.echo:
            what = "the prompt's log-probabilities" if request.logprobs == 0 else "alternatives to the chosen token"
            raise Problem(
                400,
                f"logprobs: {what} are not reported by this version; 0 without echo gives the log-probability of each "
                "chosen token",
                param="logprobs",
                code="unsupported",
            )
        params["return_logprob"] = True
    prompt = request.prompt
    prompts = prompt if isinstance(prompt, list) and holds_prompts(prompt, "prompt", texts=True) else [prompt]
    await _run(exchange, request, prompt, params, _Completion(service, request, prompts))


async def chat_completions(exchange: Exchange) -> None:
    """POST /v1/chat/completions"""
    request = parse(await exchange.body(), ChatRequest, aliases=ALIASES)
    service = exchange.service
    service.ready_engine()
    if request.max_completion_tokens is not UNSET:
        if request.max_tokens is not UNSET and request.max_tokens != request.max_completion_tokens:
            raise Problem(400, "max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens")
        request.max_tokens = request.max_completion_tokens
    prompt = chat_prompt(
        request.messages,
        request.add_generation_prompt,
        request.continue_final_message,
        request.chat_template_kwargs,
    )
    params = request.engine_params(None)
    if request.logprobs:
        params["return_logprob"] = True
    await _run(exchange, request, prompt, params, _Chat(service, request))


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    continue_final_message: bool,
    template_kwargs: Mapping[str, Any],
) -> ChatPrompt:
    """Messages as templates expect them: the content one text, parts of text joined by line breaks; nulls left out.

    Raises Problem 400 for what this version cannot show a model.
    """
    for name in template_kwargs:
        if name in RESERVED or name == "self":
            raise Problem(
                400,
                f"chat_template_kwargs: {name!r} is no variable of the template; "
                + ("it is a field of its own" if name != "self" else "choose another name"),
                param="chat_template_kwargs",
            )
    return ChatPrompt(
        messages=[_plain(message, i) for i, message in enumerate(messages)],
        add_generation_prompt=add_generation_prompt and not continue_final_message,
        continue_final_message=continue_final_message,
        template_kwargs=template_kwargs,
    )


def _plain(message: Mapping[str, Any], i: int) -> dict[str, Any]:
    plain = {name: value for name, value in message.items() if value is not None}
    content = plain.get("content", "")
    if isinstance(content, list):
        texts = []
        for k, part in enumerate(content):
            place = f"messages[{i}].content[{k}]"
            if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
                kind = part.get("type") if isinstance(part, dict) else part
                raise Problem(400, f"{place}: this model takes text parts alone, got {kind!r:.100}", param="messages")
            text = part.get(part["type"])
            if not isinstance(text, str):
                raise Problem(400, f"{place}.text must be a string, got {text!r:.100}", param="messages")
            texts.append(text)
        content = "\n".join(texts)
    if not isinstance(content, str):
        raise Problem(
            400, f"messages[{i}].content must be a string or a list of parts, got {content!r:.100}", param="messages"
        )
    if plain.get("tool_calls") or plain.get("function_call"):
        raise Problem(400, f"messages[{i}].tool_calls: this version does not know tool calls", param="messages")
    return plain | {"content": content}


async def _run(exchange: Exchange, request: Request, prompt: Any, params: dict[str, Any], answer: _Answer) -> None:
    """Generate and answer, whole or as a stream."""
    exchange.service.check_model(request.model)
    if request.stream_options is not None and not request.stream:
        raise Problem(400, "stream_options needs stream=true", param="stream_options")
    exchange.id = request.rid or answer.prefix + exchange.id
    answer.begin(exchange.id, request.stream_options or StreamOptions())
    try:
        await run(exchange, request, prompt, params, answer)
    except InvalidRequest as error:
        raise _in_client_words(error, answer.names) from None


def _in_client_words(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """The same error about the fields as the client named them."""
    text = str(error)
    for name in CLIENT_NAMES:
        text = text.replace(name, names[name])
    return type(error)(text, names.get(error.param or "", error.param))


def usage_of(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """OpenAI's usage: a prompt counts once however many choices it has."""
    # Its first choice paid for a prompt; the others found it in the cache. A stream's come in the order of their ends.
    prompts = {output.index: output.usage for output in sorted(outputs, key=lambda output: -output.choice)}
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts.values())
    completion_tokens = sum(output.usage.completion_tokens for output in outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts.values())},
    }


class _Answer(abc.ABC):
    """One call's answer: the JSON around the texts. What does not change from event to event is encoded once."""

    prefix = ""
    kind = ""
    chunk_kind = ""
    names: Mapping[str, str] = CLIENT_NAMES

    def __init__(self, service: Service, request: Request) -> None:
        self.id = ""
        self._tokenizer = service.engine.tokenizer
        self._model = service.model_name
        self._created = int(time.time())
        self._n = request.n if request.n is not UNSET else 1
        self._include_usage = self._continuous_usage = False
        self._latest: dict[int, RequestOutput] = {}
        self._head = b""

    def begin(self, request_id: str, options: StreamOptions) -> None:
        """Before anything is answered."""
        self.id = request_id
        self._include_usage = bool(options.include_usage)
        self._continuous_usage = self._include_usage and bool(options.continuous_usage_stats)
        head = msgspec.json.encode(self._frame(self.chunk_kind))
        self._head = b"data: " + head[:-1] + b',"choices":'

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": FINGERPRINT,
        }

    def _place(self, output: RequestOutput) -> int:
        """A choice's index: all choices of the first prompt, then of the second, ..."""
        return output.index * self._n + output.choice

    @abc.abstractmethod
    def event(self, output: RequestOutput) -> bytes:
        """The events of an output."""

    def _event(self, choice: bytes, output: RequestOutput) -> bytes:
        tail = b"]}\n\n"
        if self._continuous_usage:
            self._latest[self._place(output)] = output
            tail = b'],"usage":%b}\n\n' % msgspec.json.encode(usage_of(list(self._latest.values())))
        elif self._include_usage:
            tail = b'],"usage":null}\n\n'
        return b"".join((self._head, b"[", choice, tail))

    def close(self, finals: list[RequestOutput]) -> bytes:
        """The last event: the counts, where they were asked for."""
        if not self._include_usage:
            return b""
        return b'%b[],"usage":%b}\n\n' % (self._head, msgspec.json.encode(usage_of(finals)))

    def whole(self, outputs: list[RequestOutput]) -> bytes:
        body = self._frame(self.kind)
        body["choices"] = [self._choice(output) for output in outputs]
        body["usage"] = usage_of(outputs)
        return msgspec.json.encode(body)

    @abc.abstractmethod
    def _choice(self, output: RequestOutput) -> dict[str, Any]:
        """A whole output."""

    def _token(self, token_id: int) -> tuple[str, list[int] | None]:
        """A token's text for log-probabilities, and its bytes where the tokenizer can tell."""
        return token_text(self._tokenizer, token_id)


def token_text(tokenizer: Tokenizer | None, token_id: int) -> tuple[str, list[int] | None]:
    """One token as text (pieces of characters as U+FFFD), and its bytes; without a tokenizer, the id in words."""
    if tokenizer is None:
        return f"token_id:{token_id}", None
    if tokenizer.table(False) is None:
        return tokenizer.decode([token_id], skip_special_tokens=False), None
    data = tokenizer.token_bytes(token_id)
    return data.decode("utf-8", "replace"), list(data)


def finish_of(output: RequestOutput) -> str | None:
    return output.finish_reason.value if output.finish_reason is not None else None


def matched_stop(output: RequestOutput) -> str | int | None:
    """The stop string or token id that ended the text (SGLang's matched_stop, vLLM's stop_reason)."""
    return output.matched_stop if output.finish_reason is FinishReason.STOP else None


class _Completion(_Answer):
    prefix = "cmpl-"
    kind = chunk_kind = "text_completion"

    def __init__(self, service: Service, request: CompletionRequest, prompts: Sequence[str | list[int]]) -> None:
        super().__init__(service, request)
        self._offsets: dict[int, int] = {}  # choice -> characters streamed
        self._echo = prompts if request.echo and service.tokenizer() else None

    def _text(self, output: RequestOutput) -> str:
        """The output's text, behind the prompt's where that is to be echoed: once a choice."""
        if self._echo is None or self._place(output) in self._offsets:
            return output.text
        prompt = self._echo[output.index]
        if not isinstance(prompt, str):
            assert self._tokenizer is not None
            prompt = self._tokenizer.decode(prompt, skip_special_tokens=False)
        return prompt + output.text

    def event(self, output: RequestOutput) -> bytes:
        place = self._place(output)
        text = self._text(output)
        offset = self._offsets.get(place, 0)
        self._offsets[place] = offset + len(text)
        choice = {
            "index": place,
            "text": text,
            "logprobs": self._logprobs(output, offset + len(text) - len(output.text)),
            "finish_reason": finish_of(output),
        }
        if output.finish_reason is not None:
            choice["matched_stop"] = matched_stop(output)
        return self._event(msgspec.json.encode(choice), output)

    def _choice(self, output: RequestOutput) -> dict[str, Any]:
        text = self._text(output)
        return {
            "index": self._place(output),
            "text": text,
            "logprobs": self._logprobs(output, len(text) - len(output.text)),
            "finish_reason": finish_of(output),
            "matched_stop": matched_stop(output),
        }

    def _logprobs(self, output: RequestOutput, offset: int) -> dict[str, Any] | None:
        if output.logprobs is None:
            return None
        tokens = [self._token(i)[0] for i in output.token_ids]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": output.logprobs,
            "top_logprobs": [{t: logprob} for t, logprob in zip(tokens, output.logprobs, strict=True)],
            "text_offset": offsets,
        }


class _Chat(_Answer):
    prefix = "chatcmpl-"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, service: Service, request: ChatRequest) -> None:
        super().__init__(service, request)
        self._begun: set[int] = set()
        self.names = CLIENT_NAMES | {"prompt": "messages"}
        if request.max_completion_tokens is not UNSET:
            self.names |= {"max_new_tokens": "max_completion_tokens"}

    def event(self, output: RequestOutput) -> bytes:
        place = self._place(output)
        opening = b""
        if place not in self._begun:
            self._begun.add(place)
            delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
            opening = self._event(b'{"index":%d,%b' % (place, delta), output)
        # The path of every token: written by hand, a third of the time of encoding a dictionary.
        finish = b"null"
        if output.finish_reason is not None:
            stop = msgspec.json.encode(matched_stop(output))
            finish = b'"%b","matched_stop":%b' % (output.finish_reason.value.encode(), stop)
        logprobs = b"null" if output.logprobs is None else msgspec.json.encode(self._logprobs(output))
        choice = b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":%b}' % (
            place,
            msgspec.json.encode(output.text),
            logprobs,
            finish,
        )
        return opening + self._event(choice, output)

    def _choice(self, output: RequestOutput) -> dict[str, Any]:
        return {
            "index": self._place(output),
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": None if output.logprobs is None else self._logprobs(output),
            "finish_reason": finish_of(output),
            "matched_stop": matched_stop(output),
        }

    def _logprobs(self, output: RequestOutput) -> dict[str, Any]:
        entries = []
        for token_id, logprob in zip(output.token_ids, output.logprobs or (), strict=True):
            text, data = self._token(token_id)
            entries.append({"token": text, "logprob": logprob, "bytes": data, "top_logprobs": []})
        return {"content": entries, "refusal": None}
