"""The family that diffusion families are: a denoiser of clean data, in pixels or in latents."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gmdist.diffusion.config import DiffusionConfig
from gmdist.diffusion.process import Diffusion, Predict, PredictBoth
from gmdist.errors import ConfigError
from gmdist.families.conditioning import Conditioner, ConditioningConfig, Denoiser, Told, together
from gmdist.families.denoising import denoising_loss, noise_level_losses, sample_denoiser
from gmdist.families.family import Batch, Condition, Family, Metrics, Phase, Surroundings
from gmdist.interchange.initial import check_initial, initial_problem, initial_state, process_doubt
from gmdist.interchange.spec import NetworkSpec
from gmdist.nets import dit, text, unet
from gmdist.nets.dit import DiTConfig
from gmdist.nets.unet import UNetConfig

NETWORKS = ("unet", "dit")
_FOLDERS = {"unet": "unet", "dit": "transformer"}  # of a network in a pipeline of diffusers


@dataclass(kw_only=True)
class DenoiserConfig:
    """A network, the noise that it learns to remove, and what it is told of a sample."""

    network: str = "unet"  # unet or dit
    unet: UNetConfig = field(default_factory=UNetConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    # A folder of diffusers, on every worker's machine: the network's, or that of a pipeline with it. Read when the run
    # starts; from then on the weights are in its checkpoints.
    init_from: str | None = field(default=None, metadata={"location": True})

    @property
    def granularity(self) -> int:
        """What the sides of the denoiser's input must be multiples of."""
        return self.dit.patch_size if self.network == "dit" else self.unet.downsampling

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if self.network not in NETWORKS:
            return f"network: '{self.network}'; must be one of {', '.join(NETWORKS)}"
        if problem := self.conditioning.problem():
            return f"conditioning.{problem}"
        if self.network == "dit" and self.conditioning.kind == "text":
            return "network: 'dit'; attends to no captions: take unet, or another conditioning.kind"
        if self.network == "dit" and (problem := self.dit.problem()):
            return f"dit.{problem}"
        if self.network == "unet" and (problem := self._unet_problem()):
            return f"unet.{problem}"
        if problem := self.diffusion.problem():
            return f"diffusion.{problem}"
        if problem := self.conditioning.guidance_problem(self.diffusion.sampler.guidance):
            return f"diffusion.sampler.{problem}"
        return initial_problem(self.init_from)

    def initial_doubt(self) -> str | None:
        """How the pipeline that gives the first weights was trained otherwise, in words; None if it was not."""
        return None if self.init_from is None else process_doubt(self.init_from, self.diffusion)

    def _unet_problem(self) -> str | None:
        is_text = self.conditioning.kind == "text"
        if self.unet.context_channels is not None and not is_text:
            return f"context_channels: {self.unet.context_channels}; is for captions: set conditioning.kind to text"
        if self.unet.vector_channels is not None:
            return f"vector_channels: {self.unet.vector_channels}; must be null: this family has no such vector"
        known = self.unet.context_channels or (1 if is_text else None)  # the true width is the encoder's
        return replace(self.unet, context_channels=known).problem()


