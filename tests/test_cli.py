"""The command: exit codes and one clear line for every wrong input, and nothing lost."""

import importlib.metadata
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gmdist import s3
from gmdist.cli import _Piped, main
from gmdist.config import load
from gmdist.data.pack import write_shards
from gmdist.data.sources import open_source
from gmdist.errors import EXIT_STOPPED
from gmdist.families.autoencoder_kl import AutoencoderKL
from gmdist.launch.lease import held
from gmdist.runs import open_run, read_config
from gmdist.start import check_start, train_worker
from tests.support import tree_bytes

CONFIG = str(Path(__file__).parent.parent / "configs/digits/autoencoder_kl.yaml")
TINY = ["family.autoencoder.channels=8", "train.sample_every=null", "train.evaluate_every=null", "train.zero_stage=0"]
TINY += ["train.num_steps=4", "train.checkpoint_every=2", "train.log_every=2", "data.batch_size=8"]


def arguments(digits: Path, run: Path, *more: str) -> list[str]:
    return [CONFIG, *TINY, f"data.train={digits}/train", f"data.test={digits}/test", f"run.dir={run}", *more]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made without Ray. Read only."""
    run = tmp_path_factory.mktemp("runs") / "run"
    path, *overrides = arguments(digits, run)
    train_worker(load(path, overrides), torch.device("cpu"))
    return run


def refused(capsys: pytest.CaptureFixture[str], code: int, *command: str) -> str:
    """Run a command that must fail with this exit code and one line on stderr; returns the line."""
    assert main(command) == code
    captured = capsys.readouterr()
    problems = captured.err.strip().splitlines()
    assert len(problems) == 1, problems
    assert problems[0].startswith("gmdist: ")
    return problems[0]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("train", "sample", "export", "report", "data", "doctor"))
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err.endswith("the following arguments are required: CONFIG\n")


def test_wrong_configs_are_usage_errors(digits: Path, tmp_path: Path, capsys) -> None:
    train = ["train", *arguments(digits, tmp_path / "run")]
    assert "did you mean 'num_steps'?" in refused(capsys, 2, *train, "train.num_step=3")
    assert "must be a mapping" in refused(capsys, 2, *train, "train=3")
    assert "3 workers do not divide it" in refused(capsys, 2, *train, "cluster.num_workers=3")
    assert "no such config file" in refused(capsys, 2, "train", "nothing.yaml")
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there(digits: Path, tmp_path: Path, capsys) -> None:
    train = ["train", *arguments(digits, tmp_path / "run")]
    line = refused(capsys, 1, *train, f"data.train={tmp_path}/none")
    assert f"{tmp_path}/none: no such data set, or it is empty; make one with" in line
    (tmp_path / "empty").mkdir()
    assert "it is empty" in refused(capsys, 1, *train, f"data.train={tmp_path}/empty")
    shutil.copytree(digits / "train", tmp_path / "plain")
    (tmp_path / "plain/manifest.json").unlink()
    assert "run `gmdist data index" in refused(capsys, 1, *train, f"data.train={tmp_path}/plain")
    assert not (tmp_path / "run").exists()


def test_labels_out_of_range(digits: Path, tmp_path: Path, capsys) -> None:
    line = refused(capsys, 1, "train", *arguments(digits, tmp_path / "run", "data.num_classes=5"))
    assert "class label 9 is out of range: data.num_classes is 5, so labels are 0 to 4" in line


def write_images(folder: Path, sizes: list[int]) -> None:
    folder.mkdir(parents=True)
    for i, size in enumerate(sizes):
        Image.fromarray(np.full((size, size), i, np.uint8)).save(folder / f"{i}.png")


def test_images_of_mixed_size(tmp_path: Path, capsys) -> None:
    write_images(tmp_path / "images", [32] * 15 + [48])
    assert main(["data", "pack", str(tmp_path / "images"), str(tmp_path / "packed")]) == 0
    capsys.readouterr()
    overrides = [*TINY, f"data.train={tmp_path}/packed", "data.test=null", "data.num_classes=null"]
    config = load(CONFIG, [*overrides, f"run.dir={tmp_path}/run", "cluster.num_workers=1"])
    from gmdist.errors import DataError

    with pytest.raises(DataError, match=r"packed/shard-000000.tar: 15: the image is 48x48.*--image-size 32"):
        train_worker(config, torch.device("cpu"))
    # The remedy that it names works.
    remedy = ["data", "pack", str(tmp_path / "images"), str(tmp_path / "mended"), "--image-size", "32"]
    assert main(remedy) == 0
    config.data.train = str(tmp_path / "mended")
    assert train_worker(config, torch.device("cpu")).finished


def test_two_packs_into_one_folder(tmp_path: Path, capsys) -> None:
    write_images(tmp_path / "images", [32] * 3)
    command = ["data", "pack", str(tmp_path / "images"), str(tmp_path / "packed")]
    with held(str(tmp_path / "packed"), print, print):
        assert "packed: in use by another command" in refused(capsys, 2, *command, "--image-size", "16")
    assert main(command) == 0
    assert sorted(path.name for path in (tmp_path / "packed").iterdir() if path.suffix != ".tar") == [
        *("manifest.json", "pack.json", "shard-000000.index.safetensors")
    ]


def test_an_endpoint_that_is_no_address_is_not_repeated(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for endpoint in ("http://user:secret@ho_st^:9", "htp//user:sec/ret@host"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        s3.renew_credentials()
        line = refused(capsys, 2, "data", "check", "s3://bucket/x")
        assert "AWS_ENDPOINT_URL: not an address as https://HOST:PORT" in line
        assert "sec" not in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.seed=1", "the data.seed was 0 when the run was started and is 1 now; set data.seed=0"),
        ("train.seed=1", "train.seed was 0 when the run was started and is 1 now"),
        ("data.batch_size=16", "data.batch_size was 8 when the run was started"),
        ("data.lanes=3", "number of lanes was 16"),
    ],
)
def test_a_run_is_not_resumed_with_another_seed(digits, trained, capsys, override, words) -> None:
    before = tree_bytes(trained)
    assert words in refused(capsys, 1, "train", *arguments(digits, trained, override))
    assert tree_bytes(trained) == before


def test_a_run_is_not_resumed_onto_another_data_set(digits: Path, trained: Path, capsys) -> None:
    before = tree_bytes(trained)
    line = refused(capsys, 1, "train", *arguments(digits, trained, f"data.train={digits}/test"))
    assert "cannot resume: the data set was" in line
    assert tree_bytes(trained) == before


def test_another_model_does_not_take_over_a_run(digits: Path, trained: Path, capsys) -> None:
    before = tree_bytes(trained)
    ddpm = CONFIG.replace("autoencoder_kl", "ddpm")
    command = ["train", ddpm, *arguments(digits, trained)[2:], "family.autoencoder=null"]
    command = [part for part in command if not part.startswith("family.")]
    assert "of family 'autoencoder_kl', the config's is 'ddpm'" in refused(capsys, 1, *command)
    line = refused(capsys, 1, "train", *arguments(digits, trained, "family.autoencoder.channels=16"))
    assert "does not fit this config" in line
    assert tree_bytes(trained) == before


def test_a_first_stage_that_is_none(digits: Path, trained: Path, tmp_path: Path, capsys) -> None:
    ldm = CONFIG.replace("autoencoder_kl", "latent_diffusion")
    command = ["train", ldm, f"data.train={digits}/train", f"data.test={digits}/test", f"run.dir={tmp_path}/run"]
    assert "not a run: it has no config.yaml" in refused(capsys, 2, *command, f"family.first_stage={tmp_path}/no")
    only_config = tmp_path / "unfinished"
    only_config.mkdir()
    shutil.copy(trained / "config.yaml", only_config)
    line = refused(capsys, 1, *command, f"family.first_stage={only_config}")
    assert "has no complete checkpoint yet" in line
    line = refused(capsys, 2, *command, f"family.first_stage={trained}", "data.image_size=16")
    assert "was trained on 1 channels of 32 pixels" in line


def test_a_finished_run_says_so_again(digits: Path, trained: Path, capsys) -> None:
    before = tree_bytes(trained)
    assert main(["train", *arguments(digits, trained)]) == 0
    out, err = capsys.readouterr()
    assert "step 4, 32 images, order digest" in out
    assert f"run.dir: {trained}; finished, at step 4: nothing is trained. To go on set train.num_steps" in out + err
    assert tree_bytes(trained) == before


def test_sigterm_stops_a_command_as_ctrl_c_does(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("gmdist.commands.report", lambda options: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["report", str(trained)]) == EXIT_STOPPED
    assert capsys.readouterr().err == "gmdist: stopped\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_sample_writes_a_grid_or_a_folder(trained: Path, tmp_path: Path, capsys) -> None:
    grid, folder = tmp_path / "grid.png", tmp_path / "images"
    assert main(["sample", str(trained), "--num-images", "20", "--out", str(grid)]) == 0
    with Image.open(grid) as image:
        assert image.size == (10 * 34 - 2, 2 * 34 - 2)
    assert main(["sample", str(trained), "--num-images", "3", "--out", str(folder)]) == 0
    assert [path.name for path in sorted(folder.iterdir())] == ["00000.png", "00001.png", "00002.png"]
    checkpoint = trained / "checkpoints/step-00000004"
    again = tmp_path / "again"
    assert main(["sample", str(checkpoint), "--num-images", "3", "--out", str(again)]) == 0
    assert tree_bytes(again) == tree_bytes(folder)
    other = tmp_path / "other"
    assert main(["sample", str(trained), "--num-images", "3", "--seed", "1", "--out", str(other)]) == 0
    assert tree_bytes(other) != tree_bytes(folder)


def test_images_of_a_folder_are_written_as_they_are_drawn(trained: Path, tmp_path: Path, monkeypatch) -> None:
    request = ["sample", str(trained), "--num-images", "5", "--out"]
    monkeypatch.setattr("gmdist.launch.sample._MOST_AT_ONCE", 2)
    before, real = [], AutoencoderKL.sample

    def sample(family, keys, condition=None):
        before.append([path.name for path in sorted((tmp_path / "images").glob("*"))])
        return real(family, keys, condition)

    monkeypatch.setattr(AutoencoderKL, "sample", sample)
    assert main([*request, str(tmp_path / "images")]) == 0
    names = [f"0000{i}.png" for i in range(5)]
    assert before == [names[:0], names[:2], names[:4]]
    assert main([*request, str(tmp_path / "grid.png")]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        for i, name in enumerate(names[:2]):
            with Image.open(tmp_path / "images" / name) as image:
                assert image.tobytes() == grid.crop((34 * i, 0, 34 * i + 32, 32)).tobytes()

    def stopped(family, keys, condition=None):
        if keys[0] >= 2:
            raise KeyboardInterrupt
        return real(family, keys, condition)

    assert main([*request, str(tmp_path / "images"), "--prompt", "a digit"]) == 2
    assert [path.name for path in sorted((tmp_path / "images").iterdir())] == names
    monkeypatch.setattr(AutoencoderKL, "sample", stopped)
    assert main([*request, str(tmp_path / "images")]) == 130
    assert [path.name for path in sorted((tmp_path / "images").iterdir())] == names[:2]  # and none of before


def test_settings_may_come_after_options(trained: Path, tmp_path: Path, capsys) -> None:
    images = ["sample", str(trained), "--num-images", "1", "--out", str(tmp_path / "images")]
    assert "data.colour: no such key" in refused(capsys, 2, *images, "data.colour=1")
    assert main([*images, "train.log_every=7"]) == 0
    for wrong in (["--colour", "1"], ["train.log_every=7", "--colour=1"]):
        with pytest.raises(SystemExit, match="2"):
            main([*images, *wrong])
        assert "unrecognized arguments: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(trained), "--seed=1"])


def test_sample_shows_what_becomes_of_real_images(trained: Path, digits: Path, tmp_path: Path, capsys) -> None:
    def shown(kind: str, rows: int) -> list[np.ndarray]:
        folder = tmp_path / f"{kind}-{rows}"
        assert main(["sample", str(trained), "--show", kind, "--num-images", str(rows), "--out", str(folder)]) == 0
        return [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]

    pairs, ways, walks = shown("reconstructions", 3), shown("interpolations", 2), shown("traversals", 5)
    assert [image.shape for image in pairs] == [(32, 64)] * 3
    assert [image.shape for image in ways] == [(32, 12 * 32)] * 2
    assert [image.shape for image in walks] == [(32, 10 * 32)] * 5
    for i, way in enumerate(ways):  # an image, its reconstruction, ..., that of the next, the next
        assert (way[:, :32] == pairs[i][:, :32]).all()
        assert np.abs(way[:, 32:64].astype(int) - pairs[i][:, 32:]).max() <= 1  # of other batches: other bits
        assert (way[:, -32:] == pairs[i + 1][:, :32]).all()
        assert np.abs(way[:, -64:-32].astype(int) - pairs[i + 1][:, 32:]).max() <= 1
    assert len({walk.tobytes() for walk in walks}) == 5
    sample = ["sample", str(trained), "--out", str(tmp_path / "x.png"), "--show"]
    assert "--show: 'walks'; must be one of reconstructions, " in refused(capsys, 2, *sample, "walks")
    assert "--label: does not go with --show" in refused(capsys, 2, *sample, "traversals", "--label", "1")
    assert "--num-images: 0" in refused(capsys, 2, *sample, "traversals", "--num-images", "0")
    image = next(iter(open_source(f"{digits}/test").by_name())).read()
    write_shards([("one", {name: bytes(content) for name, content in image.items()})], str(tmp_path / "one"))
    alone = f"data.test={tmp_path}/one"
    for kind in ("interpolations", "traversals"):
        assert "data.test: has 1 images; --show needs at least 2 here" in refused(capsys, 1, *sample, kind, alone)


def test_what_a_run_was_not_begun_with_is_said(digits: Path, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)

    def changes(*more: str) -> list[str]:
        path, *overrides = arguments(digits, run, "train.num_steps=6", *more)
        return check_start(load(path, overrides))[1]

    assert changes() == []
    assert changes("family.kl_weight=0.5", "family.perceptual.name=none", "optim.autoencoder.lr=0.5") == [
        "family.kl_weight: 0.5; the run was begun with 0.02",
        "family.perceptual.name: 'none'; the run was begun with 'gradient_frequency'",
    ]


def test_sample_refuses_what_cannot_be(trained: Path, tmp_path: Path, capsys) -> None:
    sample = ["sample", str(trained), "--out", str(tmp_path / "x.png")]
    assert "--label: 10; labels are 0 to 9" in refused(capsys, 2, *sample, "--label", "10")
    line = refused(capsys, 2, *sample, "--label", "1")
    assert "--label: '1'; the run's model is not told classes: it takes nothing of the kind" in line
    line = refused(capsys, 2, *sample, "--prompt", "a cat")
    assert "--prompt: 'a cat'; the run's model is not told captions" in line
    assert "--guidance: family 'autoencoder_kl' has no sampler" in refused(capsys, 2, *sample, "--guidance", "2")
    assert "--num-images: 0" in refused(capsys, 2, *sample, "--num-images", "0")
    assert "not a run" in refused(capsys, 2, "sample", str(tmp_path), "--out", "x.png")
    gone = f"{trained}/checkpoints/step-00000099"
    assert f"{gone}: no such checkpoint" in refused(capsys, 2, "sample", gone, "--out", "x.png")
    assert "--seed: 2147483648; must be between" in refused(capsys, 2, *sample, "--seed", "2147483648")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "00002.png").write_bytes(b"")
    used = ["sample", str(trained), "--out", str(tmp_path / "used"), "--num-images", "2"]
    assert "holds other files already (00002.png, ...)" in refused(capsys, 2, *used)
    assert "grids are PNG files" in refused(capsys, 2, "sample", str(trained), "--out", str(tmp_path / "x.jpg"))


def test_an_empty_argument_is_not_the_root_of_the_file_system(trained: Path, capsys) -> None:
    for command in (["sample", str(trained), "--out", ""], ["data", "pack", str(trained), ""], ["data", "check", " "]):
        assert "an argument is empty" in refused(capsys, 2, *command)


def test_a_checkpoint_that_is_deleted_while_it_is_read(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A run that still trains prunes: here the newest checkpoint of a first look is gone at the second.
    from gmdist.train import checkpoint

    sound, warnings = checkpoint.find_newest(str(trained))
    assert sound is not None
    gone = checkpoint.Found(sound.location + "0", sound.meta)
    looks = iter([(gone, warnings), (sound, warnings)])
    monkeypatch.setattr(checkpoint, "find_newest", lambda run_dir: next(looks))
    meta, _ = open_run(str(trained))
    assert meta == sound.meta


def test_an_averaged_model_is_what_is_opened(trained: Path) -> None:
    from gmdist.train.checkpoint import EMA_PARAM, Reader, find_newest

    _, family = open_run(str(trained))
    found, _ = find_newest(str(trained))
    with Reader(found.location, found.meta) as reader:
        for name, parameter in family.named_parameters():
            average = torch.empty(parameter.numel())
            reader.read(EMA_PARAM, name, 0, average)
            assert torch.equal(average, parameter.flatten())


@pytest.mark.ray
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.gpus_per_worker=1", "cluster.gpus_per_worker: 2 workers with 1 GPU each need 2; this machine has 0"),
        ("data.num_classes=3", "class label 9 is out of range"),
    ],
)
def test_a_refused_overwrite_deletes_nothing(ray_cluster, digits: Path, trained: Path, capsys, override, words) -> None:
    before = tree_bytes(trained)
    code = 2 if "cluster" in override else 1
    assert words in refused(capsys, code, "train", *arguments(digits, trained, "run.overwrite=true", override))
    assert tree_bytes(trained) == before


def test_an_unexpected_error_is_one_line_too(trained: Path, capsys, monkeypatch) -> None:
    def broken(*arguments):
        raise ZeroDivisionError("never\nmind")

    monkeypatch.setattr("gmdist.launch.sample.draw", broken)
    line = refused(capsys, 1, "sample", str(trained), "--out", "x.png")
    assert line.startswith("gmdist: ZeroDivisionError: never; the traceback is in ")
    trace = Path(line.rpartition(" ")[2])
    assert "Traceback" in trace.read_text()
    trace.unlink()


def test_overwrite_deletes_the_run_and_nothing_else(trained: Path, tmp_path: Path) -> None:
    from gmdist.start import clear

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "trace.json").write_text("{}")  # of train.profile_steps
    (run / "first_stage.yaml").write_text("")
    (run / "notes.txt").write_text("mine")
    (run / "checkpoints-of-mine").mkdir()
    clear(str(run))
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints-of-mine", "notes.txt"]


def test_data_commands(digits: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(digits / "test", tmp_path / "data")
    data = tmp_path / "data"
    assert main(["data", "check", str(data)]) == 0
    shard = data / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert "shard-000001.tar" in refused(capsys, 1, "data", "check", str(data))
    shard.write_bytes(content[:2000])
    assert "it was cut" in refused(capsys, 1, "data", "index", str(data))
    assert "no embedded data set 'digitz'" in refused(capsys, 2, "data", "make", "digitz", str(tmp_path / "x"))
    assert "no such folder" in refused(capsys, 1, "data", "pack", str(tmp_path / "no"), str(tmp_path / "x"))
    assert "no .tar shards here" in refused(capsys, 1, "data", "index", str(tmp_path / "no"))


def test_packing_says_what_it_did(tmp_path: Path, capsys) -> None:
    for number in range(4):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("L", (9, 9), number).save(tmp_path / f"in/{number}.png")
    (tmp_path / "in/bad.png").write_bytes(b"damaged")
    (tmp_path / "in/0.txt").write_text("black")
    command = ["data", "pack", str(tmp_path / "in"), str(tmp_path / "out"), "--image-size", "8", "--format", "webp"]
    capsys.readouterr()
    assert main([*command, "--processes", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path}/out: 4 images in 1 shards\n"
    assert printed.err == "gmdist: left out bad.png: not a JPEG, PNG or WebP image\n"
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: 4 images in 1 shards; it was packed before\n"
    assert main(["data", "check", str(tmp_path / "out"), "--fraction", "0.5"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: sound, as far as it was read\n"
    assert "holds a data set already" in refused(capsys, 1, *command, "--quality", "50")
    assert main(["data", "pack", str(tmp_path / "in"), str(tmp_path / "none"), "--max-unreadable", "0"]) == 1
    assert "gmdist: left out bad.png: " in (errors := capsys.readouterr().err)
    assert f"gmdist: {tmp_path}/in: 1 of 5 images cannot be read, and --max-unreadable 0 allows 0" in errors
    for option, value, message in (
        ("--format", "gif", "--format: 'gif'; must be one of png, jpeg, webp"),
        ("--quality", "101", "--quality: 101; must be from 1 to 100"),
        ("--shard-mib", "0", "--shard-mib: 0.0; must be above 0"),
        ("--processes", "0", "--processes: 0; must be at least 1"),
        ("--max-unreadable", "2", "--max-unreadable: 2.0; must be from 0 to 1"),
    ):
        assert message in refused(capsys, 2, *command, option, value)
    assert "--fraction: 0.0; must be above 0" in refused(capsys, 2, "data", "check", "x", "--fraction", "0")


def test_encoding_says_what_it_did(trained: Path, digits: Path, tmp_path: Path, capsys) -> None:
    command = ["data", "encode", str(trained), f"{digits}/test", f"{tmp_path}/latents"]
    assert main([*command, "--workers", "1", "--no-flip"]) == 0
    line = f"{tmp_path}/latents: 296 samples in 4 shards, moments float16 [8, 8, 8]"
    assert capsys.readouterr().out == f"{line}\n"
    assert main([*command, "cluster.num_workers=1", "--no-flip"]) == 0
    assert capsys.readouterr().out == f"{line}; it was encoded before\n"
    assert main(["data", "check", f"{tmp_path}/latents"]) == 0
    assert "flip False" in refused(capsys, 1, *command)
    assert "--workers: 0; must be at least 1" in refused(capsys, 2, *command, "--workers", "0")
    assert "DEST: " in refused(capsys, 2, *command[:4], f"{digits}/test")
    assert "not a run" in refused(capsys, 2, "data", "encode", str(tmp_path), *command[3:])


def test_report_is_one_self_contained_page(trained: Path, capsys) -> None:
    assert main(["report", str(trained)]) == 0
    page = (trained / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 2
    assert "<svg" in page
    assert "nearest training image, of all " in page
    assert 'src="http' not in page
    assert "<script" not in page
    (trained / "report.html").unlink()


def test_a_report_of_a_run_whose_data_is_elsewhere_has_its_curves(trained: Path, tmp_path: Path, capsys) -> None:
    copied = Path(shutil.copytree(trained, tmp_path / "copied"))
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace(str(Path(read_config(str(trained)).data.train).parent), "/gone"))
    assert main(["report", str(copied)]) == 0
    assert "a report without real images: /gone/train: no such data set" in capsys.readouterr().err
    assert "<svg" in (copied / "report.html").read_text()
    shutil.rmtree(copied / "checkpoints")
    assert main(["report", str(copied)]) == 0
    assert "has no complete checkpoint yet" in capsys.readouterr().err


def test_output_that_nobody_reads_any_more_is_no_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with _Piped(writer, "w") as piped:
        assert piped.write(b"a line\n") == 7


def test_a_model_that_gives_no_numbers_is_said(trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def sample(family, keys, condition=None):
        return torch.full((len(keys), 1, 32, 32), torch.nan)

    monkeypatch.setattr(AutoencoderKL, "sample", sample)
    words = "the model's images are not finite; check its weights"
    assert words in refused(capsys, 1, "sample", str(trained), "--out", str(tmp_path / "grid.png"))
    assert not (tmp_path / "grid.png").exists()
    assert main(["report", str(trained)]) == 0  # its curves say when it went wrong
    assert f"a report without samples: {words}" in capsys.readouterr().err
    assert "<svg" in (trained / "report.html").read_text()
    (trained / "report.html").unlink()


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert f"ok       torch {importlib.metadata.version('torch')}" in lines
    assert any(line.startswith("ok       scikit-learn ") for line in lines)
    assert not any("transformers" in line for line in lines)  # what is optional is not missed

    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    assert main(["doctor"]) == 1
    assert "MISSING  ray; run `make setup`" in capsys.readouterr().out
