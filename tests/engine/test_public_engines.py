"""AsyncEngine and Engine from outside: prompts of every form, text, threads, interrupts, other people's loops."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from fakes import VOCAB, expected, loaded, run, settings

from sapwood import _core
from sapwood.engine.async_engine import AsyncEngine, Engine
from sapwood.engine.detokenizer import Detokenizer
from sapwood.engine.engine import EngineStats
from sapwood.errors import EngineDead, InvalidRequest
from sapwood.request import FinishReason, RequestOutput, SamplingParams

ALPHABET = [chr(ord("a") + i) for i in range(26)] + [chr(0x400 + i) for i in range(VOCAB - 26)]


class Letters:
    """A tokenizer of one character a token; id 13 cannot be decoded when `brittle`, "!" cannot be encoded."""

    vocab_size = VOCAB
    eos_token_id = None
    bos_token_id = None

    def __init__(self, brittle: bool = False) -> None:
        self.brittle = brittle
        self.threads: set[str] = set()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > 1:  # the detokenizer encodes its anchor here
            self.threads.add(threading.current_thread().name)
        if "!" in text:
            raise RuntimeError("cannot encode '!'")
        return [ALPHABET.index(c) for c in text]

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        if self.brittle and 13 in ids:
            raise RuntimeError("cannot decode 13")
        return "".join(ALPHABET[i] for i in ids)

    def table(self, skip_special_tokens: bool) -> None:
        return None

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool = True, **_: Any) -> str:
        return "".join(m["content"] for m in messages) + ("z" if add_generation_prompt else "")


def text_of(ids: list[int]) -> str:
    return "".join(ALPHABET[i] for i in ids)


def with_text(tokenizer: Letters | None = None, **changes: Any) -> tuple[SimpleNamespace, AsyncEngine]:
    config = settings(**changes)
    model = loaded(config)
    return model, AsyncEngine.from_loaded(model, config, tokenizer or Letters())  # type: ignore[arg-type]


def test_prompts_of_every_form() -> None:
    async def main() -> None:
        model, engine = with_text()
        params = SamplingParams(max_new_tokens=6)
        want = expected(model, [0, 1, 2], 6)
        async with engine:
            text = await engine.generate("abc", params)
            assert isinstance(text, RequestOutput)
            assert text.token_ids == want
            assert text.text == text_of(want)
            for form in ([0, 1, 2], (0, 1, 2), range(3)):
                assert (await engine.generate(form, params)).token_ids == want
            chat = await engine.generate([{"role": "user", "content": "ab"}], params)
            assert chat.token_ids == expected(model, [0, 1, 25], 6)
            batch = await engine.generate(["abc", [0, 1, 2], [{"role": "user", "content": "ab"}]], params)
            assert [o.token_ids for o in batch] == [want, want, chat.token_ids]
            assert [o.index for o in batch] == [0, 1, 2]
            each = await engine.generate(["abc", "abc"], [{"max_new_tokens": 2}, SamplingParams(max_new_tokens=4)])
            assert [len(o.token_ids) for o in each] == [2, 4]
            parts: dict[int, str] = {}
            async for delta in engine.generate(["abc", "b"], params, stream=True):
                parts[delta.index] = parts.get(delta.index, "") + delta.text
            assert parts == {0: text_of(want), 1: text_of(expected(model, [1], 6))}
            for bad in ("", [], [[]], {"a": 1}, 5, None, [1.5], [True]):
                with pytest.raises(InvalidRequest, match="prompt"):
                    await engine.generate(bad)  # type: ignore[arg-type]
            assert engine.model is model
            assert engine.tokenizer is not None

    run(main())


def test_stop_string_over_the_api() -> None:
    async def main() -> None:
        model, engine = with_text()
        whole = text_of(expected(model, [0], 40))
        stop = whole[17:20]
        async with engine:
            output = await engine.generate("a", {"max_new_tokens": 40, "stop": [stop, "never seen"]})
            assert output.text == whole[: whole.index(stop)]
            assert output.matched_stop == stop
            assert output.finish_reason == FinishReason.STOP
            streamed = ""
            async for delta in engine.generate("a", {"max_new_tokens": 40, "stop": stop}, stream=True):
                streamed += delta.text
            assert streamed == output.text
            await engine.wait_idle()
        config = settings()
        async with AsyncEngine.from_loaded(loaded(config), config) as blind:
            with pytest.raises(InvalidRequest, match="skip_tokenizer_init"):
                await blind.generate([1], {"stop": "x"})
            with pytest.raises(InvalidRequest, match="skip_tokenizer_init"):
                await blind.generate("text")

    run(main())


def test_long_texts_are_encoded_in_a_worker_thread() -> None:
    async def main() -> None:
        tokenizer = Letters()
        model, engine = with_text(tokenizer)
        async with engine:
            await engine.generate("abc", {"max_new_tokens": 1})
            assert tokenizer.threads == {"MainThread"}
            tokenizer.threads.clear()
            long = "abcd" * 700
            output = await engine.generate(long, {"max_new_tokens": 3})
            assert output.token_ids == expected(model, [0, 1, 2, 3] * 700, 3)
            assert tokenizer.threads
            assert "MainThread" not in tokenizer.threads
            with pytest.raises(InvalidRequest, match="5000 tokens"):
                await engine.generate("a" * 5000)
            # Aborted while it is being tokenised.
            task = asyncio.ensure_future(engine.generate(long, request_id="gone"))
            await asyncio.sleep(0)
            assert engine.abort("gone")
            assert (await task).finish_reason == FinishReason.ABORT
            await engine.wait_idle()
            assert engine.stats().num_alive == 0

    run(main())


@pytest.mark.parametrize("long", [False, True])
def test_a_failing_tokenizer_ends_its_request_alone(long: bool) -> None:
    async def main() -> None:
        model, engine = with_text()
        async with engine:
            good, bad = await asyncio.gather(engine.generate("abc"), engine.generate("a!" * (2000 if long else 1)))
            assert good.token_ids == expected(model, [0, 1, 2], 128)
            assert bad.finish_reason == FinishReason.ABORT
            assert "cannot encode" in str(bad.error)
            assert bad.token_ids == []

    run(main())


def test_a_failing_detokenizer_ends_its_request_alone() -> None:
    async def main() -> None:
        model, engine = with_text(Letters(brittle=True))
        async with engine:
            starts = range(20)
            outputs = await engine.generate([[i] for i in starts], {"max_new_tokens": 30})
            num_bad = 0
            for start, output in zip(starts, outputs, strict=True):
                want = expected(model, [start], 30)
                if 13 in want:
                    num_bad += 1
                    assert output.finish_reason == FinishReason.ABORT
                    assert "cannot decode 13" in str(output.error)
                    assert output.text == text_of(want[: want.index(13)])
                else:
                    assert output.text == text_of(want)
            assert 0 < num_bad < 20
            await engine.wait_idle()
            assert engine.stats().pool[0].leased == 0

    run(main())


def test_seeds_are_drawn_and_reported() -> None:
    async def main() -> list[int]:
        config = settings(random_seed=7)
        async with AsyncEngine.from_loaded(loaded(config), config) as engine:
            outputs = await engine.generate([[1], [1], [1]], {"max_new_tokens": 1})
            assert (await engine.generate([1], {"max_new_tokens": 1, "seed": 2**64 - 1})).seed == 2**64 - 1
            return [o.seed for o in outputs]

    first, second = run(main()), run(main())
    assert first == second
    assert len(set(first)) == 3


def test_model_defaults_fill_what_a_mapping_leaves_out() -> None:
    async def main() -> None:
        config = settings()
        model = loaded(config)
        model.generation_defaults = {"temperature": 0.6, "top_k": 20, "unknown": 1}
        async with AsyncEngine.from_loaded(model, config) as engine:
            assert engine._resolve(None, model).temperature == 0.6
            assert engine._resolve({"top_p": 0.5}, model) == SamplingParams(temperature=0.6, top_k=20, top_p=0.5)
            assert engine._resolve({"temperature": 0}, model).temperature == 0
            assert engine._resolve(SamplingParams(), model) == SamplingParams()
            with pytest.raises(InvalidRequest, match="temperatur"):
                await engine.generate([1], {"temperatur": 1})

    run(main())


def test_belongs_to_its_loop() -> None:
    config = settings()
    engine = AsyncEngine.from_loaded(loaded(config), config)
    run(engine.start())
    with pytest.raises(InvalidRequest, match="another event loop"):
        run(engine.generate([1]))


def test_first_generate_starts_and_leaves_signals_alone() -> None:
    async def main() -> None:
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
        config = settings()
        model = loaded(config)
        engine = AsyncEngine.from_loaded(model, config)
        outputs = await asyncio.gather(*(engine.generate([i], {"max_new_tokens": 2}) for i in range(4)))
        assert [o.token_ids for o in outputs] == [expected(model, [i], 2) for i in range(4)]
        await engine.shutdown()
        assert {s: signal.getsignal(s) for s in before} == before

    run(main())


# --- the sync face


def make_engine(tokenizer: Any = None, **changes: Any) -> tuple[SimpleNamespace, Engine]:
    config = settings(**changes)
    model = loaded(config)
    return model, Engine.from_loaded(model, config, tokenizer)


def test_engine_generates_streams_and_shuts_down() -> None:
    model, engine = make_engine(Letters(), trace_capacity=10)
    with engine:
        want = expected(model, [0, 1], 9)
        output = engine.generate("ab", {"max_new_tokens": 9})
        assert (output.token_ids, output.text) == (want, text_of(want))
        deltas = list(engine.generate([0, 1], {"max_new_tokens": 9}, stream=True))
        assert [t for d in deltas for t in d.token_ids] == want
        assert "".join(d.text for d in deltas) == output.text
        assert [o.index for o in engine.generate([[1], [2]], {"max_new_tokens": 1})] == [0, 1]
        with pytest.raises(InvalidRequest):
            engine.generate([])
        with pytest.raises(InvalidRequest):
            list(engine.generate([VOCAB], stream=True))
        assert isinstance(engine.stats(), EngineStats)
        assert len(engine.trace()) == 10
        assert not engine.abort("unknown")
        engine.wait_idle()
        assert engine.flush_cache() >= 0
        assert engine.model is model
    engine.shutdown()
    for call in (lambda: engine.generate([1]), lambda: list(engine.generate([1], stream=True)), engine.stats):
        with pytest.raises(EngineDead, match="shut down"):
            call()
    assert not [t for t in threading.enumerate() if t.name == "sapwood-engine"]


def test_engine_serves_several_threads() -> None:
    model, engine = make_engine()
    wrong: list[object] = []

    def client(start: int) -> None:
        for i in range(5):
            prompt = [start, i]
            if i % 2:
                tokens = engine.generate(prompt, {"max_new_tokens": 12}).token_ids
            else:
                tokens = [t for d in engine.generate(prompt, {"max_new_tokens": 12}, stream=True) for t in d.token_ids]
            if tokens != expected(model, prompt, 12):
                wrong.append((prompt, tokens))

    with engine:
        threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert engine.stats().num_requests == 40


def test_leaving_a_sync_stream_aborts() -> None:
    _, engine = make_engine()
    with engine:
        for _ in engine.generate([1], {"max_new_tokens": 4000}, stream=True):
            break
        gc.collect()
        engine.wait_idle()  # well before 4000 steps
        assert engine.stats().num_steps < 4000
        assert engine.stats().num_running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_interrupt_aborts_the_request(stream: bool) -> None:
    config = settings()
    model = loaded(config, runner=_core.noop_runner(1, 2000, 0))
    engine = Engine.from_loaded(model, config)
    with engine:

        def interrupt() -> None:
            while engine.stats().num_steps < 3:
                pass
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            result = engine.generate([1], {"max_new_tokens": 4000}, stream=stream)
            for _ in result:
                pass
        thread.join()
        gc.collect()
        engine.wait_idle()
        assert engine.stats().num_steps < 2000
        assert engine.generate([1], {"max_new_tokens": 2}).token_ids == [1, 1]


def test_engine_collected_or_left_at_exit_ends_quietly() -> None:
    _, engine = make_engine()
    engine.generate([1], {"max_new_tokens": 2})
    del engine
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name == "sapwood-engine" and t.is_alive()]
    code = (
        "import sys; sys.path.insert(0, {here!r})\n"
        "from fakes import settings, loaded\n"
        "from sapwood.engine.async_engine import Engine\n"
        "config = settings()\n"
        "engine = Engine.from_loaded(loaded(config), config)\n"
        "stream = engine.generate([1], {{'max_new_tokens': 4000}}, stream=True)\n"
        "next(stream)\n"
        "print('left')\n"
    ).format(here=__file__.rpartition("/")[0])
    done = subprocess.run([sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


def test_engine_inside_a_running_loop() -> None:
    """A notebook cell runs inside a loop: the sync face works there too, on its own thread's loop."""

    async def main() -> None:
        model, engine = make_engine()
        with engine:
            assert engine.generate([3], {"max_new_tokens": 3}).token_ids == expected(model, [3], 3)

    run(main())
    run(main(), uvloop.run)


def test_failed_start_leaves_nothing_behind() -> None:
    config = settings()
    broken = loaded(config)
    broken.rope_mode = None
    broken.groups = []
    with pytest.raises(IndexError):
        Engine.from_loaded(broken, config)
    assert not [t for t in threading.enumerate() if t.name == "sapwood-engine"]


def test_detokenizer_is_what_the_engine_uses() -> None:
    tokenizer = Letters()
    detokenizer = Detokenizer(tokenizer, True)  # type: ignore[arg-type]
    assert "".join(detokenizer.push(i) for i in range(5)) + detokenizer.flush() == "abcde"
