"""GANs of the digits, from the first image to one table of what their samples are.

    make bench-digits-gans

Every family is trained by `gmdist train` with its config (a run that is finished is only measured). Generated images
are compared with the held-out digits by `gmdist evaluate`, with the features of the classifier beside the data. Of
CycleGAN, each held-out digit is translated, and the classifier of the domain where it arrives says whether it is still
the same. Exits 1 where a figure falls short.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from digits_runs import in_time, measured, shown, size_of, trained, verdict
from PIL import Image

from gmdist.cli import main as gmdist
from gmdist.data.config import DataConfig
from gmdist.data.loader import Loader
from gmdist.data.sources import open_source
from gmdist.evaluation.features import load_features

FAMILIES = ("gan", "dcgan", "conditional_gan", "stylegan2")
MUST_REACH_ALL = ("dcgan", "conditional_gan", "stylegan2")
CONDITIONAL = ("conditional_gan", "stylegan2")
MINUTES = 5.0  # asked for, of training
DOMAINS = {"a2b": ("digits", "digits-color"), "b2a": ("digits-color", "digits")}


def kept(run: Path, data: Path, direction: str) -> float:
    """The share of held-out digits whose translation the other domain's classifier takes for the same digit."""
    source, target = (data / name for name in DOMAINS[direction])
    config = DataConfig(batch_size=1, image_size=32, channels=3, num_classes=10)
    test = Loader(config, str(source / "test"))
    features = load_features(str(target / "classifier.safetensors"))
    with tempfile.TemporaryDirectory() as folder:
        count = str(test.num_samples)
        command = ["sample", str(run), "--translate", direction, "--images", f"{source}/test", "--num-images", count]
        assert gmdist([*command, "--out", folder]) == 0
        images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(Path(folder).iterdir())]
    made = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1.0
    if target.name == "digits":
        made = made.mean(dim=1, keepdim=True)
    labels = labels_of(source / "test")
    return features.classes(features.of(made)).eq(labels).double().mean().item()


def labels_of(location: Path) -> torch.Tensor:
    """The classes of a data set's samples, in the order of its shards."""
    return torch.tensor([int(raw.read()["cls"]) for raw in open_source(str(location)).by_name()])


def main() -> int:
    """Print the table; 1 if a figure falls short."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    options = parser.parse_args()
    for name in ("digits", "digits-color"):
        assert gmdist(["data", "make", name, str(options.data / name)]) == 0
    data = [f"data.train={options.data}/digits/train", f"data.test={options.data}/digits/test"]
    color = f"{options.data}/digits-color"
    unpaired = f"data.unpaired={{train: {color}/train, test: {color}/test}}"
    minutes = {name: trained(name, options.runs, *data) for name in FAMILIES}
    minutes["cyclegan"] = trained("cyclegan", options.runs, *data, unpaired)
    found = {name: measured(options.runs / name, "--num-images", "1000") for name in FAMILIES}
    same = {direction: kept(options.runs / "cyclegan", options.data, direction) for direction in DOMAINS}
    print("\n| family | parameters | minutes | FID | classes shown | label agreement |\n|---|---|---|---|---|---|")
    for name, spent in minutes.items():
        line = f"| {name} | {size_of(options.runs / name):,} | {shown(spent)} |"
        if name in found:
            agreement = found[name].get("label_agreement")
            told = "-" if agreement is None else f"{agreement:.1%}"
            print(f"{line} {found[name]['fid']:.2f} | {found[name]['class_coverage']:.0%} | {told} |")
        else:
            print(f"{line} - | - | {same['a2b']:.1%} to colour, {same['b2a']:.1%} back |")
    asked = [(f"{name} shows all classes", found[name]["class_coverage"] == 1.0) for name in MUST_REACH_ALL]
    asked += [
        (
            f"{name}: label agreement {found[name]['label_agreement']:.1%} (asked: 90%)",
            found[name]["label_agreement"] >= 0.9,
        )
        for name in CONDITIONAL
    ]
    asked += [
        (f"cyclegan {way}: {share:.1%} keep their label (asked: 85%)", share >= 0.85) for way, share in same.items()
    ]
    asked.append(in_time(minutes.values(), MINUTES))
    print()
    return verdict(asked)


if __name__ == "__main__":
    sys.exit(main())
