"""What a step costs: the model's FLOPs, the machine's peak, memory, and a trace of where the time goes."""

import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gmdist import storage
from gmdist.errors import MemoryExceededError
from gmdist.families.family import Phase
from gmdist.train import blocks
from gmdist.train.config import PROFILE_AFTER
from gmdist.workers import rank, world_size

# FLOP/s of dense products, in bf16 and in fp32, by words of a device's name: the makers' data sheets.
_PEAKS = {
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "H100 HBM3": (989e12, 67e12),
    "H100 NVL": (835e12, 60e12),
    "H100 PCIe": (756e12, 51e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10": (125e12, 31.2e12),
}


class FlopCount:
    """The FLOPs of the model for a sample, counted on the first micro-batch of each phase and of its changed loss."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}  # of a sample and a phase, over the steps between two of the phase

    @contextmanager
    def counting(self, phase: Phase, num_samples: int, seen: int) -> Iterator[None]:
        """Count what is computed meanwhile for a micro-batch, if the phase's loss was not counted as it is now."""
        has_changed = 0 < phase.changes_at <= seen
        name = f"{phase.name}, changed" if has_changed else phase.name
        if name in self._counts:
            yield
            return
        # Compiled blocks hide their products, and round otherwise than plain ones: a run that goes on must not count
        # again, or it would end with other bits. So checkpoints hold the counts.
        with _Counter() as counter, torch.compiler.set_stance("force_eager"):
            yield
        self._counts[name] = counter.flops / phase.every / num_samples
        if has_changed:
            self._counts.pop(phase.name, None)

    def a_sample(self) -> float:
        """FLOPs of the model, a sample, in the mean over the steps."""
        return sum(self._counts.values())

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return dict(self._counts)

    def load(self, state: dict[str, float]) -> None:
        """Go on with the counts of a checkpoint."""
        self._counts = dict(state)


class _Counter(TorchDispatchMode):
    """Adds up the FLOPs of products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None and not blocks.is_recomputing:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of a device at its best; None for one that is not known."""
    if device.type != "cuda":
        return None
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
    known = [key for key in _PEAKS if words.issuperset(key.split())]
    return _PEAKS[max(known, key=len)][precision == "fp32"] if known else None


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this worker has had: the device's, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def speed(
    steps: int, seconds: float, batch_size: int, flops: float, device: torch.device, precision: str
) -> dict[str, float]:
    """Metrics of throughput: images and FLOPs a second, memory, and the share of the peak where that is known.

    Args:
        steps, seconds: how many steps were made, in what time.
        batch_size: samples a step, over all workers.
        flops: of the model, a sample.
        device, precision: of a worker's products.
    """
    images_per_s = steps * batch_size / seconds
    found = {"images_per_s": images_per_s, "images_per_s_worker": images_per_s / world_size()}
    found["memory_gib"] = peak_memory_gib(device)
    flops_per_s = flops * (batch_size // world_size()) * steps / seconds
    found["tflops_worker"] = flops_per_s / 1e12
    peak = peak_flops(device, precision)
    if peak is not None:
        found["mfu"] = flops_per_s / peak
    return found


@contextmanager
def explaining_memory(step: int, what: str, advice: str) -> Iterator[None]:
    """Turn a lack of memory into a MemoryExceededError that says where, and what to set."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_host = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not on_host and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise MemoryExceededError(f"out of memory on worker {rank()}, step {step}, {what}; {advice}") from error


def of_micro_batches(size: int) -> tuple[str, str]:
    """What `explaining_memory` says of micro-batches of so many samples, and its advice."""
    advice = "set train.activation_checkpointing=true or train.zero_stage=3, or take more workers"
    if size > 1:
        advice = f"set train.micro_batch_size={size // 2}"
    return f"with micro-batches of {size} samples", advice


class Profile:
    """A Chrome trace of a few steps of one worker, in the run's folder. A context manager, told of each step."""

    def __init__(self, run_dir: str, num_steps: int | None) -> None:
        self._run_dir = run_dir
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = None
        if num_steps is not None:
            schedule = torch.profiler.schedule(wait=PROFILE_AFTER - 1, warmup=1, active=num_steps, repeat=1)
            self._profiler = torch.profiler.profile(
                activities=activities, schedule=schedule, on_trace_ready=self._write
            )

    def _write(self, profiler: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="gmdist-profile-") as folder:
            path = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(path))
            storage.copy_from_local(str(path), storage.join(self._run_dir, "trace.json"))

    def __enter__(self) -> "Profile":
        if self._profiler is not None:
            self._profiler.start()
        return self

    def step(self) -> None:
        """A step was made."""
        if self._profiler is not None:
            self._profiler.step()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._profiler is not None:
            self._profiler.stop()
