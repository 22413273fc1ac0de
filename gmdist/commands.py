"""What each command of `gmdist` does: one call, and what it says on the terminal."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gmdist.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
)

if TYPE_CHECKING:
    from gmdist.data.progress import Meter
    from gmdist.launch.sample import SampleRequest

_REPORTED_IMAGES = 100
_OF_DRAWN_IMAGES = (
    "seed",
    "label",
    "prompt",
    "steps",
    "guidance",
    "complete",
    "truncation",
    "interpolate",
    "mix_styles",
)  # options of `sample`
_OTHER_PICTURES = ("translate", "show", "interpolate", "mix_styles")  # options of `sample`, too


# Each command imports what it needs: `gmdist --help` answers at once, and `data` works where Ray is not installed.


def train(options: argparse.Namespace) -> int:
    """Train a run, or go on with it."""
    from gmdist.config import load

    config = load(options.config, options.overrides)
    from gmdist.launch.progress import Display
    from gmdist.launch.train import train

    with Display(config.name) as display:
        outcome = train(config, display.progress, display.message)
        display.message(
            f"{config.run.dir}: step {outcome.step}, {outcome.seen} images, order digest {outcome.digest}"
            + ("" if outcome.finished else "; stopped, the same command goes on from here")
        )
    return EXIT_DONE if outcome.finished else EXIT_STOPPED


def sweep(options: argparse.Namespace) -> int:
    """Take a sweep to its end."""
    from gmdist.sweep.load import load_sweep

    asked = load_sweep(options.config, options.overrides)
    from gmdist.launch.sweep import BEST_NAME, sweep
    from gmdist.launch.sweep_progress import SweepDisplay

    with SweepDisplay(asked.base.name, asked.plan.sweep.metric) as display:
        found = sweep(asked, display.standing, display.message)
    best = next(trial for trial in found["trials"] if trial["trial"] == found["best"])
    saved = 1.0 - found["steps"] / found["steps_of_all"]
    failed = [trial["state"] for trial in found["trials"]].count("failed")
    print(
        f"{asked.folder}/{BEST_NAME}: trial {best['trial']}, {asked.plan.sweep.metric} {best['metric']:.6g}; "
        f"{len(found['trials'])} trials{f' ({failed} failed)' if failed else ''}, {found['steps']} steps "
        f"({saved:.0%} saved)"
    )
    return EXIT_DONE


def submit(options: argparse.Namespace) -> int:
    """Train or sweep a config as a job, and follow its log."""
    from gmdist.launch.submit import submit

    def log(piece: str) -> None:
        print(piece, end="", flush=True)

    return submit(options.config, options.overrides, options.address, _say, log)


def _say(line: str) -> None:
    print(f"gmdist: {line}", file=sys.stderr, flush=True)


def sample(options: argparse.Namespace) -> int:
    """Draw images from a run."""
    from gmdist.data.progress import Meter
    from gmdist.launch.sample import SampleRequest, check_out, draw, is_grid, save
    from gmdist.storage import is_s3

    others = [name for name in _OTHER_PICTURES if getattr(options, name) is not None]
    as_shards = options.workers is not None or (not others and is_s3(options.out) and not is_grid(options.out))
    if options.workers is not None and others:
        raise ConfigError(f"--workers: does not go with --{others[0].replace('_', '-')}, which one process makes")
    if options.workers is not None and is_grid(options.out):
        raise ConfigError(f"--out: {options.out}; is a grid, and --workers draw shards: name a folder")
    if not as_shards:
        check_out(options.out, _num_pictures(options))
    if (options.translate is None) != (options.images is None):
        given, missing = ("images", "translate") if options.translate is None else ("translate", "images")
        raise ConfigError(f"--{missing}: missing; --{given} {getattr(options, given)} needs it")
    if options.translate is not None:
        from gmdist.launch.translate import translate

        _refuse_beside(options, "translate", (*_OF_DRAWN_IMAGES, "show"))
        asked = options.translate, options.images, options.num_images
        print(translate(options.run, *asked, options.out, options.overrides))
        return EXIT_DONE
    if options.show is not None:
        from gmdist.launch.show import show

        _refuse_beside(options, "show", _OF_DRAWN_IMAGES)
        rows = show(options.run, options.show, options.num_images, options.overrides)
        print(save(rows, len(rows), options.out, None if options.show == "reconstructions" else 1))
        return EXIT_DONE
    request = SampleRequest(
        options.num_images,
        options.label,
        options.prompt,
        options.seed or 0,
        options.steps,
        options.guidance,
        options.truncation,
        options.complete,
    )
    if options.interpolate is not None or options.mix_styles:
        return _walk(options, request)
    if as_shards:
        return _sample_shards(options, request)
    with Meter(options.out, "images") as meter:
        drawn = draw(options.run, request, options.overrides, meter.update)
        written = save(drawn, request.num_images, options.out)
    print(written)
    return EXIT_DONE


def _sample_shards(options: argparse.Namespace, request: "SampleRequest") -> int:
    from gmdist.data.progress import Meter
    from gmdist.launch.sample_shards import sample_shards

    overrides = _with_workers(options)
    with Meter(options.out, "images") as meter:
        manifest, was_there = sample_shards(options.run, request, options.out, overrides, meter.update, _say)
    what = f"{manifest.num_samples} images in {len(manifest.shards)} shards"
    print(f"{options.out}: {what}{'; they were drawn before' if was_there else ''}")
    return EXIT_DONE


def _walk(options: argparse.Namespace, request: "SampleRequest") -> int:
    from gmdist.launch.sample import is_grid, save
    from gmdist.launch.walk import interpolate, mix

    if options.complete is not None:
        raise ConfigError("--complete: does not go with --interpolate or --mix-styles")
    if options.interpolate is not None and options.mix_styles:
        raise ConfigError("--mix-styles: does not go with --interpolate")
    if options.mix_styles:
        table = mix(options.run, request, options.overrides)
        print(save(table, len(table), options.out, request.num_images + 1))
        return EXIT_DONE
    frames = interpolate(options.run, request, options.interpolate, options.overrides).flatten(0, 1)
    columns = options.interpolate if is_grid(options.out) else None
    print(save(frames, len(frames), options.out, columns))
    return EXIT_DONE


def _num_pictures(options: argparse.Namespace) -> int:
    """How many pictures `sample` draws."""
    if options.mix_styles:
        return (options.num_images + 1) ** 2
    return options.num_images * (options.interpolate or 1)


def _refuse_beside(options: argparse.Namespace, given: str, names: Sequence[str]) -> None:
    """ConfigError for options that say something of images that are drawn, where none are."""
    for name in names:
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}: does not go with --{given}, which shows what becomes of real images"
            )


def evaluate(options: argparse.Namespace) -> int:
    """Compare a run's images with real ones."""
    from gmdist.launch.evaluate import EvaluationRequest, evaluate, table
    from gmdist.launch.scores import write_scores

    metrics = None if options.metrics is None else tuple(name.strip() for name in options.metrics.split(","))
    if options.scores is not None:
        for key in ("metrics", "num_images", "features"):
            if getattr(options, key) is not None:
                option = key.replace("_", "-")
                raise ConfigError(f"--{option}: {getattr(options, key)}; must be left out with --scores")
        print(write_scores(options.run, options.scores, options.batch_size, options.overrides))
        return EXIT_DONE
    request = EvaluationRequest(metrics, options.num_images, options.batch_size, options.features)
    print(table(evaluate(options.run, request, options.overrides)))
    return EXIT_DONE


