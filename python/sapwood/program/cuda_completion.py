"""How the loop hears that a step is done on the device: an eventfd becomes readable, and nobody polls. So does the
thread that launches, of a step's logits, where it waits for grammar masks.

Usually a host function queued behind the step writes to it (cuda/completion), which costs the CPU nothing until then. A
driver may run those late, or, once the device has failed, never; so a thread looks after a step whose host function has
not come for `grace_s`. Where that happens often, and where host functions cannot be queued at all, the thread takes
over: it waits for each step's CUDA event, asleep.

    with a step in flight    the thread wakes up once in grace_s         without    it sleeps
"""

from __future__ import annotations

import collections
import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final, Literal, Protocol

import numpy as np

from sapwood.errors import SapwoodError
from sapwood.program.cuda_library import CudaLibrary, NotifyParams

log = logging.getLogger(__name__)

# Host functions that came late before events are waited for instead.
MAX_LATE: Final = 3


class Event(Protocol):
    """torch.cuda.Event's part that is needed; both raise once the device has failed."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Ticket:
    """One step in flight, or a step's launches up to somewhere.

    done_ns   when it was done (CLOCK_MONOTONIC); 0 until then
    error     why it never will be: the device has failed
    """

    def __init__(self, event_fd: int) -> None:
        self._done = np.zeros(1, np.int64)
        # The host function reads this: it lives as long as the ticket.
        self.params = NotifyParams(event_fd=event_fd, done_ns=self._done.ctypes.data_as(ctypes.c_void_p).value)
        self.error = ""
        self.queued_s = 0.0
        self.has_host_function = False
        self.event: Event | None = None

    @property
    def done_ns(self) -> int:
        return int(self._done[0])

    def finish(self, error: str = "") -> None:
        self.error = error
        self._done[0] = time.monotonic_ns()


class Completion:
    """Watches steps. `watch` is called by the thread that launches, after the last launch that it is about."""

    def __init__(
        self,
        library: CudaLibrary,
        stream: int | None,
        event_fd: int,
        record_event: Callable[[], Event],
        *,
        grace_s: float = 1.0,
        mode: Literal["host_function", "event"] = "host_function",
    ) -> None:
        """record_event: a new event at the stream's end. event_fd: of tickets without one of their own. All are the
        caller's, open until `close` has returned.
        """
        self.mode: Literal["host_function", "event"] = mode
        self._library = library
        self._stream = stream
        self._event_fd = event_fd
        self._record_event = record_event
        self._grace_s = grace_s
        self._tickets: collections.deque[Ticket] = collections.deque()
        self._late: list[Ticket] = []  # their host functions may still come, and read them
        lock = threading.Lock()
        self._arrived, self._mode_changed = threading.Condition(lock), threading.Condition(lock)
        self._closed = False
        self._thread = threading.Thread(target=self._look_after, name="sapwood-completion", daemon=True)
        self._thread.start()

    def ticket(self, event_fd: int | None = None) -> Ticket:
        """event_fd: another than that of this Completion."""
        return Ticket(self._event_fd if event_fd is None else event_fd)

    def watch(self, ticket: Ticket) -> None:
        """From now on the ticket's done_ns and its eventfd will tell."""
        ticket.event = self._record_event()
        ticket.queued_s = time.monotonic()
        with self._arrived:
            while self._tickets and self._tickets[0].done_ns:
                self._tickets.popleft()
            self._tickets.append(ticket)
            if len(self._tickets) == 1:
                self._arrived.notify()
        if self.mode == "host_function":
            ticket.has_host_function = True  # before it is queued: the thread may see the event at once
            try:
                self._library.call("notify", ticket.params, self._stream)
            except SapwoodError as error:
                log.warning("host functions cannot be queued (%s): waiting for events instead", error)
                self._use_events()

    def close(self) -> None:
        """Stop watching; the caller has waited for all steps."""
        with self._arrived:
            self._closed = True
            self._tickets.clear()
            self._arrived.notify()
            self._mode_changed.notify()
        self._thread.join()

    def _use_events(self) -> None:
        with self._mode_changed:
            self.mode = "event"
            self._mode_changed.notify()

    def _look_after(self) -> None:
        while (ticket := self._oldest()) is not None:
            if self.mode == "event":
                self._wait_for_event(ticket)
                continue
            left = ticket.queued_s + self._grace_s - time.monotonic()
            if left <= 0:
                self._see_whether_done(ticket)
                continue
            with self._mode_changed:
                if self.mode == "host_function" and not self._closed:
                    self._mode_changed.wait(left)

    def _oldest(self) -> Ticket | None:
        """The oldest step not done, waiting for one; None once closed and all are."""
        with self._arrived:
            while True:
                while self._tickets and self._tickets[0].done_ns:
                    self._tickets.popleft()
                if self._tickets:
                    return self._tickets[0]
                if self._closed:
                    return None
                self._arrived.wait()

    def _see_whether_done(self, ticket: Ticket) -> None:
        assert ticket.event is not None
        try:
            done = ticket.event.query()
        except Exception as error:  # whatever torch makes of a failed device
            self._tell(ticket, str(error))
            return
        if ticket.done_ns:
            return
        if not done:  # a long step
            ticket.queued_s = time.monotonic()
            return
        self._late.append(ticket)
        log.warning("a step was done, but its host function has not come for %.3g s", self._grace_s)
        self._tell(ticket)
        if len(self._late) >= MAX_LATE:
            log.warning("host functions come late: waiting for events instead")
            self._use_events()

    def _wait_for_event(self, ticket: Ticket) -> None:
        assert ticket.event is not None
        try:
            ticket.event.synchronize()
        except Exception as error:  # as above
            self._tell(ticket, str(error))
            return
        if not ticket.done_ns:
            if ticket.has_host_function:  # from before the mode changed: it comes behind the event
                self._late.append(ticket)
            self._tell(ticket)

    def _tell(self, ticket: Ticket, error: str = "") -> None:
        ticket.finish(error)
        os.eventfd_write(ticket.params.event_fd, 1)
