"""One live command a folder: a file that its command renews, and that others read before they begin."""

import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gmdist import storage
from gmdist.errors import ConfigError, FolderLostError, StorageError

LEASE_NAME = "lease.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RENEWED_S = 5.0
_SETTLES_S = 0.5  # longer than it takes from looking at a lease to having written one
_EXPIRES_S = 20.0  # after the last renewal that was seen: clocks of other machines are not asked


@contextmanager
def held(
    run_dir: str, on_message: Callable[[str], None], on_lost: Callable[[], None] = lambda: None
) -> Iterator["Lease"]:
    """Have a folder alone, a run's or of samples, once the lease that this gives is confirmed.

    Args:
        run_dir: the folder.
        on_message: called with a line that the user should read.
        on_lost: called when somebody else has taken the lease, because this process did not get to renew it; from then
            on `Lease.check` raises.

    Raises:
        ConfigError: another live run has it.
    """
    location = storage.join(run_dir, LEASE_NAME)
    _wait_until_free(location, on_message)
    with without_empty_folders(run_dir):
        lease = Lease(location, on_lost)
        try:
            yield lease
        finally:
            lease.release()


@contextmanager
def without_empty_folders(folder: str) -> Iterator[None]:
    """Delete a local folder, and those that it is in, if they are made while this holds and are empty afterwards."""
    path = Path(folder).absolute()
    made = [] if storage.is_s3(folder) else [place for place in (path, *path.parents) if not os.path.exists(place)]
    try:
        yield
    finally:
        with suppress(OSError):  # something was written
            for place in made:
                place.rmdir()


class Lease:
    """A file in a run's folder that says who is at work there, written anew every few seconds."""

    def __init__(self, location: str, on_lost: Callable[[], None]) -> None:
        self._location, self._on_lost = location, on_lost
        self._own = {
            "id": uuid.uuid4().hex,
            "user": _user(),
            "host": socket.gethostname(),
            "namespace": _namespace(),
            "pid": os.getpid(),
            "process": _process_key(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._beats = 0
        self._lost = threading.Event()
        self._released = threading.Event()
        self._write()
        self._written_s = time.monotonic()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        self._beats += 1
        storage.write(self._location, json.dumps(self._own | {"beats": self._beats}).encode())

    def confirm(self) -> None:
        """ConfigError if another command took the lease at the same moment: the one that wrote last has it."""
        time.sleep(max(0.0, self._written_s + _SETTLES_S - time.monotonic()))
        found = _read(self._location)
        if found is not None and found.get("id") != self._own["id"]:
            raise _in_use(self._location, found)

    def check(self) -> None:
        """FolderLostError if somebody else has taken it."""
        if self._lost.is_set():
            raise folder_lost(_folder(self._location))

    def _renew(self) -> None:
        while not self._released.wait(_RENEWED_S):
            with suppress(StorageError):  # the run itself says what is wrong with the storage
                found = _read(self._location)
                if found is not None and found.get("id") != self._own["id"]:
                    self._lost.set()
                    self._on_lost()
                    return
                self._write()

    def release(self) -> None:
        """Give it back, unless another command has it."""
        self._released.set()
        self._thread.join()
        with suppress(StorageError):
            found = _read(self._location)
            if found is not None and found.get("id") == self._own["id"]:
                storage.delete(self._location)


def folder_lost(folder: str) -> FolderLostError:
    """What a command says whose lease another one has taken."""
    return FolderLostError(
        f"{folder}: another command has taken the folder, as this one did not get to say that it is there for "
        f"{_EXPIRES_S:.0f} s; what it had finished is there, and the other goes on from it"
    )


def _wait_until_free(location: str, on_message: Callable[[str], None]) -> None:
    found = _read(location)
    if found is None or _is_dead(found):
        return
    if _is_here(found):
        raise _in_use(location, found)
    on_message(
        f"{location}: left by a command on {found.get('host')}; waiting {_EXPIRES_S:.0f} s to see whether it still runs"
    )
    deadline_s = time.monotonic() + _EXPIRES_S
    while time.monotonic() < deadline_s:
        time.sleep(0.5)
        now = _read(location)
        if now is None:
            return
        if now != found:
            raise _in_use(location, now)


def _in_use(location: str, found: dict[str, Any]) -> ConfigError:
    holder = f"process {found.get('pid')} of {found.get('user')} on {found.get('host')}, since {found.get('since')}"
    return ConfigError(
        f"{_folder(location)}: in use by another command ({holder}); wait for it, or choose another folder"
    )


def _folder(location: str) -> str:
    return location.removesuffix(f"/{LEASE_NAME}")


def _read(location: str) -> dict[str, Any] | None:
    try:
        found = json.loads(storage.read(location))
    except FileNotFoundError:
        return None
    except ValueError:  # nobody writes such a thing
        return {}
    return found if isinstance(found, dict) else {}


def _is_here(found: dict[str, Any]) -> bool:
    is_here = (found.get("host"), found.get("namespace")) == (socket.gethostname(), _namespace())
    return is_here and isinstance(found.get("pid"), int)


def _is_dead(found: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    return not found or (_is_here(found) and found.get("process") != _process_key(found["pid"]))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _namespace() -> str:
    """Tells the process numbers of containers apart, and of machines of the same name."""
    try:
        return f"{_BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_key(pid: int) -> str | None:
    """Tells a process from others of the same number; None if there is none."""
    try:
        boot = _BOOT_ID.read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None if Path("/proc/self").exists() else _key_without_proc(pid)
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"


def _key_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return str(pid)
