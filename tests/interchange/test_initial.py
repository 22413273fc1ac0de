"""First weights from others' folders: what a run may begin with, as is seen before it starts and when they are read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gmdist.diffusion.config import DiffusionConfig, SamplerConfig
from gmdist.errors import ConfigError
from gmdist.interchange.diffusers import write_folder
from gmdist.interchange.initial import check_initial, initial_state
from gmdist.interchange.pipelines import Network, dit_pipeline
from gmdist.interchange.spec import NetworkSpec
from gmdist.nets.autoencoder import AutoencoderConfig
from gmdist.nets.dit import DiTConfig
from gmdist.nets.unet import UNetConfig

SPEC = NetworkSpec(DiTConfig(channels=16, depth=1, num_heads=2, frequency_shift=1), 4, num_classes=10, size=8)


def filled_up(folder: Path, num_own: int) -> str:
    """A pipeline's transformer of ten classes, some of them with other weights than "no class"."""
    torch.manual_seed(0)
    state = SPEC.build().state_dict()
    state["label.weight"] = torch.randn(11, 16)
    state["label.weight"][num_own:] = state["label.weight"][-1].clone()
    first_stage = Network(NetworkSpec(AutoencoderConfig(), 3, size=64), {})
    transformer = dit_pipeline(Network(SPEC, state), first_stage, DiffusionConfig(sampler=SamplerConfig("ddim", 50)))
    network = transformer.networks["transformer"]
    write_folder(folder, network.spec, network.state)
    return str(folder)


@pytest.mark.parametrize("num_own", [10, 0])
def test_a_table_that_was_filled_up_is_cut(num_own: int, tmp_path: Path) -> None:
    path = filled_up(tmp_path, num_own)
    check_initial(path, "transformer", SPEC)
    assert initial_state(path, "transformer", SPEC)["label.weight"].shape == (11, 16)


@pytest.mark.parametrize("num_classes", [9, 1000])
def test_runs_of_other_classes_are_refused_before_anything_starts(num_classes: int, tmp_path: Path) -> None:
    path = filled_up(tmp_path / "10", 10)
    with pytest.raises(ConfigError, match=r"\(data.num_classes\) 1000 there, 2000 here"):
        check_initial(filled_up(tmp_path / "0", 0), "transformer", replace(SPEC, num_classes=2000))
    for call in (check_initial, initial_state):
        with pytest.raises(ConfigError, match=rf"\(data.num_classes\) 10 there, {num_classes} here"):
            call(path, "transformer", replace(SPEC, num_classes=num_classes))


def test_weights_are_not_read_before_the_run(tmp_path: Path) -> None:
    spec = NetworkSpec(UNetConfig(channels=8, multipliers=(1, 2), num_res_blocks=1, norm_groups=4), 3)
    state = spec.build().state_dict()
    state["conv_in.bias"][0] = torch.nan
    write_folder(tmp_path, spec, state)
    check_initial(str(tmp_path), "unet", spec)
    with pytest.raises(ConfigError, match=r"family.init_from: .*conv_in\.bias has values that are not finite"):
        initial_state(str(tmp_path), "unet", spec)


def test_a_network_that_diffusers_has_and_no_run_is_refused_with_its_folder(tmp_path: Path) -> None:
    config = UNetConfig(
        channels=32, multipliers=(1, 1), num_res_blocks=1, context_channels=8, norm_groups=8, vector_channels=1600
    )
    spec = NetworkSpec(config, 4)
    write_folder(tmp_path, spec, spec.build().state_dict())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("1600", "1536"))
    with pytest.raises(ConfigError, match=rf"^family.init_from: {tmp_path}"):
        check_initial(str(tmp_path), "unet", replace(spec, config=replace(config, vector_channels=None)))
