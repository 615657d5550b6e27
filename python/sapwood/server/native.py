"""SGLang's own API: /generate; and /tokenize, /detokenize as vLLM and SGLang have them.

Receives exchanges from server/app.py; parses bodies with server/fields.py, asks and answers through
server/generation.py. A stream's events hold the whole text so far, as SGLang's do, or what is new with the
setting incremental_streaming_output.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from sapwood.errors import InvalidRequest
from sapwood.request import FinishReason, RequestOutput
from sapwood.server.exchange import Exchange
from sapwood.server.fields import Sampling, build, holds_prompts, parse
from sapwood.server.generation import run
from sapwood.server.openai import RequestId, chat_prompt, token_text
from sapwood.server.problems import Problem
from sapwood.server.service import Service

GENERATE_ALIASES: Final = MappingProxyType({"extra_key": "cache_salt"})
SAMPLING_ALIASES: Final = MappingProxyType({"sampling_seed": "seed", "max_tokens": "max_new_tokens"})


class GenerateSampling(Sampling, kw_only=True):
    """sampling_params of /generate."""

    max_new_tokens: int | UnsetType = UNSET
    min_new_tokens: int | UnsetType = UNSET

    def params(self) -> dict[str, Any]:
        params = super().params()
        for name in ("max_new_tokens", "min_new_tokens"):
            value = getattr(self, name)
            if value is not UNSET:
                params[name] = value
        return params


class GenerateRequest(msgspec.Struct, kw_only=True):
    """POST /generate. text or input_ids, one or a list; sampling_params one, or a list with one each."""

    text: str | list[str] | UnsetType = UNSET
    input_ids: list[Any] | UnsetType = UNSET
    sampling_params: dict[str, Any] | list[dict[str, Any]] = {}
    stream: bool = False
    rid: RequestId | None = None
    return_logprob: bool = False
    return_text_in_logprobs: bool = False
    priority: int = 0
    cache_salt: str | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt (text, or a list of texts), or chat messages."""

    model: str | UnsetType = UNSET
    prompt: str | list[str] | UnsetType = UNSET
    messages: list[dict[str, Any]] | UnsetType = UNSET
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize: token ids, one list or several."""

    model: str | UnsetType = UNSET
    tokens: list[Any]
    skip_special_tokens: bool = False


async def generate(exchange: Exchange) -> None:
    """POST /generate"""
    service = exchange.service
    request = parse(await exchange.body(), GenerateRequest, aliases=GENERATE_ALIASES)
    service.ready_engine()
    if (request.text is UNSET) == (request.input_ids is UNSET):
        raise Problem(400, "give either text or input_ids", param="text")
    name = "text" if request.text is not UNSET else "input_ids"
    prompt: Any = getattr(request, name)
    is_list = isinstance(prompt, list) and holds_prompts(prompt, name, texts=name == "text")
    given = request.sampling_params
    if isinstance(given, list):
        params: Any = [_params(p, request, f"sampling_params[{i}].") for i, p in enumerate(given)]
    else:
        params = _params(given, request, "sampling_params.")
    exchange.id = request.rid or exchange.id
    answer = _Answer(service, request, params if isinstance(params, list) else [params], is_list)
    try:
        await run(exchange, request, prompt, params, answer)
    except InvalidRequest as error:
        raise type(error)(str(error), name if error.param == "prompt" else error.param) from None


def _params(given: dict[str, Any], request: GenerateRequest, where: str) -> dict[str, Any]:
    params = build(given, GenerateSampling, aliases=SAMPLING_ALIASES, where=where).params()
    if request.return_logprob:
        params["return_logprob"] = True
    return params


class _Answer:
    """One call's answer, and of its streams what went out so far."""

    def __init__(
        self, service: Service, request: GenerateRequest, params: Sequence[dict[str, Any]], is_list: bool
    ) -> None:
        self._tokenizer = service.engine.tokenizer
        self._with_text = request.return_text_in_logprobs
        self._counts = [p.get("n", 1) for p in params]  # of choices, for each prompt or for all
        self._is_list = is_list or self._counts[0] > 1
        self._is_incremental = service.config.incremental_streaming_output
        self._sent: dict[tuple[int, int], tuple[list[str], list[int], list[float]]] = {}

    def event(self, output: RequestOutput) -> bytes:
        text, ids, logprobs = output.text, output.token_ids, output.logprobs
        if not self._is_incremental:
            texts, all_ids, all_logprobs = self._sent.setdefault((output.index, output.choice), ([], [], []))
            texts.append(text)
            all_ids += ids
            all_logprobs += logprobs or ()
            text, ids, logprobs = "".join(texts), all_ids, all_logprobs if logprobs is not None else None
            texts[:] = [text]
        body = self.body(output, text, ids, logprobs)
        if self._is_list:
            body["index"] = self._place(output)
        return b"data: %b\n\n" % msgspec.json.encode(body)

    def _place(self, output: RequestOutput) -> int:
        """An output's place in the whole answer's list: all choices of the first prompt, then of the second, ..."""
        counts, index = self._counts, output.index
        before = sum(counts[:index]) if len(counts) > 1 else counts[0] * index
        return before + output.choice

    def close(self, finals: list[RequestOutput]) -> bytes:
        return b""

    def whole(self, finals: list[RequestOutput]) -> bytes:
        bodies = [self.body(output, output.text, output.token_ids, output.logprobs) for output in finals]
        return msgspec.json.encode(bodies if self._is_list else bodies[0])

    def body(self, output: RequestOutput, text: str, ids: list[int], logprobs: list[float] | None) -> dict[str, Any]:
        usage, timing = output.usage, output.timing
        meta: dict[str, Any] = {
            "id": output.request_id,
            "finish_reason": _finish(output),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "seed": output.seed,
        }
        if timing is not None:
            meta["e2e_latency"] = round(timing.total_s, 6)
        if logprobs is not None:
            meta["output_token_logprobs"] = [
                (logprob, i, token_text(self._tokenizer, i)[0] if self._with_text else None)
                for logprob, i in zip(logprobs, ids, strict=True)
            ]
        body: dict[str, Any] = {"output_ids": ids, "meta_info": meta}
        return body if self._tokenizer is None else {"text": text} | body


