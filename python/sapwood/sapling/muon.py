"""The optimizer of the hidden matrices, for train.py: momentum whose every update is made orthogonal.

Muon is Jordan et al. 2024, with the update's size in AdamW's measure as in Liu et al. 2025 ("Muon is scalable for LLM
training"). torch.optim has it too, but orthogonalises in bfloat16, which a CPU without bfloat16 arithmetic emulates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About the nearest semi-orthogonal matrix, by Newton and Schulz's iteration with Jordan's coefficients.

    The singular values end between 0.7 and 1.2, which is as good as 1 here.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.T


class Muon(torch.optim.Optimizer):
    """For matrices only. lr and weight_decay (decoupled) are what they would be for AdamW."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient; there is no use for a closure here."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov's
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * math.sqrt(max(matrix.shape)) * group["lr"])
