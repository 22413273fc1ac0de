"""A gated PixelCNN over the levels of pixels, or over the tokens of a frozen tokenizer (van den Oord 2016b)."""

import math
from dataclasses import dataclass, field

from gmdist.families.coding import Pixels, Tokens
from gmdist.families.family import Batch, Metrics, Surroundings
from gmdist.families.prior import Prior, PriorConfig
from gmdist.nets import pixelcnn
from gmdist.nets.pixelcnn import GatedPixelCNN, GatedPixelCNNConfig


@dataclass(kw_only=True)
class PixelCNNConfig(PriorConfig):
    """A PixelCNN of pixels, or of the tokens of another run."""

    # Run folder, or checkpoint, of a tokenizer; None: the 256 levels of each channel of each pixel are drawn.
    first_stage: str | None = field(default=None, metadata={"location": True})
    network: GatedPixelCNNConfig = field(default_factory=GatedPixelCNNConfig)

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        if problem := self.network.problem():
            return f"network.{problem}"
        return super().problem(image_size)


class PixelCNN(Prior):
    """The network, and the frozen tokenizer where there is one."""

    blocks = pixelcnn.BLOCKS

    def __init__(self, config: PixelCNNConfig, surroundings: Surroundings) -> None:
        has_tokens = config.first_stage is not None
        coding = Pixels(surroundings) if config.first_stage is None else Tokens(config.first_stage, surroundings)
        super().__init__(config, surroundings, coding)
        self.counts_bits = not has_tokens  # the likelihood is that of the image
        self.prior = GatedPixelCNN(
            config.network, coding.num_codes, coding.shape[0], self.conditioner.num_classes, is_embedded=has_tokens
        )

    def evaluate(self, batch: Batch) -> Metrics:
        """The cross-entropy of a code in nats; of pixels, which are what is measured, also in bits."""
        metrics = super().evaluate(batch)
        return metrics | {"bits_per_dim": metrics["loss"] / math.log(2.0)} if self.counts_bits else metrics
