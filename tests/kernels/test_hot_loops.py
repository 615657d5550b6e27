"""The compiled multiply loops of every vector level keep their sums in registers.

A tile of R x C sums is fast only while all of them live in registers; one too many, or a loop that the compiler did not
unroll, and each turn stores and reloads some: the results stay right, the speed halves. So the machine code is read
back: the innermost loops of the kernels that multiply and accumulate must not touch the stack with a vector.

What is disassembled is the extension that production runs (sapwood._core), or, where its symbols were stripped, the
library in the tree of `make build`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import pytest

X86_64: Final = ("x86_64", "AMD64")
ROOT: Final = Path(__file__).resolve().parents[2]
BUILT_LIBRARY: Final = ROOT / "build-make" / "libsapwood_core.a"

# Multiply-accumulates of a level: instruction, and how a source asks for it.
MULTIPLIES: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType({
    "avx2": {"vfmadd": "_mm256_fmadd_ps", "vpmaddubsw": "_mm256_maddubs_epi16"},
    "avx512": {"vfmadd": "_mm512_fmadd_ps", "vpdpbusd": "_mm512_dpbusd"},
    "avx512_bf16": {"vfmadd": "_mm512_fmadd_ps", "vdpbf16ps": "_mm512_dpbf16_ps", "vpdpbusd": "_mm512_dpbusd"},
})  # fmt: skip
MULTIPLY: Final = re.compile(r"(vfmadd)\d+ps|(vdpbf16ps)|(vpdpbusd)s?|(vpmaddubsw)")
MULTIPLY_OR_ADD: Final = re.compile(f"{MULTIPLY.pattern}|vpadd[wd]")  # vpmaddubsw leaves the adding to others
FEWEST: Final = 4  # multiplies in a loop that is looked at: norms and the last columns of a row have fewer
LEVEL: Final = re.compile(r"\bsapwood::(\w+)::")

FUNCTION: Final = re.compile(r"[0-9a-f]+ <(.*)>:")
INSTRUCTION: Final = re.compile(r"\s*([0-9a-f]+):\s+(?:(?:bnd|notrack)\s+)?(\S+)\s*(.*)")
VECTOR: Final = re.compile(r"%[xyz]mm(\d+)")
STACK: Final = re.compile(r"([-\w]*)\(%(rsp|rbp)[^)]*\)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    mnemonic: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a direct jump goes."""
        match = re.match(r"([0-9a-f]+)\b", self.operands) if self.mnemonic.startswith("j") else None
        return int(match[1], 16) if match else None

    @property
    def falls_through(self) -> bool:
        return self.mnemonic not in ("jmp", "ret", "ud2", "hlt")

    @property
    def is_padding(self) -> bool:
        return re.search(r"\bnop|^int3|^xchg %ax,%ax", f"{self.mnemonic} {self.operands}") is not None


@dataclasses.dataclass(frozen=True)
class HotLoop:
    """An innermost loop that multiplies and accumulates.

    multiplies   instruction -> how often
    spills       its instructions that move a vector to or from the stack, or compute with one there
    """

    function: str
    address: int
    multiplies: Mapping[str, int]
    spills: tuple[str, ...]

    @property
    def level(self) -> str:
        match = LEVEL.search(self.function)
        return match[1] if match else ""


