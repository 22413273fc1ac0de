"""Generated images and reconstructions beside real ones: each worker makes its share, all get the same numbers."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gmdist.errors import DataError
from gmdist.evaluation.config import NUM_NEIGHBORS, EvaluationConfig
from gmdist.evaluation.features import Features
from gmdist.evaluation.frechet import Moments, frechet_distance
from gmdist.evaluation.gather import gathered
from gmdist.evaluation.kernel import kernel_distance, mean_within
from gmdist.evaluation.manifold import precision_recall, radii_of
from gmdist.families.family import Batch, Condition, Family
from gmdist.workers import all_sum, in_step, rank, world_size

_FEW = 0.1  # of what a class would have if all had as many images: it is covered by so many

_Part = TypeVar("_Part")
Beat = Callable[[], None]  # called now and then: this worker is not stuck


@dataclass(frozen=True)
class Images:
    """Real images as one worker reads them."""

    num_images: int  # over all workers
    batches: Callable[[int], Iterator[Batch]]  # this worker's, so many at once, on its device
    first: Callable[[], Batch]  # of one, the same for every worker


# For the numbers [N] of images, batch by batch: a caption, and perhaps a label, for each of them.
Captions = Callable[[list[Tensor]], Iterator[Condition]]


@dataclass(frozen=True)
class _Described:
    """Images by their features, over all workers."""

    moments: Moments
    rows: Tensor | None  # [N, D] in the order of the keys; None where nothing asks for single images

    @functools.cached_property
    def within(self) -> Tensor:
        """The kernel's mean over pairs of them; the workers share the pairs."""
        assert self.rows is not None
        return mean_within(self.rows)

    @functools.cached_property
    def radii(self) -> Tensor:
        """Of their neighbourhoods; the workers share the pairs."""
        assert self.rows is not None
        return radii_of(self.rows, NUM_NEIGHBORS)


