"""Rules of the house on source files: names, state, C++ includes, and READMEs that name what exists."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("python", "cpp", "cuda", "tests", "bench")
SOURCES = (".py", ".h", ".cc", ".cu", ".cuh")
NO_NAMES = ("utils", "util", "helpers", "helper", "common", "misc")

# folder -> the folders whose headers it may include
CPP_FLOORS = {
    "base": ("base",),
    "cache": ("cache", "base"),
    "batch": ("batch", "cache", "base"),
    "kernels": ("kernels", "base"),
    "sampling": ("sampling", "kernels", "base"),
    "program": ("program", "batch", "cache", "sampling", "kernels", "base"),
    "bindings": ("bindings", "program", "batch", "cache", "sampling", "kernels", "base"),
}
TORCH_HEADERS = ("torch/", "ATen/", "c10/", "caffe2/")
PYTHON_HEADERS = ("pybind11/", "Python.h", "nanobind/")
# Where nvcc does not compile them these include the headers of tests/cuda/emulator.
EMULATOR_DOORS = {"cuda/common/launch.cuh": "emulator.h", "cuda/common/ptx_sm90.cuh": "emulator_sm90.h"}
# The one header that both sides include, plain C; it lies in cuda/.
BLOB_READER, BLOB = "cpp/batch/plan_packer.cc", "batch/plan_blob.h"
CUDA_HEADERS = ("cuda", "cutlass/", "cute/", "nccl", "thrust/", "cub/")

MUTABLE_CALLS = (
    "dict",
    "list",
    "set",
    "bytearray",
    "defaultdict",
    "deque",
    "Counter",
    "OrderedDict",
    "WeakValueDictionary",
    "WeakKeyDictionary",
    "WeakSet",
)


def sources(root: Path) -> Iterator[Path]:
    for folder in FOLDERS:
        yield from (file for file in sorted((root / folder).rglob("*")) if file.suffix in SOURCES)


def bad_names(root: Path) -> list[str]:
    return [str(file.relative_to(root)) for file in sources(root) if file.stem in NO_NAMES]


def mutable_state(file: Path) -> list[str]:
    """Module-level names bound to something mutable, and `global` statements. CAPITALS may be a table typed Final."""
    tree, found = ast.parse(file.read_text("utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append(f"{file}:{node.lineno}: global {', '.join(node.names)}")
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call):
            function = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
            is_mutable = function in MUTABLE_CALLS
        else:
            is_mutable = isinstance(value, (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp))
        is_final = isinstance(node, ast.AnnAssign) and "Final" in ast.unparse(node.annotation)
        for name in names:
            is_constant = name.lstrip("_").isupper()
            if is_mutable and not name.startswith("__") and not (is_constant and is_final):
                found.append(f"{file}:{node.lineno}: {name}")
    return found


def includes(file: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, path, in quotes)"""
    for line, text in enumerate(file.read_text("utf-8").splitlines(), 1):
        if match := re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', text):
            yield line, match[2], match[1] == '"'


def bad_includes(root: Path) -> list[str]:
    found = []
    for side in ("cpp", "cuda"):
        for file in sorted((root / side).rglob("*")):
            if file.suffix not in SOURCES:
                continue
            floor = file.relative_to(root / side).parts[0]
            for line, path, in_quotes in includes(file):
                where = f"{file.relative_to(root)}:{line}: {path}"
                if path.startswith(TORCH_HEADERS):
                    found.append(f"{where} (torch)")
                elif path.startswith(PYTHON_HEADERS) and (side, floor) != ("cpp", "bindings"):
                    found.append(f"{where} (Python outside cpp/bindings)")
                elif path.startswith(CUDA_HEADERS) and side == "cpp":
                    found.append(f"{where} (CUDA in cpp)")
                elif in_quotes and (side == "cpp" and path.split("/")[0] not in CPP_FLOORS[floor] or ".." in path):
                    found.append(f"{where} (upwards)")
                elif in_quotes and not (root / side / path).exists():
                    source = where.partition(":")[0]
                    shared = (source, path) == (BLOB_READER, BLOB) and (root / "cuda" / path).exists()
                    if EMULATOR_DOORS.get(source) != path and not shared:
                        found.append(f"{where} (not in {side})")
    return found


def readmes(root: Path) -> list[Path]:
    return [
        root / "README.md",
        *(file for folder in (*FOLDERS, "third_party") for file in sorted((root / folder).rglob("README.md"))),
    ]


PATH = re.compile(r"(?<![\w./:<-])((?:[\w.*-]+/)+(?:\{[\w,.-]+\}[\w.*-]*|[\w.*-]*))(?![\w/{])")
SUFFIXES = (*SOURCES, ".md", ".toml", ".txt", ".ini", ".json", ".pyi", ".jinja", ".sh")


def named_paths(text: str) -> set[str]:
    """What reads like a path of the repository: under one of its folders, or any a/b.suffix of a source file."""
    found = set()
    for match in PATH.finditer(text):
        path = match[1].rstrip(".")
        inside = path.split("/")[0] in (*FOLDERS, "third_party", ".ci")
        if (inside and path.count("/") and path != "python/") or path.endswith(SUFFIXES):
            found.add(path)
    return found


