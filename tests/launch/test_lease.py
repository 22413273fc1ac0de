"""One live run a folder: others are refused by name, what a killed one left is taken over."""

import getpass
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gmdist import storage
from gmdist.errors import ConfigError, FolderLostError
from gmdist.launch import lease
from gmdist.launch.lease import LEASE_NAME, held

HOLDS = """
import sys, time
from gmdist.launch.lease import held
with held(sys.argv[1], print, print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEWED_S", 0.05)
    monkeypatch.setattr(lease, "_EXPIRES_S", 1.0)
    monkeypatch.setattr(lease, "_SETTLES_S", 0.0)


def ignore(*_: object) -> None:
    return


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_it_is_there_while_it_is_held_and_renewed(kind: str, tmp_path: Path, request) -> None:
    run_dir = str(tmp_path)
    if kind == "s3":
        request.getfixturevalue("bucket")
        run_dir = "s3://pictures/run"
    location = storage.join(run_dir, LEASE_NAME)
    with held(run_dir, ignore, ignore):
        beats = []
        while len(beats) < 3:
            found = json.loads(storage.read(location))["beats"]
            if found not in beats:
                beats.append(found)
        words = rf"in use by another command \(process {os.getpid()} of .* on .*, since 20"
        with pytest.raises(ConfigError, match=words), held(run_dir, ignore, ignore):
            pass
        assert storage.exists(location)
    assert not storage.exists(location)
    with held(run_dir, ignore, ignore):
        pass


def test_what_a_killed_process_of_this_machine_left_is_taken_over_at_once(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {holder.pid} "), held(str(tmp_path), ignore, ignore):
        pass
    holder.kill()
    holder.wait()
    messages: list[str] = []
    with held(str(tmp_path), messages.append, ignore):
        assert json.loads((tmp_path / LEASE_NAME).read_text())["pid"] == os.getpid()
    assert messages == []


def elsewhere(tmp_path: Path, beats: int) -> None:
    content = {"id": "other", "host": "machine-7", "user": "ada", "pid": 12, "since": "2026-11-21", "beats": beats}
    storage.write(str(tmp_path / LEASE_NAME), json.dumps(content).encode())


def test_a_run_on_another_machine_is_watched_before_it_is_believed_dead(tmp_path: Path) -> None:
    elsewhere(tmp_path, 1)
    messages: list[str] = []
    with held(str(tmp_path), messages.append, ignore):
        pass
    assert len(messages) == 1
    assert "left by a command on machine-7; waiting" in messages[0]


def test_a_machine_of_the_same_name_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(str(tmp_path), ignore, ignore):
        content = (tmp_path / LEASE_NAME).read_text()
    (tmp_path / LEASE_NAME).write_text(content)
    other_boot = tmp_path / "boot_id"
    other_boot.write_text("5ac1d0de\n")
    monkeypatch.setattr(lease, "_BOOT_ID", other_boot)
    messages: list[str] = []
    with held(str(tmp_path), messages.append, ignore):
        pass
    assert len(messages) == 1
    assert "waiting" in messages[0]


def test_a_run_on_another_machine_that_lives_is_not_disturbed(tmp_path: Path) -> None:
    elsewhere(tmp_path, 1)
    beating = threading.Timer(0.3, elsewhere, (tmp_path, 2))
    beating.start()
    words = "process 12 of ada on machine-7, since 2026-11-21"
    with pytest.raises(ConfigError, match=words), held(str(tmp_path), ignore, ignore):
        pass
    assert json.loads((tmp_path / LEASE_NAME).read_text())["id"] == "other"


def test_whoever_loses_it_is_told_and_leaves_it(tmp_path: Path) -> None:
    lost = threading.Event()
    with held(str(tmp_path), ignore, lost.set) as own:
        own.check()
        deadline = time.monotonic() + 10
        while not lost.wait(0.1):  # who writes between a holder's look and its renewal does not get it
            assert time.monotonic() < deadline
            elsewhere(tmp_path, 1)
        with pytest.raises(FolderLostError, match=f"^{tmp_path}: another command has taken the folder"):
            own.check()
    assert json.loads((tmp_path / LEASE_NAME).read_text())["id"] == "other"


def test_a_user_without_a_name_has_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(getpass, "getuser", nameless)
    with held(str(tmp_path), ignore, ignore):
        assert json.loads((tmp_path / LEASE_NAME).read_text())["user"] == str(os.getuid())


def test_a_folder_that_was_made_for_it_alone_goes_with_it(tmp_path: Path) -> None:
    for there, written in ((False, False), (False, True), (True, False)):
        run_dir = tmp_path / f"{there}-{written}/in/run"
        if there:
            run_dir.mkdir(parents=True)
        with held(str(run_dir), ignore, ignore):
            if written:
                (run_dir / "config.yaml").touch()
        assert run_dir.exists() == run_dir.parent.parent.exists() == (there or written)
    assert tmp_path.exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"pid": 1}'])
def test_a_damaged_one_does_no_harm(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LEASE_NAME).write_bytes(content)
    with held(str(tmp_path), ignore, ignore):
        assert json.loads((tmp_path / LEASE_NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LEASE_NAME).exists()


def test_of_commands_that_come_at_the_same_moment_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_SETTLES_S", 0.3)
    monkeypatch.setattr(lease, "_is_here", lambda found: False)  # threads of one process are not told apart otherwise
    together, inside, refused = threading.Barrier(4), [], []

    def command() -> None:
        together.wait()
        try:
            with held(str(tmp_path), ignore, ignore) as own:
                own.confirm()
                inside.append(1)
                time.sleep(0.5)
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=command) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == 1
    assert len(refused) == 3
