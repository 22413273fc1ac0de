"""`gmdist evaluate --scores`: each image's likelihood in a CSV file, by which outliers are found."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gmdist.cli import main
from gmdist.config import load
from gmdist.data.pack import write_shards
from gmdist.families.vae import VAE
from gmdist.images import png
from gmdist.nets.gaussian import kl_of_dimensions
from gmdist.runs import open_run
from gmdist.start import train_worker
from tests.support import tree_bytes
from tests.test_cli import CONFIG as WITHOUT_LIKELIHOOD
from tests.test_cli import TINY, refused

CONFIG = str(Path(__file__).parents[2] / "configs/digits/vae.yaml")
# No test set is named, and there is no classifier beside the digits: neither is needed.
SETTINGS = ["family.autoencoder={channels: [8, 16, 16], num_res_blocks: 0}", "family.iwae_samples=4"]
SETTINGS += ["train.num_steps=60", "train.checkpoint_every=60", "data.batch_size=16"]
SETTINGS += ["train.evaluate_every=null", "data.test=null", "family.beta.num_images=500"]
SETTINGS += ["train.sample_every=null", "train.zero_stage=0", "optim.autoencoder.lr=4.0e-3"]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE that was trained for seconds. Read only."""
    run = tmp_path_factory.mktemp("runs") / "run"
    overrides = [*SETTINGS, f"data.train={digits}/train", f"run.dir={run}"]
    train_worker(load(CONFIG, overrides), torch.device("cpu"))
    return run