def _finish(output: RequestOutput) -> dict[str, Any] | None:
    match output.finish_reason:
        case None:
            return None
        case FinishReason.STOP:
            return {"type": "stop", "matched": output.matched_stop}
        case FinishReason.LENGTH:
            return {"type": "length", "length": output.usage.completion_tokens}
        case _:
            return {"type": "abort", "message": output.error or "aborted by the caller"}


async def tokenize(exchange: Exchange) -> None:
    """POST /tokenize"""
    request = parse(await exchange.body(), TokenizeRequest)
    service = exchange.service
    tokenizer = service.tokenizer()
    service.check_model(request.model)
    if (request.prompt is UNSET) == (request.messages is UNSET):
        raise Problem(400, "give either prompt or messages", param="prompt")
    is_nested = isinstance(request.prompt, list)
    if request.messages is not UNSET:
        chat = chat_prompt(
            request.messages,
            request.add_generation_prompt,
            request.continue_final_message,
            request.chat_template_kwargs,
        )
        # Off the loop, as every text that may be long: the other streams go on meanwhile.
        ids: Any = await asyncio.to_thread(tokenizer.encode_chat, chat)
    else:
        given: Any = request.prompt
        prompts = given if is_nested else [given]
        ids = await asyncio.to_thread(lambda: [tokenizer.encode(p, request.add_special_tokens) for p in prompts])
        ids = ids if is_nested else ids[0]
    answer = {
        "tokens": ids,
        "count": [len(one) for one in ids] if is_nested else len(ids),
        "max_model_len": service.context_len(),
    }
    if request.return_token_strs:
        texts = [[token_text(tokenizer, i)[0] for i in one] for one in (ids if is_nested else [ids])]
        answer["token_strs"] = texts if is_nested else texts[0]
    await exchange.answer(answer)


async def detokenize(exchange: Exchange) -> None:
    """POST /detokenize"""
    request = parse(await exchange.body(), DetokenizeRequest)
    service = exchange.service
    tokenizer = service.tokenizer()
    service.check_model(request.model)
    is_nested = holds_prompts(request.tokens, "tokens", texts=False)
    lists = request.tokens if is_nested else [request.tokens]
    try:
        texts = await asyncio.to_thread(
            lambda: [tokenizer.decode(ids, skip_special_tokens=request.skip_special_tokens) for ids in lists]
        )
    except InvalidRequest as error:
        raise Problem(400, str(error), param="tokens") from None
    text = texts if is_nested else texts[0]
    await exchange.answer({"text": text, "prompt": text})  # SGLang's name, and vLLM's
