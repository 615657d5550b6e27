"""A fake server in a process of its own, which may misbehave: what fake_peer.py's peers start.

    python fake_peer_process.py MODE PORT

Each start adds a line with MODE and its process to the file $FAKE_PEER_STARTS. Modes: good; dies (at once, with a log);
deaf (never listens); short (its usage says one token less); stubborn (ends at SIGKILL only, and has a child that does
too); mute (takes requests and answers none); hangs (does not answer the requests of two at once); fails (503).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from fake_server import FakeServer


class ShortServer(FakeServer):
    """Its usage says one token less than it was asked for."""

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for event in super()._events(path, body):
            if event["usage"]:
                event["usage"]["completion_tokens"] -= 1
            yield event


class HangingServer(FakeServer):
    """Does not answer while it has two requests."""

    async def _answer(self, i: int, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        while self.num_running > 1:
            await asyncio.Event().wait()
        return await super()._answer(i, path, body, writer)


class MuteServer(FakeServer):
    """Takes requests and answers none."""

    async def _answer(self, i: int, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        await asyncio.Event().wait()
        raise AssertionError


async def serve(mode: str, port: int) -> None:
    kinds = {"short": ShortServer, "mute": MuteServer, "hangs": HangingServer}
    fault = (lambda i: "http") if mode == "fails" else (lambda i: None)
    server = await asyncio.start_server(kinds.get(mode, FakeServer)(fault).serve, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


def main() -> int:
    mode, port = sys.argv[1:]
    if starts := os.environ.get("FAKE_PEER_STARTS"):
        with open(starts, "a") as file:
            file.write(f"{mode} {os.getpid()}\n")
    if mode == "dies":
        print("loading\nno such file: weights")
        return 3
    if mode == "deaf":
        signal.pause()
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # The signal's disposition is handed on: `sleep` ignores it as well.
        subprocess.Popen(["sleep", "3600"])
    asyncio.run(serve(mode, int(port)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
