"""Our networks beside diffusers', from the same weights: a training step, 50 guided steps of DDIM, and peak memory.

    make bench-diffusion

Each side is a process of its own with one thread on the CPU; they take turns, a step each, and ratios are medians over
the turns. Time is what the process gets of the processor, which on a quiet machine is the wall clock's. "Its scripts"
is diffusers as its training scripts run it: the C library's allocator, contiguous tensors, its default attention, and
AdamW as they make it, which on a processor updates one tensor after another; the clipping that they do is left out.
"As it comes" is that with fused AdamW, or its pipeline. "Tuned" is the faster of its two layouts with fused AdamW under
the allocator's settings that our workers have, and ours is the faster of our two; nhwc marks channels last. Neither
side is compiled. "unjudged" and "judged" are the autoencoder trained as train_autoencoderkl.py does, before and after
its discriminator takes part, by `first_stages.py`.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from first_stages import family_of, our_step, their_step
from torch import Tensor, nn
from turns import Peer, difference, ratio, serve, start, take_turns

from gmdist.diffusion.config import DiffusionConfig, SamplerConfig
from gmdist.diffusion.process import Diffusion
from gmdist.interchange.diffusers import read_folder, write_folder
from gmdist.interchange.spec import NetworkSpec
from gmdist.nets.autoencoder import AutoencoderConfig
from gmdist.nets.dit import DiTConfig
from gmdist.nets.gaussian import kl_of_dimensions
from gmdist.nets.unet import UNetConfig

CLASSES, LENGTH, CONTEXT, SIDE = 1000, 77, 256, 16
SPECS = {
    "unet": NetworkSpec(
        UNetConfig(
            channels=128, multipliers=(1, 2, 3), num_res_blocks=1, attention_levels=(0, 1), num_heads=8,
            context_channels=CONTEXT, norm_groups=32, norm_eps=1e-5,
        ),
        4,
        size=SIDE,
    ),
    "autoencoder": NetworkSpec(AutoencoderConfig(128, (1, 1, 1), 1), 3, latent_scale=0.5),
    "dit": NetworkSpec(DiTConfig(384, 6, 6, learned_sigma=True), 4, num_classes=CLASSES, size=SIDE),
}  # fmt: skip
BATCH, IMAGE_SIDE = {"unet": 4, "autoencoder": 2, "dit": 8}, 64
SAMPLES, STEPS, GUIDANCE, KL_WEIGHT = 4, 50, 4.0, 1e-6


@dataclass(frozen=True)
class Side:
    """How one of them runs."""

    whose: str
    our_allocator: bool = True
    channels_last: bool = False
    fused: bool = True  # AdamW


SIDES = {
    "ours": Side("ours"),
    "ours, channels last": Side("ours", channels_last=True),
    "its scripts": Side("theirs", our_allocator=False, fused=False),
    "as it comes": Side("theirs", our_allocator=False),
    "tuned": Side("theirs"),
    "tuned, channels last": Side("theirs", channels_last=True),
}
STARTS = {"unjudged autoencoder": False, "judged autoencoder": True}  # whether the discriminator takes part
TASKS = [(task, precision) for task in (*SPECS, *STARTS) for precision in ("fp32", "bf16")]
TASKS += [("sample unet", "fp32"), ("sample dit", "fp32")]
AT_MOST = {"its scripts": 0.8, "tuned": 1.0}  # ours / theirs; memory: 1, of as it comes
AGREE = {"fp32": 1e-4, "bf16": 2e-2}  # of losses and images, relative


def draw(folder: Path) -> None:
    """Write the weights that both start from; no branch begins as the identity."""
    for name, spec in SPECS.items():
        torch.manual_seed(0)
        network = spec.build()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        write_folder(folder / name, spec, network.state_dict())


def our_network(folder: Path) -> nn.Module:
    """One of ours with the folder's weights."""
    spec, state = read_folder(folder)
    network = spec.build()
    network.load_state_dict(state)
    return network


def their_network(folder: Path) -> Any:
    """One of diffusers' with the folder's weights."""
    import diffusers

    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder)


