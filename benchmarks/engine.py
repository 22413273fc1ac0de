"""Our trainer beside a plain torch loop of the same model, batch and optimizer: the time of a step, in turn.

    python benchmarks/engine.py

The model is a UNet of 33 M parameters on 32x32 images, batch 8, AdamW, fp32, one thread. Ours is the whole of
`gmdist train` with one worker: Ray, streaming from shards, EMA, gradient norms, metrics. The plain loop has its batch
in memory and does nothing else. Medians over rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = """
name: engine
family: {{name: ddpm, unet: {{channels: 96, multipliers: [1, 2, 3, 4], num_res_blocks: 1, attention_levels: [3],
  num_heads: 4}}, diffusion: {{schedule: cosine, prediction: v}}}}
data: {{train: {data}/train, image_size: 32, channels: 1, num_classes: 10, batch_size: 8}}
optim: {{denoiser: {{lr: 1.0e-4}}}}
train: {{num_steps: {num_steps}, log_every: {log_every}, sample_every: null, checkpoint_every: 100000}}
cluster: {{num_workers: 1}}
run: {{dir: {data}/run}}
"""
WARM_UP, LOG_EVERY, LINES = 4, 4, 4  # steps, steps, lines of metrics
# Of the plain loop's time: what is asked for, and what DeepSpeed alone takes.
ASKED = {0: 1.03, 1: 1.30, 2: 1.26, 3: 1.55}
ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "OMP_NUM_THREADS": "1"}


def plain(config_path: str) -> None:
    """Print the median time of a step of a plain loop, in seconds."""
    import torch

    from gmdist.config import load
    from gmdist.runs import build_family

    torch.set_num_threads(1)
    config = load(config_path)
    family = build_family(config)
    optimizer = torch.optim.AdamW(family.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    loss_of = family.phases()[0].loss
    batch = {"image": torch.rand(8, 1, 32, 32) * 2 - 1, "label": torch.arange(8), "key": torch.arange(8)}
    times = []
    for step in range(WARM_UP + LOG_EVERY * LINES):
        start_s = time.perf_counter()
        loss, _ = loss_of(batch | {"key": batch["key"] + 8 * step}, 8 * step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start_s)
    print(statistics.median(times[WARM_UP:]))


def ours(stage: int, config_path: Path) -> float:
    """The median time of a step of a run, in seconds."""
    gmdist = str(Path(sys.executable).with_name("gmdist"))
    command = [gmdist, "train", str(config_path), f"train.zero_stage={stage}", "run.overwrite=true"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (config_path.parent / "run/metrics.jsonl").read_text().splitlines()]
    # The first line counts FLOPs.
    return statistics.median(8 / line["images_per_s"] for line in lines[1:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--plain", metavar="CONFIG", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        plain(options.plain)
        return
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="gmdist-engine-") as scratch:
        gmdist = str(Path(sys.executable).with_name("gmdist"))
        subprocess.run([gmdist, "data", "make", "digits", scratch], check=True, stdout=subprocess.DEVNULL)
        config = Path(scratch, "engine.yaml")
        config.write_text(
            CONFIG.format(data=scratch, num_steps=LOG_EVERY * (LINES + 1), log_every=LOG_EVERY), encoding="utf-8"
        )
        for _ in range(options.rounds):
            alone = [sys.executable, __file__, "--plain", str(config)]
            answer = subprocess.run(
                alone, check=True, capture_output=True, text=True, env=os.environ | ENVIRONMENT
            ).stdout
            times.setdefault("plain", []).append(float(answer))
            for stage in options.stages:
                times.setdefault(f"stage {stage}", []).append(ours(stage, config))
    base = statistics.median(times["plain"])
    print("| | a step | of the plain loop | at most |\n|---|---|---|---|")
    print(f"| plain torch | {base * 1e3:.0f} ms | 1 | |")
    for stage in options.stages:
        median = statistics.median(times[f"stage {stage}"])
        ratio = statistics.median(a / b for a, b in zip(times[f"stage {stage}"], times["plain"], strict=True))
        print(f"| stage {stage} | {median * 1e3:.0f} ms | {ratio:.3f} | {ASKED[stage]} |")


if __name__ == "__main__":
    main()
