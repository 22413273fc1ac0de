"""Where samples come from and what is read of them: the `data` section of a config."""

import math
import re
from dataclasses import dataclass, field

from gmdist import storage
from gmdist.checks import one_of
from gmdist.data.transform import FILTERS
from gmdist.errors import ConfigError, check_int64
from gmdist.s3 import S3Config

SECOND = "_b"  # ends the names of what batches have of the second domain

_MAX_WEIGHT = 1 << 16


@dataclass
class MixedConfig:
    """One of several data sets."""

    train: str  # folder or s3:// prefix of shards
    weight: int = 1  # samples of it in each period; a period has as many as all weights together


@dataclass
class UnpairedConfig:
    """A second domain, whose images come along in an order of their own."""

    train: str  # folder or s3:// prefix of shards
    test: str | None = None  # shards for evaluation; None where data.test is


MAX_IMAGE_SIZE = 1 << 14  # pixels a side


@dataclass
class DataConfig:
    """Where samples come from."""

    batch_size: int  # samples a step, over all workers
    image_size: int  # pixels a side
    train: str | None = None  # folder or s3:// prefix of shards; None: data.mix names several
    mix: dict[str, MixedConfig] = field(default_factory=dict)  # by names of your own
    test: str | None = None  # shards for evaluation; None: no evaluation
    unpaired: UnpairedConfig | None = None  # image_b, and label_b, of each batch; None: there is one domain
    channels: int = 3  # 1 grey, 3 RGB
    image: bool = True  # False: none is read, for data sets of latents; the transform is what those were made with
    resize: str = "none"  # of the shorter side to image_size: "area", "lanczos"; "none": images have that size
    crop: str = "center"  # what is kept of a resized image's longer side; "random": drawn by the sample's number
    flip: bool = False  # every other image is mirrored, drawn by the sample's number
    num_classes: int | None = None  # labels are 0 ... num_classes - 1; None: labels are not read
    caption: str | None = None  # "txt": that member; "json:KEY": a text of the json member; None: captions are not read
    arrays: tuple[str, ...] = ()  # members that are arrays, such as latent.npy
    seed: int = 0  # draws the order of samples, crops and flips
    lanes: int = 240  # places of the data set that are read in turn; at most the number of shards counts
    block: int | None = None  # samples of a lane that are shuffled together; None: all lanes shuffle 65,536 or 1 GiB
    num_threads: int = 2  # that read and decode, a worker
    prefetch_batches: int = 4  # that are made ahead of use, a worker
    prefetch_mib: int = 1024  # of samples from object storage that are read ahead of use, a worker
    cache_dir: str | None = None  # local folder that keeps what was read from object storage; None: nothing is kept
    cache_gib: float = 100.0  # most that it takes, for all workers of a machine
    s3: S3Config = field(default_factory=S3Config)  # where object storage is
    max_bad_fraction: float = 0.001  # of the data set's samples that may be replaced before the run fails

    @property
    def trained_on(self) -> list[MixedConfig]:
        """The data sets of the training, one or several."""
        return list(self.mix.values()) if self.train is None else [MixedConfig(self.train)]

    @property
    def batch_keys(self) -> list[str]:
        """What a batch has."""
        optional = {"image": self.image, "label": self.num_classes is not None, "caption": self.caption is not None}
        own = [name for name, there in optional.items() if there]
        second = [f"{name}{SECOND}" for name in own if self.unpaired is not None]
        return ["key", *own, *map(batch_key, self.arrays), *second]

    @property
    def folders(self) -> list[tuple[str, str]]:
        """All data sets that are named, each after its key."""
        named = [("data.train", self.train), *((f"data.mix.{name}.train", one.train) for name, one in self.mix.items())]
        named.append(("data.test", self.test))
        if self.unpaired is not None:
            named += [("data.unpaired.train", self.unpaired.train), ("data.unpaired.test", self.unpaired.test)]
        return [(key, folder) for key, folder in named if folder is not None]

    def validate(self) -> None:
        """Raise ConfigError for values that cannot be."""
        self._validate_locations()
        for key in ("batch_size", "image_size", "lanes", "block", "num_threads", "prefetch_batches", "prefetch_mib"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"data.{key}: {getattr(self, key)}; must be at least 1")
        for key, most in (
            ("image_size", MAX_IMAGE_SIZE),
            ("batch_size", 1 << 24),
            ("lanes", 1 << 20),
            ("block", 1 << 40),
            ("num_threads", 256),
        ):
            if (getattr(self, key) or 0) > most:
                raise ConfigError(f"data.{key}: {getattr(self, key)}; must be at most {most}")
        if not 0 < self.cache_gib < math.inf:
            raise ConfigError(f"data.cache_gib: {self.cache_gib}; must be a number above 0")
        self.s3.validate()
        check_int64("data.seed", self.seed)
        if self.channels not in (1, 3):
            raise ConfigError(f"data.channels: {self.channels}; must be 1 (grey) or 3 (RGB)")
        if self.num_classes is not None and self.num_classes < 1:
            raise ConfigError(f"data.num_classes: {self.num_classes}; must be at least 1, or null for no labels")
        self._validate_members()
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ConfigError(f"data.max_bad_fraction: {self.max_bad_fraction}; must be between 0 and 1")

    def _validate_locations(self) -> None:
        if self.train is None and not self.mix:
            raise ConfigError("data.train: missing; must be a folder or an s3:// prefix, or data.mix must name several")
        if self.train is not None and self.mix:
            raise ConfigError(f"data.train: '{self.train}'; must be null beside data.mix, or data.mix be left out")
        for key, location in self.folders:
            if not location:
                raise ConfigError(f"{key}: ''; must be a folder or an s3:// prefix")
            storage.is_s3(location)
        for name, mixed in self.mix.items():
            if not 1 <= mixed.weight <= _MAX_WEIGHT:
                raise ConfigError(f"data.mix.{name}.weight: {mixed.weight}; must be from 1 to {_MAX_WEIGHT}")
        if self.cache_dir is not None and (not self.cache_dir or storage.is_s3(self.cache_dir)):
            raise ConfigError(f"data.cache_dir: '{self.cache_dir}'; must be a local folder, or null for no cache")
        if self.unpaired is not None:
            self._validate_unpaired(self.unpaired)

    def _validate_unpaired(self, second: UnpairedConfig) -> None:
        for key, none in (("image", True), ("caption", None), ("arrays", ())):
            if (value := getattr(self, key)) != none:
                shown = "true" if key == "image" else "left out"
                raise ConfigError(
                    f"data.{key}: {value!r}; must be {shown} beside data.unpaired, whose batches hold the images and "
                    "labels of both domains"
                )
        if (self.test is None) != (second.test is None):
            given, missing = ("unpaired.test", "test") if self.test is None else ("test", "unpaired.test")
            raise ConfigError(
                f"data.{missing}: missing; data.{given} is set, and evaluations need both domains: set both or neither"
            )

    def _validate_members(self) -> None:
        if problem := one_of(("none", *FILTERS), resize=self.resize) or one_of(("center", "random"), crop=self.crop):
            raise ConfigError(f"data.{problem}")
        if self.crop == "random" and self.resize == "none":
            raise ConfigError("data.crop: 'random'; must be center where data.resize is none: nothing is cut then")
        if not self.image and not self.arrays:
            raise ConfigError("data.image: False; must be true, or data.arrays must name what is read instead")
        if self.caption is not None and not re.fullmatch("txt|json:.+", self.caption):
            raise ConfigError(f"data.caption: '{self.caption}'; must be txt, json:KEY, or null for no captions")
        for extension in self.arrays:
            if not extension.endswith(".npy") or self.arrays.count(extension) > 1:
                raise ConfigError(f"data.arrays: '{extension}'; must be extensions such as latent.npy, each once")
            if batch_key(extension) in ("image", "label", "caption", "key"):
                raise ConfigError(
                    f"data.arrays: '{extension}'; must be another name: batches have their own of that one"
                )

    def make_absolute(self) -> None:
        """Let every process, in whatever folder it runs, find what the user meant from theirs."""
        self.train = self.train and storage.absolute(self.train)
        self.test = self.test and storage.absolute(self.test)
        self.cache_dir = self.cache_dir and storage.absolute(self.cache_dir)
        for mixed in self.mix.values():
            mixed.train = storage.absolute(mixed.train)
        if self.unpaired is not None:
            self.unpaired.train = storage.absolute(self.unpaired.train)
            self.unpaired.test = self.unpaired.test and storage.absolute(self.unpaired.test)


def batch_key(extension: str) -> str:
    """An array's name in a batch: latent for latent.npy."""
    return extension.removesuffix(".npy")
