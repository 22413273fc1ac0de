"""Imports run downwards only, and the training packages need neither Ray nor DeepSpeed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "gmdist"

# What each room may import of gmdist; "errors", "checks" and itself always.
ALLOWED = {
    "errors": set(),
    "checks": set(),
    "rng": set(),
    "workers": set(),
    "checksum": set(),
    "s3": set(),
    "ranged": {"s3"},
    "storage": {"s3", "ranged", "checksum"},
    "images": set(),
    "nets": {"workers"},
    "interchange": {"nets", "diffusion"},
    "diffusion": set(),
    "data": {"storage", "s3", "ranged", "checksum", "rng"},
    "families": {"nets", "interchange", "diffusion", "rng", "workers"},
    "train": {"families.family", "nets.finite", "storage", "checksum", "rng", "images", "workers"},
    "evaluation": {"families.family", "nets.classifier", "nets.inception", "storage", "rng", "workers"},
    "structured": set(),
    "config": {"families", "data", "train", "evaluation.config", "structured", "storage", "s3"},
    "evaluator": {"config", "data", "evaluation", "families.family", "storage"},
    "runs": {"config", "families", "data", "train", "storage", "s3", "rng"},
    "start": {
        "runs",
        "config",
        "evaluator",
        "families.family",
        "families.denoiser",
        "data",
        "train",
        "storage",
        "workers",
    },
    "sweep": {"config", "structured", "storage"},
    "report": {"runs", "config", "data", "evaluation", "train", "sweep", "storage", "images"},
    "launch": {
        *("runs", "start", "config", "evaluator", "families", "interchange", "data", "train", "evaluation", "sweep"),
        "report",
        *("storage", "s3", "images", "checksum"),
    },
    "doctor": set(),
    "cli": {"commands"},
    "commands": {"launch", "sweep", "storage", "config", "data", "report", "doctor"},
}
SOLE_IMPORTERS = {"ray": "launch", "deepspeed": "train/zero.py", "boto3": "s3.py", "botocore": "s3.py"}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(module: str) -> str:
    """ "gmdist.train.ema" -> "train"."""
    return module.removeprefix("gmdist.").split(".")[0]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def forbidden(path: Path) -> list[str]:
    """The imports of a file that the layers do not allow."""
    room = room_of(".".join(path.relative_to(ROOT.parent).with_suffix("").parts))
    wrong = []
    for name in imported(path):
        if not name.startswith("gmdist."):
            continue
        inner = name.removeprefix("gmdist.")
        if inner.split(".")[0] in (room, "errors", "checks", "__version__"):
            continue
        if not any(inner == allowed or inner.startswith(allowed + ".") for allowed in ALLOWED[room]):
            wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    if path != ROOT / "__init__.py":
        assert forbidden(path) == []


def test_the_check_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "gmdist" / "nets" / "wrong.py"
    wrong.parent.mkdir(parents=True)
    wrong.write_text("def f():\n    from gmdist.train.ema import EMA\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path / "gmdist")
    assert forbidden(wrong) == ["nets/wrong.py imports gmdist.train.ema.EMA"]


@pytest.mark.parametrize(("library", "where"), SOLE_IMPORTERS.items())
def test_one_importer(library: str, where: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(name == library or name.startswith(library + ".") for name in imported(path))
    }
    assert users
    assert all(user.startswith(where) for user in users), users


def import_problem(modules: list[str], without: list[str]) -> str:
    """What goes wrong where some modules are imported on a machine that lacks some libraries; "" if nothing does."""
    code = "import sys\n" + "".join(f"sys.modules[{library!r}] = None\n" for library in without)
    code += "".join(f"import {module}\n" for module in modules)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return ended.stderr


def test_training_packages_import_without_ray_and_deepspeed() -> None:
    rooms = {
        "train",
        "families",
        "nets",
        "interchange",
        "diffusion",
        "data",
        "evaluation",
        "evaluator",
        "runs",
        "start",
    }
    modules = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in FILES]
    chosen = [module for module in modules if room_of(module) in rooms and not module.endswith("__init__")]
    assert len(chosen) > 40
    assert import_problem(chosen, ["ray", "deepspeed", "boto3", "torchvision"]) == ""


def test_the_mailbox_starts_without_torch() -> None:
    assert import_problem(["gmdist.launch.mailbox"], ["torch", "numpy"]) == ""
    assert "torch" in import_problem(["gmdist.train.trainer"], ["torch"])
