"""`sapwood serve` as a process of its own, for tests of its life: signals, sockets, logs, memory."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

TIMEOUT_S = 60.0


class ServerProcess:
    """model: what is served; options: further flags. Its log is read as it comes: `log`, wait_log()."""

    def __init__(
        self,
        model: Path | str,
        *options: str,
        environment: dict[str, str] | None = None,
        preexec: Callable[[], None] | None = None,
    ) -> None:
        address = () if "--uds" in options or "--port" in options else ("--port", "0")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sapwood", "serve", str(model), *address, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
            preexec_fn=preexec,
        )
        self.log: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_log(self, pattern: str) -> re.Match[str]:
        """The first line from here on that has the pattern; fails where the log ends without one."""
        while (line := self._lines.get(timeout=TIMEOUT_S)) is not None:
            self.log.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no {pattern!r} in the log:\n" + "\n".join(self.log))

    def wait_listening(self) -> Self:
        self.port = int(self.wait_log(r"listens on http://127\.0\.0\.1:(\d+)")[1])
        return self

    def wait_ready(self) -> Self:
        self.wait_listening().wait_log("ready after")
        return self

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_exit(self) -> int:
        """The exit code; the whole log is in `log` then."""
        code = self.process.wait(TIMEOUT_S)
        while (line := self._lines.get(timeout=TIMEOUT_S)) is not None:
            self.log.append(line)
        return code

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self.port)

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Status and body, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", path, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        status, body = self.get("/health")
        assert status == 200, body
        state = json.loads(body)
        assert isinstance(state, dict)
        return state

    def rss_kb(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1])


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert isinstance(port, int)
        return port


def errors_in(log: Sequence[str]) -> list[str]:
    """Lines of a log that are no information."""
    return [line for line in log if not re.match(r"\S+ \S+ INFO ", line)]
