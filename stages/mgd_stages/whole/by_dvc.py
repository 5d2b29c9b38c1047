"""What DVC knows of stages that have no record here: after `dvc pull` in a clone, `mgd-pipeline run` trains nothing again."""

from __future__ import annotations

import json
import os
import subprocess

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mgd_pipeline.params_file import load_params
from mgd_pipeline.words import counted, verb
from mgd_stages.projects.dvc_file import dvc_command
from mgd_stages.run.progress import console
from mgd_stages.run.project import Project
from mgd_stages.whole.records import Records


def adopt_from_dvc(project: Project, records: Records) -> None:
    """Notes each stage without a record whose parameters, inputs and outputs are the ones in dvc.lock.

    With settings by --set nothing is noted: DVC knows the parameters of the file.
    """
    unknown = [stage for stage in records.stages.values() if not records.has(stage)]
    locked = _locked(project)
    if not any(stage.name in locked for stage in unknown) or load_params(project.base / "params.yaml") != project.params:
        return
    if (command := dvc_command()) is None:
        return
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    asked = subprocess.run([command, "status", "--json"], cwd=project.base, env=environment, capture_output=True, text=True)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        console.print(f"warning: `dvc status` failed ({reason[:200]}); stages without a record in .mgd/run run again")
        return
    changed, adopted = json.loads(asked.stdout), 0
    for stage in unknown:
        if stage.name in locked and stage.name not in changed:
            with records.noting(stage):
                adopted += 1
    if adopted:
        are = verb(adopted, "is", "are")
        console.print(f"run: {counted(adopted, 'stage')} {are} up to date by dvc.lock")


def _locked(project: Project) -> set[str]:
    """Names of the stages in dvc.lock; none if it cannot be read, which `doctor` explains."""
    try:
        lock = YAML(typ="safe", pure=True).load((project.base / "dvc.lock").read_bytes())
    except (OSError, YAMLError, UnicodeDecodeError):
        return set()
    stages = lock.get("stages") if isinstance(lock, dict) else None
    return set(stages) if isinstance(stages, dict) else set()
