"""What `ray up` makes of the cluster files: Ray's own launcher, with moto for AWS and a list of commands for SSH."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLOUDS = ("aws", "gcp")
TOKEN = "0123456789abcdef" * 4


def load(cloud: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f"cluster/{cloud}.yaml").read_text())


@pytest.fixture(params=CLOUDS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A cluster file, as Ray completes and checks it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(load(request.param))
    validate_config(prepared)
    return prepared


def all_commands(config: dict[str, Any]) -> list[str]:
    """Those of the head and of workers, with what Ray's defaults add."""
    keys = ("initialization_commands", "head_setup_commands", "worker_setup_commands")
    keys += ("head_start_ray_commands", "worker_start_ray_commands")
    return [command for key in keys for command in config[key]]


def starts(config: dict[str, Any]) -> list[str]:
    found = [command for command in all_commands(config) if "ray start" in command]
    assert len(found) == 2
    return found


def test_ray_takes_the_file(config: dict[str, Any]):
    head, workers = (config["available_node_types"][name] for name in ("head", "gpu"))
    assert head["max_workers"] == 0
    assert head["resources"] == {"CPU": 0}  # or a worker without a GPU would be placed there
    assert 0 < workers["min_workers"] < workers["max_workers"] <= config["max_workers"]
    assert workers["resources"]["GPU"] == 1


def test_a_slip_is_refused():
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError, match="setup_command"):
        validate_config(prepare_config(load("aws") | {"setup_command": []}))


def test_every_ray_asks_for_the_token_and_the_dashboard_is_not_open(config: dict[str, Any]):
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for command in starts(config):
        assert re.search(r"export [^;]*RAY_AUTH_MODE=token[^;]*; ray start", command)
    (head,) = [command for command in starts(config) if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in head
    assert "RAY_JOB_STOP_WAIT_TIME_S=60" in head  # or a stopped run has 3 s to save
    assert "chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token" in config["worker_setup_commands"]


def test_every_worker_waits_for_the_word_of_its_cloud(config: dict[str, Any]):
    cloud = config["provider"]["type"]
    assert config["file_mounts"]["~/gmdist/drain.sh"] == "cluster/drain.sh"
    last = config["worker_start_ray_commands"][-1]
    assert f"bash ~/gmdist/drain.sh {cloud} >" in last
    assert "RAY_AUTH_MODE=token" in last
    assert "setsid --fork" in last  # or it would end with the connection that starts it, or hold that up
    assert not any("drain.sh" in command for command in config["head_start_ray_commands"])


def test_commands_are_shell(config: dict[str, Any]):
    for command in all_commands(config):
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, f"{command}: {checked.stderr}"


def test_packages_are_those_that_are_locked(config: dict[str, Any]):
    """pip outside of the environment is refused by Ubuntu 24.04, and a package by name has any version."""
    installs = [command for command in all_commands(config) if "pip install" in command]
    assert installs
    for command in installs:
        (name,) = re.findall(r"^~/venv/bin/pip install .*-r ~/gmdist/(\S+)$", command)
        assert config["file_mounts"][f"~/gmdist/{name}"] == name
        lines = (ROOT / name).read_text().splitlines()
        assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines if line)


def test_no_key_is_in_the_file_and_machines_have_their_own_role(config: dict[str, Any]):
    text = (ROOT / f"cluster/{config['provider']['type']}.yaml").read_text()
    assert not re.search(r"AKIA|PRIVATE KEY|secret_access_key|private_key|gcp_credentials|aws_credentials", text)
    roles = []
    for node_type in config["available_node_types"].values():
        node = node_type["node_config"]
        roles.append(node["IamInstanceProfile"]["Name"] if "ImageId" in node else node["serviceAccounts"][0]["email"])
    assert [role.partition("@")[0] for role in roles] == ["gmdist-head", "gmdist-worker"]


# AWS: the whole of `ray up`, and what the head then does for its workers.


