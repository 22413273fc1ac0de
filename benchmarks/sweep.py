"""The sweep over noise schedules: how long it takes, what it saves, and whether its best config alone is as good.

    make bench-sweep

Needs the digits and their first stage, which it makes where they are missing. Exits 1 where a figure falls short.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from digits_runs import trained, verdict

from gmdist.cli import main as gmdist
from gmdist.config import load
from gmdist.launch.cluster import connected
from gmdist.launch.train import train
from gmdist.storage import read_json
from gmdist.train.metrics import read_lines

SWEEP = "configs/sweeps/digits_noise_schedules.yaml"
MINUTES, SAVED, START_S = 15.0, 0.4, 10.0  # asked for
STARTS = 3


def seconds_to_first_step(data: list[str]) -> float:
    """From asking for a trial to its first step, on a cluster that is there; the median of some."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        settings = [*data, "train.num_steps=2", "train.log_every=1", "train.sample_every=null", "cluster.num_workers=1"]
        configs = [load("configs/digits/vae.yaml", [*settings, f"run.dir={folder}/{i}"]) for i in range(STARTS)]
        with connected(configs[0].cluster):
            for config in configs:
                began_s, first = time.monotonic(), []
                train(config, lambda _, first=first: first.append(time.monotonic()), print)
                taken.append(first[0] - began_s)
    return statistics.median(taken)


def main() -> int:
    """Print the figures; 1 if one falls short."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"))
    parser.add_argument("--data", type=Path, default=Path("data/digits"))
    parser.add_argument("--sweep", type=Path, default=Path("runs/sweeps/digits_noise_schedules"))
    options = parser.parse_args()
    assert gmdist(["data", "make", "digits", str(options.data)]) == 0
    data = [f"data.train={options.data}/train", f"data.test={options.data}/test"]
    start_s = seconds_to_first_step(data)
    trained("autoencoder_kl", options.runs, *data)
    first_stage = f"family.first_stage={options.runs}/autoencoder_kl"
    there = (options.sweep / "sweep.json").exists()
    began_s = time.monotonic()
    assert gmdist(["sweep", SWEEP, *data, first_stage, f"run.dir={options.sweep}"]) == 0
    minutes = (time.monotonic() - began_s) / 60
    found = read_json(str(options.sweep / "sweep.json"))
    best = found["trials"][found["best"]]
    assert gmdist(["train", str(options.sweep / "best.yaml"), "run.overwrite=true"]) == 0
    alone = read_lines(str(options.sweep / "best"))[-1]["test/fid"]
    saved = 1.0 - found["steps"] / found["steps_of_all"]
    print(f"\nbest of {len(found['trials'])}: {best['settings']}, FID {best['metric']:.4f}\n")
    asked = [
        (f"a trial begins within {start_s:.1f} s (asked: {START_S:g})", start_s <= START_S),
        (f"{saved:.0%} of the steps saved (asked: {SAVED:.0%})", saved >= SAVED),
        (f"its best config alone: FID {alone!r}, in the sweep {best['metric']!r}", alone == best["metric"]),
    ]
    if not there:
        asked.append((f"the sweep takes {minutes:.1f} minutes (asked: {MINUTES:g})", minutes <= MINUTES))
    return verdict(asked)


if __name__ == "__main__":
    sys.exit(main())
