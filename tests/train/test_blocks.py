"""Ways to compute the same: recomputed, compiled, in channels-last; and what a step costs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from gmdist.families.family import Family, Phase
from gmdist.train.blocks import prepare
from gmdist.train.config import TrainConfig
from gmdist.train.cost import FlopCount
from tests.support import SIZE, SMALL, Linear, fit, make_trainer, small_family, tree_bytes


def losses(run: Path) -> list[float]:
    return [json.loads(line)["denoiser/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_recomputed_activations_change_no_bit(tmp_path: Path) -> None:
    for name, recomputed in (("plain", False), ("again", True)):
        fit(small_family("ddpm"), tmp_path / name, log_every=1, activation_checkpointing=recomputed)
    assert tree_bytes(tmp_path / "plain/checkpoints") == tree_bytes(tmp_path / "again/checkpoints")


def test_recomputation_saves_activations(tmp_path: Path) -> None:
    kept = []
    for recomputed in (False, True):
        trainer = make_trainer(small_family("ddpm"), tmp_path / str(recomputed), activation_checkpointing=recomputed)
        batch = trainer.data.first(8).batch_on(torch.device("cpu"))
        kept.append(0)

        def pack(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.phases[0].loss(batch, 0)
        trainer.close()
    assert kept[1] < 0.5 * kept[0]


def without_dropout() -> Family:
    return small_family("ddpm", unet=dataclasses.replace(SMALL["ddpm"].unet, dropout=0.0))


def test_channels_last_changes_losses_by_rounding_alone(tmp_path: Path) -> None:
    for name, changed in (("plain", False), ("changed", True)):
        fit(without_dropout(), tmp_path / name, log_every=1, num_steps=3, channels_last=changed)
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


class Penalized(Linear):
    """Its second phase differentiates a gradient, which compiled code cannot."""

    blocks = (torch.nn.Tanh,)

    def phases(self):
        return [*super().phases(), Phase("r1", "network", self.penalty, every=2, higher_order=True)]

    def penalty(self, batch, seen):
        image = batch["image"].flatten(1).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.network(image).sum(), image, create_graph=True)
        loss = gradient.square().sum(1).mean()
        return loss, {"loss": loss.detach()}


def test_compiled_blocks_train_as_plain_ones(tmp_path: Path) -> None:
    weights = []
    for compiled in (False, True):
        trainer = make_trainer(Penalized(), tmp_path / str(compiled), num_steps=4, compile=compiled)
        trainer.fit()
        assert (trainer.family.network[1]._compiled_call_impl is not None) == compiled
        weights.append(torch.cat([p.detach().flatten() for p in trainer.family.parameters()]))
        trainer.close()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_flops_are_those_of_the_products(tmp_path: Path) -> None:
    """Against the closed form: 2 m n k a product; one forward and two backward, but one for the first layer."""
    fit(Linear(), tmp_path, num_steps=2, micro_batch_size=2)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    layers = (2 * 2 * SIZE * SIZE * 8, 2 * 2 * 8 * 1)
    flops = 2 * layers[0] + 3 * layers[1]
    steps_per_s = line["images_per_s"] / 8
    assert line["tflops_worker"] == pytest.approx(4 * flops * steps_per_s / 1e12, rel=1e-6)


def test_recomputation_is_not_counted() -> None:
    counts = []
    for recomputed in (False, True):
        family = small_family("ddpm")
        prepare(family, ["denoiser"], TrainConfig(num_steps=1, activation_checkpointing=recomputed))
        count = FlopCount()
        image = torch.zeros(2, 1, SIZE, SIZE)
        batch = {"image": image, "label": torch.tensor([0, 1]), "key": torch.tensor([0, 1])}
        phase: Phase = family.phases()[0]
        with count.counting(phase):
            phase.loss(batch, 0)[0].backward()
        counts.append(count.a_step(1))
    assert counts[0] == counts[1] > 0


def test_a_profile_is_a_chrome_trace(tmp_path: Path) -> None:
    fit(Linear(), tmp_path, num_steps=10, profile_steps=2)
    trace = json.loads((tmp_path / "trace.json").read_text())
    steps = [event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep")]
    assert len(set(steps)) == 2