@dataclass
class Remote:
    """In place of ssh and rsync: what would have been run and sent, by address."""

    commands: list[tuple[str, str]] = field(default_factory=list)
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def check_call(self, words: list[str], *_: Any, **__: Any) -> None:
        if words[0] == "rsync":
            source, target = words[-2:]
            address, _, path = target.partition(":")
            if Path(source).exists():
                self.files[address, path] = Path(source).read_bytes()
            return
        (address,) = [word for word in words if word.startswith("ubuntu@")]
        shell = " ".join(words[words.index(address) + 1 :])  # as ssh joins them for the shell of the other machine
        self.commands.append((address, shlex.split(shell)[-1]))

    def check_output(self, words: list[str], *_: Any, **__: Any) -> bytes:
        self.check_call(words)
        return b""

    call = check_call

    def at(self, address: str) -> list[str]:
        return [command for there, command in self.commands if there == address]


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An account with the two roles, in this process; a home with a token."""
    import boto3
    from moto import mock_aws
    from moto.ec2.models import instance_types
    from ray.autoscaler._private.aws import config, node_provider, utils

    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text(TOKEN)
    caches = (utils.resource_cache, utils.client_cache, config._get_subnets_or_die)
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(home))
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.chdir(ROOT)
        for cached in caches:
            cached.cache_clear()
        used = {node_type["node_config"]["InstanceType"] for node_type in load("aws")["available_node_types"].values()}
        offered = {name: instance_types.INSTANCE_TYPES[name] for name in used}  # Ray lists all: of 900 it takes 20 s
        patch.setattr(instance_types, "INSTANCE_TYPES", offered)
        patch.setattr(node_provider, "TAG_BATCH_DELAY", 0.01)
        for name in ("gmdist-head", "gmdist-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=name)
        yield boto3.client("ec2", "us-east-1")
    for cached in caches:
        cached.cache_clear()


@pytest.fixture(scope="module")
def up(aws: Any) -> tuple[Any, Remote, dict[str, Any]]:
    """EC2 after `ray up cluster/aws.yaml` and the start of two workers; what was run; the head's own config."""
    from ray.autoscaler._private import commands
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
    from ray.core.generated.instance_manager_pb2 import Instance

    remote = Remote()
    resolved = commands._bootstrap_config(load("aws"), no_config_cache=True)
    commands.get_or_create_head_node(resolved, "cluster/aws.yaml", False, False, True, None, _runner=remote)

    ((_, sent),) = [(key, content) for key, content in remote.files.items() if key[1].endswith("bootstrap_config.yaml")]
    on_head = json.loads(sent)
    provider = AWSNodeProvider(on_head["provider"], on_head["cluster_name"])
    tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: "gpu"}
    for _ in range(2):
        provider.create_node(on_head["available_node_types"]["gpu"]["node_config"], tags, 1)
    mounts = on_head["file_mounts"]  # on the head they lie under its home, as on this machine
    on_head = on_head | {"file_mounts": {target: load("aws")["file_mounts"][target] for target in mounts}}
    installer = RayInstaller(provider, AutoscalingConfig(on_head), remote)
    for node in provider.non_terminated_nodes(tags):
        installer.install_ray(Instance(instance_type="gpu", cloud_instance_id=node), "10.0.0.1")
    return aws, remote, on_head


def machines(ec2: Any) -> dict[str, list[dict[str, Any]]]:
    """Those that run, by the name of their role."""
    found: dict[str, list[dict[str, Any]]] = {}
    for reservation in ec2.describe_instances()["Reservations"]:
        for machine in reservation["Instances"]:
            found.setdefault(machine["IamInstanceProfile"]["Arn"].partition("/")[2], []).append(machine)
    return found


