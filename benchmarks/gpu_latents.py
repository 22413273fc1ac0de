"""Networks of the field on one GPU: Stable Diffusion 1's UNet and DiT-XL/2 on cached latents, by attention kernel.

`python benchmarks/gpu.py` prints its table. A batch has a first stage's moments, and contexts as CLIP-L gives them. The
UNet is channels last. The batch is halved until it fits. What does not run is a line that says why.
"""

import dataclasses
import statistics
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from in_memory import Synthetic, free_memory, one_line, train
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gmdist import rng
from gmdist.diffusion.config import DiffusionConfig
from gmdist.diffusion.process import Diffusion
from gmdist.errors import MemoryExceededError
from gmdist.families.denoising import denoising_loss
from gmdist.families.family import Batch, Family, Metrics, Phase
from gmdist.nets import dit, unet
from gmdist.nets.dit import DiT, DiTConfig, dit_xl
from gmdist.nets.unet import UNet, UNetConfig, stable_diffusion_1
from gmdist.train.config import TrainConfig

WARM_UP, STEPS = 10, 30
CHANNELS, CLASSES, LENGTH, SEED, LATENT_SCALE = 4, 1000, 77, 0, 0.18215
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network at a size of image, and what is asked of it on an H200."""

    name: str
    config: UNetConfig | DiTConfig
    image_side: int  # pixels; of the latent an eighth
    batch_size: int  # at most
    mfu: float  # asked for, with the best of what can be switched on

    @property
    def latent_side(self) -> int:
        """Side of what the network sees."""
        return self.image_side // 8

    def network(self) -> nn.Module:
        """With weights as they are drawn."""
        torch.manual_seed(SEED)
        if isinstance(self.config, DiTConfig):
            return DiT(self.config, CHANNELS, CLASSES, self.latent_side)
        return UNet(self.config, CHANNELS)

    def samples(self, count: int) -> dict[str, Tensor]:
        """Moments [N, 8, h, w], and a label [N] or a context [N, 77, D] for each."""
        side = self.latent_side
        mean = torch.randn(count, CHANNELS, side, side)
        moments = torch.cat([mean, torch.full_like(mean, -8.0)], dim=1)
        if isinstance(self.config, DiTConfig):
            return {"moments": moments, "label": torch.arange(count) % CLASSES}
        assert self.config.context_channels is not None
        return {"moments": moments, "context": torch.randn(count, LENGTH, self.config.context_channels)}

    def head_widths(self) -> list[int]:
        """Of every attention."""
        if isinstance(self.config, DiTConfig):
            return [self.config.channels // self.config.num_heads]
        widths = {self.config.channels * self.config.multipliers[level] for level in self.config.attention_levels}
        return sorted(width // self.config.heads(width) for width in widths)


CASES = [
    Case("SD 1 UNet", stable_diffusion_1(), 256, 128, 0.40),
    Case("SD 1 UNet", stable_diffusion_1(), 512, 32, 0.40),
    Case("DiT-XL/2", dit_xl(), 256, 128, 0.45),
    Case("DiT-XL/2", dit_xl(), 512, 32, 0.45),
]
SMALL_CASES = [
    Case("small UNet", UNetConfig(32, (1, 2), 1, (0,), num_heads=2, context_channels=16), 64, 2, 0.40),
    Case("small DiT", DiTConfig(32, 2, 2), 64, 2, 0.45),
]


class OnLatents(Family):
    """A denoiser of cached latents under contexts or labels that are given."""

    averaged = ("denoiser",)
    blocks = (*unet.BLOCKS, *dit.BLOCKS)
    inputs = ()

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.denoiser = case.network()
        self.shape = (CHANNELS, case.latent_side, case.latent_side)
        self.diffusion = Diffusion(DiffusionConfig("scaled_linear"))

    def phases(self) -> list[Phase]:
        """One network, one loss."""
        return [Phase("denoiser", "denoiser", self.loss)]

    def loss(self, batch: Batch, seen: int) -> tuple[Tensor, Metrics]:
        """The squared error of the predicted noise of a sample of the posterior."""
        mean, logvar = batch["moments"].chunk(2, dim=1)
        noise = rng.normal(SEED, "posterior", batch["key"], self.shape)
        clean = LATENT_SCALE * (mean + torch.exp(0.5 * logvar) * noise)
        told = {name: batch[name] for name in ("label", "context") if name in batch}
        loss = denoising_loss(
            lambda x, times: self.denoiser(x, times, **told), self.diffusion, clean, batch["key"], SEED
        ).mean()
        return loss, {"loss": loss.detach()}


def why_not(kernel: SDPBackend, head_width: int, device: torch.device) -> str | None:
    """What torch says against a kernel for heads of a width, forward and backward in bf16; None if it runs."""
    heads = torch.randn(2, 2, 64, head_width, device=device, dtype=torch.bfloat16, requires_grad=True)
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(kernel):
        warnings.simplefilter("always")
        try:
            F.scaled_dot_product_attention(heads, heads, heads).sum().backward()
        except RuntimeError as error:
            reasons = [str(warning.message).partition("(Triggered")[0].strip() for warning in said]
            return f"heads of {head_width}: {reasons[-1].splitlines()[0] if reasons else one_line(error)}"
    return None


def chosen(case: Case, device: torch.device) -> str:
    """The kernels that torch takes if none is asked for."""
    names = {kernel.value: name for name, kernel in KERNELS.items()}
    found = set()
    for width in case.head_widths():
        heads = torch.empty(2, 2, 64, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        found.add(names.get(torch._fused_sdp_choice(heads, heads, heads), "another"))
    return "+".join(sorted(found))


def measured(case: Case, settings: dict[str, Any], small: bool, device: torch.device) -> tuple[int, list[Any]] | str:
    """The batch that fits, and the run's lines of metrics; or why there are none."""
    warm_up, steps = (1, 2) if small else (WARM_UP, STEPS)
    config = TrainConfig(
        warm_up + steps, log_every=warm_up, checkpoint_every=10**6, sample_every=None, keep_checkpoints=1, **settings
    )
    batch_size = case.batch_size
    while batch_size:
        try:
            return batch_size, train(OnLatents(case), config, Synthetic(batch_size, case.samples), device)
        except (MemoryExceededError, torch.OutOfMemoryError):
            pass  # what the error holds is free after this
        except Exception as error:  # noqa: BLE001 - a compiler or a kernel that does not run here
            return one_line(error)
        free_memory()
        batch_size //= 2
    return "out of memory with a batch of 1"


