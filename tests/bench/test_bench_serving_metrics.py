"""bench/serving_metrics.py and bench/server_cpu.py against figures computed by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import server_cpu
from generations import Completion, Generation
from serving_metrics import num_output_tokens, parse_goodput, peaks, percentile_name, summarize, table
from workloads import Request


def generation(
    start: float, chunks: list[float], *, tokens: int | None = None, prompt_tokens: int | None = None,
    cached: int | None = None, error: str = "", arrival: float | None = None,
) -> Generation:  # fmt: skip
    """A request sent at `start` whose chunks came at these times."""
    made = Completion(Request("x", 7, 5))
    made.start_time, made.chunk_times, made.output_tokens = start, chunks, tokens
    made.prompt_tokens, made.cached_tokens, made.error, made.ended = prompt_tokens, cached, error, True
    made.arrival_time = start if arrival is None else arrival
    return made


# Three tokens in three chunks; five tokens in three chunks; one token; a failure.
THREE = generation(10.0, [10.5, 10.6, 10.9], tokens=3, prompt_tokens=4, cached=2)
FIVE = generation(10.25, [11.25, 11.75, 12.25], tokens=5, prompt_tokens=8, cached=0, arrival=10.0)
ONE = generation(11.0, [11.1], tokens=1)
FAILED = generation(10.0, [10.3], tokens=9, prompt_tokens=100, error="it broke")
ALL = [THREE, FIVE, FAILED, ONE]


def test_a_request() -> None:
    assert THREE.ttft == pytest.approx(0.5)
    assert THREE.latency == pytest.approx(0.9)
    assert THREE.itl == pytest.approx([0.1, 0.3])
    assert ONE.itl == []
    nothing = generation(3.0, [])
    assert (nothing.ttft, nothing.latency, nothing.itl) == (0.0, 0.0, [])


def test_all_figures() -> None:
    result = summarize(ALL, 4.0, goodput={}, percentiles=(50.0, 99.0))
    assert (result["completed"], result["failed"], result["duration"]) == (3, 1, 4.0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (4 + 8 + 7, 3 + 5 + 1)
    assert result["total_cached_tokens"] == 2
    assert result["request_throughput"] == pytest.approx(3 / 4)
    assert result["output_throughput"] == pytest.approx(9 / 4)
    assert result["total_token_throughput"] == pytest.approx(28 / 4)
    assert result["request_goodput"] is None
    # TTFT 500, 1000, 100.
    assert result["mean_ttft_ms"] == pytest.approx(1600 / 3)
    assert result["median_ttft_ms"] == pytest.approx(500)
    assert result["std_ttft_ms"] == pytest.approx((((500**2 + 1000**2 + 100**2) / 3) - (1600 / 3) ** 2) ** 0.5)
    assert result["p50_ttft_ms"] == pytest.approx(500)
    assert result["p99_ttft_ms"] == pytest.approx(500 + 0.98 * 500)
    # TPOT: 400 / 2 and 1000 / 4; the request of one token has none.
    assert result["mean_tpot_ms"] == pytest.approx((200 + 250) / 2)
    # ITL, pooled: 100, 300, 500, 500.
    assert result["mean_itl_ms"] == pytest.approx(350)
    assert result["median_itl_ms"] == pytest.approx(400)
    # E2EL 900, 2000, 100.
    assert result["mean_e2el_ms"] == pytest.approx(1000)
    assert result["input_lens"] == [4, 8, 100, 7]
    assert result["output_lens"] == [3, 5, 0, 1]
    assert result["errors"] == ["", "", "it broke", ""]
    assert result["queue_times"] == pytest.approx([0, 0.25, 0, 0])
    assert result["itls"][1] == pytest.approx([0.5, 0.5])


def test_peaks() -> None:
    # From 10.0 on, seconds: chunks at 10.5 10.6 10.9 | 11.1 11.25 11.75 | 12.25.
    assert peaks([THREE, FIVE, ONE]) == (3.0, 2)
    assert peaks([]) == (0.0, 0)
    burst = generation(0.0, [0.9, 1.0, 1.1, 1.2, 1.3])
    assert peaks([burst]) == (4.0, 1)
    # Requests count in every second that they touch.
    assert peaks([generation(0.0, [0.2]), generation(0.5, [0.9]), generation(0.8, [3.0])]) == (2.0, 3)


def test_goodput() -> None:
    def good(**limits: float) -> float:
        return float(summarize(ALL, 1.0, goodput=limits)["request_goodput"])

    assert good(ttft=500.001) == 2
    assert good(ttft=499) == 1
    assert good(ttft=5000) == 3  # a failed request is never good
    assert good(tpot=249) == 2  # one token: any limit on TPOT is met
    assert good(e2el=900.001, tpot=199) == 1
    assert good(ttft=5000, tpot=5000, e2el=5000) == 3


def test_tokens_without_usage() -> None:
    silent = generation(0.0, [1.0, 2.0])
    silent._texts = ["a b", " c"]  # type: ignore[attr-defined]
    assert num_output_tokens(silent, None) == 2
    assert num_output_tokens(silent, lambda text: len(text.split())) == 3


def test_every_request_failed() -> None:
    result = summarize([FAILED], 2.0, goodput={"ttft": 100})
    assert (result["completed"], result["failed"], result["request_goodput"]) == (0, 1, 0.0)
    assert result["mean_ttft_ms"] == result["p99_itl_ms"] == 0.0
    assert result["total_cached_tokens"] is None
    assert "Failed requests:                         1" in table(result, ["ttft", "itl"], [99.0])


def test_the_keys_are_those_of_vllm() -> None:
    """As `vllm bench serve --save-detailed` 0.32 writes them (of a text model, without speculative decoding)."""
    expected = {
        "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
        "request_goodput", "output_throughput", "total_token_throughput", "input_lens", "output_lens", "ttfts", "itls",
        "latencies", "start_times", "queue_times", "generated_texts", "errors", "max_output_tokens_per_s",
        "max_concurrent_requests",
    }  # fmt: skip
    for metric in ("ttft", "tpot", "itl", "e2el"):
        expected |= {f"{kind}_{metric}_ms" for kind in ("mean", "median", "std", "p99", "p99.9")}
    assert expected <= set(summarize(ALL, 1.0, goodput={}, percentiles=(99.0, 99.9)))


def test_table() -> None:
    result = summarize(ALL, 4.0, goodput={"ttft": 100}) | {"request_rate": 2.5, "max_concurrency": 4}
    result["client_cpu_us_per_token"] = 12.345
    result["server_cpu"] = {
        "compute_us_per_token": 1.0, "other_us_per_token": 2.0, "compute_percent": 90.0, "other_percent": 4.5,
    }  # fmt: skip
    text = table(result, ["ttft"], [99.0])
    for line in (
        "Successful requests:                     3",
        "Maximum request concurrency:             4",
        "Request rate configured (RPS):           2.50",
        "Request goodput (req/s):                 0.25",
        "Mean TTFT (ms):                          533.33",
        "P99 TTFT (ms):                           990.00",
        "Client CPU (us per output token):        12.3",
        "Server everything else (% of machine):   4.50",
    ):
        assert line in text
    assert "ITL" not in text


def test_parse_goodput() -> None:
    assert parse_goodput(["ttft:500", "e2el:0"]) == {"ttft": 500.0, "e2el": 0.0}
    for wrong in ("itl:5", "ttft", "ttft:x", "tpot:-1", "tpot:nan", "ttft:1:2"):
        with pytest.raises(ValueError, match="--goodput takes"):
            parse_goodput([wrong])


def test_percentile_name() -> None:
    assert [percentile_name(p) for p in (99.0, 99.9, 50.0)] == ["p99", "p99.9", "p50"]


# --- CPU of the server
TICK = 1 / os.sysconf("SC_CLK_TCK")


def write_process(proc: Path, pid: int, ticks: int, threads: dict[int, tuple[str, int]]) -> None:
    def stat(number: int, used: int) -> str:
        return f"{number} (a) b (c)) S 1 1 1 0 -1 4194560 9 0 0 0 {used - used // 3} {used // 3} 0 0 20 0 3 0 100 1 2 3"

    (proc / str(pid)).mkdir(exist_ok=True)
    (proc / str(pid) / "stat").write_text(stat(pid, ticks))
    for thread, (name, used) in threads.items():
        folder = proc / str(pid) / "task" / str(thread)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comm").write_text(name + "\n")
        (folder / "stat").write_text(stat(thread, used))


def test_server_cpu_by_thread_names(tmp_path: Path) -> None:
    write_process(tmp_path, 70, 1000, {70: ("sapwood", 100), 71: ("sapwood-compute", 300), 72: ("sapwood-exec", 500)})
    before = server_cpu.snapshot([70], tmp_path)
    # 170 ticks of the compute threads, a new one among them, in 200: 30 are others', some of a thread that has ended.
    threads = {
        70: ("sapwood", 120),
        71: ("sapwood-compute", 360),
        72: ("sapwood-exec", 600),
        73: ("sapwood-compute", 10),
    }
    write_process(tmp_path, 70, 1200, threads)
    result = server_cpu.used(before, server_cpu.snapshot([70], tmp_path), duration=10.0, num_tokens=100)
    assert result["named"]
    assert result["compute_s"] == pytest.approx(170 * TICK)
    assert result["other_us_per_token"] == pytest.approx(30 * TICK * 1e6 / 100)
    assert result["other_percent"] == pytest.approx(100 * 30 * TICK / (10 * (os.cpu_count() or 1)))


def test_server_cpu_without_names(tmp_path: Path) -> None:
    write_process(tmp_path, 70, 0, {70: ("python", 0), 71: ("python", 0)})
    write_process(tmp_path, 80, 0, {80: ("python", 0)})
    before = server_cpu.snapshot([70, 80], tmp_path)
    write_process(tmp_path, 70, 100, {70: ("python", 20), 71: ("python", 80)})
    write_process(tmp_path, 80, 5, {80: ("python", 5)})
    result = server_cpu.used(before, server_cpu.snapshot([70, 80], tmp_path), 1.0, 1)
    assert not result["named"]
    assert (result["compute_s"], result["other_s"]) == (pytest.approx(80 * TICK), pytest.approx(25 * TICK))


def test_server_cpu_of_nobody(tmp_path: Path) -> None:
    with pytest.raises(ProcessLookupError, match="no process 12"):
        server_cpu.snapshot([12], tmp_path)


def test_server_cpu_of_this_process() -> None:
    assert server_cpu.snapshot([os.getpid()]).total_s > 0
