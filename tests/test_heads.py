"""Heads on cached embeddings: trained and run without the network behind the embeddings, on the geometry of the cache."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import mgd_pipeline.training.heads as heads
import mgd_stages.run.loaded_head as loaded_head
import mgd_stages.run.loaded_teacher as loaded_teacher
import mgd_stages.whole.estimate as estimate
import mgd_stages.whole.run as whole
from conftest import TINY
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import CacheError, CacheIncomplete, MGDError, ParamsError, ProvenanceMismatch, WeightsError
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.networks.weights import read_metadata, read_state_dict, save_weights
from mgd_pipeline.params import HeadTeacher, TargetsParams, TimmTeacher
from mgd_pipeline.teachers.heads import Head
from mgd_pipeline.teachers.kinds import build_teacher
from mgd_pipeline.teachers.looks import class_scores, dense_targets, look_of_regions
from mgd_pipeline.teachers.teacher import Teacher, TeacherOutputs
from mgd_pipeline.training.heads import train_head
from mgd_stages.doctor import targets
from mgd_stages.projects.dvc_file import disagreements, read_stages
from mgd_stages.projects.dvc_yaml import write_dvc
from mgd_stages.projects.presets import render_params
from mgd_stages.run.loaded_head import load_head
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.compare_teachers import compare_teachers
from mgd_stages.stages.evaluate import evaluate
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher
from mgd_stages.study.matrix import Matrix, projects_and_runs, write_projects
from mgd_stages.study.variants import named_variants
from mgd_stages.whole.run import run_project

CPU = torch.device("cpu")


def head_line(name: str = "linear", **keys: object) -> str:
    """The override that adds a head on the embeddings of wide."""
    section = {"head": "linear", "of": "wide", "weights": f"data/teachers/{name}.safetensors", "steps": 20, **keys}
    return f"teachers.{name}={json.dumps(section)}"


def with_heads(project: Project, *overrides: str) -> Project:
    return open_project(project.base / "params.yaml", [*TINY, *(overrides or [head_line()])])


@pytest.fixture
def headed(project: Project) -> Project:
    """A finished project with a head whose teacher's cache has grown by the evaluation split."""
    headed = with_heads(project)
    precompute_teachers(headed, "wide", device=CPU)
    return headed


@pytest.fixture
def without_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No teacher's network can be built."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network behind the embeddings was built")

    monkeypatch.setattr(loaded_teacher, "build_teacher", refuse)


def trained(project: Project, name: str) -> dict[str, torch.Tensor]:
    train_teacher(project, name, Machine(CPU))
    return read_state_dict(project.teacher(name))


