"""What an evaluator says of families that make good, bad and wrong images, on any number of workers."""

from collections.abc import Callable, Iterator

import pytest
import torch

from gmdist.errors import DataError
from gmdist.evaluation import measure as measure_module
from gmdist.evaluation.classifier import train_classifier
from gmdist.evaluation.config import METRICS, EvaluationConfig
from gmdist.evaluation.features import Features, load_features, save_classifier
from gmdist.evaluation.measure import Evaluator, Images
from gmdist.families.family import Batch, Condition
from tests.evaluation.patterns import CLASSES, Painter, Reader, captioned, drawn, patterns
from tests.support import run_workers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    location = str(tmp_path_factory.mktemp("patterns") / "classifier.safetensors")
    save_classifier(location, train_classifier(*patterns(256, seed=0), CLASSES), {})
    return location


def real(count: int, rank: int = 0, world_size: int = 1) -> Images:
    """Real images that workers read in turn, as a loader's sweep gives them."""

    def batches(batch_size: int) -> Iterator[Batch]:
        for keys in torch.arange(count)[rank::world_size].split(batch_size):
            if len(keys):
                yield {"key": keys, "image": drawn(keys, keys % CLASSES, seed=1)}

    return Images(
        count,
        batches,
        lambda: {
            "key": torch.zeros(1, dtype=torch.int64),
            "image": drawn(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), seed=1),
        },
    )


def evaluator(
    features: Features, images: Callable[[int], Images] = real, metrics: tuple[str, ...] = METRICS, num_images: int = 90
) -> Evaluator:
    config = EvaluationConfig(metrics, num_images=num_images, batch_size=20)
    return Evaluator(config, features, images(100), images(50), CLASSES, CPU)


def not_again(*_: object) -> torch.Tensor:
    raise AssertionError("the real images have been described")


