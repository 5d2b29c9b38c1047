"""What is on the pages goes through DVC; tiny networks in the published form replace what pages fetch."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import vl_convert
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file
from torchvision.models import get_model

from conftest import Forks, run, stages_run, tiny_student
from mgd_pipeline.networks.weights import read_metadata
from mgd_pipeline.params_file import load_params, parse_params
from mgd_stages.projects.dvc_file import disagreements
from mgd_stages.projects.dvc_yaml import write_dvc
from mgd_stages.projects.init import init_project
from mgd_stages.projects.presets import render_params
from mgd_stages.run.project import Project
from mgd_stages.search.space import read_space
from test_guide import PAGES, blocks, merged
from test_init import REPOSITORY
from test_prompts import clipseg
from test_teacher_families import eomt

pytestmark = pytest.mark.skipif(shutil.which("dvc", path=str(Path(sys.executable).parent)) is None, reason="dvc is an extra")

CLASSES = ["road", "person", "vehicle", "animal"]
"""Those of the class_map on docs/teachers.md."""
CITYSCAPES = ["road", "person", "rider", "car", "truck", "bus", "train", "sky"]
FROM_VOC = {"road": "__background__", "person": "person", "vehicle": ["car", "bus"], "animal": ["cat", "dog"]}
SMALL: dict[str, Any] = {
    "data": {"long_side": 64},
    "views": {"crop": [32, 32], "scales": [1.0]},
    "teacher_training": {"steps": 2, "labelled_batch": 2, "unlabelled_batch": 2},
    "student": {
        "steps": 2,
        "labelled_batch": 2,
        "unlabelled_batch": 2,
        "network": {"encoder": "tu-test_efficientnet", "encoder_weights": "none", "decoder_channels": 32},
    },
}
NETWORK = {"encoder": "tu-test_resnet", "encoder_weights": "none", "decoder_channels": 64}
"""Of the published or trained teachers of segmentation-models-pytorch."""


HALF_SIZE = "docs/experiments/2026-11-23-camvid-half-size.md"
THREE_STUDENTS = "docs/experiments/2026-11-28-camvid-three-students.md"
ALL_PIXELS = "docs/experiments/2026-11-28-camvid-full-resolution-teacher.md"


def examples(page: str) -> list[dict[str, Any]]:
    return [YAML(typ="safe").load(block) for block in blocks(PAGES[page], "yaml")]


def test_every_example_of_the_pages_is_run_here() -> None:
    counts = {name: len(blocks(page, "yaml")) for name, page in PAGES.items() if "```yaml" in page}
    pages = {"docs/guide.md": 2, "docs/teachers.md": 6, "docs/methods.md": 1, "docs/studies.md": 1}
    pages |= {HALF_SIZE: 1, THREE_STUDENTS: 1, ALL_PIXELS: 1}
    assert counts == pages, "run the new one below"


def begin(home: Path) -> None:
    """A project in a repository: 12 photos of 64 x 64 pixels to train on, 2 val, 2 test; and what a hub would have published."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 2), ("test", 2)):
        folders = [home / "photos" / kind / split for kind in ("images", "masks")]
        for folder in folders:
            folder.mkdir(parents=True)
        for i in range(count):
            mask = np.kron(generator.integers(0, 4, (4, 4), np.uint8), np.ones((16, 16), np.uint8))
            # Of noise nobody knows a class by chance, which precompute-teachers would take for another order of classes.
            image = generator.integers(0, 256, (64, 64, 3), np.uint8)
            for folder, pixels in zip(folders, (image, mask), strict=True):
                Image.fromarray(pixels).save(folder / f"{split}{i:02d}.png")
    init_project("folder", home / "photos", "1/2", home / "project")
    shutil.copy(home / "project/params.yaml", home / "made.yaml")
    run(home / "project", "git", "init", "-q")
    run(home / "project", "dvc", "init", "-q")
    torch.manual_seed(0)
    publish(home)


