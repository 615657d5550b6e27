"""The public engines: AsyncEngine lives in the caller's event loop, Engine is its face for programs without one.

Receives prompts (text, token ids, messages, or lists of them) from applications and server/; turns them into tokens
(engine/tokenizer.py; long texts in a worker thread) and requests for engine/engine.py's StepLoop; hands RequestOutputs
back.

Neither touches signal handlers, event loop policies or global state; any number of them can live in one process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import difflib
import functools
import os
import queue
import random
import sys
import threading
import uuid
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np

from sapwood.config import EngineConfig
from sapwood.engine.engine import EngineStats, LoadedModel, StepLoop, StepRecord, as_prompt
from sapwood.engine.request_state import Ints, RequestState, Sink
from sapwood.errors import EngineDead, InvalidRequest
from sapwood.request import ChatPrompt, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from sapwood.engine.tokenizer import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message] | ChatPrompt
Params = SamplingParams | Mapping[str, Any] | None
PARAMS = (SamplingParams, Mapping, type(None))  # the same for isinstance

# Texts up to this length are encoded at once, in well under a millisecond; longer ones in a worker thread.
MAX_INLINE_CHARS = 2000
# Priorities become floats in the queue's order; integers of any size would not fit.
MAX_PRIORITY = 2**31
# Fields of generation_config.json that are defaults for sampling parameters given as a mapping or not at all.
MODEL_DEFAULTS = ("temperature", "top_k", "top_p", "min_p")


class _FutureSink:
    """Resolves with the final output."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[RequestOutput]) -> None:
        self.future = future

    def put(self, output: RequestOutput) -> None:
        if output.finish_reason is not None and not self.future.done():
            self.future.set_result(output)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            # Whoever awaits gets it; nobody may be left to, after a cancellation, and that is no news.
            self.future.exception()


class _Arguments(msgspec.Struct):
    """generate()'s arguments, one entry per prompt."""

    prompts: list[Any]
    params: list[SamplingParams]
    request_id: str
    is_list: bool
    priority: int
    timeout_s: float | None
    cache_salt: str | None


class _StreamSink:
    """Keeps outputs until the stream fetches them; does not know the stream, so that a dropped one is collected."""

    __slots__ = ("error", "outputs", "waiter")

    def __init__(self) -> None:
        self.outputs: deque[RequestOutput] = deque()
        self.error: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        self.error = error
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class OutputStream(AsyncIterator[RequestOutput]):
    """The outputs of one or several requests as they come; `.index` says which prompt of a list an output belongs to,
    `.choice` which of its n choices.

    The requests are submitted by the first `async for` step. Leaving early aborts what still runs: cancel the task,
    `await aclose()`, or drop the iterator. Belongs to one task.
    """

    def __init__(self, engine: AsyncEngine, arguments: _Arguments) -> None:
        self._engine = engine
        self._arguments: _Arguments | None = arguments
        self._sink = _StreamSink()
        self._requests: list[RequestState] = []
        self._num_open = 1  # until it is known how many requests it comes to

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        sink = self._sink
        if self._arguments is not None:
            await self._submit()
        while True:
            if sink.outputs:
                output = sink.outputs.popleft()
                if output.finish_reason is not None:
                    self._num_open -= 1
                return output
            if self._num_open <= 0:
                raise StopAsyncIteration
            if sink.error is not None:
                self._abort()
                raise sink.error
            sink.waiter = self._engine._loop_of().create_future()
            try:
                await sink.waiter
            except BaseException:
                self._abort()
                raise
            finally:
                sink.waiter = None

    def ready(self) -> list[RequestOutput]:
        """The outputs that are there already, without waiting: what a consumer that fell behind may take at once."""
        outputs = list(self._sink.outputs)
        self._sink.outputs.clear()
        self._num_open -= sum(output.finish_reason is not None for output in outputs)
        return outputs

    async def _submit(self) -> None:
        arguments, self._arguments = self._arguments, None
        assert arguments is not None
        try:
            await self._engine.start()
            self._requests = self._engine._submit(arguments, lambda: self._sink, stream=True)
            self._num_open = len(self._requests)
        except BaseException:
            self._num_open = 0
            raise

    def _abort(self) -> None:
        """End what still runs; nothing more comes out."""
        if self._num_open > 0:
            self._engine._cancel(self._requests)
        self._num_open = 0
        self._arguments = None
        self._sink.outputs.clear()

    async def aclose(self) -> None:
        self._abort()

    def __del__(self) -> None:
        if self._num_open > 0 and self._requests:
            self._engine._cancel_from_anywhere(self._requests)