def batch_of(name: str, layout: torch.memory_format) -> dict[str, Tensor]:
    """What a step trains on."""
    torch.manual_seed(1)
    n = BATCH[name]
    if name == "autoencoder":
        image = torch.rand(n, 3, IMAGE_SIDE, IMAGE_SIDE) * 2 - 1
        latent = torch.randn(n, 4, IMAGE_SIDE // 4, IMAGE_SIDE // 4)
        return {"image": image.contiguous(memory_format=layout), "noise": latent.contiguous(memory_format=layout)}
    x, target = torch.randn(2, n, 4, SIDE, SIDE)
    return {
        "x": x.contiguous(memory_format=layout),
        "target": target,
        "times": torch.linspace(0, 999, n).long(),
        "label": torch.arange(n),
        "context": torch.randn(n, LENGTH, CONTEXT),
    }


def loss_of(name: str, whose: str, network: Any, batch: dict[str, Tensor]) -> Tensor:
    """The squared error of a denoiser, or an autoencoder's with the divergence of its posterior."""
    if name == "autoencoder":
        if whose == "ours":
            mean, logvar = network.encode(batch["image"])
            image = network.decode(mean + torch.exp(0.5 * logvar) * batch["noise"])
        else:
            posterior = network.encode(batch["image"]).latent_dist
            mean, logvar = posterior.mean, posterior.logvar
            image = network.decode(mean + posterior.std * batch["noise"]).sample
        kl = kl_of_dimensions(mean.float(), logvar.float()).flatten(1).sum(dim=1).mean()
        return F.mse_loss(image.float(), batch["image"]) + KL_WEIGHT * kl
    if name == "unet" and whose == "ours":
        output = network(batch["x"], batch["times"], context=batch["context"])
    elif name == "unet":
        output = network(batch["x"], batch["times"], batch["context"]).sample
    elif whose == "ours":
        output = network(batch["x"], batch["times"], batch["label"])
    else:
        output = network(batch["x"], batch["times"], class_labels=batch["label"]).sample[:, :4]
    return F.mse_loss(output.float(), batch["target"])


def training(name: str, precision: str, side: Side, layout: torch.memory_format, folder: Path) -> Callable[[], float]:
    """A step, which returns its loss."""
    network = (our_network if side.whose == "ours" else their_network)(folder / name).train()
    for part in network.modules():
        if hasattr(part, "dropout_prob"):
            part.dropout_prob = 0.0  # of labels, inside diffusers' DiT; ours leaves it to the family
    network.to(memory_format=layout)
    batch = batch_of(name, layout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=side.fused or None)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(name, side.whose, network, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def training_first_stage(
    task: str, precision: str, side: Side, layout: torch.memory_format, folder: Path
) -> Callable[[], float]:
    """An update of an autoencoder, and of its discriminator once that takes part; returns the autoencoder's loss."""
    batch = {"image": batch_of("autoencoder", layout)["image"], "key": torch.arange(BATCH["autoencoder"])}
    spec, state = read_folder(folder / "autoencoder")
    starts = STARTS[task]
    family = family_of(spec.config, state, starts).to(memory_format=layout)

    def adamw(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(network.parameters(), lr=1e-5, fused=side.fused or None)

    if side.whose == "ours":
        return our_step(family, batch, adamw, precision)
    network = their_network(folder / "autoencoder").train().to(memory_format=layout)
    judge = family.discriminator
    assert judge is not None
    tuned = side.our_allocator
    return their_step(network, judge, batch, adamw, precision, starts=starts, tuned=tuned)


def sampling(name: str, whose: str, layout: torch.memory_format, folder: Path) -> Callable[[], float]:
    """Draw a batch of images; returns a weighted sum of the pixels, which says whether two are equal."""
    make = our_network if whose == "ours" else their_network
    network, decoder = (make(folder / part).eval().to(memory_format=layout) for part in (name, "autoencoder"))
    torch.manual_seed(1)
    start, context = torch.randn(SAMPLES, 4, SIDE, SIDE), torch.randn(SAMPLES, LENGTH, CONTEXT)
    side = SIDE * 4
    weights = torch.randn(SAMPLES, 3, side, side)
    scale = SPECS["autoencoder"].latent_scale
    assert scale is not None

    if whose == "theirs":
        import diffusers

        scheduler = diffusers.DDIMScheduler(
            1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        )  # fmt: skip
        common: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
        if name == "unet":
            pipe = diffusers.StableDiffusionPipeline(
                decoder, None, None, network, scheduler, None, None, requires_safety_checker=False
            )
            prompts = {"prompt_embeds": context, "negative_prompt_embeds": torch.zeros_like(context)}
            size = {"height": side, "width": side}

            def draw_images() -> Tensor:
                return pipe(latents=start, **prompts, **size, **common).images
        else:
            pipe = diffusers.DiTPipeline(network, decoder, scheduler)

            def draw_images() -> Tensor:
                generator = torch.Generator().manual_seed(1)
                return pipe(list(range(SAMPLES)), generator=generator, **common).images

        pipe.set_progress_bar_config(disable=True)
    else:
        settings = SamplerConfig("ddim", STEPS, guidance=GUIDANCE, spacing="leading", ends_clean=False)
        diffusion = Diffusion(DiffusionConfig("scaled_linear", sampler=settings))
        told = {"context": torch.cat([context, torch.zeros_like(context)])}
        if name == "dit":
            start = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
            told = {"label": torch.cat([torch.arange(SAMPLES), torch.full((SAMPLES,), CLASSES)])}

        def predict_both(x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
            conditional, free = network(torch.cat([x, x]), torch.cat([times, times]), **told).chunk(2)
            return conditional, free

        def refuse(*_: Any) -> Tensor:
            raise AssertionError("every step is guided, and draws no noise")

        def draw_images() -> Tensor:
            x = diffusion.sample(refuse, start.contiguous(memory_format=layout), refuse, predict_both)
            return (decoder.decode(x / scale) / 2 + 0.5).clamp(0, 1)

    def step() -> float:
        with torch.no_grad():
            return (draw_images().float() * weights).sum().item() / weights.norm().item()

    return step


def work(side: str, task: str, precision: str, folder: Path) -> None:
    """One side."""
    torch.set_num_threads(1)
    how = SIDES[side]
    layout = torch.channels_last if how.channels_last else torch.contiguous_format
    with contextlib.redirect_stdout(sys.stderr):
        if task.startswith("sample "):
            step = sampling(task.removeprefix("sample "), how.whose, layout, folder)
        elif task in STARTS:
            step = training_first_stage(task, precision, how, layout, folder)
        else:
            step = training(task, precision, how, layout, folder)
    serve(step)


def measure(task: str, precision: str, rounds: int, folder: Path, peers: Path) -> dict[str, Peer]:
    """All sides in turn; a step of training once before anything is counted."""
    found = {}
    samples = task.startswith("sample ")
    for side, how in SIDES.items():
        if samples and not how.fused:
            continue  # no optimizer
        arguments = [side, task, precision, str(folder)]
        found[side] = start(
            __file__, arguments, our_allocator=how.our_allocator, peers=peers if how.whose == "theirs" else None
        )
    take_turns(found, rounds, is_warm=samples)
    return found


def row(task: str, precision: str, found: dict[str, Peer]) -> str:
    """A line of the table."""

    def faster(*sides: str) -> str:
        return min(sides, key=lambda side: found[side].median_s())

    ours, tuned = faster("ours", "ours, channels last"), faster("tuned", "tuned, channels last")
    theirs = ["as it comes", tuned]
    if "its scripts" in found:
        theirs.insert(0, "its scripts")
    columns = [f"{task}, {precision}"] + ["-"] * (3 - len(theirs))
    for side in (*theirs, ours):
        layout = ", nhwc" if side.endswith("last") else ""
        columns.append(f"{found[side].median_s():.3f} s{layout}, {found[side].gib:.2f} GiB")
    columns += ["-"] * (3 - len(theirs)) + [f"{ratio(found[ours], found[side]):.2f}" for side in theirs]
    plain = found["as it comes"]
    columns.append(f"{found[ours].gib / plain.gib:.2f}")
    # Each block of diffusers' DiT trains its own copy of the embeddings, and the script's autoencoder keeps gradients
    # of its discriminator's step, so that later losses differ.
    apart = difference(found[ours], plain, 1 if task in ("dit", *STARTS) else None)
    columns.append(f"{apart:.0e}" + ("" if apart < AGREE[precision] else " (not equal)"))
    return "| " + " | ".join(columns) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=Path(".parity"), help="the folder that diffusers is installed in")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sampling-rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="TASK", help="as 'unet fp32', 'sample dit fp32'")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        *what, folder = options.work
        work(*what, Path(folder))
        return
    names = "its scripts | as it comes | tuned | ours | / its scripts | / as it comes | / tuned | memory | differ by"
    print(f"| | {names} |")
    print("|---" * 10 + "|", flush=True)
    with tempfile.TemporaryDirectory(prefix="gmdist-diffusion-") as scratch:
        draw(Path(scratch))
        for task, precision in TASKS:
            if options.only and f"{task} {precision}" not in options.only:
                continue
            rounds = options.sampling_rounds if task.startswith("sample") else options.rounds
            print(row(task, precision, measure(task, precision, rounds, Path(scratch), options.peers)), flush=True)
    print(f"asked for, at most: {AT_MOST['its scripts']} / its scripts, {AT_MOST['tuned']} / tuned, memory 1")


if __name__ == "__main__":
    main()
