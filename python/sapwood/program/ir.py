"""The model as data: nodes over values whose only symbolic sizes are T and L.

models/ record a `Program` once through a `Recorder` (by way of the builders in layers/); an executor runs it every
step: program/native.py lowers it to the C++ core, program/reference.py computes it node by node in torch. One program
serves every mix of prefill and decode, because nothing in it knows how many tokens a step has.

    T   query tokens of the step          L   logit rows of a block

A `Sym` raises when it is compared or converted, so no model code can bake a size in. Nodes name weight slots, never
tensors: a reload or an adapter needs no second recording.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import numpy as np

from sapwood.errors import InternalError
from sapwood.program.ops import OPS

ActDType = Literal["float32", "bfloat16"]
SlotKind = Literal["linear", "gate_up", "table", "vector", "f32"]
ValueDType = Literal["act", "float32", "q8"]
WeightFormat = Literal["act", "int8", "int4"]
SEGMENTS = ("forward", "head", "sample")


class Sym:
    """A size known only to a running step. Identity is all it has: every comparison and conversion raises TypeError."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(
            f"symbol {self.name} has no value while a model is recorded; it is known to a running step only"
        )

    __bool__ = __int__ = __index__ = __float__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = object.__hash__


T = Sym("T")
L = Sym("L")


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A matrix [rows, cols] that one node writes and later ones read.

    dtype   "act" is the program's compute dtype; "q8" int8 in blocks of 32 with a scale each, the input of quantised
            matrices (program/quantize.py)
    """

    id: int
    name: str
    dtype: ValueDType
    rows: Sym
    cols: int


@dataclasses.dataclass(frozen=True)
class TensorPart:
    """Rows [row_begin, row_end) of a checkpoint tensor whose whole shape must be `shape` ([n] or [n, k])."""

    tensor: str
    shape: tuple[int, ...]
    row_begin: int = 0
    row_end: int | None = None

    @property
    def num_rows(self) -> int:
        return (self.shape[0] if self.row_end is None else self.row_end) - self.row_begin


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayPart:
    """Values computed at record time (rope tables): f32 [rows, cols], contiguous."""

    array: np.ndarray[Any, np.dtype[np.float32]]

    @property
    def num_rows(self) -> int:
        return int(self.array.shape[0])


@dataclasses.dataclass(frozen=True, eq=False)
class WeightSlot:
    """What a node reads besides values: `parts` stacked along rows.

    kind   linear [N, K] and gate_up [2I, K] (gate rows, then up rows) are matrices of the compute dtype; table
           [rows, K]
           is one read by row; vector [n] and f32 [rows, cols] stay float32
    init   what load_format "dummy" puts there
    format "act", or how the core quantises the matrix
    """

    id: int
    name: str
    kind: SlotKind
    shape: tuple[int, ...]
    parts: tuple[TensorPart | ArrayPart, ...]
    init: Literal["random", "ones", "zeros"] = "random"
    format: WeightFormat = "act"


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One operation. `params` are plain numbers, named and ordered by program/ops.py."""

    op: str
    segment: str
    name: str
    layer: int | None
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: tuple[WeightSlot | None, ...]
    params: Mapping[str, float | int]


