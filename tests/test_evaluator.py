"""What a run's images are compared with, and what they are asked to show."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from gmdist.config import Config, load
from gmdist.data.config import MixedConfig
from gmdist.data.loader import Loader
from gmdist.data.pack import write_shards
from gmdist.data.samples import digits
from gmdist.evaluation.features import save_classifier
from gmdist.evaluator import open_captions, open_evaluator, references
from gmdist.families.family import Condition, Family
from gmdist.nets.classifier import Classifier, ClassifierSizes
from tests.test_cli import CONFIG, TINY

CPU = torch.device("cpu")


class Recorder(Family):
    """Remembers what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[int, tuple[int, str]] = {}  # by number: label and prompt

    def sample(self, keys, condition=None):
        if condition.prompts is not None and len(keys) > 1:  # one alone: whether it follows labels at all
            triples = zip(keys.tolist(), condition.label.tolist(), condition.prompts, strict=True)
            self.asked |= {key: (label, prompt) for key, label, prompt in triples}
        return torch.zeros(len(keys), 1, 32, 32)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for split in ("train", "test"):
        samples = [(key, members | {"txt": members["cls"]}) for key, members in islice(digits(split), 64)]
        write_shards(samples, str(tmp_path / split), tuple("0123456789"), num_shards=2)
    features = str(tmp_path / "classifier.safetensors")
    save_classifier(features, Classifier(ClassifierSizes(32, 1, 10)).eval(), {})
    settings = [f"data.train={tmp_path}/train", f"data.test={tmp_path}/test", f"run.dir={tmp_path}/run"]
    settings.append("data.caption=txt")
    settings += [f"evaluation.features={features}", "evaluation.metrics=[fid]"]
    return load(CONFIG, [*TINY, *settings])


def test_prompts_are_the_captions_of_the_real_images_spread_evenly(config: Config) -> None:
    config.evaluation.num_images = 24
    family = Recorder()
    open_evaluator(config, None, CPU)(family)
    assert config.data.test is not None
    (real,) = Loader(config.data, config.data.test).sweep(24, 24)
    labels = real.batch["label"].tolist()
    assert len(set(labels)) > 1
    assert family.asked == {number: (label, str(label)) for number, label in enumerate(labels)}


def test_captions_without_labels_are_prompts_all_the_same(config: Config, tmp_path: Path) -> None:
    samples = [(key, {"png": members["png"], "txt": b"a digit"}) for key, members in islice(digits("test"), 16)]
    write_shards(samples, str(tmp_path / "unlabelled"))
    config.evaluation.reference = str(tmp_path / "unlabelled")
    captioned = open_captions(config, CPU)
    assert captioned is not None
    (asked,) = captioned([torch.arange(3)])
    assert asked == Condition(None, ("a digit",) * 3)


def test_where_there_are_more_images_than_captions_these_come_again(config: Config) -> None:
    assert config.data.test is not None
    there = Loader(config.data, config.data.test).num_samples
    config.evaluation.num_images = there + 8
    family = Recorder()
    open_evaluator(config, None, CPU)(family)
    assert len(family.asked) == there + 8
    assert [family.asked[there + number] for number in range(8)] == [family.asked[number] for number in range(8)]


def test_without_test_data_all_data_sets_of_a_mix_are_the_reference(config: Config, tmp_path: Path) -> None:
    assert references(config) == [f"{tmp_path}/test"]
    config.data.test = config.data.train = None
    config.data.mix = {"a": MixedConfig(f"{tmp_path}/train"), "b": MixedConfig(f"{tmp_path}/test")}
    assert references(config) == [f"{tmp_path}/train", f"{tmp_path}/test"]
    config.evaluation.reference = "elsewhere"
    assert references(config) == ["elsewhere"]
