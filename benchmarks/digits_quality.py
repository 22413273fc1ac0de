"""Quality of a run on the digits: do guided samples show the digit that was asked for, and do they vary?

    python benchmarks/digits_quality.py runs/demo/latent_diffusion

A support vector classifier is trained on the real training digits at 8x8 and must reach 98% on the real test digits.
Of 500 samples (50 a digit) it must see the digit asked for in at least 97%, and in every class the standard deviation
of a pixel, averaged over pixels, must be at least 0.7 of the real one. Exits 1 where a figure falls short.
"""

import argparse
import sys

import numpy as np
import torch
from sklearn.svm import SVC

from gmdist import runs
from gmdist.data.loader import Loader
from gmdist.evaluation.neighbors import novelty
from gmdist.images import to_uint8
from gmdist.launch.sample import SampleRequest, draw


def real(run: str, split: str) -> tuple[torch.Tensor, np.ndarray]:
    """Images uint8 [N, 32, 32, 1] and labels [N] of a split."""
    config = runs.read_config(run)
    parts = list(Loader(config.data, getattr(config.data, split)).sweep(256))
    pictures = torch.cat([to_uint8(part.batch["image"]) for part in parts])
    return pictures, torch.cat([part.batch["label"] for part in parts]).numpy()


def small(pictures: torch.Tensor) -> np.ndarray:
    """uint8 [N, 32, 32, 1] -> [N, 64], 8x8 means in the source's range of 0 to 16."""
    images = pictures[..., 0].float()[:, None]
    return (torch.nn.functional.avg_pool2d(images, 4) * (16 / 255)).flatten(1).numpy()


def main() -> int:
    """Print the figures; 1 if one falls short."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    train, train_labels = real(options.run, "train")
    test, test_labels = real(options.run, "test")
    classifier = SVC(gamma=0.001, C=10.0).fit(small(train), train_labels)
    on_real = classifier.score(small(test), test_labels)

    generated = draw(options.run, SampleRequest(options.num_images, seed=options.seed, guidance=options.guidance))
    asked = np.arange(options.num_images) % 10
    agreement = float((classifier.predict(small(generated)) == asked).mean())
    deviation = [
        float(generated[asked == digit].double().std(0).mean() / train[train_labels == digit].double().std(0).mean())
        for digit in range(10)
    ]
    copies = novelty(generated, train, test)
    figures = [
        ("classifier on real test digits", on_real, 0.98),
        ("agreement of generated digits", agreement, 0.97),
        ("least deviation of a class / real", min(deviation), 0.70),
    ]
    for name, value, least in figures:
        print(f"{name:36s} {value:.3f}  (at least {least:.2f})  {'ok' if value >= least else 'FALLS SHORT'}")
    print("deviation / real by digit            " + " ".join(f"{value:.2f}" for value in deviation))
    print(
        f"distance to the nearest training image: generated {copies.generated:.2f}, held out {copies.held_out:.2f}; "
        f"{100 * copies.suspicious:.1f}% of the generated nearer than 99% of the held out"
    )
    return 0 if all(value >= least for _, value, least in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
