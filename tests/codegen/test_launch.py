"""What starts a plan elsewhere: held by goldens, and by the tools of those who will read it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from mnemoc import pipeline
from mnemoc.artifact import Plan, Workload
from mnemoc.codegen import Launch, render_launch
from mnemoc.folder import load_artifact
from mnemoc.layout import Layout

BIN = Path(sys.executable).parent
KUBERNETES = "1.31"
FLEET = {"apiVersion", "kind", "metadata", "spec"}
LEADER_WORKER = {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}


@pytest.fixture(scope="module")
def jobs() -> dict[str, Launch]:
    """One machine's cores; many GPU nodes; GPU nodes of which the last is not full."""

    def job(model: str, cluster: str, workload: Workload, **pinned: int) -> Launch:
        return pipeline.launch_of(pipeline.plan(model, cluster, workload, pinned=pinned))

    one = job("tiny-llama", "local", Workload(2048, 60.0, 0.5), tp=1, spp=1)
    many = job("llama-3-8b", "dgx-h100", Workload(10_000_000, 1200.0, 0.03), tp=8, spp=3, kvp=4)
    uneven = job("llama-3-8b", "dgx-a100", Workload(1_000_000, 1200.0, 0.1), tp=4, spp=3, kvp=1)
    return {"one": one, "many": many, "uneven": uneven}


@pytest.fixture(params=["one", "many", "uneven"])
def job(request: pytest.FixtureRequest, jobs: dict[str, Launch]) -> Launch:
    return jobs[request.param]


@pytest.fixture
def folder(job: Launch, tmp_path: Path) -> Path:
    for path, data in render_launch(job).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    return tmp_path / "launch"


def documents(job: Launch) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render_launch(job)["launch/kubernetes.yaml"]))


def templates(job: Launch) -> list[dict[str, Any]]:
    """Of all pods."""
    spec = documents(job)[0]["spec"]
    if "template" in spec:
        return [spec["template"]]
    group = spec["leaderWorkerTemplate"]
    return [group["leaderTemplate"], group["workerTemplate"]]


def told(command: list[str | Path]) -> tuple[int, str]:
    """A tool's exit code, and what it found."""
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    return ran.returncode, ran.stdout


@pytest.mark.parametrize("kind", ["many", "one"])
def test_the_files_read_as_the_golden_ones(
    jobs: dict[str, Launch], golden: Callable[[str, str], None], kind: str
) -> None:
    files = render_launch(jobs[kind])
    golden(f"launch_{kind}.txt", "".join(f"=== {path}\n{files[path].decode()}" for path in files))


def test_shellcheck_finds_nothing(folder: Path) -> None:
    scripts = [folder / "torchrun.sh", folder / "slurm.sbatch"]
    assert told([BIN / "shellcheck", *scripts]) == (0, "")


def test_hadolint_finds_nothing(folder: Path) -> None:
    assert told([BIN / "hadolint", folder / "Dockerfile"]) == (0, "")