class AsyncEngine:
    """An engine inside a running asyncio or uvloop event loop.

        async with AsyncEngine("path/to/checkpoint") as engine:
            output = await engine.generate("Once upon a time", {"max_new_tokens": 32})
            async for delta in engine.generate("Once upon a time", stream=True):
                print(delta.text, end="")

    model        directory in HF format or a hub id; every field of EngineConfig is a keyword
    own_process  this process is there for the engine alone, as a server's is: what lives at the engine's first idle
                 moment is then exempt from garbage collection (gc.freeze) until shutdown

    Belongs to the loop in which start() (or `async with`, or the first generate()) ran, and to its thread.
    """

    def __init__(self, model: str | os.PathLike[str], *, own_process: bool = False, **settings: Any) -> None:
        self._init(EngineConfig.from_kwargs(os.fspath(model), **settings), own_process=own_process)

    def _init(
        self,
        config: EngineConfig,
        loaded: LoadedModel | None = None,
        tokenizer: Tokenizer | None = None,
        own_process: bool = False,
    ) -> None:
        config.verify()
        self.config = config
        self._model = loaded
        self._tokenizer = tokenizer
        self._own_process = own_process
        self._steps: StepLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._closed = False
        self._workers: concurrent.futures.ThreadPoolExecutor | None = None
        self._seeds = random.Random(config.random_seed)

    @classmethod
    def from_loaded(cls, loaded: LoadedModel, config: EngineConfig, tokenizer: Tokenizer | None = None) -> Self:
        """An engine over a model that is loaded already. tokenizer None: token ids alone, outputs have no text."""
        engine = cls.__new__(cls)
        engine._init(config, loaded, tokenizer)
        return engine

    # --- life

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.shutdown()  # there will be no __aexit__
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    async def start(self, progress: Any = None) -> None:
        """Load the model in a worker thread and begin to serve; does nothing when that was done.

        progress (bytes done, bytes in all) is called by the loader. Raises what loading raises; EngineDead after
        shutdown.
        """
        loop = asyncio.get_running_loop()
        if self._closed:
            raise EngineDead("the engine was shut down; make a new one")
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise InvalidRequest(
                "this AsyncEngine belongs to another event loop; make one per loop, or use Engine across threads"
            )
        if self._steps is not None:
            return
        # A task of its own: a caller who is cancelled does not take the start from the others. One that failed is
        # tried again.
        if self._starting is None or self._starting.done():
            self._starting = loop.create_task(self._start(progress))
        await asyncio.shield(self._starting)

    async def _start(self, progress: Any) -> None:
        if self._model is None:
            await self._load(progress)
        if self._closed:
            raise EngineDead("the engine was shut down while it loaded")
        assert self._model is not None
        steps = StepLoop(self._model, self.config, loop=self._loop_of(), own_process=self._own_process)
        steps.start()
        self._steps = steps

    async def _load(self, progress: Any) -> None:
        """Model and tokenizer, side by side in worker threads."""
        loop = self._loop_of()
        model = loop.run_in_executor(self._pool(), _load_model, self.config, progress)
        tokenizer = loop.run_in_executor(self._pool(), _load_tokenizer, self.config)
        # Gather both whatever happens, so that no thread is left with something nobody takes. The model's error counts
        # first.
        loaded, loaded_tokenizer = await asyncio.gather(model, tokenizer, return_exceptions=True)
        if isinstance(loaded, BaseException):
            raise loaded
        if isinstance(loaded_tokenizer, BaseException):
            loaded.executor.shutdown()
            raise loaded_tokenizer
        self._model, self._tokenizer = loaded, loaded_tokenizer

    async def shutdown(self) -> None:
        """End every live request with EngineDead, wait for the running step, give the model up. Idempotent.

        A start that is under way is waited for: loading cannot be broken off.
        """
        self._close()
        if self._stopping is None or self._stopping.done():
            self._stopping = asyncio.get_running_loop().create_task(self._stop())
        await asyncio.shield(self._stopping)  # once begun it is finished, whoever is cancelled

    async def _stop(self) -> None:
        if self._starting is not None and not self._starting.done():
            await asyncio.gather(self._starting, return_exceptions=True)  # whose callers have its error
        if self._model is not None:
            await asyncio.get_running_loop().run_in_executor(self._pool(), self._model.executor.shutdown)
        self._release()

    def _close(self) -> None:
        """The part of a shutdown that never blocks; on the loop's thread."""
        self._closed = True
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()

    def _release(self) -> None:
        """Let go of weights, KV pool and threads; the executor has stopped."""
        self._model = self._tokenizer = None
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.shutdown(wait=False)

    def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
        if self._workers is None:
            self._workers = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="sapwood-worker")
        return self._workers

    def _running(self) -> StepLoop:
        if self._steps is None:
            raise EngineDead(
                "the engine was shut down"
                if self._closed
                else "the engine was not started: use `async with` or start()"
            )
        return self._steps

    def _loop_of(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None
        return self._loop

    # --- requests

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] = None,
        *,
        stream: bool = False,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        cache_salt: str | None = None,
    ) -> Any:
        """Continue a prompt: text, token ids, chat messages, or a list of any of these.

        sampling_params  SamplingParams, or a mapping of its fields, whose missing ones (as those of None) are the
                         model's own (generation_config.json) where it has them; a list gives every prompt its own
        stream           False: an awaitable of a RequestOutput; of a list of them for a list of prompts, or where
                         n > 1: every prompt's choices in order. True: an OutputStream; each output holds what is new,
                         `.index` is the prompt's place in the list, `.choice` the choice
        request_id       for abort(); where they are several, the requests are "<id>-0", "<id>-1", ...
        priority         larger is sooner, under schedule_policy "priority"; and later to be retracted
        timeout_s        deadline from now on; at most the setting request_timeout_s
        cache_salt       requests with different salts never share cached prefixes

        Raises InvalidRequest, CapacityError, EngineDead. An abort, a deadline, or an error of this request alone
        is an output with finish_reason ABORT, and `.error` saying why unless the caller aborted it.
        Cancelling the awaiting task, or leaving the stream, aborts the request.
        """
        arguments = self._arguments(prompt, sampling_params, request_id, priority, timeout_s, cache_salt)
        if stream:
            return OutputStream(self, arguments)
        return self._generate(arguments)

    async def _generate(self, arguments: _Arguments) -> RequestOutput | list[RequestOutput]:
        await self.start()
        loop = self._loop_of()
        futures: list[asyncio.Future[RequestOutput]] = []

        def sink() -> _FutureSink:
            futures.append(loop.create_future())
            return _FutureSink(futures[-1])

        requests = self._submit(arguments, sink, stream=False)
        try:
            if not arguments.is_list and len(futures) == 1:
                return await futures[0]
            return await asyncio.gather(*futures)  # the first to fail ends the list
        except BaseException:
            self._cancel(requests)
            raise

    def _arguments(
        self,
        prompt: Any,
        params: Any,
        request_id: str | None,
        priority: int,
        timeout_s: float | None,
        cache_salt: str | None,
    ) -> _Arguments:
        prompts, is_list = _split(prompt)
        if isinstance(params, PARAMS):
            params = [params] * len(prompts)
        elif not isinstance(params, (list, tuple)) or not all(isinstance(p, PARAMS) for p in params):
            raise InvalidRequest(
                f"sampling_params must be SamplingParams, a mapping of its fields, or a list of these, got {params!r}",
                "sampling_params",
            )
        elif not is_list or len(params) != len(prompts):
            raise InvalidRequest(
                f"sampling_params is a list of {len(params)}, but there {'are' if is_list else 'is'} {len(prompts)} "
                f"prompt{'s' if len(prompts) != 1 else ''}; give one for all, or one each",
                "sampling_params",
            )
        if request_id is None:
            request_id = uuid.uuid4().hex
        if not isinstance(request_id, str) or not request_id:
            raise InvalidRequest(f"request_id must be a non-empty string, got {request_id!r}", "request_id")
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
            raise InvalidRequest(f"priority must be an integer in [-2**31, 2**31], got {priority!r}", "priority")
        if timeout_s is not None and (
            isinstance(timeout_s, bool)
            or not isinstance(timeout_s, (int, float))
            or not 0 < timeout_s <= sys.float_info.max
        ):
            raise InvalidRequest(
                f"timeout_s must be a finite, positive number of seconds, got {timeout_s!r}", "timeout_s"
            )
        if cache_salt is not None and not isinstance(cache_salt, str):
            raise InvalidRequest(f"cache_salt must be a string, got {cache_salt!r}", "cache_salt")
        return _Arguments(prompts, list(params), request_id, is_list, priority, timeout_s, cache_salt)

    def _submit(self, arguments: _Arguments, sink: Callable[[], Sink], *, stream: bool) -> list[RequestState]:
        """Check everything, then register and enqueue; all prompts and choices or none. On the loop's thread.

        sink makes the sink of the next request; they are made in the order of prompts, then choices.
        """
        steps = self._running()
        model, loop = self._model, self._loop_of()
        assert model is not None
        params = [self._resolve(p, model) for p in arguments.params]
        prompts = [self._checked(p, model) for p in arguments.prompts]
        steps.check_alive()
        num_requests = sum(p.n for p in params)
        steps.check_capacity(num_requests)
        is_single = num_requests == 1 and not arguments.is_list
        now = loop.time()
        limits = [t for t in (arguments.timeout_s, self.config.request_timeout_s) if t is not None]
        deadline = now + min(limits) if limits else None
        requests: list[RequestState] = []
        inline_chars = MAX_INLINE_CHARS
        try:
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
                seed = p.seed if p.seed is not None else self._seeds.getrandbits(64)
                for choice in range(p.n):
                    req = RequestState(
                        arguments.request_id if is_single else f"{arguments.request_id}-{len(requests)}",
                        p,
                        sink(),
                        group=arguments.request_id,
                        stream=stream,
                        seed=seed,
                        index=i,
                        choice=choice,
                        priority=arguments.priority,
                        salt=arguments.cache_salt,
                        submitted_s=now,
                        deadline=deadline,
                    )
                    steps.register(req)
                    requests.append(req)
                inline_chars -= self._tokenise(steps, requests[-p.n :], prompt, inline_chars)
        except BaseException:
            self._cancel(requests)
            raise
        return requests

    def _resolve(self, params: Params, model: LoadedModel) -> SamplingParams:
        if not isinstance(params, SamplingParams):
            defaults = getattr(model, "generation_defaults", None) or {}
            fields = {k: defaults[k] for k in MODEL_DEFAULTS if defaults.get(k) is not None} | dict(params or {})
            for name in fields:
                if name not in SamplingParams.__struct_fields__:
                    near = difflib.get_close_matches(str(name), SamplingParams.__struct_fields__, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise InvalidRequest(f"unknown sampling parameter {name!r}{hint}", str(name))
            try:
                params = msgspec.convert(fields, SamplingParams)
            except (msgspec.ValidationError, UnicodeError) as error:
                raise InvalidRequest(f"sampling_params: {error}", "sampling_params") from None
        params.verify(model.vocab_size)
        if params.stop and self._tokenizer is None:
            raise InvalidRequest(
                "stop strings need a tokenizer, and there is none (skip_tokenizer_init); use stop_token_ids", "stop"
            )
        return params

    def _checked(self, prompt: Any, model: LoadedModel) -> Any:
        """Token ids as int32; text and messages as they are, if there is a tokenizer for them."""
        if isinstance(prompt, (str, ChatPrompt)) or _is_messages(prompt):
            if self._tokenizer is None:
                raise InvalidRequest(
                    "a prompt of text or messages needs a tokenizer, and there is none (skip_tokenizer_init); "
                    "give token ids",
                    "prompt",
                )
            return prompt
        return as_prompt(prompt, model.vocab_size)

    def _tokenise(self, steps: StepLoop, requests: Sequence[RequestState], prompt: Any, inline_chars: int) -> int:
        """Enqueue the choices of a prompt once its tokens are there; texts up to inline_chars at once.

        Returns how many characters were encoded here.
        """
        if isinstance(prompt, np.ndarray):
            self._enqueue(steps, requests, prompt)
            return 0
        length = _text_len(prompt)
        assert self._tokenizer is not None and self._model is not None
        encode = functools.partial(_encode, self._tokenizer, prompt, self._model.vocab_size)
        if length > inline_chars:
            done = functools.partial(self._encoded, steps, requests)
            self._loop_of().run_in_executor(self._pool(), encode).add_done_callback(done)
            return 0
        try:
            ids = encode()
        except InvalidRequest as error:
            for req in requests:
                steps.refuse(req, error)
            raise
        except Exception as error:
            for req in requests:
                steps.fail(req, error)
        else:
            self._enqueue(steps, requests, ids)
        return length

    def _encoded(
        self, steps: StepLoop, requests: Sequence[RequestState], future: asyncio.Future[np.ndarray[Any, Any]]
    ) -> None:
        """A worker has encoded a long text; back on the loop's thread. Nobody is there to catch what is raised here."""
        error = EngineDead("tokenising was cancelled") if future.cancelled() else future.exception()
        for req in requests:
            if isinstance(error, InvalidRequest):
                steps.refuse(req, error)
            elif error is not None:
                steps.fail(req, error)
            else:
                with contextlib.suppress(InvalidRequest):  # the sink has it
                    self._enqueue(steps, [req], future.result())

    def _enqueue(self, steps: StepLoop, requests: Sequence[RequestState], ids: Ints) -> None:
        for req in requests:
            steps.enqueue(req, ids, self._decoder(req.params))

    def _decoder(self, params: SamplingParams) -> Callable[[], Any] | None:
        if self._tokenizer is None:
            return None
        from sapwood.engine.detokenizer import Detokenizer

        return functools.partial(Detokenizer, self._tokenizer, params.skip_special_tokens)

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is, with finish_reason ABORT; False where no such request lives.

        The id given to generate() ends all of its prompts and choices. On the loop's thread.
        """
        return self._steps is not None and self._steps.abort(request_id)

    def _cancel(self, requests: Sequence[RequestState]) -> None:
        """End these requests, as far as they still live. On the loop's thread."""
        if self._steps is not None:
            for req in requests:
                self._steps.cancel(req)

    def _cancel_from_anywhere(self, requests: Sequence[RequestState]) -> None:
        if self._loop is None or self._loop.is_closed() or self._steps is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop closed meanwhile, and its engine with it
            self._loop.call_soon_threadsafe(self._cancel, requests)

    # --- looking in

    @property
    def model(self) -> LoadedModel | None:
        """What the loader handed over; None before start() and after shutdown()."""
        return self._model

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None as the model is, and with skip_tokenizer_init."""
        return self._tokenizer

    @property
    def is_alive(self) -> bool:
        """Whether requests can be served: started, not shut down, and its step loop has not failed."""
        return self._steps is not None and self._steps.is_alive

    async def wait_idle(self) -> None:
        """Return once no request lives and no step is in flight."""
        await self._running().wait_idle()

    def flush_cache(self) -> int:
        """Drop every cached page no running request uses; returns how many."""
        return self._running().flush_cache()

    def trace(self) -> list[StepRecord]:
        """The last trace_capacity steps, oldest first."""
        return self._running().trace()

    def stats(self) -> EngineStats:
        """Counters, gauges, host microseconds per step."""
        return self._running().stats()


class _QueueSink:
    """Hands outputs to a consumer in another thread."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[RequestOutput | BaseException] = queue.SimpleQueue()

    def put(self, output: RequestOutput) -> None:
        self.items.put(output)

    def fail(self, error: Exception) -> None:
        self.items.put(error)


class _Gate:
    """Admits calls to an Engine's loop until it stops: what is posted to a loop that has stopped is never answered.

    The lock is reentrant, for a signal handler may shut the engine down in the midst of a call.
    """

    __slots__ = ("lock", "stopped")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stopped = False


class Engine:
    """An engine for programs without an event loop: it runs one of its own in a daemon thread.

        with Engine("path/to/checkpoint") as engine:
            print(engine.generate("Once upon a time").text)

    Arguments, outputs and errors are AsyncEngine's; generate(stream=True) gives an iterator. Any number of threads may
    use it. An interrupt (KeyboardInterrupt) in a waiting call aborts its request. progress is handed to the model's
    loader (progress bars).
    """

    def __init__(
        self, model: str | os.PathLike[str], *, progress: Any = None, own_process: bool = False, **settings: Any
    ) -> None:
        self._begin(AsyncEngine(model, own_process=own_process, **settings), progress)

    @classmethod
    def from_loaded(cls, loaded: LoadedModel, config: EngineConfig, tokenizer: Tokenizer | None = None) -> Self:
        """As AsyncEngine.from_loaded."""
        engine = cls.__new__(cls)
        engine._begin(AsyncEngine.from_loaded(loaded, config, tokenizer), None)
        return engine

    def _begin(self, engine: AsyncEngine, progress: Any) -> None:
        self._engine = engine
        self.config = engine.config
        self._loop = _new_event_loop()
        self._thread = threading.Thread(target=_run_loop, args=(self._loop,), name="sapwood-engine", daemon=True)
        self._thread.start()
        self._gate = _Gate()
        stop = functools.partial(_stop, self._gate, engine, self._loop, self._thread)
        # Runs when the engine is collected or at the interpreter's exit, unless shutdown() came first.
        self._finalizer = weakref.finalize(self, stop)
        self._stop = stop
        try:
            self._call(engine.start(progress))
        except BaseException:
            self.shutdown()
            raise

    def _call(self, coroutine: Any) -> Any:
        """Run a coroutine on the engine's loop and wait for it; an interrupt cancels it."""
        with self._gate.lock:
            if self._gate.stopped or not self._thread.is_alive():
                coroutine.close()
                raise EngineDead("the engine was shut down")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:  # by the loop's end
            raise EngineDead("the engine was shut down") from None
        except BaseException:
            future.cancel()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """End every live request with EngineDead and stop. Idempotent; if interrupted, call it again."""
        self._stop()
        self._finalizer.detach()  # not before: an interrupt would leave nobody to stop the engine

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] = None,
        *,
        stream: bool = False,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        cache_salt: str | None = None,
    ) -> Any:
        """See AsyncEngine.generate. Returns the RequestOutput or list; with stream=True an iterator of deltas."""
        if self._gate.stopped:
            raise EngineDead("the engine was shut down")
        arguments = self._engine._arguments(prompt, sampling_params, request_id, priority, timeout_s, cache_salt)
        if stream:
            return self._stream(arguments)
        return self._call(self._engine._generate(arguments))

    def _stream(self, arguments: _Arguments) -> Iterator[RequestOutput]:
        sink = _QueueSink()
        num_open = 1  # until it is known how many requests it comes to
        requests: list[RequestState] = []
        left = False

        async def submit() -> None:
            if not left:
                requests.extend(self._engine._submit(arguments, lambda: sink, stream=True))

        # An interrupt can come at any moment, also between the submission and its return: hence `left`, and `requests`
        # being filled over there.
        try:
            self._call(submit())
            num_open = len(requests)
            while num_open:
                item = sink.items.get()
                if isinstance(item, BaseException):
                    raise item
                if item.finish_reason is not None:
                    num_open -= 1
                yield item
        finally:
            left = True
            if num_open:
                self._engine._cancel_from_anywhere(requests)

    def _ask(self, method: Callable[[], Any]) -> Any:
        async def ask() -> Any:
            return method()

        return self._call(ask())

    def abort(self, request_id: str) -> bool:
        """See AsyncEngine.abort; from any thread."""
        return bool(self._ask(functools.partial(self._engine.abort, request_id)))

    @property
    def model(self) -> LoadedModel | None:
        return self._engine.model

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    def wait_idle(self) -> None:
        """Return once no request lives and no step is in flight."""
        self._call(self._engine.wait_idle())

    def flush_cache(self) -> int:
        """Drop every cached page no running request uses; returns how many."""
        return int(self._ask(self._engine.flush_cache))

    def trace(self) -> list[StepRecord]:
        """The last trace_capacity steps, oldest first."""
        return list(self._ask(self._engine.trace))

    def stats(self) -> EngineStats:
        """Counters, gauges, host microseconds per step."""
        stats: EngineStats = self._ask(self._engine.stats)
        return stats


