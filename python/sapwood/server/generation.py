"""One call of the engine, answered whole or as a stream: what the routes of openai.py and native.py share.

Receives the parsed request and an Answer that knows its API's JSON; hands streams to server/streaming.py.
"""

from __future__ import annotations

from typing import Any, Protocol

from sapwood.request import RequestOutput
from sapwood.server.exchange import Exchange
from sapwood.server.problems import problem_of_output
from sapwood.server.streaming import stream


class Call(Protocol):
    """What of a request's body is about the call and not about its tokens."""

    stream: bool
    priority: int
    cache_salt: str | None


class Answer(Protocol):
    """The JSON of one API: an output's events, a stream's last event, and the whole of a call that does not stream."""

    def event(self, output: RequestOutput) -> bytes: ...
    def close(self, finals: list[RequestOutput]) -> bytes: ...
    def whole(self, finals: list[RequestOutput]) -> bytes: ...


async def run(exchange: Exchange, call: Call, prompt: Any, params: Any, answer: Answer) -> None:
    """Generate and answer. exchange.id is the call's, for /abort_request.

    Raises what the engine's generate() raises, Problem for a request that ended with an error, ClientGone.
    """
    service = exchange.service
    with service.call(exchange.id):
        outputs = service.engine.generate(
            prompt,
            params,
            stream=call.stream,
            request_id=exchange.id,
            priority=call.priority,
            cache_salt=call.cache_salt,
        )
        if call.stream:
            await stream(exchange, outputs, answer.event, answer.close)
            return
        async with exchange.watch():
            result = await outputs
        finals = result if isinstance(result, list) else [result]
        service.note(exchange.id, finals)
        for output in finals:
            problem = problem_of_output(output)
            if problem is not None:
                raise problem
        await exchange.answer(answer.whole(finals))
