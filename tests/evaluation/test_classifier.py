"""The classifier beside a data set: it learns, always the same, and its file says what it is."""

from pathlib import Path

import pytest
import torch

from gmdist.errors import ConfigError
from gmdist.evaluation.classifier import accuracy, train_classifier
from gmdist.evaluation.features import INCEPTION_URL, beside, describe, load_features, save_classifier
from gmdist.nets.classifier import Classifier, ClassifierSizes
from gmdist.nets.inception import Inception
from tests.evaluation.patterns import CLASSES, patterns


def test_learns_and_is_the_same_each_time(tmp_path: Path) -> None:
    images, labels = patterns(256, seed=0)
    before = torch.get_rng_state()
    classifier = train_classifier(images, labels, CLASSES)
    assert torch.equal(torch.get_rng_state(), before)
    assert accuracy(classifier, *patterns(200, seed=1)) > 0.98
    save_classifier(str(tmp_path / "one"), classifier, {"made_for": "patterns", "b": 2})
    save_classifier(str(tmp_path / "two"), train_classifier(images, labels, CLASSES), {"b": 2, "made_for": "patterns"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

    features = load_features(str(tmp_path / "one"))
    pictures = patterns(8, seed=2)[0].float() / 127.5 - 1.0
    assert features.of(pictures).shape == (8, features.width)
    torch.testing.assert_close(features.of(pictures), classifier(pictures))
    assert torch.equal(features.classes(features.of(pictures)), patterns(8, seed=2)[1])
    assert describe((tmp_path / "one").read_bytes())["made_for"] == "patterns"
    assert features.fingerprint != load_features(_random(tmp_path)).fingerprint


def test_an_image_that_is_left_over_alone_is_left_out() -> None:
    images, labels = patterns(257, seed=0)  # batch norm has no variance of one
    assert accuracy(train_classifier(images, labels, CLASSES), images, labels) > 0.9


def _random(folder: Path) -> str:
    save_classifier(str(folder / "random"), Classifier(ClassifierSizes(16, 1, 4)), {})
    return str(folder / "random")


def test_images_are_described_as_files_of_8_bits_hold_them(tmp_path: Path) -> None:
    features = load_features(_random(tmp_path))
    pictures = patterns(4, seed=3)[0].float() / 127.5 - 1.0
    assert torch.equal(features.of(pictures + 0.4 / 127.5), features.of(pictures))
    assert torch.equal(features.of(pictures * float("nan")), features.of(torch.full_like(pictures, -1.0)))
    assert torch.equal(features.of(pictures * 3.0), features.of((pictures * 3.0).clamp(-1.0, 1.0)))


def test_shapes_are_seen_in_any_colour() -> None:
    # The corner is the background: one channel of the input is the same for all pairs of colours.
    from gmdist.nets.classifier import _ink

    shape = (torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    shape[:, :, 0, 0] = 0.0
    for above, below in (((1.0, 0.0, 0.2), (0.0, 0.5, 0.2)), ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))):
        colours = [torch.tensor(colour)[None, :, None, None] for colour in (above, below)]
        torch.testing.assert_close(_ink(shape * colours[0] + (1 - shape) * colours[1]), shape)
    assert _ink(torch.zeros(1, 3, 4, 4)).abs().max() == 0.0


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no such file: name a classifier .* from {INCEPTION_URL}"):
        load_features(str(tmp_path / "none.pth"))
    with pytest.raises(ConfigError, match="evaluation.features: null, and there is no .*none.pth"):
        load_features(str(tmp_path / "none.pth"), is_given=False)
    (tmp_path / "text").write_text("text")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("text", "other.pth"):
        with pytest.raises(ConfigError, match=f"{name}'; neither a classifier nor Inception's weights"):
            load_features(str(tmp_path / name))
    with pytest.raises(ConfigError, match="images of 16 pixels and 1 channels, the run makes 32 pixels and 3 channels"):
        load_features(_random(tmp_path)).check(32, 3)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"a": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ConfigError, match="neither a classifier nor"):
        load_features(str(tmp_path / "trap.pth"))
    assert not (tmp_path / "sprung").exists()


def test_the_classifier_is_beside_the_splits() -> None:
    assert beside("data/digits/test/") == "data/digits/classifier.safetensors"
    assert beside("s3://bucket/digits/train") == "s3://bucket/digits/classifier.safetensors"


def test_inception_has_the_published_sizes() -> None:
    with torch.device("meta"):
        network = Inception()
    # torchvision's inception_v3 has 23,834,568 without its auxiliary classifier, 2,049,000 of them in its last layer.
    assert sum(parameter.numel() for parameter in network.parameters()) == 21_785_568
    assert network(torch.zeros(2, 1, 32, 32, device="meta")).shape == (2, 2048)
