"""What tokenizers with a codebook share: its start, its statistics over the whole job, and what is measured of it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gmdist import rng
from gmdist.errors import DataError
from gmdist.families.family import INITIALIZE_SAMPLES, Batch, Condition, Family, Metrics
from gmdist.families.tokenizer import Tokenizer
from gmdist.nets.finite import all_finite
from gmdist.nets.image_quality import quality
from gmdist.nets.quantizer import AveragedCodebook, Codebook, Quantized, Quantizer, QuantizerConfig, perplexity
from gmdist.workers import all_gathered, all_sum

_COLLAPSED = 0.1  # perplexity by number of codes
_AS_GOOD_AS_ONE = 1.5  # a perplexity, however few codes there are


class CodedAutoencoder(Tokenizer):
    """A tokenizer whose child `autoencoder` is an encoder, a quantizer and a decoder."""

    averaged = ("autoencoder",)
    autoencoder: nn.ModuleDict
    seed: int

    def features(self, image: Tensor) -> Tensor:
        """What is quantized of images [N, C, H, W]: [N, h, w, Z]."""
        raise NotImplementedError

    def decoded(self, features: Tensor) -> Tensor:
        """Images [N, C, H, W], unbounded and at least fp32, of features [N, h, w, Z]."""
        raise NotImplementedError

    @property
    def quantizer(self) -> Quantizer:
        """The codebook between its projections."""
        quantizer = self.autoencoder["quantizer"]
        assert isinstance(quantizer, Quantizer)
        return quantizer

    @torch.no_grad()
    def start_codebook(self, batch: Batch) -> None:
        """Begin with k-means of the features of a batch, where that is asked for.

        Raises:
            DataError: fewer features than codes.
            DivergedError: features that are not finite.
        """
        size, count, places = self.codebook_size, len(batch["key"]), self.token_shape[0] * self.token_shape[1]
        if not self.quantizer.config.kmeans_steps:
            return
        if count * places < size:
            raise DataError(
                f"{count * places} features of {count} samples are too few for k-means of {size} codes; set "
                "family.quantizer.kmeans_steps=0, a smaller family.quantizer.codebook_size, or train on at least "
                f"{-(-size // places)} samples"
            )
        with all_finite(self.autoencoder, "codes"):
            rows = self.features(batch["image"]).flatten(0, 2)
            self.quantizer.start(
                rows, lambda number: rng.uniform(self.seed, f"kmeans/{number}", batch["key"], (places,)).flatten()
            )

    def quantized(self, batch: Batch, seen: int) -> Quantized:
        """What becomes of the features of a micro-batch, which the codebook takes in."""
        found = self.quantizer.quantize(self.features(batch["image"]))
        codebook, vectors = self.quantizer.codebook, found.vectors.flatten(0, -2)
        codebook.observe(vectors, found.tokens.flatten())
        if isinstance(codebook, AveragedCodebook) and codebook.config.revive:
            keys, places = batch["key"], found.tokens[0].numel()
            # Random, and in the last bits different for all places of a batch: so all numbers of workers agree.
            words = rng.bits(self.seed, f"revival/{seen}", keys, places)
            numbers = keys[:, None] * places + torch.arange(places, device=keys.device)
            codebook.offer(vectors, ((words << 31) | (numbers & 0x7FFFFFFF)).flatten())
        return found

    def after_step(self, seen: int) -> Metrics:
        """The codebook's averages move on, over all workers, and dead codes are revived."""
        found = self.quantizer.codebook.update(all_sum, all_gathered)
        return {f"codebook/{name}": value for name, value in found.items()}

    def sample(self, keys: Tensor, condition: Condition | None = None) -> Tensor:
        """Decode codes that are drawn evenly, each alone. It is not made for this: its prior is a second run."""
        return self.decode(rng.integers(self.seed, "sample", keys, self.codebook_size, self.token_shape))

    def tokens(self, image: Tensor) -> Tensor:
        return self.quantizer.tokens(self.features(image))

    # Codes of features that are not finite would be those of any image. A prior's loss does not look: it would wait.

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        with all_finite(self.autoencoder, "codes"):
            return super().encode(image)

    def checked_tokens(self, image: Tensor) -> Tensor:
        """`tokens`; DivergedError names the first layer that gives what is not finite."""
        with all_finite(self.autoencoder, "codes"):
            return self.tokens(image)

    def reconstruct(self, batch: Batch) -> Tensor:
        return self.decode(self.checked_tokens(batch["image"]))

    def latents(self, batch: Batch) -> Tensor:
        """The encoder's features [N, h w Z], before the nearest codes take their place."""
        with all_finite(self.autoencoder, "features"):
            return self.features(batch["image"]).flatten(1)

    def from_latents(self, latents: Tensor) -> Tensor:
        """Decoded from the codes nearest to the features: of an image's own, its reconstruction."""
        return self.decode(self.quantizer.tokens(latents.unflatten(1, (*self.token_shape, -1))))

    def decode(self, tokens: Tensor) -> Tensor:
        return self.decoded(self.quantizer.lookup(tokens)).clamp(-1.0, 1.0)

    def evaluate(self, batch: Batch) -> Metrics:
        """Reconstructions against images: means over images; and the share of each code."""
        tokens = self.checked_tokens(batch["image"])
        # Of samples of the same size: means of shares are those of all samples.
        shares = torch.bincount(tokens.flatten(), minlength=self.codebook_size) / tokens.numel()
        return {**self.compared_with(batch["image"], self.decode(tokens)), "shares": shares}

    def compared_with(self, image: Tensor, reconstruction: Tensor) -> Metrics:
        """What an evaluation says of reconstructions [N, C, H, W] of images like them: means over images."""
        return quality(reconstruction, image)

    def summarize(self, means: dict[str, Tensor]) -> dict[str, float]:
        """The means, and the use that all images make of the codebook."""
        found = super().summarize({name: mean for name, mean in means.items() if name != "shares"})
        if (shares := means.get("shares")) is None:
            return found
        return found | {"perplexity": perplexity(shares).item(), "used_codes": (shares > 0).double().mean().item()}

    def concerns(self, found: Mapping[str, float]) -> list[str]:
        """A codebook that has collapsed: few codes stand for most of the images."""
        size, config = self.codebook_size, self.quantizer.config
        if found.get("perplexity", size) >= max(_COLLAPSED * size, _AS_GOOD_AS_ONE):
            return []
        return [
            f"the codebook has collapsed: {found['used_codes']:.0%} of its {size} codes are used, and as unevenly as "
            f"{found['perplexity']:.1f}; set {_remedies(config)}"
        ]