class Ramp(torch.nn.Module):
    """Features that are the column and the row of each pixel of the input, times 3 plus 1."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images_B3HW: torch.Tensor) -> TeacherOutputs:
        rows, columns = torch.meshgrid(*(torch.arange(float(side)) for side in images_B3HW.shape[-2:]), indexing="ij")
        return TeacherOutputs(None, (3 * torch.stack([columns, rows]) + 1)[None].repeat(len(images_B3HW), 1, 1, 1))


@pytest.mark.parametrize(("size", "region_stride", "stride"), [((48, 72), 16, 4), ((50, 83), 8, 2), ((37, 64), 16, 8)])
def test_a_ramp_of_embeddings_is_a_ramp_of_logits_at_the_pixels(size: tuple[int, int], region_stride: int, stride: int) -> None:
    """From the image over the embeddings to the logits as they are stored, each pixel stays where it is."""
    options = TargetsParams(region_stride=region_stride, stride=stride)  # pyright: ignore[reportArgumentType]
    teacher = Teacher(Ramp().eval(), Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), align_corners=False, multiple=1)
    (targets,) = dense_targets(teacher, [np.zeros((*size, 3), np.uint8)], options)
    embeddings = torch.from_numpy(targets.region_embeddings.astype(np.float32))[None]
    head = Head(HeadTeacher(head="linear", of="x", weights="x"), 2, 2)
    weights = {"layers.0.weight": 2 * torch.eye(2)[:, :, None, None], "layers.0.bias": torch.tensor([-2.0, 0.0])}
    head.load_state_dict({**weights, "mean": torch.full((2, 1, 1), 5.0), "std": torch.full((2, 1, 1), 0.5)})
    with torch.no_grad():
        logits = class_scores(look_of_regions(head(embeddings), size, options).logits, size)[0]
    # Between the centres of the outermost whole blocks; cells of the logits round the kinks there.
    first = region_stride // 2
    last = [side // region_stride * region_stride - first - 4 for side in size]
    rows, columns = np.mgrid[first + 4 : last[0], first + 4 : last[1]]
    inside = logits[:, first + 4 : last[0], first + 4 : last[1]].numpy()
    assert inside.size and np.allclose(
        inside, 4 * (3 * np.stack([columns, rows]) + 1 - 5) + np.array([-2, 0])[:, None, None], atol=0.02
    )


def test_a_head_needs_neither_the_network_nor_its_weights(headed: Project, without_networks: None) -> None:
    """A student, the comparison and the evaluation take it as any teacher."""
    overrides = ["losses.pixel_teachers=[linear]", "losses.image_teacher=linear", "losses.region_teacher=deep"]
    project = with_heads(headed, head_line(), *overrides)
    project.teacher("wide").unlink()
    state = trained(project, "linear")
    assert all(value.equal(trained(project, "linear")[key]) for key, value in state.items()), "by seed and name alone"
    precompute_teachers(project, "linear", device=CPU)

    manifest, notes = read_manifest(project.manifest, project.base), read_metadata(project.teacher("linear"))
    embeddings, cache = open_cache(project.targets("wide")), open_cache(project.targets("linear"))
    assert notes["trained_on"] == manifest.partition_fingerprint and notes["labelled_images"] == len(manifest.labelled)
    assert notes["cache"] == {"fingerprint": embeddings.fingerprint, "generation": 2} and notes["of"] == "wide"
    assert cache.provenance["teacher"]["embeddings"] == embeddings.fingerprint
    assert cache.layout.features == 0 and set(cache) == {row.image_id for row in manifest.training}
    numbers = json.loads((project.results / "teachers/linear.json").read_text())
    assert 0 <= numbers["miou"] <= 1 and numbers["parameters"] == 16 * 9 + 9 and numbers["macs"] == 16 * 9 * 4
    assert (project.results / "teachers/linear-masks.parquet").exists()

    # What is stored are the head's logits of the embeddings of the same image.
    row = manifest.training[3]
    linear = torch.nn.Conv2d(16, 9, 1)
    linear.load_state_dict({"weight": state["layers.0.weight"], "bias": state["layers.0.bias"]})
    seen = (embeddings[row.image_id].features - state["mean"]) / state["std"]
    with torch.no_grad():
        logits = linear(seen[None])[0]
    size = manifest.size(row)
    expected = class_scores(look_of_regions(logits[None], size, project.params.targets).logits, size)[0]
    step = float((logits.max() - logits.min()) / 255)
    assert torch.allclose(cache[row.image_id].at_pixels(), expected, atol=step)

    compare_teachers(project)
    train_student(project, Machine(CPU))
    evaluate(project, device=CPU)


def test_a_first_head_adds_the_evaluation_split_to_the_cache_of_its_teacher_alone(project: Project) -> None:
    before = open_cache(project.targets("wide"))
    sums, keys = {name: of.copy() for name, of in before.index.checksums.items()}, before.index.keys
    headed = with_heads(project)
    for name in ("wide", "deep"):
        precompute_teachers(headed, name, device=CPU)
    manifest, after = read_manifest(project.manifest, project.base), open_cache(project.targets("wide"))
    held_out = [manifest.key(row) for row in manifest.split("test")]
    assert after.fingerprint == before.fingerprint and after.index.keys == [*keys, *held_out]
    assert all((after.index.checksums[name][: len(keys)] == of).all() for name, of in sums.items()), "nothing is computed again"
    assert len(open_cache(project.targets("deep")).index) == len(manifest.training)


def test_the_rest_of_the_canvas_does_not_matter(headed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 48 x 72 pixels have 3 x 5 of the canvas' 4 x 6 cells."""
    project = with_heads(headed, head_line("conv", head="conv", hidden=8))
    plain = trained(project, "conv")
    manifest = read_manifest(project.manifest, project.base)
    row = manifest.training[0]
    targets = load_head(project, "conv", manifest, CPU).targets(row, mirrored=False)
    real = TargetCache.record

    def poisoned(cache: TargetCache, name: str, row: int) -> np.ndarray:
        record = real(cache, name, row).copy()
        if name == "region_embeddings":
            assert record.shape[1:] == (4, 6)
            record[:, 3:], record[:, :, 5:] = 1e4, 1e4
        return record

    monkeypatch.setattr(TargetCache, "record", poisoned)
    assert all(value.equal(trained(project, "conv")[key]) for key, value in plain.items())
    again = load_head(project, "conv", manifest, CPU).targets(row, mirrored=False)
    assert np.array_equal(targets.logits, again.logits)


