"""The device of an engine test that names none (tests/README.md, "Devices")."""

from __future__ import annotations

from collections.abc import Iterator

import fakes
import pytest
from fakes import Device

from devices import chosen, devices, has_gpu


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames and not hasattr(metafunc.module, "OWN_DEVICE"):
        cpu_only = metafunc.definition.get_closest_marker("cpu_only") is not None
        names = ["cpu"] if cpu_only else devices(emulated=True)
        metafunc.parametrize("device", names, indirect=True, scope="module")


def takes_too_long(item: pytest.Item) -> bool:
    marker, call = item.get_closest_marker("slow_emulated"), getattr(item, "callspec", None)
    return marker is not None and marker.args != (False,) and call is not None and call.params.get("device") == "cuda"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the emulator takes too long for, unless it is asked for."""
    if chosen() or has_gpu():
        return
    slow = [item for item in items if takes_too_long(item)]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="module", autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Where fakes.loaded puts its model, and what device "cuda" is."""
    if getattr(request, "param", "cpu") == "cpu":
        yield Device("cpu")
        return
    from sapwood.program import cuda

    there = request.getfixturevalue("cuda_device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes, "ON_CUDA", there)
        patch.setattr(cuda, "open_device", lambda: there)
        yield Device("cuda", emulated=there[1] == "cpu")
