"""What the routes share: the engine, the settings, the metrics, and the calls that are running.

Made by server/app.py, one per application; server/run.py drives its life (loading, ready, draining).
"""

from __future__ import annotations

import contextlib
import enum
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sapwood.chat.template import compile_template
from sapwood.config import ServerConfig
from sapwood.engine.async_engine import AsyncEngine
from sapwood.engine.engine import LoadedModel
from sapwood.engine.tokenizer import Tokenizer
from sapwood.errors import InvalidRequest
from sapwood.request import RequestOutput
from sapwood.server.metrics import Metrics
from sapwood.server.problems import RETRY_AFTER, Problem

logger = logging.getLogger(__name__)


class Phase(enum.StrEnum):
    """LOADING -> READY -> DRAINING; FAILED where loading did."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Service:
    """One server's state. Belongs to the event loop, as the engine does."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        self.engine = engine
        self.config = config
        self.model_name = config.model_name()
        self._phase = Phase.LOADING
        self.created = int(time.time())
        self._started_s = time.monotonic()
        self._calls: set[str] = set()
        self._chat_template = None if config.chat_template is None else _read_template(config.chat_template)
        self.metrics = Metrics(self)

    # --- life

    async def load(self, progress: Any = None) -> None:
        """Start the engine; READY, or FAILED. Raises what loading raises."""
        try:
            await self.engine.start(progress)
        except Exception:
            self._phase = Phase.FAILED
            raise
        self._note_start()

    @property
    def phase(self) -> Phase:
        """Where the server is in its life. In an application of somebody else's it is they who start the engine."""
        self._note_start()
        return self._phase

    def _note_start(self) -> None:
        if self._phase is Phase.LOADING and self.engine.is_alive:
            self._phase = Phase.READY
            if self._chat_template is not None and self.engine.tokenizer is not None:
                self.engine.tokenizer.set_chat_template(self._chat_template)

    def drain(self) -> None:
        """Take no new requests; those that run go on."""
        self._phase = Phase.DRAINING

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._started_s

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the engine is alive, and what it does: the step counter advances, or there is nothing to compute."""
        state: dict[str, Any] = {"status": self.phase.value, "uptime_s": round(self.uptime_s, 3)}
        try:
            stats = self.engine.stats()
        except Exception:  # not started yet, or dead
            if self.phase is Phase.READY:
                state["status"] = "dead"
            return self.phase in (Phase.LOADING, Phase.DRAINING), state
        stalled = stats.step_age_s > self.config.watchdog_timeout
        if stalled:
            state["status"] = "stalled"
        elif not self.engine.is_alive:
            state["status"] = "dead"
        state |= {
            "num_steps": stats.num_steps,
            "step_age_s": round(stats.step_age_s, 3),
            "num_running_reqs": stats.num_running,
            "num_queue_reqs": stats.num_waiting,
        }
        return not stalled and self.engine.is_alive, state

    # --- what routes ask for

    def ready_engine(self) -> AsyncEngine:
        """The engine, where it takes requests now. Raises Problem 503."""
        if self.phase is Phase.READY:
            if not self.engine.is_alive:
                raise Problem(503, "the engine has stopped; the server's log has the reason", code="engine_dead")
            return self.engine
        what = {
            Phase.LOADING: "the model is still being loaded; /ready tells when it serves",
            Phase.DRAINING: "the server is shutting down",
            Phase.FAILED: "the model could not be loaded; the server's log has the reason",
        }
        raise Problem(503, what[self.phase], code=self.phase.value, headers=RETRY_AFTER)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises Problem where the server works on token ids alone."""
        tokenizer = self.ready_engine().tokenizer
        if tokenizer is None:
            raise Problem(400, "this server has no tokenizer (skip_tokenizer_init): work on token ids")
        return tokenizer

    @property
    def model(self) -> LoadedModel:
        """The model of an engine that has been started."""
        assert self.engine.model is not None
        return self.engine.model

    def context_len(self) -> int:
        """Tokens a request may have in all."""
        own = self.model.context_len
        return min(self.config.context_length or own, own)

    def check_model(self, name: object) -> None:
        """Raise Problem 404 where a request names another model than the one that is served."""
        if isinstance(name, str) and name != self.model_name:
            raise Problem(
                404,
                f"the model {name!r:.200} does not exist; this server has {self.model_name!r} (it may be left out)",
                param="model",
                code="model_not_found",
            )

    # --- calls that are running

    @contextlib.contextmanager
    def call(self, request_id: str) -> Iterator[None]:
        """A call of that id runs in this block: abort() finds it."""
        if request_id in self._calls:
            raise Problem(400, f"the request id {request_id!r:.200} is in use by a running request", param="rid")
        self._calls.add(request_id)
        try:
            yield
        finally:
            self._calls.discard(request_id)

    @property
    def num_calls(self) -> int:
        """Calls that are running."""
        return len(self._calls)

    def abort(self, request_id: str | None) -> int:
        """End a call's requests, every call's for None; returns how many calls there were."""
        calls = [c for c in self._calls if request_id in (None, c)]
        for call in calls:
            self.engine.abort(call)
        return len(calls)

    def note(self, call: str, outputs: list[RequestOutput]) -> None:
        """The final outputs of a call: for the metrics and, where it is asked for, the log."""
        for output in outputs:
            self.metrics.observe(output)
        if self.config.log_requests and outputs:
            usage, timing = outputs[0].usage, outputs[0].timing
            completion_tokens = sum(output.usage.completion_tokens for output in outputs)
            logger.info(
                "request %s: %d prompt tokens (%d cached), %d generated, %s, %.3f s",
                printable(call),
                usage.prompt_tokens,
                usage.cached_tokens,
                completion_tokens,
                outputs[0].finish_reason,
                timing.total_s if timing is not None else 0.0,
            )

    def info(self) -> Mapping[str, Any]:
        """Settings (secrets left out), model and machine facts, counters."""
        from sapwood import __version__

        info: dict[str, Any] = {
            "version": __version__,
            "status": self.phase.value,
            "uptime_s": round(self.uptime_s, 3),
            "served_model_name": self.model_name,
            "settings": self.config.public_settings(),
        }
        if self.phase in (Phase.READY, Phase.DRAINING) and self.engine.model is not None:
            info |= {"model": self.model_facts(), "stats": self.engine.stats()}
        return info

    def model_facts(self) -> dict[str, Any]:
        """What a started engine serves, and on what."""
        model = self.model
        tokenizer, runner = self.engine.tokenizer, getattr(model, "runner", None)
        return {
            "name": model.name,
            "dtype": getattr(model, "dtype", None),
            "vocab_size": model.vocab_size,
            "context_len": self.context_len(),
            "kv_pool_tokens": min(pages * g.page_size for g, pages in zip(model.groups, model.num_pages, strict=True)),
            "has_chat_template": tokenizer is not None and tokenizer.has_chat_template,
            "cpu_isa": getattr(runner, "isa", None),
            "num_threads": getattr(runner, "num_threads", None),
        }


def _read_template(file: str) -> str:
    """A chat template's source, known to be well-formed: a mistake in it shall not wait for the first request."""
    try:
        source = Path(file).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"chat_template: cannot read {file!r}: {error}", "chat_template") from None
    try:
        compile_template(source)
    except InvalidRequest as error:
        raise InvalidRequest(f"chat_template {file!r}: {error}", "chat_template") from None
    return source


def printable(text: str) -> str:
    """text for a line of the log: no line breaks, no control sequences, no more than 200 characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])
