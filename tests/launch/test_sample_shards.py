"""Generated images as shards: the same bytes whoever draws them, and whatever happens to the command."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmdist.cli import main
from gmdist.data.decode import decode_image
from gmdist.data.manifest import Manifest
from gmdist.data.sources import open_source
from gmdist.errors import CheckpointError, ConfigError, DataError
from gmdist.launch import sample_shards as shards
from gmdist.launch.sample import SampleRequest, draw
from gmdist.launch.sample_shards import sample_shards
from gmdist.runs import read_config
from tests.exporting import UNET, train
from tests.support import tree_bytes

REQUEST = SampleRequest(23, seed=3)
ALONE = ["cluster.num_workers=1"]


@pytest.fixture(scope="module")
def run(noise: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of a pixel denoiser with classes, of few weights and sampler steps."""
    settings = [UNET, "family.diffusion.sampler.num_steps=2"]
    return train("ddpm", noise, tmp_path_factory.mktemp("ddpm") / "run", *settings)


@pytest.fixture(autouse=True)
def few_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SHARD_IMAGES", 5)


def test_the_shards_hold_what_a_grid_would_show(run: str, tmp_path: Path) -> None:
    manifest, was_there = sample_shards(run, REQUEST, str(tmp_path / "out"), ALONE)
    assert (manifest.num_samples, len(manifest.shards), was_there) == (23, 5, False)
    raws = list(open_source(str(tmp_path / "out")).by_name())
    assert [raw.key for raw in raws] == [f"{number:08d}" for number in range(23)]
    drawn = list(draw(run, REQUEST, ALONE))
    for number, members in enumerate(raw.read() for raw in raws):
        assert int(members["cls"]) == number % 4
        picture = decode_image(members["png"], 3)
        np.testing.assert_allclose(picture.astype(int), drawn[number].int(), atol=1)  # of other batches: other bits


def test_what_a_model_is_not_told_is_not_said_of_its_images(noise: str, tmp_path: Path) -> None:
    text = "family.conditioning={kind: text, text: {transformer: {channels: 16, depth: 1, num_heads: 2}}}"
    few = [UNET, "family.diffusion.sampler={num_steps: 2, guidance: 1.0}", "data.caption=txt"]
    for name, condition, request, wanted in (
        ("text", text, SampleRequest(2, prompt="a \udcff"), {"txt": b"a ?"}),
        ("none", "family.conditioning={kind: none}", SampleRequest(2), {}),
    ):
        made = train("ddpm", noise, tmp_path / name, *few, condition)
        sample_shards(made, request, str(tmp_path / f"{name}-out"), ALONE)
        for raw in open_source(str(tmp_path / f"{name}-out")).by_name():
            assert {key: value for key, value in raw.read().items() if key != "png"} == wanted


@pytest.mark.ray
def test_as_many_workers_as_are_asked_for_whatever_the_run_s_batch(run: str) -> None:
    assert read_config(run).data.batch_size % 3
    assert read_config(run, ["cluster.num_workers=3"]).cluster.num_workers == 3


def test_two_workers_draw_the_same_bytes(ray_cluster: Any, run: str, tmp_path: Path) -> None:
    sample_shards(run, REQUEST, str(tmp_path / "one"), ALONE)
    sample_shards(run, REQUEST, str(tmp_path / "two"), ["cluster.num_workers=2"])
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "two")


