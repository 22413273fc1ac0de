"""A decoder-only transformer over the tokens of a frozen tokenizer (LlamaGen, Sun 2024)."""

from dataclasses import dataclass, field

from gmdist.families.coding import Tokens
from gmdist.families.family import Surroundings
from gmdist.families.prior import Prior, PriorConfig
from gmdist.nets import causal_transformer
from gmdist.nets.causal_transformer import CausalTransformer, CausalTransformerConfig


@dataclass(kw_only=True)
class TransformerPriorConfig(PriorConfig):
    """A transformer over the tokens of another run."""

    first_stage: str = field(metadata={"location": True})  # run folder, or checkpoint, of a tokenizer
    transformer: CausalTransformerConfig = field(default_factory=CausalTransformerConfig)

    def problem(self, image_size: int) -> str | None:
        """Why these settings cannot be; None if they can."""
        if problem := self.transformer.problem():
            return f"transformer.{problem}"
        return super().problem(image_size)


class TransformerPrior(Prior):
    """The transformer, and the frozen tokenizer that makes and shows its codes."""

    blocks = causal_transformer.BLOCKS

    def __init__(self, config: TransformerPriorConfig, surroundings: Surroundings) -> None:
        coding = Tokens(config.first_stage, surroundings)
        super().__init__(config, surroundings, coding)
        _, *grid = coding.shape
        self.prior = CausalTransformer(
            config.transformer, coding.num_codes, (grid[0], grid[1]), self.conditioner.num_classes
        )
