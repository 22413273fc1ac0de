"""Pipelines as values: what diffusers' would draw otherwise is refused."""

import pytest

from gmdist.diffusion.config import DiffusionConfig, SamplerConfig
from gmdist.errors import ConfigError
from gmdist.interchange.pipelines import Network, stable_diffusion
from gmdist.interchange.spec import NetworkSpec
from gmdist.nets.autoencoder import AutoencoderConfig
from gmdist.nets.unet import UNetConfig

UNET = Network(NetworkSpec(UNetConfig(context_channels=8), 4), {})
VAE = Network(NetworkSpec(AutoencoderConfig(), 3, size=64), {})


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_stable_diffusion_moves_leading_timesteps_to_1(name: str) -> None:
    def exported(steps: int) -> int:
        diffusion = DiffusionConfig("linear", 100, sampler=SamplerConfig(name, steps, spacing="leading"))
        return stable_diffusion(UNET, VAE, {}, diffusion).scheduler["steps_offset"]

    assert exported(50) == 1
    with pytest.raises(ConfigError, match="sampler.num_steps: 51; .*timesteps at 1, .*: use at most 50"):
        exported(51)


def test_stable_diffusion_is_told_of_no_other_offset_where_it_has_no_effect() -> None:
    diffusion = DiffusionConfig("linear", 100, sampler=SamplerConfig("ddim", 100))
    assert stable_diffusion(UNET, VAE, {}, diffusion).scheduler["steps_offset"] == 1
