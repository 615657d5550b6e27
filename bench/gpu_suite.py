"""Builds, checks and times the CUDA kernels, then device "cuda" as a whole, on a machine with a GPU:
`python bench/gpu_suite.py [--stage ...]`.

Stages, in order; a failure in one does not keep the next from running, but the exit status is 1 then:
    build   libsapwood_cuda.so with CMake and nvcc, for this GPU (left out where --lib names one): seconds, and each
            kernel's registers and spills; and sapwood._core, which the engine and the sampler's check need, where it is
            not installed. About 3 minutes on 16 cores
    check   every kernel against a torch fp64 reference (bench/gpu_checks/), each op in a process of its own. 2 minutes
    time    this GPU's ceilings (copy, read, bf16 product), then the cases of bench/gpu_timings.py: us, GB/s and
            TFLOP/s, as shares of the ceilings, next to torch and to the case's target. One process, too: where a case
            kills it, or takes 60 s, another goes on behind that case. 3 minutes
    host    what a step costs the host and how soon it hears of a step's end (bench/gpu_host.py). 2 minutes
    engine  device "cuda" against device "cpu", token by token (bench/gpu_tokens.py), then the speed of an 8B-shaped
            model (bench/gpu_engine.py) next to plain torch and transformers (bench/gpu_peers.py). 6 to 8 minutes
The minutes are estimates. host and engine run where they are asked for, one command each where commands have a limit:

    python bench/gpu_suite.py --out "$OUT"                             # build, check, time
    python bench/gpu_suite.py --stage host --out "$OUT"                # after build; build,host on a new machine
    python bench/gpu_suite.py --stage engine --out "$OUT"
    python bench/gpu_suite.py --stage engine --only tokens,speed       # cases of gpu_host.CASES and gpu_engine.CASES
    python bench/gpu_suite.py --stage time --only 'decode*,small_gemm'
    python bench/gpu_suite.py --stage check --sanitizer memcheck,racecheck --only attention

host and engine need msgspec and numpy, and take uvloop, flashinfer and transformers where they are; without a network,
`pip download` them elsewhere and put the unpacked wheels on PYTHONPATH. What is missing is named at the start.

After --budget-s nothing is started, and what was left out is named. --out gets results.json (a list, to which each
stage is appended), table.md and, where matplotlib is there, plot.png; of host and engine also STAGE.jsonl, each row as
it comes, and STAGE.log, what their processes said. Columns of time: target = the target over our time; others = their
time over ours (above 1 ours is faster); error = relative difference from the first of them.

--emulated LIB rehearses all but build on the CPU with the library that tests/cuda/ builds and small sizes; its times
mean nothing. Without torch, a GPU or (for build) nvcc it says so and exits with status 2.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from gpu_checks.device import Device
    from gpu_steps import Case

ROOT: Final = Path(__file__).resolve().parent.parent
STAGES: Final = ("build", "check", "time", "host", "engine")
KERNEL_STAGES: Final = STAGES[:3]
CASE_STAGES: Final = STAGES[3:]
CHECK_S: Final = 90.0  # for the checks of one op
CASE_S: Final = 60.0  # for one case of the time stage; the first also imports torch
JIT_S: Final = 240.0  # the same where FlashInfer is there, which compiles its kernels when they are first used
CHECK_JOBS: Final = 4
REHEARSAL_SCALE: Final = 64
# Packages that sapwood itself imports, without which there is neither host nor engine, and those that add rows there:
# another event loop, an attention backend, a peer.
REQUIRED: Final = ("numpy", "msgspec")
OPTIONAL: Final = ("uvloop", "flashinfer", "transformers")
# Each kind of kernel once, and quick under a sanitizer.
SANITIZED_OPS: Final = (
    "rms_norm", "rope_kv_write", "silu_mul", "small_gemm", "attention_plan", "attention", "attention_merge",
    "moe_route", "moe_align", "moe_gemm_small", "moe_gather", "moe_gemm", "moe_combine", "sample", "row_ops",
    "prepare_step", "commit_step",
)  # fmt: skip
SANITIZERS: Final = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_FOUND: Final = 99  # the exit status that compute-sanitizer is asked for

ENDED_WELL: Final = "exit status 0"
NO_TIME: Final = "no time was left"

Row = dict[str, Any]


class Budget:
    """Seconds that a stage may still take."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        return max(0.0, self._end - self._clock())