def test_tells_good_images_from_bad_ones(classifier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = evaluator(load_features(classifier))
    beats = []
    good = measure(Painter(seed=2), lambda: beats.append(1))
    assert list(good) == ["label_agreement", "class_coverage", "fid", "kid", "precision", "recall"]
    assert len(beats) >= 90 // 20 + 100 // 20
    assert good["label_agreement"] == good["class_coverage"] == 1.0
    assert min(good["precision"], good["recall"]) > 0.7
    wrong = measure(Painter(seed=2, wrong=45))
    assert wrong["label_agreement"] == 0.5
    assert wrong["fid"] > 0.0

    class Noise(Painter):
        conditions = ()

        def sample(self, keys, condition=None):
            return torch.rand(len(keys), 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    class OneKind(Painter):
        def sample(self, keys, condition=None):
            return super().sample(keys, Condition(torch.zeros_like(keys)))

    collapsed = measure(OneKind(seed=2))
    assert collapsed["class_coverage"] == 1 / CLASSES
    assert collapsed["label_agreement"] == 23 / 90  # the images of one label
    noise = measure(Noise(0))
    assert "label_agreement" not in noise  # nothing is asked of it
    assert noise["fid"] > 10 * good["fid"]
    assert noise["kid"] > 3 * abs(good["kid"])
    assert noise["precision"] == 0.0
    assert measure(Painter(seed=2)) == good  # what is kept of the real images stays right
    monkeypatch.setattr(measure_module, "mean_within", not_again)
    monkeypatch.setattr(measure_module, "radii_of", not_again)
    assert measure(Painter(seed=2)) == good  # and is not computed again


def asked_backwards(numbers: list[torch.Tensor]) -> Iterator[Condition]:
    """Captions whose labels are not in turn."""
    return (captioned((CLASSES - 1 - number) % CLASSES) for number in numbers)


def asked_without_labels(numbers: list[torch.Tensor]) -> Iterator[Condition]:
    return (Condition(None, condition.prompts) for condition in asked_backwards(numbers))


def test_captions_are_the_prompts(classifier: str) -> None:
    config = EvaluationConfig(("fid",), num_images=90, batch_size=20)
    features = load_features(classifier)
    found = Evaluator(config, features, real(100), None, CLASSES, CPU, asked_backwards)(Reader())
    labels_alone = Evaluator(config, features, real(100), None, CLASSES, CPU)(Reader())
    assert found["label_agreement"] == 1.0
    assert "label_agreement" not in labels_alone
    unlabelled = Evaluator(config, features, real(100), None, CLASSES, CPU, asked_without_labels)(Reader())
    assert unlabelled == {name: value for name, value in found.items() if name != "label_agreement"}
    assert found["fid"] < 0.1 * labels_alone["fid"]


def test_reconstructions_are_measured_where_there_are_any(classifier: str) -> None:
    measure = evaluator(load_features(classifier), metrics=("fid",))
    found = measure(Painter(seed=2, reconstructs=True))
    assert list(found) == ["label_agreement", "class_coverage", "fid", "rfid"]
    assert 0.0 < found["rfid"] < found["fid"] * 10

    class Perfect(Painter):
        def reconstruct(self, batch):
            return batch["image"]

    assert measure(Perfect(seed=2))["rfid"] == pytest.approx(0.0, abs=1e-9)


def test_only_what_is_asked_for_is_computed(classifier: str) -> None:
    assert evaluator(load_features(classifier), metrics=())(Painter(seed=2)) == {}
    assert list(evaluator(load_features(classifier), metrics=("pr",))(Painter(seed=2))) == [
        *("label_agreement", "class_coverage", "precision", "recall")
    ]


def test_too_few_real_images(classifier: str) -> None:
    with pytest.raises(DataError, match="evaluation.reference: 3 real images; at least 4"):
        Evaluator(EvaluationConfig(METRICS), load_features(classifier), real(3), None, CLASSES, CPU)


def share(rank: int, world_size: int, classifier: str, expected: dict[str, float]) -> None:
    calls = []

    class Counting(Painter):
        def sample(self, keys, condition=None):
            calls.append(len(keys))
            return super().sample(keys, condition)

    measure = evaluator(load_features(classifier), lambda count: real(count, rank, world_size))
    found = measure(Counting(seed=2, wrong=9, reconstructs=True))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(calls) == 2  # each as often, though there are five batches for three workers


def share_of_captions(rank: int, world_size: int, classifier: str, expected: dict[str, float]) -> None:
    config = EvaluationConfig(("fid",), num_images=50, batch_size=20)
    measure = Evaluator(config, load_features(classifier), real(100, rank, world_size), None, 4, CPU, asked_backwards)
    assert measure(Reader()) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_workers_share_captions_some_without_any(classifier: str) -> None:
    config = EvaluationConfig(("fid",), num_images=50, batch_size=20)
    expected = Evaluator(config, load_features(classifier), real(100), None, CLASSES, CPU, asked_backwards)(Reader())
    run_workers(share_of_captions, 4, classifier, expected)


def share_of_two(rank: int, world_size: int, classifier: str, expected: dict[str, float]) -> None:
    config = EvaluationConfig(("fid",), num_images=50, batch_size=20)
    images, held_out = (real(count, rank, world_size) for count in (100, 2))
    found = Evaluator(config, load_features(classifier), images, held_out, CLASSES, CPU)(Painter(2, reconstructs=True))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_workers_without_a_held_out_image_sum_with_the_others(classifier: str) -> None:
    config = EvaluationConfig(("fid",), num_images=50, batch_size=20)
    expected = Evaluator(config, load_features(classifier), real(100), real(2), CLASSES, CPU)(
        Painter(2, reconstructs=True)
    )
    assert "rfid" in expected
    run_workers(share_of_two, 3, classifier, expected)


def test_workers_make_their_shares(classifier: str) -> None:
    expected = evaluator(load_features(classifier))(Painter(seed=2, wrong=9, reconstructs=True))
    run_workers(share, 3, classifier, expected)
