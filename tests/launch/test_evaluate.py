"""`gmdist evaluate`: the numbers that training logs, a file, and one clear line for what cannot be."""

import json
import os
from pathlib import Path

import pytest
import torch

from gmdist.cli import main
from gmdist.config import load
from gmdist.evaluation.features import save_classifier
from gmdist.nets.classifier import Classifier, ClassifierSizes
from gmdist.start import check_start, train_worker
from tests.support import tree_bytes
from tests.test_cli import CONFIG, TINY, refused

NUM_IMAGES = 24


@pytest.fixture(scope="module")
def data(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with a classifier beside them, that knows nothing. Read only."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        os.symlink(digits / split, folder / split)
    torch.manual_seed(0)
    save_classifier(str(folder / "classifier.safetensors"), Classifier(ClassifierSizes(32, 1, 10)).eval(), {})
    return folder


def overrides(data: Path, run: Path, *more: str) -> list[str]:
    metrics = ["evaluation.metrics=[fid,kid,pr]", f"evaluation.num_images={NUM_IMAGES}", "train.evaluate_every=2"]
    return [*TINY, *metrics, f"data.train={data}/train", f"data.test={data}/test", f"run.dir={run}", *more]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that measured itself twice. Read only, but for its evaluation.json."""
    run = tmp_path_factory.mktemp("runs") / "run"
    best = ["train.best_metric=test/rfid", "train.keep_checkpoints=1", "train.ema_halflife_kimg=0.01"]
    rounded_otherwise = "train.channels_last=true"
    train_worker(load(CONFIG, overrides(data, run, *best, rounded_otherwise)), torch.device("cpu"))
    return run


def logged(run: Path) -> dict[int, dict[str, float]]:
    """What the evaluations of a run found, by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {name.removeprefix("test/"): value for name, value in line.items() if name.startswith("test/")}
        for line in lines
        if "test/fid" in line
    }


