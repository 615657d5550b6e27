"""The keyed sampler. Its tokens must be those of the CPU's sampler (sapwood._core, which must be built).

Both could be wrong alike, so some checks do without the CPU: what is drawn lies in the support that an fp64 sort finds
of logits that numpy has adjusted; frequencies follow the softmax; adjusted logits and the masses of top-p are numpy's
to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from gpu_checks.device import Device
from gpu_checks.guard import before_guard
from sapwood.program.cuda_library import SampleParams

CANARY: Final = -77
UNSAVED: Final = float(np.float32(1.25e33))  # no row holds it
GUARD: Final = 16  # elements on both sides of an output
FLT_MAX: Final = float(np.finfo(np.float32).max)
LIST_SIZE: Final = 4096  # of the kernel: more candidates than that are searched in the row

Logits = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Draw:
    """The parameters of one row. masked: ids whose mask bit is not set; None: no mask."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 1234
    stream: int = 0
    position: int = 0
    want_logprob: bool = False
    banned: tuple[int, ...] = ()
    masked: tuple[int, ...] | None = None
    occurred: tuple[tuple[int, int, bool], ...] = ()  # token, how often in the output, whether in the prompt
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Drawn:
    token: list[int]
    logprob: torch.Tensor
    bad: list[int]

    def assert_equal(self, other: Drawn, what: str) -> None:
        """Bit for bit, NaN included."""
        assert self.token == other.token and self.bad == other.bad, what
        assert torch.equal(self.logprob.view(torch.int32), other.logprob.view(torch.int32)), what


