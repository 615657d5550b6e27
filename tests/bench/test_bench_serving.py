"""bench/serving.py against a server that is not one: what is sent, what is counted, what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import generations
import numpy as np
import pytest
import serving
from fake_server import FakeServer, running
from http_client import Client
from workloads import Request


def run(fake: FakeServer, tmp_path: Path, *options: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    """Exit status and saved result of a run of serving.py."""
    file = tmp_path / "result.json"
    command = ["serving.py", "--base-url", fake.url, "--vocab-size", "1000", "--num-prompts", "6",
               "--random-input-len", "10", "--random-output-len", "5", "--save-result", "--save-detailed",
               "--result-dir", str(tmp_path), "--result-filename", file.name, *options]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    status = serving.main()
    return status, json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.parametrize(
    ("backend", "path", "options"),
    [
        ("openai", "/v1/completions", ()),
        ("openai-chat", "/v1/chat/completions", ("--tokenizer", "{tokenizer}")),
        ("sglang", "/generate", ()),
    ],
)
def test_every_api(
    backend: str, path: str, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with running(FakeServer()) as fake:
        options = tuple(option.format(tokenizer=tiny_tokenizer) for option in options)
        status, result = run(fake, tmp_path, "--backend", backend, *options, monkeypatch=monkeypatch)
    assert status == 0
    assert fake.paths == [path] * 6
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 30)
    assert (result["model_id"], result["backend"], result["request_rate"]) == ("fake", backend, "inf")
    assert result["total_cached_tokens"] == 18
    assert [len(itl) for itl in result["itls"]] == [4] * 6
    assert {text.strip() for text in result["generated_texts"]} == {"word word word word word"}
    assert result["client_cpu_us_per_token"] > 0
    assert "Successful requests:                     6" in capsys.readouterr().out
    body = fake.bodies[0]
    if backend == "openai":
        assert body == {
            "model": "fake", "prompt": body["prompt"], "max_tokens": 5, "stream": True,
            "stream_options": {"include_usage": True}, "ignore_eos": True,
        }  # fmt: skip
        assert len(body["prompt"]) == 10 and all(0 <= i < 1000 for i in body["prompt"])
        assert result["total_input_tokens"] == 60
    elif backend == "sglang":
        assert len(body["input_ids"]) == 10
        assert body["sampling_params"] == {"max_new_tokens": 5, "ignore_eos": True}
    else:
        assert body["messages"][0]["role"] == "user" and body["max_completion_tokens"] == 5


def test_requests_that_fail_are_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = ("http", "error", "cut", "early", "plain", "garbage", "empty", None)
    with running(FakeServer(lambda i: faults[i])) as fake:
        options = ("--num-prompts", "8", "--max-concurrency", "1")
        status, result = run(fake, tmp_path, *options, monkeypatch=monkeypatch)
    assert status == 0
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (1, 7, 5)
    for error, words in zip(
        result["errors"],
        ("HTTP 503 Service Unavailable: no room", "the model fell over", "closed the connection in the middle",
         "broke off", "an event stream was asked for", "ValidationError", "ended without a token", ""),
        strict=True,
    ):  # fmt: skip
        assert words in error and bool(words) == bool(error)
    errors = capsys.readouterr().err
    assert "7 requests failed; the first 5:" in errors and "no room" in errors
    assert result["output_lens"] == [0] * 7 + [5]


def test_all_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(FakeServer(lambda i: "http")) as fake:
        status, result = run(fake, tmp_path, monkeypatch=monkeypatch)
    assert (status, result["completed"], result["failed"]) == (1, 0, 6)


def test_no_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(FakeServer(usage=False)) as fake:
        status, result = run(fake, tmp_path, monkeypatch=monkeypatch)
    assert (status, result["total_output_tokens"], result["total_input_tokens"]) == (0, 30, 60)
    assert result["total_cached_tokens"] is None


def test_concurrency_key_and_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--max-concurrency", "2", "--api-key", "secret", "--temperature", "0.5", "--no-ignore-eos",
               "--extra-body", '{"x": [1]}', "--metadata", "version=7", "--goodput", "ttft:60000", "--header", "X-A=b",
               "--percentile-metrics", "ttft", "--metric-percentiles", "50,99.9")  # fmt: skip
    with running(FakeServer()) as fake:
        status, result = run(fake, tmp_path, *options, monkeypatch=monkeypatch)
    assert status == 0
    assert fake.most_running == 2
    assert result["max_concurrency"] == 2 and result["version"] == "7"
    assert fake.bodies[0]["temperature"] == 0.5 and fake.bodies[0]["x"] == [1]
    assert "ignore_eos" not in fake.bodies[0]
    assert "Authorization: Bearer secret" in fake.heads[0] and "X-A: b" in fake.heads[0]
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    assert {"p50_ttft_ms", "p99.9_ttft_ms"} <= set(result) and "mean_itl_ms" not in result


def test_results_are_saved_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(FakeServer()) as fake:
        for _ in range(2):
            command = ["serving.py", "--base-url", fake.url, "--vocab-size", "9", "--num-prompts", "1", "--json",
                       "--random-input-len", "2", "--random-output-len", "2", "--append-result",
                       "--result-dir", str(tmp_path / "new"), "--result-filename", "all.jsonl"]  # fmt: skip
            monkeypatch.setattr(sys, "argv", command)
            assert serving.main() == 0
        monkeypatch.setattr(sys, "argv", [*command[:-3], str(tmp_path), "--save-result", "--max-concurrency", "3"])
        assert serving.main() == 0
    lines = [json.loads(line) for line in (tmp_path / "new" / "all.jsonl").read_text().splitlines()]
    assert [line["completed"] for line in lines] == [1, 1]
    assert not {"itls", "errors", "generated_texts"} & set(lines[0])
    assert len(list(tmp_path.glob("openai-infqps-concurrency3-fake-*.json"))) == 1


def test_warmups_are_other_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(FakeServer()) as fake:
        status, result = run(fake, tmp_path, "--num-warmups", "2", monkeypatch=monkeypatch)
    assert (status, result["completed"], len(fake.bodies)) == (0, 6, 8)
    prompts = [tuple(body["prompt"][:10]) for body in fake.bodies]
    assert len(set(prompts)) == 8 and len(fake.bodies[0]["prompt"]) == 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--base-url", "http://127.0.0.1:1", "--ready-check-timeout-sec", "0"), "no server answered"),
        (("--goodput", "itl:4"), "--goodput takes"),
        (("--dataset-name", "prefix_repetition", "--num-prompts", "3"), "at least the number of prefixes"),
        (("--dataset-name", "agents-taubench"), "agent traces are text"),
        (("--prompt-format", "text"), "text prompts need a tokenizer"),
        (("--tokenizer", "/nonexistent"), "/nonexistent"),
        (("--trace-scale", "0.001", "--dataset-name", "azure-conv", "--max-model-len", "1"), ""),
    ],
)
def test_runs_that_cannot_begin(
    options: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with running(FakeServer()) as fake:
        status, _ = run(fake, tmp_path, *options, monkeypatch=monkeypatch)
    assert status == 2 and fake.bodies == []
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--num-prompts=0", "--request-rate=0", "--burstiness=-1", "--max-concurrency=x", "--extra-body=[1]",
     "--extra-body={", "--metric-percentiles=101", "--percentile-metrics=ttft,x", "--header=a", "--seed=-1"],
)  # fmt: skip
def test_wrong_options(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving.parser().parse_args([option])
    assert option.split("=")[0] in capsys.readouterr().err


def test_no_tokenizer_and_no_vocabulary(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with running(FakeServer()) as fake:
        monkeypatch.setattr(sys, "argv", ["serving.py", "--base-url", fake.url])
        assert serving.main() == 2
    assert "give --tokenizer DIR, or --vocab-size N" in capsys.readouterr().err


def test_the_server_may_name_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Path
) -> None:
    fake = FakeServer()
    fake.cards = [{"id": "another"}, {"id": "its-name", "root": str(tiny_tokenizer)}]
    with running(fake):
        status, result = run(fake, tmp_path, "--model", "its-name", monkeypatch=monkeypatch)
        assert (status, result["model_id"], result["tokenizer_id"]) == (0, "its-name", str(tiny_tokenizer))
        assert isinstance(fake.bodies[-1]["prompt"], str)
        status, result = run(fake, tmp_path, "--model", "not-listed", monkeypatch=monkeypatch)
        assert (status, result["model_id"], result["tokenizer_id"]) == (0, "not-listed", None)
        fake.cards = []
        assert run(fake, tmp_path, monkeypatch=monkeypatch)[0] == 2


def test_an_interrupt_reports_what_has_ended(tmp_path: Path) -> None:
    """In a process of its own: signals go to its main thread."""
    script = Path(serving.__file__)
    # The sixth request hangs; the five before it have ended when it arrives, for they come one by one.
    arrived = Event()
    fake = FakeServer(lambda i: "hang" if i == 5 and (arrived.set() or True) else None)
    with running(fake):
        process = subprocess.Popen(
            [sys.executable, str(script), "--base-url", fake.url, "--vocab-size", "100", "--num-prompts", "6",
             "--random-input-len", "4", "--random-output-len", "3", "--max-concurrency", "1"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OPENAI_API_KEY": ""},
        )  # fmt: skip
        assert arrived.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: 5 of 6 requests had ended" in err
    assert "Successful requests:                     5" in out


# --- load
def test_arrivals() -> None:
    rng = np.random.default_rng(0)
    assert serving.arrival_times(3, float("inf"), 1.0, rng) == [0, 0, 0]
    assert serving.arrival_times(4, 2.0, float("inf"), rng) == pytest.approx([0.5, 1, 1.5, 2])
    times = np.array(serving.arrival_times(20000, 10.0, 1.0, rng))
    gaps = np.diff(times, prepend=0)
    assert times[-1] == pytest.approx(2000)
    assert (gaps > 0).all()
    # Exponential gaps: standard deviation and mean are the same; a shape of 4 halves it, one of 1/4 doubles it.
    for burstiness, ratio in ((1.0, 1.0), (4.0, 0.5), (0.25, 2.0)):
        gaps = np.diff(serving.arrival_times(20000, 10.0, burstiness, rng), prepend=0)
        assert gaps.std() / gaps.mean() == pytest.approx(ratio, rel=0.05)


async def test_requests_are_sent_at_their_times() -> None:
    fake = FakeServer()
    async with fake.listening() as url:
        todo = [(at, generations.Completion(Request([1], 1, 2))) for at in (0.0, 0.05, 0.1)]
        ended: list[None] = []
        client = Client(url)
        duration = await serving.run_load(todo, client, "m", {}, None, lambda: ended.append(None))
        client.close()
    sent = [generation.start_time - todo[0][1].start_time for _, generation in todo]
    assert sent[1] >= 0.045 and sent[2] >= 0.095 and duration >= 0.095
    assert len(ended) == 3 and all(generation.success for _, generation in todo)


async def test_an_error_in_the_client_is_not_swallowed() -> None:
    class Broken(generations.Completion):
        def event(self, payload: bytes, now: float) -> None:
            raise ZeroDivisionError

    async with FakeServer().listening() as url:
        client = Client(url)
        with pytest.raises(ExceptionGroup):
            await serving.run_load([(0.0, Broken(Request([1], 1, 2)))], client, "m", {}, None, lambda: None)
        client.close()


# --- events of the APIs
def feed(generation: generations.Generation, *events: Any) -> generations.Generation:
    for n, event in enumerate(events):
        generation.event(event if isinstance(event, bytes) else json.dumps(event).encode(), float(n))
    return generation


def test_chunks_without_a_choice_are_no_tokens() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    done = feed(
        generations.ChatCompletion(Request("x", 1, 2)),
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"reasoning_content": "hm"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
        {"choices": [{"delta": {"content": "é"}, "finish_reason": "stop"}], "unknown": {"a": [1]}},
        {"choices": [], "usage": usage},
        {"choices": []},
    )
    assert done.chunk_times == [0.0, 1.0, 2.0]
    assert done.text == "hmé"
    assert (done.prompt_tokens, done.output_tokens, done.cached_tokens) == (3, 2, None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ({"message": "no", "code": 400}, "no"), ("no", "no"), ({"error": {"message": "deep"}}, "deep"),
        ({"detail": [{"loc": 1}]}, '[{"loc": 1}]'), (None, "null"), ("x" * 900, "x..."),
    ],
)  # fmt: skip
def test_error_texts(error: Any, words: str) -> None:
    assert generations.error_text(error).endswith(words) and len(generations.error_text(error)) < 600


def test_models() -> None:
    assert generations.model_cards(b'{"data": [{"id": "a"}, {"id": "b"}]}') == [{"id": "a"}, {"id": "b"}]
    for wrong in (b"", b"[]", b'{"data": []}', b'{"data": [{"id": 1}]}', b'{"data": ["a"]}', b'{"data": 3}'):
        assert generations.model_cards(wrong) == []
