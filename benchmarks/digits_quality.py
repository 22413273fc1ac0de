"""Quality of a run on the digits: do samples show the digit that was asked for, do they vary, and are they new?

    python benchmarks/digits_quality.py runs/demo/latent_diffusion

As many samples as half of the real training digits, all ten digits in turn. Two classifiers must see the digit asked
for in at least 98%: that of `gmdist data make`, and a support vector machine that is trained here on the real training
digits at 8x8. By the former's features the samples' Frechet distance to each half must be, in the mean, at most 1.5
times that between the halves. In every class the standard deviation of a pixel, averaged over pixels, must be at least
0.7 of the real one. At most 2% of the samples may be nearer to a training image than 99% of the real test digits are.
Exits 1 where a figure falls short.
"""

import argparse
import sys

import numpy as np
import torch
from sklearn.svm import SVC

from gmdist import runs
from gmdist.data.loader import Loader
from gmdist.evaluation.features import Features
from gmdist.evaluation.frechet import Moments, frechet_distance
from gmdist.evaluation.neighbors import novelty
from gmdist.evaluator import open_features
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


def described(features: Features, pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 32, 32, 1] -> features float32 [N, D]."""
    return torch.cat([features.of(part.permute(0, 3, 1, 2) / 127.5 - 1.0) for part in pictures.split(64)])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The Frechet distance of features [N, D] and [M, D]."""
    moments = []
    for rows in (one, other):
        moments.append(Moments(rows.shape[1]))
        moments[-1].add(rows)
    return frechet_distance(*moments)


def main() -> int:
    """Print the figures; 1 if one falls short."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    train, train_labels = real(options.run, "train")
    test, test_labels = real(options.run, "test")
    svm = SVC(gamma=0.001, C=10.0).fit(small(train), train_labels)
    features = open_features(runs.read_config(options.run))

    count = len(train) // 2
    request = SampleRequest(count, seed=options.seed, guidance=options.guidance)
    generated = torch.stack(list(draw(options.run, request)))
    asked = np.arange(count) % 10
    rows = described(features, generated)
    classes = features.classes(rows)
    assert classes is not None

    by_class = np.argsort(train_labels, kind="stable")  # the halves have as many of each digit
    halves = [described(features, train[torch.from_numpy(by_class[start::2][:count])]) for start in (0, 1)]
    of_halves = distance(*halves)
    of_generated = sum(distance(rows, half) for half in halves) / 2

    deviation = [
        float(generated[asked == digit].double().std(0).mean() / train[train_labels == digit].double().std(0).mean())
        for digit in range(10)
    ]
    copies = novelty(generated, train, test)
    figures = [  # name, value, whether it must be at least or at most, what
        ("support vectors, on real test digits", svm.score(small(test), test_labels), "least", 0.98),
        ("  see the digit asked for in", float((svm.predict(small(generated)) == asked).mean()), "least", 0.98),
        ("classifier sees the digit asked for in", float((classes.numpy() == asked).mean()), "least", 0.98),
        ("Frechet distance / that of real halves", of_generated / of_halves, "most", 1.5),
        ("least deviation of a class / real", min(deviation), "least", 0.70),
        ("nearer to training than 99% of real ones", copies.suspicious, "most", 0.02),
    ]
    is_good = True
    for name, value, side, bound in figures:
        holds = value >= bound if side == "least" else value <= bound
        is_good = is_good and holds
        print(f"{name:42s} {value:.3f}  (at {side} {bound:.2f})  {'ok' if holds else 'FALLS SHORT'}")
    print(f"Frechet distances: {of_generated:.3f} and {of_halves:.3f}, of {count} images each")
    print("deviation / real by digit: " + " ".join(f"{value:.2f}" for value in deviation))
    print(f"distance to the nearest training image: generated {copies.generated:.2f}, held out {copies.held_out:.2f}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
