"""Autoencoders, tokenizers and priors of the digits, from the first image to one table of held-out numbers.

    make bench-autoencoders

Every family is trained by `gmdist train` with its config (a run that is finished is only measured) and measured by
`gmdist evaluate` on the digits that no run has seen. Beside the VAE stands pythae's, of the same networks, likelihood,
steps, data and learning rates, by pythae's own loss; both are measured by the same evaluation. Beside PixelCNN stand
independent pixels: the best code for each pixel by itself, its levels counted on the training digits, with a count of
1/256 added to each. Exits 1 where a figure falls short.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from digits_runs import in_time, measured, shown, size_of, trained, verdict
from torch import Tensor

from gmdist import runs
from gmdist.config import Config
from gmdist.data.loader import Loader
from gmdist.train.held_out import held_out_means
from gmdist.train.optim import learning_rate

FAMILIES = ("autoencoder", "vae", "vq_vae", "vit_vqvae", "transformer_prior", "pixelcnn")
MINUTES = 4.0  # asked for, of training
LEVELS = 256


def elbo_of_pythae(run: Path) -> float:
    """The bound, in nats, of pythae's VAE with the run's networks after as many steps on the same images."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    config = runs.read_config(str(run))
    torch.manual_seed(0)
    family = runs.build_family(config)
    # pythae's Gaussian has variance 1: images and means that are divided by ours give the same likelihood.
    scale, dim = config.family.likelihood.scale, config.family.latent_dim

    class Encoder(BaseEncoder):
        def forward(self, x: Tensor) -> ModelOutput:
            mean, logvar = family.posterior(x * scale)
            return ModelOutput(embedding=mean, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=family.autoencoder.decode(z) / scale)

    side = config.data.image_size
    sizes = VAEConfig(input_dim=(config.data.channels, side, side), latent_dim=dim, reconstruction_loss="mse")
    model = VAE(sizes, encoder=Encoder(), decoder=Decoder())
    settings = config.optim["autoencoder"]
    optimizer = torch.optim.Adam(family.autoencoder.parameters(), lr=settings.lr, betas=settings.betas)
    batches = Loader(config.data, config.data.trained_on).batches(0)
    for step in range(config.train.num_steps):
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step, config.train.num_steps)
        loss = model({"data": next(batches).batch["image"] / scale}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(family.autoencoder.parameters(), settings.clip_norm or math.inf)
        optimizer.step()
    test = Loader(config.data, config.data.test)
    return held_out_means(family.eval(), test, 64, torch.device("cpu"))["elbo_nats"]


def bits_of_independent_pixels(config: Config) -> float:
    """Bits a dimension of the held-out digits, where each pixel has a distribution of its own."""

    def levels(location: Any) -> Tensor:
        parts = Loader(config.data, location).sweep(256)
        return torch.cat([((part.batch["image"] + 1) * 127.5).round().long().flatten(1) for part in parts])

    seen, held_out = levels(config.data.trained_on), levels(config.data.test)
    counts = torch.zeros(seen.shape[1], LEVELS, dtype=torch.float64).scatter_add_(
        1, seen.T, torch.ones(seen.T.shape, dtype=torch.float64)
    )
    shares = (counts + 1 / LEVELS) / (counts.sum(dim=1, keepdim=True) + 1)
    return -shares.gather(1, held_out.T).log2().mean().item()


def main() -> int:
    """Print the table; 1 if a figure falls short."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"))
    parser.add_argument("--data", type=Path, default=Path("data/digits"))
    options = parser.parse_args()
    if not options.data.exists():
        subprocess.run(["gmdist", "data", "make", "digits", str(options.data)], check=True)
    data = [f"data.train={options.data}/train", f"data.test={options.data}/test"]
    own = {"transformer_prior": [f"family.first_stage={options.runs / 'vq_vae'}"]}
    minutes = {name: trained(name, options.runs, *data, *own.get(name, [])) for name in FAMILIES}
    found = {name: measured(options.runs / name, "--num-images", "500") for name in FAMILIES}
    pythae = elbo_of_pythae(options.runs / "vae")
    independent = bits_of_independent_pixels(runs.read_config(str(options.runs / "pixelcnn")))
    ours = found["vae"]["elbo_nats"]
    bits = found["pixelcnn"]["bits_per_dim"]
    used, agreement = found["vq_vae"]["used_codes"], found["transformer_prior"]["label_agreement"]
    print("\n| family | parameters | minutes | held-out digits |\n|---|---|---|---|")
    for name in FAMILIES:
        values = {key: value for key, value in found[name].items() if not key.startswith("kl_nats_")}
        line = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if value is not None)
        print(f"| {name} | {size_of(options.runs / name):,} | {shown(minutes[name])} | {line} |")
    asked = [
        (f"VAE's ELBO {ours:.1f} nats, pythae's {pythae:.1f}", ours >= pythae),
        (f"VQ-VAE uses {used:.1%} of its codes (asked: 90%)", used >= 0.9),
        (f"transformer prior: label agreement {agreement:.1%} (asked: 90%)", agreement >= 0.9),
        (
            f"PixelCNN {bits:.3f} bits a dimension, {1 - bits / independent:.1%} below independent pixels' "
            f"{independent:.3f} (asked: 40%)",
            bits <= 0.6 * independent,
        ),
        in_time(minutes.values(), MINUTES),
    ]
    print()
    return verdict(asked)


if __name__ == "__main__":
    sys.exit(main())
