"""Vector quantization: features to the nearest of a codebook's codes, and what the codebook learns from that."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmdist.checks import at_least, between, nonnegative, one_of
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.kmeans import kmeans, nearest, sums_of
from gmdist.nets.products import Linear

LEARNED_BY = ("averages", "gradient")
ESTIMATORS = ("straight_through", "rotation")
_MAX_CODES, _MAX_CHANNELS = 1 << 20, 1 << 16
_SMOOTHING = 1e-5  # of Laplace, in uses: as in the published code of van den Oord 2017
_SHORTEST = 1e-30  # a sum of vectors that is shorter has no direction
_SHORT = 1e-3  # ratio of two vectors' lengths below which the shorter one is taken for zero
_REVIVED_A_STEP = 64  # the most: each of them is sent to all workers

Reduce = Callable[[Tensor], Tensor]  # of a tensor of each worker, one for all


@dataclass
class QuantizerConfig:
    """The codebook, how it learns, and how gradients pass it."""

    codebook_size: int = 512  # codes
    code_channels: int | None = None  # features are projected to it, and codes back (Yu 2022, Sec. 3.2); None: neither
    normalize: bool = False  # codes, and what is compared with them, have length 1
    learned_by: str = "averages"  # averages of the vectors nearest to each code; gradient: a loss and the optimizer
    decay: float = 0.99  # a step, of these averages and of how often each code is used
    estimator: str = "straight_through"  # of the encoder's gradient; or rotation
    commitment_weight: float = 0.25  # of the squared distance of features from their codes, for the encoder
    kmeans_steps: int = 10  # of Lloyd's algorithm, on features of the first samples; 0: codes start at random
    dead_below: float = 0.05  # a code that is used less, in the average, where 1 is the mean of all codes
    revive: bool = False  # put dead codes, up to 64 a step, where vectors of the batch are; with averages only

    def problem(self) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if problem := between(2, _MAX_CODES, codebook_size=self.codebook_size):
            return problem
        if self.code_channels is not None and not 1 <= self.code_channels <= _MAX_CHANNELS:
            return f"code_channels: {self.code_channels}; must be from 1 to {_MAX_CHANNELS}, or null for no projection"
        if self.code_channels == 1 and self.normalize and self.codebook_size > 2:
            return f"code_channels: 1; must be at least 2 for {self.codebook_size} codes of length 1: only 1 and -1 are"
        if problem := one_of(LEARNED_BY, learned_by=self.learned_by) or one_of(ESTIMATORS, estimator=self.estimator):
            return problem
        if not 0.0 < self.decay < 1.0:
            return f"decay: {self.decay}; must be above 0 and below 1"
        if problem := nonnegative(commitment_weight=self.commitment_weight):
            return problem
        if problem := at_least(0, kmeans_steps=self.kmeans_steps):
            return problem
        if not 0.0 <= self.dead_below < 1.0:
            return f"dead_below: {self.dead_below}; must be at least 0 and below 1"
        if self.revive and self.learned_by == "gradient":
            return (
                "revive: true; goes with learned_by: averages. What the optimizer learns, it also holds in shards and "
                "in fp32, which would undo what is written to the codes"
            )
        return None


class Quantized(NamedTuple):
    """What became of features."""

    features: Tensor  # [..., C]; the gradient goes on to the encoder
    tokens: Tensor  # int64 [...]
    vectors: Tensor  # [..., D], detached: what codes were compared with
    loss: Tensor  # scalar: the weighted commitment loss and, for codes learned by gradient, theirs
    commitment: Tensor  # scalar, detached: the mean squared distance to the nearest code, an element


class Codebook(nn.Module):
    """Codes, and how often each is used: a moving average over steps.

    Uses are summed in `observe` over a step's micro-batches, and taken in by `update` over all workers.
    """

    usage: Tensor  # [K], in uses a step
    observed: Tensor  # [K, sums + 1], of this step: for each code the sums of what is averaged, and its uses

    def __init__(self, config: QuantizerConfig, num_sums: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("usage", torch.ones(config.codebook_size))
        # Of one step: in checkpoints as all buffers, and of no use to those who read the weights.
        self.register_buffer("observed", torch.zeros(config.codebook_size, num_sums + 1), persistent=False)

    def forward(self) -> Tensor:
        """The codes [K, D], fp32 or float64."""
        raise NotImplementedError

    def start(self, codes: Tensor) -> None:
        """Begin with codes [K, D]."""
        raise NotImplementedError

    def observe(self, vectors: Tensor, tokens: Tensor) -> None:
        """Take in the vectors [N, D] of a micro-batch, and their codes int64 [N]."""
        raise NotImplementedError

    def update(self, total: Reduce, gathered: Reduce) -> dict[str, Tensor]:
        """End a step: the averages move on.

        Args:
            total: the sum of a tensor over all workers.
            gathered: the tensors of all workers, one after the other.

        Returns:
            Of the step: the perplexity of the uses, and the shares of codes that were used, and that are dead.
        """
        observed = total(self.observed)
        uses = observed[:, -1]
        self._average(observed)
        dead = self.usage < self.config.dead_below * self.usage.mean()
        self._revive(dead, gathered)
        found = {"perplexity": perplexity(uses), "used_share": (uses > 0).to(uses.dtype).mean()}
        self.observed.zero_()
        return found | {"dead_share": dead.to(uses.dtype).mean()}

    def _average(self, observed: Tensor) -> None:
        self.usage.lerp_(observed[:, -1], 1.0 - self.config.decay)

    def _revive(self, dead: Tensor, gathered: Reduce) -> None:
        """Move dead codes, bool [K], to where they will be used."""


class LearnedCodebook(Codebook):
    """Codes that an optimizer learns."""

    def __init__(self, config: QuantizerConfig, channels: int) -> None:
        super().__init__(config, num_sums=0)
        self.embedding = nn.Parameter(torch.randn(config.codebook_size, channels))

    def forward(self) -> Tensor:
        # A copy: ZeRO's stage 3 takes the parameter away when this returns.
        codes = at_least_fp32(self.embedding).clone()
        return F.normalize(codes, dim=1) if self.config.normalize else codes

    def start(self, codes: Tensor) -> None:
        self.embedding.copy_(codes)

    def observe(self, vectors: Tensor, tokens: Tensor) -> None:
        self.observed += sums_of(vectors[:, :0].to(self.observed.dtype), tokens, len(self.observed))


class AveragedCodebook(Codebook):
    """Codes that are moving averages of the vectors nearest to them (van den Oord 2017, App. A.1).

    The paper does not say what the averages start with. Here a code's start counts as one use, as in
    vector-quantize-pytorch: the more vectors a step has, the sooner it is forgotten. In Sonnet, whose averages are
    without the bias of their start, it counts for nothing, and codes that the first step does not use become zero.
    """

    sums: Tensor  # [K, D], moving averages: with `usage` they make the codes
    candidates: Tensor  # [R, D], of this step: the vectors of the highest priority
    priority: Tensor  # int64 [R]; -1: none yet

    def __init__(self, config: QuantizerConfig, channels: int) -> None:
        super().__init__(config, channels)
        codes = torch.randn(config.codebook_size, channels)
        self.register_buffer("sums", F.normalize(codes, dim=1) if config.normalize else codes)
        if config.revive:
            count = min(_REVIVED_A_STEP, config.codebook_size)
            self.register_buffer("candidates", torch.zeros(count, channels), persistent=False)
            self.register_buffer("priority", torch.full((count,), -1), persistent=False)

    def forward(self) -> Tensor:
        uses = self.usage.sum()
        smoothed = (self.usage + _SMOOTHING) / (uses + len(self.usage) * _SMOOTHING) * uses
        codes = self.sums / smoothed[:, None]
        return F.normalize(codes, dim=1) if self.config.normalize else codes

    def start(self, codes: Tensor) -> None:
        self.usage.fill_(1.0)
        self.sums.copy_(codes)

    def observe(self, vectors: Tensor, tokens: Tensor) -> None:
        self.observed += sums_of(vectors.to(self.observed.dtype), tokens, len(self.observed))

    def offer(self, vectors: Tensor, priority: Tensor) -> None:
        """Let dead codes be put where vectors [N, D] of a micro-batch are. Only if the config says `revive`.

        Args:
            vectors: of `Quantizer.quantize`.
            priority: int64 [N], at least 0 and different for all vectors of a step, whichever worker has them.
        """
        vectors = torch.cat([self.candidates, vectors.to(self.candidates.dtype)])
        self._choose(vectors, torch.cat([self.priority, priority]))

    def _choose(self, vectors: Tensor, priority: Tensor) -> None:
        """Let those of the vectors [N, D] with the highest priorities [N] be the candidates."""
        priority, highest = priority.topk(len(self.priority))
        self.candidates.copy_(vectors[highest])
        self.priority.copy_(priority)

    def _average(self, observed: Tensor) -> None:
        super()._average(observed)
        self.sums.lerp_(observed[:, :-1], 1.0 - self.config.decay)
        if self.config.normalize:
            # What is not used keeps its direction, of which ever shorter sums would leave nothing.
            lengths = self.sums.norm(dim=1, keepdim=True)
            self.sums.mul_(torch.where(lengths < _SMOOTHING, _SMOOTHING / lengths.clamp(min=_SHORTEST), 1.0))

    def _revive(self, dead: Tensor, gathered: Reduce) -> None:
        """The first takes the place of the first candidate, and so on; each as if it were used an equal share."""
        if not self.config.revive:
            return
        self._choose(gathered(self.candidates), gathered(self.priority))
        share = self.usage.mean()
        number = dead.cumsum(0) - 1  # of a dead code among them
        place = number.clamp(0, len(self.priority) - 1)
        revived = dead & (number == place) & (self.priority[place] >= 0)
        self.sums.copy_(torch.where(revived[:, None], share * self.candidates[place], self.sums))
        self.usage.copy_(torch.where(revived, share, self.usage))
        self.priority.fill_(-1)


class Quantizer(nn.Module):
    """A codebook between two projections, which are left out where codes are as wide as features."""

    def __init__(self, config: QuantizerConfig, channels: int, out_channels: int | None = None) -> None:
        """out_channels: of the features that codes become; None: as many as come."""
        super().__init__()
        self.config = config
        width, out_channels = config.code_channels or channels, out_channels or channels
        self.project_in = nn.Identity() if config.code_channels is None else Linear(channels, width)
        is_whole = config.code_channels is None and out_channels == width
        self.project_out = nn.Identity() if is_whole else Linear(width, out_channels)
        kind = AveragedCodebook if config.learned_by == "averages" else LearnedCodebook
        self.codebook: Codebook = kind(config, width)

    def quantize(self, features: Tensor) -> Quantized:
        """Features [..., C] of any type to codes."""
        vectors, codes = self._vectors(features), self.codebook()
        tokens = nearest(vectors.detach().flatten(0, -2), codes.detach()).view(vectors.shape[:-1])
        chosen = F.embedding(tokens, codes)
        commitment = F.mse_loss(vectors, chosen.detach())
        loss = self.config.commitment_weight * commitment
        if codes.requires_grad:  # van den Oord 2017, Eq. 3, second term
            loss = loss + F.mse_loss(chosen, vectors.detach())
        estimate = rotated if self.config.estimator == "rotation" else straight_through
        passed = self.project_out(estimate(vectors, chosen.detach()))
        return Quantized(passed, tokens, vectors.detach(), loss, commitment.detach())

    def tokens(self, features: Tensor) -> Tensor:
        """The codes of features [..., C]: int64 [...]."""
        vectors = self._vectors(features)
        return nearest(vectors.flatten(0, -2), self.codebook()).view(vectors.shape[:-1])

    def lookup(self, tokens: Tensor) -> Tensor:
        """The features [..., C] of codes int64 [...]."""
        return self.project_out(F.embedding(tokens, self.codebook()))

    @torch.no_grad()
    def start(self, features: Tensor, draw: Callable[[int], Tensor]) -> None:
        """Begin with the centres of features [N, C], at least as many as codes; `draw` is that of `kmeans`."""
        size, steps = self.config.codebook_size, self.config.kmeans_steps
        self.codebook.start(kmeans(self._vectors(features), size, steps, draw, normalize=self.config.normalize))

    def _vectors(self, features: Tensor) -> Tensor:
        """What codes are compared with: [..., D], fp32 or float64."""
        vectors = at_least_fp32(self.project_in(features))
        return F.normalize(vectors, dim=-1) if self.config.normalize else vectors


def straight_through(vectors: Tensor, codes: Tensor) -> Tensor:
    """Codes [..., D] for vectors [..., D], whose gradient is that of the codes (Bengio 2013; van den Oord 2017)."""
    return codes + (vectors - vectors.detach())


def rotated(vectors: Tensor, codes: Tensor) -> Tensor:
    """Codes [..., D] for vectors [..., D], by the rotation and scale that take one to the other (Fifty 2024, Sec. 4.2).

    Both are constants of the gradient, which so keeps its angle with the vector that it arrives at. Between a vector
    and a code of which one is over a thousand times as long as the other, there is no angle to speak of, and the scale
    would be that of the gradient: there it is the straight-through one.
    """
    with torch.no_grad():
        length, code_length = (x.norm(dim=-1, keepdim=True) for x in (vectors, codes))
        turns = (length > _SHORT * code_length) & (code_length > _SHORT * length)
        scale = torch.where(turns, code_length / length, 0.0)
        e, q = (F.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny) for x in (vectors, codes))
        r = F.normalize(e + q, dim=-1, eps=1e-6)
    along_r, along_e = ((x * vectors).sum(dim=-1, keepdim=True) for x in (r, e))
    turned = scale * (vectors - 2.0 * along_r * r + 2.0 * along_e * q)
    return straight_through(torch.where(turns, turned, vectors), codes)


def perplexity(uses: Tensor) -> Tensor:
    """The number of equally used codes with the same entropy, a scalar, of how often each code is used [K]."""
    shares = uses / uses.sum()
    return torch.exp(torch.special.entr(shares).sum())
