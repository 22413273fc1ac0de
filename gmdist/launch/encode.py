"""Latent caches: the first stage of a run encodes a data set once, and what was begun is gone on with."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch

from gmdist import runs, storage
from gmdist.config import Config
from gmdist.data.latent_shards import as_stored, open_source
from gmdist.data.latents import Record, Transform
from gmdist.data.ledger import LEDGER_NAME, Ledger
from gmdist.data.manifest import ENCODED_NAME, MANIFEST_NAME, Manifest
from gmdist.errors import ConfigError, DataError, StorageError
from gmdist.families.family import Family
from gmdist.launch.encoders import EncodingWork, encoding
from gmdist.launch.lease import LEASE_NAME
from gmdist.launch.shard_workers import make_shards

_OVERRIDDEN = ("cluster", "data", "train")
_OF_THE_MODEL = ("data.image_size", "data.channels")
_WRITTEN = re.compile(r".+\.(tar|index\.safetensors)")


@dataclass(frozen=True)
class Encoded:
    """What `encode` did."""

    manifest: Manifest
    record: Record
    was_there: bool = False  # and finished; nothing was done


def encode(
    run: str,
    source: str,
    destination: str,
    overrides: Sequence[str] = (),
    *,
    flip: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_unreadable: Callable[[str], None] = lambda line: None,
) -> Encoded:
    """Encode a data set with a run's averaged weights; what an interrupted command has finished is kept.

    Each shard becomes one of the same name, with the same samples in the same order under the same keys. Images become
    arrays, all other members stay. A sample whose image cannot be read stays too, without arrays: a run replaces it as
    it would have replaced the image. The same source makes the same bytes, whatever the number of workers.

    Args:
        run: folder or checkpoint of a first stage, whose config says how images are read, on which workers, and how
            precisely the encoder computes, as in its evaluations.
        source: folder or s3:// prefix of shards.
        destination: where the latents go; it must not hold anything else.
        overrides: key=value of the run's config, in its sections cluster, data and train.
        flip: whether mirror images are encoded too, for data.flip.
        on_progress: called with (bytes of the source done, bytes in all).
        on_unreadable: called with "shard: key: reason" for each image that cannot be read.

    Raises:
        ConfigError: a run that encodes nothing, a destination that is the source, or a wrong override.
        DataError: a source that cannot be encoded, too many images that cannot be read, or a destination in use.
        CheckpointError: the run has no sound checkpoint.
        RunFailedError: a worker was lost more often than cluster.max_failures allows.
    """
    source, destination = storage.absolute(source), storage.absolute(destination)
    if source == destination:
        raise ConfigError(f"DEST: {destination}; is SRC: choose another folder")
    _check_overrides(overrides)
    config = runs.read_config(run, overrides)
    meta, family = runs.open_run(run, config)
    listing = open_source(source)
    record = Record(
        runs.identify(run, family, meta["step"]),
        replace(Transform.of(config.data), crop="center"),
        "bf16" if config.train.precision == "bf16" else "fp32",  # as evaluations compute
        flip,
        listing.hash,
        _layouts(run, config, family),
    )
    there = {name: found for name, found in storage.list_stats(destination).items() if name != LEASE_NAME}
    record = _begin(destination, there, record)
    if MANIFEST_NAME in there:
        return Encoded(Manifest.load(destination), record, was_there=True)
    ledger = Ledger(destination, partial(record.save, destination))
    ledger.forget_changed(there)
    record.unreadable = {name: lines for name, lines in record.unreadable.items() if name in ledger.entries}
    for line in record.lines():
        on_unreadable(line)
    tasks = [shard for shard in listing.shards if shard.name not in ledger.entries]
    total = sum(shard.num_bytes for shard in listing.shards)
    done = total - sum(task.num_bytes for task in tasks)
    with ledger, closing(make_shards(EncodingWork(config, family, destination, record), tasks)) as results:
        for result in results:
            if result.unreadable:
                record.unreadable[result.entry.name] = result.unreadable
            for line in result.unreadable:
                on_unreadable(line)
            if ledger.add(result.entry):
                ledger.save()
            done += result.source_bytes
            on_progress(done, total)
            if listing.num_samples is not None:
                _check_budget(config, source, record, listing.num_samples)
    num_samples = sum(entry.samples for entry in ledger.entries.values())
    record.sample_bytes = total / max(1, num_samples)
    ledger.save()
    _check_budget(config, source, record, num_samples)
    return Encoded(ledger.finish(listing.classes, made_here=True), record)


def _check_overrides(overrides: Sequence[str]) -> None:
    """ConfigError for one that would change the model, or what it was trained for."""
    for override in overrides:
        key = override.partition("=")[0]
        if key.partition(".")[0] not in _OVERRIDDEN or key in _OF_THE_MODEL:
            raise ConfigError(
                f"'{override}'; cannot be set here, as the model is the run's: keys of {', '.join(_OVERRIDDEN)} can, "
                f"but for {', '.join(_OF_THE_MODEL)}"
            )


def _layouts(run: str, config: Config, family: Family) -> dict[str, tuple[list[int], str]]:
    """Shape and type of what is stored of an image; ConfigError if the family encodes nothing."""
    pixels = torch.zeros(1, config.data.image_size, config.data.image_size, config.data.channels, dtype=torch.uint8)
    made = encoding(family, config.train.precision, torch.device("cpu"))(pixels)
    if not made:
        raise ConfigError(
            f"RUN: {run}; family '{config.family_name}' encodes nothing: name the run of a first stage, such as one of "
            "autoencoder_kl"
        )
    stored = {name: as_stored(name, array, run) for name, array in made.items()}
    return {name: (list(array.shape[1:]), str(array.dtype)) for name, array in stored.items()}


def _begin(destination: str, there: Iterable[str], record: Record) -> Record:
    """The record of the destination, which is ours from now on; DataError if it holds anything else."""
    found = Record.load(destination)
    others = [name for name in there if name not in (ENCODED_NAME, LEDGER_NAME)]
    if not others:  # a record alone is what a command leaves that has failed at its first shard
        record.save(destination)
        return record
    if found is None:
        raise DataError(f"{destination}: holds something else ({others[0]}, ...); choose another folder or delete it")
    difference = record.difference(found)
    if difference is not None:
        raise DataError(f"{destination}: holds latents {difference}; choose another folder or delete it")
    with suppress(StorageError):  # unfinished uploads are seen by the bucket's owner alone, perhaps
        storage.delete_leftovers(destination, _WRITTEN)
    return found


def _check_budget(config: Config, source: str, record: Record, num_samples: int) -> None:
    """DataError if a run on the source would fail, for as many images that cannot be read."""
    lines, allowed = record.lines(), math.ceil(config.data.max_bad_fraction * num_samples)
    if len(lines) > allowed:
        raise DataError(
            f"{source}: {len(lines)} images cannot be read, more than data.max_bad_fraction allows ({allowed} of "
            f"{num_samples}); raise it to go on without them; the first: {lines[0]}"
        )