def disassemble(file: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """The functions of a level's namespace and their instructions, in order."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(file)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name, body = "", list[Instruction]()
    for line in listing.splitlines():
        if match := FUNCTION.fullmatch(line):
            if body:
                yield name, body
            name, body = match[1], []
        elif LEVEL.search(name) and (match := INSTRUCTION.fullmatch(line)):
            body.append(Instruction(int(match[1], 16), match[2], match[3]))
    if body:
        yield name, body


def basic_blocks(body: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Blocks of instructions that run together, and the blocks each may go on to."""
    targets = {i.target for i in body}
    blocks: list[list[Instruction]] = [[]]
    for instruction in body:
        if blocks[-1] and (instruction.address in targets or blocks[-1][-1].mnemonic.startswith(("j", "ret"))):
            blocks.append([])
        blocks[-1].append(instruction)
    index = {block[0].address: n for n, block in enumerate(blocks) if block}
    successors = []
    for n, block in enumerate(blocks):
        last = block[-1]
        # What aligns the head of a loop behind a jump is never run, and no way into the loop.
        is_run = last.falls_through and not all(i.is_padding for i in block)
        following = [n + 1] if is_run and n + 1 < len(blocks) else []
        successors.append(following + ([index[last.target]] if last.target in index else []))
    return blocks, successors


def natural_loops(successors: list[list[int]]) -> dict[int, set[int]]:
    """Loops by head: the blocks from which a jump back to the head is reached without passing it.

    A jump back is one to a block that dominates it (Aho, Lam, Sethi and Ullman, Compilers, 9.6). Compilers move parts
    of a loop behind it or begin in its middle: by addresses alone one would find loops that are none, and miss parts.
    """
    predecessors: list[list[int]] = [[] for _ in successors]
    for n, following in enumerate(successors):
        for s in following:
            predecessors[s].append(n)
    # Whatever only a jump table reaches is an entry as well.
    entries = {n for n, before in enumerate(predecessors) if not before} | {0}
    everything = set(range(len(successors)))
    dominators = [{n} if n in entries else everything for n in everything]
    changed = True
    while changed:
        changed = False
        for n in everything - entries:
            new = set.intersection(*(dominators[p] for p in predecessors[n])) | {n}
            changed |= new != dominators[n]
            dominators[n] = new
    loops: dict[int, set[int]] = {}
    for tail, following in enumerate(successors):
        for head in (h for h in following if h in dominators[tail]):
            loop, pending = loops.setdefault(head, {head}), [tail]
            while pending:
                n = pending.pop()
                if n not in loop:
                    loop.add(n)
                    pending += predecessors[n]
    return loops


def carries_sums(inside: list[Instruction]) -> bool:
    """Whether a multiply or an add reads what an earlier turn of the loop left in a register or on the stack.

    A polynomial multiplies as much, but all it computes begins in the turn: what it keeps on the stack costs little.
    """
    sums = MULTIPLY_OR_ADD if any(i.mnemonic == "vpmaddubsw" for i in inside) else MULTIPLY
    read: set[str] = set()
    written: set[str] = set()
    for i in inside:
        registers, places = VECTOR.findall(i.operands), [place[0] for place in STACK.finditer(i.operands)]
        if sums.match(i.mnemonic):
            read |= {*registers, *places} - written
        # The last operand is the one written.
        written.update((places if i.operands.endswith(")") else registers)[-1:])
    return not read.isdisjoint(written)


def hot_loops(name: str, body: list[Instruction]) -> Iterator[HotLoop]:
    """The innermost loops of a function that add at least FEWEST products to sums. RopeKv adds nothing up, but hands
    its lanes on through an array on the stack.
    """
    if "RopeKv" in name or sum(MULTIPLY.match(i.mnemonic) is not None for i in body) < FEWEST:
        return
    blocks, successors = basic_blocks(body)
    loops = natural_loops(successors)
    # %rbp is the stack's only where it was made so; elsewhere it is a register like any other.
    bases = ("rsp", "rbp") if any(i.mnemonic == "mov" and i.operands == "%rsp,%rbp" for i in body) else ("rsp",)
    for head, members in loops.items():
        if any(other != head and other in members for other in loops):
            continue
        turn = sorted(members, key=lambda n: (n < head, n))
        inside = [instruction for n in turn for instruction in blocks[n]]
        multiplies: dict[str, int] = {}
        for match in filter(None, (MULTIPLY.match(i.mnemonic) for i in inside)):
            kind = next(filter(None, match.groups()))
            multiplies[kind] = multiplies.get(kind, 0) + 1
        vectors = [i for i in inside if VECTOR.search(i.operands)]
        on_stack = [i for i in vectors if (place := STACK.search(i.operands)) and place[2] in bases]
        # Integer sums begin anew with each block of 32, and join the float sums in memory.
        if sum(multiplies.values()) >= FEWEST and ("vpdpbusd" in multiplies or carries_sums(vectors)):
            spills = tuple(f"{i.address:x}: {i.mnemonic} {i.operands}" for i in on_stack)
            yield HotLoop(name, blocks[head][0].address, multiplies, spills)


def loops_of(file: Path) -> list[HotLoop]:
    return [loop for name, body in disassemble(file) for loop in hot_loops(name, body)]


def complaints(loops: Iterable[HotLoop]) -> list[str]:
    return [
        f"{loop.function} at {loop.address:x}, {dict(loop.multiplies)}: {len(loop.spills)} stack accesses: "
        + "; ".join(loop.spills[:4])
        for loop in loops
        if loop.spills
    ]


@pytest.fixture(scope="module")
def kernel_loops() -> list[HotLoop]:
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not on the PATH")
    if platform.machine() not in X86_64:
        pytest.skip(f"the vector levels are x86-64's, this is {platform.machine()}")
    extension = importlib.util.find_spec("sapwood._core")
    places = [Path(extension.origin)] if extension is not None and extension.origin else []
    places.append(BUILT_LIBRARY)
    for place in places:
        if place.is_file() and (found := [loop for loop in loops_of(place) if loop.level in MULTIPLIES]):
            return found
    pytest.fail(f"no kernels with symbols in {' or '.join(map(str, places))}: run `make build`")


@pytest.mark.parametrize("level", MULTIPLIES)
def test_sums_stay_in_registers(level: str, kernel_loops: list[HotLoop]) -> None:
    assert complaints(loop for loop in kernel_loops if loop.level == level) == []


@pytest.mark.parametrize("level", MULTIPLIES)
def test_every_multiply_of_a_level_has_its_loops(level: str, kernel_loops: list[HotLoop]) -> None:
    """Else the test above could pass on nothing: each instruction that the sources ask for has a loop with a whole tile
    of it.
    """
    sources = " ".join(file.read_text("utf-8") for file in (ROOT / "cpp" / "kernels").glob("*.h"))
    most = {kind: 0 for kind, intrinsic in MULTIPLIES[level].items() if intrinsic in sources}
    assert {"vfmadd"} | ({"vdpbf16ps"} if level == "avx512_bf16" else set()) <= most.keys()
    for loop in kernel_loops:
        for kind in most.keys() & loop.multiplies.keys() if loop.level == level else ():
            most[kind] = max(most[kind], loop.multiplies[kind])
    assert min(most.values()) >= 8, most


# --- the checker: R x C sums in one loop, as cpp/kernels/micro.h has them

TILE: Final = r"""
#include <immintrin.h>
#include <cstdint>
#define EACH(N, i) _Pragma("GCC unroll 16") for (int i = 0; i < N; ++i)
namespace sapwood::avx512 {
void Tile(const float* a, int64_t lda, const float* b, int64_t k, float* c) {
  __m512 sums[R][C];
  EACH(R, r) EACH(C, j) sums[r][j] = _mm512_loadu_ps(c + (r * C + j) * 16);
  for (int64_t i = 0; i < k; ++i) {
    __m512 column[C];
    EACH(C, j) column[j] = _mm512_loadu_ps(b + (i * C + j) * 16);
    EACH(R, r) EACH(C, j) sums[r][j] = _mm512_fmadd_ps(_mm512_set1_ps(a[r * lda + i]), column[j], sums[r][j]);
  }
  EACH(R, r) EACH(C, j) _mm512_storeu_ps(c + (r * C + j) * 16, sums[r][j]);
}
}  // namespace sapwood::avx512
"""


@pytest.mark.parametrize(("rows", "spills"), [(4, False), (8, True)])
def test_a_tile_too_many_is_noticed(rows: int, spills: bool, tmp_path: Path) -> None:
    """8 x 4 sums and what they multiply need more than the 32 registers there are; 4 x 4 leave room."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or shutil.which("objdump") is None or platform.machine() not in X86_64:
        pytest.skip("a C++ compiler for x86-64 (CXX, c++, g++, clang++) and objdump (binutils) are needed")
    source, built = tmp_path / "tile.cc", tmp_path / "tile.o"
    source.write_text(TILE)
    options = ["-std=c++20", "-O3", "-mavx512f", f"-DR={rows}", "-DC=4", "-c", "-o", str(built), str(source)]
    subprocess.run([*compiler.split(), *options], check=True, capture_output=True)
    loops = loops_of(built)
    assert [loop.level for loop in loops] == ["avx512"]
    assert loops[0].multiplies["vfmadd"] == 4 * rows
    assert bool(complaints(loops)) == spills, loops