def export(options: argparse.Namespace) -> int:
    """Write a run's weights for other programs."""
    from gmdist.launch.export import export

    print(export(options.run, options.destination, options.format, options.overrides))
    return EXIT_DONE


def report(options: argparse.Namespace) -> int:
    """Write a page about runs."""
    from gmdist.launch.sample import draw_compared, is_compared
    from gmdist.report.page import write

    last, drawn = options.runs[-1], None
    if is_compared(last):
        print(f"gmdist: drawing {_REPORTED_IMAGES} images of {last}", file=sys.stderr)
        try:
            drawn = draw_compared(last, _REPORTED_IMAGES)
        except (CheckpointError, ConfigError, DataError, DivergedError) as error:  # curves are there all the same
            print(f"gmdist: a report without samples: {error}", file=sys.stderr)
    try:
        print(write(options.runs, drawn))
    except DataError as error:
        print(f"gmdist: a report without real images: {error}", file=sys.stderr)
        print(write(options.runs, None))
    return EXIT_DONE


def _with_workers(options: argparse.Namespace) -> list[str]:
    """The overrides, with what --workers stands for."""
    if options.workers is None:
        return options.overrides
    if options.workers < 1:
        raise ConfigError(f"--workers: {options.workers}; must be at least 1")
    return [*options.overrides, f"cluster.num_workers={options.workers}"]


def data_make(options: argparse.Namespace) -> int:
    """Write an embedded data set."""
    from gmdist.data.samples import make
    from gmdist.launch.classifier import ensure_classifier

    for split, manifest in make(options.name, options.destination).items():
        print(
            f"{options.destination}/{split}: {manifest.num_samples} images in {len(manifest.shards)} shards", flush=True
        )
    print(ensure_classifier(options.name, options.destination))
    return EXIT_DONE


