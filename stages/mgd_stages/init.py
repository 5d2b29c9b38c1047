"""`mgd-pipeline init`: a project for a data set, as files that a person reads and changes."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from mgd_pipeline.datasets import scan_mask_values
from mgd_pipeline.errors import ParamsError
from mgd_stages.presets import preset, render_params
from mgd_stages.progress import console

_IGNORED = ["/data/raw/", "/data/manifest/", "/data/teachers/", "/data/targets/", "/data/students/", "/data/results/", "/.mgd/"]


def init_project(dataset: str, root: Path | None, partition: str, output: Path) -> None:
    """Writes params.yaml, dvc.yaml, .gitignore and .dvcignore into `output`, and links the data set below data/raw/.

    Nothing that exists is overwritten: raises ParamsError instead.
    """
    for name in ("params.yaml", "dvc.yaml"):
        if (output / name).exists():
            raise ParamsError(f"{output / name}: exists already; remove it, or choose another folder with --output")
    if dataset != "shapes" and root is None:
        raise ParamsError(f"--root: name the folder of the {dataset} data set")
    if dataset != "shapes" and root is not None and not root.is_dir():
        raise ParamsError(f"--root {root}: no such folder")
    link = Path("data/raw") / dataset
    classes = None
    if dataset == "folder" and root is not None:
        values = [value for value in scan_mask_values(root) if value != 255]
        if not values:
            raise ParamsError(f"--root {root}: no masks found below masks/<split>/; at least a few images need one")
        classes = [f"class_{value}" for value in range(max(2, max(values) + 1))]
    params = preset(dataset, str(link), partition, classes)
    output.mkdir(parents=True, exist_ok=True)
    if root is not None and dataset != "shapes":
        (output / link).parent.mkdir(parents=True, exist_ok=True)
        if not (output / link).is_symlink():
            os.symlink(root.resolve(), output / link)
    (output / "params.yaml").write_text(render_params(params), encoding="utf-8")
    (output / "dvc.yaml").write_text(render_dvc(dataset), encoding="utf-8")
    for name, lines in ((".gitignore", _IGNORED), (".dvcignore", ["/.mgd/"])):
        _append_lines(output / name, lines)
    console.print(f"wrote params.yaml and dvc.yaml to {output.resolve()}")
    if classes is not None:
        console.print(f"found mask values {values}: give the classes their names in params.yaml, data.classes")
    console.print("next: git init && dvc init (once), then dvc repro; or the stages one by one: mgd-pipeline --help")


def render_dvc(dataset: str) -> str:
    """dvc.yaml: the built-in data set is an output of prepare-data, any other a dependency."""
    text = (files("mgd_stages") / "templates" / "dvc.yaml").read_text(encoding="utf-8")
    kept, other = ("#shapes ", "#linked ") if dataset == "shapes" else ("#linked ", "#shapes ")
    lines = [line.replace(kept, "") for line in text.splitlines() if other not in line]
    return "\n".join(lines) + "\n"


def _append_lines(path: Path, lines: list[str]) -> None:
    present = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    missing = [line for line in lines if line not in present]
    if missing:
        path.write_text("\n".join([*present, *missing]) + "\n", encoding="utf-8")
