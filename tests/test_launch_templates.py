"""The templates of scripts/launch: shells parse them, and the JobSet has what its schema asks for and what the start reads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from sharding.distributed import detect
from sharding.job import read_hostfile

FOLDER = Path(__file__).parents[1] / "scripts" / "launch"

# of jobset.x-k8s.io/v1alpha2 and batch/v1, the parts that the template uses: types, and required fields with *
ENV = [{"name*": str, "value": str}]
CONTAINER = {
    "name*": str,
    "image*": str,
    "command": [str],
    "env": ENV,
    "ports": [{"containerPort*": int}],
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "volumeMounts": [{"name*": str, "mountPath*": str, "readOnly": bool}],
}
POD = {
    "restartPolicy*": str,
    "containers*": [CONTAINER],
    "volumes": [{"name*": str, "persistentVolumeClaim": {"claimName*": str, "readOnly": bool}}],
}
JOB = {"parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int, "template*": {"spec*": POD}}
JOBSET = {
    "apiVersion*": str,
    "kind*": str,
    "metadata*": {"name*": str},
    "spec*": {
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs*": [{"name*": str, "replicas": int, "template*": {"spec*": JOB}}],
    },
}


def check(value, schema, path: str = "") -> None:
    if isinstance(schema, type):
        assert type(value) is schema, f"{path} is {value!r}, not of {schema}"
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for i, item in enumerate(value):
            check(item, schema[0], f"{path}[{i}]")
    else:
        assert isinstance(value, dict), path
        names = {name.rstrip("*"): part for name, part in schema.items()}
        assert not set(value) - set(names), f"{path} has unknown {set(value) - set(names)}"
        missing = {name.rstrip("*") for name in schema if name.endswith("*")} - set(value)
        assert not missing, f"{path} lacks {missing}"
        for name, part in value.items():
            check(part, names[name], f"{path}.{name}")


def test_jobset():
    jobset = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    check(jobset, JOBSET)
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    env = {item["name"]: item["value"] for item in container["env"]}
    for index in range(spec["completions"]):
        found = detect(env | {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(index)})
        assert found and (found.process, found.processes, found.launcher) == (index, spec["parallelism"], "Kubernetes")
    # a pod's name in a JobSet: set, job, number of the job, number of the pod; under the set's own service
    name = jobset["metadata"]["name"]
    assert found and found.coordinator == f"{name}-{job['name']}-0-0.{name}:{container['ports'][0]['containerPort']}"


def test_the_check_can_fail():
    with pytest.raises(AssertionError, match="lacks"):
        check({"name": "a"}, CONTAINER)
    with pytest.raises(AssertionError, match="not of"):
        check({"name": "a", "image": 3}, CONTAINER)


def test_hostfile():
    assert [host.slots for host in read_hostfile(FOLDER / "hostfile")] == [8, 8]


@pytest.mark.parametrize("name", ["slurm.sh", "mpirun.sh"])
def test_scripts(name):
    """They say how they are used; the rest is for other machines."""
    done = subprocess.run(["bash", str(FOLDER / name), "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and "Usage: " in done.stdout