def data_pack(options: argparse.Namespace) -> int:
    """Pack images into shards."""
    from gmdist.data.encode import Encoding
    from gmdist.data.pack import pack
    from gmdist.data.parallel import num_cores
    from gmdist.data.progress import Meter

    encoding = Encoding(options.image_size, options.format, options.quality)
    encoding.validate()
    processes = num_cores() if options.processes is None else options.processes
    if not options.shard_mib > 0:
        raise ConfigError(f"--shard-mib: {options.shard_mib}; must be above 0")
    if processes < 1:
        raise ConfigError(f"--processes: {processes}; must be at least 1")
    if not 0 <= options.max_unreadable <= 1:
        raise ConfigError(f"--max-unreadable: {options.max_unreadable}; must be from 0 to 1")
    with Meter(options.destination) as meter, _alone(options.destination, meter) as on_progress:
        packed = pack(
            options.source,
            options.destination,
            encoding,
            shard_mib=options.shard_mib,
            processes=processes,
            max_unreadable=options.max_unreadable,
            on_progress=on_progress,
            on_unreadable=lambda line: meter.message(f"gmdist: left out {line}"),
        )
    manifest = packed.manifest
    what = f"{manifest.num_samples} images in {len(manifest.shards)} shards"
    what += f", {len(manifest.classes)} classes" if manifest.classes else ""
    print(f"{options.destination}: {what}{'; it was packed before' if packed.was_there else ''}")
    return EXIT_DONE


@contextmanager
def _alone(folder: str, meter: "Meter") -> Iterator[Callable[[int, int], None]]:
    """Have a folder alone while it is written. It gives what to call with (bytes done, bytes in all)."""
    from gmdist.launch.lease import held

    with held(folder, meter.message) as lease:
        lease.confirm()

        def on_progress(done: int, total: int) -> None:
            lease.check()
            meter.update(done, total)

        yield on_progress


def data_index(options: argparse.Namespace) -> int:
    """Index plain shards."""
    from gmdist.data.index import index_folder
    from gmdist.data.progress import Meter

    with Meter(options.location) as meter, _alone(options.location, meter) as on_progress:
        manifest, problems = index_folder(options.location, on_progress)
    if not problems:
        print(f"{options.location}: {manifest.num_samples} samples in {len(manifest.shards)} shards")
    return _tell(problems)


def data_check(options: argparse.Namespace) -> int:
    """Read shards and compare them with their index."""
    from gmdist.data.index import check_folder
    from gmdist.data.progress import Meter

    if not 0 < options.fraction <= 1:
        raise ConfigError(f"--fraction: {options.fraction}; must be above 0 and at most 1")
    with Meter(options.location) as meter:
        problems = check_folder(options.location, options.fraction, meter.update)
    if not problems:
        print(f"{options.location}: sound" + ("" if options.fraction == 1 else ", as far as it was read"))
    return _tell(problems)


def data_encode(options: argparse.Namespace) -> int:
    """Encode images by a first stage."""
    from gmdist.data.progress import Meter
    from gmdist.launch.encode import encode

    overrides = _with_workers(options)
    with Meter(options.destination) as meter, _alone(options.destination, meter) as on_progress:
        encoded = encode(
            options.run,
            options.source,
            options.destination,
            overrides,
            flip=options.flip,
            on_progress=on_progress,
            on_unreadable=lambda line: meter.message(f"gmdist: left out {line}"),
        )
    arrays = ", ".join(f"{name} {dtype} {shape}" for name, (shape, dtype) in encoded.record.arrays.items())
    manifest = encoded.manifest
    what = f"{manifest.num_samples} samples in {len(manifest.shards)} shards, {arrays}"
    print(f"{options.destination}: {what}{'; it was encoded before' if encoded.was_there else ''}")
    return EXIT_DONE


def _tell(problems: list[str]) -> int:
    for problem in problems:
        print(f"gmdist: {problem}", file=sys.stderr)
    return EXIT_FAILED if problems else EXIT_DONE


def doctor(options: argparse.Namespace) -> int:
    """Say what this machine has, or the cluster of a run, and what is missing."""
    from gmdist.doctor import examine

    lines, sound = examine()
    if options.config is not None:
        from gmdist.launch.cluster import connected
        from gmdist.launch.preflight import examine_cluster, table
        from gmdist.sweep.load import load_run

        config = load_run(options.config, options.overrides)
        with connected(config.cluster, may_be_small=True):
            findings = examine_cluster(config)
        lines += table(findings)
        sound = sound and all(finding.remedy is None for finding in findings)
    print("\n".join(lines))
    return EXIT_DONE if sound else EXIT_FAILED