# --- Build ----------------------------------------------------------------------------------------------------
def build(tree: Path, archs: str, *, log: list[str] | None = None, strict: bool = True) -> Path:
    """Configures and builds libsapwood_cuda.so in `tree` for `archs` (CMAKE_CUDA_ARCHITECTURES); its path. Raises
    CalledProcessError where CMake or nvcc fails.

    log     receives the output, with what ptxas says of each kernel, instead of the terminal
    strict  warnings are errors
    """
    options = ["PYTHON=OFF", "TESTS=OFF", "CUDA=ON", f"CUDA_ARCHS={archs}", f"PYTHON_DIR={tree}",
               f"WERROR={'ON' if strict else 'OFF'}"]  # fmt: skip
    cmake(tree, "sapwood_cuda", options, log)
    return tree / "libsapwood_cuda.so"


def build_core(tree: Path, log: list[str]) -> Path:
    """sapwood._core for this Python, in a folder of `tree`. Raises CalledProcessError."""
    folder = tree / "package"
    options = ["PYTHON=ON", "TESTS=OFF", "CUDA=OFF", "CPU_LEVELS=native", "WERROR=OFF", f"PYTHON_DIR={folder}"]
    cmake(tree, "_core", options, log, f"-DPython_EXECUTABLE={sys.executable}")
    return folder


