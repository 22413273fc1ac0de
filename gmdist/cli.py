"""The `gmdist` command: one subcommand, one call.

Exit codes: 0 done; 1 failed, the reason in one line on stderr; 2 wrong usage or config; 130 stopped on request, with a
checkpoint to go on from.
"""

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gmdist import __version__
from gmdist.errors import ConfigError, GmdistError

if TYPE_CHECKING:
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
EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        options = _parse(arguments)
        return options.call(options)
    except ConfigError as error:
        _complain(str(error))
        return EXIT_USAGE
    except GmdistError as error:
        _complain(str(error))
        return EXIT_FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` is no failure
        return EXIT_DONE
    except KeyboardInterrupt:
        print("gmdist: stopped", file=sys.stderr)
        return EXIT_STOPPED
    except Exception as error:  # noqa: BLE001 - nobody should have to read a traceback in a terminal
        with tempfile.NamedTemporaryFile("w", prefix="gmdist-error-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        reason = (str(error).splitlines() or [""])[0]
        print(f"gmdist: {type(error).__name__}: {reason}; the traceback is in {file.name}", file=sys.stderr)
        return EXIT_FAILED


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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = _command(commands, "train", _train, "train a run, or go on with it")
    train.add_argument("config", type=_location, metavar="CONFIG", help="such as configs/digits/autoencoder_kl.yaml")
    train.add_argument("overrides", metavar="key=value", nargs="*", help="such as train.num_steps=100")

    sweep = _command(commands, "sweep", _sweep, "train a config with many settings, and find the best")
    sweep.add_argument("config", type=_location, metavar="CONFIG", help="such as configs/sweeps/digits_vae.yaml")
    sweep.add_argument("overrides", metavar="key=value", nargs="*", help="such as sweep.num_trials=4")

    sample = _command(commands, "sample", _sample, "draw images from a run")
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
    _add_settings(sample, "family.diffusion.sampler.name=ddim")

    evaluate = _command(commands, "evaluate", _evaluate, "compare a run's images with real ones")
    evaluate.add_argument("run", type=_location, metavar="RUN", help="a run's folder, or one of its checkpoints")
    evaluate.add_argument("--metrics", help="of fid,kid,pr; default: the run's evaluation.metrics, or all")
    evaluate.add_argument("--num-images", type=int, help="that are generated; default: the run's setting")
    evaluate.add_argument("--batch-size", type=int, help="images at once; default: the run's setting")
    evaluate.add_argument("--features", type=_location, help="a classifier or Inception file; default: the run's")
    evaluate.add_argument(
        "--scores", type=_location, metavar="OUT", help="instead, write each real image's log-likelihood to a CSV file"
    )
    _add_settings(evaluate, "evaluation.reference=data/digits/test")

    export = _command(commands, "export", _export, "write a run's averaged weights for other programs")
    export.add_argument("run", type=_location, metavar="RUN", help="a run's folder, or one of its checkpoints")
    export.add_argument("destination", type=_location, metavar="DEST", help="a new folder or s3://bucket/prefix")
    _add_settings(export, "family.diffusion.sampler.name=ddim")
    export.add_argument("--format", required=True, help="safetensors, or diffusers for what it has a place for")

    report = _command(commands, "report", _report, "write RUN/report.html: curves and images on one page")
    report.add_argument("runs", type=_location, metavar="RUN", nargs="+", help="the page is written into the last one")

    data = commands.add_parser("data", help="make, pack, index and check data sets")
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    make = _command(actions, "make", _data_make, "write an embedded data set to DEST/train and DEST/test")
    names = "digits, digits-color, glyphs, glyphs-color, glyphs-serif or glyphs-sans"
    make.add_argument("name", metavar="NAME", help=names)
    make.add_argument("destination", type=_location, metavar="DEST")
    pack = _command(actions, "pack", _data_pack, "pack images into shards; the same command goes on where it stopped")
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
    index = _command(actions, "index", _data_index, "index plain WebDataset shards")
    index.add_argument("location", type=_location, metavar="URL", help="a folder or s3://bucket/prefix")
    check = _command(actions, "check", _data_check, "read shards and compare them with their index")
    check.add_argument("location", type=_location, metavar="URL", help="a folder or s3://bucket/prefix")
    check.add_argument("--fraction", type=float, default=1.0, help="of the shards to read; default: all")

    encode = _command(actions, "encode", _data_encode, "encode images by a first stage; the same command goes on")
    encode.add_argument(
        "run", type=_location, metavar="RUN", help="a first stage: its folder, or one of its checkpoints"
    )
    encode.add_argument("source", type=_location, metavar="SRC", help="shards, in a folder or s3://bucket/prefix")
    encode.add_argument("destination", type=_location, metavar="DEST", help="a folder or s3://bucket/prefix")
    _add_settings(encode, "cluster.address=auto")
    encode.add_argument("--workers", type=int, help="default: RUN's cluster.num_workers; 1: without Ray")
    encode.add_argument("--no-flip", dest="flip", action="store_false", help="without mirror images, in half the space")

    _command(commands, "doctor", _doctor, "say what this machine has, and what is missing")
    return parser


def _add_settings(command: argparse.ArgumentParser, example: str) -> None:
    """Other settings for a run that there is."""
    command.add_argument("overrides", metavar="key=value", nargs="*", help=f"of RUN's config, such as {example}")


def _location(text: str) -> str:
    """An argument that names a place: `--out "$UNSET"` would otherwise mean the root of the file system."""
    if not text.strip():
        raise ConfigError("an argument is empty: ''; name a folder, a file or an s3:// prefix")
    return text


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    call: Callable[[argparse.Namespace], int],
    description: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(call=call)
    return parser


# Each command imports what it needs: `gmdist --help` answers at once, and `data` works where Ray is not installed.


def _train(options: argparse.Namespace) -> int:
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


def _sweep(options: argparse.Namespace) -> int:
    from gmdist.sweep.load import load_sweep

    asked = load_sweep(options.config, options.overrides)
    from gmdist.launch.sweep import BEST_NAME, sweep
    from gmdist.launch.sweep_progress import SweepDisplay

    with SweepDisplay(asked.base.name, asked.plan.sweep.metric) as display:
        found = sweep(asked, display.standing, display.message)
    best = next(trial for trial in found["trials"] if trial["trial"] == found["best"])
    saved = 1.0 - found["steps"] / found["steps_of_all"]
    print(
        f"{asked.folder}/{BEST_NAME}: trial {best['trial']}, {asked.plan.sweep.metric} {best['metric']:.6g}; "
        f"{len(found['trials'])} trials, {found['steps']} steps ({saved:.0%} saved)"
    )
    return EXIT_DONE


def _sample(options: argparse.Namespace) -> int:
    from gmdist.launch.sample import SampleRequest, check_out, draw, is_grid, save
    from gmdist.storage import is_s3

    others = [name for name in _OTHER_PICTURES if getattr(options, name) is not None]
    as_shards = options.workers is not None or (not others and is_s3(options.out) and not is_grid(options.out))
    if options.workers is not None and others:
        raise ConfigError(f"--workers: does not go with --{others[0].replace('_', '-')}, which one process makes")
    if options.workers is not None and is_grid(options.out):
        raise ConfigError(f"--out: {options.out}; is a grid, and --workers draw shards: name a folder")
    if not as_shards:
        check_out(options.out, options.num_images)
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
        print(save(show(options.run, options.show, options.num_images, options.overrides), options.out))
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
    print(save(draw(options.run, request, options.overrides), options.out))
    return EXIT_DONE


def _sample_shards(options: argparse.Namespace, request: "SampleRequest") -> int:
    from gmdist.data.progress import Meter
    from gmdist.launch.sample_shards import sample_shards

    overrides = options.overrides + ([] if options.workers is None else [f"cluster.num_workers={options.workers}"])
    with Meter(options.out, "images") as meter:
        manifest, was_there = sample_shards(options.run, request, options.out, overrides, meter.update)
    what = f"{manifest.num_samples} images in {len(manifest.shards)} shards"
    print(f"{options.out}: {what}{'; they were drawn before' if was_there else ''}")
    return EXIT_DONE


def _walk(options: argparse.Namespace, request: "SampleRequest") -> int:
    from gmdist.launch.sample import is_grid, save
    from gmdist.launch.walk import interpolate, mix

    if options.complete is not None or (options.interpolate is not None and options.mix_styles):
        other = "--complete" if options.complete is not None else "--mix-styles"
        raise ConfigError(f"{other}: does not go with --interpolate or --mix-styles")
    if options.mix_styles:
        print(save(mix(options.run, request, options.overrides), options.out, request.num_images + 1))
        return EXIT_DONE
    frames = interpolate(options.run, request, options.interpolate, options.overrides)
    columns = options.interpolate if is_grid(options.out) else None
    print(save(frames.flatten(0, 1), options.out, columns))
    return EXIT_DONE


def _refuse_beside(options: argparse.Namespace, given: str, names: Sequence[str]) -> None:
    """ConfigError for options that say something of images that are drawn, where none are."""
    for name in names:
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}: does not go with --{given}, which shows what becomes of real images"
            )


def _evaluate(options: argparse.Namespace) -> int:
    from gmdist.launch.evaluate import EvaluationRequest, evaluate, table
    from gmdist.launch.scores import write_scores

    metrics = None if options.metrics is None else tuple(options.metrics.split(","))
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


def _export(options: argparse.Namespace) -> int:
    from gmdist.launch.export import export

    print(export(options.run, options.destination, options.format, options.overrides))
    return EXIT_DONE


def _report(options: argparse.Namespace) -> int:
    from gmdist.launch.sample import SampleRequest, draw, draws
    from gmdist.report.page import write

    last = options.runs[-1]
    print(write(options.runs, draw(last, SampleRequest(_REPORTED_IMAGES)) if draws(last) else None))
    return EXIT_DONE


def _data_make(options: argparse.Namespace) -> int:
    from gmdist.data.samples import make
    from gmdist.launch.classifier import ensure_classifier

    for split, manifest in make(options.name, options.destination).items():
        print(f"{options.destination}/{split}: {manifest.num_samples} images in {len(manifest.shards)} shards")
    print(ensure_classifier(options.name, options.destination))
    return EXIT_DONE


def _data_pack(options: argparse.Namespace) -> int:
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
    with Meter(options.destination) as meter:
        packed = pack(
            options.source,
            options.destination,
            encoding,
            shard_mib=options.shard_mib,
            processes=processes,
            max_unreadable=options.max_unreadable,
            on_progress=meter.update,
            on_unreadable=lambda line: meter.message(f"gmdist: left out {line}"),
        )
    manifest = packed.manifest
    what = f"{manifest.num_samples} images in {len(manifest.shards)} shards"
    what += f", {len(manifest.classes)} classes" if manifest.classes else ""
    print(f"{options.destination}: {what}{'; it was packed before' if packed.was_there else ''}")
    return EXIT_DONE


def _data_index(options: argparse.Namespace) -> int:
    from gmdist.data.index import index_folder
    from gmdist.data.progress import Meter

    with Meter(options.location) as meter:
        manifest, problems = index_folder(options.location, meter.update)
    if not problems:
        print(f"{options.location}: {manifest.num_samples} samples in {len(manifest.shards)} shards")
    return _tell(problems)


def _data_check(options: argparse.Namespace) -> int:
    from gmdist.data.index import check_folder
    from gmdist.data.progress import Meter

    if not 0 < options.fraction <= 1:
        raise ConfigError(f"--fraction: {options.fraction}; must be above 0 and at most 1")
    with Meter(options.location) as meter:
        problems = check_folder(options.location, options.fraction, meter.update)
    if not problems:
        print(f"{options.location}: sound" + ("" if options.fraction == 1 else ", as far as it was read"))
    return _tell(problems)


def _data_encode(options: argparse.Namespace) -> int:
    from gmdist.data.progress import Meter
    from gmdist.launch.encode import encode

    overrides = options.overrides + ([] if options.workers is None else [f"cluster.num_workers={options.workers}"])
    with Meter(options.destination) as meter:
        encoded = encode(
            options.run,
            options.source,
            options.destination,
            overrides,
            flip=options.flip,
            on_progress=meter.update,
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


def _doctor(options: argparse.Namespace) -> int:
    from gmdist.doctor import examine

    lines, sound = examine()
    print("\n".join(lines))
    return EXIT_DONE if sound else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