def rows(small: bool, device: torch.device) -> Iterator[str]:
    """The lines of the table."""
    for case in SMALL_CASES if small else CASES:
        runs = [
            (chosen(case, device) + " (torch's choice)", None, precision, compiled)
            for precision in ("autocast", "bf16")
            for compiled in ((False,) if small else (False, True))
        ]
        runs += [(name, kernel, "autocast", not small) for name, kernel in KERNELS.items() if name != "math" or small]
        for name, kernel, precision, compiled in runs:
            what = f"| {case.name}, {case.image_side} px | {precision}{', compiled' if compiled else ''} | {name} |"
            is_convolutional = isinstance(case.config, UNetConfig)
            settings = {"precision": precision, "compile": compiled, "channels_last": is_convolutional}
            if kernel is None:
                found = measured(case, settings, small, device)
            elif reason := next(filter(None, (why_not(kernel, width, device) for width in case.head_widths())), None):
                found = f"does not run: {reason}"
            else:
                with sdpa_kernel(kernel):
                    found = measured(case, settings, small, device)
            if isinstance(found, str):
                yield f"{what} {found} | | | | | {case.mfu:.2f} |"
                continue
            batch_size, lines = found
            speed = statistics.median(line["images_per_s"] for line in lines[1:])  # the first line counts FLOPs
            flops, mfu = (
                statistics.median(line.get(key, float("nan")) for line in lines[1:]) for key in ("tflops_worker", "mfu")
            )
            yield (
                f"{what} {batch_size} | {speed:.1f} | {flops:.2f} | {mfu:.2f} | {lines[-1]['memory_gib']:.1f} "
                f"| {case.mfu:.2f} |"
            )


def print_table(small: bool, device: torch.device) -> None:
    """All of it, as it is measured."""
    print("\n| | precision | attention | batch | images/s | TFLOP/s | MFU | GiB | asked for on an H200, MFU |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for row in rows(small, device):
        print(row, flush=True)
