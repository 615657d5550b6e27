"""Server-sent events: outputs of the engine, one event a token, written to the client as they come.

Receives an OutputStream of engine/async_engine.py and a function that renders an output from server/openai.py or
server/native.py; writes through server/exchange.py with raw ASGI sends. Answers nothing before the first output is
there, so that a request that is refused late (a long prompt that turns out too long) still gets its own status.

A client that leaves cancels the stream, and so its requests, at once (ClientWatch); one that reads nothing is cut off
after send_timeout_s, and what waits for it meanwhile is bounded by its requests' own length.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Final

from sapwood.engine.async_engine import OutputStream
from sapwood.request import RequestOutput
from sapwood.server.exchange import ClientGone, Exchange
from sapwood.server.problems import internal, problem_of, problem_of_output
from sapwood.server.service import printable

logger = logging.getLogger(__name__)

CONTENT_TYPE: Final = "text/event-stream; charset=utf-8"
HEADERS: Final = (("cache-control", "no-cache"), ("x-accel-buffering", "no"))  # the second is for nginx
DONE: Final = b"data: [DONE]\n\n"


async def stream(
    exchange: Exchange,
    outputs: OutputStream,
    render: Callable[[RequestOutput], bytes],
    close: Callable[[list[RequestOutput]], bytes],
) -> None:
    """Write the whole answer: render's events of each output, close's of the final ones, and [DONE].

    An error before the first event is raised; later it is an event {"error": ...}.
    """
    finals: list[RequestOutput] = []
    gaps = exchange.service.metrics.inter_token_latency
    last: dict[tuple[int, int], float] = {}  # request -> when its last token went out

    def event(output: RequestOutput) -> bytes:
        at, key = time.monotonic(), (output.index, output.choice)
        if key in last:
            gaps.observe(at - last[key])
        last[key] = at
        if output.finish_reason is not None:
            finals.append(output)
            problem = problem_of_output(output)
            if problem is not None:
                return b"data: %b\n\n" % problem.body()
        return render(output)

    try:
        async with exchange.watch(), contextlib.aclosing(outputs):
            try:
                async for output in outputs:
                    if not exchange.started:
                        problem = problem_of_output(output)
                        if problem is not None:
                            finals.append(output)
                            raise problem
                        await exchange.start(200, CONTENT_TYPE, dict(HEADERS), None)
                    data = event(output)
                    for more in outputs.ready():
                        data += event(more)
                    await exchange.send(data, more=True)
                tail = close(finals)
            except ClientGone:
                raise
            except Exception as error:
                if not exchange.started:
                    raise
                problem = problem_of(error)
                if problem is None:
                    logger.error("request %s failed while it streamed", printable(exchange.id), exc_info=error)
                    problem = internal()
                tail = b"data: %b\n\n" % problem.body()
            await exchange.send(tail + DONE, more=False)
    finally:
        exchange.service.note(exchange.id, finals)