def test_ray_up_on_aws(up: tuple[Any, Remote, dict[str, Any]]):
    """From nothing to a head and two spot workers that were given the token, the packages and Ray."""
    ec2, remote, on_head = up
    (head,), workers = (machines(ec2)[name] for name in ("gmdist-head", "gmdist-worker"))
    assert len(workers) == 2
    assert all(worker["InstanceLifecycle"] == "spot" for worker in workers)
    assert "InstanceLifecycle" not in head
    for machine in (head, *workers):
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert "base-oss-nvidia-driver-gpu-ubuntu-24.04" in machine["ImageId"]

    # The head is reached from outside, the workers from the head.
    addresses = [f"ubuntu@{head['PublicIpAddress']}", *(f"ubuntu@{worker['PrivateIpAddress']}" for worker in workers)]
    for address in addresses:
        assert remote.files[address, "~/.ray/auth_token"].decode() == TOKEN
        assert remote.files[address, "~/gmdist/requirements.txt"] == (ROOT / "requirements.txt").read_bytes()
        ran = " ".join(remote.at(address))
        for wanted in ("chmod 600 ~/.ray/auth_token", "-r ~/gmdist/requirements.txt", "RAY_AUTH_MODE=token"):
            assert ran.index(wanted) < ran.index("ray start")
        assert TOKEN not in ran  # other users of a machine see the words of commands
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in remote.at(addresses[0])[-1]
    for address in addresses[1:]:
        *_, started, watched = remote.at(address)
        assert "RAY_HEAD_IP=10.0.0.1" in started
        assert '"GPU":1' in started
        assert remote.files[address, "~/gmdist/drain.sh"] == (ROOT / "cluster/drain.sh").read_bytes()
        assert "bash ~/gmdist/drain.sh aws" in watched
    assert TOKEN not in json.dumps(on_head)


def test_only_ssh_is_open_on_aws(up: tuple[Any, Remote, dict[str, Any]]):
    ec2, *_ = up
    (group,) = ec2.describe_security_groups(GroupNames=["gmdist"])["SecurityGroups"]
    outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"]]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in outside] == [("tcp", 22, 22)]
    for found in machines(ec2).values():
        for machine in found:
            assert [own["GroupName"] for own in machine["SecurityGroups"]] == ["gmdist"]


# Google Cloud: its client has no double, but it carries the definitions of what it sends.


def test_google_knows_every_field():
    documents = pytest.importorskip("googleapiclient.discovery_cache.documents", reason="requirements-gcp.txt")
    schemas = json.loads((Path(documents.__path__[0]) / "compute.v1.json").read_text())["schemas"]

    def check(value: Any, schema: dict[str, Any], place: str) -> None:
        schema = schemas[schema["$ref"]] if "$ref" in schema else schema
        if schema["type"] == "object":
            for key, inner in value.items():
                assert key in schema["properties"], f"{place}.{key}"
                check(inner, schema["properties"][key], f"{place}.{key}")
        elif schema["type"] == "array":
            for i, inner in enumerate(value):
                check(inner, schema["items"], f"{place}[{i}]")
        else:
            assert "enum" not in schema or value in schema["enum"], f"{place}: {value}"

    for name, node_type in load("gcp")["available_node_types"].items():
        check(node_type["node_config"], schemas["Instance"], name)


def test_workers_on_google_cloud_are_spot():
    head, workers = (load("gcp")["available_node_types"][name]["node_config"] for name in ("head", "gpu"))
    assert workers["scheduling"]["provisioningModel"] == "SPOT"
    assert workers["scheduling"]["onHostMaintenance"] == "TERMINATE"  # machines with GPUs cannot be moved
    assert "scheduling" not in head
    assert all(disk["autoDelete"] for node in (head, workers) for disk in node["disks"])


def test_the_key_of_the_bucket_is_asked_for_and_kept_private():
    """boto3 has no way to sign in as a service account, so nodes have a key, which is in no file here."""
    (command,) = [command for command in load("gcp")["setup_commands"] if "credentials" in command]
    assert command.startswith("(umask 077 && gcloud secrets versions access")
    (written,) = [command for command in load("gcp")["setup_commands"] if "~/.aws/config" in command]
    assert "endpoint_url = https://storage.googleapis.com" in written
