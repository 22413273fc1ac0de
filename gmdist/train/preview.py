"""Pictures of a run as it goes, of every worker a part."""

import torch

from gmdist import images
from gmdist.families.family import Family
from gmdist.train.source import Source
from gmdist.workers import all_gathered, rank, world_size


@torch.no_grad()
def preview(family: Family, source: Source, num_samples: int, device: torch.device) -> bytes:
    """A PNG of the pictures that a family makes of a source's first samples, or of as many as there are.

    Args:
        family: in eval mode.
        source: of the samples.
        num_samples: the most that are shown.
        device: that the family is on.
    """
    batch = source.first(min(num_samples, source.num_samples)).batch_on(device)
    # Every worker makes an equal part; the last ones repeat a sample where the count does not divide.
    count = len(batch["key"])
    each = -(-count // world_size())
    places = torch.arange(rank() * each, (rank() + 1) * each, device=device).clamp(max=count - 1)
    part = {name: tensor[places.to(tensor.device)] for name, tensor in batch.items()}
    pictures = all_gathered(images.to_uint8(family.preview(part)).to(device)).cpu()
    return images.png(images.grid(pictures[:count]))
