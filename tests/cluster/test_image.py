"""The image that nodes run: pinned, without root, with the packages of requirements.txt and all that a job needs."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: name and rest, with continued lines joined."""
    lines = [line for line in (ROOT / "cluster/Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def those(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def sent_to_the_builder(path: str) -> bool:
    """Whether .dockerignore lets a path through; the last line that matches it, or a folder above it, decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = [path, *map(str, Path(path).parents)][:-1]
        names = [Path(part).name for part in parts] if "**/" in line else parts
        if line and not line.startswith("#") and any(fnmatch.fnmatch(name, pattern) for name in names):
            sent = line.startswith("!")
    return sent


def test_the_base_is_pinned_and_for_gpus():
    bases = those("FROM")
    assert bases
    assert all(re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", base) for base in bases)
    assert instructions()[0][0] == "FROM"


def test_it_ends_as_a_user_without_rights():
    names = [name for name, _ in instructions()]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", those("USER")[-1])
    assert "RUN" not in names[names.index("USER") :]
    assert not any("sudo" in rest or "chmod 777" in rest for rest in those("RUN"))


def test_packages_are_those_that_are_locked():
    """No package comes in by name: of all that pip installs, the versions are in requirements.txt."""
    (copied,) = [rest for rest in those("COPY") if rest.startswith("requirements.txt ")]
    folder = copied.split()[1]
    commands = [command for rest in those("RUN") for command in rest.split("&&") if "pip install" in command]
    locked, own = commands
    assert f"-r {folder}requirements.txt" in locked
    assert "--no-deps" in own
    assert own.strip().endswith("/opt/gmdist")
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.+]+", pin) for pin in pins if pin)
    assert any(pin.startswith("torch==") and "+cpu" not in pin for pin in pins)


def test_a_torch_without_cuda_ends_the_build():
    (locked,) = [rest for rest in those("RUN") if "-r /opt" in rest]
    assert re.search(r'&& python -c "import torch; assert torch\.version\.cuda', locked)


def test_python_is_one_that_gmdist_takes():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert wanted == ">=3.11,<3.13"
    assert any("python3.12 -m venv" in rest for rest in those("RUN"))


def test_nothing_comes_from_an_address_and_no_secret_is_built_in():
    assert not those("ADD")
    assert not any(re.search(r"https?://|curl |wget http", rest) for rest in those("RUN"))
    named = " ".join([*those("ENV"), *those("ARG")])
    assert not re.search("KEY|TOKEN|SECRET|PASSWORD", named)


def test_all_that_jobs_need_is_in_it():
    copied = {source for rest in those("COPY") for source in rest.split()[:-1]}
    assert {"gmdist", "jobs", "configs", "pyproject.toml", "README.md"} <= copied  # setuptools reads the last
    assert all((ROOT / source).exists() and sent_to_the_builder(source) for source in copied)
    assert sent_to_the_builder("gmdist/data/shard.py")
    assert "COPY cluster/drain.sh /opt/gmdist/cluster/\n" in (ROOT / "cluster/Dockerfile").read_text()


@pytest.mark.parametrize(
    "path",
    [".git/config", ".env", "gmdist/.env.local", "configs/key.pem", "data/x.tar", "runs/x/config.yaml", "id_rsa"],
)
def test_what_is_private_does_not_reach_the_builder(path: str):
    assert not sent_to_the_builder(path)
