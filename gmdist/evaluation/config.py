"""What is measured of generated images, and by which features: the `evaluation` section of a config."""

from dataclasses import dataclass

from gmdist import storage
from gmdist.checks import at_least
from gmdist.errors import ConfigError

METRICS = ("fid", "kid", "pr")
# What each of them gives, and any of them.
MEASURED = {"fid": ("fid", "rfid"), "kid": ("kid",), "pr": ("precision", "recall")}
NUM_NEIGHBORS = 3  # of an image, that its neighbourhood reaches to (Kynkaanniemi 2019, Sec. 3)


@dataclass
class EvaluationConfig:
    """How generated images are compared with real ones."""

    # Of fid, kid, pr (precision and recall), at each train.evaluate_every; none: training does not generate for it.
    metrics: tuple[str, ...] = ()
    features: str | None = None  # a classifier or an Inception file, local or s3://; None: that beside the data set
    reference: str | None = None  # shards of real images; None: data.test, or the training data where there is none
    num_images: int = 5000  # that are generated
    num_reference_images: int = 50_000  # most real images that are read, spread evenly over the data set
    batch_size: int = 50  # images that a worker passes through at once

    def validate(self) -> None:
        """Raise ConfigError for values that cannot be."""
        for metric in self.metrics:
            if metric not in METRICS or self.metrics.count(metric) > 1:
                raise ConfigError(f"evaluation.metrics: '{metric}'; must be of {', '.join(METRICS)}, each once")
        sizes = {"num_images": self.num_images, "num_reference_images": self.num_reference_images}
        if problem := at_least(NUM_NEIGHBORS + 1, **sizes) or at_least(1, batch_size=self.batch_size):
            raise ConfigError(f"evaluation.{problem}")
        for key in ("features", "reference"):
            location = getattr(self, key)
            if location is not None:
                if not location:
                    raise ConfigError(f"evaluation.{key}: ''; must be a path or an s3:// location, or null")
                storage.is_s3(location)

    def make_absolute(self) -> None:
        """Let every process, in whatever folder it runs, find what the user meant from theirs."""
        self.features = self.features and storage.absolute(self.features)
        self.reference = self.reference and storage.absolute(self.reference)
