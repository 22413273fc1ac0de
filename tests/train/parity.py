"""A run of a few steps on every worker, and the same with single-process torch in float64 on whole batches."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmdist.families.family import Batch, Family
from gmdist.train import zero
from gmdist.train.checkpoint import BUFFER, tensor_key
from gmdist.train.engine import freeze_all_but
from gmdist.train.optim import OptimConfig
from gmdist.train.state import state_tensors
from gmdist.train.trainer import Trainer, split
from tests.support import MemorySource, make_trainer
from tests.train.patterns import BATCH

WORLD, STEPS = 2, 3  # the third has again what comes every second step
SGD = OptimConfig(name="sgd", lr=0.05, momentum=0.9)  # Adam would hide a wrong scale of the gradient


def shared_out(optim: OptimConfig, updates: float) -> OptimConfig:
    """Adam as StyleGAN2 has it where a step is several updates: lr times k / (k + 1), betas to that power."""
    if optim.name == "sgd":
        return optim
    betas = optim.betas[0] ** (1.0 / updates), optim.betas[1] ** (1.0 / updates)
    return dataclasses.replace(optim, lr=optim.lr / updates, betas=betas)


def reference_optimizer(optim: OptimConfig, child: nn.Module) -> torch.optim.Optimizer:
    """torch's own, whose weight decay spares vectors."""
    matrices = [p for p in child.parameters() if p.ndim > 1]
    vectors = [p for p in child.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax}[optim.name]
    return kind(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)


def cut(batch: Batch, micro: int) -> list[Batch]:
    """A whole batch as workers and micro-batches hold it."""
    parts = [{name: tensor[rank::WORLD] for name, tensor in batch.items()} for rank in range(WORLD)]
    return [piece for part in parts for piece in split(part, micro)]


def reference(
    make_family: Callable[[], Family],
    optim: OptimConfig,
    micro: int | None = None,
    steps: int = STEPS,
    precision: str = "float64",
) -> Iterator[dict[str, Tensor]]:
    """The weights and buffers after each step on whole batches, with torch alone, in float64 or autocast."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    family = make_family().to(dtype)
    updates = {
        p.trains: sum(1.0 / other.every for other in family.phases() if other.trains == p.trains)
        for p in family.phases()
    }
    optimizers = {
        name: reference_optimizer(shared_out(optim, count), getattr(family, name)) for name, count in updates.items()
    }
    batches = MemorySource(48, BATCH).batches(0)
    for step in range(steps):
        batch = next(batches).batch
        batch["image"] = batch["image"].to(dtype)
        pieces = cut(batch, micro) if family.local else [batch]
        for phase in family.phases():
            if not phase.is_due(step, step * BATCH):
                continue
            trained = getattr(family, phase.trains)
            for parameter in family.parameters():
                parameter.requires_grad_(True)
                # Zero, not None: a parameter that a phase does not reach still moves by its momentum, on every stage.
                parameter.grad = torch.zeros_like(parameter)
            freeze_all_but(family, phase.trains)
            for number, piece in enumerate(pieces, start=1):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                    loss = phase.loss(piece, step * BATCH)[0]
                (loss * phase.every / len(pieces)).backward()
                if number * WORLD == len(pieces):
                    buffers = {name: buffer.clone() for name, buffer in family.named_buffers()}  # as rank 0 has them
            if family.local:
                family.load_state_dict(buffers, strict=False)
            if optim.clip_norm:
                nn.utils.clip_grad_norm_(trained.parameters(), optim.clip_norm)
            optimizers[phase.trains].step()
        family.after_step(step * BATCH)
        yield {name: value.detach().clone() for name, value in family.state_dict().items()}


def whole(fragments: list[tuple[str, int, Tensor]], family: Family) -> dict[str, Tensor]:
    """Tensors by name, put together from what all workers own: each element once."""
    everyone: list[list[tuple[str, int, Tensor]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, fragments)
    shapes = {name: value.shape for name, value in family.named_parameters()}
    names = {name for worker in everyone for name, _, _ in worker}
    found = {name: torch.full(shapes[name], torch.nan) for name in names}
    for name, start, values in (fragment for worker in everyone for fragment in worker):
        place = found[name].view(-1)[start : start + len(values)]
        assert place.isnan().all(), name
        place.copy_(values)
    assert not any(value.isnan().any() for value in found.values())
    return found


def outcome(trainer: Trainer, make_family: Callable[[], Family]) -> dict[str, Tensor]:
    """Master weights, buffers, and averages as "ema/...": all of a run that there is to compare."""
    family = make_family()
    found = whole([(f.name, f.start, f.values) for unit in trainer.units.values() for f in unit.owned()], family)
    ema = zip(trainer.ema.fragments, trainer.ema.averages, strict=True)
    averages = whole([(f.name, f.start, average) for f, average in ema], family)
    saved = state_tensors(trainer.family, trainer.units, trainer.ema)
    keys = {name: tensor_key(BUFFER, name, 0) for name, _ in family.named_buffers()}
    buffers = {name: saved[key].view_as(family.get_buffer(name)) for name, key in keys.items() if key in saved}
    return found | buffers | {f"ema/{name}": value for name, value in averages.items()}


def train(
    rank: int,
    folder: str,
    name: str,
    make_family: Callable[[], Family],
    *,
    optim: OptimConfig = SGD,
    steps: int = STEPS,
    prepare: Callable[[Trainer], None] = lambda trainer: None,
    **settings: object,
) -> None:
    """Train on this worker, and write what comes out, as rank 0 sees it, into `folder`/`name`.pt."""
    zero._WHOLE_ELEMENTS = 40  # small networks are shared out too, and the smallest parameters are not
    run = Path(folder) / name
    trainer = make_trainer(
        make_family(), run, batch_size=BATCH, optim=optim, rank=rank, world_size=WORLD, num_steps=steps, **settings
    )
    try:
        prepare(trainer)
        batches = trainer.data.batches(0)
        for _ in range(steps):
            trainer.train_step(next(batches))
        found = outcome(trainer, make_family)
        if rank == 0:
            torch.save(found, Path(folder) / f"{name}.pt")
    finally:
        trainer.close()


def load(folder: Path, name: str) -> dict[str, Tensor]:
    """What `train` wrote."""
    return torch.load(folder / f"{name}.pt", weights_only=True)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest distance of a tensor from what it should be, as a part of the way that it should have gone.

    A rounding to fp32 does not count. What is frozen is not looked at: it is in no unit.
    """
    parts = []
    for name, value in expected.items():
        if name in found and value.is_floating_point():
            distance = (found[name].double() - value.double()).norm() - 2.0**-23 * value.double().norm()
            parts.append(distance / ((value.double() - start[name].double()).norm() + 1e-12))
    assert parts
    return float(max(parts))
