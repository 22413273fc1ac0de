"""Ways to compute the same: recomputed, compiled, in channels-last; and what a step costs."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gmdist.families.family import Family, Phase
from gmdist.train.blocks import prepare
from gmdist.train.config import TrainConfig
from gmdist.train.cost import FlopCount
from tests.support import SIZE, SMALL, Linear, fit, make_trainer, small_family, tree_bytes

Graphs = list[list[Any]]  # the inputs of each
PRECISIONS = ("fp32", "autocast", "bf16")
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile's C++")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["denoiser/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("family", "precision"), [("ddpm", "fp32"), *(("latent_diffusion/dit", one) for one in PRECISIONS)]
)
def test_recomputed_activations_change_no_bit(family: str, precision: str, tmp_path: Path) -> None:
    for name, recomputed in (("plain", False), ("again", True)):
        settings = {"activation_checkpointing": recomputed, "precision": precision}
        fit(small_family(family), tmp_path / name, log_every=1, **settings)
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


def judged() -> Family:
    """Gradients go through its judge twice where that judges, and not through the autoencoder's blocks."""
    judge = dataclasses.replace(SMALL["vit_vqvae/discriminator"].discriminator, adaptive=True)
    return small_family("vit_vqvae/discriminator", discriminator=judge)


def calls_of_a_layer(run: Path, **settings: bool) -> dict[str, int]:
    """How often a step computes the first layer of a block of either network."""
    trainer = make_trainer(judged(), run, **settings)
    counts = dict.fromkeys(("autoencoder", "discriminator"), 0)
    for name in counts:
        blocks = [part for part in getattr(trainer.family, name).modules() if isinstance(part, trainer.family.blocks)]

        def count(*_: Any, name: str = name) -> None:
            counts[name] += 1

        layer = next(part for part in blocks[0].modules() if not list(part.children()))
        layer.register_forward_hook(count)
    trainer.train_step(next(trainer.data.batches(0)))
    trainer.close()
    return counts


def test_an_autoencoder_that_is_judged_is_recomputed_and_its_judge_in_its_own_phase(tmp_path: Path) -> None:
    kept = calls_of_a_layer(tmp_path / "kept")
    again = calls_of_a_layer(tmp_path / "again", activation_checkpointing=True)
    assert kept == {"autoencoder": 2, "discriminator": 3}  # to be judged, as an example; one judgement, two examples
    assert again == {"autoencoder": 3, "discriminator": 5}


def without_dropout() -> Family:
    return small_family("ddpm", unet=dataclasses.replace(SMALL["ddpm"].unet, dropout=0.0))


def test_channels_last_changes_losses_by_rounding_alone(tmp_path: Path) -> None:
    for name, changed in (("plain", False), ("changed", True)):
        fit(without_dropout(), tmp_path / name, log_every=1, num_steps=3, channels_last=changed)
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_channels_last_reaches_features_that_do_not_come_of_an_image(tmp_path: Path) -> None:
    trainer = make_trainer(small_family("stylegan2"), tmp_path, channels_last=True)
    block = trainer.family.generator.synthesis.blocks[0]
    found = []
    block.register_forward_hook(lambda _, inputs, output: found.append((inputs[0], output)))
    trainer.family.sample(torch.arange(2))
    trainer.close()
    assert all(features.is_contiguous(memory_format=torch.channels_last) for features in found[0])


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


@needs_compiler
def test_compiled_blocks_train_as_plain_ones(tmp_path: Path) -> None:
    weights = []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        trainer = make_trainer(Penalized(), tmp_path / str(compiled), num_steps=4, compile=compiled)
        trainer.fit()
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
        weights.append(torch.cat([p.detach().flatten() for p in trainer.family.parameters()]))
        trainer.close()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    """What torch.compile captures meanwhile. Its code is torch's own, but for a factor that shows where it ran."""
    captured: Graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        captured.append(inputs)
        return lambda *inputs: [1.001 * output for output in module.forward(*inputs)]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance(force_backend=backend):
        yield captured
    torch._dynamo.reset()


def test_an_autoencoder_that_is_judged_is_compiled(graphs: Graphs, tmp_path: Path) -> None:
    fit(judged(), tmp_path, num_steps=2, compile=True)
    # Blocks of the encoder, of the decoder, and two of the discriminator, in its phase alone.
    assert len(graphs) == 4
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_blocks_of_a_transformer_are_compiled(
    recomputed: bool, precision: str, graphs: Graphs, tmp_path: Path
) -> None:
    settings = {"compile": True, "activation_checkpointing": recomputed, "precision": precision}
    fit(small_family("latent_diffusion/dit"), tmp_path, num_steps=2, sample_every=1, **settings)
    assert len(graphs) == 1  # its blocks are of one kind; what encodes for it is not trained
    assert not torch._dynamo.utils.counters["graph_break"]