class Evaluator:
    """Measures families; what it knows of the real images stays for the next time."""

    def __init__(
        self,
        config: EvaluationConfig,
        features: Features,
        reference: Images,
        held_out: Images | None,
        num_classes: int,
        device: torch.device,
        captions: Captions | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            config: what is measured, of how many.
            features: that describe images.
            reference: the real images that generated ones are compared with.
            held_out: the images that are reconstructed; None: there are none.
            num_classes: labels to generate, in turn; 0: none.
            device: that images are made on.
            captions: what generated images are to show, with the labels of those; None: labels in turn.

        Raises:
            DataError: too few real images.
        """
        if reference.num_images <= NUM_NEIGHBORS:
            raise DataError(
                f"evaluation.reference: {reference.num_images} real images; at least {NUM_NEIGHBORS + 1} are needed"
            )
        self.config, self.device, self.num_classes = config, device, num_classes
        self.features = features.to(device)
        self._reference, self._held_out, self._captions = reference, held_out, captions
        self._real: _Described | None = None
        self._originals: _Described | None = None

    def __call__(self, family: Family, beat: Beat = lambda: None) -> dict[str, float]:
        """Measure a family, in eval mode; every worker calls it. {} where the config asks for nothing.

        fid, kid, precision, recall of generated images; where a classifier knows the labels, class_coverage, and
        label_agreement if the family is told them; rfid of reconstructions where the family makes any.
        """
        metrics = self.config.metrics
        if not metrics:
            return {}
        needs_rows = bool({"kid", "pr"} & set(metrics))
        with torch.no_grad():
            if self._real is None:
                self._real = self._describe(self._read(self._reference, beat), needs_rows)
            found: dict[str, float] = {}
            generated = self._describe(self._generate(family, beat, found), needs_rows)
            if "fid" in metrics:
                found["fid"] = frechet_distance(generated.moments, self._real.moments)
                found |= self._of_reconstructions(family, beat)
            if generated.rows is not None and self._real.rows is not None:
                if "kid" in metrics:
                    found["kid"] = kernel_distance(generated.rows, self._real.rows, self._real.within)
                if "pr" in metrics:
                    found["precision"], found["recall"] = precision_recall(
                        generated.rows, self._real.rows, NUM_NEIGHBORS, self._real.radii
                    )
        return found

    # Images and their features, [N] keys and [N, D]

    def _describe(self, parts: Iterator[tuple[Tensor, Tensor]], keeps_rows: bool) -> _Described:
        """Take in keys [n] and features [n, D] of all workers."""
        width = self.features.width
        moments = Moments(width, self.device)
        keys = [torch.zeros(0, dtype=torch.int64, device=self.device)]  # a worker may have no image
        rows = [torch.zeros(0, width, device=self.device)]
        for key, features in parts:
            moments.add(features)
            if keeps_rows:
                keys.append(key)
                rows.append(features)
        return _Described(moments.merged(), gathered(torch.cat(keys), torch.cat(rows)) if keeps_rows else None)

    def _read(self, images: Images, beat: Beat) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in images.batches(self.config.batch_size):
            yield batch["key"], self.features.of(batch["image"])
            beat()

    def _generate(self, family: Family, beat: Beat, found: dict[str, float]) -> Iterator[tuple[Tensor, Tensor]]:
        """The images that `gmdist sample` draws too: numbers 0 to N - 1, labels in turn, or under captions.

        At the end `found` has the label agreement and the class coverage. Which images are made together does not
        depend on the workers, so neither do their bits.
        """
        numbers = torch.arange(self.config.num_images, device=self.device).split(self.config.batch_size)
        is_judged = self._is_judged()
        follows_labels = is_judged and self._is_told(family)
        agreeing = torch.zeros(2, dtype=torch.float64, device=self.device)  # how many, and of how many
        shown = torch.zeros(max(self.num_classes, 1), dtype=torch.float64, device=self.device)  # images of each class
        rounds, own = -(-len(numbers) // world_size()), numbers[rank() :: world_size()]
        asked = zip(own, self._asked(list(own)), strict=True)
        for (number, condition), is_own in in_step(asked, rounds, (numbers[0], Condition())):
            features = self.features.of(family.sample(number, condition))
            beat()
            if not is_own:
                continue
            classes = self.features.classes(features)
            if is_judged and classes is not None:
                shown += torch.bincount(classes, minlength=self.num_classes)
                if follows_labels and condition.label is not None:
                    agreeing[0] += classes.eq(condition.label).sum()
                    agreeing[1] += len(number)
            yield number, features
        if follows_labels:
            num_agreeing, num_asked = all_sum(agreeing).tolist()
            if num_asked:  # captions may come without labels
                found["label_agreement"] = num_agreeing / num_asked
        few = _FEW * self.config.num_images / max(self.num_classes, 1)
        if is_judged and few >= 1.0:  # or a class may be missing by chance
            found["class_coverage"] = float((all_sum(shown) >= few).double().mean())

    def _asked(self, numbers: list[Tensor]) -> Iterator[Condition]:
        """What the images of these numbers [N] are to show, batch by batch."""
        if self._captions is not None:
            yield from self._captions(numbers)
        else:
            for number in numbers:
                yield Condition(torch.remainder(number, self.num_classes) if self.num_classes else None)

    def _is_judged(self) -> bool:
        """Whether a classifier can say which class an image shows: it knows the labels."""
        sizes = getattr(self.features.network, "sizes", None)
        return self.num_classes > 1 and getattr(sizes, "num_classes", 0) == self.num_classes

    def _is_told(self, family: Family) -> bool:
        """Whether a family can be asked for what is asked here; it need not follow."""
        return "label" in family.conditions or (self._captions is not None and "prompt" in family.conditions)

    def _of_reconstructions(self, family: Family, beat: Beat) -> dict[str, float]:
        """The Frechet distance of held-out images from what the family makes of them; {} if it does not, or of one."""
        if self._held_out is None or self._held_out.num_images < 2:
            return {}
        parts = self._reconstruct(family, self._held_out, beat)
        first = next(parts, None)
        if first is None:
            return {}
        remade = self._describe(itertools.chain([first], parts), keeps_rows=False)
        if self._originals is None:
            self._originals = self._describe(self._read(self._held_out, beat), keeps_rows=False)
        return {"rfid": frechet_distance(remade.moments, self._originals.moments)}

    def _reconstruct(self, family: Family, images: Images, beat: Beat) -> Iterator[tuple[Tensor, Tensor]]:
        batch_size = self.config.batch_size
        most = -(-images.num_images // world_size())  # that a worker has
        spare = images.first() if images.num_images < world_size() else None
        for batch, is_own in in_step(images.batches(batch_size), -(-most // batch_size), spare):
            remade = family.reconstruct(batch)
            beat()
            if remade is None:
                return
            num_own = len(batch["key"]) if is_own else 0  # with none of its own it still sums with the others
            yield batch["key"][:num_own], self.features.of(remade)[:num_own]