def test_a_head_learns_what_its_embeddings_tell(headed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings that are the classes of the masks: every kind learns them, and self-training spreads them to other images."""
    manifest = read_manifest(headed.manifest, headed.base)
    classes = len(manifest.classes)

    def truth(cache: object, manifest: object, row: object, *, mirrored: bool = False) -> np.ndarray:
        mask = read_manifest(headed.manifest, headed.base).mask(row)  # pyright: ignore[reportArgumentType]
        cells = np.stack([(mask == number) for number in range(classes)]).astype(np.float32)
        blocks = torch.nn.functional.avg_pool2d(torch.from_numpy(cells)[None], 16, ceil_mode=True)[0].numpy()
        return np.concatenate([blocks, np.zeros((16 - classes, *blocks.shape[1:]), np.float32)]).astype(np.float16)

    monkeypatch.setattr(heads, "cached_embeddings", truth)
    kinds = {
        "linear": {"head": "linear"},
        "mlp": {"head": "mlp"},
        "conv": {"head": "conv"},
        "self": {"head": "mlp", "self_training": 0.5},
    }
    lines = [head_line(name, hidden=32, **{**kind, "steps": 200, "learning_rate": 0.01}) for name, kind in kinds.items()]
    project = with_heads(headed, *lines)
    states = {name: trained(project, name) for name in kinds}
    for name in kinds:
        log = (project.results / f"train-teacher-{name}/plots/labelled.tsv").read_text().splitlines()
        first, last = (float(line.split("\t")[1]) for line in (log[1], log[-1]))
        assert last < 0.6 * first, name
    curve = (project.results / "train-teacher-self/plots/unlabelled.tsv").read_text().splitlines()
    assert [int(line.split("\t")[0]) for line in curve[1:]] == list(range(110, 201, 10)), "in the second half"
    assert read_metadata(project.teacher("self"))["unlabelled_images"] == len(manifest.unlabelled)
    assert not (project.results / "train-teacher-mlp/plots/unlabelled.tsv").exists()
    assert states["mlp"].keys() == states["self"].keys()


def test_unlabelled_images_matter_to_self_training_alone(headed: Project) -> None:
    """So a cache that grows by unlabelled images keeps the targets that other heads made."""
    manifest, cache = read_manifest(headed.manifest, headed.base), open_cache(headed.targets("wide"))
    left_out = manifest.unlabelled[0].image_id
    fewer = replace(manifest, subsets={name: subset for name, subset in manifest.subsets.items() if name != left_out})
    for threshold in (None, 0.01):
        params = HeadTeacher(head="linear", of="wide", weights="x", steps=6, self_training=threshold)
        heads = [train_head(params, cache, images, seed=0, device=CPU).layers.state_dict() for images in (manifest, fewer)]
        assert heads[0]["0.weight"].equal(heads[1]["0.weight"]) == (threshold is None)


def test_mirror_images_are_seen_mirrored(project: Project) -> None:
    project = with_heads(project, head_line(), "targets.mirrored=true")
    for name in ("wide", "linear"):
        if name == "linear":
            train_teacher(project, name, Machine(CPU))
        precompute_teachers(project, name, device=CPU)
    cache, manifest = open_cache(project.targets("linear")), read_manifest(project.manifest, project.base)
    assert len(cache.index) == 2 * len(manifest.training)
    targets = cache[manifest.training[0].image_id]
    assert targets.mirrored is not None and not targets.mirrored.logits.equal(targets.logits)
    numbers = json.loads((project.results / "teachers/linear.json").read_text())
    assert {"miou_mirrored", "agreement_mirrored"} <= numbers.keys()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([head_line(of="wde")], "teachers.linear.of: 'wde' is not among teachers; name one of wide, deep; nearest is 'wide'"),
        ([head_line(), head_line("conv", of="linear")], "teachers.conv.of: 'linear' is a head itself; name one of wide, deep"),
        (
            [head_line(), "train_teachers=[wide, deep, linear]"],
            "'linear' is a head, which is always trained here; leave it out of this list",
        ),
        ([head_line(self_training=1)], "teachers.linear.self_training = 1: must be"),
        ([head_line(kind="mlp")], "teachers.linear.kind = 'mlp': unknown key; known keys: head, of, weights"),
        ([head_line(head="liner")], "teachers.linear.head = 'liner': must be one of linear, mlp, conv; nearest is 'linear'"),
    ],
)
def test_what_the_parameters_refuse(project: Project, overrides: list[str], said: str) -> None:
    with pytest.raises(ParamsError) as caught:
        with_heads(project, *overrides)
    (line,) = str(caught.value).splitlines()
    assert said in line


def test_what_is_refused_before_anything_is_computed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(kind: type[MGDError], run: object, said: str) -> None:
        assert callable(run)
        with pytest.raises(kind) as caught:
            run()
        assert said in str(caught.value) and "\n" not in str(caught.value)

    headed = with_heads(project)
    train = lambda: train_teacher(headed, "linear", Machine(CPU))  # noqa: E731
    run = "run `mgd-pipeline precompute-teachers --teacher wide`"
    refused(CacheIncomplete, train, "wide.zarr: has no embeddings of the test images, on which heads are measured (such as ")
    refused(CacheIncomplete, train, f"{run}, which computes these alone")
    monkeypatch.setenv("DVC_STAGE", "train-head@linear")
    refused(CacheIncomplete, train, "run `dvc repro --force --single-item precompute-teachers@wide`, which computes these alone")
    monkeypatch.delenv("DVC_STAGE")
    precompute_teachers(headed, "wide", device=CPU)
    refused(
        WeightsError, lambda: precompute_teachers(headed, "linear", device=CPU), "no such file; run `mgd-pipeline train-teacher"
    )
    train()
    other = with_heads(project, head_line(head="mlp"))
    refused(
        WeightsError, lambda: precompute_teachers(other, "linear", device=CPU), "does not fit teachers.linear, a mlp head; run `"
    )
    finer = with_heads(project, head_line(), "targets.region_stride=8")
    refused(ProvenanceMismatch, lambda: precompute_teachers(finer, "linear", device=CPU), "region_stride: the cache has 16")
    precompute_teachers(finer, "wide", device=CPU)
    refused(WeightsError, lambda: precompute_teachers(finer, "linear", device=CPU), "was trained on other embeddings (")
    region = with_heads(
        finer, head_line(), "targets.region_stride=8", "losses.region_teacher=linear", "losses.pixel=0", "losses.image=0"
    )
    train_teacher(region, "linear", Machine(CPU))
    precompute_teachers(region, "linear", device=CPU)
    refused(ParamsError, lambda: train_student(region, Machine(CPU)), "losses.region_teacher")
    margin = ["losses.pixel_teachers=[wide]", "losses.region=0", "losses.pixel_weights=[margin]", "losses.region_teacher=linear"]
    read = with_heads(finer, head_line(), "targets.region_stride=8", "losses.image=0", *margin)
    refused(ParamsError, lambda: train_student(read, Machine(CPU)), "losses.region_teacher: teacher linear gives no embeddings")
    refused(
        ParamsError,
        lambda: loaded_teacher.load_teacher(region, "linear", read_manifest(region.manifest, region.base), CPU),
        "cannot see images",
    )
    region.targets("wide").rename(region.base / "aside")
    refused(CacheIncomplete, lambda: train_teacher(region, "linear", Machine(CPU)), f"wide.zarr is not there; {run}")


def test_what_a_head_made_from_earlier_embeddings_is_refused(headed: Project) -> None:
    """Nothing in the parameters tells that the teacher behind the head was trained again."""
    project = with_heads(headed, head_line(), "losses.pixel_teachers=[linear]", "losses.image_teacher=deep")
    trained(project, "linear")
    precompute_teachers(project, "linear", device=CPU)
    path = project.teacher("wide")
    state, notes = read_state_dict(path), read_metadata(path)
    save_weights(path, {key: value * 1.5 if value.is_floating_point() else value for key, value in state.items()}, notes)
    precompute_teachers(project, "wide", device=CPU)
    for stage in (compare_teachers, lambda project: train_student(project, Machine(CPU))):
        with pytest.raises(ProvenanceMismatch) as caught:
            stage(project)
        assert "linear.zarr: was made from other embeddings of wide (" in str(caught.value)
        assert "run `mgd-pipeline train-teacher --teacher linear`, then `" in str(caught.value) and "\n" not in str(caught.value)
    shutil.rmtree(project.targets("wide"))  # as on another machine, which got the caches that the student reads
    train_student(with_heads(headed, head_line(), "losses.pixel_teachers=[linear]", "losses.region_teacher=deep"), Machine(CPU))


def test_a_head_of_classes_in_another_order_is_refused(headed: Project) -> None:
    """After a renaming the cache behind the head has the names of another day, which cannot tell."""
    trained(headed, "linear")
    manifest = read_manifest(headed.manifest, headed.base)
    swapped = replace(manifest, classes=(*manifest.classes[:-2], manifest.classes[-1], manifest.classes[-2]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(WeightsError, match=r"teacher linear calls class 7 'star', which is"):
        patch.setattr(loaded_head, "base_cache", lambda *_: open_cache(headed.targets("wide")))
        load_head(headed, "linear", swapped, CPU)


def test_a_head_on_a_teacher_of_other_labels_knows_these_labels(headed: Project) -> None:
    cache = open_cache(headed.targets("wide"))
    manifest = read_manifest(headed.manifest, headed.base)
    other = manifest.labelled[0].image_id
    lists = {"labelled": "labelled.txt", "unlabelled": "unlabelled.txt"}
    (headed.base / "labelled.txt").write_text("".join(f"{row.image_id}\n" for row in manifest.labelled[1:]))
    (headed.base / "unlabelled.txt").write_text(
        "".join(f"{row.image_id}\n" for row in [*manifest.unlabelled, manifest.rows[other]])
    )
    fewer = with_heads(headed, head_line(), f"data.partition={json.dumps(lists)}")
    prepare_data(fewer)
    with pytest.raises(ProvenanceMismatch, match="was trained on the labels of another partition"):
        train_teacher(fewer, "linear", Machine(CPU))
    studied = with_heads(headed, head_line(), f"data.partition={json.dumps(lists)}", "losses.other_partition=true")
    trained(studied, "linear")
    here = read_manifest(fewer.manifest, fewer.base).partition_fingerprint
    assert read_metadata(studied.teacher("linear"))["trained_on"] not in (None, here, cache.provenance["teacher"]["trained_on"])


def test_images_that_the_cache_lacks_are_images_that_cannot_be_read(headed: Project) -> None:
    trained(headed, "linear")
    manifest = read_manifest(headed.manifest, headed.base)
    row = manifest.unlabelled[0]
    cache = open_cache(headed.targets("wide"))
    real = loaded_head.cached_embeddings

    def lacking(cache: object, manifest: object, image: object, **options: object) -> np.ndarray:
        if image == row:
            raise CacheIncomplete("it was skipped: broken")
        return real(cache, manifest, image, **options)  # pyright: ignore[reportArgumentType]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded_head, "cached_embeddings", lacking)
        with pytest.raises(CacheError, match="it was skipped: broken"):
            precompute_teachers(headed, "linear", device=CPU)
        precompute_teachers(headed, "linear", device=CPU, on_error="skip")
    made = open_cache(headed.targets("linear"))
    assert len(made.index.place) == len(manifest.training) - 1 and "it was skipped: broken" in made.index.problems
    precompute_teachers(headed, "linear", device=CPU)
    assert len(open_cache(headed.targets("linear")).index.place) == len(manifest.training) and cache.generation == 2


def test_dvc_yaml_follows_the_heads(project: Project) -> None:
    """In a file with comments and stages of its owner, and only if there are heads; other stages stay as they are."""
    path = project.base / "dvc.yaml"
    path.unlink(missing_ok=True)
    write_dvc(project)
    path.write_text(plain := path.read_text().replace("  precompute-teachers:", "  # ours\n  precompute-teachers:"))
    one, two = with_heads(project), with_heads(project, head_line(), head_line("conv", of="deep"))
    assert (f"{path}: no stage trains the head linear", True) in [(one.said, one.fails) for one in disagreements(one)]
    assert "added train-head" in write_dvc(one) and disagreements(one) == []
    assert "  # ours\n  precompute-teachers:" in path.read_text()
    stages = {stage.name: stage for stage in read_stages(path.read_text(), one)}
    assert {"data/targets/wide.zarr", "data/manifest/partition.parquet"} <= stages["train-head@linear"].dependencies
    assert stages["train-head@linear"].outputs >= {"data/teachers/linear.safetensors"}
    assert stages["precompute-teachers@linear"].dependencies >= {"data/teachers/linear.safetensors"}
    assert stages["train-head@linear"].params == {"seed", "teachers.linear"}
    assert stages["precompute-teachers@wide"].params == {"teachers.wide", "targets", "evaluation"}

    assert "wrote the heads linear and conv into train-head" in write_dvc(two) and disagreements(two) == []
    stages = {stage.name: stage for stage in read_stages(path.read_text(), two)}
    assert "data/targets/deep.zarr" in stages["train-head@conv"].dependencies
    assert write_dvc(two) == [f"{path}: nothing to change"]
    path.write_text(path.read_text().replace("        - data/targets/${item}.zarr\n", ""))
    assert all("must depend on data/targets/" in one.said and one.fails for one in disagreements(two))
    assert write_dvc(two) == ["added data/targets/${item}.zarr to train-head"] and disagreements(two) == []
    assert "removed train-head" in write_dvc(project) and path.read_text() == plain and disagreements(project) == []


def test_run_makes_the_cache_then_the_head_then_its_targets(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The backbone's stage runs for a first head, and not for another setting of the head or a second head."""
    ran: list[str] = []
    real = whole._run
    monkeypatch.setattr(whole, "_run", lambda project, stage, *others: (ran.append(stage), real(project, stage, *others)))
    monkeypatch.setattr(estimate, "WORTH_IT", 1)
    heard = ["losses.pixel_teachers=[linear]", "losses.image_teacher=deep", "losses.region_teacher=deep"]
    run_project(with_heads(project, head_line(steps=400), *heard), Machine(CPU))
    said = capsys.readouterr().out
    assert [stage for stage in ran if "wide" in stage or "linear" in stage] == [
        *("precompute-teachers@wide", "train-head@linear", "precompute-teachers@linear")
    ]
    assert {"precompute-teachers@deep", "train-teacher@wide"}.isdisjoint(ran) and "train-student" in ran
    assert "precompute-teachers wide: runs, because heads on its embeddings changed" in said
    assert "  train-head linear: " in said and "no estimate" not in said
    again = with_heads(project, head_line(steps=400, learning_rate=0.01), head_line("mlp", head="mlp", steps=30), *heard)
    ran.clear()
    run_project(again, Machine(CPU))
    of_heads = ["train-head@linear", "train-head@mlp", "precompute-teachers@linear", "precompute-teachers@mlp"]
    assert sorted(ran[:4]) == sorted(of_heads) and not [stage for stage in ran if stage.endswith(("@wide", "@deep"))]
    checks = {check.found for check in targets.weights(again, read_manifest(again.manifest, again.base), partition=True)}
    path = again.teacher("mlp")
    assert f"teachers.mlp: {path} fits mlp head on wide and the 9 classes" in checks


def test_a_study_has_a_head_for_each_of_its_caches(project: Project, tmp_path: Path) -> None:
    """Teachers are shared by runs whose caches have other options; a head belongs to one cache."""
    headed = with_heads(project, head_line(), "losses.pixel_teachers=[linear]")
    (config := project.base / "headed.yaml").write_text(render_params(headed.params))
    known = named_variants(headed.params)
    matrix = Matrix(["1/4"], 1, [known["distilled"], known["regions-8"]])
    projects, runs = projects_and_runs(config, [], tmp_path / "study", matrix)
    write_projects(projects, runs)
    heads = [Project(run.caching, projects[run.caching]).teacher("linear") for run in runs]
    assert len(set(heads)) == 2 and not any(
        (run.shared / "data/teachers") in head.parents for run, head in zip(runs, heads, strict=True)
    )
    for run, head in zip(runs, heads, strict=True):
        head.parent.mkdir(parents=True, exist_ok=True)
        head.touch()
        assert Project(run.folder, projects[run.folder]).teacher("linear").samefile(head)


def test_finer_cells_from_a_larger_image(tmp_path: Path) -> None:
    """A ViT with patches of 16 pixels that sees the image at twice its size: four times the cells, each of a patch of its own."""
    torch.manual_seed(0)
    backbone = timm.create_model("test_vit", num_classes=0)
    save_weights(tmp_path / "vit.safetensors", backbone.state_dict(), {})
    image = np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8)
    made = {}
    for region_stride, short_side in ((16, None), (8, None), (8, 96)):
        params = TimmTeacher(timm="test_vit", weights="vit.safetensors", short_side=short_side)
        options = TargetsParams(region_stride=region_stride)  # pyright: ignore[reportArgumentType]
        made[region_stride, short_side] = dense_targets(build_teacher("vit", params, ("a", "b"), tmp_path), [image], options)[0]
    coarse, interpolated, fine = (targets.region_embeddings for targets in made.values())
    assert fine.nbytes == interpolated.nbytes == 4 * coarse.nbytes

    def roughness(cells: np.ndarray) -> float:
        """How far cells are from the mean of their neighbours: little between the patches of a coarser map."""
        inner = cells.astype(np.float32)
        return float(np.abs(inner[:, :, 1:-1] - (inner[:, :, :-2] + inner[:, :, 2:]) / 2).mean())

    assert roughness(fine) > 2 * roughness(interpolated)