def _load_model(config: EngineConfig, progress: Any) -> LoadedModel:
    from sapwood.models.loader import load

    return load(config, progress)


def _load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    if config.skip_tokenizer_init:
        return None
    from sapwood.engine.tokenizer import Tokenizer

    if config.tokenizer is not None:
        return Tokenizer.load(config.tokenizer)
    return Tokenizer.load(config.model, revision=config.revision)


def _encode(tokenizer: Tokenizer, prompt: Any, vocab_size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Text or messages to token ids. Runs in a worker thread for long prompts."""
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        chat = prompt if isinstance(prompt, ChatPrompt) else ChatPrompt(messages=prompt)
        ids = tokenizer.encode_chat(chat)
    if not ids:
        raise InvalidRequest("prompt has no tokens; give at least one", "prompt")
    return as_prompt(ids, vocab_size)


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _text_len(prompt: Any) -> int:
    """Characters of a text or of messages, about."""
    if isinstance(prompt, str):
        return len(prompt)
    messages = prompt.messages if isinstance(prompt, ChatPrompt) else prompt
    return sum(len(str(message)) for message in messages)


def _split(prompt: Any) -> tuple[list[Any], bool]:
    """One prompt as a list of one, and whether it was a list of prompts."""
    if isinstance(prompt, (str, np.ndarray, ChatPrompt)) or _is_messages(prompt):
        return [prompt], False
    if isinstance(prompt, (list, tuple, range)):
        if not prompt:
            raise InvalidRequest("prompt is empty; give text, token ids, messages, or a list of them", "prompt")
        if isinstance(prompt[0], (str, list, tuple, range, np.ndarray, ChatPrompt)):
            return list(prompt), True
        return [prompt], False
    raise InvalidRequest(
        f"prompt must be text, token ids, messages, or a list of them, got {type(prompt).__name__}", "prompt"
    )


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # no wheel for this platform: slower, not different
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        with contextlib.suppress(Exception):
            loop.run_until_complete(asyncio.sleep(0))  # what was posted before the stop becomes tasks
            pending = asyncio.all_tasks(loop)
            for task in pending:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        loop.close()


def _stop(gate: _Gate, engine: AsyncEngine, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Shut an Engine down from any thread, also from the garbage collector or at the interpreter's exit. Idempotent."""
    # Stopped before; or this is a forked child, where neither threads nor locks are what they were.
    if not thread.is_alive():
        return
    with gate.lock:
        gate.stopped = True
        if threading.current_thread() is thread:  # collected on its own thread, which cannot wait for itself
            engine._close()
            engine._release()
            loop.stop()
            return
        closed = threading.Event()

        def close() -> None:
            try:
                engine._close()
            finally:
                closed.set()

        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(close)
            # A loop that is ending already, because somebody stopped it, may never come to it.
            while not closed.wait(0.1) and thread.is_alive():
                pass
        if not closed.is_set():
            engine._close()
        if engine.model is not None:
            engine.model.executor.shutdown()
        engine._release()
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.stop)
        thread.join()
