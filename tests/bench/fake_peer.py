"""Peers for tests of bench/compare.py: what they start is fake_peer_process.py, whose modes are their forms."""

from __future__ import annotations

import sys
from pathlib import Path
from types import MappingProxyType
from typing import Final

import peers
from peer_workspace import PeerError, Workspace

PROCESS: Final = Path(__file__).with_name("fake_peer_process.py")


class FakePeer(peers.Started):
    """A peer whose forms are modes of the process, all of them for bf16. One named "absent" cannot be installed."""

    def __init__(self, name: str, *modes: str) -> None:
        self.name = name  # type: ignore[misc]
        self.modes = modes

    def forms(self, precision: str, has_bf16: bool) -> tuple[str, ...]:
        return self.modes if precision == "bf16" else ()

    def install(self, work: Workspace) -> None:
        if self.name == "absent":
            raise PeerError("there is no such package")

    def weights(self, work: Workspace, checkpoint: Path, form: str) -> Path:
        return checkpoint

    def command(self, work: Workspace, weights: Path, form: str, setup: peers.Setup, port: int) -> list[str]:
        return [sys.executable, str(PROCESS), form, str(port)]

    def variables(self, setup: peers.Setup) -> dict[str, str]:
        return {}

    def version(self, work: Workspace) -> str:
        return "0.1"


def fake_peers(*added: peers.Peer) -> MappingProxyType[str, peers.Peer]:
    """What to put in the place of peers.PEERS: a well-behaved "sapwood" and "good", and what is added."""
    found: tuple[peers.Peer, ...] = (FakePeer("sapwood", "good"), FakePeer("good", "good"), *added)
    return MappingProxyType({peer.name: peer for peer in found})
