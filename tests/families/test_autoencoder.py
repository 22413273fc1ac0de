"""The plain autoencoder: what its evaluation measures, and that all of an image goes through its vector."""

import torch

from gmdist.nets.image_quality import ssim
from tests.support import CHANNELS, SIZE, MemorySource, small_family


def test_evaluates_what_it_reconstructs() -> None:
    family, batch = small_family("autoencoder").eval(), MemorySource(48, 8).first(8).batch
    with torch.no_grad():
        image, metrics = family.reconstruct(batch), family.evaluate(batch)
        vectors = family.encode(batch["image"])["latent"]
        torch.testing.assert_close(image, family.autoencoder.decode(vectors).clamp(-1, 1))
        assert torch.equal(family.preview(batch)[..., SIZE:], image)
    assert vectors.shape == (8, 16)
    assert image.shape == (8, CHANNELS, SIZE, SIZE)
    error = (image - batch["image"]).square()
    assert set(metrics) == {"mse", "psnr_db", "ssim"}
    torch.testing.assert_close(metrics["mse"], error.mean())
    torch.testing.assert_close(metrics["psnr_db"], (10 * (4 / error.mean(dim=(1, 2, 3))).log10()).mean())
    torch.testing.assert_close(metrics["ssim"], ssim(image, batch["image"]).mean())


def test_has_no_likelihood() -> None:
    batch = MemorySource(48, 8).first(8).batch
    assert small_family("autoencoder").scores(batch) == {}
    assert set(small_family("vae").scores(batch)) == {"elbo", "iwae"}
