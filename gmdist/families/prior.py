"""The family that priors are: a network that predicts each code of an image from those before it."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gmdist import rng
from gmdist.errors import ConfigError
from gmdist.families.code_sampler import CodeSamplerConfig, drawn, guided, probabilities
from gmdist.families.coding import Coding
from gmdist.families.conditioning import Conditioner, ConditioningConfig, EncoderConfig, Told, together
from gmdist.families.family import Batch, Condition, Family, Metrics, Phase, Surroundings
from gmdist.nets.causal_transformer import CausalTransformer
from gmdist.nets.pixelcnn import GatedPixelCNN


@dataclass(kw_only=True)
class PriorConfig:
    """What a prior is told of an image, and how it is drawn from."""

    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)  # of kind none or class
    sampler: CodeSamplerConfig = field(default_factory=CodeSamplerConfig)

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if self.conditioning.kind == "text":
            return "conditioning.kind: 'text'; a prior reads no captions: take none or class"
        if self.conditioning.text != EncoderConfig():
            return f"conditioning.text: {self.conditioning.text}; a prior reads no captions: leave it out"
        if problem := self.conditioning.problem():
            return f"conditioning.{problem}"
        if problem := self.sampler.problem() or self.conditioning.guidance_problem(self.sampler.guidance):
            return f"sampler.{problem}"
        return None


class Prior(Family):
    """The likelihood of an image's codes as a product over them, in order, under its class."""

    averaged = ("prior",)
    prior: CausalTransformer | GatedPixelCNN  # made by each family

    def __init__(self, config: PriorConfig, surroundings: Surroundings, coding: Coding) -> None:
        """ConfigError: guidance of a model that is told nothing."""
        super().__init__()
        self.sampler, self.seed = config.sampler, surroundings.seed
        self.coding, self.cached = coding, coding.cached
        self.conditioner = Conditioner(config.conditioning, surroundings)
        if self.conditioner.kind == "none" and config.sampler.guidance != 1.0:
            raise ConfigError(
                f"family.sampler.guidance: {config.sampler.guidance}; must be 1, or data.num_classes be set and "
                "family.conditioning.kind be class: the model is told nothing that it could follow"
            )
        self.conditioner.check_guidance("family.sampler", config.sampler.guidance)
        self.inputs = (*self.inputs, *self.conditioner.inputs)
        self.conditions = self.conditioner.conditions

    def initialize(self, batch: Batch) -> None:
        """Refuse codes that are not the tokenizer's."""
        self.coding.check(batch)

    def phases(self) -> list[Phase]:
        """One network, one loss; the tokenizer stays frozen."""
        return [Phase("prior", "prior", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The cross-entropy of a code, in nats."""
        loss = self._nats(self.coding.of_batch(batch), self.conditioner.of_training(batch)).mean()
        return loss, {"loss": loss.detach()}

    def evaluate(self, batch: Batch) -> Metrics:
        """The same with every class given."""
        return {"loss": self._nats(self.coding.checked(batch), self.conditioner.of_batch(batch)).mean()}

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """The log-likelihood of each sample's codes, in nats."""
        nats = self._nats(self.coding.checked(batch), self.conditioner.of_batch(batch))
        return {"log_likelihood": -nats.sum(dim=1)}

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Images [N, C, H, W] for keys [N]."""
        return self._draw(keys.new_zeros(len(keys), *self.coding.shape), 0, keys, condition)

    def complete(self, rows: Tensor, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Images [N, C, H, W] for keys [N], whose first rows of pixels are given [N, C, R, W]."""
        return self._draw(*self.coding.begun(rows), keys, condition)

    def _nats(self, codes: Tensor, told: Told) -> Tensor:
        """The cross-entropy of each code [N, L], of int64 [N, *shape]."""
        logits = self.prior(codes, told.label)  # [N, *shape, K]
        return F.cross_entropy(logits.flatten(0, -2), codes.flatten(), reduction="none").view(len(codes), -1)

    def _draw(self, codes: Tensor, given_rows: int, keys: Tensor, condition: Condition | None) -> Tensor:
        """Images [N, C, H, W] for keys [N]; the first rows of their codes int64 [N, *shape] are given."""
        told = self.conditioner.of_request(keys, condition)
        quantiles = rng.quantiles(self.seed, "sample", keys, (math.prod(self.coding.shape),))
        nothing = None if self.sampler.guidance == 1.0 else self.conditioner.nothing(len(keys), keys.device)
        if nothing is not None:  # each code is drawn once, and follows both with the class and without it
            told, codes = together(told, nothing), torch.cat([codes, codes])

        def choose(logits: Tensor, number: int) -> Tensor:
            if nothing is not None:
                with_class, without = logits.chunk(2)
                logits = guided(with_class, without, self.sampler.guidance)
            chosen = drawn(probabilities(logits, self.sampler), quantiles[:, number])
            return chosen if nothing is None else torch.cat([chosen, chosen])

        return self.coding.shown(self.prior.draw(codes, given_rows, told.label, choose)[: len(keys)])
