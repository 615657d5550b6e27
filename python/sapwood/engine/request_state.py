"""What the engine keeps of one request, from its arrival to its final output.

Made by engine/async_engine.py, carried through engine/scheduler.py (waiting), engine/plan.py (rows) and
engine/engine.py (results), which alone changes `phase`:

    NEW -> WAITING -> EXTEND -> DECODE -> DONE
              ^---- DRAINING <----'          (from every phase straight to DONE: abort, deadline, error)

NEW: its text is still being tokenised. EXTEND: prompt chunks are being planned. DECODE: every prompt token has been
planned. DRAINING: chosen to give its memory back; waits until no launched step names its row, then waits for admission
again.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sapwood.request import RequestOutput, SamplingParams, Timing

if TYPE_CHECKING:
    from sapwood.engine.output import OutputProcessor

Ints = np.ndarray[Any, np.dtype[np.int32]]


class Phase(enum.IntEnum):
    NEW = 0
    WAITING = 1
    EXTEND = 2
    DECODE = 3
    DRAINING = 4
    DONE = 5


class Sink(Protocol):
    """Where a request's outputs go. Called on the loop's thread; must neither block nor raise."""

    def put(self, output: RequestOutput) -> None:
        """The next output; the one with finish_reason set is the last call for its request."""

    def fail(self, error: Exception) -> None:
        """There will be no final output: the request was refused, or the engine died."""


class RequestState:
    """One request. Lengths in tokens, times in seconds of the loop's clock.

    group       the id that the caller gave to all requests of one call
    prompt      int32 [num_prompt], the caller's tokens
    known       int32, tokens known at the last admission: the prompt, after a retraction with the outputs so far
    planned_len KV length once every launched step has run (kept for rows in EXTEND)
    order       place in the queue and among prefills, smaller first; set by Scheduler.push
    seq         arrival number: ties, and the age that decides about retraction
    """

    __slots__ = (
        "admitted_s",
        "cached_len",
        "choice",
        "deadline",
        "first_token_s",
        "group",
        "id",
        "index",
        "known",
        "max_len",
        "min_len",
        "ns",
        "num_prompt",
        "num_retractions",
        "order",
        "output",
        "params",
        "phase",
        "planned_len",
        "priority",
        "prompt",
        "rope_mode",
        "row",
        "salt",
        "seed",
        "seq",
        "sink",
        "stop_ids",
        "stream",
        "submitted_s",
    )

    def __init__(
        self,
        request_id: str,
        params: SamplingParams,
        sink: Sink,
        *,
        stream: bool,
        seed: int,
        group: str = "",
        index: int = 0,
        choice: int = 0,
        priority: int = 0,
        salt: str | None = None,
        submitted_s: float = 0.0,
        deadline: float | None = None,
    ) -> None:
        self.id = request_id
        self.group = group or request_id
        self.index = index
        self.choice = choice
        self.params = params
        self.sink = sink
        self.stream = stream
        self.seed = seed
        self.priority = priority
        self.salt = salt
        self.submitted_s = submitted_s
        self.admitted_s = self.first_token_s = 0.0  # 0: not yet
        self.deadline = deadline
        self.phase = Phase.NEW
        self.row = -1
        self.seq = -1
        self.order: tuple[float, int] = (0.0, -1)
        self.num_retractions = 0
        self.planned_len = 0
        self.cached_len = -1
        self.output: OutputProcessor | None = None
        self.prompt: Ints = np.empty(0, np.int32)
        self.known: Ints = self.prompt
        self.num_prompt = 0
        self.max_len = 0
        self.min_len = 0
        self.ns = 0
        self.rope_mode = 0
        self.stop_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens known now: prompt and outputs."""
        return self.num_prompt + (len(self.output.token_ids) if self.output is not None else 0)

    def timing(self, now: float) -> Timing:
        """Its times, where it ends now."""
        begin = self.submitted_s
        return Timing(
            self.admitted_s - begin if self.admitted_s else None,
            self.first_token_s - begin if self.first_token_s else None,
            now - begin,
        )

    def all_tokens(self) -> Ints:
        """Prompt and outputs so far, int32."""
        if self.output is None or not self.output.token_ids:
            return self.prompt
        return np.concatenate([self.prompt, np.array(self.output.token_ids, np.int32)])
