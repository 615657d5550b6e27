"""AsyncEngine and Engine from outside: prompts of every form, text, threads, interrupts, other people's loops."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fakes
import numpy as np
import pytest
import uvloop
from fakes import VOCAB, expected, loaded, run, settings

from sapwood import _core
from sapwood.engine import async_engine
from sapwood.engine.async_engine import AsyncEngine, Engine
from sapwood.engine.detokenizer import Detokenizer
from sapwood.engine.engine import EngineStats
from sapwood.errors import EngineDead, InvalidRequest
from sapwood.request import ChatPrompt, FinishReason, RequestOutput, SamplingParams

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

    def encode_chat(self, chat: ChatPrompt) -> list[int]:
        return self.encode("".join(m["content"] for m in chat.messages) + ("z" if chat.add_generation_prompt else ""))


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
            open_end = ChatPrompt(messages=[{"role": "user", "content": "abc"}], add_generation_prompt=False)
            assert (await engine.generate(open_end, params)).token_ids == want
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


def test_choices() -> None:
    """n choices of a prompt: each a request of its own, told apart by `choice`, all with the prompt's one seed."""

    async def main() -> None:
        model, engine = with_text()
        want = expected(model, [0, 1, 2], 4)
        async with engine:
            one = await engine.generate("abc", {"n": 3, "max_new_tokens": 4, "seed": 5}, request_id="r")
            assert [(o.request_id, o.index, o.choice, o.seed) for o in one] == [(f"r-{i}", 0, i, 5) for i in range(3)]
            assert all(o.token_ids == want for o in one)
            several = await engine.generate(["abc", "b"], [{"n": 2, "max_new_tokens": 4}, {"max_new_tokens": 2}])
            assert [(o.index, o.choice, len(o.token_ids)) for o in several] == [(0, 0, 4), (0, 1, 4), (1, 0, 2)]
            assert len({several[0].seed, several[1].seed}) == 1
            parts: dict[int, list[int]] = {}
            async for delta in engine.generate("abc", {"n": 3, "max_new_tokens": 4}, stream=True):
                parts.setdefault(delta.choice, []).extend(delta.token_ids)
            assert parts == {0: want, 1: want, 2: want}
            assert engine.stats().num_alive == 0

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


BAD_ARGUMENTS = [
    *(
        {"sampling_params": p}
        for p in (5, "abc", [5], (None, None), b"x", {5: 1}, {"top_k": "many"}, {"min_p": "\ud800"}, object())
    ),
    *({"priority": p} for p in (2**31 + 1, -(10**400), 1.5, True)),
    *({"timeout_s": t} for t in (float("inf"), float("nan"), 10**400, 0, -1.0, True, "1")),
    *({"request_id": i} for i in ("", 5)),
    {"cache_salt": 5},
]


@pytest.mark.parametrize("bad", BAD_ARGUMENTS, ids=[f"{next(iter(b))}-{i}" for i, b in enumerate(BAD_ARGUMENTS)])
def test_a_bad_argument_is_an_invalid_request(bad: dict[str, Any]) -> None:
    async def main() -> None:
        config = settings(schedule_policy="priority")
        async with AsyncEngine.from_loaded(loaded(config), config) as engine:
            with pytest.raises(InvalidRequest) as caught:
                await engine.generate([1], **bad)
            assert caught.value.param in (*bad, "5")  # the key 5 is taken for a sampling parameter's name
            assert engine.stats().num_requests == 0

    run(main())


