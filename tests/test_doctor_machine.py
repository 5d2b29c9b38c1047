"""doctor on the machine and on DVC: versions, devices, settings and links; `test_doctor` has the projects."""

from __future__ import annotations

import os
import re
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import run as shell
from mgd_stages.doctor import dvc as doctor_dvc
from mgd_stages.doctor.dvc import dvc_cache, link_types
from mgd_stages.doctor.machine import devices, versions
from mgd_stages.doctor.run import look
from mgd_stages.projects.init import init_project
from mgd_stages.run.project import Project, open_project
from test_doctor import dvc_faults, run
from test_init import folder_tree


def test_settings_of_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dvc itself says the settings, in about a second; that it is asked is shown on a good project and on a broken file."""
    init_project("shapes", None, "1/8", tmp_path / "street")
    project, repository, cache = open_project(tmp_path / "street/params.yaml"), tmp_path / "street", tmp_path / "cache"
    monkeypatch.setattr(doctor_dvc, "link_types", lambda *_: ["hardlink", "symlink", "copy"])

    def said(cache: Path, **settings: str) -> list[tuple[str, str, str]]:
        checks = dvc_cache(project, repository, cache, {f"cache.{key}": value for key, value in settings.items()})
        return [(check.mark, check.found, check.remedy) for check in checks if check.mark != "ok"]

    own, links = repository / ".dvc/cache", "dvc config cache.type hardlink,symlink"
    (twice,) = said(own)
    assert twice[0] == "warning" and "cache.type reflink,copy (the default): only copy works here" in twice[1] and twice[2] == links
    (none,) = said(own, type="reflink")
    assert none[0] == "problem" and "none of them works between cache and project" in none[1] and none[2] == links
    assert said(own, type="hardlink,symlink") == []

    cache.mkdir(mode=0o755)
    ours, alone = said(cache, type="hardlink")
    assert ours[1].startswith(f"{cache} lies outside of the project") and ours[2].endswith("dvc config cache.shared group")
    assert alone[1].startswith("cache.type hardlink alone") and alone[2] == links
    (mode,) = said(cache, type="hardlink,symlink", shared="group")
    assert "its mode is 755" in mode[1] and mode[2].startswith(f"chmod -R 2775 {cache}")
    cache.chmod(0o2775)
    assert said(cache, type="hardlink,symlink", shared="group") == []
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    assert said(cache)[0][0] == "problem" and "you may not write there" in said(cache)[0][1]


def test_a_broken_configuration_of_dvc(tmp_path: Path) -> None:
    init_project("shapes", None, "1/8", tmp_path)
    shell(tmp_path, "git", "init")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[cache\n")
    (broken,) = dvc_faults(tmp_path)
    assert broken[0] == "problem" and broken[1].startswith(f"{tmp_path / '.dvc/config'}: ") and broken[2].startswith("correct it")


def test_teachers_that_dvc_does_not_know_of(project: Project) -> None:
    text = (project.base / "params.yaml").read_text()
    (project.base / "params.yaml").write_text(re.sub(r"\bdeep\b", "third", text))
    ((mark, fact, remedy),) = [check for check in dvc_faults(project.base) if "dvc.yaml" in check[1]]
    assert mark == "problem" and "the teacher deep is not in params.yaml" in fact and remedy == "run `mgd-pipeline dvc-yaml`"


CONFLICT = "<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> other\n"


@pytest.mark.parametrize("name", ["dvc.lock", "dvc.yaml", ".dvc/config", ".dvc/config.local"])
def test_conflicts_in_files_of_dvc(tmp_path: Path, name: str) -> None:
    init_project("shapes", None, "1/8", tmp_path)
    shell(tmp_path, "git", "init")
    shell(tmp_path, "dvc", "init")
    (tmp_path / name).write_text(CONFLICT)
    _, fact, remedy = next(check for check in dvc_faults(tmp_path) if check[0] == "problem")
    assert fact == f"{tmp_path / name}: a merge left <<<<<<< in line 1, ======= in line 3, >>>>>>> in line 5"
    assert remedy.startswith("git checkout --ours dvc.lock && dvc repro" if name == "dvc.lock" else "keep one version")
    assert run(tmp_path).exit_code == 1
    (tmp_path / "params.yaml").write_text(CONFLICT)
    result = run(tmp_path)
    named = {line.partition(": a merge left")[0] for line in result.stdout.splitlines() if ": a merge left" in line}
    assert result.exit_code == 2 and f"problem  params: {tmp_path / 'params.yaml'}" in named
    assert name.startswith(".dvc") or f"problem  dvc: {tmp_path / name}" in named


def test_experiments_in_a_copy_are_told_what_they_lack(tmp_path: Path) -> None:
    """As docs/sharing.md says; DVC's own message comes before any code of ours."""
    init_project("folder", folder_tree(tmp_path / "source", ("train", "val", "test")), "1/2", tmp_path / "project", small=True)
    base = tmp_path / "project"
    shell(base, "git", "init")
    shell(base, "dvc", "init")

    def told(*overrides: str) -> list[str]:
        checks = look(base / "params.yaml", overrides, quiet=True)
        return [check.found for check in checks if check.area == "dvc" and "dvc exp run --temp" in check.found]

    (line,) = told()
    assert "need -C data/raw," in line
    (line,) = told("train_teachers=[wide]", "teachers.deep.weights=data/own/deep.safetensors")
    assert "need -C data/raw -C data/own," in line


