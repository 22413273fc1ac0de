"""Gradients that are not finite: the step is left out, then the run goes back, then it fails; memory that is short."""

import json
from pathlib import Path

import pytest
import torch

from gmdist.errors import DivergedError, MemoryExceededError
from gmdist.train.hooks import Hooks
from tests.support import Linear, fit, make_trainer, run_workers, tree_bytes


class Poisoned(Linear):
    """Its loss is not finite for some samples."""

    def __init__(self, keys: set[int], value: float = float("nan")) -> None:
        super().__init__()
        self.keys, self.value = keys, value

    def loss(self, batch, seen):
        loss, metrics = super().loss(batch, seen)
        if self.keys & set(batch["key"].tolist()):
            loss = loss + self.value  # its gradient is finite
            metrics = {"loss": loss.detach()}
        return loss, metrics


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(family) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in family.parameters()])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_step_with_such_a_loss_changes_no_weight(tmp_path: Path, value: float) -> None:
    trainer = make_trainer(Poisoned({9}, value), tmp_path, log_every=1, micro_batch_size=4)
    batches, moved = trainer.data.batches(0), []
    for _ in range(4):
        before = weights(trainer.family)
        trainer.train_step(next(batches))
        moved.append(not torch.equal(before, weights(trainer.family)))
    assert moved == [True, False, True, True]
    assert trainer.units["network"].num_updates == 3
    trainer.close()


def test_it_is_counted_and_does_not_hide_other_losses(tmp_path: Path) -> None:
    fit(Poisoned({9}), tmp_path, num_steps=4, log_every=4)
    (line,) = lines(tmp_path)
    assert line["skipped_steps"] == 1
    assert 0.0 < line["net/loss"] < 100.0


def alone_and_together(rank: int, world: int, folder: str, stage: int) -> None:
    trainer = make_trainer(
        Poisoned({9}), Path(folder), rank=rank, world_size=world, zero_stage=stage, log_every=1, num_steps=3
    )
    trainer.fit()
    assert trainer.units["network"].num_updates == 2
    trainer.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_workers_leave_the_step_out(stage: int, tmp_path: Path) -> None:
    if stage:
        pytest.importorskip("deepspeed")
    run_workers(alone_and_together, 2, str(tmp_path / "both"), stage)
    fit(Poisoned({9}), tmp_path / "alone", num_steps=3, log_every=1)
    both, alone = lines(tmp_path / "both"), lines(tmp_path / "alone")
    assert [line["skipped_steps"] for line in both] == [line["skipped_steps"] for line in alone]
    assert both[2]["net/loss"] == pytest.approx(alone[2]["net/loss"], rel=1e-5)


def test_after_some_in_a_row_the_run_goes_back_and_leaves_them_out(tmp_path: Path) -> None:
    messages: list[str] = []
    settings = {"num_steps": 9, "log_every": 1, "checkpoint_every": 3, "rollback_after": 2}
    # Steps 4 and 5 fail; the run goes back to step 3, and makes its steps 4 to 9 of what follows.
    outcome = fit(Poisoned(set(range(32, 48))), tmp_path / "run", hooks=Hooks(on_message=messages.append), **settings)
    assert (outcome.step, outcome.seen, outcome.finished) == (9, 72, True)
    assert len(messages) == 1
    assert "back to the checkpoint of step 3; the samples 32 to 55 are left out" in messages[0]
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == list(range(1, 10))
    assert all(line["net/loss"] is not None for line in logged)

    # A run that is stopped among them, and goes on, does the same.
    at: list[int] = []
    stopping = Hooks(on_progress=lambda progress: at.append(progress.step), stop_requested=lambda: at[-1:] == [6])
    assert fit(Poisoned(set(range(32, 48))), tmp_path / "parts", hooks=stopping, **settings).step == 6
    assert fit(Poisoned(set(range(32, 48))), tmp_path / "parts", **settings) == outcome
    name = "checkpoints/step-00000009"
    assert tree_bytes(tmp_path / "parts" / name) == tree_bytes(tmp_path / "run" / name)