def test_the_callers_array_is_not_kept() -> None:
    async def main() -> None:
        config = settings()
        model = loaded(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            ids = np.array([1, 2, 3], np.int32)
            task = asyncio.ensure_future(engine.generate(ids, {"max_new_tokens": 5}))
            await asyncio.sleep(0)  # checked, and waiting for a row
            assert engine.stats().num_waiting == 1
            ids[:] = VOCAB + 1
            assert (await task).token_ids == expected(model, [1, 2, 3], 5)
            assert (await engine.generate(np.arange(6)[::-2], {"max_new_tokens": 5})).token_ids == expected(
                model, [5, 3, 1], 5
            )

    run(main())


@pytest.mark.cpu_only("of a runner whose steps take a known time")
def test_the_first_failure_ends_a_list() -> None:
    async def main() -> None:
        config = settings()
        model = loaded(config, runner=_core.noop_runner(1, 2000, 0))
        async with AsyncEngine.from_loaded(model, config, Letters()) as engine:  # type: ignore[arg-type]
            # The long one is refused in its worker; the short one would go on for seconds.
            with pytest.raises(InvalidRequest, match="5000 tokens"):
                await engine.generate(["ab", "a" * 5000], {"max_new_tokens": 3000})
            assert engine.stats().num_steps < 2000
            assert engine.stats().num_alive == 0

    run(main())


def test_a_failed_submission_leaves_no_request() -> None:
    class Interrupt(BaseException):
        pass

    class Interrupted(Letters):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            if "?" in text:
                raise Interrupt
            return super().encode(text, add_special_tokens)

    async def main() -> None:
        _, engine = with_text(Interrupted())
        async with engine:
            with pytest.raises(Interrupt):
                await engine.generate(["ab", "c?"], request_id="id")
            assert engine.stats().num_alive == engine.stats().num_waiting == 0
            await engine.generate(["ab", "c"], {"max_new_tokens": 2}, request_id="id")

    run(main())


# --- start and shutdown


class Loading:
    """In place of the loader: waits until `ready` is set, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ready: bool = False) -> None:
        self.ready = threading.Event()
        self.count = 0
        self.models: list[SimpleNamespace] = []
        if ready:
            self.ready.set()
        monkeypatch.setattr(async_engine, "_load_model", self.load)

    def load(self, config: Any, progress: Any) -> SimpleNamespace:
        self.count += 1
        assert self.ready.wait(60)
        self.models.append(loaded(config))
        return self.models[-1]


def test_a_cancelled_caller_does_not_take_the_start_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loading = Loading(monkeypatch)
        engine = AsyncEngine("checksum", skip_tokenizer_init=True, page_size=16)
        first, second = (asyncio.ensure_future(engine.generate([i], {"max_new_tokens": 3})) for i in (1, 2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        third = asyncio.ensure_future(engine.generate([3], {"max_new_tokens": 3}))
        await asyncio.sleep(0)
        loading.ready.set()
        for i, task in ((2, second), (3, third)):
            assert (await task).token_ids == expected(loading.models[0], [i], 3)
        assert loading.count == 1
        await engine.shutdown()

    run(main())


def test_shutdown_waits_for_a_start_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loading = Loading(monkeypatch)
        engine = AsyncEngine("checksum", skip_tokenizer_init=True)
        starting = asyncio.ensure_future(engine.start())
        await asyncio.sleep(0)
        stopping = [asyncio.ensure_future(engine.shutdown()) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in (starting, *stopping))
        stopping.pop().cancel()
        loading.ready.set()
        with pytest.raises(EngineDead, match="shut down"):
            await starting
        await stopping.pop()
        assert engine.model is None

    run(main())


def test_a_cancelled_async_with_leaves_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loading = Loading(monkeypatch)
        engine = AsyncEngine("checksum", skip_tokenizer_init=True)

        async def enter() -> None:
            async with engine:
                pass

        task = asyncio.ensure_future(enter())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.01)
        loading.ready.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.model is None
        with pytest.raises(EngineDead, match="shut down"):
            await engine.start()

    run(main())


def test_a_failed_start_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        config = settings()
        model = loaded(config)
        engine = AsyncEngine.from_loaded(model, config)

        def full(*_: Any) -> None:
            raise OSError(28, "no space")

        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "add_reader", full)
            for _ in range(2):
                with pytest.raises(OSError, match="no space"):
                    await engine.start()
        async with asyncio.timeout(10):
            assert (await engine.generate([1], {"max_new_tokens": 3})).token_ids == expected(model, [1], 3)
        await engine.shutdown()

    run(main())


@pytest.mark.parametrize("started", [False, True])
def test_shutdown_lets_go_of_the_model(started: bool) -> None:
    class Executor:
        """Is there as long as its model is, and notes how often it was stopped."""

        def __init__(self, inner: Any) -> None:
            self.inner, self.num_stops = inner, 0

        def shutdown(self) -> None:
            self.num_stops += 1
            self.inner.shutdown()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    def make() -> tuple[Any, Any]:
        config = settings()
        model = loaded(config)
        model.executor = Executor(model.executor)
        return model, config

    async def main() -> None:
        model, config = make()
        executor, kept = model.executor, weakref.ref(model.executor)
        engine = AsyncEngine.from_loaded(model, config, Letters())  # type: ignore[arg-type]
        if started:
            await engine.generate("ab", {"max_new_tokens": 3}, timeout_s=100)
        await engine.shutdown()
        assert executor.num_stops == 1
        del model, executor
        gc.collect()
        assert kept() is None
        assert engine.model is None
        assert engine.tokenizer is None
        for look in (engine.stats, engine.trace, engine.flush_cache):
            with pytest.raises(EngineDead, match="shut down"):
                look()

    run(main())
    model, config = make()
    kept = weakref.ref(model.executor)
    engine = Engine.from_loaded(model, config)
    if started:
        engine.generate([1], {"max_new_tokens": 3})
    engine.shutdown()
    del model
    gc.collect()
    assert kept() is None
    assert engine.model is None


@pytest.mark.parametrize("own_process", [False, True])
def test_only_a_process_of_its_own_is_frozen(own_process: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Loading(monkeypatch, ready=True)
    assert gc.get_freeze_count() == 0
    with Engine("checksum", skip_tokenizer_init=True, **({"own_process": True} if own_process else {})) as engine:
        engine.generate([1], {"max_new_tokens": 3})
        engine.wait_idle()
        assert (gc.get_freeze_count() > 0) == own_process
    assert gc.get_freeze_count() == 0


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


@pytest.mark.cpu_only("of a runner whose steps take a known time")
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


def test_an_interrupt_around_a_streams_submission_aborts_it() -> None:
    _, engine = make_engine()
    call, late = engine._call, []

    def after(coroutine: Any) -> None:
        call(coroutine)
        raise KeyboardInterrupt

    def before(coroutine: Any) -> None:
        late.append(coroutine)
        raise KeyboardInterrupt

    with engine:
        for interrupted in (after, before):
            engine._call = interrupted  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                next(engine.generate([1], {"max_new_tokens": 4000}, stream=True))
        engine._call = call  # type: ignore[method-assign]
        engine._call(late.pop())  # posted, but not run, when the interrupt came
        engine.wait_idle()
        assert engine.stats().num_requests == 1
        assert engine.stats().num_steps < 4000


def test_an_interrupted_shutdown_can_be_repeated() -> None:
    model, engine = make_engine()
    shutdown, num_calls = model.executor.shutdown, 0

    class Executor:
        def shutdown(self) -> None:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 1:
                raise KeyboardInterrupt
            shutdown()

    model.executor = Executor()
    with pytest.raises(KeyboardInterrupt):
        engine.shutdown()
    with pytest.raises(EngineDead, match="shut down"):
        engine.generate([1])
    engine.shutdown()
    engine.shutdown()
    assert num_calls == 2
    assert not [t for t in threading.enumerate() if t.name == "sapwood-engine"]


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("when", ["before the post", "before its turn"])
def test_a_call_beside_a_shutdown_is_answered(
    new_loop: Callable[[], Any], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "_new_event_loop", new_loop)
    _, engine = make_engine()
    answers: list[Any] = []
    post = asyncio.run_coroutine_threadsafe

    def shut_down_first(coroutine: Any, loop: Any) -> Any:
        thread = threading.Thread(target=engine.shutdown, daemon=True)
        thread.start()
        thread.join(0.2)  # nothing else waits for this call
        return post(coroutine, loop)

    def stop_first(coroutine: Any, loop: Any) -> Any:
        posted = threading.Event()

        def stop() -> None:
            loop.stop()
            answers.append(post(coroutine, loop))
            posted.set()

        loop.call_soon_threadsafe(stop)
        posted.wait()
        return answers.pop()

    def client() -> None:
        try:
            answers.append(engine.generate([1], {"max_new_tokens": 4000}))
        except BaseException as error:
            answers.append(error)

    patched = shut_down_first if when == "before the post" else stop_first
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", patched)
    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert [type(answer) for answer in answers] == [EngineDead]
    engine.shutdown()


def test_engine_collected_or_left_at_exit_ends_quietly() -> None:
    _, engine = make_engine()
    engine.generate([1], {"max_new_tokens": 2})
    del engine
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name == "sapwood-engine" and t.is_alive()]
    code = (
        "import sys; sys.path.insert(0, {here!r})\n"
        "import fakes; from fakes import settings, loaded\n"
        "from sapwood.engine.async_engine import Engine\n"
        "{on_device}"
        "config = settings()\n"
        "engine = Engine.from_loaded(loaded(config), config)\n"
        "stream = engine.generate([1], {{'max_new_tokens': 4000}}, stream=True)\n"
        "next(stream)\n"
        "print('left')\n"
    )
    on_device = ""
    if fakes.ON_CUDA is not None:
        library = fakes.ON_CUDA[0]._library._name
        on_device = (
            "from pathlib import Path; from sapwood.program.cuda_library import CudaLibrary\n"
            f"fakes.ON_CUDA = CudaLibrary(Path({library!r})), {fakes.ON_CUDA[1]!r}\n"
        )
    code = code.format(here=__file__.rpartition("/")[0], on_device=on_device)
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
