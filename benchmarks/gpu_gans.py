"""StyleGAN2 on one GPU: seconds for a thousand images at 256, 512 and 1024 pixels, with the sizes of the preset `auto`.

`python benchmarks/gpu.py` prints its table. Autocast; path lengths and R1 come as often as in training, and each speed
is that of cycles of 16 steps. Images are not augmented, but for the line that says so.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from in_memory import Synthetic, free_memory, one_line, train
from torch import Tensor

from gmdist.errors import MemoryExceededError
from gmdist.families.augmentation import AugmentConfig
from gmdist.families.family import Surroundings
from gmdist.families.gan import ObjectiveConfig
from gmdist.families.stylegan2 import StyleGAN2, StyleGAN2Config
from gmdist.families.stylegan2_presets import preset_settings
from gmdist.nets.stylegan2_discriminator import StyleGAN2DiscriminatorConfig
from gmdist.nets.stylegan2_generator import StyleGAN2GeneratorConfig
from gmdist.train.config import TrainConfig
from gmdist.train.optim import OptimConfig

SEED, CYCLE, NUM_CYCLES = 0, 16, 3  # steps; cycles after the first, in which blocks are compiled
# How an H200 is faster than the A100 of the published figures.
SPEED_UP = 2.2
RUNS: list[dict[str, Any]] = [
    {},
    {"channels_last": True},
    {"channels_last": True, "compile": True},
    {"channels_last": True, "compile": True, "ada": True},
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A size of image, and what is asked of it on an H200."""

    image_side: int  # pixels
    published_s: float  # for a thousand images on an A100, of github.com/NVlabs/stylegan2-ada-pytorch
    channel_max: int = 512

    @property
    def settings(self) -> dict[str, Any]:
        """What the preset sets, for one worker."""
        return preset_settings("auto", self.image_side, 1)

    def family(self, *, is_augmented: bool) -> StyleGAN2:
        """With weights as they are drawn."""
        torch.manual_seed(SEED)
        family = self.settings["family"]
        config = StyleGAN2Config(
            objective=ObjectiveConfig(**family["objective"]),
            augmentation=AugmentConfig("ada" if is_augmented else "none"),
            generator=StyleGAN2GeneratorConfig(channel_max=self.channel_max, **family["generator"]),
            discriminator=StyleGAN2DiscriminatorConfig(channel_max=self.channel_max, **family["discriminator"]),
        )
        return StyleGAN2(config, Surroundings(self.image_side, 3, 0, SEED, lambda _: None))

    def samples(self, count: int) -> dict[str, Tensor]:
        """Images [N, 3, H, W]."""
        return {"image": torch.rand(count, 3, self.image_side, self.image_side) * 2 - 1}


CASES = [Case(256, 12.53), Case(512, 41.06), Case(1024, 90.39)]
SMALL_CASES = [Case(16, float("nan"), 16)]


def measured(
    case: Case, num_cycles: int, settings: dict[str, Any], device: torch.device, *, is_augmented: bool
) -> list[dict[str, Any]] | str:
    """The lines of metrics of cycles, or why there are none."""
    preset = case.settings
    config = TrainConfig(
        CYCLE * (1 + num_cycles),
        precision="autocast",
        log_every=CYCLE,
        checkpoint_every=10**6,
        sample_every=None,
        keep_checkpoints=1,
        **preset["train"],
        **settings,
    )
    optim = {name: OptimConfig(**values) for name, values in preset["optim"].items()}
    source = Synthetic(preset["data"]["batch_size"], case.samples)
    try:
        return train(case.family(is_augmented=is_augmented), config, source, device, optim)
    except (MemoryExceededError, torch.OutOfMemoryError):
        return "out of memory"
    except Exception as error:  # noqa: BLE001 - a compiler that does not run here
        return one_line(error)
    finally:
        free_memory()


def rows(cases: Sequence[Case], small: bool, device: torch.device) -> Iterator[str]:
    """The lines of the table."""
    for case in cases:
        asked_s = case.published_s / SPEED_UP
        for run in RUNS[:2] if small else RUNS:
            settings = {key: value for key, value in run.items() if key != "ada"}
            what = (
                f"| StyleGAN2, {case.image_side} px | {', '.join(run) or '-'} | {case.settings['data']['batch_size']} |"
            )
            found = measured(case, 1 if small else NUM_CYCLES, settings, device, is_augmented="ada" in run)
            if isinstance(found, str):
                yield f"{what} {found} | | | | {asked_s:.2f} |"
                continue
            lines = found[1:]
            kimg_s = 1e3 / statistics.median(line["images_per_s"] for line in lines)
            flops, mfu = (
                statistics.median(line.get(key, float("nan")) for line in lines) for key in ("tflops_worker", "mfu")
            )
            yield f"{what} {kimg_s:.2f} | {flops:.2f} | {mfu:.2f} | {lines[-1]['memory_gib']:.1f} | {asked_s:.2f} |"


def print_table(cases: Sequence[Case], small: bool, device: torch.device) -> None:
    """All of it, as it is measured."""
    print("\n| autocast | switched on | batch | s/kimg | TFLOP/s | MFU | GiB | asked for on an H200, s/kimg |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for row in rows(cases, small, device):
        print(row, flush=True)
