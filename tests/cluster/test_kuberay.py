"""What KubeRay and Kubernetes are given: only fields they know, no secret, no root, nobody without the token."""

import dataclasses
import functools
import importlib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

ROOT = Path(__file__).parents[2]
NAMES = ("raycluster", "rayjob")
_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean"}


@pytest.fixture(params=NAMES)
def manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(request.param)


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f"cluster/kuberay/{name}.yaml").read_text())


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pods that are described: the head's, the workers', the one that submits."""
    cluster = cluster_of(manifest)
    yield cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]["spec"]
    if "submitterPodTemplate" in manifest["spec"]:
        yield manifest["spec"]["submitterPodTemplate"]["spec"]


def containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for pod in pods(manifest) for container in pod["containers"]]


def ray_containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for container in containers(manifest) if container["name"] != "ray-job-submitter"]


def limits(container: dict[str, Any]) -> dict[str, str]:
    return container["resources"]["limits"]


# Schemas. Kubernetes' own types are the dataclasses of lightkube-models, which are generated from its OpenAPI.


@functools.cache
def kubernetes(group: str) -> types.ModuleType:
    """Types of a group: core_v1, networking_v1."""
    name = "lightkube.core.schema"  # of a client, of which its models take these two from dataclasses and one more
    if name not in sys.modules:
        schema: Any = types.ModuleType(name)
        schema.dataclass, schema.field, schema.DictMixin = dataclasses.dataclass, dataclasses.field, object
        sys.modules[name] = schema
    return importlib.import_module(f"lightkube.models.{group}")


def schema_of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a type; those of dataclasses go into `definitions`, and allow no other field."""
    arguments = [argument for argument in typing.get_args(hint) if argument is not types.NoneType]
    origin = typing.get_origin(hint)
    if origin is typing.Union:
        options = [schema_of(argument, definitions) for argument in arguments]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if origin is list:
        return {"type": "array", "items": schema_of(arguments[0], definitions)}
    if origin is dict:  # of quantities and labels; without arguments of what it likes
        return {"type": "object"} | (
            {"additionalProperties": schema_of(arguments[1], definitions)} if arguments else {}
        )
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if not dataclasses.is_dataclass(hint):
        return {}
    name = f"{hint.__module__.rpartition('.')[2]}.{hint.__name__}"
    if name not in definitions:
        definitions[name] = own = {"type": "object", "additionalProperties": False, "properties": {}, "required": []}
        hints = typing.get_type_hints(hint)
        for field in dataclasses.fields(hint):
            key = field.metadata.get("json", field.name)
            own["properties"][key] = schema_of(hints[field.name], definitions)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                own["required"].append(key)
    return {"$ref": f"#/definitions/{name}"}


def closed(schema: Any) -> Any:
    """The schema in which every object has its own properties and no others."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        schema.setdefault("additionalProperties", False)
    if schema.pop("x-kubernetes-int-or-string", False):
        schema |= {"type": ["integer", "string"]}
        schema.pop("anyOf", None)
    return schema


@functools.cache
def own_schema(kind: str) -> dict[str, Any]:
    """That of `kuberay.schema.json`, with the pods of Kubernetes."""
    schema = closed(json.loads((ROOT / "tests/cluster/kuberay.schema.json").read_text()))
    for name in ("PodTemplateSpec", "Service"):
        schema_of(getattr(kubernetes("core_v1"), name), schema["definitions"])
    schema["properties"]["spec"] = {"$ref": f"#/definitions/{kind}"}
    return schema


def problems(manifest: dict[str, Any]) -> list[str]:
    """Where the manifest has what the schema has not."""
    return told(own_schema(manifest["kind"]), manifest)


def told(schema: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in Draft7Validator(schema).iter_errors(manifest)]


def test_every_field_is_known(manifest: dict[str, Any]):
    assert problems(manifest) == []


@pytest.mark.parametrize(
    ("path", "value", "seen"),
    [
        ("spec.entryPoint", "python", "entryPoint"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens", "tokens"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", "2", "'2' is not of type 'integer'"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type 'string'"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.securityContext.runAsNonroot", True, "runAsNonroot"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.env.0.valuefrom", {}, "valuefrom"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.env.0.value", 60, "60 is not of type"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.volumes.0.emptyDir.sizelimit", "1Gi", "sizelimit"),
    ],
)
def test_a_slip_is_seen(path: str, value: Any, seen: str):
    slipped = json.loads(json.dumps(load("rayjob")))  # nothing in it is there twice, as YAML's anchors have it
    *above, last = path.split(".")
    place = slipped
    for key in above:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = value
    assert any(seen in problem for problem in problems(slipped)), problems(slipped)


def test_the_definitions_of_a_cluster_agree_too(manifest: dict[str, Any]):
    """Against KubeRay's own definitions: GMDIST_KUBERAY_CRDS=<helm chart>/crds, or a folder of `kubectl get crd`."""
    folder = os.environ.get("GMDIST_KUBERAY_CRDS")
    if not folder:
        pytest.skip("GMDIST_KUBERAY_CRDS names no folder with KubeRay's definitions")
    (path,) = Path(folder).glob(f"*{manifest['kind'].lower()}s*.yaml")
    versions = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = [item["schema"]["openAPIV3Schema"] for item in versions if item["name"] == "v1"]
    schema = closed(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    assert told(schema, manifest) == []


# What nobody may get wrong.


def test_only_who_has_the_token_may_ask(manifest: dict[str, Any]):
    cluster = cluster_of(manifest)
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not cluster["headGroupSpec"].get("enableIngress")
    for container in ray_containers(manifest):  # KubeRay's own, unless a container has others
        assert not {entry["name"] for entry in container["env"]} & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def test_secrets_are_named_and_never_written(manifest: dict[str, Any]):
    for container in containers(manifest):
        for entry in container.get("env", []):
            sounds_secret = re.search("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", entry["name"])
            assert not sounds_secret or "secretKeyRef" in entry["valueFrom"], entry["name"]
    for container in ray_containers(manifest):
        assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["gmdist-bucket"]
    assert "KEY" not in manifest["spec"].get("runtimeEnvYAML", "")


def test_no_container_is_root_or_may_become_it(manifest: dict[str, Any]):
    for pod in pods(manifest):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
        assert not any("hostPath" in volume for volume in pod.get("volumes", []))
    contexts = [container["securityContext"] for container in containers(manifest)]
    for context in [*contexts, cluster_of(manifest)["autoscalerOptions"]["securityContext"]]:
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_user_is_that_of_the_image(manifest: dict[str, Any]):
    (user,) = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "cluster/Dockerfile").read_text(), re.MULTILINE)
    for pod in pods(manifest):
        assert (str(pod["securityContext"]["runAsUser"]), str(pod["securityContext"]["runAsGroup"])) == user


