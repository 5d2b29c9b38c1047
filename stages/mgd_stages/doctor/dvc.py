"""What `mgd-pipeline doctor` checks of DVC: whether `dvc repro` can run here, and how DVC will store the targets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mgd_pipeline.errors import shell_command
from mgd_pipeline.params_file import merge_markers
from mgd_stages.doctor.checks import Check, Checks, nearest
from mgd_stages.projects.dvc_file import disagreements, dvc_command, not_in_a_copy
from mgd_stages.run.project import Project

_LINKS = "dvc config cache.type hardlink,symlink"
_RESOLVE = "keep one version of each conflict and remove the marked lines"
_RESOLVED = "git checkout --ours dvc.lock && dvc repro && git add dvc.lock: what either branch has computed comes from DVC's cache"
_FICLONE = 0x40049409
"""ioctl of Linux: let a file share the blocks of another, which DVC calls a reflink."""


def dvc(project: Project) -> Checks[None]:
    """Whether `dvc repro` can run here, and how DVC will store the targets; docs/sharing.md explains the settings."""
    without = "or use `mgd-pipeline run`, which needs neither"
    if not (project.base / "dvc.yaml").is_file():
        remedy = f"write one with `mgd-pipeline dvc-yaml`, {without}"
        yield Check("dvc", "warning", f"{project.base / 'dvc.yaml'}: no such file", remedy)
    else:
        for one in disagreements(project):
            yield Check("dvc", "problem" if one.fails else "warning", one.said, one.remedy)
    above = (project.base, *project.base.parents)
    if not any((folder / ".git").exists() for folder in above):
        yield Check("dvc", "warning", f"{project.base} is in no git repository", f"git init && dvc init, {without}")
        return
    repository = next((folder for folder in above if (folder / ".dvc").is_dir()), None)
    if repository is None:
        init = "dvc init" if (project.base / ".git").exists() else "dvc init --subdir"
        yield Check("dvc", "warning", f"{project.base} is in a git repository, but in no DVC repository", f"{init}, {without}")
        return
    yield from conflicts([project.base / "dvc.lock", *(repository / ".dvc" / name for name in ("config", "config.local"))])
    if (command := dvc_command()) is None:
        yield Check("dvc", "warning", "DVC is not installed", f"pip install 'mgd-pipeline[dvc]', {without}")
        return
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    asked = subprocess.run(
        [command, "config", "--list"], cwd=project.base, env=environment, capture_output=True, text=True, errors="replace"
    )
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["cannot be read"])[-1]
        yield Check("dvc", "problem", f"{repository / '.dvc/config'}: {reason}", "correct it")
        return
    if missing := not_in_a_copy(project):  # DVC copies only what git tracks
        options = " ".join(f"-C {path}" for path in missing)
        fact = f"git ignores {', '.join(missing)}: `dvc exp run --temp` and `--queue` need {options}, which copies all files there"
        yield Check("dvc", "ok", fact)
    config = dict(line.split("=", 1) for line in asked.stdout.splitlines() if "=" in line)
    yield from dvc_cache(project, repository, Path(config.get("cache.dir", repository / ".dvc/cache")), config)


def conflicts(paths: Iterable[Path]) -> Checks[None]:
    """Files of DVC with merge conflicts, about which DVC itself says little."""
    for path in paths:
        with contextlib.suppress(OSError):  # not every project has all of them
            if markers := merge_markers(path.read_text(encoding="utf-8", errors="replace")):
                yield Check("dvc", "problem", f"{path}: {markers}", _RESOLVED if path.name == "dvc.lock" else _RESOLVE)


def dvc_cache(project: Project, repository: Path, cache: Path, config: dict[str, str]) -> Checks[None]:
    """Whether files can be linked from DVC's cache into the project, and whether a group can share the cache."""
    types = re.findall("[a-z]+", config.get("cache.type", "reflink,copy"))  # DVC shows a list as it finds it in the file
    place = f"cache {cache}, cache.type {','.join(types)}{'' if 'cache.type' in config else ' (the default)'}"
    if not os.access(nearest(cache), os.W_OK):
        yield Check("dvc", "problem", f"{place}: you may not write there", "ask its owner, or `dvc cache dir --local .dvc/cache`")
        return
    works = link_types(nearest(cache), nearest(project.base / ".mgd/work"))
    used = next((kind for kind in types if kind in works), None)
    if used is None:
        yield Check("dvc", "problem", f"{place}: none of them works between cache and project, only {', '.join(works)}", _LINKS)
    elif used == "copy":
        yield Check("dvc", "warning", f"{place}: only copy works here, so every teacher cache takes its space twice", _LINKS)
    else:
        yield Check("dvc", "ok", f"{place}: files are linked by {used}")
    if not cache.resolve().is_relative_to(repository.resolve()):
        yield from _shared(cache, types, config)


def _shared(cache: Path, types: list[str], config: dict[str, str]) -> Checks[None]:
    """A DVC cache outside of the project, which other people may use, too."""
    mode = nearest(cache).stat().st_mode
    if config.get("cache.shared") != "group":
        fact = f"{cache} lies outside of the project, but what you put there others may not change or remove"
        yield Check("dvc", "warning", fact, "if a group shares it: dvc config cache.shared group")
    elif mode & 0o2070 != 0o2070:
        fact = f"{cache} is shared by a group, but its mode is {mode & 0o7777:o}, so what one member adds others may not read"
        yield Check("dvc", "warning", fact, f"{shell_command('chmod', '-R', '2775', cache)} (see the page Sharing)")
    else:
        yield Check("dvc", "ok", f"{cache} is shared by its group")
    if types == ["hardlink"]:
        fact = "cache.type hardlink alone: the kernel forbids links to files of other members"
        yield Check("dvc", "warning", fact, _LINKS)


def link_types(cache: Path, project: Path) -> list[str]:
    """Which of DVC's link types work between its cache and the project: tried with temporary files."""
    works = []
    with (
        tempfile.TemporaryDirectory(prefix=".doctor-", dir=cache) as a,
        tempfile.TemporaryDirectory(prefix=".doctor-", dir=project) as b,
    ):
        source, target = Path(a, "source"), Path(b)
        source.write_bytes(b"doctor")
        if sys.platform == "linux":
            with contextlib.suppress(OSError), open(source, "rb") as old, open(target / "reflink", "wb") as new:
                fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
                works.append("reflink")
        for kind, link in (("hardlink", os.link), ("symlink", os.symlink)):
            with contextlib.suppress(OSError):
                link(source, target / kind)
                works.append(kind)
    return [*works, "copy"]
