"""README.md and docs/ say what is true: their commands parse, their YAML is valid, their code runs, quoted messages exist."""

from __future__ import annotations

import ast
import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from ruamel.yaml import YAML
from scipy.io import savemat

import mgd_pipeline
import mgd_stages
from mgd_pipeline import distillation, errors
from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.params_file import parse_params
from mgd_stages.cli import app
from mgd_stages.projects.init import init_project
from mgd_stages.projects.presets import preset
from mgd_stages.run.project import open_project
from test_init import REPOSITORY, voc_tree

PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
}
GUIDE = PAGES["docs/guide.md"]


def blocks(page: str, kind: str = "") -> list[str]:
    """Contents of the fenced blocks of one kind, '' for those without a name."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == kind]


WRONG_USAGE: Any = typer.BadParameter.__base__
"""What typer raises for any call that it cannot parse."""


def calls(text: str) -> list[list[str]]:
    """The arguments of each call of mgd-pipeline in lines of shell; variables are numbers."""
    commands = []
    for line in re.sub(r"\$\{?\w+\}?", "0", text.replace("\\\n", " ")).splitlines():
        if "mgd-pipeline" not in line and "mgd_stages.cli" not in line:
            continue
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.commenters, reader.whitespace_split = "#", True
        current: list[str] | None = None
        begins = True
        for token in reader:
            if set(token) <= set("&|;()<>"):
                current, begins = None, True
            elif current is not None:
                current.append(token)
            elif token == "mgd_stages.cli" or (begins and token.rpartition("/")[2] == "mgd-pipeline"):
                current = []
                commands.append(current)
            else:
                begins = begins and (token == "do" or re.match(r"\w+=", token) is not None)
    return commands


def parse(arguments: list[str]) -> Any:
    """What the command line says of a call, without running it: None, or its complaint."""
    command: Any = typer.main.get_command(app)
    arguments = arguments[arguments[:1] == ["--quiet"] :]
    while hasattr(command, "commands"):
        if not arguments or arguments[0] in ("--help", "--version", "--install-completion"):
            return None
        if arguments[0] not in command.commands:
            return f"no command {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if "--help" in arguments:
        return None
    try:
        command.make_context("documented", list(arguments))
    except WRONG_USAGE as error:
        return error
    return None


@pytest.mark.parametrize("name", PAGES)
def test_every_command_can_be_typed_as_it_is_written(name: str) -> None:
    """Blocks in full; in the text a command may be named without what it needs."""
    for block in blocks(PAGES[name]):
        for arguments in calls(block):
            assert parse(arguments) is None, arguments
    for span in re.findall(r"`(mgd-pipeline [^`<]+)`", re.sub(r"^```.*?^```", "", PAGES[name], flags=re.MULTILINE | re.DOTALL)):
        for arguments in calls(" ".join(span.replace("|", " ").split())):
            complaint = parse([argument for argument in arguments if argument != "..."])
            assert complaint is None or re.match("Missing parameter|.*requires an argument", str(complaint)), span


def test_commands_are_found_and_wrong_ones_are_noticed() -> None:
    assert sum(len(calls(block)) for page in PAGES.values() for block in blocks(page)) > 35
    assert calls("X=1 mgd-pipeline a b && .venv/bin/mgd-pipeline c \\\n --d 'e f' > g # h\ntorchrun -m mgd_stages.cli i") == [
        ["a", "b"],
        ["c", "--d", "e f"],
        ["i"],
    ]
    assert parse(["init", "--dataset", "folder"]) is None and parse(["cache", "gc", "--delete"]) is None
    for wrong in (["innit"], ["init", "--datset", "voc"], ["init", "--dataset", "coco"], ["cache", "gc", "x"], ["train-teacher"]):
        assert parse(wrong) is not None, wrong


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key for key in above if isinstance(above[key], dict) and isinstance(below.get(key), dict)} - {"partition"}
    return {**below, **above, **{key: merged(below[key], above[key]) for key in both}}


def test_yaml_of_the_guide_is_valid() -> None:
    """As overrides of what `init` writes for a folder."""
    made = preset("folder", "data/raw/folder", "1/1", {"classes": ["background", "beetle"]}).model_dump(by_alias=True)
    examples = [YAML(typ="safe").load(block) for block in blocks(GUIDE, "yaml")]
    assert examples
    for overrides in examples:
        params = parse_params(merged(made, overrides)).model_dump(by_alias=True)
        assert params != parse_params(made).model_dump(by_alias=True)
        assert parse_params(merged(params, overrides)).model_dump(by_alias=True) == params


def test_sbds_masks_become_class_ids_as_the_guide_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VOC's own mask wins where both have one; val stays out of train."""
    root = voc_tree(tmp_path / "VOCdevkit/VOC2012")
    (tmp_path / "benchmark_RELEASE/dataset/cls").mkdir(parents=True)
    sbd = np.full((8, 8), 7, np.uint8)
    for name in ("train0", "val0", "extra0"):
        segmentation = np.array([(sbd,)], dtype=[("Segmentation", object)])
        savemat(tmp_path / f"benchmark_RELEASE/dataset/cls/{name}.mat", {"GTcls": segmentation})
    Image.new("RGB", (8, 8)).save(root / "JPEGImages/extra0.jpg")
    (code,) = blocks(GUIDE, "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/guide.md", "exec"), {})
    assert np.array_equal(np.asarray(Image.open(root / "SegmentationClassAug/extra0.png")), sbd)
    own = np.asarray(Image.open(root / "SegmentationClass/train0.png"))
    assert np.array_equal(np.asarray(Image.open(root / "SegmentationClassAug/train0.png")), own) and own.max() == 255
    init_project("voc", root, "1/2", tmp_path / "project")
    index = index_dataset(open_project(tmp_path / "project/params.yaml").params.data, tmp_path / "project")
    assert [s.image_id for s in index.samples if s.split == "train"] == ["extra0", *(f"train{i}" for i in range(4))]


