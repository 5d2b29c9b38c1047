"""The tools for teacher caches: they name what is damaged and nothing else, and remove only what nobody needs."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from caches import ENCODED, PROVENANCE, build, compute_with, image, images, place_of, spoil
from conftest import TINY, Counted, teacher_of
from mgd_pipeline.caches.decoding import stored_prediction
from mgd_pipeline.caches.encoding import Fidelity
from mgd_pipeline.caches.format import Layout, sealed
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.caches.verify import Checked, cache_difference, verify_cache
from mgd_pipeline.data.images import read_image
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.networks.inference import predict_logits, resize_logits
from mgd_stages.cli import app
from mgd_stages.projects.init import init_project
from mgd_stages.run import progress
from mgd_stages.run.project import Project, open_project
from mgd_stages.run.teacher_cache import planned_layout
from mgd_stages.tools.cache_sizes import Teacher, cache_size

WIDE, DEEP = "data/targets/wide.zarr", "data/targets/deep.zarr"
DIFFERENT = "teacher.encoder: A has 'tu-test_resnet', B 'tu-test_efficientnet'"
RECHECK = ["recheck", "--teacher", "wide", "--sample", "20%", *(part for key in TINY for part in ("--set", key))]


@pytest.fixture
def finished(finished_project: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The finished project of all tests, to read; commands run in it."""
    monkeypatch.chdir(finished_project)
    return open_project(finished_project / "params.yaml", TINY)