def _remedies(config: QuantizerConfig) -> str:
    """What there is to set against a collapse, and is not set already."""
    if config.learned_by == "gradient":
        remedy = "family.quantizer.learned_by=averages with family.quantizer.revive=true"
    elif config.revive:
        remedy = "a lower family.quantizer.decay or a higher family.quantizer.dead_below"
    else:
        remedy = "family.quantizer.revive=true, with a lower family.quantizer.decay"
    remedy += ", or fewer family.quantizer.code_channels"
    return remedy if config.normalize else f"{remedy} with family.quantizer.normalize=true"


def start_problem(config: QuantizerConfig, num_tokens: int) -> str | None:
    """Why k-means cannot start a codebook, of so many tokens an image, as "key: value; what is valid"; None: it can."""
    most = INITIALIZE_SAMPLES * num_tokens
    if config.kmeans_steps and config.codebook_size > most:
        return (
            f"codebook_size: {config.codebook_size}; must be at most {most}, as k-means starts from the {num_tokens} "
            f"features each of the first {INITIALIZE_SAMPLES} images, or family.quantizer.kmeans_steps 0"
        )
    return None


def tables_of_codes(family: Family) -> dict[str, Tensor]:
    """The codes [K, D] that tokens stand for, of each codebook of a family, under its name and `codes`."""
    books = [(name, module) for name, module in family.named_modules() if isinstance(module, Codebook)]
    return {f"{name}.codes": book().detach() for name, book in books}