@dataclasses.dataclass(frozen=True)
class GroupSpec:
    """Layers that share one page table. `window`: tokens a query sees, itself included; 0 = all (kind "full")."""

    window: int
    num_layers: int

    @property
    def kind(self) -> Literal["full", "window"]:
        return "window" if self.window else "full"


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A recorded model. Immutable; shared by every executor."""

    act: ActDType
    vocab_size: int
    num_kv_heads: int
    head_dim: int
    groups: tuple[GroupSpec, ...]
    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    slots: tuple[WeightSlot, ...]
    taps: Mapping[str, Value]

    def node(self, name: str) -> Node:
        """The node of that name; KeyError names the closest ones."""
        for node in self.nodes:
            if node.name == name:
                return node
        import difflib

        near = difflib.get_close_matches(name, [node.name for node in self.nodes], 3)
        raise KeyError(f"no node {name!r}; close: {near}")

    def writer(self, value: Value) -> Node:
        """The node that writes `value`."""
        return next(node for node in self.nodes if value in node.outputs)


class Recorder:
    """Records a Program, checking every node as it comes. Raises InternalError: a bad node is a bug of the model's
    file.
    """

    def __init__(self, act: ActDType, vocab_size: int) -> None:
        self.act: ActDType = act
        self.vocab_size = vocab_size
        self._values: list[Value] = []
        self._nodes: list[Node] = []
        self._slots: list[WeightSlot] = []
        self._taps: dict[str, Value] = {}
        self._names: set[str] = set()
        self._segment = "forward"
        self._layer: int | None = None

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Nodes recorded inside belong to layer `index`; their names get the prefix "layers.<index>."."""
        self._layer = index
        try:
            yield
        finally:
            self._layer = None

    def segment(self, name: str) -> None:
        """Go on to segment "head" or "sample"; segments only go forward."""
        if SEGMENTS.index(name) < SEGMENTS.index(self._segment):
            raise InternalError(f"segment {name!r} cannot follow {self._segment!r}")
        self._segment = name

    def slot(
        self,
        name: str,
        kind: SlotKind,
        parts: Sequence[TensorPart | ArrayPart],
        init: Literal["random", "ones", "zeros"] = "random",
    ) -> WeightSlot:
        """A new weight slot; its shape is its parts', stacked along rows."""
        if not parts:
            raise InternalError(f"weight slot {name!r} has no parts")
        tails = {(p.shape if isinstance(p, TensorPart) else p.array.shape)[1:] for p in parts}
        if len(tails) != 1:
            raise InternalError(f"weight slot {name!r}: parts differ in columns: {sorted(tails)}")
        for part in parts:
            if (
                isinstance(part, TensorPart)
                and not 0 <= part.row_begin < part.row_begin + part.num_rows <= part.shape[0]
            ):
                raise InternalError(
                    f"weight slot {name!r}: rows {part.row_begin}..{part.row_end} of {part.tensor} {part.shape}"
                )
        shape = (sum(p.num_rows for p in parts), *tails.pop())
        if len(shape) != (1 if kind == "vector" else 2):
            raise InternalError(f"weight slot {name!r} of kind {kind!r} cannot have shape {shape}")
        slot = WeightSlot(len(self._slots), self._prefixed(name), kind, shape, tuple(parts), init)
        self._slots.append(slot)
        return slot

    def op(
        self,
        op: str,
        name: str,
        inputs: Sequence[Value],
        outputs: Sequence[tuple[ValueDType, Sym, int]],
        weights: Sequence[WeightSlot | None] = (),
        **params: float | int,
    ) -> tuple[Value, ...]:
        """Append a node and return its output values. `outputs`: (dtype, rows, cols) of each."""
        name = self._prefixed(name)
        if name in self._names:
            raise InternalError(f"two nodes are called {name!r}")
        for value in inputs:
            if value.id >= len(self._values) or self._values[value.id] is not value:
                raise InternalError(f"node {name!r} reads {value.name!r}, a value of another program")
        first = len(self._values)
        made = tuple(
            Value(first + i, name if i == 0 else f"{name}.{i}", dtype, rows, cols)
            for i, (dtype, rows, cols) in enumerate(outputs)
        )
        node = Node(
            op, self._segment, name, self._layer, tuple(inputs), made, tuple(weights), MappingProxyType(dict(params))
        )
        spec = OPS.get(op)
        if spec is None:
            raise InternalError(f"node {name!r}: unknown op {op!r}; known: {sorted(OPS)}")
        spec.check(node, self)
        self._names.add(name)
        self._values += made
        self._nodes.append(node)
        return made

    def tap(self, name: str, value: Value) -> Value:
        """Give a value a public name (hidden states for embeddings, draft models, debugging). Returns it."""
        if name in self._taps:
            raise InternalError(f"two taps are called {name!r}")
        self._taps[name] = value
        return value

    def finish(self, groups: Sequence[GroupSpec], num_kv_heads: int, head_dim: int) -> Program:
        """The finished program. Checks that each group's layers are written exactly once."""
        written = sorted((n.params["kv_group"], n.params["layer_in_group"]) for n in self._nodes if n.op == "qkv")
        expected = [(g, i) for g, spec in enumerate(groups) for i in range(spec.num_layers)]
        if written != expected:
            raise InternalError(f"KV layers written {written} are not those of the groups {list(groups)}")
        return Program(
            self.act,
            self.vocab_size,
            num_kv_heads,
            head_dim,
            tuple(groups),
            tuple(self._values),
            tuple(self._nodes),
            tuple(self._slots),
            MappingProxyType(dict(self._taps)),
        )

    def _prefixed(self, name: str) -> str:
        return name if self._layer is None else f"layers.{self._layer}.{name}"