def test_training_and_the_command_say_the_same(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = logged(trained)
    assert list(found) == [2, 4]
    own, generated = (
        ["kl_nats", "l1", "mse", "perceptual", "psnr_db", "ssim"],
        ["fid", "rfid", "kid", "precision", "recall"],
    )
    assert list(found[4]) == own + generated
    assert main(["evaluate", str(trained)]) == 0
    report = json.loads((trained / "evaluation.json").read_text())
    assert report["metrics"] == pytest.approx(found[4], rel=1e-6)
    assert report["step"] == 4
    assert report["checkpoint"] == str(trained / "checkpoints/step-00000004")
    assert report["num_images"] == NUM_IMAGES
    assert report["features"].endswith("/classifier.safetensors")
    assert len(report["features_fingerprint"]) == 32
    printed = capsys.readouterr().out
    assert f"{trained}/checkpoints/step-00000004: 24 generated images" in printed
    assert f"  rfid        {found[4]['rfid']:.6g}" in printed


def test_the_best_checkpoint_is_that_of_the_best_reconstructions(trained: Path) -> None:
    found = logged(trained)
    best = min(found, key=lambda step: found[step]["rfid"])
    kept = {path.name for path in (trained / "checkpoints").iterdir()}
    assert kept == {"step-00000004", f"step-{best:08d}"}


def test_options_take_the_place_of_settings(trained: Path, digits: Path, tmp_path: Path, capsys) -> None:
    checkpoint = str(trained / "checkpoints/step-00000004")
    torch.manual_seed(1)
    other = str(tmp_path / "other.safetensors")
    save_classifier(other, Classifier(ClassifierSizes(32, 1, 10)).eval(), {})
    command = ["evaluate", checkpoint, "--metrics", "pr", "--num-images", "8", "--batch-size", "3"]
    assert main([*command, "--features", other]) == 0
    report = json.loads((trained / "evaluation.json").read_text())
    assert list(report["metrics"]) == ["kl_nats", "l1", "mse", "perceptual", "psnr_db", "ssim", "precision", "recall"]
    assert (report["num_images"], report["features"], report["overrides"]) == (8, other, [])
    setting = f"evaluation.reference={digits}/train"
    assert main([*command, "--features", other, setting]) == 0
    report = json.loads((trained / "evaluation.json").read_text())
    assert (report["reference"], report["overrides"]) == (f"{digits}/train", [setting])


def test_what_cannot_be_is_one_line(trained: Path, data: Path, tmp_path: Path, capsys) -> None:
    before = tree_bytes(trained)
    evaluate = ["evaluate", str(trained)]
    assert "--metrics: 'fie'; must be of fid, kid, pr" in refused(capsys, 2, *evaluate, "--metrics", "fid, fie")
    assert "--metrics: 'fid'; must be of fid, kid, pr, each once" in refused(capsys, 2, *evaluate, "--metrics=fid,fid")
    assert "--num-images: 3; must be at least 4" in refused(capsys, 2, *evaluate, "--num-images", "3")
    assert "--batch-size: 0; must be at least 1" in refused(capsys, 2, *evaluate, "--batch-size", "0")
    missing = refused(capsys, 2, *evaluate, "--features", str(tmp_path / "inception.pth"))
    assert "inception.pth'; no such file: name a classifier that `gmdist data make` wrote, or Inception-v3" in missing
    assert "https://github.com/mseitzer/pytorch-fid" in missing
    assert "not a run" in refused(capsys, 2, "evaluate", str(tmp_path))
    assert tree_bytes(trained) == before


def test_a_run_without_features_is_refused_before_it_starts(digits: Path, data: Path, tmp_path: Path) -> None:
    from gmdist.errors import ConfigError

    with pytest.raises(ConfigError, match="evaluation.features: null, and there is no .*/classifier.safetensors"):
        check_start(load(CONFIG, overrides(digits, tmp_path / "run")))
    small = ["data.image_size=16", "data.resize=area"]
    with pytest.raises(ConfigError, match="images of 32 pixels and 1 channels, the run makes 16 pixels"):
        check_start(load(CONFIG, overrides(data, tmp_path / "run", *small)))
    assert check_start(load(CONFIG, overrides(digits, tmp_path / "run", "evaluation.metrics=[]"))) == (None, [])


def test_without_test_data_the_training_data_is_the_reference(data: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    settings = ["data.test=null", "evaluation.metrics=[fid]", "evaluation.num_reference_images=32", "train.num_steps=2"]
    train_worker(load(CONFIG, overrides(data, run, *settings)), torch.device("cpu"))
    assert list(logged(run)[2]) == ["fid"]
    assert main(["evaluate", str(run)]) == 0
    report = json.loads((run / "evaluation.json").read_text())
    assert report["reference"] == f"{data}/train"
    assert report["metrics"] == pytest.approx(logged(run)[2], rel=1e-6)


def test_of_a_family_that_draws_nothing_the_held_out_images_are_measured(digits: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    domains = [f"data.{key}={digits}/{split}" for split in ("train", "test") for key in (split, f"unpaired.{split}")]
    networks = ["family.translator={channels: 4, num_blocks: 1}", "family.discriminator_channels=4"]
    settings = ["train.num_steps=1", "train.evaluate_every=1", "train.sample_every=null", "data.batch_size=8"]
    config = load("configs/digits/cyclegan.yaml", [*domains, *networks, *settings, "data.channels=1", f"run.dir={run}"])
    train_worker(config, torch.device("cpu"))
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert main(["evaluate", str(run)]) == 0
    report = json.loads((run / "evaluation.json").read_text())
    assert set(report) == {"checkpoint", "step", "overrides", "metrics"}
    assert {f"test/{name}": pytest.approx(value, rel=1e-5) for name, value in report["metrics"].items()} == {
        name: value for name, value in line.items() if name.startswith("test/")
    }
    assert f"{run}/checkpoints/step-00000001: held-out images" in capsys.readouterr().out
    for option in (["--metrics", "fid"], ["--num-images", "8"], ["--features", "classifier"]):
        words = f"{option[0]}: family 'cyclegan' draws no images to compare with real ones"
        assert words in refused(capsys, 2, "evaluate", str(run), *option)
    words = "data.test: null; family 'cyclegan' draws no images, and is measured on held-out ones alone"
    assert words in refused(capsys, 2, "evaluate", str(run), "data.test=null", "data.unpaired.test=null")


def test_data_make_trains_a_classifier_once(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from gmdist.evaluation import classifier
    from gmdist.launch import classifier as launched

    monkeypatch.setattr(classifier, "_NUM_PASSES", 4)  # more than needed follow in earnest
    command = ["data", "make", "digits", str(tmp_path / "digits")]
    assert main(command) == 0
    line = capsys.readouterr().out.splitlines()[2]
    assert line.startswith(f"{tmp_path}/digits/classifier.safetensors: right about ")
    assert float(line.split()[-5].rstrip("%")) >= 98.0
    monkeypatch.setattr(launched, "train_classifier", None)
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[2] == line