def test_links_are_tried_and_leave_nothing(tmp_path: Path) -> None:
    assert {"hardlink", "symlink", "copy"} <= set(link_types(tmp_path, tmp_path)) <= {"reflink", "hardlink", "symlink", "copy"}
    assert list(tmp_path.iterdir()) == []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
        assert "hardlink" not in link_types(tmp_path, tmp_path)


def test_versions_that_are_too_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, old = metadata.version, {"zarr": "3.0.1", "dvc": "3.1", "dask": ""}

    def version(name: str) -> str:
        if old.get(name) == "":
            raise metadata.PackageNotFoundError(name)
        return old.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    wanted = ["zarr>=3.1", "dask>=2025.1", "torch>=2.11", "dvc>=3.67; extra == 'dvc'", "nowhere-to-be-found>=1; extra == 'bench'"]
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    lines = [str(check) for check in versions()]
    assert lines[:3] == [
        "problem  versions: zarr 3.0.1 is here, >=3.1 is needed; pip install 'zarr>=3.1'",
        "problem  versions: dask is not installed; pip install 'dask>=2025.1'",
        "warning  versions: dvc 3.1 is here, >=3.67 is needed; pip install 'dvc>=3.67'",
    ]
    assert len(lines) == 4 and lines[3].startswith("ok       versions: Python 3.")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first, second = devices()
    assert first.mark == "ok" and "CPU cores" in first.found and "GB of memory" in first.found
    assert second.mark == "warning" and second.found.startswith("torch is built for CUDA 13.2, but finds ")
    assert second.remedy.startswith("install NVIDIA's driver, or go on with the CPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [str(check) for check in devices()][1] == (
        "warning  devices: no GPU: CUDA_VISIBLE_DEVICES is ''; unset it, or go on with the CPU"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert next(check.mark for check in devices()) == "ok"

    def warns() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return True

    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", warns)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=140_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert [str(check) for check in devices()][1:] == [
        "ok       devices: cuda:0: NVIDIA H200, 140.0 GB",
        "warning  devices: torch says: The NVIDIA driver on your system is too old; install a torch that fits driver and GPU",
    ]

    def lost(_: int) -> None:
        raise RuntimeError("CUDA error: device lost\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lost)
    (said,) = [str(check) for check in devices()][1:]
    assert said.startswith("warning  devices: torch says: CUDA error: device lost CUDA kernel errors")
    assert said.endswith("; install a torch that fits driver and GPU")