def test_what_was_drawn_is_kept(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """The command was killed."""

    whole, out = tmp_path / "whole", tmp_path / "out"
    sample_shards(run, REQUEST, str(whole), ALONE)

    def kill(done: int, total: int) -> None:
        if done >= 10:
            raise Killed

    with pytest.raises(Killed):
        sample_shards(run, REQUEST, str(out), ALONE, kill)
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert there
    with pytest.raises(DataError, match="its sampling was not finished; run the same `gmdist sample` again"):
        Manifest.load(str(out))
    told: list[tuple[int, int]] = []
    sample_shards(run, REQUEST, str(out), ALONE, lambda *counts: told.append(counts))
    assert told[0][0] > 5
    assert told[-1] == (23, 23)
    assert tree_bytes(out) == tree_bytes(whole)
    assert sample_shards(run, REQUEST, str(out), ALONE)[1]


def test_another_request_in_the_folder_is_refused(run: str, tmp_path: Path) -> None:
    sample_shards(run, REQUEST, str(tmp_path / "out"), ALONE)
    with pytest.raises(DataError, match="holds images of another request"):
        sample_shards(run, SampleRequest(23, seed=4), str(tmp_path / "out"), ALONE)
    with pytest.raises(DataError, match="holds images of another family"):
        sample_shards(run, REQUEST, str(tmp_path / "out"), [*ALONE, "family.diffusion.sampler.num_steps=3"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/read.me").touch()
    with pytest.raises(DataError, match="holds something else .read.me"):
        sample_shards(run, REQUEST, str(tmp_path / "notes"), ALONE)


def test_two_commands_do_not_draw_into_one_folder(run: str, tmp_path: Path) -> None:
    out, refusals = tmp_path / "out", []

    def draw_another(done: int, total: int) -> None:
        with pytest.raises(ConfigError, match="out: in use by another command") as error:
            sample_shards(run, SampleRequest(23, seed=4), str(out), ALONE)
        refusals.append(error)

    sample_shards(run, REQUEST, str(out), ALONE, draw_another)
    assert refusals
    assert not (out / "lease.json").exists()
    assert sample_shards(run, REQUEST, str(out), ALONE)[1]


def test_shards_that_were_damaged_are_not_those_that_were_drawn(run: str, tmp_path: Path) -> None:
    sample_shards(run, REQUEST, str(tmp_path / "out"), ALONE)
    shard = tmp_path / "out/shard-000001.tar"
    shard.write_bytes(shard.read_bytes() + b"more")
    for _ in range(2):
        with pytest.raises(DataError, match="shard-000001.tar: is not what was drawn"):
            sample_shards(run, REQUEST, str(tmp_path / "out"), ALONE)
        shard.unlink(missing_ok=True)


def test_a_worker_that_does_not_see_the_folder_says_so(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = shards.DrawingWork(shards.Drawer(run, REQUEST, ALONE), str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="does not see what is in it: on several machines"):
        work.maker()


def test_the_command_says_what_it_drew(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], few_a_shard: None
) -> None:
    command = ["sample", run, "--num-images", "7", "--workers", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "out: 7 images in 2 shards\n" in capsys.readouterr().out
    assert main(command) == 0
    assert "they were drawn before" in capsys.readouterr().out
    assert main([*command[:-1], str(tmp_path / "x.png")]) == 2
    assert "is a grid, and --workers draw shards" in capsys.readouterr().err
    assert main([*command, "--show", "reconstructions"]) == 2
    assert "--workers: does not go with --show" in capsys.readouterr().err


def test_a_bucket_gets_shards(run: str, bucket: Any) -> None:
    assert main(["sample", run, "--num-images", "6", "--out", "s3://pictures/drawn", *ALONE]) == 0
    assert Manifest.load("s3://pictures/drawn").num_samples == 6


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["data.num_classes=null", "family.diffusion.sampler.guidance=1", "data.seed=1"],
            "[5, 64] in the checkpoint and absent in the model; data.num_classes=null is not what the "
            "run was trained with: leave it out",
        ),
        (
            ["data.num_classes=7", "family.unet.norm_groups=2"],
            "[8, 64] in the model; family.unet.norm_groups=2 and data.num_classes=7 are not what the "
            "run was trained with: leave them out",
        ),
    ],
)
def test_what_makes_another_model_is_named(run: str, overrides: list[str], words: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)):
        next(draw(run, SampleRequest(1), overrides))


def test_what_the_weights_were_not_trained_with_is_warned_of(run: str, caplog: pytest.LogCaptureFixture) -> None:
    list(draw(run, SampleRequest(1), ["family.diffusion.prediction=x0", "family.diffusion.sampler.num_steps=1"]))
    assert caplog.messages == ["family.diffusion.prediction: 'x0'; the run was trained with 'v'"]