def images_of(folder: Path) -> dict[tuple[str, str], tuple[np.ndarray, str]]:
    """Each image uint8 [H, W] and its label, by shard and key."""
    found: dict[tuple[str, str], tuple[np.ndarray, str]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as file:
            members = {name: file.extractfile(name).read() for name in file.getnames()}
        for key in {name.partition(".")[0] for name in members}:
            image = np.asarray(Image.open(io.BytesIO(members[f"{key}.png"])))
            found[str(shard), key] = image, members[f"{key}.cls"].decode()
    return found


def scored(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """The lines of a CSV file by shard and key."""
    return {(line["shard"], line["sample"]): line for line in csv.DictReader(io.StringIO(text))}


def values(lines: dict[tuple[str, str], dict[str, str]], name: str) -> np.ndarray:
    return np.array([float(line[name]) for line in lines.values()])


def test_each_image_has_a_line_with_its_scores(trained: Path, digits: Path, tmp_path: Path, capsys) -> None:
    before = tree_bytes(trained)
    command = ["evaluate", str(trained), "--scores", str(tmp_path / "scores.csv"), f"data.test={digits}/test"]
    assert main(command) == 0
    images = images_of(digits / "test")
    assert f"elbo, iwae of {len(images)} images of {digits}/test by step 60" in capsys.readouterr().out
    text = (tmp_path / "scores.csv").read_text()
    lines = scored(text)
    assert text.startswith("shard,sample,label,elbo,iwae\n")
    assert list(lines) == sorted(images)
    assert all(line["label"] == images[place][1] for place, line in lines.items())
    # The scores are those of the lines' own images: about what one latent, the posterior's mean, gives.
    _, family = open_run(str(trained))
    image = torch.from_numpy(np.stack([images[place][0] for place in lines])[:, None]).float() / 127.5 - 1.0
    mean, logvar = family.posterior(image)
    near = family.log_likelihood(image, mean) - kl_of_dimensions(mean, logvar).sum(dim=1)
    assert np.corrcoef(values(lines, "elbo"), near.numpy())[0, 1] > 0.95
    assert main([*command, "--batch-size", "7"]) == 0
    again = scored((tmp_path / "scores.csv").read_text())
    for name in ("elbo", "iwae"):
        np.testing.assert_allclose(values(again, name), values(lines, name), rtol=1e-4, atol=1e-2)
    assert tree_bytes(trained) == before


def test_outliers_score_lower(trained: Path, digits: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pictures = [image for image, _ in list(images_of(digits / "test").values())[:40]]
    sets = {"inverted": [255 - image for image in pictures]}
    sets["noise"] = [random.integers(0, 256, image.shape, np.uint8) for image in pictures]
    sets["shuffled"] = [random.permutation(image.flatten()).reshape(image.shape) for image in pictures]
    for name, outliers in sets.items():  # without labels
        samples = ((f"{i:03d}", {"png": png(image[..., None])}) for i, image in enumerate(outliers))
        write_shards(samples, str(tmp_path / name))
    found = {}
    for name in ("test", *sets):
        reference = digits / "test" if name == "test" else tmp_path / name
        out = str(tmp_path / f"{name}.csv")
        assert main(["evaluate", str(trained), "--scores", out, f"evaluation.reference={reference}"]) == 0
        found[name] = scored(Path(out).read_text())
    for name in sets:
        assert {line["label"] for line in found[name].values()} == {""}
        for score in ("elbo", "iwae"):
            assert values(found[name], score).max() < np.quantile(values(found["test"], score), 0.05), (name, score)


def test_images_that_cannot_be_decoded_are_left_out(trained: Path, tmp_path: Path, capsys) -> None:
    contents = [png(np.full((32, 32, 1), 10 * i, np.uint8)) for i in range(20)]
    contents[7] = b"no image"
    write_shards(((f"{i:03d}", {"png": content}) for i, content in enumerate(contents)), str(tmp_path / "data"))
    out = tmp_path / "scores.csv"
    given = [f"data.test={tmp_path}/data", "data.max_bad_fraction=0.1"]
    assert main(["evaluate", str(trained), "--scores", str(out), *given]) == 0
    assert "elbo, iwae of 19 images" in (told := capsys.readouterr().out)
    assert "1 that cannot be decoded left out" in told
    assert [sample for _, sample in scored(out.read_text())] == [f"{i:03d}" for i in range(20) if i != 7]


def test_scores_in_object_storage(trained: Path, digits: Path, bucket) -> None:
    out = "s3://pictures/some/scores.csv"
    assert main(["evaluate", str(trained), "--scores", out, f"data.test={digits}/test"]) == 0
    text = bucket.get_object(Bucket="pictures", Key="some/scores.csv")["Body"].read().decode()
    assert len(scored(text)) == len(images_of(digits / "test"))


def test_scores_that_are_not_numbers_are_said(trained: Path, digits: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(VAE, "scores", lambda family, batch: {"elbo": batch["image"].sum(dim=(1, 2, 3)) * torch.nan})
    command = ["evaluate", str(trained), "--scores", str(tmp_path / "scores.csv"), f"data.test={digits}/test"]
    assert "the scores are not numbers; check the run's weights" in refused(capsys, 1, *command)
    assert not (tmp_path / "scores.csv").exists()


def test_what_has_no_scores_is_refused(trained: Path, digits: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "scores.csv")
    evaluate = ["evaluate", str(trained), "--scores", out]
    assert "data.test: missing; set it, or evaluation.reference, to the shards" in refused(capsys, 2, *evaluate)
    given = f"data.test={digits}/test"
    assert "--metrics: fid; must be left out with --scores" in refused(capsys, 2, *evaluate, "--metrics", "fid", given)
    assert "--batch-size: 0; must be at least 1" in refused(capsys, 2, *evaluate, "--batch-size", "0", given)
    elsewhere = ["evaluate", str(trained), "--scores", "gs://bucket/scores.csv", given]
    assert "gs://bucket/scores.csv: not a location that gmdist reads" in refused(capsys, 2, *elsewhere)
    assert f"--scores: '{tmp_path}'; is a folder" in refused(capsys, 2, *evaluate[:-1], str(tmp_path), given)
    run = tmp_path / "run"
    train_worker(
        load(WITHOUT_LIKELIHOOD, [*TINY, f"data.train={digits}/train", given, f"run.dir={run}"]), torch.device("cpu")
    )
    line = refused(capsys, 2, "evaluate", str(run), "--scores", out)
    assert (
        "--scores: family 'autoencoder_kl' gives no likelihoods; those that do are pixelcnn, transformer_prior, vae"
        in line
    )
    assert not Path(out).exists()


def test_training_logs_bounds_and_units(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {"autoencoder/nll_nats", "autoencoder/kl_nats", "autoencoder/beta", "autoencoder/scale"} < set(lines[-1])
    assert lines[0]["autoencoder/beta"] < lines[-1]["autoencoder/beta"]
