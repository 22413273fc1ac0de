"""Sweeps: record, best config and page; failures, kills and refusals. All trials but two train in this process."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gmdist import storage
from gmdist.cli import main
from gmdist.config import Config, load
from gmdist.errors import (
    CheckpointError,
    ClusterLostError,
    ConfigError,
    DataError,
    DivergedError,
    GmdistError,
    RunFailedError,
    SaveError,
    StorageError,
)
from gmdist.launch import sweep as launched
from gmdist.launch.sweep_progress import SweepDisplay
from gmdist.runs import read_config
from gmdist.start import train_worker
from gmdist.sweep.load import load_sweep
from gmdist.train import checkpoint
from gmdist.train.hooks import Hooks, Outcome
from gmdist.train.metrics import read_lines
from tests.support import tree_bytes

BASE = str(Path(__file__).parent.parent.parent / "configs/digits/vae.yaml")
LR = "optim.autoencoder.lr"
BETA = "family.beta.value"
METRIC = "test/elbo_nats"
ASHA = {"name": "asha", "first_step": 2, "reduction": 2}
PBT = {"name": "pbt", "interval_steps": 2}


class Killed(BaseException):
    """The command was killed."""


@pytest.fixture
def asked(digits: Path, tmp_path: Path) -> Callable[..., str]:
    """Writes the config of a sweep over a tiny VAE; gives its path."""

    def write(folder: str = "sweep", train: dict[str, Any] | None = None, **settings: Any) -> str:
        settings = {"metric": METRIC, "mode": "max", "num_trials": 3, "concurrency": 1} | settings
        settings.setdefault("space", {LR: {"log_uniform": [1e-4, 1e-2]}, BETA: {"choice": [0.5, 1.0]}})
        config = {
            "base": BASE,
            "family": {"autoencoder": {"channels": [8, 8]}, "latent_dim": 4, "iwae_samples": 1},
            "data": {"train": f"{digits}/train", "test": f"{digits}/test", "batch_size": 8},
            "train": {"num_steps": 6, "evaluate_every": 2, "checkpoint_every": 2, "sample_every": 6, "log_every": 2}
            | {"num_preview_images": 4, "zero_stage": 0}
            | (train or {}),
            "cluster": {"num_workers": 1},
            "sweep": settings,
            "run": {"dir": str(tmp_path / folder)},
        }
        path = tmp_path / f"{folder}.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Let trials train in this process; gives the configs of those that did."""
    trained: list[Config] = []

    @contextmanager
    def connected(config: Any, times: int) -> Iterator[None]:
        yield

    def train(config: Config, progress: Any, message: Any, last_step: int, stopper: Any) -> Outcome:
        trained.append(config)
        hooks = Hooks(progress, message, stop_requested=lambda: stopper.asked, last_step=last_step)
        return train_worker(config, torch.device("cpu"), hooks)

    monkeypatch.setattr(launched, "connected", connected)
    monkeypatch.setattr(launched, "room", lambda cluster: 1)
    monkeypatch.setattr(launched, "train", train)
    return trained


def run(path: str, *overrides: str) -> dict[str, Any]:
    standings: list[Any] = []
    found = launched.sweep(load_sweep(path, overrides), standings.append, lambda message: None)
    assert standings
    return found