@pytest.fixture
def own(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of it that may be changed; commands run in the copy."""
    monkeypatch.chdir(project.base)
    return project


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["cache", *arguments])


def damages(path: Path, share: float = 1.0) -> tuple[list[str], Checked]:
    lines: list[str] = []
    checked = verify_cache(path, share, lines.append)
    return lines, checked


def test_verify_names_exactly_the_damaged_record(tmp_path: Path, layout: Layout, counted: Counted) -> None:
    path = build(tmp_path, images(11))
    rng = np.random.default_rng(0)
    times = counted.of(30, 100)
    for _ in range(times):
        name, row = list(layout.records)[rng.integers(len(layout.records))], int(rng.integers(11))
        file, offset, size = place_of(path, name, row)
        whole = file.read_bytes()
        spoil(file, offset + int(rng.integers(size - 4)))
        lines, _ = damages(path)
        assert len(lines) == 2 and lines[0] == f"{file}: differs from what was committed"
        assert lines[1].startswith(f"{file}: {name} of row {row} (image 'image {row}')"), lines
        file.write_bytes(whole)
    lines, checked = damages(path)
    assert not lines and checked.records == 11 * len(layout.records)
    assert checked.files == checked.hashed == 2 + 4 * len(layout.records)
    counted.say(f"verify --full: {times} of {times} damaged records named, with shard, row and image, and nothing else")


@pytest.mark.usefixtures("layout")
def test_verify_continues_after_the_first_damage(tmp_path: Path) -> None:
    path = build(tmp_path, images(11))
    spoil(path / "logits/c/0/0/0/0", place_of(path, "logits", 1)[1])
    lines, checked = damages(path, 0.0)
    assert not lines and checked.records == 0, "a quick check reads no target and says so"
    spoil(path / "logits/c/2/0/0/0", 0)
    (path / "extents/c/1/0").unlink()
    files = [line.split(": ")[0].removeprefix(f"{path}/") for line in damages(path)[0]]
    assert sorted(files[:3]) == ["extents/c/1/0", "logits/c/0/0/0/0", "logits/c/2/0/0/0"]
    assert files[3:] == ["no record was checked"]


def test_exit_codes_tell_damage_from_absence_from_foreign_caches(own: Project) -> None:
    assert call("verify").exit_code == 0
    for wrong in (("--sample", "5"), ("--sample", "0%"), ("--sample", "101%"), ("--quick", "--full")):
        assert call("verify", *wrong).exit_code == 2
    shard = own.targets("wide") / "logits/c/0/0/0/0"
    spoil(shard, 7)
    assert call("verify", "--quick").exit_code == 0
    done = call("verify", "--full")
    assert done.exit_code == 3 and "wide.zarr: 2 damages found" in done.output and "deep.zarr: no damage found" in done.output
    assert "row 0 (image 'train_00000')" in done.output
    done = call("verify", "--full", "--json")
    assert done.exit_code == 3 and "error: " in done.stderr
    deep, wide = json.loads(done.stdout)
    assert deep["damages"] == [] and deep["records"] == 5 * 24
    assert len(wide["damages"]) == 2 and all("wide.zarr/logits/c/" in damage for damage in wide["damages"])
    shard.unlink()
    assert call("verify", "--quick", WIDE).exit_code == 3

    (own.targets("wide") / "commit.json").unlink()
    assert call("verify", WIDE).exit_code == call("verify", "nowhere").exit_code == 4
    first, second = call("list").output.splitlines()
    assert "deep.zarr" in first and "24 images" in first and "generation 1" in first
    assert "wide.zarr  cannot be read: CacheIncomplete" in second
    whole, broken = json.loads(call("list", "--json").stdout)
    assert broken["error"] == "CacheIncomplete" and "error" not in whole
    info = json.loads(call("info", DEEP, "--json").stdout)
    assert all(whole[key] == info[key] for key in ("fingerprint", "images", "bytes", "generation"))

    commit = own.targets("deep") / "commit.json"
    commit.chmod(0o644)
    commit.write_bytes(sealed({"format": 1, "files": {}}))
    assert call("verify", DEEP).exit_code == 5


def test_info_says_what_by_whom_and_how_good(finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.console, "quiet", False)  # it is restored afterwards
    done = call("info", WIDE)
    assert done.exit_code == 0, done.output
    cache = open_cache(finished.targets("wide"))
    parts = ("tu-test_resnet", "24 in 1 shard of up to", "logits 9x16x24 uint8", "mIoU (6 images", "batch_size up to 8")
    for part in (cache.fingerprint, *parts):
        assert part in done.output, part
    info = json.loads(call("info", WIDE, "--json").stdout)
    assert info["fingerprint"] == cache.fingerprint and info["provenance"] == cache.provenance and info["images"] == 24
    assert info["row"]["logits"] == "9x16x24 uint8" and f"{100 * info['on_labelled']['miou']:.1f} mIoU (6 images" in done.stdout
    assert info["skipped"] == {} and info["made_by"][0]["batch_size"] == "up to 8"
    quiet = CliRunner().invoke(app, ["--quiet", "cache", "info", WIDE]).stdout
    usual = done.stdout.splitlines(keepends=True)
    assert quiet == "".join(line for line in usual if not line.startswith("cache info:")) != done.stdout
    missing = CliRunner().invoke(app, ["--quiet", "cache", "info", "data/targets/none.zarr"])
    assert missing.exit_code == 4 and missing.stdout == "" and "none.zarr" in missing.stderr
    monkeypatch.chdir(tmp_path)
    done = call("info", str(finished.targets("wide")))
    assert done.exit_code == 0 and "on labelled images" not in done.output, "a cache needs no project to be looked at"


def test_info_measures_no_classes_of_another_order(own: Project) -> None:
    file = own.manifest / "classes.json"
    text = file.read_text()
    file.write_text(text.replace('"star"', '"Star"'))
    assert "Star 1" in call("info", WIDE).output, "it was only renamed"
    file.write_text(text.replace('"star", "crescent"', '"crescent", "star"'))
    assert "not known: the cache calls class 7 'star', which is class 8 of the project" in call("info", WIDE).output


def test_stored_predictions_are_the_teachers(finished: Project) -> None:
    """`info` measures the targets: upsampled as the network does, they have its classes."""
    manifest = read_manifest(finished.manifest, finished.base)
    teacher = teacher_of(finished, "wide")
    row = manifest.training[3]
    pixels = read_image(finished.base / manifest.root / row.image_path)
    live = resize_logits(predict_logits(teacher.network, pixels, teacher.normalisation), pixels.shape[:2]).argmax(0).numpy()
    stored = stored_prediction(open_cache(finished.targets("wide")), row.image_id)
    assert stored.shape == live.shape and (stored == live).mean() > 0.99


@pytest.mark.usefixtures("layout")
def test_what_an_encoding_keeps_of_nothing_is_not_said(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    bad = build(tmp_path / "bad", [image(f"bad {i}") for i in range(3)])
    assert "\nencoding:" not in call("info", str(bad)).output and "0 records compared" in call("verify", "--full", str(bad)).output
    path = build(tmp_path, images(3))
    commit = json.loads((path / "commit.json").read_bytes())
    del commit["self"]
    for notes in ([], commit["shards"] * 2, [{**commit["shards"][0], "fidelity": {**Fidelity(cosine=-1.0)._asdict()}}]):
        (path / "commit.json").unlink()
        (path / "commit.json").write_bytes(sealed({**commit, "shards": notes}))
        done = call("info", str(path))
        assert done.exit_code == 3 and done.stderr.startswith(f"error: {path}/commit.json: "), done.output


def test_diff_names_fields_and_images(tmp_path: Path) -> None:
    a = open_cache(build(tmp_path / "a", images(11)))
    assert not cache_difference(a, open_cache(build(tmp_path / "same", images(11)[::-1]))), "the order of rows says nothing"
    other = {**PROVENANCE, "teacher": {**PROVENANCE["teacher"], "encoder": "resnet50"}, "more": 1}
    wanted = [*images(10), image("new"), image(10, "changed")]
    b = open_cache(build(tmp_path / "b", wanted, provenance=other))
    assert cache_difference(a, b) == [
        "teacher.encoder: A has 'resnet18', B 'resnet50'",
        "more: A has None, B 1",
        "images: 1 only in B, such as 'image new'",
        "images: 1 with other contents, such as 'image 10'",
    ]
    noisy = open_cache(build(tmp_path / "noisy", images(11), compute=compute_with(noise=1e-3)))
    assert "global_descriptors: 11 of 11 rows of the same images differ, such as that of 'image 0'" in cache_difference(a, noisy)


@pytest.mark.usefixtures("finished")
def test_diff_exits_with_1_where_caches_differ() -> None:
    assert call("diff", WIDE, WIDE).exit_code == 0
    assert json.loads(call("diff", WIDE, WIDE, "--json").stdout) == []
    done, as_json = call("diff", WIDE, DEEP), call("diff", WIDE, DEEP, "--json")
    assert done.exit_code == as_json.exit_code == 1
    assert DIFFERENT in done.output and DIFFERENT in json.loads(as_json.stdout)


@pytest.mark.usefixtures("finished")
def test_recheck_agrees_with_the_teacher() -> None:
    done = call(*RECHECK)
    assert done.exit_code == 0, done.output
    assert "5 of 24 images seen again" in done.output and "same class:         100.000 %" in done.output
    again = json.loads(call(*RECHECK, "--json").stdout)
    assert again["images"] == 5 and again["same_class"] == 1
    assert again["errors"]["logits"]["largest"] <= again["largest_uint8_step"] / 2 * 1.01
    assert f"largest error {again['errors']['logits']['largest']:.3g}, mean " in done.output


def test_estimates_are_what_caches_take(tmp_path: Path) -> None:
    """Plain caches up to small files; compressed ones by rows of a plain cache, whose uint8 logits differ a little."""
    options, taken = ENCODED.model_copy(update={"compression": "none", "logits": "uint8", "region_embeddings": "float16"}), {}
    for kind, changed in (("plain", options), ("small", ENCODED)):
        (tmp_path / kind).mkdir()
        path = build(tmp_path / kind, images(300), layout=planned_layout(changed, (5, 6), 64, 96))
        taken[kind] = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    teacher = Teacher("t", 300, 5, 6, (64, 96))
    plain = cache_size(teacher, options)
    assert plain.low == plain.high == pytest.approx(sum(taken["plain"]), rel=0.03)
    assert plain.files == len(taken["plain"]) and plain.source == "calculated"
    measured = cache_size(replace(teacher, cache=open_cache(tmp_path / "plain/t.zarr")), ENCODED)
    assert measured.low == measured.high == pytest.approx(sum(taken["small"]), rel=0.06)
    assert measured.files == len(taken["small"]) and measured.source == "measured"
    typical = cache_size(replace(teacher, cache=open_cache(tmp_path / "plain/t.zarr"), features=7), ENCODED)
    assert typical.source == "typical" and typical.low < typical.high < plain.low, "a cache of another teacher measures nothing"


def test_a_project_is_estimated_by_its_teachers_and_before_them_by_numbers(finished: Project, tmp_path: Path) -> None:
    facts = json.loads(call("estimate", *(part for key in TINY for part in ("--set", key)), "--json").stdout)
    encodings = ["float16", "uint8", "log-probability"]
    assert [(one["teacher"], one["encoding"]) for one in facts] == [(name, e) for name in ("wide", "deep") for e in encodings]
    assert {one["source"] for one in facts} == {"calculated", "measured"} and {one["images"] for one in facts} == {24}
    result = call("estimate", "--config", str(finished.base / "params.yaml"), *(part for key in TINY for part in ("--set", key)))
    assert [line.split(" | ")[0].strip("| ") for line in result.stdout.splitlines()[2:]] == [
        *("wide",) * 3, *("deep",) * 3, *("**together**",) * 3
    ]  # fmt: skip
    init_project("shapes", None, "1/4", tmp_path / "new")
    new = call("estimate", "--config", str(tmp_path / "new/params.yaml"))
    assert new.exit_code == 2 and "Without a manifest, name the numbers: `mgd-pipeline cache estimate --images" in new.stderr
    for wrong, said in {
        ("--size", "512"): "--size 512: write height and width of the images in pixels, such as 512x683",
        ("--classes", "0", "--features", "0"): "--classes 0 --features 0: a teacher gives classes, features or both",
        ("--stride", "3"): "--stride 3: must be one of 2, 4, 8, 16",
        ("--images", "9" * 30): f"{int('9' * 30):,} images of 512x512 pixels: more than a teacher cache holds, ...",
        ("--size", "9000x9000", "--classes", "900"): "targets.stride = 4: the logits of an image of 9024x9024 pixels would ...",
    }.items():
        refused = call("estimate", "--images", "10", *wrong)
        assert refused.exit_code == 2 and f"{refused.stderr.strip()}\n".startswith(f"error: {said}\n".replace("...\n", ""))
    some = call("estimate", "--images", "90000", "--size", "1024x2048", "--classes", "171").stdout
    assert "| uint8 " in some and "| float16 " not in some and "float16: 90,000 images of 1024x2048 pixels: more than" in some


def test_the_tables_of_the_administrators_page_are_the_commands_own() -> None:
    page = (Path(__file__).parents[1] / "docs/administration.md").read_text(encoding="utf-8")
    tables = re.findall(r"^```\nmgd-pipeline cache (estimate --images .+)\n```\n\n((?:\|.+\n)+)", page, re.MULTILINE)
    assert len(tables) == 4
    for command, table in tables:
        assert call(*command.split()).stdout == table, command


def test_gc_lists_first_and_keeps_what_is_young_or_needed(own: Project) -> None:
    work = own.base / ".mgd/work"
    mine = next(work.glob("targets-*/*x*"))
    (mine / "stage-shard-host-1-abc").mkdir()
    old = work / "targets-0123456789abcdef/64x96/shards/00000-x"
    old.mkdir(parents=True)
    (old / "logits").write_bytes(b"123")
    done = call("gc")
    assert done.exit_code == 0 and "nothing of targets" in done.output, "all of it is younger than 14 days"
    past = time.time() - 20 * 86400
    for path in [*old.parents[2].rglob("*"), old.parents[2], *mine.rglob("*")]:
        os.utime(path, (past, past))
    done = call("gc")
    assert done.output.count("would delete") == 2 and old.exists() and "nothing was deleted" in done.output
    done = call("gc", "--delete")
    assert done.output.count("deleted: ") == 2
    assert not old.parents[2].exists() and not list(mine.glob("stage-*"))
    assert list(mine.glob("shards/*/logits")), "shards of a cache that is there let it grow"
