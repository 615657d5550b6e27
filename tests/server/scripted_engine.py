"""Engines whose next token a Python function chooses: to say given bytes, to hold a step, to fail."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from sapwood import _core
from sapwood.config import ServerConfig
from sapwood.engine.async_engine import AsyncEngine
from sapwood.engine.tokenizer import Tokenizer

NextToken = Callable[[Sequence[int]], int]


class ScriptedExecutor:
    """_core.Executor's interface; the token behind a row's tokens is next_token(tokens). Rows, end tokens and results
    are the core's. Needs every prompt token: the engine's prefix cache must be off.
    """

    def __init__(self, groups: Sequence[_core.KvGroup], max_rows: int, vocab_size: int, next_token: NextToken) -> None:
        self._rows = _core.RowTable(groups, max_rows)
        self._vocab_size = vocab_size
        self._next_token = next_token
        self._tokens: dict[int, dict[int, int]] = {}  # row -> position -> token
        self._plans: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._events: list[tuple[str, int, Any]] = []
        self._lock = threading.Condition()
        self.queued = 0
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = threading.Thread(target=self._loop, name="scripted", daemon=True)
        self._thread.start()

    def submit(self, plan: Any) -> None:
        with self._lock:
            self.queued += 1
        self._plans.put(plan)

    def drain(self) -> list[tuple[str, int, Any]]:
        with self._lock:
            events, self._events = self._events, []
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._fd)
        return events

    def fileno(self) -> int:
        return self._fd

    def wait_idle(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self.queued == 0)

    def shutdown(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._plans.put(None)
            thread.join()
            os.close(self._fd)

    def take_trace(self) -> list[Any]:
        return []

    def _loop(self) -> None:
        while (plan := self._plans.get()) is not None:
            self._report(("head", plan.step_id, None))
            try:
                prepared = self._rows.prepare(plan)
                result = self._rows.sample(plan, prepared, self._logits(prepared))
            except Exception as error:
                result = self._rows.fail(plan, f"{type(error).__name__}: {error}")
            self._report(("result", plan.step_id, result), done=True)

    def _logits(self, prepared: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        """f32 [L, vocab]: all the probability on the scripted token."""
        segments = prepared["segments"]
        for row, _, begin, length, _, _ in segments:
            places = self._tokens.setdefault(row, {})
            for i in range(begin, begin + length):
                places[int(prepared["positions"][i])] = int(prepared["tokens"][i])
        logits = np.zeros((len(prepared["logit_src"]), self._vocab_size), np.float32)
        for k, segment in enumerate(prepared["logit_segment"]):
            row, _, _, _, kv_len, _ = segments[segment]
            logits[k, self._next_token([self._tokens[row][i] for i in range(kv_len)])] = 1e4
        return logits

    def _report(self, event: tuple[str, int, Any], *, done: bool = False) -> None:
        with self._lock:
            self._events.append(event)
            os.eventfd_write(self._fd, 1)
            if done:
                self.queued -= 1
                self._lock.notify_all()


def scripted_engine(
    next_token: NextToken,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    eos: int,
    num_pages: int = 512,
    **settings: Any,
) -> tuple[AsyncEngine, ServerConfig]:
    """An engine that says what next_token says, and the settings of a server for it. eos ends a request."""
    settings = {"served_model_name": "scripted", "disable_radix_cache": True, "max_running_requests": 16} | settings
    config = ServerConfig.from_kwargs("scripted", skip_tokenizer_init=tokenizer is None, **settings)
    groups = [_core.KvGroup("full", page_size=config.page_size)]
    loaded = SimpleNamespace(
        executor=ScriptedExecutor(groups, config.max_running_requests, vocab_size, next_token),
        groups=groups,
        num_pages=[num_pages],
        vocab_size=vocab_size,
        eos_token_ids=[eos],
        context_len=4096,
        max_step_tokens=config.chunked_prefill_size + config.max_running_requests,
        cache_salt=7,
        name="scripted",
        dtype="float32",
        runner=None,
        model_dir=None,
        generation_defaults={},
        rope_mode=lambda total_len: 0,
    )
    return AsyncEngine.from_loaded(loaded, config, tokenizer), config  # type: ignore[arg-type]


def say(answers: Mapping[tuple[int, ...], Sequence[int]], eos: int) -> NextToken:
    """next_token that continues each of the given prompts with its answer, then ends."""

    def next_token(tokens: Sequence[int]) -> int:
        for prompt, answer in answers.items():
            if tuple(tokens[: len(prompt)]) == prompt:
                said = len(tokens) - len(prompt)
                return answer[said] if said < len(answer) else eos
        raise AssertionError(f"no answer for {tokens}")

    return next_token


class Gate:
    """next_token of an engine whose steps wait until they are let through; every token is 5."""

    def __init__(self) -> None:
        self._held = threading.Semaphore(0)
        self._passes = threading.Semaphore(0)
        self._is_open = False

    def __call__(self, tokens: Sequence[int]) -> int:
        self._held.release()
        if not self._is_open:
            self._passes.acquire()
        return 5

    def wait_held(self) -> None:
        """Return when one more step has come to the gate."""
        assert self._held.acquire(timeout=60)

    def pass_one(self) -> None:
        self._passes.release()

    def open(self) -> None:
        """From now on nothing waits."""
        self._is_open = True
        self._passes.release(1000)
