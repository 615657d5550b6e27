"""The public API end to end with a real trained checkpoint: text in, the known story out.

Known from float32, in which device "cpu" computes here. Device "cuda" has bfloat16: there a story is known once it has
been told alone, in the deterministic mode, and is then the same whatever the settings and whoever else asks.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import uvloop
from fakes import Device

from sapwood import AsyncEngine, Engine, SamplingParams
from sapwood.errors import InvalidRequest, SapwoodError
from sapwood.request import FinishReason

GREEDY = SamplingParams(temperature=0, max_new_tokens=160)

pytestmark = pytest.mark.slow_emulated


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> Path:
    return data_dir / "checkpoints" / "stories260K"


@pytest.fixture(scope="module")
def options(device: Device) -> dict[str, Any]:
    """Of an engine on the device."""
    if device.name == "cpu":
        return {"dtype": "float32"}
    return {"device": "cuda", "dtype": "bfloat16", "enable_deterministic_inference": True}


@pytest.fixture(scope="module")
def engine(stories: Path, options: dict[str, Any]):
    with Engine(str(stories), max_total_tokens=8192, **options) as engine:
        yield engine


@pytest.fixture(scope="module")
def cases(stories: Path, options: dict[str, Any], device: Device) -> list[dict]:
    """Prompts and their greedy stories: `prompt`, `input_ids`, `greedy_ids`, `text`; of one of them `first_logits`."""
    cases = json.loads((stories / "golden.json").read_text())["cases"]
    if device.name == "cpu":
        return cases
    with Engine(str(stories), max_total_tokens=1024, disable_radix_cache=True, **options) as alone:
        for case in cases:
            output = alone.generate(case["input_ids"], GREEDY)
            # bfloat16 may part from float32 where two tokens are nearly as likely, and not at once.
            assert output.token_ids[:4] == case["greedy_ids"][:4]
            case |= {"greedy_ids": output.token_ids, "text": output.text}
    return cases


def test_four_stories_from_text(engine: Engine, cases: list[dict]) -> None:
    outputs = engine.generate([case["prompt"] for case in cases if case["prompt"]], GREEDY)
    for output, case in zip(outputs, [c for c in cases if c["prompt"]], strict=True):
        assert output.token_ids == case["greedy_ids"]
        assert output.text == case["text"]
        assert output.finish_reason == FinishReason.LENGTH
        assert output.usage.prompt_tokens == len(case["input_ids"])
        assert output.usage.completion_tokens == 160


def test_choices_of_one_seed_differ_and_can_be_repeated(engine: Engine) -> None:
    first, again = [
        [o.token_ids for o in engine.generate("Once upon a time", SamplingParams(n=4, max_new_tokens=24, seed=3))]
        for _ in range(2)
    ]
    assert first == again
    assert len({tuple(ids) for ids in first}) == 4


def test_streamed_text_is_the_text(engine: Engine, cases: list[dict]) -> None:
    for case in cases:
        deltas = list(engine.generate(case["input_ids"], GREEDY, stream=True))
        assert "".join(d.text for d in deltas) == case["text"]
        assert [t for d in deltas for t in d.token_ids] == case["greedy_ids"]
        assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == FinishReason.LENGTH


@pytest.mark.parametrize(
    "settings",
    [{"disable_overlap_schedule": True}, {"page_size": 64}, {"disable_radix_cache": True}, {"prefix_cache": "flat"}],
)
def test_tokens_do_not_depend_on_settings(
    stories: Path, options: dict[str, Any], cases: list[dict], settings: dict
) -> None:
    with Engine(str(stories), **options, max_total_tokens=8192, **settings) as engine:
        for _ in range(2):
            for output, case in zip(engine.generate([c["input_ids"] for c in cases], GREEDY), cases, strict=True):
                assert output.token_ids == case["greedy_ids"]


@pytest.mark.slow_emulated(False)
def test_second_time_hits_the_cache(engine: Engine, device: Device) -> None:
    greedy = SamplingParams(temperature=0, max_new_tokens=4 if device.emulated else 160)
    prompt = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    engine.flush_cache()
    first = engine.generate(prompt, greedy)
    second = engine.generate(prompt, greedy)
    assert first.usage.cached_tokens == 0
    page = 16
    assert second.usage.cached_tokens == (second.usage.prompt_tokens - 1) // page * page > 0
    assert second.text == first.text


def test_seed_names_an_answer(engine: Engine) -> None:
    sample = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=40, seed=11)
    one, two = engine.generate(["Once upon a time"] * 2, sample)
    other = engine.generate("Once upon a time", SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=40, seed=12))
    assert one.token_ids == two.token_ids != other.token_ids
    drawn = engine.generate("Once upon a time", SamplingParams(temperature=1.0, max_new_tokens=40))
    again = engine.generate("Once upon a time", SamplingParams(temperature=1.0, max_new_tokens=40, seed=drawn.seed))
    assert drawn.token_ids == again.token_ids


def test_stop_string_and_stop_id(engine: Engine, cases: list[dict]) -> None:
    case = cases[1]
    output = engine.generate(
        case["prompt"], SamplingParams(temperature=0, max_new_tokens=160, stop=["named Lily", "zebra"])
    )
    assert output.finish_reason == FinishReason.STOP
    assert output.matched_stop == "named Lily"
    assert output.text == case["text"][: case["text"].index("named Lily")]
    stop_id = case["greedy_ids"][9]
    first = case["greedy_ids"].index(stop_id)
    output = engine.generate(
        case["prompt"], SamplingParams(temperature=0, max_new_tokens=160, stop_token_ids=[stop_id])
    )
    assert output.finish_reason == FinishReason.STOP
    assert output.matched_stop == stop_id
    assert output.token_ids == case["greedy_ids"][: first + 1]


def test_context_length_ends_the_story(engine: Engine) -> None:
    output = engine.generate([1] + [403] * 480, SamplingParams(temperature=0, max_new_tokens=None, ignore_eos=True))
    assert output.usage.prompt_tokens + output.usage.completion_tokens == 512
    assert output.finish_reason == FinishReason.LENGTH


@pytest.mark.slow_emulated(False)
def test_streamed_choices_are_those_of_one_answer(engine: Engine) -> None:
    sample = SamplingParams(n=2, temperature=1.0, max_new_tokens=4, seed=3)
    whole = engine.generate("Once upon a time", sample)
    parts = {output.choice: "" for output in whole}
    for delta in engine.generate("Once upon a time", sample, stream=True):
        parts[delta.choice] += delta.text
    assert [parts[output.choice] for output in whole] == [output.text for output in whole]


@pytest.mark.parametrize(
    ("prompt", "params", "word"),
    [
        ([1] * 512, None, "context"),
        ([], None, "prompt"),
        ([1, 512], None, "512"),
        ([1, -1], None, "-1"),
        ([1, True], None, "prompt"),
        (b"bytes", None, "prompt"),
        ([1], {"temperatur": 1}, "temperature"),
        ([1], {"temperature": -1}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
        ([1], {"stop_token_ids": [512]}, "stop_token_ids"),
    ],
)
def test_bad_input_is_named(engine: Engine, prompt: object, params: dict | None, word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        engine.generate(prompt, params)
    assert engine.generate([1], GREEDY).token_ids  # nothing else is lost


@pytest.mark.cpu_only("no model runs")
def test_unknown_setting_and_missing_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="page_size"):
        Engine(str(tmp_path), page_sise=16)
    with pytest.raises(SapwoodError, match="config.json"):
        Engine(str(tmp_path)).generate("x")


def test_skip_tokenizer_init(stories: Path, options: dict[str, Any], cases: list[dict]) -> None:
    with Engine(str(stories), **options, skip_tokenizer_init=True, max_total_tokens=2048) as engine:
        output = engine.generate(cases[2]["input_ids"], GREEDY)
        assert output.token_ids == cases[2]["greedy_ids"]
        assert output.text == ""
        with pytest.raises(InvalidRequest, match="skip_tokenizer_init"):
            engine.generate("text needs a tokenizer")


def test_logprobs_are_the_models(engine: Engine, cases: list[dict], device: Device) -> None:
    import numpy as np

    case = cases[0]
    output = engine.generate(case["input_ids"], SamplingParams(temperature=0, max_new_tokens=1, return_logprob=True))
    logits = np.array(case["first_logits"])
    want = logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert output.logprobs == pytest.approx([want], abs=1e-4 if device.name == "cpu" else 5e-2)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_inside_somebody_elses_loop(stories: Path, options: dict[str, Any], cases: list[dict], run) -> None:
    async def main() -> None:
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        async with (
            AsyncEngine(str(stories), **options, max_total_tokens=4096) as one,
            AsyncEngine(str(stories), **options, max_total_tokens=4096) as two,  # twice in one process
        ):
            assert {s: signal.getsignal(s) for s in handlers} == handlers
            outputs = await asyncio.gather(*(e.generate(c["input_ids"], GREEDY) for c in cases for e in (one, two)))
            for i, case in enumerate(cases):
                assert outputs[2 * i].token_ids == outputs[2 * i + 1].token_ids == case["greedy_ids"]
            text = ""
            async for delta in one.generate(cases[3]["prompt"], GREEDY, stream=True):
                text += delta.text
            assert text == cases[3]["text"]

    run(main())


def test_cancelling_the_task_aborts_the_request(stories: Path, options: dict[str, Any], cases: list[dict]) -> None:
    async def main() -> None:
        async with AsyncEngine(str(stories), **options, max_total_tokens=4096) as engine:
            started = asyncio.Event()

            async def client() -> None:
                async for _ in engine.generate(
                    cases[0]["input_ids"], SamplingParams(max_new_tokens=400, ignore_eos=True), stream=True
                ):
                    started.set()

            tasks = [asyncio.create_task(client()) for _ in range(8)]
            await started.wait()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            output = await engine.generate(cases[0]["input_ids"], GREEDY)
            assert output.token_ids == cases[0]["greedy_ids"]
            assert engine.stats().num_running == 0

    asyncio.run(main())


def test_in_a_starlette_app(stories: Path, options: dict[str, Any], cases: list[dict]) -> None:
    import contextlib

    import httpx
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        async with AsyncEngine(str(stories), **options, max_total_tokens=4096) as engine:
            app.state.engine = engine
            yield

    async def story(request: Request) -> StreamingResponse:
        prompt = request.query_params["prompt"]

        async def pieces():
            async for delta in request.app.state.engine.generate(prompt, GREEDY, stream=True):
                yield delta.text

        return StreamingResponse(pieces(), media_type="text/plain")

    app = Starlette(routes=[Route("/story", story)], lifespan=lifespan)

    async def main() -> None:
        async with lifespan(app):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
                responses = await asyncio.gather(
                    *(client.get("/story", params={"prompt": c["prompt"]}) for c in cases[1:])
                )
                assert [r.text for r in responses] == [c["text"] for c in cases[1:]]

    asyncio.run(main())


def test_cli_writes_the_story(stories: Path, cases: list[dict], device: Device) -> None:
    if device.emulated:
        pytest.skip("a process of its own knows no emulated device")
    case = cases[1]
    command = [sys.executable, "-m", "sapwood", "generate", str(stories), case["prompt"]]
    settings = ["--max-new-tokens", "160", "--dtype", "float32"]
    if device.name == "cuda":
        settings[-1:] = ["bfloat16", "--device", "cuda", "--enable-deterministic-inference"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip("\n") == (case["prompt"] + case["text"]).rstrip("\n")
    missing = subprocess.run(
        [sys.executable, "-m", "sapwood", "generate", "/no/such/model", "x"], capture_output=True, text=True
    )
    assert missing.returncode == 2
    assert missing.stderr.startswith("sapwood: error:")
    assert "Traceback" not in missing.stderr


@pytest.mark.cpu_only("of the native executor's threads")
def test_threads_have_names(stories: Path) -> None:
    """Whoever looks at a busy server (top -H, perf, bench/server_cpu.py) sees what computes and what serves."""
    with Engine(str(stories), dtype="float32", max_total_tokens=1024, num_threads=3) as engine:
        engine.generate("Once", GREEDY)
        names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert "sapwood-exec" in names
    assert names.count("sapwood-compute") >= 2  # the executor's thread is the third
