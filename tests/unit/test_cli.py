"""cli.py with an engine that only says what it was given; the real one is tests/engine's."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sapwood
from sapwood import cli
from sapwood.config import EngineConfig
from sapwood.errors import CapacityError, InvalidRequest
from sapwood.request import FinishReason, RequestOutput, SamplingParams, Usage

PYTHON_DIR = Path(cli.__file__).parent.parent


class FakeEngine:
    """Yields the words of `story`; records what it was asked."""

    story: tuple[str, ...] = (" there", " was", " a 🦙")
    made: list[FakeEngine] = []
    fails: BaseException | None = None
    fails_late: BaseException | None = None
    error: str | None = None

    def __init__(self, model: str, *, own_process: bool, **settings: Any) -> None:
        assert own_process  # the command line has the process to itself
        self.model, self.settings, self.closed = model, settings, False
        self.asked: list[tuple[Any, SamplingParams]] = []
        if type(self).fails is not None:
            raise type(self).fails
        self.made.append(self)

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def generate(self, prompt: Any, params: SamplingParams, stream: bool) -> Iterator[RequestOutput]:
        assert stream
        self.asked.append((prompt, params))
        for i, text in enumerate(self.story):
            last = i + 1 == len(self.story)
            reason = None if not last else FinishReason.ABORT if self.error else FinishReason.LENGTH
            yield RequestOutput("r", text, [i], reason, Usage(4, i + 1, 2), seed=7, error=self.error if last else None)
            if self.fails_late is not None:
                raise self.fails_late


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    for name in [name for name in os.environ if name.startswith("SAPWOOD_")]:
        monkeypatch.delenv(name)
    fake = type("Fake", (FakeEngine,), {"made": []})
    module = types.ModuleType("sapwood.engine.async_engine")
    module.Engine = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sapwood.engine.async_engine", module)
    return fake


def test_echo_then_the_continuation(engine: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "some/model", "Once upon a time"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("Once upon a time there was a 🦙\n", "")
    made = engine.made[0]
    assert (made.model, made.settings, made.closed) == ("some/model", {}, True)
    assert made.asked == [("Once upon a time", SamplingParams(temperature=0.0, max_new_tokens=256))]


def test_no_echo_chat_and_statistics(engine: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "m", "Hi", "--no-echo"]) == 0
    assert capsys.readouterr() == (" there was a 🦙\n", "")
    assert cli.main(["generate", "m", "Hi", "--chat", "-v"]) == 0
    out, err = capsys.readouterr()
    assert out == " there was a 🦙\n"
    assert engine.made[1].asked[0][0] == [{"role": "user", "content": "Hi"}]
    assert (
        err.startswith("sapwood: 4 prompt tokens (2 cached), 3 generated (length), load ")
        and "seed 7" in err
        and "tok/s" in err
    )


def test_every_field_is_a_flag_and_arrives(engine: type[FakeEngine]) -> None:
    flags = {
        "--temperature": "0.5",
        "--top-k": "-1",
        "--top-p": "0.9",
        "--min-p": "0.1",
        "--max-new-tokens": "none",
        "--min-new-tokens": "2",
        "--seed": "18446744073709551615",
        "--revision": "v1",
        "--tokenizer": "t",
        "--load-format": "dummy",
        "--dtype": "bfloat16",
        "--quantization": "int4",
        "--context-length": "64",
        "--device": "reference",
        "--max-total-tokens": "none",
        "--mem-fraction-static": "0.25",
        "--page-size": "32",
        "--kv-cache-dtype": "int8",
        "--prefix-cache": "flat",
        "--max-running-requests": "3",
        "--max-queued-requests": "0",
        "--schedule-policy": "lpm",
        "--priority-ageing-s": "1.5",
        "--chunked-prefill-size": "128",
        "--max-step-ms": "-1",
        "--request-timeout-s": "3",
        "--num-threads": "2",
        "--attention-backend": "flashinfer",
        "--cuda-graph-max-bs": "8",
        "--cpu-isa": "avx2",
        "--trace-capacity": "5",
        "--random-seed": "1",
    }
    arguments = [part for pair in flags.items() for part in pair]
    arguments += [
        "--stop",
        "a",
        "--stop",
        "-b c",
        "--stop-token-ids",
        "5",
        "--ignore-eos",
        "--no-skip-special-tokens",
        "--disable-radix-cache",
        "--disable-overlap-schedule",
        "--skip-lm-head-quantization",
        "--disable-cuda-graph",
        "--enable-deterministic-inference",
    ]
    assert cli.main(["generate", "m", "x", *arguments]) == 0
    params, settings = engine.made[0].asked[0][1], engine.made[0].settings
    assert params == SamplingParams(
        temperature=0.5,
        top_k=-1,
        top_p=0.9,
        min_p=0.1,
        max_new_tokens=None,
        min_new_tokens=2,
        stop=["a", "-b c"],
        stop_token_ids=[5],
        ignore_eos=True,
        seed=2**64 - 1,
        skip_special_tokens=False,
    )
    assert set(settings) == set(EngineConfig.__struct_fields__) - cli.NOT_FLAGS  # a new setting must be tried here
    assert EngineConfig.from_kwargs("m", **settings).max_step_ms == -1.0
    tried = {name.lstrip("-").removeprefix("no-").replace("-", "_") for name in arguments if name.startswith("--")}
    assert tried == (set(EngineConfig.__struct_fields__) | set(SamplingParams.__struct_fields__)) - cli.NOT_FLAGS


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--page-size N tokens a KV page; 16, 32 or 64 on CPU (default: 16)" in text
    assert "--temperature X >= 0; 0 is greedy (default: 0.0)" in text and "(default: 256)" in text
    assert "--no-skip-special-tokens do not: leave special tokens out" in text and " --skip-special-tokens" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "unknown command 'genrate'; did you mean generate?"),
        (["some/model"], "unknown command 'some/model'; did you mean sapwood serve some/model?"),
        (["generate"], "the following arguments are required: MODEL"),
        (["generate", "m", "x", "--temprature", "1"], "unknown option '--temprature'; did you mean --temperature?"),
        (["generate", "m", "x", "--max_new_tokens=3"], "did you mean --max-new-tokens?"),
        (
            ["generate", "m", "x", "--temp", "1"],
            "unknown option '--temp'",
        ),  # no abbreviations: they break when flags are added
        (["generate", "m", "x", "--zzzzzz"], "unknown option '--zzzzzz'; see sapwood generate --help"),
        (["generate", "m", "Once", "upon"], "unknown argument (quote a prompt of several words) 'upon'"),
        (["generate", "m", "x", "--", "y"], "unknown argument (quote a prompt of several words) 'y'"),
        (["generate", "m", "--seed", "1", "x", "y"], "unknown argument (quote a prompt of several words) 'y'"),
        (["generate", "m", "--sed", "1", "--", "x"], "unknown option '--sed'; did you mean --seed?"),
        (["generate", "m", "x", "--top-k", "many"], "argument --top-k: expected an integer, got 'many'"),
        (["generate", "m", "x", "--seed", "many"], "argument --seed: expected an integer or none, got 'many'"),
        (
            ["generate", "m", "x", "--dtype", "int4"],
            "argument --dtype: expected one of auto, bfloat16, float32, got 'int4'",
        ),
        (["generate", "m", "x", "--top-p", "3"], "--top-p must be in (0, 1], got 3.0"),
        (["generate", "m", "x", "--page-size", "65"], "--page-size must be 1..64, got 65"),
        (["generate", "m", "\udcff"], "the prompt is not valid UTF-8"),
    ],
)
def test_usage_errors(
    engine: type[FakeEngine], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sapwood: error: ") and err.count("\n") == 1 and message in err
    assert engine.made == []  # found before anything was loaded


def test_generate_reads_the_environment_too(engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPWOOD_NUM_THREADS", "3")
    monkeypatch.setenv("SAPWOOD_PORT", "8000")  # a server's: no concern of this command
    assert cli.main(["generate", "m", "x"]) == 0
    assert engine.made[0].settings == {"num_threads": 3}


def test_no_command_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.index("serve ") < err.index("generate ")
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr() == (err, "")


@pytest.mark.parametrize(("error", "code"), [(InvalidRequest("no\nsuch model"), 2), (CapacityError("full"), 1)])
def test_engine_errors(
    engine: type[FakeEngine], capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    engine.fails = error
    assert cli.main(["generate", "m", "x"]) == code
    assert capsys.readouterr() == ("", f"sapwood: error: {' '.join(str(error).split())}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["m", "PROMPT"],
        ["m", "PROMPT", "--seed", "3"],
        ["m", "--seed", "3", "PROMPT"],
        ["--seed", "3", "m", "PROMPT"],
        ["m", "--seed", "3", "--", "PROMPT"],
        ["m", "--", "PROMPT"],
    ],
)
@pytest.mark.parametrize("prompt", ["Once", "-5 degrees", "-5", "--seed"])
def test_the_prompt_may_stand_anywhere(engine: type[FakeEngine], arguments: list[str], prompt: str) -> None:
    if prompt == "--seed" and "--" not in arguments:
        return
    assert cli.main(["generate", *(prompt if word == "PROMPT" else word for word in arguments)]) == 0
    asked, params = engine.made[0].asked[0]
    assert (engine.made[0].model, asked) == ("m", prompt)
    assert params.seed == (3 if "3" in arguments else None)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
def test_what_the_machine_refuses_is_one_line(
    engine: type[FakeEngine], capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    engine.fails = error
    assert cli.main(["generate", "m", "x"]) == 1
    assert capsys.readouterr() == ("", f"sapwood: error: {' '.join(str(error).split()) or 'MemoryError'}\n")


def test_a_bug_keeps_its_traceback(engine: type[FakeEngine]) -> None:
    engine.fails = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["generate", "m", "x"])


def test_an_error_after_the_first_words(engine: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    engine.fails_late = CapacityError("full")
    assert cli.main(["generate", "m", "x"]) == 1
    assert capsys.readouterr() == ("x there\n", "sapwood: error: full\n")
    assert engine.made[0].closed


def test_an_aborted_request(engine: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    engine.error = "pool exhausted"
    assert cli.main(["generate", "m", "x"]) == 1
    assert capsys.readouterr() == ("x there was a 🦙\n", "sapwood: error: pool exhausted\n")


def test_interrupt(engine: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    engine.fails_late = KeyboardInterrupt()
    assert cli.main(["generate", "m", "x"]) == 130
    assert capsys.readouterr() == ("x there\n", "")
    assert engine.made[0].closed


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_prompt_from_stdin(
    engine: type[FakeEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    def stdin(data: bytes, tty: bool = False) -> None:
        stream = io.TextIOWrapper(io.BytesIO(data))
        monkeypatch.setattr(stream, "isatty", lambda: tty)
        monkeypatch.setattr(sys, "stdin", stream)

    stdin("Zwölf\n\n".encode())
    assert cli.main(["generate", "m", *arguments]) == 0
    assert engine.made[0].asked[0][0] == "Zwölf\n"
    stdin(b"ab\xff")
    assert cli.main(["generate", "m", *arguments]) == 2
    assert "standard input is not valid UTF-8 (byte 2)" in capsys.readouterr().err
    if not arguments:
        stdin(b"", tty=True)
        assert cli.main(["generate", "m"]) == 2
        assert "no prompt" in capsys.readouterr().err


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PYTHON_DIR)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **options)


def test_version_is_quick_and_imports_little() -> None:
    for flag in ("--version", "-V"):
        done = run("-m", "sapwood", flag)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"sapwood {sapwood.__version__}\n", "")
    script = "import sys, sapwood, sapwood.cli; sapwood.cli.main(['--version']); print(*sorted(sys.modules))"
    loaded = set(run("-c", script).stdout.split())
    assert not loaded & {
        "numpy",
        "msgspec",
        "tokenizers",
        "torch",
        "transformers",
        "asyncio",
        "sapwood._core",
        "sapwood.config",
    }
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run("-m", "sapwood", "--version")
        times.append(time.perf_counter() - start)
    assert min(times) < 0.15  # 25 ms on an idle core


def test_names_of_the_package_are_lazy() -> None:
    assert sapwood.SamplingParams is SamplingParams and sapwood.RequestOutput is RequestOutput
    assert sapwood.__version__ == "0.1.0"
    assert set(sapwood.__all__) <= set(dir(sapwood))
    with pytest.raises(AttributeError, match="'no_such'"):
        sapwood.no_such  # noqa: B018


STAND_IN = """
import sys, time, types, pathlib
sys.path.insert(0, {tests!r})
import test_cli
from sapwood import cli
class Fake(test_cli.FakeEngine):
    def generate(self, prompt, params, stream):
        assert open("/dev/null").fileno() > 2, "a file of the engine's became a standard stream"
        for _ in range({words}):
            yield test_cli.RequestOutput("r", "word " * 50, [1], None, test_cli.Usage(1, 1, 0))
            time.sleep({pause})
module = types.ModuleType("sapwood.engine.async_engine")
module.Engine = Fake
sys.modules["sapwood.engine.async_engine"] = module
sys.exit(cli.main(["generate", "m", "x"]))
"""


def stand_in(pause: float = 0, words: int = 100_000) -> str:
    return STAND_IN.format(tests=str(Path(__file__).parent), pause=pause, words=words)


def start_endless(pause: float) -> subprocess.Popen[bytes]:
    script = stand_in(pause)
    environment = {**os.environ, "PYTHONPATH": str(PYTHON_DIR)}
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    with start_endless(0) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(20).startswith(b"xword")
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141


def test_control_c_ends_it_quietly() -> None:
    with start_endless(0.01) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(20).startswith(b"xword")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (130, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_shell_closed(closed: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PYTHON_DIR)}
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, stand_in(words=2)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if ">&-" in closed.split() else "x" + "word " * 100 + "\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [["-c", stand_in()], ["-m", "sapwood", "--version"]])
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PYTHON_DIR)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert (done.returncode, done.stderr) == (1, "sapwood: error: [Errno 28] No space left on device\n")
