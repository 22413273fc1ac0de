"""Submitting a config to a cluster's job server, following its log, and passing its exit code on."""

import asyncio
import logging
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from gmdist.config import Config, compose, files_of
from gmdist.data.latents import flat
from gmdist.errors import EXIT_STOPPED, ConfigError, RunFailedError
from gmdist.sweep.load import Sweep, load_run, load_sweep

_JOBS = "jobs"  # the folder of the scripts that jobs run
_SHOWN = 5  # of the largest files, where there is too much to upload


def submit(
    path: str, overrides: list[str], address: str, on_message: Callable[[str], None], on_log: Callable[[str], None]
) -> int:
    """Train a config, or sweep it if it has a `sweep:` section, as a job on a cluster; gives the job's exit code.

    The folder where the command runs is uploaded, without what its ignore files name. Relative locations in the config
    mean what they mean here, so on a cluster that does not share them the job itself says what it does not reach.

    Args:
        path: of the config, inside the current folder.
        overrides: `key=value`.
        address: of the job server, as http://HEAD:8265.
        on_message: called with a line that the user should read.
        on_log: called with pieces of the job's log.

    Raises:
        ConfigError: a config that cannot be, one outside the folder, no server there, or too much to upload.
        RunFailedError: the cluster could not run the job, or its server went away.
    """
    if "@" in address:  # it is not shown
        raise ConfigError(
            "--address: must not hold credentials; it is http://HEAD:8265, and of a token RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH say where it is"
        )
    tree = compose(path, overrides)
    config = load_run(path, overrides)
    if "sweep" in tree:
        _check_space(load_sweep(path, overrides))
    script = f"{_JOBS}/{'sweep' if 'sweep' in tree else 'train'}.py"
    if not Path(script).is_file():
        raise ConfigError(f"{script}: is not in {os.getcwd()}; run the command where it is: that folder is uploaded")
    if Path.cwd() not in Path(path).resolve().parents:
        raise ConfigError(f"{path}: is outside of {os.getcwd()}, the folder that is uploaded: copy it there")
    travelling = {file for _, file in _travelling(Path.cwd())}
    for file in files_of(path):
        if Path(os.path.abspath(file)) not in travelling:
            raise ConfigError(
                f"{file}: is not uploaded with {os.getcwd()}: .rayignore or .gitignore leaves it out, or it is outside;"
                " copy it to where configs are"
            )
    name = str(Path(path).resolve().relative_to(Path.cwd()))
    # `exec`: a stop reaches the command itself, and not a shell that waits for it.
    entrypoint = shlex.join(["python", script, name, *overrides, *_absolute(tree, config)])
    logging.getLogger("ray").setLevel(logging.ERROR)  # which names every ignore file, several times
    client = _connect(address)
    try:
        job = client.submit_job(entrypoint=f"exec {entrypoint}", runtime_env={"working_dir": "."})
    except (RuntimeError, ValueError) as error:
        if "Package size" in str(error):
            raise ConfigError(_too_large(Path.cwd())) from error
        raise RunFailedError(f"{address}: the job was not taken ({str(error).splitlines()[0]})") from error
    on_message(f"job {job} for {config.run.dir}; `ray job stop --address {address} {job}` ends it with a checkpoint")
    return _follow(client, job, address, on_log)


def _connect(address: str) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"--address: '{address}'; asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to its file"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--address: '{address}'; no job server of Ray answers there; it is http://HEAD:8265, perhaps through a "
            "tunnel"
        ) from error


def _follow(client: JobSubmissionClient, job: str, address: str, on_log: Callable[[str], None]) -> int:
    """Hand the job's log on until it ends; its exit code."""

    async def tail() -> None:
        async for piece in client.tail_job_logs(job):
            on_log(piece)

    try:
        asyncio.run(tail())
        info = client.get_job_info(job)
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        raise RunFailedError(
            f"{address}: does not answer any more ({error}); the job goes on as long as its cluster does: "
            f"`ray job logs --follow --address {address} {job}` follows it"
        ) from error
    if info.driver_exit_code is not None:
        return info.driver_exit_code
    if info.status == JobStatus.STOPPED:
        return EXIT_STOPPED
    raise RunFailedError(f"{job}: {info.status}: {(info.message or 'Ray does not say why').splitlines()[0]}")


def _absolute(tree: dict[str, Any], config: Config) -> list[str]:
    """Overrides for the locations that are relative to this folder: the job runs in another."""
    meant = yaml.safe_load(config.to_yaml())
    found = []

    def compare(written: Any, resolved: Any, key: str) -> None:
        is_named = isinstance(written, dict) and not any("." in name for name in written)  # and a key says which
        if is_named and isinstance(resolved, dict):
            for name in written.keys() & resolved.keys():
                compare(written[name], resolved[name], f"{key}.{name}" if key else name)
        elif _is_elsewhere(written, resolved):
            text = (
                yaml.safe_dump(resolved, default_flow_style=True, width=1 << 20).removesuffix("\n").removesuffix("...")
            )
            found.append(f"{key}={text.strip()}")

    compare(tree, meant, "")
    return sorted(found)


def _is_elsewhere(written: Any, resolved: Any) -> bool:
    """Whether what is written, or an item of it, means another location in another folder, or to another user."""
    if isinstance(written, dict) and isinstance(resolved, dict):
        return any(_is_elsewhere(written[name], resolved[name]) for name in written.keys() & resolved.keys())
    if isinstance(written, list) and isinstance(resolved, list):
        return any(map(_is_elsewhere, written, resolved))
    return isinstance(written, str) and written != resolved == os.path.abspath(os.path.expanduser(written))


def _check_space(asked: Sweep) -> None:
    """ConfigError for a location to search over that is relative to this folder: the job runs in another."""
    listed = [(key, value) for key, domain in asked.plan.domains.items() for value in domain.values]
    for (key, value), base in zip(listed, asked.bases, strict=True):
        meant = flat(yaml.safe_load(base.to_yaml())).get(key)
        if _is_elsewhere(value, meant):
            raise ConfigError(f"sweep.space.{key}: '{value}'; must be absolute in a job, as '{meant}' is")


def _travelling(folder: Path) -> list[tuple[int, Path]]:
    """The files of a folder that a job brings, and their bytes."""
    files: list[tuple[int, Path]] = []

    def note(path: Path) -> None:
        if path.is_file() and not path.is_symlink():
            files.append((path.stat().st_size, path))

    _dir_travel(folder, [], note, include_gitignore=True)
    return files


def _too_large(folder: Path) -> str:
    """What to say of a folder that is too large to upload: its largest files."""
    files = _travelling(folder)
    largest = sorted(files, reverse=True)[:_SHOWN]
    named = ", ".join(f"{path.relative_to(folder)} ({size / 2**20:.0f} MiB)" for size, path in largest)
    return (
        f"{folder}: {sum(size for size, _ in files) / 2**20:.0f} MiB to upload, and a job may bring "
        f"{GCS_STORAGE_MAX_SIZE / 2**20:.0f} MiB; the largest files are {named}: name what is not needed in .rayignore"
    )
