"""Memory that ends where the tensor ends: on the CPU a read behind it is a crash, not a value that nobody uses."""

from __future__ import annotations

import ctypes
import mmap
import os

import torch

from gpu_checks.device import Device

PROT_NONE = 0


def before_guard(d: Device, values: torch.Tensor) -> torch.Tensor:
    """A copy of the values, contiguous; on the CPU the byte behind it is on a page that must not be touched.

    On a GPU it is a plain copy: compute-sanitizer sees there what this sees here.
    """
    if d.name != "cpu":
        return values.clone(memory_format=torch.contiguous_format)
    page = mmap.PAGESIZE
    size = -(-values.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)  # lives as long as a tensor that looks into it
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    if protect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    whole = torch.frombuffer(memory, dtype=values.dtype, count=size // values.element_size())
    copy = whole[size // values.element_size() - values.numel() :].view(values.shape)
    return copy.copy_(values)