def publish(home: Path) -> None:
    """torchvision's and the hub's caches as they are after a download, and the page's own function with its weights."""
    from transformers import EomtImageProcessor, SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    model = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=21)
    place = home / "torch/hub/checkpoints/lraspp_mobilenet_v3_large-d234d4ea.pth"
    place.parent.mkdir(parents=True)
    torch.save(model.state_dict(), place)

    sections, of_one_input_size, *_ = examples("docs/teachers.md")
    widths: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    widths |= {"num_labels": len(CITYSCAPES), "id2label": dict(enumerate(CITYSCAPES))}
    config = SegformerConfig(**widths, decoder_hidden_size=32)
    snapshot = in_the_hub(home, sections["teachers"]["city"]["transformers"])
    SegformerForSemanticSegmentation(config).save_pretrained(snapshot)
    SegformerImageProcessor().save_pretrained(snapshot)
    clipseg(in_the_hub(home, sections["teachers"]["words"]["transformers"]))
    snapshot = in_the_hub(home, of_one_input_size["eomt"]["transformers"])
    eomt("Eomt").save_pretrained(snapshot)
    EomtImageProcessor(size={"height": 96, "width": 96}).save_pretrained(snapshot)
    backbone = timm.get_pretrained_cfg("test_vit.r160_in1k")
    assert backbone is not None and backbone.hf_hub_id is not None
    save_file(timm.create_model("test_vit").state_dict(), in_the_hub(home, backbone.hf_hub_id) / "model.safetensors")

    (code,) = blocks(PAGES["docs/teachers.md"], "python")
    (home / "project/my_lab").mkdir()
    (home / "project/my_lab/models.py").write_text(code, encoding="utf-8")
    namespace: dict[str, Any] = {}
    exec(compile(code, "docs/teachers.md", "exec"), namespace)
    torch.save(namespace["Segmenter"](len(CLASSES)).state_dict(), home / "ours.pth")


def in_the_hub(home: Path, name: str) -> Path:
    """The folder of a model's only revision in the hub's cache."""
    folder, revision = home / f"hub/models--{name.replace('/', '--')}", "0" * 40
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(revision)
    return folder / "snapshots" / revision


def write(home: Path, *overrides: dict[str, Any]) -> None:
    """params.yaml of `init` with overrides one after the other, of which `teachers` replace all; dvc.yaml as dvc-yaml writes it."""
    project = home / "project"
    made = load_params(home / "made.yaml").model_dump(by_alias=True)
    for override in overrides:
        if "teachers" in override:
            made["teachers"] = {}
        made = merged(made, override)
    made["data"]["classes"] = CLASSES
    params = parse_params(made)
    (project / "params.yaml").write_text(render_params(params), encoding="utf-8")
    assert disagreements(Project(project, params)) != []
    said = write_dvc(Project(project, params))
    assert not [line for line in said if "warning" in line]


