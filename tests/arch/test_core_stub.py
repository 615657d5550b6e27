"""_core.pyi is written by hand and read by people and mypy: it must say what the module offers, no more, no less."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

STUB = Path(__file__).resolve().parents[2] / "python" / "sapwood" / "_core.pyi"


def parameters_of(function: ast.FunctionDef) -> list[str]:
    """Names in order, without self; a variadic one ends them with "...": "and those of another function"."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    more = ["..."] if arguments.kwarg or arguments.vararg else []
    return [name for name in names if name != "self"] + more


def stub_names(text: str) -> dict[str, list[str] | None]:
    """ "f", "Class", "Class.method" -> parameters (None: no function)."""
    found: dict[str, list[str] | None] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = None
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("sapwood.errors."):
            found |= {target.id: None for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = parameters_of(node)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = None
            for member in node.body:
                if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                    found[f"{node.name}.{member.target.id}"] = None
                elif isinstance(member, ast.FunctionDef):
                    found[f"{node.name}.{member.name}"] = parameters_of(member)
    return found


def bound_parameters(function: object) -> list[str] | None:
    """pybind11 writes the signature into the first line of the docstring; None where it is overloaded or absent."""
    first = (inspect.getdoc(function) or "").splitlines()[:1]
    if not first or "*args" in first[0]:
        return None
    inside, depth, names = first[0].partition("(")[2], 0, []
    for part in re.split(r"([\[\](){},])", inside.rpartition(") ->")[0]):
        if part in "[({" and part:
            depth += 1
        elif part in "])}" and part:
            depth -= 1
        elif depth == 0 and (match := re.match(r"\s*(\w+)(:|$)", part)):
            names.append(match[1])
    return [name for name in names if name != "self"]


def agree(stub: list[str] | None, bound: list[str] | None) -> bool:
    """Parameters without a name in the bindings (arg0, arg1) are positional: the stub names them for the reader."""
    if stub is None or bound is None:
        return True
    if stub[-1:] == ["..."]:
        stub, bound = stub[:-1], bound[: len(stub) - 1]
    return len(stub) == len(bound) and all(bound[i] in (name, f"arg{i}") for i, name in enumerate(stub))


def module_names(module: ModuleType) -> dict[str, list[str] | None]:
    found: dict[str, list[str] | None] = {"__version__": None}
    for name, value in vars(module).items():
        if name.startswith("_") or inspect.ismodule(value):
            continue
        found[name] = bound_parameters(value) if callable(value) and not inspect.isclass(value) else None
        if inspect.isclass(value):
            for member, inner in vars(value).items():
                if not member.startswith("_"):
                    is_function = callable(inner) or isinstance(inner, staticmethod)
                    found[f"{name}.{member}"] = bound_parameters(getattr(value, member)) if is_function else None
    return found


def test_the_stub_is_the_module() -> None:
    core = pytest.importorskip("sapwood._core", reason="the native core is not built", exc_type=ImportError)
    stub = {
        name: value for name, value in stub_names(STUB.read_text("utf-8")).items() if not name.endswith(".__init__")
    }
    built = module_names(core)
    assert sorted(stub.keys() - built.keys()) == [], "in the stub, not in the module"
    assert sorted(built.keys() - stub.keys()) == [], "in the module, not in the stub"
    different = {
        name: (parameters, built[name]) for name, parameters in stub.items() if not agree(parameters, built[name])
    }
    assert different == {}, "parameters: (stub, module)"
    compared = [name for name, parameters in stub.items() if parameters and built[name] is not None]
    assert len(compared) > 20  # or the docstrings are not pybind11's any more


def test_constructors_take_what_the_stub_says() -> None:
    core = pytest.importorskip("sapwood._core", reason="the native core is not built", exc_type=ImportError)
    for name, parameters in stub_names(STUB.read_text("utf-8")).items():
        if name.endswith(".__init__"):
            bound = bound_parameters(getattr(core, name.partition(".")[0]).__init__)
            assert agree(parameters, bound), (name, bound)


def test_the_comparison_can_fail() -> None:
    names = stub_names(
        "x: int\nA = int\nclass C:\n    y: int\n    def f(self, a: int, *, b: int = 0) -> int: ...\ndef g(**kw): ...\n"
    )
    assert names == {"x": None, "C": None, "C.y": None, "C.f": ["a", "b"], "g": ["..."]}

    class Bound:
        """f(self: m.C, a: Annotated[numpy.ArrayLike, int32], b: dict[str, int] = {}, *, c: int = 0) -> int"""

    assert bound_parameters(Bound) == ["a", "b", "c"]
    assert agree(["row", "n"], ["arg0", "n"]) and agree(["a", "..."], ["a", "b"]) and agree(["a"], None)
    assert not agree(["x", "..."], ["a", "b"])
    assert not agree(["row"], ["column"]) and not agree(["a"], ["a", "b"]) and not agree(["a", "b"], ["b", "a"])
