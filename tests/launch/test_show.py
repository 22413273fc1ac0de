"""What a run makes of real images, row by row; the command is tested in tests/test_cli.py."""

import pytest
import torch

from gmdist.launch.show import _interpolations, _traversals
from tests.support import SIZE, MemorySource, small_family


@pytest.mark.parametrize("name", ["autoencoder", "autoencoder_kl", "vae", "vit_vqvae", "vq_vae"])
def test_between_an_image_and_itself_is_its_reconstruction(name: str) -> None:
    family = small_family(name).eval()
    batch = MemorySource(48, 8).first(1).batch_on(torch.device("cpu"))
    twice = {key: torch.cat([value, value]) for key, value in batch.items()}
    with torch.inference_mode():
        found = _interpolations(family, twice, 5)
        assert found is not None
        for frame in found.split(SIZE, dim=3)[1:-1]:
            torch.testing.assert_close(frame, family.reconstruct(batch), rtol=0.0, atol=1e-5)


def test_no_more_images_at_once_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    family, sizes = small_family("vae").eval(), []
    encoded, decoded = family.latents, family.from_latents
    monkeypatch.setattr(family, "latents", lambda batch: sizes.append(len(batch["image"])) or encoded(batch))
    monkeypatch.setattr(family, "from_latents", lambda latents: sizes.append(len(latents)) or decoded(latents))
    batch = MemorySource(48, 8).first(7).batch_on(torch.device("cpu"))
    with torch.inference_mode():
        assert len(_interpolations(family, batch, 3)) == 6
        assert len(_traversals(family, batch, 5, 3)) == 5
    assert max(sizes) == 3
