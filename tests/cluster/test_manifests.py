"""Cluster manifests: fields that exist, versions that agree, commands that parse. No cluster is made from them."""

import copy
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import ray
import yaml
from packaging.requirements import Requirement

from prefixquant.pipeline.recipe import load_recipe
from prefixquant.pipeline.submission import SubmitOptions, job_spec

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "cluster" / "manifests"
PINS = dict(
    line.split("==") for line in (MANIFESTS / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"registry.example.com/prefixquant:{PROJECT['version']}"

# The fields we use, of the types that https://ray-project.github.io/kuberay/reference/api/ gives them. KubeRay drops
# unknown ones without a word, so a misspelt field would be a setting that does nothing.
POD = {
    "containers": [
        {
            "name": str,
            "image": str,
            "ports": [{"name": str, "containerPort": int}],
            "env": [{"name": str, "value": str}],
            "envFrom": [{"secretRef": {"name": str, "optional": bool}}],
            "resources": {kind: {"cpu": str, "memory": str, "nvidia.com/gpu": str} for kind in ("requests", "limits")},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim": {"claimName": str},
            "emptyDir": {"medium": str, "sizeLimit": str},
        }
    ],
}
CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str},
    "headGroupSpec": {"rayStartParams": {"num-cpus": str}, "template": {"spec": POD}},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": {},
            "template": {"spec": POD},
        }
    ],
}
KINDS = {
    "RayCluster": {"apiVersion": str, "kind": str, "metadata": {"name": str}, "spec": CLUSTER},
    "RayJob": {
        "apiVersion": str,
        "kind": str,
        "metadata": {"generateName": str},
        "spec": {
            "entrypoint": str,
            "runtimeEnvYAML": str,
            "backoffLimit": int,
            "shutdownAfterJobFinishes": bool,
            "ttlSecondsAfterFinished": int,
            "rayClusterSpec": CLUSTER,
        },
    },
}


def misfits(value, schema, where=""):
    """Return where a value has unknown fields or other types."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [where]
        return [
            problem
            for key, each in value.items()
            for problem in (misfits(each, schema[key], f"{where}.{key}") if key in schema else [f"{where}.{key}"])
        ]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [where]
        return [
            problem for index, each in enumerate(value) for problem in misfits(each, schema[0], f"{where}[{index}]")
        ]
    return [] if type(value) is schema else [where]


def manifest(name):
    return yaml.safe_load((MANIFESTS / name).read_text())


@pytest.fixture(params=["raycluster.yaml", "rayjob.yaml"])
def resource(request):
    return manifest(request.param)


@pytest.fixture
def cluster(resource):
    return resource["spec"] if resource["kind"] == "RayCluster" else resource["spec"]["rayClusterSpec"]


def pods(cluster):
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_kuberay_manifests_have_known_fields_of_the_right_types_only(resource):
    assert resource["apiVersion"] == "ray.io/v1"
    assert misfits(resource, KINDS[resource["kind"]]) == []


def test_misfits_finds_a_misspelt_field_and_a_number_where_kuberay_wants_text():
    wrong = manifest("raycluster.yaml")
    wrong["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    wrong["spec"]["workerGroupSpecs"][0]["replica"] = 1
    assert misfits(wrong, KINDS["RayCluster"]) == [
        ".spec.headGroupSpec.rayStartParams.num-cpus",
        ".spec.workerGroupSpecs[0].replica",
    ]


def test_kuberay_pods_run_our_image_mount_what_they_declare_and_hold_no_secret(cluster):
    assert cluster["rayVersion"] == PINS["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    for pod in pods(cluster):
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]  # Ray counts the limits
        assert [entry["name"] for entry in container["env"]] == ["HF_HOME"]
        shared = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "shared")
        assert container["env"][0]["value"].startswith(f"{shared}/")  # every node finds the model at the same path


def test_kuberay_workers_are_there_when_a_run_looks_for_gpus(cluster):
    for group in cluster["workerGroupSpecs"]:
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) >= 1


def test_the_rayjob_brings_the_cluster_that_the_raycluster_describes_and_a_run_that_parses():
    job = manifest("rayjob.yaml")["spec"]
    assert job["rayClusterSpec"] == manifest("raycluster.yaml")["spec"]
    program, command, recipe, *rest = shlex.split(job["entrypoint"])
    assert (program, command) == ("prefixquant", "run")
    overrides = rest[: rest.index("--store")]
    options = dict(zip(rest[len(overrides) :: 2], rest[len(overrides) + 1 :: 2], strict=True))
    assert options.pop("--address") == "auto"
    places = {name.removeprefix("--"): value for name, value in options.items()}
    assert job_spec(recipe, overrides, SubmitOptions(**places)).metadata["recipe"] == load_recipe(recipe).name
    assert yaml.safe_load(job["runtimeEnvYAML"]).keys() == {"env_vars"}


def test_the_ray_up_file_passes_ray_s_schema_and_ray_s_own_check():
    from jsonschema import Draft7Validator
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = manifest("ray-up.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    assert [error.message for error in Draft7Validator(schema).iter_errors(config)] == []
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["docker"]["image"] == IMAGE
    gpu = config["available_node_types"]["gpu"]
    assert 1 <= gpu["min_workers"] <= gpu["max_workers"] == config["max_workers"]
    assert gpu["resources"]["GPU"] >= 1
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_the_pins_meet_the_project_s_requirements_and_agree_with_the_makefile():
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(PINS[requirement.name.lower()]), text
    assert f"TORCH ?= torch=={PINS['torch']}\n" in (ROOT / "Makefile").read_text()
    assert not [name for name in PINS if name.startswith(("nvidia-", "triton"))]  # those are torch's own choice


def test_the_dockerfile_starts_from_the_pinned_ray_and_copies_all_that_the_project_is_built_from():
    lines = re.sub(r"\\\n\s*", "", (MANIFESTS / "Dockerfile").read_text()).splitlines()
    python = PROJECT["requires-python"].removeprefix(">=").replace(".", "")
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert base == f"rayproject/ray:{PINS['ray']}-py{python}"
    copied = {source for line in lines if line.startswith("COPY") for source in line.split()[2:-1]}
    assert all((ROOT / source).exists() for source in copied)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    needed = {*settings["package-dir"].values(), "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    assert needed < copied
    installs = [line for line in lines if "pip install" in line]
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)
    assert f"prefixquant:{PROJECT['version']}" in "\n".join(lines)