def cmake(tree: Path, target: str, options: Sequence[str], log: list[str] | None, *more: str) -> None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(tree), *(f"-DSAPWOOD_{o}" for o in options), *more]
    if log is not None:
        configure.append("-DCMAKE_CUDA_FLAGS=-Xptxas=-v")
    if shutil.which("ninja") and not (tree / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja"]  # which does not mix the outputs of compilers
    jobs = str(len(os.sched_getaffinity(0)))
    for command in (configure, ["cmake", "--build", str(tree), "--parallel", jobs, "--target", target]):
        if log is None:
            subprocess.run(command, check=True)
            continue
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        log.append(done.stdout)
        done.check_returncode()


def kernel_resources(log: str) -> list[Row]:
    """What `ptxas -v` says of each kernel; its name demangled where c++filt is there."""
    found: list[Row] = []
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            found.append({"kernel": entry[1], "arch": entry[2], "registers": 0, "spill_bytes": 0, "shared_bytes": 0})
        elif found and (spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            found[-1]["spill_bytes"] = int(spill[1]) + int(spill[2])
        elif found and (used := re.search(r"Used (\d+) registers", line)):
            found[-1]["registers"] = int(used[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                found[-1]["shared_bytes"] = int(shared[1])
    if found and shutil.which("c++filt"):
        names = "\n".join(row["kernel"] for row in found)
        done = subprocess.run(["c++filt"], input=names, capture_output=True, text=True)
        if done.returncode == 0:
            for row, name in zip(found, done.stdout.splitlines(), strict=True):
                short = re.sub(r"sapwood_cuda::|\(anonymous namespace\)::|\((bool|int)\)", "", name)
                row["kernel"] = re.sub(r"\(.*$", "", short.removeprefix("void "))
    return sorted(found, key=lambda row: str(row["kernel"]))


def build_stage(args: argparse.Namespace, archs: str) -> tuple[list[Row], bool]:
    """Rows of kernels, and whether the library is there."""
    begin, log, core_log = time.monotonic(), list[str](), list[str]()
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        core = None if has_core(None) else beside.submit(build_core, core_tree(args), core_log)
        try:
            library = build(args.tree.resolve(), archs, log=log, strict=False)
        except subprocess.CalledProcessError as error:
            print("".join(log)[-6000:])
            print(f"build: FAIL, {error.cmd[0]} exits with {error.returncode}")
            return [], False
        print(f"build: {library} for {archs}, {time.monotonic() - begin:.0f} s")
    for line in "".join(log).splitlines():
        if "CUTLASS" in line:  # which copy, or why a kernel is left out
            print(f"  {line.strip()}")
    rows = kernel_resources("".join(log))
    for row in rows:
        spilled = f", SPILLS {row['spill_bytes']} bytes" if row["spill_bytes"] else ""
        print(f"  {row['kernel'][:76]:76} {row['registers']:4} registers, {row['shared_bytes']} B shared{spilled}")
    if not rows:
        print("  nothing was compiled: it was built before")
    if core is not None and core.exception() is not None:
        print("".join(core_log)[-1500:])
        print("build: no sapwood._core (see above), so host, engine and the check of `sample` will fail")
    return rows, True


def core_tree(args: argparse.Namespace) -> Path:
    tree: Path = args.tree.resolve()
    return tree.with_name(f"{tree.name}-core")


def has_core(folder: Path | None) -> bool:
    """Whether sapwood._core can be imported; `folder`: where else it may lie."""
    import sapwood

    if folder is not None and folder.is_dir() and str(folder) not in sapwood.__path__:
        sapwood.__path__.append(str(folder))
    try:
        from sapwood import _core  # noqa: F401
    except ImportError:
        return False
    return True


# --- Children -------------------------------------------------------------------------------------------------
def child_command(args: argparse.Namespace, kind: str, *more: str) -> list[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", kind, "--tree", str(args.tree)]
    command += ["--emulated", str(args.emulated)] if args.emulated else ["--lib", str(library_of(args))]
    return [*command, *more]


def library_of(args: argparse.Namespace) -> Path:
    return Path(args.lib or args.tree / "libsapwood_cuda.so").resolve()


def open_device(args: argparse.Namespace) -> Device:
    from gpu_checks.device import Device

    from sapwood.program.cuda_library import CudaLibrary

    has_core(core_tree(args) / "package")
    if args.emulated:
        return Device(CudaLibrary(args.emulated.resolve()), "cpu")
    return Device(CudaLibrary(library_of(args)), "cuda")


def check_child(args: argparse.Namespace) -> int:
    """The checks of one op. The last line of stdout is JSON: cases and seconds, or the failure's text."""
    from gpu_checks import CHECKS

    begin = time.monotonic()
    try:
        result: Row = {"cases": CHECKS[args.only](open_device(args))}
    except Exception as error:  # whatever goes wrong is this op's result
        result = {"failure": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(result | {"s": round(time.monotonic() - begin, 1)}), flush=True)
    return 1 if "failure" in result else 0


def time_child(args: argparse.Namespace) -> int:
    """Times the cases that args.rows, a file of JSON lines, does not have yet, and appends them to it."""
    import gpu_timings
    import torch

    from sapwood.program.cuda_library import OPS

    budget, device, scale = Budget(args.budget_s), open_device(args), 1
    clock: gpu_timings.Clock
    if args.emulated:
        clock, scale, processors = gpu_timings.WallClock(), REHEARSAL_SCALE, 2
    else:
        clock = gpu_timings.GpuClock()
        processors = torch.cuda.get_device_properties(0).multi_processor_count
    known = read_rows(args.rows)
    started = {row["begin"] for row in known if "begin" in row}
    with args.rows.open("a", encoding="utf-8") as file:

        def tell(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        told = next((row["ceilings"] for row in known if "ceilings" in row), None)
        ceilings = gpu_timings.Ceilings(**told) if told else gpu_timings.measure_ceilings(device, clock, scale)
        if told is None:
            tell({"ceilings": vars(ceilings)})
        for case in gpu_timings.cases(processors, scale):
            if case.name in started or not matches(args.only, case.name, *case.ops):
                continue
            absent = [op for op in case.ops if op not in OPS]
            if absent:
                tell({"begin": case.name, "name": case.name, "skipped": f"no {', '.join(absent)}"})
                continue
            if budget.left() == 0:
                break
            tell({"begin": case.name})
            sets = 2 if args.emulated else case.num_sets()
            try:
                tell(gpu_timings.measure(case, device, clock, ceilings, sets, tell))
            except Exception as error:  # the case's result; after a sticky error this process is of no more use
                tell({"name": case.name, "failure": f"{type(error).__name__}: {error}"[:300]})
                if not args.emulated:
                    torch.cuda.synchronize()
            if not args.emulated:
                torch.cuda.empty_cache()
    return 0


def read_rows(path: Path) -> list[Row]:
    """A line that a dying process left unfinished is left out."""
    rows: list[Row] = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def run_within(seconds: float, command: Sequence[str], **env: str) -> subprocess.CompletedProcess[str] | None:
    """None where it took longer; it and what it started are killed then."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", process_group=0,
        env={**os.environ, **env},
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    return f"killed by {signal.Signals(-returncode).name}"


# --- Check ----------------------------------------------------------------------------------------------------
def check_stage(args: argparse.Namespace, budget: Budget, ops: Sequence[str]) -> list[Row]:
    """A row for each op, printed as it comes."""

    def check(op: str) -> Row:
        limit = min(CHECK_S, budget.left())
        if limit < 1:
            return {"op": op, "missing": NO_TIME}
        command = child_command(args, "check", "--only", op)
        begin = time.monotonic()
        done = run_within(limit, command)
        if done is None:
            return {"op": op, "failure": f"no result within {limit:.0f} s", "s": round(limit, 1)}
        try:
            result: Row = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            last = " / ".join(done.stderr.strip().splitlines()[-2:])
            seconds = round(time.monotonic() - begin, 1)
            return {"op": op, "failure": f"died, {how_it_ended(done.returncode)}: {last[-250:]}", "s": seconds}
        return {"op": op, **result}

    rows = []
    with concurrent.futures.ThreadPoolExecutor(1 if args.emulated else CHECK_JOBS) as pool:
        for row in pool.map(check, ops):
            rows.append(row)
            print(describe_check(row), flush=True)
    return rows


def describe_check(row: Row) -> str:
    if "missing" in row:
        return f"check: {row['op']}, NOT RUN: {row['missing']}"
    if "failure" in row:
        return f"check: {row['op']}, FAIL after {row['s']} s: {row['failure']}"
    return f"check: {row['op']}, {row['cases']} cases, {row['s']} s"


def sanitizer_stage(args: argparse.Namespace, budget: Budget, ops: Sequence[str]) -> list[Row]:
    """The checks of each op under each tool. torch's caching allocator is off: what lies behind a tensor is not
    another's."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("sanitizer: compute-sanitizer is not on the PATH, nothing was checked by it")
        return []

    def check(tool: str, op: str) -> Row:
        limit = min(CHECK_S, budget.left())
        if limit < 1:
            return {"op": op, "tool": tool, "missing": NO_TIME, "s": 0.0}
        command = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), "--print-limit", "5"]
        begin = time.monotonic()
        done = run_within(
            limit, [*command, *child_command(args, "check", "--only", op)], PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        row: Row = {"op": op, "tool": tool, "s": round(time.monotonic() - begin, 1)}
        if done is None:
            return row | {"missing": f"not done within {limit:.0f} s"}
        said = [line.lstrip("= ") for line in done.stdout.splitlines() if line.startswith("=========")]
        if done.returncode != 0:
            last = (done.stdout.splitlines() or [""])[-1]
            return row | {"failure": f"{how_it_ended(done.returncode)}: {' / '.join(said[1:6])[:400]} {last[:200]}"}
        return row | {"summary": said[-1] if said else "it said nothing"}

    rows = []
    with concurrent.futures.ThreadPoolExecutor(CHECK_JOBS) as pool:
        for row in pool.map(check, *zip(*((tool, op) for tool in args.sanitizer for op in ops), strict=True)):
            rows.append(row)
            print(describe_sanitized(row), flush=True)
    return rows


def describe_sanitized(row: Row) -> str:
    result = row.get("summary", "")
    for key, word in (("failure", "FAIL: "), ("missing", "NOT RUN: ")):
        result = word + row[key] if key in row else result
    return f"{row['tool']}: {row['op']}, {result}, {row['s']} s"


# --- Time -----------------------------------------------------------------------------------------------------
def time_stage(args: argparse.Namespace, budget: Budget, names: Sequence[str]) -> list[Row]:
    """{"ceilings": ...} first, then a row for each case."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        errors = Path(folder) / "stderr"
        begun: list[str] = []
        while budget.left() > 0:
            more = ["--rows", str(path), "--budget-s", str(budget.left())]
            more += ["--only", ",".join(args.only)] if args.only else []
            with errors.open("w") as stderr:
                process = subprocess.Popen(child_command(args, "time", *more), stderr=stderr)
            ended = watch(process, path, budget)
            if ended == ENDED_WELL:
                break
            rows, before = read_rows(path), len(begun)
            begun = [row["begin"] for row in rows if "begin" in row]
            told = {row["name"] for row in rows if "name" in row}
            last = " / ".join(errors.read_text(errors="replace").strip().splitlines()[-2:])[-250:]
            key, text = ("missing", NO_TIME) if ended == NO_TIME else ("failure", f"died, {ended}: {last}")
            dead = [name for name in begun if name not in told]
            if len(begun) == before:
                dead.append("(before the next case)")
            with path.open("a", encoding="utf-8") as file:
                for name in dead:
                    file.write("\n" + json.dumps({"name": name, key: text}) + "\n")
            if len(begun) == before:
                break
        rows = read_rows(path)
    found = {row["name"]: row for row in rows if "name" in row}
    others = [row for row in rows if "ceilings" in row or ("name" in row and row["name"] not in names)]
    return others + [found.get(name, {"name": name, "missing": "not reached"}) for name in names]


def watch(process: subprocess.Popen[bytes], path: Path, budget: Budget, case_s: float | None = None) -> str:
    """Waits for a child that writes to `path`; how it ended. It is killed where it writes nothing for case_s, or where
    the budget is used up."""
    if case_s is None:
        case_s = CASE_S if lacks("flashinfer") else JIT_S
    size, since = -1, time.monotonic()
    while True:
        try:
            return how_it_ended(process.wait(0.1))
        except subprocess.TimeoutExpired:
            pass
        now = path.stat().st_size if path.exists() else 0
        if now != size:
            size, since = now, time.monotonic()
        ended = NO_TIME if budget.left() == 0 else ""
        if time.monotonic() - since > case_s:
            ended = f"no result within {case_s:.0f} s"
        if ended:
            process.kill()
            process.wait()
            return ended


# --- Host and engine ------------------------------------------------------------------------------------------
def lacks(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def cases_of(stage: str) -> Sequence[Case]:
    """None where a package is missing that all of them need."""
    if any(lacks(name) for name in REQUIRED):
        return ()
    import gpu_engine
    import gpu_host

    return {"host": gpu_host.CASES, "engine": gpu_engine.CASES}.get(stage, ())


def missing_packages(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(those that host and engine need, those that only add rows)."""
    needed = [name for name in REQUIRED if lacks(name)]
    if not needed and not has_core(core_tree(args) / "package"):
        needed.append("sapwood._core (--stage build makes it)")
    return needed, [name for name in OPTIONAL if lacks(name)]


def case_stage(args: argparse.Namespace, stage: str, budget: Budget, cases: Sequence[Case]) -> list[Row]:
    """Each case in a process of its own, and in another one behind a measurement that kills it. Rows as they were
    told."""
    needed, optional = missing_packages(args)
    if needed or optional:
        print(f"{stage}: missing {', '.join([*needed, *optional])}", flush=True)
    if needed:
        return [{"name": "everything", "missing": f"no {', '.join(needed)}"}]
    path, log = args.out / f"{stage}.jsonl", args.out / f"{stage}.log"
    path.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as models:
        for case in cases:
            if case.package in optional:
                add_row(path, {"name": case.name, "skipped": f"{case.package} is not installed"})
                continue
            run_case(args, stage, case, budget, path, log, models)
    return [row for row in read_rows(path) if "name" in row or "ceilings" in row]


def run_case(
    args: argparse.Namespace, stage: str, case: Case, budget: Budget, path: Path, log: Path, models: str
) -> None:
    """Until a process ends well, the budget ends, or one dies where another would die, too."""
    while True:
        if budget.left() < 1:
            add_row(path, {"name": case.name, "missing": NO_TIME})
            return
        command = child_command(args, stage, "--only", case.name, "--rows", str(path), "--models", models)
        before = len(read_rows(path))
        with log.open("a") as file:
            print(f"--- {case.name}", file=file, flush=True)
            process = subprocess.Popen(command, stdout=file, stderr=file)
        ended = watch(process, path, budget, case.limit_s)
        rows = read_rows(path)[before:]
        finished = {row["end"] for row in rows if "end" in row}
        dead = [row["begin"] for row in rows if "begin" in row and row["begin"] not in finished]
        if ended != ENDED_WELL:
            last = " / ".join(log.read_text(errors="replace").strip().splitlines()[-2:])[-250:]
            key, text = ("missing", NO_TIME) if ended == NO_TIME else ("failure", f"died, {ended}: {last}")
            rows.append({"name": dead[0] if dead else f"{case.name}, outside its measurements", key: text})
            add_row(path, rows[-1])
        for row in rows:
            if "name" in row:
                print(f"{stage}: {describe_case(row)}", flush=True)
        if ended in (ENDED_WELL, NO_TIME) or not dead:
            return


def add_row(path: Path, row: Row) -> None:
    """On a line of its own, whatever a dying process has left."""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row) + "\n")


def case_child(args: argparse.Namespace) -> int:
    """Runs the case that --only names; its rows go to args.rows."""
    import gpu_steps

    case = next(case for case in cases_of(args.child) if case.name == args.only[0])
    device = open_device(args)
    emulated = args.emulated is not None
    bench = gpu_steps.Bench(device.library, args.rows, args.models, emulated=emulated, known=read_rows(args.rows))
    case.run(bench)
    return 0


def case_table(rows: Iterable[Row]) -> list[list[str]]:
    """Header and cells of host's and engine's tables."""
    table = [["what", "value", "unit", "target", "verdict", "note"]]
    for row in rows:
        if "name" not in row:
            continue
        value = format_value(row["value"]) if "value" in row else ""
        target = f"{row['wanted']} {row['target']:g}" if "target" in row else ""
        verdict = ("met" if row["met"] else "MISSED") if "met" in row else ""
        verdict = "FAIL" if "failure" in row else verdict
        note = row.get("note", "")
        for key, word in (("failure", ""), ("missing", "NOT RUN: "), ("skipped", "skipped: ")):
            note = word + row[key] if key in row else note
        table.append([row["name"], value, row.get("unit", ""), target, verdict, note])
    return table


def format_value(value: float) -> str:
    """Four digits."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def describe_case(row: Row) -> str:
    return "  ".join(filter(None, case_table([row])[1]))


def missed_targets(rows: Iterable[Row]) -> list[str]:
    """One line that names every target that was missed; none where there is none."""
    missed = [
        f"{row['name']} ({format_value(row['value'])}, {row['wanted']} {row['target']:g})" if "value" in row
        else f"{row['name']} ({row['note']})"
        for row in rows if row.get("met") is False
    ]  # fmt: skip
    return [f"TARGETS MISSED: {'; '.join(missed)}"] if missed else []


# --- What is written ------------------------------------------------------------------------------------------
def time_table(rows: Iterable[Row]) -> list[list[str]]:
    """Header and cells of the time stage's table."""
    table = [["case", "us", "GB/s", "of copy", "TFLOP/s", "of peak", "target", "others", "error", "note"]]
    for row in rows:
        if "name" not in row:
            continue
        note = row.get("note", "")
        for key, word in (("failure", "FAIL: "), ("missing", "NOT RUN: "), ("skipped", "skipped: ")):
            note = word + row[key] if key in row else note
        others = " ".join(f"{name} {ratio:.2f}x" for name, ratio in row.get("baselines", {}).items())
        cells = [row["name"]]
        for key, form in (("us", ".1f"), ("gbs", ".0f"), ("of_copy", ".2f"), ("tflops", ".1f"), ("of_peak", ".2f"),
                          ("of_target", ".2f")):  # fmt: skip
            cells.append(format(row[key], form) if key in row else "")
        table.append([*cells, others, f"{row['error']:.0e}" if "error" in row else "", note])
    return table


def aligned(table: Sequence[Sequence[str]]) -> str:
    """For a terminal: columns of equal width, the last one as long as it is."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        first = row[0].ljust(widths[0])
        middle = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([first, *middle, row[-1]]).rstrip())
    return "\n".join(lines)


def describe_ceilings(rows: Iterable[Row]) -> str:
    for row in rows:
        if "ceilings" in row:
            c = row["ceilings"]
            return (
                f"copy {c['copy'] / 1e9:.0f} GB/s (read + write), read {c['read'] / 1e9:.0f} GB/s, "
                f"bf16 product {c['matmul'] / 1e12:.0f} TFLOP/s"
            )
    return "no ceilings were measured"


def markdown(facts: Mapping[str, Any], results: Mapping[str, Sequence[Row]]) -> str:
    """All stages of this run."""
    parts = ["# CUDA kernels", ", ".join(f"{name}: {value}" for name, value in facts.items())]
    if "build" in results:
        parts.append("## Build")
        table = [["kernel", "arch", "registers", "spilled bytes", "shared bytes"]]
        keys = ("kernel", "arch", "registers", "spill_bytes", "shared_bytes")
        parts.append(pipes([*table, *([str(row[key]) for key in keys] for row in results["build"])]))
    if "check" in results:
        parts += ["## Check", "\n".join(f"- {describe_check(row)}" for row in results["check"])]
    if "sanitizer" in results:
        parts += ["## Sanitizer", "\n".join(f"- {describe_sanitized(row)}" for row in results["sanitizer"])]
    if "time" in results:
        parts += ["## Time", describe_ceilings(results["time"]), pipes(time_table(results["time"]))]
    for stage in CASE_STAGES:
        if stage in results:
            parts += [f"## {stage.capitalize()}", pipes(case_table(results[stage])), *missed_targets(results[stage])]
    return "\n\n".join(parts) + "\n"


def pipes(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in table]
    lines.insert(1, "|---" * len(table[0]) + "|")
    return "\n".join(lines)


def append_json(path: Path, record: Row) -> None:
    """To a list. A file that is no list of ours is not overwritten: ValueError."""
    records = json.loads(path.read_text("utf-8")) if path.exists() else []
    if not isinstance(records, list):
        raise ValueError(f"{path} is not a list of results")
    path.write_text(json.dumps([*records, record], indent=1) + "\n", "utf-8")


def plot(path: Path, title: str, rows: Sequence[Row]) -> bool:
    """Each case's share of the ceiling that bounds it, and where its target is; False without matplotlib or rows."""
    measured = [row for row in rows if "of_copy" in row or "of_peak" in row]
    try:
        import matplotlib
    except ImportError:
        return False
    if not measured:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(measured)))
    for at, row in enumerate(measured):
        memory, peak = row.get("of_copy", 0.0), row.get("of_peak", 0.0)
        share = max(memory, peak)
        axes.barh(at, share, color="tab:blue" if memory >= peak else "tab:orange")
        if "of_target" in row:
            axes.plot(share / row["of_target"], at, "k|", markersize=10)
    axes.set_yticks(range(len(measured)), [row["name"] for row in measured], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="grey", linewidth=0.5)
    axes.set_xlabel("share of the ceiling: blue copy bandwidth, orange bf16 product; | the target")
    axes.set_title(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def facts_of(args: argparse.Namespace) -> Row:
    """The machine and the programs."""
    import torch

    facts: Row = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts |= {"gpu": p.name, "processors": p.multi_processor_count, "memory_gb": round(p.total_memory / 1e9),
                  "l2_mb": round(p.L2_cache_size / 2**20)}  # fmt: skip
    for name, command in (
        ("nvcc", ["nvcc", "--version"]),
        ("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        ("commit", ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
    ):
        if shutil.which(command[0]) is not None:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.strip():
                facts[name] = done.stdout.strip().splitlines()[-1]
    if args.emulated:
        facts["gpu"] = f"none: a rehearsal on the CPU, sizes divided by {REHEARSAL_SCALE}"
    return facts


# --- The command line -----------------------------------------------------------------------------------------
def matches(only: Sequence[str] | None, *names: str) -> bool:
    """Whether one of the names is asked for; `only` may have * and ?."""
    return not only or any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in only)


def comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def choices(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """A type of argparse: a comma list of these."""

    def parse(text: str) -> list[str]:
        parts = comma_list(text)
        for part in parts:
            if part not in allowed:
                raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(allowed)}")
        if not parts:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(allowed)}")
        return parts

    return parse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--stage", type=choices(STAGES), default=list(KERNEL_STAGES), metavar="STAGES",
        help=f"comma list of {', '.join(STAGES)} (default: the first three)",
    )  # fmt: skip
    p.add_argument("--lib", type=Path, help="a libsapwood_cuda.so that is already built")
    p.add_argument("--tree", type=Path, default=ROOT / "build-cuda", help="CMake tree of the build stage")
    p.add_argument("--archs", help="CMAKE_CUDA_ARCHITECTURES of the build (default: this GPU's), or portable = 80-real")
    p.add_argument("--only", type=comma_list, help="ops, or cases of a stage, comma list; * and ? match")
    p.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results (default: %(default)s)")
    p.add_argument("--budget-s", type=float, default=520.0, help="seconds for everything (default: %(default)s)")
    p.add_argument(
        "--sanitizer", type=choices(SANITIZERS), default=[], metavar="TOOLS",
        help=f"runs checks (those of --only, or a few) under compute-sanitizer: {', '.join(SANITIZERS)}",
    )  # fmt: skip
    p.add_argument("--emulated", type=Path, metavar="LIB", help="rehearse on the CPU with this emulated library")
    p.add_argument("--child", choices=("check", "time", *CASE_STAGES), help=argparse.SUPPRESS)
    p.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    return p


