"""What jobs/slurm and jobs/kubernetes submit is what SLURM, Kubernetes and this engine expect."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from tda.cluster import Cluster, start
from tda.errors import ConfigError

ROOT = Path(__file__).parents[1]
SLURM, KUBERNETES = ROOT / "jobs/slurm", ROOT / "jobs/kubernetes"

# SLURM.


def test_the_workers_job_is_the_one_shown() -> None:
    """jobs/slurm/worker.sbatch is what dask-jobqueue submits, but for Python and addresses."""
    from dask_jobqueue.slurm import SLURMJob

    options = {"memory": "16GB", "walltime": "04:00:00"}
    given = start.slurm_options(Cluster(workers=8, kind="slurm", options=options))
    name = given.pop("job_name")
    job = SLURMJob("tcp://CLIENT:PORT", name, job_name=name, python="python", **given)
    shown = (SLURM / "worker.sbatch").read_text()
    lines = [line for line in shown.splitlines() if line and not line.startswith("# ")]
    found = [line.rstrip() for line in job.job_script().splitlines() if line.strip()]
    assert found == lines


def test_slurm_has_to_be_told_how_much_memory() -> None:
    with pytest.raises(ConfigError, match="memory"):
        start.slurm(Cluster(workers=2, kind="slurm"))


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch, scontrol and tda that write down what they are told; tda ends as asked."""
    scripts = {
        "sbatch": 'echo "sbatch $*" >> $LOG; wc -l < $LOG',
        "scontrol": 'echo "scontrol $*" >> $LOG',
        "tda": 'echo "tda $*" >> $LOG; trap "exit 75" TERM; [ -z "$WAITS" ] || '
        "for i in $(seq 100); do sleep .05; done; exit $CODE",
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("CODE", "0")
    monkeypatch.setenv("WAITS", "")
    return tmp_path / "log"


def test_three_jobs_wait_for_each_other(commands: Path) -> None:
    done = subprocess.run(
        ["bash", SLURM / "submit.sh", "my.toml"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["index", "1,", "score", "2,", "report", "3"]
    index, score, report = commands.read_text().splitlines()
    assert " index my.toml --set cluster.kind=slurm --set cluster.workers=8 " in index
    assert "--dependency=afterok:1 " in score
    assert " score my.toml --set cluster.kind=slurm " in score
    assert "--dependency=afterok:2 " in report
    assert report.endswith(" report my.toml")


def test_what_the_submission_sets_is_a_cluster(commands: Path) -> None:
    """Its overrides, as a configuration reads them."""
    from tda.config import load_config

    subprocess.run(["bash", SLURM / "submit.sh", "my.toml"], capture_output=True, check=True)
    words = commands.read_text().splitlines()[0].partition("--set ")[2].split(" --set ")
    section = load_config(ROOT / "configs/digits.toml", words).cluster
    cluster = Cluster(**section.model_dump())
    assert (cluster.kind, cluster.workers, cluster.options["memory"]) == ("slurm", 8, "16GB")


@pytest.mark.parametrize(("code", "requeued"), [("0", False), ("1", False), ("75", True)])
def test_a_step_that_was_asked_to_stop_goes_back(commands, monkeypatch, code, requeued) -> None:
    monkeypatch.setenv("CODE", code)
    ended = subprocess.run(["bash", SLURM / "step.sbatch", "index", "my.toml"], check=False)
    assert ended.returncode == int(code)
    assert ("scontrol requeue 7" in commands.read_text()) == requeued


def test_a_step_hands_sigterm_on_and_waits(commands, monkeypatch) -> None:
    monkeypatch.setenv("WAITS", "1")
    step = subprocess.Popen(["bash", SLURM / "step.sbatch", "index", "my.toml"])
    while not commands.exists():
        time.sleep(0.01)
    time.sleep(0.2)
    step.send_signal(signal.SIGTERM)
    assert step.wait(20) == 75
    assert "scontrol requeue 7" in commands.read_text()


# Kubernetes.


def documents(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / file).read_text()))


def crd() -> dict[str, Any]:
    """The schema of a DaskCluster, as the operator installs it; unknown keys are faults."""
    folder = resources.files("dask_kubernetes.operator")
    place = "deployment/helm/dask-kubernetes-operator/crds/daskcluster.yaml"
    (version,) = yaml.safe_load((folder / place).read_text())["spec"]["versions"]
    return strict(version["schema"]["openAPIV3Schema"])


def strict(schema: Any) -> Any:
    """Kubernetes drops keys it does not know in silence; here they are refused."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        found.setdefault("additionalProperties", False)
    if found.pop("x-kubernetes-int-or-string", False):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return found


def faults(value: Any, schema: dict[str, Any]) -> list[str]:
    from jsonschema import Draft7Validator

    found = Draft7Validator(schema).iter_errors(value)
    return [f"{error.json_path}: {error.message}" for error in found]


def test_the_cluster_is_one_the_operator_knows() -> None:
    _, cluster = documents("cluster.yaml")
    schema = crd()["properties"]["spec"]
    assert faults(cluster["spec"], schema) == []
    cluster["spec"]["worker"]["spec"]["containers"][0]["volumeMount"] = []
    assert faults(cluster["spec"], schema), "the check does not see a misspelt key"


def test_the_cluster_this_engine_makes_is_one_the_operator_knows() -> None:
    from dask_kubernetes.operator import make_cluster_spec

    cluster = Cluster(workers=3, kind="kubernetes", options={"image": "tda"})
    options = start.kubernetes_options(cluster)
    spec = make_cluster_spec(**options)
    spec["spec"]["worker"]["spec"]["containers"][0]["resources"] = {}  # null is its default
    spec["spec"]["scheduler"]["spec"]["containers"][0]["resources"] = {}
    assert faults(spec["spec"], crd()["properties"]["spec"]) == []
    args = spec["spec"]["worker"]["spec"]["containers"][0]["args"]
    assert args[args.index("--nthreads") + 1] == "1"


def test_workers_of_the_manifest_have_the_environment_of_all_others() -> None:
    container = documents("cluster.yaml")[1]["spec"]["worker"]["spec"]["containers"][0]
    found = {one["name"]: one["value"] for one in container["env"]}
    assert found == Cluster(workers=1, threads=4).environment


def unknown(value: Any, kind: str) -> list[str]:
    """Keys the Kubernetes client's model of this kind does not have."""
    from kubernetes import client

    if kind.startswith("list["):
        return [fault for one in value for fault in unknown(one, kind[5:-1])]
    model = getattr(client, kind, None)
    if model is None or not isinstance(value, dict):
        return []
    names = {json: name for name, json in model.attribute_map.items()}
    types = model.openapi_types
    wrong = [f"{kind} has no {key!r}" for key in value if key not in names]
    inner = [unknown(v, types[names[key]]) for key, v in value.items() if key in names]
    return wrong + [fault for some in inner for fault in some]


@pytest.mark.parametrize(
    ("file", "number", "kind"),
    [("workload.yaml", 0, "V1Job"), ("cluster.yaml", 0, "V1PersistentVolumeClaim")],
)
def test_manifests_have_no_key_that_kubernetes_does_not_know(file, number, kind) -> None:
    from kubernetes import client

    manifest = documents(file)[number]
    assert unknown(manifest, kind) == []
    manifest["spec"]["misspelt"] = 1
    assert unknown(manifest, kind)

    # The models themselves refuse absent keys and wrong values.
    client.ApiClient()._ApiClient__deserialize(documents(file)[number], kind)


def test_the_workload_asks_for_commands_there_are() -> None:
    from typer.testing import CliRunner

    from tda.cli import app

    pod = documents("workload.yaml")[0]["spec"]["template"]["spec"]
    steps = [*pod["initContainers"], *pod["containers"]]
    assert [step["command"][1] for step in steps] == ["index", "score", "report"]
    for step in steps:
        _, command, config, *rest = step["command"]
        assert (ROOT / config).is_file()
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        assert all(word in shown for word in rest if word.startswith("--"))
    address = "tcp://tda-scheduler:8786"  # the operator calls the service NAME-scheduler
    assert address in steps[0]["command"]
    assert documents("cluster.yaml")[1]["metadata"]["name"] == "tda"