def test_shared_memory_is_memory(manifest: dict[str, Any]):
    """A pod's own /dev/shm has 64 MB: Ray would put its objects on a disk."""
    from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION

    for container in ray_containers(manifest):
        (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        (pod,) = [pod for pod in pods(manifest) if container in pod["containers"]]
        (volume,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == name]
        assert volume["medium"] == "Memory"
        memory, limit = (int(text.removesuffix("Gi")) for text in (volume["sizeLimit"], limits(container)["memory"]))
        assert DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * limit <= memory < limit / 2  # Ray takes so much of the limit


def test_a_stopped_run_has_the_time_to_save(manifest: dict[str, Any]):
    for container in ray_containers(manifest):
        waits = {entry["name"]: entry["value"] for entry in container["env"]}
        assert waits["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    for pod in list(pods(manifest))[:2]:
        assert pod["terminationGracePeriodSeconds"] > 60
    for group in cluster_of(manifest)["workerGroupSpecs"]:  # a pod that has to go: Ray is told before it gets a signal
        (worker,) = group["template"]["spec"]["containers"]
        *shell, path, mode, most_s = worker["lifecycle"]["preStop"]["exec"]["command"]
        assert (shell, path, mode) == (["bash"], "/opt/gmdist/cluster/drain.sh", "now")
        assert int(most_s) < group["template"]["spec"]["terminationGracePeriodSeconds"] - 20


def test_workers_are_on_gpus_and_not_on_the_head(manifest: dict[str, Any]):
    cluster = cluster_of(manifest)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    assert 0 < group["minReplicas"] == group["replicas"] < group["maxReplicas"]
    (worker,) = group["template"]["spec"]["containers"]
    assert limits(worker)["nvidia.com/gpu"] == "1"
    assert worker["resources"]["requests"] == limits(worker)


def test_versions_and_images_agree(manifest: dict[str, Any]):
    assert cluster_of(manifest)["rayVersion"] == version("ray")
    (image,) = {container["image"] for container in containers(manifest)}
    assert re.fullmatch(r"[^:]+:(?!latest)[\w.]+", image)
    assert image in (ROOT / "cluster/Dockerfile").read_text()


def test_the_job_is_a_run_that_its_cluster_has_room_for():
    """Its command is checked as `gmdist train` checks it, and its workers are counted as gmdist counts them."""
    from gmdist.config import load as load_config

    manifest = load("rayjob")
    words = manifest["spec"]["entrypoint"].split()
    assert words[:3] == ["exec", "python", "jobs/train.py"]  # without `exec` a shell would get the signal of a stop
    config = load_config(str(ROOT / words[3]), words[4:])
    (group,) = cluster_of(manifest)["workerGroupSpecs"]
    there = limits(group["template"]["spec"]["containers"][0])
    assert config.cluster.gpus_per_worker == int(there["nvidia.com/gpu"])
    assert config.cluster.cpus_per_worker <= int(there["cpu"])
    assert config.cluster.worker_range[0] <= group["minReplicas"]
    assert config.run.dir.startswith("s3://")
    assert manifest["spec"]["shutdownAfterJobFinishes"] is True


def test_other_namespaces_do_not_reach_the_nodes():
    """Metrics ask for no token."""
    policy = load("networkpolicy")
    definitions: dict[str, Any] = {}
    reference = schema_of(kubernetes("networking_v1").NetworkPolicy, definitions)
    assert told(reference | {"definitions": definitions}, policy) == []
    spec = policy["spec"]
    assert spec["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}  # KubeRay's label of all of Ray's pods
    assert spec["policyTypes"] == ["Ingress"]
    (rule,) = spec["ingress"]
    assert [list(source) for source in rule["from"]] == [["podSelector"], ["namespaceSelector"]]
    assert rule["from"][1]["namespaceSelector"]["matchLabels"]
