"""The report of a finished step (cuda/completion/params.h): told once, after everything before it on the stream."""

from __future__ import annotations

import ctypes
import os
import select
import time

import torch

from gpu_checks.device import Device
from sapwood.program.cuda_library import NotifyParams

PATIENCE_MS = 20_000


def check_notify(d: Device) -> int:
    event_fd = os.eventfd(0, os.EFD_NONBLOCK)
    poll = select.poll()
    poll.register(event_fd, select.POLLIN)
    try:
        # Long enough on a GPU for a report that does not wait to come first.
        x = torch.full((1 << (24 if d.name == "cuda" else 10),), 1.0, device=d.name)
        there = torch.empty(1, pin_memory=d.name == "cuda")
        dones = [ctypes.c_int64(0) for _ in range(3)]
        reports = [NotifyParams(event_fd=event_fd, done_ns=ctypes.addressof(done)) for done in dones]
        before = time.monotonic_ns()
        for i, report in enumerate(reports):
            for _ in range(20):
                x.mul_(1.0)
            there.copy_(x[:1] + i, non_blocking=True)
            d.call("notify", report)
        while dones[-1].value == 0:
            assert poll.poll(PATIENCE_MS), "nobody was told"
            os.eventfd_read(event_fd)
        assert float(there) == 3.0, "told before the copy was done"
        assert before <= dones[0].value <= dones[1].value <= dones[2].value <= time.monotonic_ns()
    finally:
        os.close(event_fd)
    return len(reports)