def mask_words(draw: Draw, vocab: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """The row of the mask; the bits past the vocabulary are random."""
    words = (vocab + 31) // 32
    bits = rng.integers(0, 2, words * 32, dtype=np.uint8)
    bits[:vocab] = 1
    bits[list(draw.masked or ())] = 0
    return np.packbits(bits, bitorder="little").view(np.uint32)


def csr(d: Device, rows: list[tuple[Any, ...]], spare: list[Any], dtypes: list[type[np.generic]]) -> list[torch.Tensor]:
    """indptr and one array for each part of an entry. They begin with entries that no row has."""
    ends = len(spare) + np.cumsum([0] + [len(entries) for entries in rows])
    flat = spare + [entry for entries in rows for entry in entries]
    parts = [np.array([entry[i] for entry in flat], dtype) for i, dtype in enumerate(dtypes)]
    indptr = torch.tensor(ends, dtype=torch.int32, device=d.name)
    return [indptr, *(before_guard(d, torch.from_numpy(part).to(d.name)) for part in parts)]


def sample(
    d: Device, logits: Logits, draws: list[Draw], lead: int = 0, pad: int = 0, mask_index: list[int] | None = None
) -> Drawn:
    """One call. `lead` and `pad`: columns of NaN before and after each row of logits. mask_index: another than that of
    the draws.
    """
    rows, vocab = logits.shape
    rng = np.random.default_rng(vocab)
    whole = np.full((rows, lead + vocab + pad), np.nan, dtype=np.float32)
    whole[:, lead : lead + vocab] = logits
    on_device = before_guard(d, torch.from_numpy(whole).to(d.name))

    def column(name: str, dtype: type[np.generic]) -> torch.Tensor:
        values = np.array([getattr(draw, name) for draw in draws], dtype)
        return before_guard(d, torch.from_numpy(values.view(f"i{values.itemsize}")).to(d.name))

    # A row of zeros forbids everything: rows that are not asked for are noticed.
    words = (vocab + 31) // 32
    mask_rows, index_of = [np.zeros(words, np.uint32)], []
    for draw in draws:
        index_of.append(-1 if draw.masked is None else len(mask_rows))
        if draw.masked is not None:
            mask_rows += [mask_words(draw, vocab, rng), np.zeros(words, np.uint32)]
    stacked = np.pad(np.stack(mask_rows), ((0, 0), (0, pad))).view(np.int32)
    mask = before_guard(d, torch.from_numpy(stacked).to(d.name))
    index = torch.tensor(mask_index or index_of, dtype=torch.int32, device=d.name)
    ids = range(min(vocab, 8))
    lists: dict[str, torch.Tensor] = {}
    saved = 0
    if any(draw.banned for draw in draws):
        bans = csr(d, [tuple((i,) for i in draw.banned) for draw in draws], [(i,) for i in ids], [np.int32])
        lists |= zip(("banned_indptr", "banned_ids"), bans, strict=True)
    if any(draw.occurred for draw in draws):
        names = ("occurred_indptr", "occurred_ids", "output_counts", "in_prompt")
        spare = [(i, 100, True) for i in ids]
        lists |= zip(names, csr(d, [x.occurred for x in draws], spare, [np.int32, np.int32, np.uint8]), strict=True)
        lists |= {name: column(name, np.float32) for name in ("repetition", "frequency", "presence")}
        saved += int(lists["occurred_indptr"][-1])
    if any(draw.logit_bias for draw in draws):
        names = ("bias_indptr", "bias_ids", "bias")
        biases = csr(d, [draw.logit_bias for draw in draws], [(i, 1e4) for i in ids], [np.int32, np.float32])
        lists |= zip(names, biases, strict=True)
        saved += int(lists["bias_indptr"][-1])
    scratch = torch.full((saved + 2 * GUARD,), UNSAVED, dtype=torch.float32, device=d.name)
    if "occurred_ids" in lists or "bias_ids" in lists:
        lists["saved"] = scratch[GUARD:]

    outputs = [
        torch.full((rows + 2 * GUARD,), CANARY, dtype=dtype, device=d.name)
        for dtype in (torch.int32, torch.float32, torch.int32)
    ]
    token, logprob, bad = (output[GUARD : GUARD + rows] for output in outputs)
    # The columns must outlive the call.
    columns = {name: column(name, np.float32) for name in ("temperature", "top_p", "min_p")}
    columns |= {name: column(name, np.int32) for name in ("top_k", "want_logprob")}
    columns |= {"seed": column("seed", np.uint64), "stream": column("stream", np.uint32)}
    columns["position"] = column("position", np.int64)
    has_mask = len(mask_rows) > 1
    d.call("sample", SampleParams(
        num_rows=rows, vocab=vocab, num_mask_rows=len(mask_rows), mask_stride=mask.shape[1],
        logits=on_device[:, lead:].data_ptr(), logits_stride=on_device.stride(0),
        mask=mask.data_ptr() if has_mask else None, mask_index=index.data_ptr() if has_mask else None,
        token=token.data_ptr(), logprob=logprob.data_ptr(), bad=bad.data_ptr(),
        **{name: values.data_ptr() for name, values in (columns | lists).items()},
    ))  # fmt: skip
    for output in outputs:
        outside = torch.cat((output[:GUARD], output[GUARD + rows :]))
        assert (outside == CANARY).all(), "sample wrote outside its outputs"
    # A place for each entry, no two in one, though rows that run one after the other would not mind.
    listed = sum(0 <= entry[0] < vocab for draw in draws for entry in (*draw.occurred, *draw.logit_bias))
    assert (scratch[:GUARD] == UNSAVED).all() and (scratch[GUARD + saved :] == UNSAVED).all(), "sample saved elsewhere"
    assert mask_index or (scratch != UNSAVED).sum() == listed, "entries share a place of saved"
    after = on_device.cpu().numpy()
    assert (after.view(np.int32) == whole.view(np.int32)).all(), "sample left other logits behind"
    return Drawn(token.tolist(), logprob.cpu(), bad.tolist())


def adjustments(draw: Draw, vocab: int) -> Any:
    """As the CPU's sampler takes them. It refuses ids that are none; the device passes over them."""
    from sapwood import _core

    return _core.Adjustments(
        banned=draw.banned, mask=() if draw.masked is None else mask_words(draw, vocab, np.random.default_rng(0)),
        occurred=[entry for entry in draw.occurred if 0 <= entry[0] < vocab], repetition=draw.repetition,
        frequency=draw.frequency, presence=draw.presence,
        logit_bias=[entry for entry in draw.logit_bias if 0 <= entry[0] < vocab],
    )  # fmt: skip


def cpu_sample(logits: Logits, draw: Draw) -> tuple[int, float, bool]:
    """Token, log-probability and bad of the CPU's sampler."""
    from sapwood import _core

    return _core.sample_row(
        logits, temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p, min_p=draw.min_p, seed=draw.seed,
        stream=draw.stream, position=draw.position, adjustments=adjustments(draw, len(logits)),
    )  # fmt: skip


def clamped(logits: Logits) -> Logits:
    largest = np.finfo(np.float32).max
    return np.clip(logits, -largest, largest)


def adjusted(logits: Logits, draw: Draw) -> Logits:
    """Penalties and bias as cpp/sampling/sampler.h has them, by numpy in fp32, all tokens at once."""
    vocab, f32 = len(logits), np.float32
    count, prompt, bias = np.zeros(vocab, f32), np.zeros(vocab, bool), np.zeros(vocab, f32)
    for token, times, in_prompt in draw.occurred:
        if 0 <= token < vocab:
            count[token], prompt[token] = times, in_prompt
    for token, value in draw.logit_bias:
        if 0 <= token < vocab:
            bias[token] = value
    with np.errstate(over="ignore", invalid="ignore"):
        repeated = np.where(logits > 0, logits / f32(draw.repetition), logits * f32(draw.repetition))
        out = np.where(prompt | (count > 0), clamped(repeated), logits)
        out = clamped(out - f32(draw.frequency) * count)
        out = np.where(count > 0, clamped(out - f32(draw.presence)), out)
        out = clamped(out + bias)
    return np.where(np.isfinite(logits), out, logits)


def assert_as_cpu(logits: Logits, draws: list[Draw], drawn: Drawn) -> None:
    """Tokens equal; log-probabilities within rounding of fp64, and NaN where none is wanted.

    The CPU adds them up in another order, but both in double: fp32 hardly sees it.
    """
    for row, draw in enumerate(draws):
        token, cpu_logprob, bad = cpu_sample(logits[row], draw)
        got = (drawn.token[row], bool(drawn.bad[row]))
        assert got == (token, bad), f"row {row}: {got} drawn, the CPU draws {(token, bad)}: {draw}"
        logprob = float(drawn.logprob[row])
        if bad or not draw.want_logprob:
            assert math.isnan(logprob), f"row {row}: log-probability {logprob}"
            continue
        assert abs(logprob - cpu_logprob) <= 1e-13, f"row {row}: {logprob}, the CPU has {cpu_logprob}: {draw}"
        expected = float(torch.from_numpy(logits[row]).double().log_softmax(0)[token])
        assert abs(logprob - expected) <= 1e-7 * (1 + abs(expected)), f"row {row}: {logprob}, not {expected}"


# --- Rows and parameters --------------------------------------------------------------------------------------
def random_logits(rng: np.random.Generator, vocab: int) -> Logits:
    """Smooth, coarse (many ties), with -inf, nearly one-hot, of both zeros, with one likely token."""
    row = rng.normal(0.0, rng.choice([0.01, 1.0, 3.0, 30.0]), vocab).astype(np.float32)
    kind = rng.integers(0, 8)
    if kind == 0:
        row = np.round(row)
    elif kind == 1:
        row[rng.random(vocab) < 0.67] = -np.inf
    elif kind == 2:
        row[rng.integers(vocab)] += 40.0
    elif kind == 3:
        row = np.where(rng.random(vocab) < 0.5, np.float32(0.0), np.float32(-0.0))
    elif kind == 4:
        row = rng.normal(0.0, 2.5, vocab).astype(np.float32)
        row[rng.integers(vocab)] = 17.0
    return row


def random_draw(rng: np.random.Generator, vocab: int) -> Draw:
    """Every filter and every adjustment on or off."""
    few = int(rng.integers(1, 6 if rng.random() < 0.5 else vocab + 6))
    banned = tuple(int(i) for i in rng.integers(-3, vocab + 3, rng.integers(1, 5)))
    masked = tuple(int(i) for i in np.flatnonzero(rng.random(vocab) < rng.choice([0.02, 0.5, 0.98])))
    return Draw(
        temperature=float(rng.choice([0.0, 0.1, 0.7, 1.0, 1.5, 5.0])),
        top_k=few if rng.random() < 0.5 else int(rng.integers(-1, 1)),
        top_p=float(rng.random()) if rng.random() < 0.5 else 1.0,
        min_p=float(rng.random() * rng.random()) if rng.random() < 0.5 else 0.0,
        seed=int(rng.integers(-(2**63), 2**63 - 1)) & (2**64 - 1) if rng.random() < 0.5 else 7,
        stream=int(rng.integers(0, 2**32)) if rng.random() < 0.5 else int(rng.integers(0, 4)),
        position=int(rng.integers(0, 2**62)) if rng.random() < 0.5 else int(rng.integers(0, 10**5)),
        want_logprob=bool(rng.random() < 0.5),
        banned=banned if rng.random() < 0.3 else (),
        masked=masked if rng.random() < 0.3 else None,
        **random_adjustments(rng, vocab),
    )


def random_adjustments(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    """Penalties in two of five rows, biases in two of five; of few tokens or of most, and of ids that are none."""
    chosen: dict[str, Any] = {}

    def some_ids() -> list[int]:
        size = int(rng.integers(1, vocab + 3 if rng.random() < 0.3 else 8))
        return np.unique(rng.integers(-1, vocab + 1, size)).tolist()

    if rng.random() < 0.4:
        chosen["occurred"] = tuple((i, int(rng.choice([0, 0, 1, 2, 77])), bool(rng.random() < 0.5)) for i in some_ids())
        for name, values in (("repetition", (1.0, 1.1, 1.7, 0.6)), ("frequency", (0.0, 0.3, -1.1)),
                             ("presence", (0.0, 1.9, -0.7))):  # fmt: skip
            chosen[name] = float(rng.choice(values))
    if rng.random() < 0.4:
        chosen["logit_bias"] = tuple((i, float(rng.normal(0.0, rng.choice([1.0, 40.0])))) for i in some_ids())
    return chosen


@dataclass(frozen=True)
class Support:
    """What may be drawn, likeliest first, with probabilities. near: rounding may decide who belongs to it."""

    ids: list[int]
    probability: np.ndarray[Any, np.dtype[np.float64]]
    near: bool


def support_of(logits: Logits, draw: Draw) -> Support:
    """By a full sort in fp64; the temperature is positive."""
    temperature, top_p, min_p = (float(np.float32(x)) for x in (draw.temperature, draw.top_p, draw.min_p))
    logits = adjusted(logits, draw)
    allowed = logits > -np.inf
    allowed[[i for i in (*draw.banned, *(draw.masked or ())) if 0 <= i < len(logits)]] = False
    ids = np.flatnonzero(allowed)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    if draw.top_k > 0:
        ids = ids[: draw.top_k]
    if len(ids) == 0:
        return Support([], np.zeros(0), False)
    weight = np.exp((logits[ids].astype(np.float64) - float(logits[ids[0]])) / temperature)
    near = False
    if top_p < 1:
        share = np.cumsum(weight) / weight.sum()
        near |= bool((np.abs(share - top_p) < 2e-6).any())
        weight = weight[: int(np.searchsorted(share, top_p)) + 1]
    if min_p > 0:
        near |= bool((np.abs(weight - min_p) < 1e-5 * min_p).any())
        weight = weight[: max(int((weight >= min_p).sum()), 1)]
    return Support(ids[: len(weight)].tolist(), weight / weight.sum(), near)


# --- The checks -----------------------------------------------------------------------------------------------
def check_random_rows(d: Device) -> int:
    """Rows of every kind in one call: the CPU's token, out of the fp64 support; alone and repeated the same bits."""
    rng = np.random.default_rng(17)
    cases = compared = 0
    for vocab, rows, lead, pad in (
        (1, 4, 0, 0), (2, 6, 1, 3), (31, 16, 0, 1), (64, 12, 0, 0), (1000, 20, 4, 0), (4101, 10, 2, 7),
        (32001, 8, 0, 0), (32001, 3, 0, 3),
    ):  # fmt: skip
        logits = np.stack([random_logits(rng, vocab) for _ in range(rows)])
        draws = [random_draw(rng, vocab) for _ in range(rows)]
        drawn = sample(d, logits, draws, lead, pad)
        assert_as_cpu(logits, draws, drawn)
        for row, draw in enumerate(draws):
            if draw.temperature > 0:
                support = support_of(logits[row], draw)
                assert drawn.bad[row] == (not support.ids)
                assert support.near or drawn.bad[row] or drawn.token[row] in support.ids, f"row {row}: {draw}"
                compared += not support.near
        alone = sample(d, logits[-1:], draws[-1:], 3 - lead % 4)
        last = Drawn(drawn.token[-1:], drawn.logprob[-1:], drawn.bad[-1:])
        last.assert_equal(alone, "a row's bits depend on the other rows or on alignment")
        if vocab in (64, 4101):
            drawn.assert_equal(sample(d, logits, draws, lead, pad), "the same call again gives other bits")
        cases += rows
    assert compared > cases // 2, "the margin leaves nothing to compare"
    return cases


def first_float(low: float, high: float, holds: Callable[[float], bool]) -> float:
    """The smallest fp32 in (low, high] for which `holds`; it does for high and not for low, and changes once."""
    a, b = (int(np.float32(x).view(np.int32)) for x in (low, high))
    # Bits of the magnitude as integers, those of negative numbers below zero: in the order of the numbers.
    a, b = (x if x >= 0 else -(x & 0x7FFFFFFF) for x in (a, b))
    while b - a > 1:
        middle = (a + b) // 2
        if holds(float_of(middle)):
            b = middle
        else:
            a = middle
    return float_of(b)


def float_of(order: int) -> float:
    return math.copysign(float(np.int32(abs(order)).view(np.float32)), order)


def keeping(logits: Logits, count: int, kind: str) -> Draw:
    """Parameters that leave exactly the `count` likeliest tokens."""
    if kind == "top_k":
        return Draw(top_k=count)
    everything = support_of(logits, Draw(top_k=2 * count if kind == "both" else 0)).probability
    if kind == "min_p":
        return Draw(min_p=float(everything[count - 1] + everything[count]) / 2 / float(everything[0]))
    share = np.concatenate(([0.0], np.cumsum(everything)))
    return Draw(top_k=2 * count if kind == "both" else 0, top_p=float(share[count - 1] + share[count]) / 2)


def cut_draws(logits: Logits, count: int, kind: str) -> list[Draw]:
    """At a position where the last of the `count` likeliest tokens wins: the parameter that just leaves it, and the
    next one, which does not.
    """
    last = int(np.argsort(-logits, kind="stable")[count - 1])
    wider, narrower = keeping(logits, count, kind), keeping(logits, count - 1, kind)
    wins = (replace(wider, position=p) for p in range(40000))
    found = next((draw for draw in wins if cpu_sample(logits, draw)[0] == last), None)
    assert found is not None, "no position draws the last token"
    if kind == "top_k":
        return [found, replace(narrower, position=found.position)]
    name = "min_p" if kind == "min_p" else "top_p"
    sign = -1 if kind == "min_p" else 1  # a larger min_p leaves less

    def with_value(value: float) -> Draw:
        changed: dict[str, Any] = {name: sign * value}
        return replace(found, **changed)

    edge = first_float(
        sign * getattr(narrower, name), sign * getattr(wider, name),
        lambda value: cpu_sample(logits, with_value(value))[0] == last,
    )  # fmt: skip
    return [with_value(edge), with_value(float(np.nextafter(np.float32(edge), np.float32(-math.inf))))]


def check_cuts(d: Device) -> int:
    """The last token of the support is drawn where it wins, and with the next smaller support it is not.

    In the list, and in rows whose bucket holds more than the list; with ties and without.
    """
    rng = np.random.default_rng(5)
    cases = 0
    for vocab in (1500, LIST_SIZE + 104):
        smooth = rng.normal(0.0, 0.001, vocab).astype(np.float32)
        ties = (np.round(smooth * 1000) / 256).astype(np.float32)
        wide = rng.normal(0.0, 3.0, vocab).astype(np.float32)
        draws_of = [
            (smooth, [(kind, count) for kind in ("top_k", "top_p", "both", "min_p") for count in (2, 19)]),
            (smooth, [("top_p", 2 * vocab // 3)]),
            (ties, [("top_k", 2), ("top_k", 19), ("top_p", 19), ("both", 19)]),
            (wide, [("top_k", 19), ("top_p", 7), ("both", 19)]),
        ]
        draws = [draw for logits, kinds in draws_of for kind, count in kinds for draw in cut_draws(logits, count, kind)]
        rows = np.stack([logits for logits, kinds in draws_of for _ in range(2 * len(kinds))])
        drawn = sample(d, rows, draws)
        assert_as_cpu(rows, draws, drawn)
        for row, draw, token in zip(rows, draws, drawn.token, strict=True):
            support = support_of(row, draw)
            assert support.near or token in support.ids, f"{token} of {draw}"
        cases += len(draws)
    # Shares that are met exactly: p keeps p * vocab of equal tokens, the next float one more.
    for vocab in (8, 2 * LIST_SIZE):
        rows = np.full((4, vocab), -3.0, np.float32)
        exact = [Draw(top_p=4 / vocab), Draw(top_p=float(np.nextafter(np.float32(4 / vocab), np.float32(1))))]
        position = next(p for p in range(1000) if cpu_sample(rows[0], replace(exact[1], position=p))[0] == 4)
        draws = [replace(draw, position=p) for draw in exact for p in (position, position + 1)]
        drawn = sample(d, rows, draws)
        assert_as_cpu(rows, draws, drawn)
        assert drawn.token[0] < 4 and drawn.token[2] == 4, "a share that is met exactly is cut elsewhere"
        cases += 4
    return cases


def check_scores(d: Device) -> int:
    """To the last bit: noise and z, by the two neighbouring logits between which a draw of two tokens changes hands;
    exp, by log-probabilities near 0. And the largest noise.
    """
    rng = np.random.default_rng(3)
    rows, draws = [], []
    positions = 60 if d.name == "cpu" else 3000
    for position in range(positions):
        draw = Draw(position=position, seed=5, temperature=float(rng.choice([0.3, 1.0, 1.7])))

        def second_wins(logit: float, draw: Draw = draw) -> bool:
            return cpu_sample(np.array([0.25, logit], np.float32), draw)[0] == 1

        edge = first_float(-50.0, 50.0, second_wins)
        for logit in (edge, np.nextafter(np.float32(edge), np.float32(-math.inf))):
            rows.append(np.array([0.25, logit], np.float32))
            draws.append(draw)
    drawn = sample(d, np.stack(rows), draws)
    assert_as_cpu(np.stack(rows), draws, drawn)
    assert drawn.token == [1, 0] * positions
    cases = len(draws)

    rows = [np.array([0.0, -x], np.float32) for x in rng.uniform(3.0, 12.0, positions)]
    draws = [Draw(temperature=0.0, want_logprob=True)] * positions
    assert_as_cpu(np.stack(rows), draws, sample(d, np.stack(rows), draws))
    cases += len(draws)

    # The largest noise of 4e8: it wins from far below the most likely token.
    from sapwood import _core

    lucky, draw = 930, Draw(position=248150)
    noise = [_core.keyed_gumbel(_core.keyed_bits(draw.seed, 0, draw.position, i)) for i in (0, lucky)]
    assert noise[1] > 18
    far = np.full((1, 1000), -60.0, np.float32)
    far[0, 0], far[0, lucky] = 0.0, noise[0] - noise[1] + 0.01
    drawn = sample(d, far, [draw])
    assert_as_cpu(far, [draw], drawn)
    assert drawn.token == [lucky]
    return cases + 1


def by_rules(d: Device) -> int:
    """Each rule by small numbers, read off greedy draws of two tokens: 0 is drawn where it has the value that 1 must be
    adjusted to, 1 where 0 is one bit below it.
    """
    rules: list[tuple[float, Draw, float]] = [
        (3.0, Draw(occurred=((1, 0, True),), repetition=2.0), 1.5),
        (-3.0, Draw(occurred=((1, 0, True),), repetition=2.0), -6.0),
        (3.0, Draw(occurred=((1, 2, False),), repetition=0.5), 6.0),
        (3.0, Draw(occurred=((1, 0, False),), repetition=2.0, frequency=1.0, presence=1.0), 3.0),
        (3.0, Draw(occurred=((1, 5, True),), frequency=0.25), 1.75),
        (3.0, Draw(occurred=((1, 0, True),), frequency=0.25, presence=4.0), 3.0),
        (3.0, Draw(occurred=((1, 1, False),), presence=4.0), -1.0),
        (3.0, Draw(occurred=((1, 5, False),), presence=-4.0), 7.0),
        (3.0, Draw(occurred=((1, 2, True),), repetition=2.0, frequency=1.0, presence=0.5), -1.0),
        (-1.0, Draw(occurred=((1, 1, True),), repetition=2.0, frequency=-3.0), 1.0),
        (3.0, Draw(logit_bias=((1, -5.0),)), -2.0),
        (-1.0, Draw(occurred=((1, 1, True),), repetition=2.0, presence=1.0, logit_bias=((1, 8.0),)), 5.0),
        # Past the ends of fp32.
        (3e38, Draw(occurred=((1, 1, True),), repetition=0.5, presence=2.0**127), FLT_MAX - 2.0**127),
        (-3e38, Draw(occurred=((1, 0, True),), repetition=2.0), -FLT_MAX),
        (1.0, Draw(occurred=((1, 2, False),), frequency=3e38), -FLT_MAX),
        (1.0, Draw(occurred=((1, 2, False),), frequency=-3e38, logit_bias=((1, 3e38),)), FLT_MAX),
        (-1.0, Draw(occurred=((1, 2, False),), repetition=3e38, frequency=3e38, presence=3e38), -FLT_MAX),
        (-3e38, Draw(occurred=((1, 2, False),), repetition=3e38, frequency=-3e38), FLT_MAX),
        (1.0, Draw(occurred=((1, 2, False),), frequency=-3e38, presence=2.0**127), FLT_MAX - 2.0**127),
    ]  # fmt: skip
    rows, draws = [], []
    for logit, draw, value in rules:
        with np.errstate(over="ignore"):
            below = np.nextafter(np.float32(value), np.float32(-math.inf))  # of -FLT_MAX: -inf, which nothing loses to
        for other in (value, below):
            rows.append([other, logit])
            draws.append(replace(draw, temperature=0.0))
    drawn = sample(d, np.array(rows, np.float32), draws)
    assert_as_cpu(np.array(rows, np.float32), draws, drawn)
    for i, (_, draw, value) in enumerate(rules):
        assert drawn.token[2 * i] == 0, f"larger than {value}: {draw}"
        assert drawn.token[2 * i + 1] == 1, f"less than {value}: {draw}"
    return len(draws)


def to_the_last_bit(d: Device) -> int:
    """A penalised token against one that has, raw, what numpy makes of it, and against one bit less."""
    rng = np.random.default_rng(12)
    rows, draws = [], []
    for i in range(60):
        draw = Draw(
            temperature=0.0, occurred=((1, int(rng.integers(0, 300)), True),), repetition=float(rng.uniform(0.5, 2.0)),
            frequency=float(rng.normal()) if i % 2 else 0.0, presence=float(rng.normal()) if i % 3 else 0.0,
            logit_bias=((1, float(rng.normal())),) if i % 5 else (),
        )  # fmt: skip
        raw = np.float32(rng.normal(0.0, 5.0))
        value = adjusted(np.array([0.0, raw], np.float32), draw)[1]
        rows += [[value, raw], [np.nextafter(value, np.float32(-math.inf)), raw]]
        draws += [draw, draw]
    drawn = sample(d, np.array(rows, np.float32), draws)
    assert drawn.token == [0, 1] * (len(draws) // 2), "an adjusted logit has other bits than numpy's"
    return len(draws)


def check_adjustments(d: Device) -> int:
    """Penalties, biases, masks: by rule, to the last bit, as logits that have it all in them, all tokens listed."""
    cases = by_rules(d) + to_the_last_bit(d)
    rng = np.random.default_rng(41)
    for vocab, rows in ((70, 24), (4101, 6)):
        logits = np.stack([random_logits(rng, vocab) for _ in range(rows)])
        draws = [replace(random_draw(rng, vocab), **random_adjustments(rng, vocab)) for _ in range(rows)]
        everywhere = tuple((i, i % 3, i % 2 == 0) for i in range(vocab))
        draws[-1] = Draw(
            occurred=everywhere, repetition=1.2, frequency=0.4, presence=0.2, want_logprob=True, top_p=0.9,
            logit_bias=tuple((i, 0.1 * (i % 7)) for i in range(vocab)),
        )  # fmt: skip
        drawn = sample(d, logits, draws, pad=1)
        assert_as_cpu(logits, draws, drawn)
        plain, unadjusted = logits.copy(), []
        for row, draw in zip(plain, draws, strict=True):
            row[:] = adjusted(row, draw)
            row[[i for i in (*draw.banned, *(draw.masked or ())) if 0 <= i < vocab]] = -np.inf
            unadjusted.append(replace(draw, banned=(), masked=None, occurred=(), logit_bias=()))
        by_hand = sample(d, plain, unadjusted)
        assert (drawn.token, drawn.bad) == (by_hand.token, by_hand.bad), "adjusted logits draw other tokens"
        cases += rows

    # What is not finite is not made so.
    adjustments_of: list[dict[str, Any]] = [
        {"occurred": ((0, 1, True), (1, 0, True)), "repetition": 2.0}, {"logit_bias": ((0, 5.0), (1, 5.0))},
    ]  # fmt: skip
    draws = [Draw(temperature=t, **some) for some in adjustments_of for t in (0.0, 1.0)]
    for value in (-math.inf, math.inf, math.nan):
        broken = np.full((len(draws), 2), value, np.float32)
        drawn = sample(d, broken, draws)
        assert_as_cpu(broken, draws, drawn)
        assert all(drawn.bad), f"{value} is adjusted to a number"
        cases += len(draws)

    # A row of the mask that does not exist makes its row bad, and no other.
    logits = rng.normal(0.0, 1.0, (6, 100)).astype(np.float32)
    draws = [Draw(masked=(3,), occurred=((4, 1, True),), repetition=2.0)] * 6
    num_mask_rows = 2 * len(draws) + 1
    drawn = sample(d, logits, draws, mask_index=[-1, -2, 1, num_mask_rows, 2**31 - 1, -(2**31)])
    assert drawn.bad == [0, 1, 0, 1, 1, 1] and drawn.token[1] == -1
    assert drawn.token[2] == cpu_sample(logits[2], draws[2])[0]
    return cases + 6


# z at which exp has other bits if one of its products and sums is fused: those of r, and of the last four additions. By
# going over all fp32 from -12 to -0.55; fusing one of the others changes none.
FUSED_SHOWS: Final = tuple(float.fromhex(z) for z in (
    "-0x1.0a9caep+1", "-0x1.0a89d6p+2", "-0x1.09accep+3",
    "-0x1.30a2eap+1", "-0x1.872aaap+1", "-0x1.18ee82p+2", "-0x1.4492c2p+2",
    "-0x1.25595cp+1", "-0x1.80f2bap+1", "-0x1.197f86p+2", "-0x1.784730p+2",
    "-0x1.35f104p+1", "-0x1.9fe00cp+1", "-0x1.1e36bcp+2", "-0x1.71e25ep+2",
    "-0x1.49a16cp+1", "-0x1.9886c8p+1", "-0x1.1edf9cp+2", "-0x1.6c4478p+2",
))  # fmt: skip


def mass_of(z: Logits) -> list[int]:
    """trunc(exp(z) * 2^42) by the polynomial of cpp/sampling/sampler.cc, in numpy's fp32."""
    f = np.float32
    shifted = z * f(1.44269504088896341) + f(12582912.0)
    n = shifted - f(12582912.0)
    r = z - n * f(0.693359375)
    r = r - n * f(-2.12194440e-4)
    p = np.full_like(z, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + f(c)
    fraction = (p * (r * r) + r) + f(1)
    power = ((shifted.view(np.uint32) << np.uint32(23)) + np.uint32(0x3F800000)).view(np.float32)
    return [int(float(e) * 2.0**42) for e in fraction * power]


def of_mass(mass: int, below: float) -> list[float]:
    """Few z < `below` whose masses add up to `mass` exactly: the largest that fits, then the same of the rest."""

    def fits(x: float, mass: int) -> bool:
        return mass_of(np.array([-x], np.float32))[0] <= mass

    found = []
    while mass > 0:
        found.append(-first_float(-below, 31.0, partial(fits, mass=mass)))
        mass -= mass_of(np.array(found[-1:], np.float32))[0]
    return found


def share_row(rng: np.random.Generator, top_p: float, more: int) -> tuple[list[float], int]:
    """z, likeliest first, of a row whose first n tokens have the mass floor(top_p * total) where more = 1 and top_p *
    total is no integer: one unit too little. more = 0: with one unit less in the rest, the n tokens are enough. And n.
    """
    n = int(rng.integers(1, 4))
    first = [0.0, *np.sort(-rng.uniform(0.01, 0.5, n - 1)).astype(np.float32).tolist()[::-1]]
    kept = sum(mass_of(np.array(first, np.float32)))
    total = int(kept / Fraction(top_p)) + more  # exact
    rest = total - kept
    bulk: list[float] = []
    choices = np.concatenate((np.array(FUSED_SHOWS, np.float32), -rng.uniform(0.6, 6.0, 8).astype(np.float32)))
    for z in rng.permutation(choices).tolist():
        mass = mass_of(np.array([z], np.float32))[0]
        if mass < rest - 2**36:
            bulk.append(z)
            rest -= mass
    return first + sorted(bulk + of_mass(rest, -0.55), reverse=True), n


def check_masses(d: Device) -> int:
    """Top-p where one unit of 2^-42 decides: of the masses, each as numpy has it, and of their share, rounded up."""
    rng = np.random.default_rng(23)
    rows, draws, kept = [], [], []
    vocab = 64
    for i in range(24):
        top_p = 0.5 if i < 4 else float(np.float32(rng.uniform(0.45, 0.8)))
        for more in (0, 1):
            z, n = share_row(rng, top_p, more)
            row = np.full(vocab, -np.inf, np.float32)
            where = np.sort(rng.permutation(vocab)[: len(z)])  # equal ones: the lowest id is the likeliest
            row[where] = z
            # By integers alone: the shortest prefix that reaches the share.
            masses = mass_of(np.array(z, np.float32))
            target = -int(-Fraction(top_p) * sum(masses) // 1)
            share = int(np.searchsorted(np.cumsum(masses), target)) + 1
            assert share == n + more
            following = int(where[n])
            draw = next(
                draw for draw in (Draw(position=p, top_k=n + 1) for p in range(4000))
                if cpu_sample(row, draw)[0] == following
            )  # fmt: skip
            rows.append(row)
            draws.append(replace(draw, top_k=0, top_p=top_p))
            kept.append(following if more else -1)
    drawn = sample(d, np.stack(rows), draws)
    assert_as_cpu(np.stack(rows), draws, drawn)
    for token, following, row in zip(drawn.token, kept, rows, strict=True):
        assert token == following or (following < 0 and row[token] > -0.55), "one unit of mass is lost or gained"
    return len(draws)


def check_large_rows(d: Device) -> int:
    """Supports that do not fit the list, the largest vocabulary, and noise that is skipped in a long row."""
    rng = np.random.default_rng(9)
    vocab = 32003
    logits = np.stack([
        np.full(vocab, 1.5, np.float32), rng.normal(0.0, 0.5, vocab), np.round(rng.normal(0.0, 1.0, vocab)),
        rng.normal(0.0, 2.5, vocab),
    ]).astype(np.float32)  # fmt: skip
    logits[3, 30000] = 17.0
    filters: list[dict[str, Any]] = [
        {}, {"top_p": 0.5}, {"top_k": 20000, "top_p": 0.7}, {"top_k": 9000, "min_p": 0.5}, {"temperature": 8.0},
        {"temperature": 0.05, "top_k": 50},
    ]  # fmt: skip
    draws = [Draw(position=p, **chosen) for p, chosen in enumerate(filters) for _ in logits]
    rows = np.concatenate([logits] * len(filters))
    assert_as_cpu(rows, draws, sample(d, rows, draws, pad=1))
    cases = len(draws)

    vocab = 262144
    largest = rng.normal(0.0, 2.5, (3, vocab)).astype(np.float32)
    largest[:, -1] = 14.0
    half = tuple(range(0, vocab, 2))
    draws = [
        Draw(want_logprob=True, masked=half), Draw(top_k=40, top_p=0.9, masked=tuple(range(1, vocab, 2))),
        Draw(temperature=0.0, want_logprob=True, banned=(vocab - 1,)),
    ]  # fmt: skip
    assert_as_cpu(largest, draws, sample(d, largest, draws))
    return cases + len(draws)


def check_edges(d: Device) -> int:
    """Broken rows, rows with nothing to draw, one token to draw, and temperatures at the ends of fp32."""
    rng = np.random.default_rng(4)
    cases = 0
    for vocab in (1, 33, 4098):
        rows, draws = [], []
        for at in {0, vocab // 2, vocab - 1}:
            for temperature in (0.0, 1.0):
                for value, masked in ((np.nan, None), (np.inf, None), (np.nan, (at,)), (np.inf, (at,))):
                    row = np.ones(vocab, np.float32)
                    row[at] = value
                    rows.append(row)
                    draws.append(Draw(temperature=temperature, want_logprob=True, masked=masked))
        everything = tuple(range(vocab))
        for temperature in (0.0, 1.0, math.nan):
            rows += [np.full(vocab, -np.inf, np.float32), np.ones(vocab, np.float32), np.ones(vocab, np.float32)]
            draws += [
                Draw(temperature=temperature, top_k=1), Draw(temperature=temperature, masked=everything),
                Draw(temperature=temperature, top_p=0.5, banned=everything),
            ]  # fmt: skip
        drawn = sample(d, np.stack(rows), draws)
        assert all(drawn.bad) and set(drawn.token) == {-1}, "a row without a token is not said to be bad"
        assert_as_cpu(np.stack(rows), draws, drawn)
        cases += len(draws)

    only = np.full(500, -np.inf, np.float32)
    only[321] = -3e38
    spread = rng.normal(0.0, 3.0, 500).astype(np.float32)
    spread[10], spread[11], spread[12] = -3e38, -np.inf, 3e38
    narrow = rng.normal(0.0, 3.0, 500).astype(np.float32)
    zeros = np.array([-1.0, -0.0, 0.0], np.float32).repeat(100)
    # One case each: fewer tokens than k; ids of bans that are none; a banned logit far above the others, which counts
    # in the log-probability; a difference that overflows.
    special: list[tuple[Logits, Draw]] = [
        (np.where(np.arange(500) < 20, np.float32(0), np.float32(-np.inf)), Draw(top_k=100)),
        (np.where(np.arange(500) // 3 == 9, np.float32(0), np.float32(-np.inf)),
         Draw(banned=(-1, -2, -3, -4, -5, -32, -(2**31), 500, 511, 2**31 - 1))),
        (np.where(np.arange(500) == 7, np.float32(300), narrow), Draw(banned=(7,), want_logprob=True)),
        (np.where(np.arange(500) == 7, np.float32(3e38), only), Draw(temperature=math.inf)),
    ]  # fmt: skip
    for row, draw in special:
        stacked, draws = np.repeat(row[None], 6, 0), [replace(draw, position=p) for p in range(6)]
        drawn = sample(d, stacked, draws)
        assert_as_cpu(stacked, draws, drawn)
        assert len(set(drawn.token)) > 1 and not any(drawn.bad)
        cases += len(draws)
    for row in (only, spread, narrow, zeros):
        temperatures = (0.0, -1.0, math.nan, 1e-45, 1e-38, 1e-10, 0.01, 1e30, 3e38, math.inf)
        filters: list[dict[str, Any]] = [
            {}, {"top_k": 1}, {"top_k": 5, "min_p": 0.5}, {"top_p": 0.0}, {"top_p": 0.5, "min_p": 1e-40},
            {"top_k": 600, "top_p": math.nan, "min_p": math.nan}, {"top_p": 1e-45, "min_p": 5.0},
            {"top_p": 1 - 2**-24}, {"top_p": -1.0, "min_p": -1.0, "top_k": -(2**31)},
        ]  # fmt: skip
        draws = []
        for n, temperature in enumerate(temperatures):
            # All filters with a few of the temperatures, all temperatures with a few of the filters.
            for m, chosen in enumerate(filters):
                if n % 5 == m % 5:
                    draws.append(Draw(temperature=temperature, position=n * 100 + m, want_logprob=True, **chosen))
        stacked = np.repeat(row[None], len(draws), 0)
        drawn = sample(d, stacked, draws, pad=1)
        assert_as_cpu(stacked, draws, drawn)
        assert not any(drawn.bad)
        cases += len(draws)
    return cases


def check_distribution(d: Device) -> int:
    """Frequencies over consecutive positions against the softmax of what the filters leave, by chi-square."""
    rng = np.random.default_rng(99)
    logits = rng.normal(0.0, 1.0, 12).astype(np.float32)
    plain = Draw(seed=42)
    cases = 0
    for draw, count in (
        (plain, 100), (replace(plain, temperature=2.5, top_k=9, top_p=0.9, min_p=0.1), 60),
    ):  # fmt: skip
        count *= 1 if d.name == "cpu" else 1000
        draws = [replace(draw, position=p) for p in range(count)]
        drawn = sample(d, np.repeat(logits[None], count, 0), draws)
        support = support_of(logits, draw)
        assert not support.near and set(drawn.token) <= set(support.ids)
        tokens, expected = np.array(drawn.token), support.probability * count
        seen = np.array([(tokens == i).sum() for i in support.ids])
        common = expected >= 5
        assert common.sum() >= 4
        degrees = common.sum() - 1
        chi = (((seen - expected) ** 2 / expected)[common]).sum()
        # Wilson and Hilferty's normal deviate of chi-square: beyond 4.9 has probability 5e-7.
        deviate = ((chi / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
        assert abs(deviate) < 4.9, f"chi-square {chi:.1f} of {degrees} degrees of freedom: {draw}"
        cases += count
    return cases


def check_sample(d: Device) -> int:
    """The number of rows compared. AssertionError where one fails."""
    checks = (
        check_random_rows, check_cuts, check_masses, check_scores, check_adjustments, check_large_rows, check_edges,
        check_distribution,
    )  # fmt: skip
    return sum(check(d) for check in checks)