def test_pods_and_services_keep_the_schemas_of_kubernetes(job: Launch) -> None:
    known = [it for it in documents(job) if it["kind"] != "LeaderWorkerSet"]
    pods = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": it}
        for it in templates(job)
    ]
    for document in known + pods:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    broken = pods[0] | {"template": {"spec": {"container": []}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_many_nodes_are_one_group_of_a_leader_and_workers(jobs: dict[str, Launch]) -> None:
    job = jobs["many"]
    group = documents(job)[0]
    assert group.keys() == FLEET and group["spec"].keys() == {"replicas", "leaderWorkerTemplate"}
    assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    template = group["spec"]["leaderWorkerTemplate"]
    assert template.keys() == LEADER_WORKER
    assert (template["size"], template["restartPolicy"]) == (12, "None")
    for pod in templates(job):
        worker = next(it for it in pod["spec"]["containers"] if it["name"] == "workers")
        assert worker["resources"]["limits"] == {"nvidia.com/gpu": "8", "rdma/ib": "1"}
        assert {"name": "shm", "mountPath": "/dev/shm"} in worker["volumeMounts"]


def test_the_service_leads_to_the_pod_that_serves_and_to_no_other(job: Launch) -> None:
    wanted = documents(job)[-1]["spec"]["selector"].items()
    found = [it for it in templates(job) if wanted <= it["metadata"]["labels"].items()]
    assert len(found) == 1
    ports = [port["name"] for it in found[0]["spec"]["containers"] for port in it["ports"]]
    assert documents(job)[-1]["spec"]["ports"][0]["targetPort"] in ports


def test_every_probe_asks_for_health_where_http_is_served(job: Launch) -> None:
    pod = templates(job)[0]["spec"]
    server = next(it for it in pod["containers"] if it["name"] == "server")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}
    asked = job.workload
    longest_s = asked.ttft_s + asked.output_tokens * asked.tbt_s
    assert longest_s < pod["terminationGracePeriodSeconds"] < longest_s + 60


def test_no_file_holds_a_secret(job: Launch) -> None:
    for text in render_launch(job).values():
        assert not re.search(rb"[0-9a-f]{32}", text)


def test_slurm_is_asked_for_the_nodes_of_the_plan(job: Launch) -> None:
    """Every #SBATCH line is one option with its value, and stands before the first command."""
    lines = render_launch(job)["launch/slurm.sbatch"].decode().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    found = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert found and max(found) < first_command
    options = {}
    for i in found:
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", lines[i])
        assert match, lines[i]
        options[match[1]] = match[2]
    assert options["nodes"] == str(len(job.ranks))
    assert options["ntasks-per-node"] == "1"
    devices = options["gpus-per-node"] if job.cuda else options["cpus-per-task"]
    assert devices == str(job.ranks[0])


@pytest.mark.parametrize(
    ("layout", "devices", "ranks"),
    [
        (Layout(4, 3, 1), 8, (8, 4)),
        (Layout(8, 3, 4), 8, (8,) * 12),
        (Layout(3, 4, 1), 8, (6, 6)),
        (Layout(1, 2, 1), 1, (1, 1)),
        (Layout(2, 1, 1), 8, (2,)),
    ],
)
def test_no_tensor_parallel_group_spans_two_nodes(
    jobs: dict[str, Launch], layout: Layout, devices: int, ranks: tuple[int, ...]
) -> None:
    plan: Plan = dataclasses.replace(jobs["one"].plan, layout=layout)
    job = Launch("m", Workload(1, 1.0, 1.0), plan, devices, rdma=False)
    assert job.ranks == ranks
    for first, last in job.blocks:
        assert first % layout.tp == 0 and (last + 1) % layout.tp == 0


def test_the_torchrun_script_starts_as_many_workers_as_the_plan_has_ranks(
    folder: Path, job: Launch, tmp_path: Path
) -> None:
    """On each host, by a `torchrun` that writes down how it was called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    fake = tools / "torchrun"
    fake.write_text('#!/bin/sh\necho "$@" >>"$CALLS"\nkill -TERM $PPID\n')
    fake.chmod(0o755)
    env = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "WEIGHTS": "/w",
        "HEAD": "h",
        "CALLS": str(tools / "c"),
    }
    started = 0
    for node, ranks in enumerate(job.ranks):
        command = ["bash", str(folder / "torchrun.sh"), "workers"]
        subprocess.run(command, env=env | {"NODE_RANK": str(node)}, timeout=20, check=True)
        words = Path(env["CALLS"]).read_text().splitlines()[-1].split()
        options = dict(zip(words[::2], words[1::2], strict=True))
        assert options["--nnodes"] == str(len(job.ranks))
        assert options["--nproc-per-node"] == str(ranks)
        assert options["--rdzv-conf"] == f"is_host={int(node == 0)}"
        assert options["-m"] == "mnemoc.runtime.rank.worker"
        started += ranks
    assert started == job.plan.gpus


def test_the_files_belong_to_the_plan(tmp_path: Path) -> None:
    made = pipeline.plan("tiny-llama", "local", Workload(2048, 60.0, 0.5), pinned={"spp": 1})
    pipeline.emit(made, tmp_path / "plan")
    _, contents = load_artifact(tmp_path / "plan")
    assert render_launch(pipeline.launch_of(made)).items() <= contents.items()
    assert (tmp_path / "plan/launch/torchrun.sh").stat().st_mode & 0o111
