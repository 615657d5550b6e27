"""Who may import whom in the Python package, and what serving must not import at all."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "sapwood"
# Where torch may be imported: the oracle runs on it, and the demo model was trained with it; serving on a CPU does not.
TRAINING = ("sapling/muon.py", "sapling/network.py", "sapling/train.py")
CUDA = tuple(f"program/cuda{part}.py" for part in ("", "_attention", "_executor", "_graphs", "_model", "_moe", "_rows"))
FRAMEWORKS = {"torch": ("program/reference.py", *CUDA, *TRAINING), "transformers": ()}
# Who may hold the native core: those that hand it work. Policy, text and descriptions of models never do.
CORE_USERS = (
    "program/",
    "memory/",
    "engine/engine.py",
    "engine/plan.py",
    "engine/output.py",
    "models/loader.py",
    "models/weights.py",
)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in the file, wherever it stands; `from a import b` counts as a.b too, a relative
    one is "."."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                yield node.lineno, "."
            else:
                yield node.lineno, module
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def framework_imports(package: Path) -> list[str]:
    found = []
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        for line, module in imports(file):
            allowed = FRAMEWORKS.get(module.partition(".")[0])
            if allowed is not None and name not in allowed:
                found.append(f"{name}:{line}: {module}")
    return found


def core_imports(package: Path) -> list[str]:
    return [
        f"{file.relative_to(package)}:{line}"
        for file in sorted(package.rglob("*.py"))
        for line, module in imports(file)
        if module == "sapwood._core" and not file.relative_to(package).as_posix().startswith(CORE_USERS)
    ]


def relative_imports(package: Path) -> list[str]:
    return [f"{file}:{line}" for file in package.rglob("*.py") for line, module in imports(file) if module == "."]


def test_import_contracts() -> None:
    pytest.importorskip("importlinter.cli")
    # In a process of its own: the linter configures logging, which would silence every logger of this one.
    program = (
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "tests" / "arch" / "importlinter.ini")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "python")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kept, 0 broken" in done.stdout


def test_no_framework_in_the_package() -> None:
    assert framework_imports(PACKAGE) == []


def test_the_core_is_used_where_it_belongs() -> None:
    assert core_imports(PACKAGE) == []


def test_imports_are_absolute() -> None:
    assert relative_imports(PACKAGE) == []


def test_the_rules_can_fail(tmp_path: Path) -> None:
    (tmp_path / "program").mkdir()
    (tmp_path / "chat").mkdir()
    for name in ("program/reference.py", "program/cuda.py", "program/native.py"):
        (tmp_path / name).write_text("def f():\n    import torch.nn as nn\n    from sapwood import _core\n")
    (tmp_path / "chat" / "template.py").write_text(
        "if 0:\n    from transformers import AutoTokenizer\n"
        "import sapwood._core\nfrom . import x\nfrom torchvision import y\n"
    )
    assert {f.rsplit(":", 1)[0] for f in framework_imports(tmp_path)} == {"program/native.py:2", "chat/template.py:2"}
    assert core_imports(tmp_path) == ["chat/template.py:3"]
    assert len(relative_imports(tmp_path)) == 1


def python(script: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_serving_on_a_cpu_imports_no_framework() -> None:
    pytest.importorskip("sapwood._core", reason="the native core is not built", exc_type=ImportError)
    loaded = set(
        python(
            "import sys, sapwood, sapwood.engine.async_engine, sapwood.models.loader\n"
            "sapwood.Engine, sapwood.AsyncEngine\nprint(*sys.modules)"
        ).split()
    )
    assert "sapwood._core" in loaded and not loaded & {"torch", "transformers", "jinja2", "tokenizers", "sentencepiece"}


def test_the_package_alone_imports_nothing() -> None:
    loaded = set(
        python("import sys; before = set(sys.modules); import sapwood; print(*(set(sys.modules) - before))").split()
    )
    assert not {name for name in loaded if name.startswith("sapwood.")}
    assert not loaded & {"numpy", "msgspec", "asyncio", "torch"}
