"""Quantised weights as a rewriting of a recorded Program: models know nothing of it.

models/loader.py records a model and calls `quantize`; program/native.py lowers the result, whose slots say in which
format the core packs them and whose values say where rows of activations are int8. Formats and numerics are
cpp/kernels/kernels.h's: blocks of 32 along K with a scale each, of weights (float16) and of activations (float32).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from sapwood.program.ir import Node, Program, Value, WeightFormat, WeightSlot

# The head decides between tokens: 4 bits cost more there than the bytes are worth.
HEAD_FORMAT: Mapping[WeightFormat, WeightFormat] = MappingProxyType({"int8": "int8", "int4": "int8"})
# Nodes that can make their output int8 themselves; for what others write, a node `quantize` is put between.
_MAKES_Q8 = frozenset({"rms_norm", "gate_up"})


def quantize(program: Program, body: WeightFormat, head: WeightFormat) -> Program:
    """The program with the matrices of its layers in format `body` and that of the LM head in `head` ("act": as they
    are). The embedding table, norms and biases stay.

    A tapped value (last_hidden) keeps its dtype: embeddings are not rounded for a layer beside them.
    """
    formats = {n.name: fmt for n in program.nodes if (fmt := _matrix_format(n, body, head)) != "act"}
    readers: dict[int, list[Node]] = {}
    for node in program.nodes:
        for value in node.inputs:
            readers.setdefault(value.id, []).append(node)
    tapped = {value.id for value in program.taps.values()}

    def in_place(value: Value, writer: Node) -> bool:
        return (
            writer.op in _MAKES_Q8
            and value.id not in tapped
            and value.id in readers
            and all(reader.name in formats for reader in readers[value.id])
        )

    slots = [
        dataclasses.replace(slot, format=fmt) if (fmt := _slot_format(slot, program, formats)) != "act" else slot
        for slot in program.slots
    ]
    values: list[Value] = []
    nodes: list[Node] = []
    new: dict[int, Value] = {}  # by old id
    int8_of: dict[int, Value] = {}  # the same value through a `quantize` node, by old id

    def add(value: Value) -> Value:
        values.append(dataclasses.replace(value, id=len(values)))
        return values[-1]

    for node in program.nodes:
        inputs = [new[value.id] for value in node.inputs]
        if node.name in formats and inputs[0].dtype != "q8":
            old = node.inputs[0]
            if old.id not in int8_of:
                name = f"{node.name}.input"
                made = add(dataclasses.replace(old, name=name, dtype="q8"))
                empty: Mapping[str, float | int] = MappingProxyType({})
                nodes.append(Node("quantize", node.segment, name, node.layer, (inputs[0],), (made,), (), empty))
                int8_of[old.id] = made
            inputs[0] = int8_of[old.id]
        for value in node.outputs:
            new[value.id] = add(dataclasses.replace(value, dtype="q8") if in_place(value, node) else value)
        nodes.append(
            dataclasses.replace(
                node,
                inputs=tuple(inputs),
                outputs=tuple(new[value.id] for value in node.outputs),
                weights=tuple(None if slot is None else slots[slot.id] for slot in node.weights),
            )
        )
    return dataclasses.replace(
        program,
        values=tuple(values),
        nodes=tuple(nodes),
        slots=tuple(slots),
        taps=MappingProxyType({name: new[value.id] for name, value in program.taps.items()}),
    )


def _matrix_format(node: Node, body: WeightFormat, head: WeightFormat) -> WeightFormat:
    """Of the node's first weight, where it is a matrix."""
    slot = node.weights[0] if node.weights else None
    if slot is None or slot.kind not in ("linear", "gate_up"):
        return "act"
    return head if node.op == "lm_head" else body


def _slot_format(slot: WeightSlot, program: Program, formats: Mapping[str, WeightFormat]) -> WeightFormat:
    for node in program.nodes:
        if node.name in formats and node.weights[0] is slot:
            return formats[node.name]
    return "act"
