"""What each image of a data set is worth to a run's model, in a CSV file: for finding what does not belong."""

import csv
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from gmdist import runs, storage
from gmdist.config import Config
from gmdist.data.dataset import other_classes
from gmdist.data.loader import Loader
from gmdist.data.manifest import MANIFEST_NAME, Manifest
from gmdist.errors import ConfigError, DataError, DivergedError
from gmdist.families import CATALOGUE
from gmdist.families.family import Family
from gmdist.train.config import micro_batch_size

_log = logging.getLogger(__name__)

_Row = tuple[str, str, str, list[str]]  # shard, sample, label, scores


def write_scores(run: str, out: str, batch_size: int | None = None, overrides: Sequence[str] = ()) -> str:
    """Score each image of evaluation.reference, else of data.test, by a checkpoint's averaged weights.

    Args:
        run: a run's folder (its newest sound checkpoint is used), or one of its checkpoints.
        out: the CSV file, local or s3://: a line for each image with its shard, its key there, its label where the
            data set has labels, and its scores. Images that cannot be decoded are left out.
        batch_size: images at once; None: as many as a worker of the run takes.
        overrides: `key=value` of the run's config, such as the data set.

    Returns:
        A line that says what was written.

    Raises:
        ConfigError: no such run, a family without scores, no data set.
        DataError, CheckpointError: an unsound data set, tokens of another tokenizer, labels that the run's model has no
            classes for, no sound checkpoint.
        DivergedError: weights that give no numbers.
    """
    if not storage.is_s3(out) and os.path.isdir(out):
        raise ConfigError(f"--scores: '{out}'; is a folder, and a file is meant, as {storage.join(out, 'scores.csv')}")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size: {batch_size}; must be at least 1")
    config = runs.read_config(run, overrides)
    able = [name for name, (kind, _) in CATALOGUE.items() if kind.scores is not Family.scores]
    if config.family_name not in able:
        raise ConfigError(
            f"--scores: family '{config.family_name}' gives no likelihoods; those that do are {', '.join(able)}"
        )
    runs.use_storage(config)
    key = "data.test" if config.evaluation.reference is None else "evaluation.reference"
    scored = config.evaluation.reference or config.data.test
    if scored is None:
        raise ConfigError("data.test: missing; set it, or evaluation.reference, to the shards that are to be scored")
    meta, family = runs.open_run(run, config, [(key, scored)])
    try:
        loader = _open(config, scored, family)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    device = runs.device()
    family = family.to(device)
    size = batch_size or micro_batch_size(config.train, config.data.batch_size, meta["world_size"], family.compared)
    names, rows = _score(family, loader, size, device)
    storage.write(out, _csv(names, sorted(rows)))
    unreadable = loader.num_samples - len(rows)
    left_out = f", {unreadable} that cannot be decoded left out" if unreadable else ""
    return f"{out}: {', '.join(names)} of {len(rows)} images of {scored} by step {meta['step']}{left_out}"


@torch.inference_mode()
def _score(family: Family, loader: Loader, batch_size: int, device: torch.device) -> tuple[list[str], list[_Row]]:
    """The names of a family's scores, and a row for each image."""
    names: list[str] = []
    rows: list[_Row] = []
    for loaded in loader.sweep(batch_size):
        batch = loaded.batch_on(device)
        scores = family.scores(batch)
        names = list(scores)
        if any(score.isnan().any() for score in scores.values()):
            raise DivergedError("the scores are not numbers; check the run's weights")
        numbers = batch["key"].cpu().numpy()
        labels = map(str, batch["label"].tolist()) if "label" in batch else [""] * len(numbers)
        columns = zip(*(score.tolist() for score in scores.values()), strict=True)
        replaced = {line["number"] for line in loaded.quarantined}
        for number, place, label, values in zip(numbers, loader.names(numbers), labels, columns, strict=True):
            if number not in replaced:
                rows.append((*place, label, [f"{value:.9g}" for value in values]))
    return names, rows


def _open(config: Config, scored: str, family: Family) -> Loader:
    """The data set with its own labels: outliers may be of other classes, or of none.

    A family that is told the class can do without, where there are no labels at all, and knows no classes but its own.
    """
    manifest = Manifest.load(storage.absolute(scored))
    num_labels = manifest.num_labels
    known: int | None = num_labels
    if "label" in family.inputs:
        known, trained = config.data.num_classes, storage.absolute(config.data.trained_on[0].train)
        is_there = num_labels and storage.exists(storage.join(trained, MANIFEST_NAME))
        if is_there and (difference := other_classes(manifest, Manifest.load(trained))) is not None:
            _log.warning("%s: %s in %s; labels are taken as numbers, whatever their names", scored, difference, trained)
    return Loader(replace(config.data, num_classes=known if num_labels else None, cache_dir=None), scored)


def _csv(names: list[str], rows: list[_Row]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["shard", "sample", "label", *names])
    writer.writerows([*place, *scores] for *place, scores in rows)
    return text.getvalue().encode()