def missing_paths(root: Path) -> list[str]:
    found = []
    for readme in readmes(root):
        places = (root, readme.parent, root / "python" / "sapwood", root / "python")
        for path in sorted(named_paths(readme.read_text("utf-8"))):
            match = re.search(r"\{([^}]*)\}", path)
            variants = [path.replace(match[0], part) for part in match[1].split(",")] if match else [path]
            for variant in variants:
                if not any(
                    any(place.glob(variant)) if "*" in variant else (place / variant).exists() for place in places
                ):
                    found.append(f"{readme.relative_to(root)}: {variant}")
    return found


def test_file_names() -> None:
    assert len(list(sources(ROOT))) > 30
    assert bad_names(ROOT) == []


def test_no_module_level_mutable_state() -> None:
    files = sorted((ROOT / "python" / "sapwood").rglob("*.py"))
    assert len(files) > 10
    assert list(itertools.chain.from_iterable(map(mutable_state, files))) == []


def test_includes_go_down_only() -> None:
    assert bad_includes(ROOT) == []


def test_every_folder_of_cpp_has_its_floor() -> None:
    assert {folder.name for folder in (ROOT / "cpp").iterdir() if folder.is_dir()} <= set(CPP_FLOORS)


def test_every_path_in_a_readme_exists() -> None:
    assert missing_paths(ROOT) == []


def test_every_folder_of_the_package_says_what_it_is() -> None:
    for file in sorted((ROOT / "python" / "sapwood").rglob("*.py")):
        assert ast.get_docstring(ast.parse(file.read_text("utf-8"))), f"{file} has no docstring"


@pytest.mark.parametrize(
    ("source", "num_found"),
    [
        ("cache = {}", 1),
        ("_seen: set[int] = set()", 1),
        ("TABLE = {}", 1),
        ("TABLE: Final = {}", 0),
        ("TABLE: Final[dict[str, int]] = {}", 0),
        ("table: Final = {}", 1),
        ("T = (1, 2)\nF = frozenset({1})\nM = MappingProxyType({})", 0),
        ("x = [i for i in y]", 1),
        ("q = collections.deque()", 1),
        ("__all__ = ['a']", 0),
        ("def f():\n    global n\n    n = 1", 1),
        ("class A:\n    x = []", 0),
    ],
)
def test_the_rule_on_state_can_fail(tmp_path: Path, source: str, num_found: int) -> None:
    file = tmp_path / "a.py"
    file.write_text(source)
    assert len(mutable_state(file)) == num_found


@pytest.mark.parametrize(
    ("name", "include", "reason"),
    [
        ("cpp/cache/a.h", '"batch/plan.h"', "upwards"),
        ("cpp/kernels/a.cc", '"cache/a.h"', "upwards"),
        ("cpp/base/a.h", '"../cuda/x.h"', "upwards"),
        ("cpp/program/a.h", "<pybind11/pybind11.h>", "Python"),
        ("cpp/program/a.h", "<Python.h>", "Python"),
        ("cpp/bindings/a.cc", "<torch/extension.h>", "torch"),
        ("cuda/quant/a.cu", "<ATen/ATen.h>", "torch"),
        ("cpp/program/a.cc", "<cuda_runtime.h>", "CUDA"),
        ("cuda/quant/a.cu", '"base/check.h"', "not in cuda"),
        ("cpp/bindings/a.cc", '"bindings/no.h"', "not in cpp"),
        ("cpp/batch/a.cc", '"batch/plan_blob.h"', "not in cpp"),
        ("cpp/batch/plan_packer.cc", '"batch/params.h"', "not in cpp"),
        ("cpp/bindings/a.cc", "<pybind11/pybind11.h>", ""),
        ("cuda/quant/a.cu", "<cuda_runtime.h>", ""),
        ("cpp/cache/a.h", "<vector>", ""),
    ],
)
def test_the_rule_on_includes_can_fail(tmp_path: Path, name: str, include: str, reason: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_text(f"#pragma once\n  #  include {include}\n")
    found = bad_includes(tmp_path)
    assert (len(found) == 1 and f"({reason}" in found[0]) if reason else found == []


def test_the_rules_on_names_and_readmes_can_fail(tmp_path: Path) -> None:
    (tmp_path / "cpp" / "common").mkdir(parents=True)  # a folder may have that name: cuda/common
    (tmp_path / "cpp" / "common" / "common.h").write_text("")
    assert bad_names(tmp_path) == ["cpp/common/common.h"]
    (tmp_path / "README.md").write_text(
        "See `cpp/common/common.h`, `cpp/common/{common,gone}.h`, cpp/*/common.h, engine/x.py and tests/arch.\n"
        "Not paths: a/b, http://x.org/cpp/y.h, /usr/x.py, ../shared/data, <dir>/x.py, query/KV.\n"
    )
    assert missing_paths(tmp_path) == [
        "README.md: " + path for path in ("cpp/common/gone.h", "engine/x.py", "tests/arch")
    ]
