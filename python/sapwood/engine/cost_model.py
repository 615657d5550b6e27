"""How long a step will take: t = a + b*tokens + c*kv + d*logit_rows, learned from the steps that ran.

Receives (tokens, kv, logit rows, milliseconds) of every finished step from engine/engine.py; hands the coefficients to
engine/scheduler.py, which cuts prefill chunks so that a step stays within `max_step_ms` while somebody decodes.

Method: least squares over exponentially forgotten normal equations (recursive least squares in information form),
solved under a, b, c, d >= 0. What makes it usable for scheduling:

* Every equation is divided by the size of its step: a 2 s prefill must not drown a hundred 10 ms decodes. (Not by its
  time: then the fast steps of the past would outweigh the slow ones of a machine that has become slow.)
* Steps with prompt tokens and pure decode steps keep *separate* histories, each forgetting only when it learns. A
  thousand decode steps, all alike, would otherwise erase what a prompt token costs, and the next chunk would be far too
  long. For the same reason pure decodes, which are bound by memory, count little: the question is what a mixed step
  takes.
* An observation is clipped to a factor of the prediction, so that one stall (a page fault storm, a suspended machine)
  moves the model a little and a lasting change moves it all the way within some tens of steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

# The first guess is deliberately slow, so that the first chunk beside a running decode is short: milliseconds for a
# step, a token, a KV position, a logit row. A 0.6B model in bf16 on two cores computes a prompt token in about 2 ms.
FIRST_GUESS = (5.0, 2.0, 1e-3, 1.0)
# Weight of the first guess, in observations of a step with such features. Small: two or three real steps outweigh it.
GUESS_WEIGHT = 0.02
GUESS_FEATURES = (1 / 32, 1.0, 50.0, 0.5)
FORGET = 0.97
CLIP = 3.0
DECODE_WEIGHT = 0.05
# Observations believed as they are, before the prediction is good enough to call anything an outlier.
NUM_TRUSTED = 8
# A step's size is its tokens and so many more, which stand for what every step costs.
BASE_SIZE = 16

# Keeps the equations solvable where two features have always gone together.
RIDGE = 1e-9

# Observations taken in between two solutions where nobody asks for one: solving costs ten times what observing does.
SOLVE_EVERY = 16
# After so many observations the newest few change nothing that matters, and are left for the next solution.
SETTLED = 64
SETTLED_EVERY = 4


class CostModel:
    """Online estimate of a step's milliseconds. Not thread safe; owned by the loop. observe() costs ~2 us."""

    __slots__ = ("_decode", "_extend", "_num_observed", "_num_unsolved", "coefficients")

    def __init__(self, first_guess: tuple[float, float, float, float] = FIRST_GUESS) -> None:
        self.coefficients: list[float] = list(first_guess)
        # Each history: the upper triangle of sum(x x^T) (10 numbers) and sum(x y) (4), both divided by the step's size.
        self._decode = [0.0] * 14
        self._extend = [0.0] * 14
        for at, position in enumerate((0, 4, 7, 9)):
            weight = GUESS_WEIGHT * GUESS_FEATURES[at] ** 2
            self._extend[position] = weight
            self._extend[10 + at] = weight * first_guess[at]
        self._num_observed = 0
        self._num_unsolved = 0

    def observe(self, num_tokens: int, num_kv: int, num_logit_rows: int, num_decode_rows: int, ms: float) -> None:
        """A step ran. num_tokens counts every query token, those of decode rows included."""
        if ms <= 0.0 or num_tokens <= 0:
            return
        if self._num_observed >= NUM_TRUSTED:
            if self._num_unsolved >= SOLVE_EVERY or self._num_observed == NUM_TRUSTED:
                self.solve()
            expected = self.predict(num_tokens, num_kv, num_logit_rows)
            ms = min(max(ms, expected / CLIP), expected * CLIP)
        self._num_observed += 1
        inv = 1.0 / (num_tokens + BASE_SIZE)
        t, k, r, y = num_tokens * inv, num_kv * inv, num_logit_rows * inv, ms * inv
        f = FORGET
        s = self._extend if num_tokens > num_decode_rows else self._decode
        s[0] = s[0] * f + inv * inv
        s[1] = s[1] * f + inv * t
        s[2] = s[2] * f + inv * k
        s[3] = s[3] * f + inv * r
        s[4] = s[4] * f + t * t
        s[5] = s[5] * f + t * k
        s[6] = s[6] * f + t * r
        s[7] = s[7] * f + k * k
        s[8] = s[8] * f + k * r
        s[9] = s[9] * f + r * r
        s[10] = s[10] * f + inv * y
        s[11] = s[11] * f + t * y
        s[12] = s[12] * f + k * y
        s[13] = s[13] * f + r * y
        self._num_unsolved += 1

    def solve(self) -> list[float]:
        """The coefficients [a, b, c, d] in ms, all >= 0, up to the newest few observations. ~30 us."""
        if self._num_unsolved >= (1 if self._num_observed < SETTLED else SETTLED_EVERY):
            self._num_unsolved = 0
            m = [e + DECODE_WEIGHT * d for e, d in zip(self._extend, self._decode, strict=True)]
            matrix = [m[0], m[1], m[2], m[3], m[1], m[4], m[5], m[6], m[2], m[5], m[7], m[8], m[3], m[6], m[8], m[9]]
            self.coefficients = solve_non_negative(np.array(matrix).reshape(4, 4), np.array(m[10:]))
        return self.coefficients

    def predict(self, num_tokens: int, num_kv: int, num_logit_rows: int) -> float:
        """Milliseconds, with the coefficients of the last solve()."""
        a, b, c, d = self.coefficients
        return a + b * num_tokens + c * num_kv + d * num_logit_rows


def solve_non_negative(matrix: Floats, target: Floats) -> list[float]:
    """x >= 0 that minimises x^T M x / 2 - target^T x, M symmetric positive definite, a handful of rows.

    Solves for all, drops the most negative unknown, and solves again: not always the exact optimum of Lawson and
    Hanson's method, but never negative, and equal to it where at most one bound is active.
    """
    scale = 1.0 / np.sqrt(np.maximum(matrix.diagonal(), 1e-30))
    scaled = matrix * (scale * scale[:, None])
    np.fill_diagonal(scaled, 1.0 + RIDGE)
    wanted = target * scale
    x = np.linalg.solve(scaled, wanted)
    free = list(range(len(target)))
    while x.min() < 0.0:
        del free[int(x.argmin())]
        if not free:
            return [0.0] * len(target)
        x = np.linalg.solve(scaled[np.ix_(free, free)], wanted[free])
    out = [0.0] * len(target)
    for i, value in zip(free, x, strict=True):
        out[i] = float(value * scale[i])
    return out
