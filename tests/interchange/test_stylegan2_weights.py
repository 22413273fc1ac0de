"""StyleGAN2 from its authors' weights: the same images and logits as by the book, and what is refused."""

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gmdist import rng
from gmdist.errors import ConfigError
from gmdist.families.family import Condition, Surroundings
from gmdist.families.stylegan2 import StyleGAN2, StyleGAN2Config
from gmdist.interchange.stylegan2 import shapes_there, their_names
from gmdist.nets.stylegan2_discriminator import StyleGAN2DiscriminatorConfig
from gmdist.nets.stylegan2_generator import StyleGAN2GeneratorConfig
from gmdist.nets.stylegan2_sizes import ARCHITECTURES
from tests.interchange import stylegan2_ada as book
from tests.interchange.stylegan2_ada import Sizes, State, discriminator_shapes, generator_shapes, random_state

SIZES = Sizes("skip")


def family_of(sizes: Sizes, path: Path | None = None, **changes: Any) -> StyleGAN2:
    """A family with networks of these sizes."""
    common = {"channel_base": sizes.base, "channel_max": sizes.widest, "architecture": sizes.architecture}
    generator = StyleGAN2GeneratorConfig(sizes.latent, sizes.style, sizes.layers, **common)
    group = 4 if sizes.compares else 0
    discriminator = StyleGAN2DiscriminatorConfig(minibatch_std_group=group, mapping_layers=sizes.layers, **common)
    config = StyleGAN2Config(generator=generator, discriminator=discriminator, truncation=0.7)
    config = dataclasses.replace(config, init_from=None if path is None else str(path), **changes)
    assert config.problem(sizes.side) is None
    torch.manual_seed(7)
    surroundings = Surroundings(sizes.side, sizes.channels, sizes.classes, 5, lambda _: pytest.fail("opens a run"))
    return StyleGAN2(config, surroundings).eval()


def states_of(sizes: Sizes) -> dict[str, State]:
    return {
        "generator": random_state(generator_shapes(sizes), 1),
        "discriminator": random_state(discriminator_shapes(sizes), 2),
    }


def written(folder: Path, states: dict[str, State]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors")
    return folder


def error_of(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("compares", [True, False])
@pytest.mark.parametrize(("classes", "channels"), [(0, 3), (3, 1)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_images_and_logits_as_by_the_book(
    architecture: str, classes: int, channels: int, compares: bool, tmp_path: Path
) -> None:
    sizes = Sizes(architecture, classes=classes, channels=channels, compares=compares)
    states = states_of(sizes)
    family = family_of(sizes, written(tmp_path, states))
    family.initialize({})
    keys = torch.arange(8)
    label = keys % classes if classes else None
    latent = rng.normal(5, "latent/sample", keys, (sizes.latent,))
    image = torch.randn(8, channels, sizes.side, sizes.side)
    style = book.styles_of(states["generator"], latent, label, 0.7)
    drawn, whole = (
        book.images_of(states["generator"], s) for s in (style, book.styles_of(states["generator"], latent, label))
    )
    judged = book.logits_of(states["discriminator"], image, label)
    with torch.no_grad():
        found = family.drawn_latents(keys, Condition(label))
        assert error_of(found, style) < 1e-5
        every = found[:, None].expand(-1, family.generator.synthesis.num_styles, -1)
        assert error_of(family.generator.synthesis(every), drawn) < 1e-5
        assert error_of(family.discriminator(image, label), judged) < 1e-5
        # What is left is rounding: in float64 there is none, but for where the 1e-8 of demodulation is added.
        family.double()
        assert error_of(family.generator(latent.double(), label), whole) < 1e-7
        assert error_of(family.discriminator(image.double(), label), judged) < 1e-12


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_there_has_one_place_here(architecture: str, classes: int) -> None:
    sizes = Sizes(architecture, side=32, classes=classes)
    family = family_of(sizes)
    for network, shapes in (
        (family.generator, generator_shapes(sizes)),
        (family.discriminator, discriminator_shapes(sizes)),
    ):
        assert shapes_there(network) == {name: list(shape) for name, shape in shapes.items()}
        places = their_names(network)
        assert places.keys() == network.state_dict().keys()
        assert sorted(places.values()) == sorted(name for name in shapes if not name.endswith("resample_filter"))


def test_a_generator_alone_leaves_the_discriminator_fresh(tmp_path: Path) -> None:
    states = states_of(SIZES)
    folder = written(tmp_path / "nets", {"generator": states["generator"]})
    with pytest.raises(ConfigError, match=rf"there is no discriminator.safetensors; .*, name {folder}/generator"):
        family_of(SIZES, folder).check_files()
    family, fresh = family_of(SIZES, folder / "generator.safetensors"), family_of(SIZES)
    family.initialize({})
    for name, value in fresh.discriminator.state_dict().items():
        assert torch.equal(family.discriminator.state_dict()[name], value), name
    assert torch.equal(family.generator.mean_style, states["generator"]["mapping.w_avg"])
    assert torch.equal(family.generator.synthesis.conv.noise, states["generator"]["synthesis.b4.conv1.noise_const"])


def refusal(folder: Path, sizes: Sizes = SIZES) -> str:
    """Before any worker starts, by networks without memory for weights; and again where they are read."""
    with torch.device("meta"):
        outline = family_of(sizes, folder)
    with pytest.raises(ConfigError) as found:
        outline.check_files()
    with pytest.raises(ConfigError) as again:
        family_of(sizes, folder).initialize({})
    assert str(found.value) == str(again.value)
    assert str(found.value).startswith(f"family.init_from: {folder}")
    return str(found.value)


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({"latent": 9}, ["family.generator.latent_channels 9 there, 7 here"]),
        ({"style": 5}, ["family.generator.style_channels 5 there, 6 here"]),
        ({"layers": 3}, ["family.generator.mapping_layers 3 there, 2 here"]),
        ({"channels": 1}, ["data.channels 1 there, 3 here"]),
        ({"side": 32}, ["data.image_size 32 there, 16 here"]),
        ({"architecture": "resnet"}, ["family.generator.architecture resnet there, skip here"]),
        ({"classes": 3}, ["data.num_classes (or family.conditional) 3 there, 0 here"]),
        (
            {"widest": 10},
            [
                f"family.generator.channel_base or channel_max, by the width at side {side}, 10 there, 12 here"
                for side in (4, 8)
            ],
        ),
    ],
)
def test_another_generator_is_told_by_its_settings(change: dict[str, Any], settings: list[str], tmp_path: Path) -> None:
    other = dataclasses.replace(SIZES, **change)
    problem = refusal(written(tmp_path, {**states_of(other), "discriminator": states_of(SIZES)["discriminator"]}))
    theirs, ours = generator_shapes(other), generator_shapes(SIZES)
    assert "is not this run's generator: " in problem
    for setting in settings:
        assert setting in problem
    assert problem.count(" here") == len(settings)  # nothing else is blamed
    for name in theirs.keys() ^ ours.keys():
        assert name in problem
    for name in theirs.keys() & ours.keys():
        said = f"{name} {list(theirs[name])} for {list(ours[name])}"
        assert (said in problem) == (theirs[name] != ours[name])


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"compares": False}, "family.discriminator.minibatch_std_group 0 there, above 0 here"),
        ({"architecture": "orig"}, "family.discriminator.architecture orig there, skip here"),
        (
            {"base": 256},
            "family.discriminator.channel_base or channel_max, by the width at side 16, 12 there, 8 here",
        ),
        ({"side": 8}, "data.image_size 8 there, 16 here"),
        ({"channels": 1}, "data.channels 1 there, 3 here"),
    ],
)
def test_another_discriminator_is_told_by_its_settings(change: dict[str, Any], setting: str, tmp_path: Path) -> None:
    other = dataclasses.replace(SIZES, **change)
    problem = refusal(written(tmp_path, {**states_of(SIZES), "discriminator": states_of(other)["discriminator"]}))
    assert "discriminator.safetensors; is not this run's discriminator: " in problem
    assert setting in problem
    assert problem.count(" here") == 1


