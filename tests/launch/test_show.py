"""What a run makes of real images, row by row; the command is tested in tests/test_cli.py."""

import pytest
import torch

from gmdist.launch.show import _interpolations
from tests.support import SIZE, MemorySource, small_family


@pytest.mark.parametrize("name", ["autoencoder", "autoencoder_kl", "vae", "vit_vqvae", "vq_vae"])
def test_between_an_image_and_itself_is_its_reconstruction(name: str) -> None:
    family = small_family(name).eval()
    batch = MemorySource(48, 8).first(1).batch_on(torch.device("cpu"))
    twice = {key: torch.cat([value, value]) for key, value in batch.items()}
    with torch.inference_mode():
        found = _interpolations(family, twice)
        assert found is not None
        for frame in found.split(SIZE, dim=3)[1:-1]:
            torch.testing.assert_close(frame, family.reconstruct(batch), rtol=0.0, atol=1e-5)
