"""Export of GANs, and a run of StyleGAN2 that starts from its authors' networks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gmdist.cli import main
from gmdist.config import Config, from_tree, load
from gmdist.launch.export import export
from gmdist.runs import build_family, open_run
from gmdist.start import check_start, train_worker
from tests.exporting import CHANNELS, CLASSES, SIZE
from tests.interchange.stylegan2_ada import Sizes, discriminator_shapes, generator_shapes, random_state

_DCGAN = {"latent_channels": 8, "generator_channels": 16, "discriminator_channels": 16, "max_channels": 32}
SIZES, OF_DISCRIMINATOR = (Sizes(kind, SIZE, CHANNELS, CLASSES) for kind in ("skip", "resnet"))
_WIDTHS = {"channel_base": SIZES.base, "channel_max": SIZES.widest, "mapping_layers": SIZES.layers}
FAMILIES: dict[str, dict[str, Any]] = {
    "gan": {"latent_channels": 8, "hidden_channels": 32},
    "dcgan": {"networks": _DCGAN},
    "conditional_gan": {"networks": _DCGAN},
    "stylegan2": {
        "generator": {"latent_channels": SIZES.latent, "style_channels": SIZES.style, **_WIDTHS},
        "discriminator": {"minibatch_std_group": 4, **_WIDTHS},
        "augmentation": {"kind": "ada"},
    },
}


def config_of(name: str, data: str, run: Path, lr: float = 0.01, **changes: Any) -> Config:
    """Of two steps."""
    labels = {} if name in ("gan", "dcgan") else {"num_classes": CLASSES}
    return from_tree(
        {
            "name": name,
            "family": {"name": name, **FAMILIES[name], **changes},
            "data": {"train": data, "image_size": SIZE, "channels": CHANNELS, "batch_size": 4, **labels},
            "optim": {child: {"lr": lr} for child in ("generator", "discriminator")},
            "train": {"num_steps": 2, "sample_every": None, "ema_halflife_kimg": 0.001, "ema_ramp": None},
            "run": {"dir": str(run)},
        }
    )


@pytest.mark.parametrize("name", list(FAMILIES))
def test_one_file_loads_back(name: str, noise: str, tmp_path: Path) -> None:
    config = config_of(name, noise, tmp_path / "run")
    train_worker(config, torch.device("cpu"))
    export(str(tmp_path / "run"), str(tmp_path / "out"), "safetensors")
    found, (_, family) = load_file(tmp_path / "out/model.safetensors"), open_run(str(tmp_path / "run"))
    fresh = build_family(load(str(tmp_path / "out/config.yaml"))).eval()
    assert fresh.load_state_dict(found)
    keys = torch.arange(4)
    with torch.no_grad():
        assert torch.equal(fresh.sample(keys), family.sample(keys))
    if name == "stylegan2":
        assert torch.equal(found["generator.mean_style"], family.generator.mean_style)
        assert found["generator.mean_style"].any()


def theirs(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Networks that were written to a folder."""
    states = {
        "generator": random_state(generator_shapes(SIZES), 1),
        "discriminator": random_state(discriminator_shapes(OF_DISCRIMINATOR), 2),
    }
    for child, state in states.items():
        save_file(state, folder / f"{child}.safetensors")
    return states


def test_a_run_starts_from_the_authors_networks(noise: str, tmp_path: Path) -> None:
    states = theirs(tmp_path)
    config = config_of("stylegan2", noise, tmp_path / "run", lr=1e-9, init_from=str(tmp_path))
    assert check_start(config) == (None, [])
    train_worker(config, torch.device("cpu"))
    for child in states:  # not needed any more
        (tmp_path / f"{child}.safetensors").unlink()
    assert check_start(config)[0] is not None
    _, family = open_run(str(tmp_path / "run"))
    weights = {
        "generator.synthesis.constant": states["generator"]["synthesis.b4.const"],
        "generator.synthesis.blocks.0.conv1.weight": states["generator"]["synthesis.b8.conv0.weight"],
        "discriminator.out.weight": states["discriminator"]["b4.out.weight"],
    }
    for name, value in weights.items():
        torch.testing.assert_close(family.state_dict()[name], value, rtol=0, atol=1e-7)
    mean, start = family.generator.mean_style, states["generator"]["mapping.w_avg"]
    assert 0 < (mean - start).norm() < 0.05 * start.norm()  # which it goes on from


def test_another_network_is_refused_before_the_start(
    noise: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(config_of("stylegan2", noise, tmp_path / "run", init_from=str(tmp_path)).to_yaml())
    assert main(["train", str(config), "family.generator.mapping_layers=3"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"family.init_from: {tmp_path}/generator.safetensors; is not this run's generator: " in line
    assert "family.generator.mapping_layers 2 there, 3 here; 2 missing: mapping.fc2.bias, mapping.fc2.weight" in line
    assert main(["train", str(config), "family.init_from=nets.pkl"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "family.init_from: 'nets.pkl'; a pickle can run any code" in line
    assert not (tmp_path / "run").exists()
