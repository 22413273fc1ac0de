"""How a code is drawn by its logits: guidance, temperature, the most probable ones, and a number that picks one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gmdist.diffusion.config import MAX_GUIDANCE
from gmdist.errors import DivergedError


@dataclass
class CodeSamplerConfig:
    """How codes are drawn from a trained prior; with the defaults, from its own distribution."""

    temperature: float = 1.0  # logits are divided by it: below 1, probable codes become more so
    top_k: int | None = None  # codes are drawn from so many of the most probable; None: from all
    top_p: float = 1.0  # and from the fewest of these that have this probability together (Holtzman 2020, Sec. 3.1)
    guidance: float = 1.0  # 1: none; above, classes are followed more closely

    def problem(self) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if not 0.0 < self.temperature < math.inf:
            return f"temperature: {self.temperature}; must be a number above 0: top_k 1 takes the most probable code"
        if self.top_k is not None and self.top_k < 1:
            return f"top_k: {self.top_k}; must be at least 1, or null for all codes"
        if not 0.0 < self.top_p <= 1.0:
            return f"top_p: {self.top_p}; must be above 0, where no code would be left, and at most 1, their sum"
        if not 0.0 <= self.guidance <= MAX_GUIDANCE:
            return f"guidance: {self.guidance}; must be from 0 to {MAX_GUIDANCE:g}"
        return None


def guided(with_class: Tensor, without: Tensor, guidance: float) -> Tensor:
    """Logits [N, K] that lead from those without the class through those with it (Ho 2022, Eq. 6)."""
    return without + guidance * (with_class - without)


def probabilities(logits: Tensor, config: CodeSamplerConfig) -> Tensor:
    """Of each code to be drawn, by logits [N, K]: float64 [N, K]. Of equal codes, top_k and top_p keep the first.

    DivergedError for logits that are not finite, of which nothing can be drawn.
    """
    logits = logits.double()
    most = logits.amax(dim=1, keepdim=True)
    if not most.isfinite().all():
        raise DivergedError("no code can be drawn: the model's logits are not finite; check its weights")
    # The most probable one stays at 0, and no temperature is too small: what others become is at least -inf.
    logits = (logits - most) / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[1]:
        order = logits.argsort(dim=1, descending=True, stable=True)
        logits = logits.scatter(1, order[:, config.top_k :], -torch.inf)
    found = logits.softmax(dim=1)
    if config.top_p == 1.0:
        return found
    ordered, order = found.sort(dim=1, descending=True, stable=True)
    kept = ordered.where(ordered.cumsum(dim=1) - ordered < config.top_p, 0.0)  # those before it are not enough
    return torch.zeros_like(found).scatter(1, order, kept / kept.sum(dim=1, keepdim=True))


def drawn(found: Tensor, quantiles: Tensor) -> Tensor:
    """The code at a quantile in (0, 1), float64 [N], of probabilities float64 [N, K]: int64 [N]."""
    sums = found.cumsum(dim=1)
    return torch.searchsorted(sums, (quantiles * sums[:, -1])[:, None], right=True)[:, 0]