class DenoiserFamily(Family):
    """A denoiser; `clean` and `shown` say of what."""

    averaged = ("denoiser",)
    blocks = (*unet.BLOCKS, *dit.BLOCKS, *text.BLOCKS)
    clip: float | None = None  # bound of the clean data's absolute values; None: they have none

    def __init__(
        self, config: DenoiserConfig, surroundings: Surroundings, shape: tuple[int, int, int], source: str
    ) -> None:
        """Draw the weights.

        Args:
            config: of the family.
            surroundings: of the run.
            shape: of one sample's clean data.
            source: where that shape is from, for errors.

        Raises:
            ConfigError: the network cannot have data of this shape, or the captions' encoder does not fit.
        """
        super().__init__()
        if shape[1] % config.granularity:
            key = "dit.patch_size" if config.network == "dit" else "unet.multipliers"
            raise ConfigError(
                f"family.{key}: the network needs sides divisible by {config.granularity}; {source} {shape[1]}"
            )
        self.config, self.seed, self.shape = config, surroundings.seed, shape
        self.diffusion = Diffusion(config.diffusion)
        self.conditioner = Conditioner(config.conditioning, surroundings)
        self.conditioner.check_guidance("family.diffusion.sampler", config.diffusion.sampler.guidance)
        self.num_classes = self.conditioner.num_classes
        self.inputs = (*self.inputs, *self.conditioner.inputs)
        self.conditions = self.conditioner.conditions
        self.spec = _spec(config, shape, self.conditioner)
        self.denoiser = Denoiser(self.spec.build(), self.conditioner.trained_encoder())

    def clean(self, batch: Batch) -> Tensor:
        """The clean data of a batch [N, *shape]."""
        raise NotImplementedError

    def shown(self, x: Tensor) -> Tensor:
        """Clean data [N, *shape] as images [N, C, H, W] in [-1, 1]."""
        raise NotImplementedError

    def initialize(self, batch: Batch) -> None:
        """Read the network's first weights, where they are another's."""
        if self.config.init_from is not None:
            state = initial_state(self.config.init_from, _FOLDERS[self.config.network], self.spec)
            self.denoiser.network.load_state_dict(state)

    def check_files(self) -> None:
        """Compare them with the run's network."""
        if self.config.init_from is not None:
            check_initial(self.config.init_from, _FOLDERS[self.config.network], self.spec)

    def phases(self) -> list[Phase]:
        """One network, one loss; all else stays frozen."""
        return [Phase("denoiser", "denoiser", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The weighted squared error of the prediction."""
        predict = self._predict(self.conditioner.of_training(batch))
        loss = denoising_loss(predict, self.diffusion, self.clean(batch), batch["key"], self.seed).mean()
        return loss, {"loss": loss.detach()}

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Images [N, C, H, W] for keys [N]."""
        return self._draw(keys, self.conditioner.of_request(keys, condition))

    def preview(self, batch: Batch) -> Tensor:
        """Samples under the batch's captions, or of each class in turn."""
        if self.conditioner.kind == "text":
            return self._draw(batch["key"], self.conditioner.of_batch(batch))
        return self.sample(batch["key"])

    def evaluate(self, batch: Batch) -> Metrics:
        """The training loss with every condition given, and the unweighted loss by noise level."""
        predict = self._predict(self.conditioner.of_batch(batch))
        return noise_level_losses(predict, self.diffusion, self.clean(batch), batch["key"], self.seed)

    def _draw(self, keys: Tensor, told: Told) -> Tensor:
        """Images [N, C, H, W] for keys [N]. Texts are read once, for all steps."""
        is_guided = self.diffusion.config.sampler.guidance != 1.0
        nothing = self.conditioner.nothing(len(keys), keys.device) if is_guided else None
        told = self.denoiser.read(told)
        x = sample_denoiser(
            self._predict(told),
            self._predict_both(told, None if nothing is None else self.denoiser.read(nothing)),
            self.diffusion,
            keys,
            self.shape,
            self.seed,
            self.clip,
        )
        return self.shown(x)

    def _predict(self, told: Told) -> Predict:
        return lambda x, times: self.denoiser(x, times, told)

    def _predict_both(self, told: Told, nothing: Told | None) -> PredictBoth | None:
        """The denoiser with and without what it is told, in one pass, for guidance."""
        if nothing is None:
            return None
        both = together(told, nothing)

        def predict(x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
            conditional, free = self.denoiser(torch.cat([x, x]), torch.cat([times, times]), both).chunk(2)
            return conditional, free

        return predict


def _spec(config: DenoiserConfig, shape: tuple[int, int, int], conditioner: Conditioner) -> NetworkSpec:
    channels, side, _ = shape
    if config.network == "dit":
        return NetworkSpec(config.dit, channels, conditioner.num_classes, size=side)
    width = conditioner.context_channels
    if config.unet.context_channels not in (None, width):
        raise ConfigError(
            f"family.unet.context_channels: {config.unet.context_channels}; the captions' encoder has {width}: "
            "leave it out"
        )
    unet = replace(config.unet, context_channels=width, vector_channels=conditioner.vector_channels)
    return NetworkSpec(unet, channels, conditioner.num_classes, size=side)
