"""Grammar masks through the bindings: posted in time, late or never; what builder and executors say of a held row.

The test plays the grammar and the loop. On the CPU tokens are checked against the checksum model's, which are computed
from the tokens and masks alone; on device "cuda", a tiny model of random weights, against those of a row that has the
executor to itself and its masks in time (tests/golden/test_held_rows.py: against transformers).
"""

from __future__ import annotations

import json
import os
import queue
import random
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.errors import InvalidRequest, SapwoodError

OWN_DEVICE = True
VOCAB = 211
PROMPT = list(range(3, 12))
NUM_ROWS = 4
PATIENCE_S = 20  # of a test that fails
TINY = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": VOCAB, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256, "model_type": "qwen3", "rope_theta": 1e4, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "eos_token_id": 3,
}  # fmt: skip

Words = np.ndarray[Any, np.dtype[np.uint32]]


def mask_at(position: int) -> Words:
    """A third of the tokens, others at each position."""
    allowed = np.arange(-(-VOCAB // 32) * 32) % 3 == position % 3
    return np.packbits(allowed, bitorder="little").view(np.uint32)


class World:
    """Cache, builder and executor, driven step by step; the checksum model."""

    def __init__(self) -> None:
        self.groups = [_core.KvGroup(page_size=4)]
        self.num_pages = [64]
        self.executor: Any = _core.Executor(
            _core.checksum_runner(self.groups, self.num_pages, VOCAB), self.groups, NUM_ROWS
        )
        self.begin()

    def begin(self) -> None:
        self.cache = _core.CacheManager(self.groups, self.num_pages)
        self.builder = _core.BatchBuilder(self.cache, NUM_ROWS)
        self.next_step = self.num_unheard = 0

    def admit(self, *, masked: bool, max_len: int = 64, prompt: list[int] = PROMPT, **sampling: Any) -> int:
        row, _, _ = self.builder.admit(
            0, np.asarray(prompt, np.int32), prompt_len=len(prompt), max_len=max_len, masked=masked, **sampling
        )
        return row

    def post(self, row: int) -> None:
        position = self.builder.num_tokens(row)
        self.executor.post_mask(row, self.builder.gen(row), position, mask_at(position))
        self.builder.mask_posted(row, position)

    def submit(self) -> _core.BuiltStep:
        """Every row that can goes on."""
        self.builder.begin_step(self.next_step)
        self.next_step += 1
        self.builder.add_decodes()
        for row in range(NUM_ROWS):
            if self.builder.phase(row) == "extend":
                self.builder.add_extend(row, 100)
        built = self.builder.end_step()
        if built.plan is not None:
            self.executor.submit(built.plan)
            self.num_unheard += 1
        return built

    def drain(self) -> list[_core.StepResult]:
        """Results that have come."""
        results = [result for kind, _, result in self.executor.drain() if kind == "result"]
        self.num_unheard -= len(results)
        return results

    def results(self) -> list[_core.StepResult]:
        """Of all that was submitted."""
        poll = select.poll()
        poll.register(self.executor.fileno(), select.POLLIN)
        results = self.drain()
        while self.num_unheard > 0:
            assert poll.poll(PATIENCE_S * 1000), "no step ends"
            results += self.drain()
        return results

    def commit(self, result: _core.StepResult) -> list[tuple[int, int, int]]:
        """(row, token, flags) of what came of it."""
        rows, tokens, flags, _ = self.builder.commit(result)
        self.builder.check_invariants()
        return list(zip(rows, tokens, flags, strict=True))

    def step(self) -> tuple[_core.BuiltStep, list[tuple[int, int, int]]]:
        built = self.submit()
        assert built.plan is not None
        (result,) = self.results()
        assert not result.error, result.error
        return built, self.commit(result)

    def expected(self, num_tokens: int) -> list[int]:
        tokens = list(PROMPT)
        for position in range(len(PROMPT), len(PROMPT) + num_tokens):
            array = np.asarray(tokens, np.int32)
            tokens.append(_core.checksum_next_token(self.groups, VOCAB, array, mask_at(position)))
        return tokens


class CudaWorld(World):
    """Device "cuda", on a GPU or the CPU."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        from sapwood.models.loader import load

        defaults: dict[str, Any] = {
            "device": "cuda", "load_format": "dummy", "skip_tokenizer_init": True, "page_size": 4,
            "max_total_tokens": 256, "max_running_requests": NUM_ROWS, "enable_deterministic_inference": True,
        }  # fmt: skip
        model = load(EngineConfig.from_kwargs(str(folder), **{**defaults, **settings}))
        self.groups, self.num_pages, self.executor = model.groups, model.num_pages, model.executor
        self.begin()
        self.awaited = Awaited(self.executor)

    @property
    def num_masks(self) -> int:
        """That wait on the host."""
        count: int = self.executor._packer.num_masks
        return count

    def alone(self, num_tokens: int, prompt: list[int] = PROMPT, **sampling: Any) -> list[int]:
        """Of a row with the executor to itself, its masks in time."""
        row = self.admit(masked=True, max_len=len(prompt) + num_tokens, prompt=prompt, **sampling)
        for _ in range(num_tokens):
            self.post(row)
            _, came = self.step()
            assert [flags & ~_core.FINISHED_LENGTH for _, _, flags in came] == [0]
        tokens = self.builder.tokens(row).tolist()
        self.builder.release(row)
        return tokens

    def expected(self, num_tokens: int) -> list[int]:
        for row in range(NUM_ROWS):
            if self.builder.phase(row) != "free":
                self.builder.release(row)
        return self.alone(num_tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


@pytest.fixture
def cuda_world(
    request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., CudaWorld]]:
    pytest.importorskip("torch")
    from sapwood.program import cuda

    of_tests = request.getfixturevalue("cuda_device")
    monkeypatch.setattr(cuda, "open_device", lambda: of_tests)
    worlds: list[CudaWorld] = []
    read = os.eventfd_read

    def note_and_read(fd: int) -> int:
        for world in worlds:
            world.awaited.note_sleep(fd)
        return read(fd)

    monkeypatch.setattr(os, "eventfd_read", note_and_read)

    def make(**settings: Any) -> CudaWorld:
        worlds.append(CudaWorld(folder, **settings))
        return worlds[-1]

    yield make
    for world in worlds:
        world.awaited.release()
        world.executor.shutdown()


@pytest.fixture(params=["cpu", "cuda", "cuda without graphs"])
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "cpu":
        return World()
    cuda: CudaWorld = request.getfixturevalue("cuda_world")(disable_cuda_graph=request.param != "cuda")
    return cuda


def test_late_and_timely_masks_draw_the_same_tokens(world: World) -> None:
    timely, late, free = world.admit(masked=True), world.admit(masked=True), world.admit(masked=False)
    for _ in range(5):
        world.post(timely)
        built, came = world.step()
        assert built.plan is not None and built.plan.mask_rows == [timely, late]
        assert [(row, flags) for row, _, flags in came] == [(timely, 0), (late, _core.HELD), (free, 0)]
        assert [token for row, token, _ in came if row == late] == [-1]
        assert world.builder.phase(late) == "held"
        for row in (timely, free):
            world.builder.pause(row)
        world.post(late)
        built, came = world.step()
        assert built.plan is not None and built.plan.items() == [(late, world.builder.gen(late), "resume", 0, 0)]
        assert (built.num_resume_rows, built.num_decode_rows, built.num_logit_rows) == (1, 0, 1)
        assert built.plan.num_tokens == 0 and [(row, flags) for row, _, flags in came] == [(late, 0)]
        for row in (timely, free):
            world.builder.resume(row)
    tokens, tokens_of_free = world.builder.tokens(timely).tolist(), world.builder.tokens(free).tolist()
    assert tokens == world.builder.tokens(late).tolist() == world.expected(5)
    assert tokens_of_free != tokens
    for position, token in enumerate(tokens[len(PROMPT) :], len(PROMPT)):
        assert token % 3 == position % 3


def test_what_was_planned_on_top_of_a_hold_is_skipped(world: World) -> None:
    """A step ahead, as the loop is: the row goes on by a resume whose token is what it would have been."""
    held, free = world.admit(masked=True), world.admit(masked=False)
    for _ in range(4):
        world.submit()
        built = world.submit()  # a decode of both, of which one will not have drawn
        assert built.num_decode_rows == 2
        first, second = world.results()
        assert [item[4] for item in first.items()] == [_core.HELD, 0]
        assert [item[4] for item in second.items()] == [_core.SKIPPED | _core.HELD, 0]
        assert (second.num_tokens, second.num_logit_rows) == (1, 1)
        assert second.num_kv == world.builder.num_tokens(free) + 1
        world.post(held)  # before the hold was heard of
        for result in (first, second):
            world.commit(result)
        built, came = world.step()
        assert (built.num_resume_rows, built.num_decode_rows) == (1, 1)
        assert [(row, flags) for row, _, flags in came] == [(held, 0), (free, 0)]
    assert world.builder.tokens(held).tolist() == world.expected(4)


def test_what_is_no_mask_is_refused(world: World) -> None:
    words = mask_at(0)
    for bits in (words[:-1], np.append(words, words), words[None]):
        with pytest.raises(InvalidRequest, match="mask"):
            world.executor.post_mask(0, 1, 0, bits)
    with pytest.raises(InvalidRequest, match="row must be"):
        world.executor.post_mask(NUM_ROWS, 1, 0, words)
    with pytest.raises(InvalidRequest, match="position must not be negative"):
        world.executor.post_mask(0, 1, -1, words)
    for position in range(8):
        world.executor.post_mask(0, 1, position, words)
    with pytest.raises(InvalidRequest, match="8 masks of row 0 wait"):
        world.executor.post_mask(0, 1, 8, words)
    with pytest.raises(TypeError):  # converted, a word with its highest bit set would be wrong
        world.executor.post_mask(0, 1, 0, words.view(np.int32))
    row = world.admit(masked=False)
    with pytest.raises(InvalidRequest, match="without masks"):
        world.builder.mask_posted(row, len(PROMPT))


def test_a_mask_of_something_else_holds_the_row_all_the_same(world: World) -> None:
    row = world.admit(masked=True)
    gen, position = world.builder.gen(row), len(PROMPT)
    for of_row, of_gen, at in ((row + 1, gen, position), (row, gen + 1, position), (row, gen, position + 1)):
        world.executor.post_mask(of_row, of_gen, at, mask_at(position))
    assert [flags for _, _, flags in world.step()[1]] == [_core.HELD]
    # Resumed without its mask, it is held again.
    world.builder.mask_posted(row, position)
    built, came = world.step()
    assert built.num_resume_rows == 1 and [flags for _, _, flags in came] == [_core.HELD]
    world.post(row)
    world.step()
    assert world.builder.tokens(row).tolist() == world.expected(1)


def test_a_mask_without_a_token_that_may_be_drawn_ends_the_row(world: World) -> None:
    row = world.admit(masked=True)
    world.executor.post_mask(row, world.builder.gen(row), len(PROMPT), np.zeros_like(mask_at(0)))
    assert [flags for _, _, flags in world.step()[1]] == [_core.BAD_LOGITS]


def test_a_sampler_that_forgets_masks_is_told() -> None:
    world = World()
    rows = _core.RowTable(world.groups, NUM_ROWS, VOCAB)
    row = world.admit(masked=True)
    world.builder.begin_step(0)
    world.builder.add_extend(row, 100)
    plan = world.builder.end_step().plan
    assert plan is not None
    rows.prepare(plan)
    drawn = np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32)
    with pytest.raises(InvalidRequest, match="under a mask"):
        rows.commit(plan, *drawn)
    assert rows.commit(plan, *drawn, np.ones(1, bool)).items()[0][4] == _core.HELD


# --- Device "cuda": when a step's sampling is launched


class Awaited:
    """The reports of logits whose step waits for masks: once `kept`, the test makes them."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        self.tickets: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.kept = False
        self.new: Any = None  # whose thread is not asleep yet
        self.all: list[Any] = []
        watch = executor._completion.watch

        def keep(ticket: Any) -> None:
            if self.kept and ticket.params.event_fd == executor._mask_fd:
                self.new = ticket
                self.all.append(ticket)
            else:
                watch(ticket)

        executor._completion.watch = keep

    def keep(self) -> Awaited:
        self.kept = True
        return self

    def note_sleep(self, fd: int) -> None:
        """The thread is about to sleep, if this is its eventfd."""
        if fd == self.executor._mask_fd and self.new is not None:
            self.tickets.put(self.new)
            self.new = None

    def release(self) -> None:
        """Whatever the test has left waiting."""
        self.kept = False
        for ticket in self.all:
            if not ticket.done_ns:
                self.report(ticket)

    def next(self) -> Any:
        """Of the next step that waits, once the thread is asleep over it."""
        return self.tickets.get(timeout=PATIENCE_S)

    def report(self, ticket: Any, error: str = "") -> None:
        ticket.finish(error)
        if not self.executor._thread.is_alive():
            return
        os.eventfd_write(self.executor._mask_fd, 1)


def flags_of(result: Any) -> list[int]:
    return [item[4] for item in result.items()]


def test_a_mask_may_come_while_the_forward_runs(cuda_world: Callable[..., CudaWorld]) -> None:
    world = cuda_world()
    expected = world.alone(2)
    awaited = world.awaited.keep()
    one, two = world.admit(masked=True), world.admit(masked=True)
    for _ in range(2):
        world.submit()
        ticket = awaited.next()
        world.post(one)
        assert world.executor.queued == 1 and ticket.done_ns == 0
        world.post(two)
        (result,) = world.results()  # the logits were never reported
        assert flags_of(result) == [0, 0]
        world.commit(result)
    assert world.builder.tokens(one).tolist() == world.builder.tokens(two).tolist() == expected
    assert awaited.tickets.empty()


def test_only_what_is_missing_when_the_logits_are_there_is_held(cuda_world: Callable[..., CudaWorld]) -> None:
    """Steps behind it wait meanwhile, and then not for the mask of what has been held."""
    world = cuda_world()
    awaited = world.awaited.keep()
    one, two, free = world.admit(masked=True), world.admit(masked=True), world.admit(masked=False)
    world.submit()
    ticket = awaited.next()
    world.submit()
    world.post(one)
    assert world.executor.queued == 2 and world.drain() == []
    awaited.report(ticket)
    ticket = awaited.next()  # of the second step, for the next mask of `one` alone
    (first,) = world.drain()
    assert flags_of(first) == [0, _core.HELD, 0]
    world.commit(first)
    world.post(one)
    (second,) = world.results()
    assert flags_of(second) == [0, _core.SKIPPED | _core.HELD, 0] and ticket.done_ns == 0
    world.commit(second)
    world.post(two)
    built = world.submit()
    assert built.num_resume_rows == 1 and built.num_decode_rows == 2
    world.post(one)
    (third,) = world.results()
    assert flags_of(third) == [0, 0, 0]
    world.commit(third)
    tokens = [world.builder.tokens(row).tolist() for row in (one, two)]
    assert tokens[0][: len(PROMPT) + 1] == tokens[1] == world.expected(1) and free not in (one, two)


def test_no_mask_is_awaited_of_a_row_that_has_ended(cuda_world: Callable[..., CudaWorld]) -> None:
    """A step ahead, its last token was unknown; its mask will never come."""
    world = cuda_world()
    ending = world.admit(masked=True, stop_ids=range(VOCAB))
    going_on = world.admit(masked=True)
    awaited = world.awaited.keep()
    for row in (ending, going_on):
        world.post(row)
    world.submit()
    world.submit()
    ticket = awaited.next()
    (first,) = world.drain()
    assert flags_of(first) == [_core.FINISHED_STOP, 0]
    world.commit(first)
    world.post(going_on)
    (second,) = world.results()
    assert flags_of(second) == [_core.SKIPPED, 0] and ticket.done_ns == 0
    # Heard of after the other's mask had been posted.
    world.commit(second)
    world.builder.release(ending)
    ending = world.admit(masked=True, stop_ids=range(VOCAB))
    for row in (ending, going_on):
        world.post(row)
    world.submit()
    world.submit()
    awaited.next()
    position = world.builder.num_tokens(going_on) + 1
    world.executor.post_mask(going_on, world.builder.gen(going_on), position, mask_at(position))
    third, fourth = world.results()
    assert flags_of(third) == [0, _core.FINISHED_STOP] and flags_of(fourth) == [0, _core.SKIPPED]


def test_plans_without_masks_and_those_whose_masks_are_there_wait_for_nothing(
    cuda_world: Callable[..., CudaWorld],
) -> None:
    world = cuda_world()
    awaited = world.awaited.keep()
    calls: list[tuple[str, bool]] = []
    inner = world.executor._rows._library

    class Spy:
        def call(self, op: str, params: Any, stream: int | None = None) -> None:
            calls.append((op, bool(getattr(params, "mask", 0) or getattr(params, "mask_index", 0))))
            inner.call(op, params, stream)

    world.executor._rows._library = Spy()
    free = world.admit(masked=False)
    masks: list[Any] = []
    bring = world.executor._bring_masks
    world.executor._bring_masks = lambda *step: masks.append(bring(*step)) or masks[-1]
    for _ in range(2):
        world.step()
    assert calls[-2:] == [("sample", False), ("commit_step", False)] and masks == []
    row = world.admit(masked=True)
    for _ in range(2):
        world.post(row)
        world.step()
        assert calls[-2:] == [("sample", True), ("commit_step", True)]
    assert awaited.tickets.empty() and [(m.num_masks, m.num_held) for m in masks] == [(1, 0)] * 2
    assert world.builder.phase(free) == "decode"


def test_a_resume_runs_in_the_graph_of_the_decodes_beside_it(cuda_world: Callable[..., CudaWorld]) -> None:
    """Alone, of the head and nothing more; beside a prompt, in that one's step."""
    world = cuda_world()
    held, free = world.admit(masked=True), world.admit(masked=False)
    world.step()
    ways = world.executor.launcher.num_steps
    launched: list[str] = []
    launch = world.executor.launcher.model._launch
    world.executor.launcher.model._launch = lambda node, *rest: launched.append(node.op) or launch(node, *rest)

    def resume() -> dict[str, int]:
        world.post(held)
        ways.clear()
        launched.clear()
        assert world.step()[0].num_resume_rows == 1
        went = dict(ways)
        assert ("attention" in launched) == ("head" not in went)
        world.submit()  # the held row's next token
        world.commit(*world.results())
        return went

    assert resume() == {"decode graph": 1}
    world.builder.pause(free)
    assert resume() == {"head": 1}
    world.admit(masked=False, prompt=[5, 6])
    assert resume() == {"run graphs": 1}
    assert world.builder.tokens(held).tolist() == world.expected(3)


def test_shutdown_while_masks_are_awaited(cuda_world: Callable[..., CudaWorld]) -> None:
    """The step that waits ends as if the masks were late, those behind it are dropped."""
    world = cuda_world()
    awaited = world.awaited.keep()
    row = world.admit(masked=True)
    world.submit()
    ticket = awaited.next()
    world.submit()
    stopping = threading.Thread(target=world.executor.shutdown)
    stopping.start()
    while not world.executor._stopped:
        pass
    world.post(row)  # too late to wake anybody up
    awaited.report(ticket)
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()
    (first,) = world.drain()
    assert flags_of(first) in ([0], [_core.HELD]) and first.error == ""
    world.executor.post_mask(row, 7, 7, mask_at(7))  # nobody minds


def test_a_device_that_fails_while_masks_are_awaited(cuda_world: Callable[..., CudaWorld]) -> None:
    world = cuda_world()
    expected = world.alone(1)
    awaited = world.awaited.keep()
    one, two = world.admit(masked=True), world.admit(masked=True)
    world.submit()
    ticket = awaited.next()
    world.submit()
    world.post(one)
    awaited.report(ticket, "the device is gone")
    failed, skipped = world.results()
    assert "the device is gone" in failed.error and failed.items() == []
    assert flags_of(skipped) == [_core.SKIPPED] * 2
    for result in (failed, skipped):
        world.commit(result)
    world.post(two)  # of a row that has ended
    assert world.num_masks == 0
    for row in (one, two):
        world.builder.release(row, failed=True)
    assert world.alone(1) == expected


@pytest.mark.parametrize("op", ["sample", "commit_step"])
def test_a_step_that_fails_between_forward_and_result(cuda_world: Callable[..., CudaWorld], op: str) -> None:
    world = cuda_world()
    expected = world.alone(3)
    inner, fails = world.executor._rows._library, [False]

    class Failing:
        def call(self, name: str, params: Any, stream: int | None = None) -> None:
            if name == op and fails[0]:
                fails[0] = False
                raise SapwoodError(f"{op}: out of luck")
            inner.call(name, params, stream)

    world.executor._rows._library = Failing()
    timely, late = world.admit(masked=True), world.admit(masked=True)
    world.post(timely)
    fails[0] = True
    world.submit()
    (result,) = world.results()
    assert f"{op}: out of luck" in result.error
    world.commit(result)
    world.post(late)
    assert world.num_masks == 0 and {world.builder.phase(row) for row in (timely, late)} == {"done"}
    for row in (timely, late):
        world.builder.release(row, failed=True)
    assert world.alone(3) == expected


# --- Device "cuda" under load


class Client:
    """A request: its row, if it has one, and the masks that its grammar makes late."""

    def __init__(self, prompt: list[int], num_tokens: int, **sampling: Any) -> None:
        self.prompt, self.num_tokens, self.sampling = prompt, num_tokens, sampling
        self.tokens = list(prompt)  # known
        self.row = -1
        self.posted = -1  # newest position


@pytest.mark.parametrize("seed", [0, 1])
def test_masks_under_load(cuda_world: Callable[..., CudaWorld], seed: int) -> None:
    """One step ahead, masks at random times, rows that are given up, retracted and come again, steps that fail: every
    request has the tokens that it has alone, bit by bit, and nothing is left behind.
    """
    rng = random.Random(seed)
    world = cuda_world(disable_cuda_graph=seed == 1)
    shared = [rng.randrange(4, VOCAB) for _ in range(16)]
    clients = [
        Client(
            shared[: rng.choice((0, 12, 16))] + [rng.randrange(4, VOCAB) for _ in range(rng.randrange(1, 9))],
            rng.randrange(3, 9),
            temperature=rng.choice((0.0, 1.0)), top_p=0.9, seed=i,
        )
        for i in range(9)
    ]  # fmt: skip
    expected = [world.alone(c.num_tokens, c.prompt, **c.sampling) for c in clients]
    inner, fails = world.executor._rows._library, [False]

    class Failing:
        def call(self, name: str, params: Any, stream: int | None = None) -> None:
            if name == "sample" and fails[0]:
                fails[0] = False
                raise SapwoodError("out of luck")
            inner.call(name, params, stream)

    world.executor._rows._library = Failing()
    waiting, running = list(clients), dict[int, Client]()
    in_flight: list[Any] = []
    seen = {"held": 0, "skipped": 0, "resumed": 0, "given up": 0, "failed": 0}

    def give_up(client: Client, *, failed: bool = False) -> None:
        world.builder.release(client.row, failed=failed)
        del running[client.row]
        client.row = client.posted = -1
        waiting.append(client)

    for _ in range(2000):
        for client in list(waiting):
            if len(running) < NUM_ROWS and rng.random() < 0.5:
                waiting.remove(client)
                total = len(client.prompt) + client.num_tokens
                client.row = world.admit(masked=True, max_len=total, prompt=client.tokens, **client.sampling)
                running[client.row] = client
        for row, client in list(running.items()):
            position = world.builder.num_tokens(row)
            if client.posted < position and world.builder.phase(row) != "done" and rng.random() < 0.4:
                client.posted = position
                world.post(row)
            elif rng.random() < 0.03:
                seen["given up"] += 1
                give_up(client)
        if len(in_flight) < 2:
            fails[0] |= rng.random() < 0.15
            built = world.submit()
            if built.plan is not None:
                in_flight.append(built)
                seen["resumed"] += built.num_resume_rows
        if in_flight and (len(in_flight) == 2 or rng.random() < 0.3):
            for result in world.results():
                built = in_flight.pop(0)
                if result.error:
                    assert "out of luck" in result.error
                    seen["failed"] += 1
                seen["skipped"] += sum(f == _core.SKIPPED | _core.HELD for f in flags_of(result))
                for row, token, flags in world.commit(result):
                    seen["held"] += flags == _core.HELD
                    if token >= 0:
                        running[row].tokens.append(token)
                for row, client in list(running.items()):
                    if world.builder.phase(row) == "done":
                        total = len(client.prompt) + client.num_tokens
                        if len(client.tokens) < total:
                            give_up(client, failed=True)
                        else:
                            world.builder.release(row)
                            del running[row]
        if not waiting and not running and not in_flight:
            break
    assert not waiting and not running
    assert [c.tokens for c in clients] == expected
    assert min(seen.values()) >= 2, seen
    # The last rows' ends ride on another plan.
    world.alone(1)
    world.alone(1)
    assert world.num_masks == 0