def test_mapping_layers_of_a_discriminator_with_classes(tmp_path: Path) -> None:
    sizes = dataclasses.replace(SIZES, classes=3)
    states = states_of(sizes)
    states["discriminator"] = states_of(dataclasses.replace(sizes, layers=4, classes=5))["discriminator"]
    problem = refusal(written(tmp_path, states), sizes)
    assert "family.discriminator.mapping_layers 4 there, 2 here" in problem
    assert "data.num_classes (or family.conditional) 5 there, 3 here" in problem
    assert "mapping.embed.weight [12, 5] for [12, 3]" in problem


def test_single_tensors_are_named(tmp_path: Path) -> None:
    def change(name: str, value: Tensor | None, sizes: Sizes = SIZES) -> str:
        states = states_of(sizes)
        if value is None:
            del states["generator"][name]
        else:
            states["generator"][name] = value
        return refusal(written(tmp_path, states), sizes)

    taps = torch.tensor([1.0, 2.0, 2.0, 1.0])
    other, name = torch.outer(taps, taps) / 36, "synthesis.b8.conv0.resample_filter"
    assert f"must have the low pass of [1, 3, 3, 1] in {name}" in change(name, other)
    assert "lengths of low passes [2, 4] there, [4] here; 1 of another shape" in change(name, torch.ones(2, 2) / 4)
    assert "1 missing: synthesis.b16.conv1.noise_strength" in change("synthesis.b16.conv1.noise_strength", None)
    assert "is not this run's generator: 1 not known: mapping.gain" in change("mapping.gain", torch.zeros(3))
    assert "mapping.w_avg has values that are not finite" in change("mapping.w_avg", torch.full((6,), torch.inf))
    assert "mapping.w_avg is I64; must be one of" in change("mapping.w_avg", torch.zeros(6, dtype=torch.int64))


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_pickles_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({"G_ema": Bomb()})
    advice = "write G_ema.state_dict() to generator.safetensors"
    for name in ("network.pkl", "network.pt"):
        Path(name).write_bytes(content)
        problem = StyleGAN2Config(init_from=str(tmp_path / name)).problem(16)
        assert problem is not None
        assert problem.startswith(f"init_from: '{tmp_path}/{name}'; a pickle can run any code")
        assert advice in problem
    assert advice in refusal(tmp_path)  # a folder of them
    disguised = tmp_path / "generator.safetensors"
    disguised.write_bytes(content)
    assert "not a sound safetensors file" in refusal(disguised)
    assert not Path("exploded").exists()


def test_places_that_are_none(tmp_path: Path) -> None:
    assert "there is no such file or folder" in refusal(tmp_path / "none")
    assert refusal(tmp_path).endswith("there is no generator.safetensors")
    problem = StyleGAN2Config(init_from="s3://pictures/nets").problem(16)
    assert problem == ("init_from: 's3://pictures/nets'; must be a local file or folder, on every worker's machine")
