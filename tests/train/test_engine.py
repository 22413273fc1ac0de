"""Gradients, updates and shards of every stage against single-process torch, with different data on each worker."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gmdist.families.family import Family, Phase
from gmdist.train.engine import make_unit
from gmdist.train.optim import OptimConfig
from tests.support import MemorySource, make_trainer, run_workers

WORLD, BATCH, STEPS = 2, 8, 4
SGD = OptimConfig(name="sgd", lr=0.05, momentum=0.9)  # Adam would hide a wrong scale of the gradient
CPU = torch.device("cpu")


class TwoNetworks(Family):
    """A generator and a critic that judge each other, with a lazy gradient penalty: every hard pattern in small."""

    averaged = ("generator",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.generator = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 256))
        self.critic = torch.nn.Sequential(torch.nn.Linear(256, 16), torch.nn.Softplus(), torch.nn.Linear(16, 1))

    def phases(self) -> list[Phase]:
        return [
            Phase("g", "generator", self.g_loss),
            Phase("d", "critic", self.d_loss),
            Phase("d_r1", "critic", self.r1, every=2, higher_order=True),
        ]

    def fake(self, batch):
        return self.generator(batch["image"].flatten(1)[:, :4])

    def g_loss(self, batch, seen):
        loss = torch.nn.functional.softplus(-self.critic(self.fake(batch))).mean()
        return loss, {"loss": loss.detach()}

    def d_loss(self, batch, seen):
        softplus = torch.nn.functional.softplus
        real, fake = self.critic(batch["image"].flatten(1)), self.critic(self.fake(batch).detach())
        loss = (softplus(-real) + softplus(fake)).mean()
        return loss, {"loss": loss.detach()}

    def r1(self, batch, seen):
        image = batch["image"].flatten(1).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.critic(image).sum(), image, create_graph=True)
        loss = gradient.square().sum(1).mean()
        return loss, {"penalty": loss.detach()}


def reference(optim: OptimConfig) -> dict[str, torch.Tensor]:
    """The weights after STEPS on whole batches, with torch alone."""
    family = TwoNetworks().double()
    kinds = {"sgd": lambda p: torch.optim.SGD(p, lr=optim.lr, momentum=optim.momentum)}
    kinds["adamw"] = lambda p: torch.optim.AdamW(p, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    optimizers = {name: kinds[optim.name](child.parameters()) for name, child in family.named_children()}
    batches = MemorySource(48, BATCH).batches(0)
    for step in range(STEPS):
        batch = next(batches).batch
        batch["image"] = batch["image"].double()
        for phase in family.phases():
            if step % phase.every:
                continue
            # Zero, not None: a parameter that a phase does not reach still moves by its momentum, on every stage.
            for parameter in family.parameters():
                parameter.grad = torch.zeros_like(parameter)
            (phase.loss(batch, 0)[0] * phase.every).backward()
            trained = getattr(family, phase.trains)
            if optim.clip_norm:
                torch.nn.utils.clip_grad_norm_(trained.parameters(), optim.clip_norm)
            optimizers[phase.trains].step()
    return {name: parameter.detach() for name, parameter in family.named_parameters()}


def train(rank: int, world: int, folder: str, stage: int, micro: int, optim: OptimConfig) -> None:
    run = Path(folder) / f"{stage}-{micro}-{optim.name}-{optim.clip_norm}"
    trainer = make_trainer(
        TwoNetworks(),
        run,
        optim=optim,
        rank=rank,
        world_size=world,
        num_steps=STEPS,
        zero_stage=stage,
        micro_batch_size=micro,
    )
    try:
        trainer.fit()
        if rank == 0:
            torch.save({n: p.detach().clone() for n, p in trainer.family.named_parameters()}, run / "weights.pt")
        owned = torch.tensor([sum(f.values.numel() for u in trainer.units.values() for f in u.owned())])
        dist.all_reduce(owned)
        assert owned.item() == sum(p.numel() for p in trainer.family.parameters())
    finally:
        trainer.close()


CASES = [(stage, micro, SGD) for stage in (0, 1, 2) for micro in (4, 2)]
CASES += [(stage, 2, OptimConfig(lr=1e-2, weight_decay=0.1, clip_norm=0.05)) for stage in (0, 1)]


def train_all(rank: int, world: int, folder: str) -> None:
    for stage, micro, optim in CASES:
        train(rank, world, folder, stage, micro, optim)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("parity")
    run_workers(train_all, WORLD, str(folder))
    return folder


@pytest.mark.parametrize(("stage", "micro", "optim"), CASES, ids=lambda value: getattr(value, "name", value))
def test_parity_with_torch(trained: Path, stage: int, micro: int, optim: OptimConfig) -> None:
    weights = torch.load(trained / f"{stage}-{micro}-{optim.name}-{optim.clip_norm}" / "weights.pt", weights_only=True)
    start = TwoNetworks().state_dict()
    for name, expected in reference(optim).items():
        change, wanted = weights[name].double() - start[name].double(), expected - start[name].double()
        assert (change - wanted).norm() <= 2e-5 * wanted.norm() + 1e-7, name


@pytest.mark.gpu
@pytest.mark.parametrize("micro", [8, 4])
def test_parity_with_torch_on_one_worker(micro: int, device: torch.device, tmp_path: Path) -> None:
    trainer = make_trainer(TwoNetworks(), tmp_path, optim=SGD, device=device, num_steps=STEPS, micro_batch_size=micro)
    trainer.fit()
    trainer.close()
    for name, expected in reference(SGD).items():
        torch.testing.assert_close(
            dict(trainer.family.named_parameters())[name].detach().cpu().double(), expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.gpu
def test_bf16_computes_in_bf16_on_fp32_weights(device: torch.device) -> None:
    family = TwoNetworks().to(device)
    seen = {}

    def loss(batch, _):
        output = family.generator(batch["image"].flatten(1)[:, :4])
        seen["dtype"] = output.dtype
        return output.float().square().mean(), {}

    unit = make_unit(family, "generator", SGD, stage=0, precision="bf16", device=device)
    batch = {key: tensor.to(device) for key, tensor in MemorySource(48, 8).first(8).batch.items()}
    unit.accumulate(Phase("g", "generator", loss), batch, 0, 1.0)
    assert seen["dtype"] == torch.bfloat16
    unit.step(0.1)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in family.generator.parameters())


def test_an_exception_in_a_loss_leaves_the_unit_usable() -> None:
    family = TwoNetworks()
    unit = make_unit(family, "critic", SGD, stage=0, precision="fp32", device=CPU)
    batch = MemorySource(48, 8).first(8).batch

    def broken(batch, seen):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        unit.accumulate(Phase("d", "critic", broken), batch, 0, 1.0)
    before = [p.detach().clone() for p in family.critic.parameters()]
    unit.accumulate(family.phases()[1], batch, 0, 1.0)
    unit.step(0.1)
    assert any(not torch.equal(a, b) for a, b in zip(before, family.critic.parameters(), strict=True))
