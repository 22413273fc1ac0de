"""A table of networks in training on one GPU: precision, compiled or not, and attention kernel.

`python benchmarks/gpu.py` prints it. The batch is halved until it fits. What does not run is a line that says why.
"""

import statistics
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from in_memory import Synthetic, free_memory, one_line, train
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gmdist.errors import MemoryExceededError
from gmdist.families.family import Family
from gmdist.train.config import TrainConfig
from gmdist.train.optim import OptimConfig

WARM_UP, STEPS = 10, 30
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Case(Protocol):
    """A network at a size of image, and what is asked of it on an H200."""

    @property
    def name(self) -> str: ...
    @property
    def image_side(self) -> int: ...  # pixels
    @property
    def batch_size(self) -> int: ...  # at most
    @property
    def mfu(self) -> float: ...  # asked for, with the best of what can be switched on
    @property
    def trains(self) -> str: ...  # the family's child
    @property
    def is_causal(self) -> bool: ...  # its attention
    @property
    def channels_last(self) -> bool: ...
    def family(self) -> Family: ...
    def samples(self, count: int) -> dict[str, Tensor]: ...
    def head_widths(self) -> list[int]: ...  # of every attention


def why_not(kernel: SDPBackend, head_width: int, is_causal: bool, device: torch.device) -> str | None:
    """What torch says against a kernel for heads of a width, forward and backward in bf16; None if it runs."""
    heads = torch.randn(2, 2, 64, head_width, device=device, dtype=torch.bfloat16, requires_grad=True)
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(kernel):
        warnings.simplefilter("always")
        try:
            F.scaled_dot_product_attention(heads, heads, heads, is_causal=is_causal).sum().backward()
        except RuntimeError as error:
            reasons = [str(warning.message).partition("(Triggered")[0].strip() for warning in said]
            return f"heads of {head_width}: {reasons[-1].splitlines()[0] if reasons else one_line(error)}"
    return None


def why_not_all(case: Case, kernel: SDPBackend, device: torch.device) -> str | None:
    """The first thing against a kernel in a case."""
    reasons = (why_not(kernel, width, case.is_causal, device) for width in case.head_widths())
    return next(filter(None, reasons), None)


def chosen(case: Case, device: torch.device) -> str:
    """The kernels that torch takes if none is asked for."""
    names = {kernel.value: name for name, kernel in KERNELS.items()}
    found = set()
    for width in case.head_widths():
        heads = torch.empty(2, 2, 64, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        found.add(names.get(torch._fused_sdp_choice(heads, heads, heads, is_causal=case.is_causal), "another"))
    return "+".join(sorted(found))


def measured(case: Case, settings: dict[str, Any], small: bool, device: torch.device) -> tuple[int, list[Any]] | str:
    """The batch that fits, and the run's lines of metrics; or why there are none."""
    warm_up, steps = (1, 2) if small else (WARM_UP, STEPS)
    config = TrainConfig(
        warm_up + steps, log_every=warm_up, checkpoint_every=10**6, sample_every=None, keep_checkpoints=1, **settings
    )
    batch_size, optim = case.batch_size, {case.trains: OptimConfig()}
    while batch_size:
        try:
            return batch_size, train(case.family(), config, Synthetic(batch_size, case.samples), device, optim)
        except (MemoryExceededError, torch.OutOfMemoryError):
            pass  # what the error holds is free after this
        except Exception as error:  # noqa: BLE001 - a compiler or a kernel that does not run here
            return one_line(error)
        free_memory()
        batch_size //= 2
    return "out of memory with a batch of 1"


def rows(cases: Sequence[Case], small: bool, device: torch.device) -> Iterator[str]:
    """The lines of the table."""
    for case in cases:
        runs = [
            (chosen(case, device) + " (torch's choice)", None, precision, compiled)
            for precision in ("autocast", "bf16")
            for compiled in ((False,) if small else (False, True))
        ]
        runs += [(name, kernel, "autocast", not small) for name, kernel in KERNELS.items() if name != "math" or small]
        for name, kernel, precision, compiled in runs:
            what = f"| {case.name}, {case.image_side} px | {precision}{', compiled' if compiled else ''} | {name} |"
            settings = {"precision": precision, "compile": compiled, "channels_last": case.channels_last}
            if kernel is None:
                found = measured(case, settings, small, device)
            elif reason := why_not_all(case, kernel, device):
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


def print_table(cases: Sequence[Case], small: bool, device: torch.device) -> None:
    """All of it, as it is measured."""
    print("\n| | precision | attention | batch | images/s | TFLOP/s | MFU | GiB | asked for on an H200, MFU |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for row in rows(cases, small, device):
        print(row, flush=True)
