"""What a latent cache was encoded from: written beside its shards, and compared with a run before that starts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from gmdist import storage
from gmdist.data.config import DataConfig, batch_key
from gmdist.data.manifest import ENCODED_NAME, Manifest
from gmdist.errors import ConfigError, DataError

_FORMAT_VERSION = 3


@dataclass(frozen=True)
class FirstStage:
    """The model that encodes: a checkpoint of a run."""

    run: str  # its folder, which may move
    step: int | None  # None: not known, of one that a second stage's checkpoint holds
    family: dict[str, Any]  # its config, name included
    weights: str  # SHA-256 of what `Family.encode` needs, averaged

    def __str__(self) -> str:
        which = "a checkpoint" if self.step is None else f"step {self.step}"
        return f"{which} of {self.run} (weights {self.weights[:12]})"

    def is_same(self, other: "FirstStage") -> bool:
        """Whether both encode alike. Settings that only one knows of are those of a newer version, at their default."""
        own, theirs = flat(self.family), flat(other.family)
        return self.weights == other.weights and all(own[key] == theirs[key] for key in own.keys() & theirs.keys())


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree's leaves by dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


@dataclass(frozen=True)
class Transform:
    """From stored images to those that were encoded: settings of `data` by their names."""

    image_size: int
    channels: int
    resize: str
    crop: str

    @classmethod
    def of(cls, config: DataConfig) -> "Transform":
        """That of a run."""
        return cls(config.image_size, config.channels, config.resize, config.crop)


@dataclass
class Record:
    """What a latent cache was encoded from, and what it holds: its file encoded.json."""

    first_stage: FirstStage
    transform: Transform
    precision: str  # that the encoder computed in: fp32 or bf16
    flip: bool  # whether it holds the mirror images too
    source: str  # hash of the data set's manifest, or of the list of its shards
    arrays: dict[str, tuple[list[int], str]]  # by name in a batch: shape of one sample, dtype
    unreadable: dict[str, list[str]] = field(default_factory=dict)  # by shard: images that are not in it, and why
    sample_bytes: float = 0.0  # of the data set, in the mean; 0: the encoding is not finished

    def save(self, folder: str) -> None:
        """Write it: before the first shard."""
        content = asdict(self) | {"format": _FORMAT_VERSION, "unreadable": dict(sorted(self.unreadable.items()))}
        storage.write_json(storage.join(folder, ENCODED_NAME), content)

    def lines(self) -> list[str]:
        """What could not be read, in the order of the shards."""
        return [line for name in sorted(self.unreadable) for line in self.unreadable[name]]

    @classmethod
    def load(cls, folder: str) -> "Record | None":
        """None: the folder is no latent cache. DataError: the file is damaged or of another version."""
        location = storage.join(folder, ENCODED_NAME)
        try:
            content = storage.read_json(location)
            if content["format"] != _FORMAT_VERSION:
                raise ValueError(f"format {content['format']}")
            return cls(
                FirstStage(**content["first_stage"]),
                Transform(**content["transform"]),
                content["precision"],
                content["flip"],
                content["source"],
                {name: (shape, dtype) for name, (shape, dtype) in content["arrays"].items()},
                content["unreadable"],
                content["sample_bytes"],
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{location}: damaged or of another version ({error}); delete {folder} and encode the data set again"
            ) from error

    def difference(self, other: "Record") -> str | None:
        """How the cache of another record is another one, in words; None if both are the same."""
        if not self.first_stage.is_same(other.first_stage):
            return f"of {other.first_stage}, and this is {self.first_stage}"
        if self.source != other.source:
            return "of another data set, or of another version of it"
        if _settings(self) != _settings(other):
            return f"with {_settings(other)}, and this is with {_settings(self)}"
        return None


def _settings(record: Record) -> str:
    pairs = asdict(record.transform) | {"precision": record.precision, "flip": record.flip}
    arrays = (f"{name} {dtype} {shape}" for name, (shape, dtype) in record.arrays.items())
    return ", ".join([*(f"{name} {value}" for name, value in pairs.items()), *arrays])


def average_sample_bytes(folder: str, manifest: Manifest) -> float:
    """What decides the order of samples, where data.block does not: of latents, the size that their images had.

    So sample number t of a latent cache is number t of the data set that was encoded.
    """
    record = Record.load(folder)
    if record is not None and record.sample_bytes:
        return record.sample_bytes
    return int(manifest.shards.columns["num_bytes"].sum()) / manifest.num_samples


def check_latents(config: DataConfig, folders: Sequence[tuple[str, str]], first_stages: Sequence[FirstStage]) -> None:
    """Refuse latents that are not what the run's own first stage would make of its images.

    Args:
        config: of a run's data.
        folders: data sets that are read so, each after its key.
        first_stages: that the run's family has; of a run that goes on, none: it has its own in its checkpoints, and its
            data set is known to be the one that it began with.

    Raises:
        ConfigError: the config asks for what is not in a cache, or for another transform.
        DataError: a cache of another first stage, or a data set without images that is no cache.
    """
    known = list(first_stages)
    for key, folder in folders:
        record = Record.load(storage.absolute(folder))
        if record is None:
            _check_images(config, key, folder, needs_cache=bool(first_stages))
            continue
        _check_settings(config, key, folder, record)
        known = known or [record.first_stage]
        if not any(record.first_stage.is_same(one) for one in known):
            other = "" if known[0].step is None else ", or train on the checkpoint of that step"
            raise DataError(
                f"{key}: {folder} was encoded by {record.first_stage}; the run's first stage is {known[0]}: encode it "
                f"again with `gmdist data encode RUN SRC DEST`, RUN as family.first_stage has it{other}"
            )


def _check_images(config: DataConfig, key: str, folder: str, *, needs_cache: bool) -> None:
    if config.image:
        return
    if config.flip or config.resize != "none":
        raise ConfigError(
            f"data.image: False; must be true with data.resize or data.flip, but for what `gmdist data encode` has "
            f"made, and {folder} was not"
        )
    if needs_cache:
        raise DataError(
            f"{key}: {folder} was not made by `gmdist data encode`: nobody knows which first stage it is of"
        )


def _check_settings(config: DataConfig, key: str, folder: str, record: Record) -> None:
    names = ", ".join(f"{name}.npy" for name in record.arrays)
    if config.image:
        raise ConfigError(f"data.image: True; {folder} holds latents: set data.image=false and data.arrays=[{names}]")
    for extension in config.arrays:
        if batch_key(extension) not in record.arrays:
            raise ConfigError(f"data.arrays: '{extension}'; {folder} holds {names}")
    wanted = Transform.of(config)
    for name in (one.name for one in fields(Transform)):
        own, theirs = getattr(wanted, name), getattr(record.transform, name)
        if own != theirs:
            # Caches are of centred crops, whatever is asked for.
            again = "" if name == "crop" else ", or encode the data set again"
            raise ConfigError(f"data.{name}: '{own}'; {folder}, of {key}, was encoded with '{theirs}': set that{again}")
    if config.flip and not record.flip and key.endswith(".train"):  # others are never flipped
        raise ConfigError(f"data.flip: True; {folder} was encoded without mirror images: set false, or encode it again")