def results(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What a sweep found, without what took how long."""
    return [tuple(trial[key] for key in ("trial", "state", "settings", "step", "metric")) for trial in found["trials"]]


@pytest.mark.ray
def test_on_ray_a_sweep_ends_and_its_best_alone_has_the_same_metric(
    ray_cluster: Any, asked: Callable[..., str], tmp_path: Path
) -> None:
    found = run(asked(scheduler=ASHA, num_trials=2, concurrency=2))
    assert [trial["state"] for trial in found["trials"]].count("done") == 1
    best = found["trials"][found["best"]]
    config = load(str(tmp_path / "sweep/best.yaml"))
    train_worker(config, torch.device("cpu"))
    assert read_lines(config.run.dir)[-1][METRIC] == best["metric"]
    assert tree_bytes(Path(config.run.dir) / "checkpoints/step-00000006") == tree_bytes(
        tmp_path / f"sweep/trials/{best['run']}/checkpoints/step-00000006"
    )


def test_asha_pauses_trials_and_writes_what_it_found(
    without_ray: list[Config], asked: Callable[..., str], tmp_path: Path
) -> None:
    found = run(asked(scheduler=ASHA, num_trials=4))
    assert {trial["state"] for trial in found["trials"]} == {"done", "stopped"}
    assert found["steps"] < found["steps_of_all"] == 24
    for trial in found["trials"]:
        lines = read_lines(str(tmp_path / "sweep/trials" / trial["run"]))
        assert max(line["step"] for line in lines) == trial["step"]
        assert trial["metric"] == [line[METRIC] for line in lines if METRIC in line][-1]
        assert (
            read_config(str(tmp_path / "sweep/trials" / trial["run"])).optim["autoencoder"].lr == trial["settings"][LR]
        )
    done = [trial for trial in found["trials"] if trial["state"] == "done"]
    assert found["best"] == max(done, key=lambda trial: trial["metric"])["trial"]
    page = (tmp_path / "sweep/report.html").read_text()
    for words in (LR, METRIC, "<svg", "best", "data:image/png"):
        assert words in page


@pytest.mark.parametrize(
    ("scheduler", "train_settings"),
    [
        (ASHA, {}),
        (PBT, {}),
        # The checkpoint that a run went on from is deleted before that run ends.
        ({"name": "pbt", "interval_steps": 3}, {"evaluate_every": 3, "checkpoint_every": 1}),
    ],
    ids=["asha", "pbt", "pbt, many checkpoints"],
)
def test_killed_three_times_a_sweep_ends_as_one_left_alone(
    without_ray: list[Config],
    asked: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheduler: dict[str, Any],
    train_settings: dict[str, Any],
) -> None:
    settings = {"scheduler": scheduler, "train": train_settings, "num_trials": 3}
    alone = run(asked("alone", **settings))
    source, train = random.Random(scheduler["name"]), launched.train

    def killed(config: Config, progress: Any, message: Any, last_step: int, stopper: Any) -> Outcome:
        if source.random() < 0.4:
            train(config, progress, message, last_step - 1, stopper)  # its own checkpoint is not the sweep's
            raise Killed
        return train(config, progress, message, last_step, stopper)

    monkeypatch.setattr(launched, "train", killed)
    kills = 0
    while kills < 3:
        try:
            run(asked(**settings))
            break
        except Killed:
            kills += 1
    assert kills
    monkeypatch.setattr(launched, "train", train)
    before = len(without_ray)
    found = run(asked(**settings))
    assert results(found) == results(alone)
    assert found["best"] == alone["best"]
    again = len(without_ray)
    assert results(run(asked(**settings))) == results(alone)
    assert len(without_ray) == again >= before
    for trial in found["trials"]:
        name = f"trials/{trial['run']}/checkpoints/step-{trial['step']:08d}"
        assert tree_bytes(tmp_path / "sweep" / name) == tree_bytes(tmp_path / "alone" / name)
        steps = [
            [line["step"] for line in read_lines(str(tmp_path / folder / "trials" / trial["run"]))]
            for folder in ("sweep", "alone")
        ]
        assert steps[0] == steps[1]


def test_pbt_goes_on_from_the_checkpoint_of_a_better_trial(
    without_ray: list[Config], asked: Callable[..., str], tmp_path: Path
) -> None:
    found = run(asked(scheduler=PBT, num_trials=4))
    moves = [(trial, part) for trial in found["trials"] for part in trial["lineage"] if part["donor"] is not None]
    assert moves
    for trial, part in moves:
        own, donor = (read_lines(str(tmp_path / "sweep/trials" / name)) for name in (part["run"], part["donor"]))
        assert own[0] == donor[0]  # their common past
        assert read_config(str(tmp_path / "sweep/trials" / part["run"])).optim["autoencoder"].lr == part["settings"][LR]
        assert max(line["step"] for line in own) >= part["step"] + 2
        assert trial["lineage"][0]["donor"] is None
    assert "Who went on from whom" in (tmp_path / "sweep/report.html").read_text()


def test_a_bucket_holds_a_sweep_as_a_folder_does(
    without_ray: list[Config], asked: Callable[..., str], bucket: Any, tmp_path: Path
) -> None:
    small = {"scheduler": PBT, "num_trials": 2, "train": {"num_steps": 4, "sample_every": 4}}
    local = run(asked(**small))
    assert any(len(trial["lineage"]) > 1 for trial in local["trials"])
    found = run(asked("bucket", **small), "run.dir=s3://pictures/sweep")
    assert results(found) == results(local)
    trained = len(without_ray)
    assert results(run(asked("bucket", **small), "run.dir=s3://pictures/sweep")) == results(local)
    assert len(without_ray) == trained
    names = set(storage.list_names("s3://pictures/sweep")) - {"trials"}
    assert names == {"sweep.json", "best.yaml", "report.html"}


def test_a_trial_that_fails_is_recorded_and_the_others_go_on(
    without_ray: list[Config],
    asked: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = launched.train

    def failing(config: Config, *others: Any) -> Outcome:
        if config.run.dir.endswith("001"):
            raise DivergedError("the gradients are not finite")
        return train(config, *others)

    monkeypatch.setattr(launched, "train", failing)
    path = asked()
    found = run(path)
    assert [trial["state"] for trial in found["trials"]] == ["done", "failed", "done"]
    assert found["trials"][1]["error"] == "the gradients are not finite"
    trained = len(without_ray)
    assert results(run(path)) == results(found)
    assert len(without_ray) == trained
    assert main(["sweep", path]) == 0
    assert "3 trials (1 failed), 12 steps (0% saved)" in capsys.readouterr().out
    assert "3 trials (1 failed); 12 steps" in (tmp_path / "sweep/report.html").read_text()


def test_values_that_do_not_go_together_fail_their_trial_alone(
    without_ray: list[Config], asked: Callable[..., str]
) -> None:
    space = {"family.beta.free_nats": {"grid": [0.0, 1.0]}}
    space |= {"family.beta.schedule": {"grid": ["constant", "capacity"]}}
    found = run(asked(space=space, search="grid", num_trials=None))
    failed = [trial for trial in found["trials"] if trial["state"] == "failed"]
    assert [trial["settings"] for trial in failed] == [
        {"family.beta.free_nats": 1.0, "family.beta.schedule": "capacity"}
    ]
    assert "family.beta.free_nats: 1.0; must be 0 with the schedule capacity" in failed[0]["error"]


@pytest.mark.parametrize(
    "error", [StorageError("no bucket"), SaveError("no space"), ClusterLostError("Ray does not answer")]
)
def test_what_is_no_trials_own_ends_the_sweep_and_is_gone_on_with(
    without_ray: list[Config], asked: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: GmdistError
) -> None:
    train = launched.train

    def failing(config: Config, *others: Any) -> Outcome:
        if config.run.dir.endswith("001"):
            raise error
        return train(config, *others)

    monkeypatch.setattr(launched, "train", failing)
    path = asked()
    with pytest.raises(type(error)):
        run(path)
    monkeypatch.setattr(launched, "train", train)
    assert [trial["state"] for trial in run(path)["trials"]] == ["done"] * 3


def test_what_every_trial_would_be_refused_for_is_no_trials_failure(
    without_ray: list[Config], asked: Callable[..., str], digits: Path, tmp_path: Path
) -> None:
    path = asked()
    with pytest.raises(DataError, match=r"data.train: .*later: no such data set"):
        run(path, f"data.train={tmp_path}/later")
    (tmp_path / "later").symlink_to(digits / "train")
    assert [trial["state"] for trial in run(path, f"data.train={tmp_path}/later")["trials"]] == ["done"] * 3


def test_data_that_any_value_names_and_is_not_there_ends_the_sweep_before_it_starts(
    without_ray: list[Config], asked: Callable[..., str], digits: Path, tmp_path: Path
) -> None:
    space = {"data.train": {"choice": [f"{digits}/train", f"{tmp_path}/later"]}}
    with pytest.raises(DataError, match=r"data.train: .*later: no such data set"):
        run(asked(space=space))
    assert not (tmp_path / "sweep").exists()


def test_a_donor_without_its_checkpoint_is_said(
    without_ray: list[Config], asked: Callable[..., str], tmp_path: Path
) -> None:
    run(asked(num_trials=1))
    donor, config = tmp_path / "sweep/trials/000", load(str(tmp_path / "sweep/best.yaml"))
    (donor / "checkpoints/step-00000006/meta.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000006: incomplete, it has no meta\.json"):
        launched._begin_from(str(donor), 6, config)
    assert not Path(config.run.dir).exists()


def test_a_damaged_donor_is_the_failure_of_who_goes_on_from_it(
    without_ray: list[Config], asked: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*arguments: Any) -> None:
        raise CheckpointError("step-00000002: damaged (its crc32 differs)")

    monkeypatch.setattr(launched, "_begin_from", damaged)
    found = run(asked(scheduler=PBT, num_trials=4))
    states = [trial["state"] for trial in found["trials"]]
    assert states.count("failed") in (1, 2)
    assert states[found["best"]] == "done"
    assert "its crc32 differs" in next(trial["error"] for trial in found["trials"] if trial["state"] == "failed")


def test_a_trial_that_has_not_come_so_far_is_not_read_to_see_it(
    without_ray: list[Config], asked: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(asked(num_trials=1))
    trial = tmp_path / "sweep/trials/000"
    watch = launched._Watch(METRIC, str(trial))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "verify", None)
        assert not watch.has_come_to(8)
    assert watch.has_come_to(6)
    next((trial / "checkpoints/step-00000006").glob("*.safetensors")).unlink()
    assert not watch.has_come_to(6)  # it is trained again from the one before, so that others can go on from it


def test_a_trial_without_the_metrics_of_its_checkpoint_says_what_to_delete(
    without_ray: list[Config], asked: Callable[..., str], tmp_path: Path
) -> None:
    path = asked(num_trials=1)
    found = run(path)
    (tmp_path / "sweep/sweep.json").unlink()
    metrics = tmp_path / "sweep/trials/000/metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:2]))  # as a power cut may leave it
    with pytest.raises(StorageError, match=r"trials/000: has come to step 6, .* delete that folder"):
        run(path)
    shutil.rmtree(metrics.parent)
    assert results(run(path)) == results(found)


@pytest.mark.parametrize(
    ("key", "values"), [("family.latent_dim", [4, 8]), ("family.autoencoder.channels", [[8, 8], [8, 16]])]
)
def test_pbt_is_of_values_that_leave_checkpoints_what_they_are(
    without_ray: list[Config], asked: Callable[..., str], key: str, values: list[Any]
) -> None:
    with pytest.raises(ConfigError, match="change what a model's tensors are"):
        run(asked(scheduler=PBT, space={key: {"choice": values}}))


def test_pbt_is_of_values_that_leave_an_optimizer_what_it_keeps(
    without_ray: list[Config], asked: Callable[..., str]
) -> None:
    space = {"optim.autoencoder.name": {"choice": ["adamw", "adam"]}}
    assert run(asked(scheduler=PBT, space=space))["best"] is not None
    with pytest.raises(ConfigError, match="change what an optimizer keeps"):
        run(asked(scheduler=PBT, space={"optim.autoencoder.name": {"choice": ["adamw", "sgd"]}}))


def test_the_folder_of_a_run_is_no_sweeps(without_ray: list[Config], asked: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/config.yaml").touch()
    with pytest.raises(ConfigError, match=r"sweep; holds a run \(config.yaml\)"):
        run(asked())


def test_an_error_that_is_a_timeout_is_no_wait(
    without_ray: list[Config], asked: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> Outcome:
        raise TimeoutError("Ray does not answer")

    monkeypatch.setattr(launched, "train", failing)
    with pytest.raises(TimeoutError, match="Ray does not answer"):
        run(asked())


def test_texts_of_a_sweep_are_shown_as_they_are(
    without_ray: list[Config], asked: Callable[..., str], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Rich takes for markup, and matplotlib for mathematics.
    odd = tmp_path / "a$b^$[/x]"  # a folder in another
    odd.parent.mkdir()
    odd.symlink_to(digits / "train")
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = asked(num_trials=1, space={"data.train": {"choice": [str(odd)]}})
    with SweepDisplay("name [/b]", METRIC) as display:
        launched.sweep(load_sweep(path), display.standing, display.message)
    assert "a$b^$" in (tmp_path / "sweep/report.html").read_text()


def test_a_best_run_of_another_sweep_goes_with_it(
    without_ray: list[Config], asked: Callable[..., str], tmp_path: Path
) -> None:
    run(asked(num_trials=1))
    train_worker(load(str(tmp_path / "sweep/best.yaml")), torch.device("cpu"))
    run(asked(num_trials=1), "sweep.seed=5", "run.overwrite=true")
    assert not (tmp_path / "sweep/best").exists()


def test_all_trials_failing_fails_the_sweep(
    without_ray: list[Config], asked: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> Outcome:
        raise DivergedError("the gradients are not finite")

    monkeypatch.setattr(launched, "train", failing)
    with pytest.raises(RunFailedError, match="no trial came to its end: the gradients are not finite"):
        run(asked())


def test_a_metric_that_no_evaluation_has_is_said_at_the_first(
    without_ray: list[Config], asked: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launched, "_LOOK_EVERY_S", 0.0)
    with pytest.raises(ConfigError, match=r"sweep.metric: 'test/elbo'; the evaluation has test/elbo_nats, test/"):
        run(asked(metric="test/elbo", train={"num_steps": 400, "evaluate_every": 2, "log_every": 1}))
    last = max(line["step"] for line in read_lines(without_ray[0].run.dir))
    assert last < 20
    assert len(without_ray) == 1


def test_another_sweep_in_the_folder_is_refused_until_it_is_overwritten(
    without_ray: list[Config], asked: Callable[..., str], tmp_path: Path
) -> None:
    run(asked(num_trials=1))
    with pytest.raises(ConfigError, match="holds another sweep .sweep.seed: 0 there, 5 here"):
        run(asked(num_trials=1), "sweep.seed=5")
    run(asked(num_trials=1), "sweep.seed=5", "run.overwrite=true")
    assert json.loads((tmp_path / "sweep/sweep.json").read_text())["asked"]["sweep"]["seed"] == 5


def test_the_command_prints_the_best_and_complains_in_one_line(
    without_ray: list[Config], asked: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", asked(), "sweep.num_trials=1"]) == 0
    assert "best.yaml: trial 0, test/elbo_nats" in capsys.readouterr().out
    assert main(["sweep", asked(), "sweep.trials=1"]) == 2
    assert "sweep.trials: no such key; did you mean 'num_trials'?" in capsys.readouterr().err
    assert main(["train", asked()]) == 2
    assert "`gmdist sweep CONFIG` takes it" in capsys.readouterr().err
    assert main(["sweep", BASE]) == 2
    assert "sweep: missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": {"optim.autoencoder.lrate": {"choice": [1.0]}}}, "optim.autoencoder.lrate: no such key"),
        ({"space": {"family.likelihood.name": {"choice": ["gaussian", "cauchy"]}}}, "'cauchy'; .*likelihood.name"),
        (
            {"space": {"family.latent_dim": {"choice": [4]}, LR: {"choice": [-1.0]}}},
            "^optim.autoencoder.lr: -1.0",
        ),
        ({"train": {"num_step": 5}}, "^train.num_step: no such key"),
        ({"space": {"family.likelihood.name": {"choice": []}}}, "must have at least one value"),
        ({"space": {"cluster.num_workers": {"choice": [1]}}}, "cannot be searched over"),
        ({"space": {"train.num_steps": {"choice": [4, 6]}}}, "has 2 values of train.num_steps, which all trials share"),
        ({"space": {"train": {"choice": [{"seed": 0}, {"seed": 1}]}}}, "has 2 values of train.seed"),
        ({"space": {"train.evaluate_every": {"choice": [1, 2]}}}, "has 2 values of train.evaluate_every"),
        ({"space": {"data.batch_size": {"choice": [8, 16]}}, "scheduler": PBT}, "does not go with scheduler 'pbt'"),
        ({"mode": "least"}, "sweep.mode: 'least'; must be one of min, max"),
        ({"search": "bayes"}, "sweep.search: 'bayes'"),
        ({"scheduler": {"name": "hyperband"}}, "sweep.scheduler.name: 'hyperband'"),
        ({"metric": "autoencoder/loss"}, "must be one of the evaluation"),
        ({"search": "grid"}, "is not a list of values"),
        ({"search": "tpe", "scheduler": PBT}, "'tpe' with scheduler 'pbt'"),
        ({"search": "tpe", "num_trials": None}, "sweep.num_trials: missing"),
        ({"num_trials": 0}, "sweep.num_trials: 0"),
        ({"concurrency": 0}, "sweep.concurrency: 0"),
        ({"scheduler": {"name": "asha"}}, "sweep.scheduler.first_step: None"),
        ({"scheduler": {"name": "asha", "first_step": 6}}, "first_step: 6; must be from 1 to below"),
        ({"scheduler": {"name": "asha", "first_step": 1}}, "train.evaluate_every: 2; trials are compared at step 1"),
        ({"scheduler": {"name": "asha", "first_step": 2, "reduction": 1}}, "reduction: 1"),
        ({"scheduler": {"name": "none", "first_step": 2}}, "is for scheduler 'asha', not 'none'"),
        ({"scheduler": PBT | {"quantile": 0.6}}, "quantile: 0.6"),
        ({"scheduler": PBT | {"resample": 2.0}}, "resample: 2.0"),
        ({"scheduler": PBT, "num_trials": 1}, "needs at least 2"),
    ],
)
def test_what_cannot_be_searched_is_refused(asked: Callable[..., str], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sweep(asked(**settings))


def test_a_sweep_that_evaluates_nothing_is_refused(asked: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=f"sweep.metric: '{METRIC}'; nothing is evaluated: set data.test"):
        load_sweep(asked(), ["data.test=null"])


def test_workers_beyond_the_cluster_are_refused(ray_cluster: Any, asked: Callable[..., str]) -> None:
    path = asked(train={"num_steps": 6})
    with pytest.raises(ConfigError, match=r"cluster.cpus_per_worker: 4 workers with 1 CPU each need 4; this"):
        launched.sweep(load_sweep(path, ["cluster.num_workers=4"]), lambda standing: None, lambda message: None)