class Layer(torch.nn.Module):
    """A layer that widens by one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width + 1)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Widening(Linear):
    """More kinds of a block than torch.compile follows of itself; a preview has another batch size than a step."""

    blocks = (Layer,)
    widths = range(1, 10)

    def __init__(self) -> None:
        super().__init__()
        layers = [Layer(width) for width in self.widths]
        self.network = torch.nn.Sequential(torch.nn.Linear(SIZE * SIZE, 1), *layers, torch.nn.Linear(10, 1))

    def sample(self, keys, condition=None):
        images = torch.zeros(len(keys), 1, SIZE, SIZE)
        return images + self.network(images.flatten(1))[:, :, None, None]

    def evaluate(self, batch):
        return self.loss(batch, 0)[1]


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_compiled_run_that_goes_on_ends_with_the_same_bits(recomputed: bool, graphs: Graphs, tmp_path: Path) -> None:
    """Whatever each of its processes has counted, shown and evaluated before."""
    settings = {"activation_checkpointing": recomputed, "sample_every": 2, "evaluate_every": 2, "checkpoint_every": 4}
    fit(Widening(), tmp_path / "plain", num_steps=4, **settings)
    for name, ends in (("whole", [4]), ("cut", [1, 4])):
        for end in ends:
            torch._dynamo.reset()  # as a new process
            fit(Widening(), tmp_path / name, num_steps=end, compile=True, **settings)
    last = Path("checkpoints/step-00000004/shard-00000-of-00001.safetensors")
    plain, whole, cut = ((tmp_path / name / last).read_bytes() for name in ("plain", "whole", "cut"))
    assert cut == whole != plain


@pytest.mark.parametrize("recomputed", [False, True])
def test_each_kind_of_block_is_one_graph(recomputed: bool, graphs: Graphs, tmp_path: Path) -> None:
    fit(Widening(), tmp_path, num_steps=2, compile=True, activation_checkpointing=recomputed, sample_every=1)
    assert len(graphs) == len(Widening.widths)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_code_of_a_shape_does_not_depend_on_those_before(graphs: Graphs) -> None:
    family = Widening()
    prepare(family, ["network"], TrainConfig(num_steps=1, compile=True))
    for num_samples in (8, 5):
        family.network(torch.zeros(num_samples, SIZE * SIZE))
    assert len(graphs) == 2 * len(Widening.widths)
    assert not any(isinstance(value, torch.SymInt) for inputs in graphs for value in inputs)


def test_flops_are_those_of_the_products(tmp_path: Path) -> None:
    """Against the closed form: 2 m n k a product; one forward and two backward, but one for the first layer."""
    fit(Linear(), tmp_path, num_steps=2, micro_batch_size=2)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    layers = (2 * 2 * SIZE * SIZE * 8, 2 * 2 * 8 * 1)
    flops = 2 * layers[0] + 3 * layers[1]
    steps_per_s = line["images_per_s"] / 8
    assert line["tflops_worker"] == pytest.approx(4 * flops * steps_per_s / 1e12, rel=1e-6)


def test_a_run_goes_on_with_its_counts(tmp_path: Path) -> None:
    """Of a sample: micro-batches of another size have others."""
    fit(Linear(), tmp_path, num_steps=2, micro_batch_size=2)
    fit(Linear(), tmp_path, num_steps=4, micro_batch_size=4, log_every=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    a_sample = [line["tflops_worker"] / line["images_per_s"] for line in lines]
    assert len(lines) == 3
    assert a_sample == pytest.approx([a_sample[0]] * 3, rel=1e-6)


def test_recomputation_is_not_counted() -> None:
    counts = []
    for recomputed in (False, True):
        family = small_family("ddpm")
        prepare(family, ["denoiser"], TrainConfig(num_steps=1, activation_checkpointing=recomputed))
        count = FlopCount()
        image = torch.zeros(2, 1, SIZE, SIZE)
        batch = {"image": image, "label": torch.tensor([0, 1]), "key": torch.tensor([0, 1])}
        phase: Phase = family.phases()[0]
        with count.counting(phase, num_samples=2, seen=0):
            phase.loss(batch, 0)[0].backward()
        counts.append(count.a_sample())
    assert counts[0] == counts[1] > 0


def test_a_profile_is_a_chrome_trace(tmp_path: Path) -> None:
    fit(Linear(), tmp_path, num_steps=10, profile_steps=2)
    trace = json.loads((tmp_path / "trace.json").read_text())
    steps = [event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep")]
    assert len(set(steps)) == 2