@pytest.mark.timeout(600)
def test_the_examples_go_through_dvc(forks: Forks) -> None:
    """The lists of the guide; teachers of every kind; then a student, and a teacher of another project, as teachers."""
    begin(home := forks.home)
    project = home / "project"
    sections, of_one_input_size, trained_here, student, heads, mapped = examples("docs/teachers.md")
    (at_half_size,), (of_one_size,), (of_another_project,) = map(examples, (HALF_SIZE, THREE_STUDENTS, ALL_PIXELS))
    by_phrases, partition = examples("docs/guide.md")

    # --- the first examples in one project, with smaller networks in the same form, and the lists of ids
    teachers = sections["teachers"]
    teachers["wide"] |= NETWORK
    teachers["coco"] |= {"torchvision": "lraspp_mobilenet_v3_large", "class_map": FROM_VOC}
    teachers["city"] |= mapped["city"]
    teachers["dino"] |= {"timm": "test_vit.r160_in1k"}
    teachers["own"] |= {"weights": str(home / "ours.pth")}
    phrases = teachers["words"]["prompts"] | by_phrases["teachers"]["words"]["prompts"]
    teachers["words"] |= {"prompts": dict(zip(CLASSES, phrases.values(), strict=True))}
    teachers["eomt"] = of_one_input_size["eomt"] | {"short_side": 96, "class_map": {name: i for i, name in enumerate(CLASSES)}}
    (vit,) = (home / "hub").glob("models--timm--test_vit*/snapshots/*/model.safetensors")
    teachers["frozen"] = trained_here["teachers"]["dino"] | {"encoder": "tu-test_vit", "encoder_weights": str(vit)}
    teachers["frozen"] |= {"decoder_channels": 32, "weights": "data/teachers/frozen.safetensors"}
    sections["train_teachers"] += ["eomt", "frozen"]
    sections["losses"] |= examples("docs/methods.md")[0]["losses"] | {"feature_teachers": ["wide", "dino"]}
    ids = [f"train{i:02d}" for i in range(12)]
    (project / "lists").mkdir()
    for name, part in zip(("labeled", "unlabeled"), (ids[:6], ids[6:]), strict=True):
        (project / f"lists/{name}.txt").write_text("\n".join(part))
    write(home, partition, {**of_one_size, "views": {}}, sections, SMALL)
    assert stages_run(forks.run(project, "dvc", "repro", "compare-teachers", "train-student")) == {
        *("prepare-data", "compare-teachers", "train-student"),
        *(f"train-teacher@{name}" for name in sections["train_teachers"]),
        *(f"precompute-teachers@{name}" for name in teachers),
    }
    assert [path.name for path in (project / "data/results/train-teacher-coco/plots").iterdir()] == ["fetched.tsv"]
    forks.run(project, "dvc", "plots", "show")
    assert "loss.tsv" in (project / "dvc_plots/index.html").read_text(encoding="utf-8")

    # --- heads: the cache behind them grows once, and another setting of a head runs no backbone
    sections["teachers"] |= {name: {**head, "steps": 2} for name, head in heads["teachers"].items()}
    write(home, partition, {**of_one_size, "views": {}}, sections, SMALL)
    forks.run(project, "dvc", "repro", "--force", "--single-item", "precompute-teachers@dino")
    of_heads = {f"{stage}@{name}" for stage in ("train-head", "precompute-teachers") for name in heads["teachers"]}
    assert stages_run(forks.run(project, "dvc", "repro", "compare-teachers")) == {*of_heads, "compare-teachers"}
    text = (project / "params.yaml").read_text(encoding="utf-8")
    (project / "params.yaml").write_text(text.replace("learning_rate: 0.002", "learning_rate: 0.01", 1), encoding="utf-8")
    of_one = {"train-head@linear", "precompute-teachers@linear"}
    assert stages_run(forks.run(project, "dvc", "repro", "compare-teachers")) == {*of_one, "compare-teachers"}

    # --- a student, and a teacher of another project that sees more pixels
    own, full = student["teachers"]["second"], of_another_project["teachers"]["full"]
    learnt, other = (home / teacher["weights"].removeprefix("../") for teacher in (own, full))
    for path in (learnt, other):
        path.parent.mkdir(parents=True)
    shutil.copy(project / "data/students/distilled/student.safetensors", learnt)
    own |= {**read_metadata(learnt)["network"], "encoder_weights": "none"}
    full |= NETWORK
    tiny_student(other, decoder=full["decoder"], classes=CLASSES)
    names = {"pixel_teachers": ["second", "full"], "region_teacher": "second", "image_teacher": "full", "other_partition": True}
    both = {"teachers": {"second": own, "full": full}, "train_teachers": [], "losses": names}
    write(home, at_half_size, both, SMALL)
    precomputed = {"precompute-teachers@second", "precompute-teachers@full"}
    assert stages_run(forks.run(project, "dvc", "repro", "train-student")) == {"prepare-data", *precomputed, "train-student"}


def test_the_space_of_the_page_can_be_searched(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(blocks(PAGES["docs/studies.md"], "yaml")[0], encoding="utf-8")
    space = read_space(tmp_path / "space.yaml", load_params(Path(__file__).parents[1] / "params.yaml"))
    assert [len(axis.keys) for axis in space] == [1, 1, 2]


def test_a_confusion_matrix_is_drawn_by_its_pixels() -> None:
    """Not by its lines, as DVC's own template does it; the classes in their own order; two states side by side."""
    from dvc_render.vega import VegaRenderer

    names, pixels = ["road", "cat", "sky", "never"], [[90, 10, 0, 0], [30, 40, 5, 0], [1, 2, 7, 0], [0, 0, 0, 0]]
    lines = [
        {"actual": actual, "predicted": predicted, "pixels": str(pixels[i][j]), "rev": rev}
        for rev in ("main", "workspace")
        for i, actual in enumerate(names)
        for j, predicted in enumerate(names)
    ]
    shown = VegaRenderer(
        lines, "confusion.csv", template=str(REPOSITORY / "dvc-confusion.json"), x="predicted", y="actual", title="matrix"
    )
    drawing = vl_convert.vegalite_to_svg(shown.get_filled_template())
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", drawing)
    shares = [text for text in texts if re.fullmatch(r"\d+\.\d%", text)]
    expected = [f"{100 * cell / sum(row):.1f}%" for row in pixels[:3] for cell in row]
    assert sorted(shares) == sorted(expected * 2), "once for each state, and a class that does not occur has no row"
    assert {"main", "workspace", "matrix"} <= set(texts)
    assert [text for text in texts if text in names] == [*names[:3], *names, *names], "in truth downwards, predicted to the right"


def test_the_repository_holds_one_dvc_yaml() -> None:
    """DVC reads every dvc.yaml below the repository's root: a template of that name breaks `dvc repro` there."""
    others = [path for folder in ("pipeline", "stages", "tests", "docs") for path in (REPOSITORY / folder).rglob("dvc.yaml")]
    assert not others and (REPOSITORY / "dvc.yaml").is_file()
