"""The `gmdist` command: one subcommand, one call.

Exit codes: 0 done; 1 failed, the reason in one line on stderr; 2 wrong usage or config; 130 stopped on request, with a
checkpoint to go on from.
"""

import argparse
import io
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gmdist import __version__, commands
from gmdist.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, ConfigError, GmdistError


class _Piped(io.FileIO):
    """Standard output, which nobody may read to its end: `| head` ends no training, and is no failure."""

    def write(self, content: Any) -> int:
        """Write it, or drop it where nobody reads any more."""
        try:
            return super().write(content)
        except BrokenPipeError:
            return len(content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # paths need not be UTF-8
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__ and not sys.stdout.isatty():
        piped = _Piped(sys.stdout.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(piped), sys.stdout.encoding, "backslashreplace")
    try:
        with _stopped_by_sigterm():
            options = _parse(arguments)
            return options.call(options)
    except ConfigError as error:
        _complain(str(error))
        return EXIT_USAGE
    except GmdistError as error:
        _complain(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("gmdist: stopped", file=sys.stderr)
        return EXIT_STOPPED
    except Exception as error:  # noqa: BLE001 - nobody should have to read a traceback in a terminal
        with tempfile.NamedTemporaryFile("w", prefix="gmdist-error-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        reason = (str(error).splitlines() or [""])[0]
        print(f"gmdist: {type(error).__name__}: {reason}; the traceback is in {file.name}", file=sys.stderr)
        return EXIT_FAILED


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let a batch system's SIGTERM be what Ctrl-C is. Signals are the main thread's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments in any order: argparse itself takes no `key=value` that comes after an option."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if others and hasattr(options, "overrides") and not any(other.startswith("-") for other in others):
        options.overrides = options.overrides + others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return options


def _complain(message: str) -> None:
    """One line on stderr, though a file's name may hold several."""
    print("gmdist: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in message), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gmdist", description="Distributed training of generative image models.")
    parser.add_argument("--version", action="version", version=__version__)
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = _command(parsers, "train", commands.train, "train a run, or go on with it")
    train.add_argument("config", type=_location, metavar="CONFIG", help="such as configs/digits/autoencoder_kl.yaml")
    _add_settings(train, "such as train.num_steps=100")

    sweep = _command(parsers, "sweep", commands.sweep, "train a config with many settings, and find the best")
    sweep.add_argument("config", type=_location, metavar="CONFIG", help="such as configs/sweeps/digits_vae_betas.yaml")
    _add_settings(sweep, "such as sweep.num_trials=4")

    submit = _command(parsers, "submit", commands.submit, "train or sweep a config as a job on a cluster")
    submit.add_argument("config", type=_location, metavar="CONFIG", help="inside this folder, which is uploaded")
    _add_settings(submit, "such as run.dir=s3://bucket/runs/a")
    submit.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        help="of the job server; default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265",
    )

    sample = _command(parsers, "sample", commands.sample, "draw images from a run")
    sample.add_argument("run", type=_location, metavar="RUN", help="a run's folder, or one of its checkpoints")
    sample.add_argument("--num-images", type=int, default=64, help="default: %(default)s")
    sample.add_argument("--label", type=int, help="class of all images; default: all classes in turn")
    sample.add_argument("--prompt", help="what all images show, of a run with captions")
    sample.add_argument(
        "--out", type=_location, required=True, help="NAME.png: a grid; a folder: one PNG an image; s3://: shards"
    )
    sample.add_argument("--seed", type=int, help="another seed, other images; default: 0")
    sample.add_argument("--steps", type=int, help="of the sampler; default: the run's setting")
    sample.add_argument("--guidance", type=float, help="1 is none; default: the run's setting")
    sample.add_argument("--truncation", type=float, help="0 to 1, of styles: 1 is none; default: the run's setting")
    sample.add_argument("--interpolate", type=int, metavar="FRAMES", help="from each image to the next, so many")
    sample.add_argument(
        "--mix-styles", action="store_const", const=True, help="a table: coarse layers of rows, fine ones of columns"
    )
    sample.add_argument("--show", metavar="KIND", help="of real images: reconstructions, interpolations or traversals")
    sample.add_argument("--complete", type=_location, metavar="IMAGE", help="the first rows of all images, of a prior")
    sample.add_argument(
        "--workers", type=int, help="write shards, drawn by so many; default for s3://: RUN's cluster.num_workers"
    )
    sample.add_argument("--translate", metavar="DIRECTION", help="a2b or b2a: real images, into the other domain")
    sample.add_argument("--images", type=_location, metavar="SRC", help="those: a folder of images, or shards")
    _add_settings(sample, "of RUN's config, such as family.diffusion.sampler.name=ddim")

    evaluate = _command(parsers, "evaluate", commands.evaluate, "compare a run's images with real ones")
    evaluate.add_argument("run", type=_location, metavar="RUN", help="a run's folder, or one of its checkpoints")
    evaluate.add_argument("--metrics", help="of fid,kid,pr; default: the run's evaluation.metrics, or all")
    evaluate.add_argument("--num-images", type=int, help="that are generated; default: the run's setting")
    evaluate.add_argument(
        "--batch-size",
        type=int,
        help="images at once; default: evaluation.batch_size, with --scores as many as the run's workers took",
    )
    evaluate.add_argument("--features", type=_location, help="a classifier or Inception file; default: the run's")
    evaluate.add_argument(
        "--scores", type=_location, metavar="OUT", help="instead, write each real image's log-likelihood to a CSV file"
    )
    _add_settings(evaluate, "of RUN's config, such as evaluation.reference=data/digits/test")

    export = _command(parsers, "export", commands.export, "write a run's averaged weights for other programs")
    export.add_argument("run", type=_location, metavar="RUN", help="a run's folder, or one of its checkpoints")
    export.add_argument("destination", type=_location, metavar="DEST", help="a new folder or s3://bucket/prefix")
    _add_settings(export, "of RUN's config, such as family.diffusion.sampler.name=ddim")
    export.add_argument("--format", required=True, help="safetensors, or diffusers for what it has a place for")

    report = _command(parsers, "report", commands.report, "write RUN/report.html: curves and images on one page")
    report.add_argument("runs", type=_location, metavar="RUN", nargs="+", help="the page is written into the last one")

    data = parsers.add_parser("data", help="make, pack, index, check and encode data sets")
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    make = _command(actions, "make", commands.data_make, "write an embedded data set to DEST/train and DEST/test")
    names = "digits, digits-color, glyphs, glyphs-color, glyphs-serif or glyphs-sans"
    make.add_argument("name", metavar="NAME", help=names)
    make.add_argument("destination", type=_location, metavar="DEST")
    pack = _command(
        actions, "pack", commands.data_pack, "pack images into shards; the same command goes on where it stopped"
    )
    pack.add_argument(
        "source", type=_location, metavar="SRC", help="a folder of images, or of a folder a class; or shards"
    )
    pack.add_argument("destination", type=_location, metavar="DEST", help="a folder or s3://bucket/prefix")
    pack.add_argument("--image-size", type=int, help="cut the centre square and resize it to so many pixels a side")
    pack.add_argument("--format", help="png, jpeg or webp; default: png with --image-size, else as they are")
    pack.add_argument("--quality", type=int, help="1 to 100; default: 95 for jpeg, 90 for webp")
    pack.add_argument("--shard-mib", type=float, default=64.0, help="size of a shard; default: %(default)s")
    pack.add_argument("--processes", type=int, help="each holds a shard in memory; default: one a core")
    pack.add_argument(
        "--max-unreadable", type=float, default=0.01, metavar="FRACTION", help="is left out; default: %(default)s"
    )
    index = _command(actions, "index", commands.data_index, "index plain WebDataset shards")
    index.add_argument("location", type=_location, metavar="URL", help="a folder or s3://bucket/prefix")
    check = _command(actions, "check", commands.data_check, "read shards and compare them with their index")
    check.add_argument("location", type=_location, metavar="URL", help="a folder or s3://bucket/prefix")
    check.add_argument("--fraction", type=float, default=1.0, help="of the shards to read; default: all")

    encode = _command(
        actions, "encode", commands.data_encode, "encode images by a first stage; the same command goes on"
    )
    encode.add_argument(
        "run", type=_location, metavar="RUN", help="a first stage: its folder, or one of its checkpoints"
    )
    encode.add_argument("source", type=_location, metavar="SRC", help="shards, in a folder or s3://bucket/prefix")
    encode.add_argument("destination", type=_location, metavar="DEST", help="a folder or s3://bucket/prefix")
    _add_settings(encode, "of RUN's config, such as cluster.address=auto")
    encode.add_argument(
        "--workers", type=int, help="default: RUN's cluster.num_workers; 1: without Ray, if cluster.address is local"
    )
    encode.add_argument("--no-flip", dest="flip", action="store_false", help="without mirror images, in half the space")

    doctor = _command(parsers, "doctor", commands.doctor, "say what this machine or a cluster has, and what is missing")
    doctor.add_argument(
        "config", type=_location, metavar="CONFIG", nargs="?", help="of a run whose cluster is examined"
    )
    _add_settings(doctor, "such as cluster.address=auto")
    return parser


def _add_settings(command: argparse.ArgumentParser, help_: str) -> None:
    """Other settings than those of a file or a run."""
    # With a default, argparse does not say that they are required.
    command.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=help_)


def _location(text: str) -> str:
    """An argument that names a place: `--out "$UNSET"` would otherwise mean the root of the file system."""
    if not text.strip():
        raise ConfigError("an argument is empty: ''; name a folder, a file or an s3:// prefix")
    return text


def _command(
    parsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    call: Callable[[argparse.Namespace], int],
    description: str,
) -> argparse.ArgumentParser:
    parser = parsers.add_parser(name, help=description, description=description)
    parser.set_defaults(call=call)
    return parser


if __name__ == "__main__":
    sys.exit(main())