def quit_without(what: str) -> NoReturn:
    print(f"gpu_suite: {what}; nothing was checked", file=sys.stderr)
    raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    sys.path.insert(0, str(ROOT / "python"))
    p = parser()
    args = p.parse_args(arguments)
    if args.child == "check":
        args.only = args.only[0]
        return check_child(args)
    if args.child == "time":
        return time_child(args)
    if args.child in CASE_STAGES:
        return case_child(args)

    if args.emulated:
        args.stage = [stage for stage in args.stage if stage != "build"]
    try:
        import torch
    except ImportError:
        quit_without("torch is missing (`pip install 'sapwood[cuda]'`)")
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not args.emulated and args.stage != ["build"]:
        quit_without("torch finds no CUDA GPU (--stage build works without one)")
    builds = "build" in args.stage and args.lib is None
    if builds and (shutil.which("nvcc") is None or shutil.which("cmake") is None):
        quit_without("nvcc and cmake are needed on the PATH to build; --lib names a library built elsewhere")
    if not builds and not (args.emulated or library_of(args)).exists():
        quit_without(f"{args.emulated or library_of(args)} does not exist (--stage build makes it)")

    ops, names = selected(args)
    cases = {stage: selected_cases(args, stage) for stage in CASE_STAGES if stage in args.stage}
    if not ops and not names and not any(cases.values()):
        p.error(f"--only {','.join(args.only)}: no such op or case; there are {', '.join(every_name(args))}")
    args.out.mkdir(parents=True, exist_ok=True)
    facts = facts_of(args)
    results: dict[str, list[Row]] = {}

    def keep(stage: str, rows: list[Row], begin: float) -> None:
        results[stage] = rows
        when = time.strftime("%Y-%m-%dT%H:%M:%S")
        seconds = round(time.monotonic() - begin, 1)
        append_json(args.out / "results.json",
                    {"stage": stage, "when": when, "s": seconds, "facts": facts, "rows": rows})  # fmt: skip
        (args.out / "table.md").write_text(markdown(facts, results), "utf-8")
        print(f"{stage}: {seconds} s", flush=True)

    print(", ".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    budget, begin = Budget(args.budget_s), time.monotonic()
    if builds:
        archs = "80-real" if args.archs == "portable" else args.archs
        if archs is None:
            major, minor = torch.cuda.get_device_capability() if has_gpu else (9, 0)
            archs = f"{major}{minor}{'a' if major == 9 else ''}-real"
        rows, built = build_stage(args, archs)
        keep("build", rows, begin)
        if not built:
            return 1
    if "check" in args.stage:
        begin = time.monotonic()
        keep("check", check_stage(args, budget, ops), begin)
    if args.sanitizer and ops:
        begin = time.monotonic()
        few = [op for op in ops if args.only or op in SANITIZED_OPS]
        keep("sanitizer", sanitizer_stage(args, budget, few), begin)
    if "time" in args.stage:
        begin = time.monotonic()
        rows = time_stage(args, budget, names)
        keep("time", rows, begin)
        if not plot(args.out / "plot.png", f"{facts.get('gpu')}: {describe_ceilings(rows)}", rows):
            print("time: no plot without matplotlib and rows")
        print(f"{describe_ceilings(rows)}\n{aligned(time_table(rows))}")
    for stage, chosen in cases.items():
        begin = time.monotonic()
        keep(stage, case_stage(args, stage, budget, chosen), begin)
        print(f"{stage}:\n{aligned(case_table(results[stage]))}")
    return summarise(results)


def selected(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Ops to check and names of cases to time, by --only."""
    import gpu_timings
    from gpu_checks import CHECKS

    ops = [op for op in CHECKS if matches(args.only, op)]
    return ops, [case.name for case in gpu_timings.cases() if matches(args.only, case.name, *case.ops)]


def selected_cases(args: argparse.Namespace, stage: str) -> list[Case]:
    return [case for case in cases_of(stage) if matches(args.only, case.name)]


def every_name(args: argparse.Namespace) -> list[str]:
    everything = argparse.Namespace(**{**vars(args), "only": None})
    ops, names = selected(everything)
    return [*ops, *names, *(case.name for stage in args.stage for case in selected_cases(everything, stage))]


def summarise(results: Mapping[str, Sequence[Row]]) -> int:
    """Prints what failed and what is missing; the exit status."""
    failed, missing = [], []
    for stage, rows in results.items():
        for row in rows:
            name = f"{stage} {row.get('tool', '')} {row.get('op') or row.get('name')}".replace("  ", " ")
            failed += [name] if "failure" in row else []
            missing += [name] if "missing" in row else []
    for line in missed_targets([row for rows in results.values() for row in rows]):
        print(line)
    if missing:
        print(f"NOT RUN: {', '.join(missing)}")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