FOREIGN = {  # what others say, and where
    "operator torchvision::nms does not exist": None,  # torch's C++
    "dubious ownership": None,  # git
    "No space left on device": os.strerror(errno.ENOSPC),
    "Permission denied": os.strerror(errno.EACCES),
    "No such file or directory": os.strerror(errno.ENOENT),
    "Missing cache files": "dvc/data_cloud.py",
    "failed to pull data from the cloud": "dvc/commands/data_sync.py",
    "Unable to acquire lock": "dvc/lock.py",
}


def texts_of(path: Path) -> list[str]:
    """Every text that a module may say, with {} for what is put in: all but docstrings, unless they are the help of commands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    docstrings = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr) and path.parent.name != "cli"}
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            texts.append(node.value)
    return texts


TEXTS = {path: texts_of(path) for folder in ("pipeline", "stages") for path in sorted((REPOSITORY / folder).rglob("*.py"))}


def test_no_message_sends_to_a_file_that_is_not_installed() -> None:
    """An installed package has neither docs/ nor the repository's other files; pages of the documentation go by their names."""
    for path, texts in TEXTS.items():
        for text in texts:
            # reference.py writes docs/parameters.md, for the repository.
            assert path.name == "reference.py" or not re.search(r"\b(docs|configs|tests|benchmarks|examples)/", text), (path, text)


def test_quoted_messages_are_what_the_program_says() -> None:
    """Or another program, where that one is installed."""
    quoted = re.findall(r"\*\*`([^`]+)`\*\*", PAGES["docs/troubleshooting.md"])
    assert len(quoted) > 40 and set(FOREIGN) <= set(quoted)
    for message in set(quoted) - set(FOREIGN):
        assert any(message in text for texts in TEXTS.values() for text in texts), message
    for message, source in FOREIGN.items():
        if source is not None and source.endswith(".py"):
            path = Path(np.__file__).parents[1] / source
            assert not path.parents[0].exists() or message in path.read_text(encoding="utf-8"), message  # dvc is an extra
        elif source is not None:
            assert message == source


def test_symptoms_and_exit_codes() -> None:
    page = PAGES["docs/troubleshooting.md"]
    assert len(re.findall(r"^\*\*.+$", page, re.MULTILINE)) >= 40
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MGDError)}
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert listed == codes | {0, 130}


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is an extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's notice about its successor, as in the Makefile
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for name in PAGES.keys() - {"README.md", "CONTRIBUTING.md"}:
        assert (tmp_path / "site" / name.removeprefix("docs/").removesuffix(".md") / "index.html").is_file(), name
    first = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "data/targets/&lt;" in (tmp_path / "site/api/index.html").read_text(encoding="utf-8"), "docstrings are no HTML"
    assert 'src="images/overview.png"' in first and 'href="guide/"' in first and 'href="docs/' not in first
    # What pages link to outside of docs/ comes along.
    assert (tmp_path / "site/repository/stages/mgd_stages/presets/voc-resnet18.yaml").is_file()


def test_links_lead_somewhere_in_the_repository() -> None:
    """As the repository's web view follows them; the site's build above checks anchors, too."""
    for name, page in PAGES.items():
        for link in re.findall(r"\]\((?!\w+:)([^)#\s]+)", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)):
            assert ((REPOSITORY / name).parent / link).exists(), f"{name}: {link}"


def test_the_first_page_is_short_and_light() -> None:
    assert len(PAGES["README.md"].split()) <= 900
    pictures = list((REPOSITORY / "docs/images").iterdir())
    assert len(pictures) == 5 and all(path.stat().st_size <= 200_000 for path in pictures)


def test_every_public_name_is_on_the_api_page() -> None:
    described = set(re.findall(r"^::: [\w.]+?\.(\w+)$", PAGES["docs/api.md"], re.MULTILINE)) | set(vars(errors))
    for package in (mgd_pipeline, mgd_stages, distillation):
        assert set(getattr(package, "__all__", [])) - {"__version__"} <= described
