"""A real S3 server for tests and benchmarks: OpenStack Swift with its S3 layer, on loopback, in a folder of its own.

It is run by the Python of a virtual environment that has Swift (`make s3-server`), and imports nothing of gmdist. It
prints the settings that reach it, serves until it is told to stop, and then deletes what it stored.
"""

import argparse
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCESS_KEY, SECRET_KEY, REGION = "test:tester", "testing", "us-east-1"
START_S = 60.0

PROXY = """
[pipeline:main]
pipeline = catch_errors cache listing_formats s3api tempauth bulk slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{unused}
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = {region}
s3_acl = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""

STORE = """
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""


def free_port() -> int:
    """A port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def configure(root: Path, port: int) -> list[list[str]]:
    """Write the rings and the configs of Swift's four servers; returns the commands that run them."""
    tools = Path(sys.executable).parent
    (root / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = gmdist\n")
    (root / "devices" / "d1").mkdir(parents=True)
    user = pwd.getpwuid(os.getuid()).pw_name
    shared = f"bind_ip = 127.0.0.1\nswift_dir = {root}\nuser = {user}\nworkers = 0\nlog_level = ERROR\n"
    commands = []
    for name in ("account", "container", "object"):
        own_port = free_port()
        for step in (["create", "6", "1", "0"], ["add", f"r1z1-127.0.0.1:{own_port}/d1", "1"], ["rebalance"]):
            builder = [str(tools / "swift-ring-builder"), f"{name}.builder", *step]
            subprocess.run(builder, cwd=root, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        store = f"devices = {root}/devices\nmount_check = false\nfallocate_reserve = 0\nbind_port = {own_port}\n"
        (root / f"{name}.conf").write_text(f"[DEFAULT]\n{shared}{store}{STORE.format(name=name)}")
        commands.append([str(tools / f"swift-{name}-server"), str(root / f"{name}.conf")])
    proxy = PROXY.format(unused=free_port(), region=REGION)
    (root / "proxy.conf").write_text(f"[DEFAULT]\n{shared}bind_port = {port}\n{proxy}")
    return [*commands, [str(tools / "swift-proxy-server"), str(root / "proxy.conf")]]


def wait_until_it_answers(port: int, servers: list["subprocess.Popen[bytes]"]) -> None:
    """Return when the proxy answers; SystemExit if a server has ended or none answers in time."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for server in servers:
            if server.poll() is not None:
                raise SystemExit(f"{server.args}: ended with exit code {server.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
        except urllib.error.HTTPError:  # it refuses whoever does not sign
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"no S3 server answers on port {port} after {START_S:.0f} s")


def main() -> None:
    """Serve until SIGINT or SIGTERM, or until whoever started it is gone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    port = parser.parse_args().port or free_port()
    parent = os.getppid()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    root = Path(tempfile.mkdtemp(prefix="gmdist-s3-"))
    servers: list[subprocess.Popen[bytes]] = []
    try:
        environment = os.environ | {"PYTHONWARNINGS": "ignore"}
        for command in configure(root, port):
            servers.append(subprocess.Popen(command, cwd=root, env=environment, start_new_session=True))
        wait_until_it_answers(port, servers)
        print(f"AWS_ENDPOINT_URL=http://127.0.0.1:{port}")
        print(f"AWS_ACCESS_KEY_ID={ACCESS_KEY} AWS_SECRET_ACCESS_KEY={SECRET_KEY} AWS_REGION={REGION}", flush=True)
        while os.getppid() == parent:
            time.sleep(1.0)
    except KeyboardInterrupt:
        pass
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(timeout=30)
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
