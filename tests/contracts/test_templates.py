"""What a site copies is well formed, asks for no root, holds no secret, and reaches for no network."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted(
    p
    for p in [*(ROOT / "pipelines").rglob("*"), ROOT / "Dockerfile", ROOT / ".dockerignore"]
    if p.is_file() and p.suffix != ".pyc"
)
SECRET = re.compile(r"(?i)(password|passwd|secret|token|api[_-]?key|private[_-]?key)\s*[:=]\s*['\"]?(?!false)\w")


def load(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_template_holds_no_secret(path: Path) -> None:
    assert SECRET.search(path.read_text(encoding="utf-8")) is None


@pytest.mark.parametrize("script", ["pipelines/slurm/medsynth.sbatch", ".ci/run"])
def test_script_parses(script: str) -> None:
    result = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_batch_job_refuses_to_start_without_its_settings() -> None:
    script = ROOT / "pipelines/slurm/medsynth.sbatch"
    result = subprocess.run(
        ["bash", script], capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
    )
    assert result.returncode != 0 and "set CONFIG" in result.stderr


def test_batch_job_runs_the_study_and_verifies_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    binary = tmp_path / "bin" / "medsynth"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n', encoding="utf-8")
    binary.chmod(0o755)
    settings = {"CONFIG": "c.yaml", "COHORT": "in", "RUN": "out", "VENV": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", ROOT / "pipelines/slurm/medsynth.sbatch"], check=True, env=settings)
    assert log.read_text().splitlines() == ["run c.yaml --input in --out out", "verify out/release"]


def test_kubernetes_job_has_no_root_no_network_and_a_read_only_cohort() -> None:
    job, policy = load(ROOT / "pipelines/kubernetes/job.yaml")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert job["kind"] == "Job" and pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts["cohort"]["readOnly"] is True
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert container["args"][0] == "run"
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    assert "egress" not in policy["spec"] and set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}


def test_compose_service_has_no_root_no_network_and_a_read_only_cohort() -> None:
    (compose,) = load(ROOT / "pipelines/workstation/compose.yaml")
    (service,) = compose["services"].values()
    assert service["network_mode"] == "none" and service["read_only"] is True
    assert not str(service["user"]).startswith("0") and service["cap_drop"] == ["ALL"]
    assert any(volume.endswith(":/cohort:ro") for volume in service["volumes"])


def test_a_study_on_a_workstation_cannot_take_all_of_its_memory() -> None:
    (compose,) = load(ROOT / "pipelines/workstation/compose.yaml")
    unit = (ROOT / "pipelines/workstation/medsynth.service").read_text(encoding="utf-8")
    assert compose["services"]["medsynth"]["mem_limit"] and "\nMemoryMax=16G\n" in unit


def test_configs_named_by_templates_exist() -> None:
    for path in TEMPLATES:
        for name in re.findall(r"configs/([a-z0-9-]+)\.yaml", path.read_text(encoding="utf-8")):
            assert (ROOT / "configs" / f"{name}.yaml").is_file(), f"{path.name} names {name}"


def test_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and int(users[-1].split(":")[0]) > 0
    assert sum(line.startswith("FROM ") for line in lines) == 2


def test_build_context_is_a_list_of_what_may_go_in() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for names in copied for name in names.split()} <= allowed
