"""The emulator of tests/cuda/ shows the mistakes it is there for; ldmatrix, mma and wgmma are as PTX defines them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

FAILED = 719  # cudaErrorLaunchFailure


@pytest.fixture(scope="module")
def broken(emulated_tree: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(emulated_tree / "libbroken_kernels.so"))
    library.last_text.restype = ctypes.c_char_p
    return library


def run(broken: ctypes.CDLL, name: str) -> tuple[int, bool]:
    """The launch's status, and whether its result was right."""
    out = (ctypes.c_int * 1)()
    return broken.run(name.encode(), out), bool(out[0])


@pytest.mark.parametrize("order", ["ascending", "descending", "3"])
@pytest.mark.parametrize("name", ["neighbour", "copy", "product", "warp group product", "named barrier"])
def test_right_kernels_are_right(broken: ctypes.CDLL, name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPWOOD_EMULATOR_ORDER", order)
    assert run(broken, name) == (0, True)


def test_a_missing_barrier_shows_in_one_order_of_threads(broken: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPWOOD_EMULATOR_ORDER", "ascending")
    assert run(broken, "no barrier, next") == (0, False)
    monkeypatch.setenv("SAPWOOD_EMULATOR_ORDER", "descending")
    assert run(broken, "no barrier, previous") == (0, False)


def test_a_copy_has_not_arrived_before_it_is_waited_for(broken: ctypes.CDLL) -> None:
    assert run(broken, "no wait") == (0, False)
    assert run(broken, "no wait for TMA") == (0, False)


def test_a_product_of_wgmma_is_not_there_before_it_is_waited_for(broken: ctypes.CDLL) -> None:
    assert run(broken, "no wait for wgmma") == (0, False)


def test_a_named_barrier_holds_those_that_wait_for_it(broken: ctypes.CDLL) -> None:
    assert run(broken, "no named barrier") == (0, False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("misaligned copy", "cp.async of 16 bytes with an address that is not a multiple of them"),
        ("half a warp shuffles", "threads wait for what will not come: thread 0 at a shuffle"),
        ("diverged exchange", "reaches a vote where others of its warp are at a shuffle"),
        ("barrier in a branch", "threads wait for what will not come"),
        ("no wait for the kernel before", "ends without AwaitPredecessor"),
        ("no fence before wgmma", "wgmma without a fence since the last wait"),
        ("no mbarrier", "an mbarrier that nobody has initialised"),
        ("named barrier of three", "a named barrier of which others expect another number of threads"),
    ],
)
def test_what_would_hang_or_trap_ends_with_an_error(broken: ctypes.CDLL, name: str, said: str) -> None:
    status, _ = run(broken, name)
    assert status == FAILED and said in broken.last_text().decode()
    assert run(broken, "neighbour") == (0, True)  # the next launch is not disturbed


def test_a_launch_that_no_device_takes_is_refused(broken: ctypes.CDLL) -> None:
    assert run(broken, "too large a block") == (9, False)
