"""Break the code on purpose, one property at a time, and show that a test notices.

    python tests/mutations.py             # all, in a copy of the checkout
    python tests/mutations.py limbo       # those whose name contains "limbo"
    python tests/mutations.py --list

Each mutation replaces one piece of text in one file, rebuilds what depends on it, and runs the one test that must turn
red. A mutation that survives, or whose text is no longer there, is a failure of this script. Takes minutes: not part
of `make test`. Needs what `make test` installs; run it with `.venv/bin/python`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    name: str
    path: str
    old: str
    new: str
    test: str  # "ctest:NAME" or arguments of pytest


BITWISE = "tests/property/test_bitwise.py"
CHECKSUM = "ctest:checksum_property_test"
CHECKSUM_ON_CUDA = "tests/engine/test_checksum_engine.py -k cuda"
MASKS = "tests/engine/test_masks.py -k cuda or may_come"

MUTATIONS = (
    # What test_bitwise.py claims, one broken at a time.
    Mutation(
        "bits-depend-on-batch-mates", "cpp/program/cpu_runner.cc",
        "common.scale = static_cast<float>(node.floats[0]);",
        "common.scale = static_cast<float>(node.floats[0]) * (batch.segments.size() > 1 ? 1.0000002f : 1.0f);",
        BITWISE,
    ),
    Mutation(
        "bits-depend-on-chunks", "cpp/program/cpu_runner.cc",
        "args.q_len = item.num_rows;",
        "args.q_len = item.num_rows;\n      if (item.num_rows > 1) args.scale *= 1.0000002f;",
        BITWISE,
    ),
    Mutation(
        "bits-depend-on-threads", "cpp/program/cpu_runner.cc",
        "args.kv_head = item.kv_head;",
        "args.kv_head = item.kv_head;\n      if (pool.num_threads() > 1) args.scale *= 1.0000002f;",
        BITWISE,
    ),
    Mutation(
        "results-behind-a-prefix-are-swapped", "cpp/program/cpu_runner.cc",
        "room + i * row_floats, head_floats",
        "room + (i + 1) % rows * row_floats, head_floats",
        "ctest:cpu_runner_test",
    ),
    Mutation(
        "prefix-longer-than-it-is-shared", "cpp/batch/shared_prefix.cc",
        "!= 0) return chunk;",
        "!= 0) return chunk + 1;",
        "ctest:cpu_runner_test",
    ),
    Mutation(
        "stolen-run-is-left-with-its-owner", "cpp/program/thread_pool.cc",
        "Pack(begin, middle), std::memory_order_relaxed)) continue;",
        "Pack(begin, middle + (end - begin > 4)), std::memory_order_relaxed)) continue;",
        "ctest:thread_pool_test",
    ),
    Mutation(
        "bits-depend-on-cache-hits", "cpp/batch/row_table.cc",
        "for (int64_t p = begin; p < end; ++p) out->positions.push_back(p);",
        "for (int64_t p = begin; p < end; ++p) out->positions.push_back(p + (row.init.kv_len > 0));",
        BITWISE,
    ),
    Mutation(
        "bits-depend-on-retraction", "cpp/program/sample_rows.cc",
        ".position = position,",
        ".position = position - init.kv_len,",
        BITWISE,
    ),
    Mutation(
        "masked-keys-are-multiplied", "cpp/kernels/attention.h",
        "s[i.value] = Select(LanesSeen(begin, end, i.value), s[i.value], Set1(-__builtin_inff()));",
        "s[i.value] = Select(LanesSeen(begin, end + 1, i.value), s[i.value], Set1(-__builtin_inff()));",
        BITWISE,
    ),
    # What the KV-checksum model on device "cuda" is for.
    Mutation(
        "cuda-slot-of-another-page", "cuda/batch/prepare_step.cu",
        "PageTable(state, group, row_index)[page]) * state.page_size + offset : -1;",
        "PageTable(state, group, row_index)[page > 2 ? page - 1 : page]) * state.page_size + offset : -1;",
        CHECKSUM_ON_CUDA,
    ),
    Mutation(
        "cuda-page-overwrites-the-last", "cuda/batch/row_ops.cu",
        "MutablePageTable(state, op.group, op.row) + num_pages;",
        "MutablePageTable(state, op.group, op.row) + (num_pages > 3 ? num_pages - 1 : num_pages);",
        CHECKSUM_ON_CUDA,
    ),
    Mutation(
        "cuda-prefix-a-chunk-too-long", "cpp/batch/shared_prefix.cc",
        "!= 0) return chunk;",
        "!= 0) return chunk + 1;",
        CHECKSUM_ON_CUDA,
    ),
    Mutation(
        "cuda-place-is-free-too-soon", "python/sapwood/program/cuda_executor.py",
        "            launched = True\n",
        "            launched = True\n            self._places.put(place)\n",
        CHECKSUM_ON_CUDA,
    ),
    Mutation(
        "cuda-failed-plan-fails-all-after", "python/sapwood/program/cuda_executor.py",
        "self._rows.order[:end].copy_(place.plan[:end], non_blocking=True)",
        "self._rows.order[FAILED_BYTES:end].copy_(place.plan[FAILED_BYTES:end], non_blocking=True)",
        CHECKSUM_ON_CUDA,
    ),
    Mutation(
        "cuda-fork-without-copy", "python/sapwood/program/cuda_executor.py",
        "self.launcher.model.copy_pages(packed.copies)",
        "self.launcher.model.copy_pages([])",
        "tests/engine/test_forks.py",
    ),
    # What the KV-checksum model is for.
    Mutation(
        "wrong-page", "cpp/batch/row_table.cc",
        "const PageId page = table[p / page_size];",
        "const PageId page = table[p > 40 && p / page_size > 0 ? p / page_size - 1 : p / page_size];",
        CHECKSUM,
    ),
    Mutation(
        "no-limbo", "cpp/batch/batch_builder.cc",
        "const int64_t last_step = row.in_flight > 0 ? row.last_step : kNoStep;",
        "const int64_t last_step = kNoStep;",
        CHECKSUM,
    ),
    Mutation(
        "unwritten-page-cached", "cpp/batch/batch_builder.cc",
        "return std::min(planned_len, phase == RowPhase::kDone ? known() - 1 : known());",
        "return std::min(capacity, known());",
        CHECKSUM,
    ),
    Mutation(
        "fork-without-copy", "cpp/batch/batch_builder.cc",
        "plan->copies.insert(plan->copies.end(), fork.copies.begin(), fork.copies.end());",
        "",
        CHECKSUM,
    ),
    Mutation(
        "failed-step-stays-cached",
        "cpp/batch/batch_builder.cc",
        "cache->InvalidateSince(step);",
        "(void)step;",
        CHECKSUM,
    ),
    Mutation(
        "token-from-a-failed-prefix",
        "cpp/batch/batch_builder.cc",
        "if (failed || !row.lease.valid()) {",
        "if (failed) {",
        CHECKSUM,
    ),
    Mutation(
        "stale-generation", "cpp/batch/row_table.cc",
        "if (!row.alive || row.gen != item.gen) {",
        "if (!row.alive) {",
        "ctest:row_table_test",
    ),
    Mutation(
        "finish-ignored-on-device", "cpp/batch/row_table.cc",
        "if (flags != 0) row.alive = false;",
        "",
        "ctest:row_table_test",
    ),
    # Rows that wait for a grammar mask.
    Mutation(
        "held-row-resumes-anothers-hidden-state", "cpp/program/cpu_runner.cc",
        "std::copy_n(src >= 0 ? x + src * cols : kept + row * cols, cols, out + i * cols);",
        "std::copy_n(src >= 0 ? x + src * cols : kept + (row + 1) % 3 * cols, cols, out + i * cols);",
        "ctest:cpu_runner_test",
    ),
    Mutation(
        "resume-advances-the-kv", "cpp/batch/row_table.cc",
        "row.kv_len = end;",
        "row.kv_len = end + resume;",
        CHECKSUM,
    ),
    Mutation(
        "window-slides-for-what-is-skipped", "cpp/batch/batch_builder.cc",
        "const int64_t len = row.spec.masked ? std::min(row.planned_len, row.known()) : row.planned_len;",
        "const int64_t len = row.planned_len;",
        CHECKSUM,
    ),
    Mutation(
        "device-holds-whatever-is-not-there-yet", "python/sapwood/program/cuda_executor.py",
        "while not (logits.done_ns or self._packer.masks_posted(packed)):",
        "while False:",
        MASKS,
    ),
    Mutation(
        "device-keeps-no-hidden-state", "python/sapwood/program/cuda_executor.py",
        "if masks.num_held:",
        "if False:",
        MASKS,
    ),
    Mutation(
        "packer-forgets-holds", "cpp/batch/plan_packer.cc",
        "rows_[masked.row].held = true;",
        "",
        MASKS,
    ),
    # The step loop.
    Mutation(
        "plan-after-result", "python/sapwood/config.py",
        "disable_overlap_schedule: bool = False",
        "disable_overlap_schedule: bool = True",
        "tests/engine/test_step_loop.py -k head_is_long",
    ),
)  # fmt: skip


def run(command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


class Copy:
    """A copy of the checkout with a build of its own; mutations are applied there and taken back."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkout"
        ignore = shutil.ignore_patterns(".git", ".venv", "build*", "*.so", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, self.root, ignore=ignore)
        data = os.environ.get("SAPWOOD_DATA", str(ROOT.parent / "shared" / "data"))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = os.environ | {"SAPWOOD_DATA": data, "PYTHONPATH": str(self.root / "python"), "PATH": path}
        self.env.setdefault("SAPWOOD_TEST_STEPS", "20000")

    def build(self) -> None:
        for command in (
            ["cmake", "-S", ".", "-B", "build", "-G", "Ninja", "-DSAPWOOD_PYTHON=ON", "-DSAPWOOD_TESTS=ON",
             "-DSAPWOOD_WERROR=OFF", f"-DPython_EXECUTABLE={sys.executable}"],
            ["cmake", "--build", "build"],
        ):  # fmt: skip
            done = run(command, self.root, self.env)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")

    def test(self, test: str) -> bool:
        """Whether the test passes."""
        if test.startswith("ctest:"):
            command = ["ctest", "--test-dir", "build", "--output-on-failure", "-R", test.removeprefix("ctest:")]
        else:
            path, _, keyword = test.partition(" -k ")
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                path,
                *(["-k", keyword] if keyword else []),
            ]
        try:
            return run(command, self.root, self.env).returncode == 0
        except subprocess.TimeoutExpired:
            return False  # a test that hangs has noticed too

    def survives(self, mutation: Mutation) -> bool:
        path = self.root / mutation.path
        original = path.read_text()
        if original.count(mutation.old) != 1:
            raise SystemExit(
                f"{mutation.name}: {mutation.path} has its text {original.count(mutation.old)} times, expected once"
            )
        path.write_text(original.replace(mutation.old, mutation.new))
        try:
            if mutation.path.startswith("cpp/"):
                self.build()
            return self.test(mutation.test)
        finally:
            path.write_text(original)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="run the mutations whose name contains one of these")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if not args.names or any(n in m.name for n in args.names)]
    if args.list:
        for m in chosen:
            print(f"{m.name:32} {m.path:36} {m.test}")
        return 0
    survivors = []
    with tempfile.TemporaryDirectory() as directory:
        copy = Copy(Path(directory))
        copy.build()
        for test in dict.fromkeys(m.test for m in chosen):
            if not copy.test(test):
                raise SystemExit(f"{test} fails without any mutation")
        for m in chosen:
            survived = copy.survives(m)
            survivors += [m.name] if survived else []
            print(f"{'SURVIVED' if survived else 'noticed':9} {m.name:32} by {m.test}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
