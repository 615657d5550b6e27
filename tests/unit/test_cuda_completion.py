"""How a step on a GPU is known to be done: by a host function, and by the thread that looks after those that do not
come. The device is played by the test."""

from __future__ import annotations

import gc
import os
import select
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from sapwood.errors import SapwoodError
from sapwood.program.cuda_completion import MAX_LATE, Completion, Ticket

PATIENCE_S = 20  # of a test that fails


class Device:
    """Steps end when the test says so. Host functions are run by `end`, or swallowed."""

    def __init__(self) -> None:
        self.host_functions: list[Any] = []
        self.events: list[DeviceEvent] = []
        self.refuses_host_functions = False

    def call(self, op: str, params: Any, stream: int | None) -> None:
        assert op == "notify" and stream == 7
        if self.refuses_host_functions:
            raise SapwoodError("notify: operation not supported")
        self.host_functions.append(params)

    def record(self) -> DeviceEvent:
        self.events.append(DeviceEvent())
        return self.events[-1]


class DeviceEvent:
    def __init__(self) -> None:
        self.reached = threading.Event()
        self.error: str | None = None

    def query(self) -> bool:
        if self.error is not None:
            raise RuntimeError(self.error)
        return self.reached.is_set()

    def synchronize(self) -> None:
        assert self.reached.wait(PATIENCE_S)
        if self.error is not None:
            raise RuntimeError(self.error)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def event_fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def watching(device: Device, event_fd: int, **settings: Any) -> Completion:
    return Completion(device, 7, event_fd, lambda: device.record(), **settings)  # type: ignore[arg-type]


def wait(event_fd: int) -> int:
    """The eventfd's count, once it is readable."""
    poll = select.poll()
    poll.register(event_fd, select.POLLIN)
    assert poll.poll(PATIENCE_S * 1000), "nobody was told"
    return os.eventfd_read(event_fd)


def test_a_host_function_reports_a_step(device: Device, event_fd: int) -> None:
    completion = watching(device, event_fd, grace_s=PATIENCE_S)
    ticket = completion.ticket()
    completion.watch(ticket)
    assert ticket.done_ns == 0 and device.host_functions[0].event_fd == event_fd
    ticket.finish()  # what the host function does
    assert ticket.done_ns > 0 and ticket.error == ""
    completion.close()


@pytest.mark.parametrize("mode", ["host_function", "event"])
def test_a_ticket_may_have_an_eventfd_of_its_own(device: Device, event_fd: int, mode: Any) -> None:
    own = os.eventfd(0, os.EFD_NONBLOCK)
    completion = watching(device, event_fd, grace_s=0.01, mode=mode)  # told by the thread, in both modes
    ticket, of_step = completion.ticket(own), completion.ticket()
    for each in (ticket, of_step):
        completion.watch(each)
    device.events[0].reached.set()
    assert wait(own) == 1 and ticket.done_ns > 0 and of_step.done_ns == 0
    if mode == "host_function":
        assert [params.event_fd for params in device.host_functions] == [own, event_fd]
    device.events[1].reached.set()
    assert wait(event_fd) == 1 and of_step.done_ns > 0
    completion.close()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(own)
    os.close(own)


def test_a_step_whose_host_function_never_comes_is_found(device: Device, event_fd: int) -> None:
    completion = watching(device, event_fd, grace_s=0.01)
    tickets = [completion.ticket() for _ in range(MAX_LATE + 1)]
    for i, ticket in enumerate(tickets):
        assert completion.mode == ("event" if i == MAX_LATE else "host_function")
        completion.watch(ticket)
        device.events[-1].reached.set()
        assert wait(event_fd) == 1 and ticket.done_ns > 0 and ticket.error == ""
        if i == MAX_LATE - 1:
            while completion.mode != "event":  # set by the thread, just after it has told
                pass
    # Given up on: the last step queued none.
    assert len(device.host_functions) == MAX_LATE
    completion.close()


def test_what_a_host_function_writes_to_is_kept_until_it_has_come(device: Device, event_fd: int) -> None:
    """However late: the driver holds its address."""
    completion = watching(device, event_fd, grace_s=0.01)
    written = []
    for _ in range(MAX_LATE + 2):  # the last of them queued before the events are waited for
        ticket = completion.ticket()
        written.append(weakref.ref(ticket))
        completion.watch(ticket)
    for event in device.events:
        event.reached.set()
    while not ticket.done_ns:
        wait(event_fd)
    assert len(device.host_functions) == MAX_LATE + 2
    device.host_functions.clear()
    del ticket
    completion.watch(completion.ticket())  # nothing holds those before by chance
    device.events[-1].reached.set()
    gc.collect()
    assert all(reference() is not None for reference in written)
    completion.close()


def test_a_long_step_is_not_taken_for_done(device: Device, event_fd: int) -> None:
    completion = watching(device, event_fd, grace_s=0.001)
    asked = threading.Event()

    class Long(DeviceEvent):
        num_asked = 0

        def query(self) -> bool:
            self.num_asked += 1
            if self.num_asked == 3:
                asked.set()
            return super().query()

    device.record = lambda: device.events.append(Long()) or device.events[-1]  # type: ignore
    ticket = completion.ticket()
    completion.watch(ticket)
    assert asked.wait(PATIENCE_S) and ticket.done_ns == 0
    device.events[0].reached.set()
    assert wait(event_fd) == 1 and ticket.done_ns > 0
    completion.close()


@pytest.mark.parametrize("mode", ["host_function", "event"])
def test_a_failed_device_ends_its_steps_with_its_error(device: Device, event_fd: int, mode: Any) -> None:
    completion = watching(device, event_fd, grace_s=0.01, mode=mode)
    ticket = completion.ticket()

    def failed() -> DeviceEvent:
        event = DeviceEvent()
        event.error = "CUDA error: an illegal memory access was encountered"
        event.reached.set()
        return event

    device.record = failed  # type: ignore[method-assign]
    completion.watch(ticket)
    wait(event_fd)
    assert ticket.done_ns > 0 and "illegal memory access" in ticket.error
    completion.close()


def test_where_host_functions_are_refused_events_are_waited_for(device: Device, event_fd: int) -> None:
    device.refuses_host_functions = True
    completion = watching(device, event_fd, grace_s=PATIENCE_S)
    tickets: list[Ticket] = []
    for _ in range(3):
        tickets.append(completion.ticket())
        completion.watch(tickets[-1])
    assert completion.mode == "event"
    for event, ticket in zip(device.events, tickets, strict=True):
        assert ticket.done_ns == 0
        event.reached.set()
        assert wait(event_fd) == 1 and ticket.done_ns > 0
    completion.close()


def test_nothing_in_flight_nothing_runs(device: Device, event_fd: int) -> None:
    completion = watching(device, event_fd, grace_s=0.001)
    ticket = completion.ticket()
    completion.watch(ticket)
    ticket.finish()
    completion.close()  # joins the thread, which sleeps without a timeout once the step is done
    assert ticket.error == ""