def test_a_run_that_diverges_again_fails(tmp_path: Path) -> None:
    with pytest.raises(
        DivergedError, match=r"again after the run went back to step 3 and left out the samples 32 to 55"
    ):
        fit(Poisoned(set(range(32, 999))), tmp_path, num_steps=30, checkpoint_every=3, rollback_after=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_run_that_diverges_before_its_first_checkpoint_fails(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="there is no checkpoint to go back to; lower the learning rate"):
        fit(Poisoned(set(range(999))), tmp_path, num_steps=30, rollback_after=2)


@pytest.mark.parametrize(
    ("error", "micro", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 4, "train.micro_batch_size=2"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "activation_checkpointing"),
    ],
)
def test_a_lack_of_memory_names_what_to_set(tmp_path: Path, error: Exception, micro: int, advice: str) -> None:
    class Large(Linear):
        def loss(self, batch, seen):
            raise error

    with pytest.raises(
        MemoryExceededError, match=f"out of memory on worker 0, step 0, .*of {micro} samples; .*{advice}"
    ):
        fit(Large(), tmp_path, micro_batch_size=micro)


class Divided(torch.nn.Module):
    """Divides by what it is told to."""

    divisor = 1.0

    def forward(self, x):
        return x / self.divisor


class Overflowing(Linear):
    """For odd samples from some number on, its second layer gives what is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.network[1] = Divided()

    def loss(self, batch, seen):
        self.network[1].divisor = float(((batch["key"] < 32) | (batch["key"] % 2 == 0)).all())
        return super().loss(batch, seen)


def diverge(rank: int, world: int, folder: str, stage: int, precision: str) -> None:
    settings = {"zero_stage": stage, "precision": precision, "num_steps": 30, "checkpoint_every": 3}
    messages: list[str] = []
    hooks = Hooks(on_message=messages.append)
    with pytest.raises(DivergedError, match=r"is not is that of network\.1\), again after the run went back to step 3"):
        fit(Overflowing(), Path(folder), rank=rank, world_size=world, rollback_after=2, hooks=hooks, **settings)
    assert "in the last, the first output that is not is that of network.1): back to the checkpoint" in messages[0]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_the_layer_where_it_begins_is_named(stage: int, precision: str, tmp_path: Path) -> None:
    if stage:
        pytest.importorskip("deepspeed")
    run_workers(diverge, 2, str(tmp_path), stage, precision)


def test_a_stop_among_them_leaves_a_checkpoint_to_go_back_to(tmp_path: Path) -> None:
    poisoned = set(range(32, 40))
    settings = {"num_steps": 9, "log_every": 1, "checkpoint_every": 1, "rollback_after": 1, "keep_checkpoints": 1}
    outcome = fit(Poisoned(poisoned), tmp_path / "whole", **settings)
    for step in (5, 6, 7):
        at: list[int] = []
        append, reached = (lambda p, at=at: at.append(p.step)), (lambda at=at, step=step: at[-1:] == [step])
        stopping = Hooks(on_progress=append, stop_requested=reached)
        fit(Poisoned(poisoned), tmp_path / "parts", hooks=stopping, **settings)
    assert fit(Poisoned(poisoned), tmp_path / "parts", **settings) == outcome
    assert tree_bytes(tmp_path / "parts/checkpoints") == tree_bytes(tmp_path / "whole/checkpoints")


def test_a_checkpoint_that_was_due_among_them_is_made_up_for(tmp_path: Path) -> None:
    fit(Poisoned(set(range(24, 32))), tmp_path, num_steps=9, checkpoint_every=4, rollback_after=3, log_every=1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000008", "step-00000009"]


def test_a_step_that_is_left_out_leaves_no_trace_in_buffers(tmp_path: Path) -> None:
    class Normed(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.network.insert(1, torch.nn.BatchNorm1d(8))

        def loss(self, batch, seen):
            batch["image"][batch["key"] == 9] = torch.nan
            return super().loss(batch, seen)

    trainer = make_trainer(Normed(), tmp_path, log_every=1)
    batches = trainer.data.batches(0)
    trainer.train_step(next(batches))
    before = {name: buffer.clone() for name, buffer in trainer.family.named_buffers()}
    trainer.train_step(next(batches))
    assert all(torch.equal(buffer, before[name]) for name, buffer in trainer.family.named_buffers())
    trainer.train_step(next(batches))
    assert trainer.family.network[1].num_batches_tracked == 2
    assert all(buffer.isfinite().all() for buffer in trainer.family.buffers())
    trainer.close()
