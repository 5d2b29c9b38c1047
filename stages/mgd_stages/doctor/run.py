"""`mgd-pipeline doctor`: checks this machine and this project, and prints a line for each check: the finding and what to do.

It computes, fetches and changes nothing. torch, and whatever needs torch, is imported late because the import can fail, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.words import counted
from mgd_stages.doctor.checks import Check, Mark, guarded, of_error
from mgd_stages.doctor.data import data_set, recorded
from mgd_stages.doctor.dvc import conflicts, dvc
from mgd_stages.doctor.machine import devices, versions
from mgd_stages.doctor.targets import disk, weights
from mgd_stages.run.machine import explain
from mgd_stages.run.progress import answer, answer_json
from mgd_stages.run.project import open_project

_STYLES: dict[Mark, str] = {"ok": "", "warning": "yellow", "problem": "bold red"}


def doctor(config: Path, overrides: Sequence[str], *, full: bool, as_json: bool) -> int:
    """Prints all checks, or one JSON object of them; returns the exit code: 0, 1 for a problem, 2 for an invalid params.yaml."""
    checks: list[Check] = []
    for check in look(config, overrides, full=full, quiet=as_json):
        if check in checks:  # manifest and data set may report the same folder
            continue
        checks.append(check)
        if not as_json:
            answer(str(check), style=_STYLES[check.mark])
    count = {mark: sum(check.mark == mark for check in checks) for mark in _STYLES}
    if as_json:
        answer_json({**count, "checks": [asdict(check) for check in checks]})
    else:
        answer(f"{counted(len(checks), 'check')}, warnings: {count['warning']}, problems: {count['problem']}")
    if any(check.area == "params" and check.mark == "problem" for check in checks):
        return ParamsError.exit_code
    return 1 if count["problem"] else 0


def look(config: Path, overrides: Sequence[str], *, full: bool = False, quiet: bool = False) -> Iterator[Check]:
    """All checks in their order; without a valid params.yaml only the checks of the machine."""
    yield from versions()
    try:
        import torch  # noqa: F401

        import mgd_pipeline.networks.segmentation  # noqa: F401
    except (ImportError, OSError, RuntimeError, MemoryError, AttributeError) as error:
        # RuntimeError: a torchvision of another torch. AttributeError: a package that a limit on memory let load by halves.
        if (why := explain(error)) is not None:
            yield from of_error("devices", f"torch cannot be imported: {why}")
            return
        if isinstance(error, AttributeError | MemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        yield Check("devices", "problem", f"torch cannot be imported ({reason})", "install torch and torchvision again, together")
        return
    yield from devices()
    if config == Path("params.yaml") and not os.path.lexists(config):
        yield Check("params", "ok", f"no project is here ({config.resolve()}): `mgd-pipeline init` begins one")
        return
    try:
        project = open_project(config, overrides)
    except ParamsError as error:
        yield from of_error("params", error)
        # A merge seldom leaves one file alone in conflict.
        yield from conflicts(config.parent / name for name in ("dvc.lock", "dvc.yaml"))
        return
    data = project.params.data
    shown = data.partition if isinstance(data.partition, str) else "by id lists"
    teachers = ", ".join(project.params.teachers)
    yield Check("params", "ok", f"{config} is valid: {project.name}, partition {shown}, teachers {teachers}")

    manifest = yield from guarded("data", recorded(project))
    sight = yield from guarded("data", data_set(project, manifest, full=full, quiet=quiet))
    known = manifest or (sight.manifest if sight else None)
    usable = yield from weights(project, known, partition=manifest is not None)
    scale = sight.training / max(1, len(sight.manifest.training)) if sight and not manifest else 1.0
    yield from guarded("disk", disk(project, known, usable, scale))
    yield from guarded("dvc", dvc(project))
