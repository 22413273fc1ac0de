"""What families with a codebook share: its start, its statistics over the whole job, and what they warn of."""

import torch
from torch import Tensor

from gmdist import rng
from gmdist.errors import DataError, DivergedError
from gmdist.families.family import Batch, Metrics, all_gathered, all_sum
from gmdist.nets.finite import Watch
from gmdist.nets.quantizer import AveragedCodebook, Quantized, Quantizer, perplexity

_COLLAPSED = 0.1  # perplexity by number of codes


def start_codebook(quantizer: Quantizer, features: Tensor, keys: Tensor, seed: int) -> None:
    """Begin with k-means of the features [N, ..., C] of samples with keys int64 [N].

    Raises:
        DataError: fewer features than codes.
    """
    size, places = quantizer.config.codebook_size, features[0, ..., 0].numel()
    rows = features.flatten(0, -2)
    if len(rows) < size:
        raise DataError(
            f"{len(rows)} features of the first {len(keys)} samples are too few for k-means of {size} codes; "
            "set family.quantizer.kmeans_steps=0, a smaller family.quantizer.codebook_size, or train on more samples"
        )
    quantizer.start(rows, lambda number: rng.uniform(seed, f"kmeans/{number}", keys, (places,)).flatten())


def observe(quantizer: Quantizer, found: Quantized, batch: Batch, seed: int, seen: int) -> None:
    """Let a codebook take in what became of a micro-batch."""
    codebook, vectors = quantizer.codebook, found.vectors.flatten(0, -2)
    codebook.observe(vectors, found.tokens.flatten())
    if not isinstance(codebook, AveragedCodebook) or not codebook.config.revive:
        return
    keys, places = batch["key"], found.tokens[0].numel()
    # Random, and in the last bits different for all places of a batch: so all numbers of workers agree on the order.
    words = rng.bits(seed, f"revival/{seen}", keys, places)
    numbers = keys[:, None] * places + torch.arange(places, device=keys.device)
    priority = (words << 31) | (numbers & 0x7FFFFFFF)
    codebook.offer(vectors, priority.flatten())


def update_codebook(quantizer: Quantizer) -> Metrics:
    """End a step of a codebook, over all workers."""
    found = quantizer.codebook.update(all_sum, all_gathered)
    return {f"codebook/{name}": value for name, value in found.items()}


def token_shares(tokens: Tensor, num_codes: int) -> Tensor:
    """The share of each code [K] of tokens int64 [N, ...]: of samples of the same size, means are of all of them."""
    return torch.bincount(tokens.flatten(), minlength=num_codes) / tokens.numel()


def summarize_shares(shares: Tensor) -> dict[str, float]:
    """Perplexity and share of used codes, of the shares of all tokens [K]."""
    return {"perplexity": perplexity(shares).item(), "used_codes": (shares > 0).double().mean().item()}


def collapse_concerns(found: dict[str, float], num_codes: int) -> list[str]:
    """What an evaluation's numbers warn of: few codes stand for most of the images."""
    if found["perplexity"] >= _COLLAPSED * num_codes:
        return []
    return [
        f"the codebook has collapsed: {found['used_codes']:.0%} of its {num_codes} codes are used, and as unevenly as "
        f"{found['perplexity']:.1f}; set family.quantizer.revive=true, with a lower family.quantizer.decay, or fewer "
        "family.quantizer.code_channels with family.quantizer.normalize=true"
    ]


def check_finite(watch: Watch, prefix: str = "") -> None:
    """DivergedError that names the first layer whose output was not finite: its codes would be those of any image."""
    if (layer := watch.first()) is not None:
        raise DivergedError(f"no codes: the output of {prefix}{layer} is not finite; check the images and the weights")
