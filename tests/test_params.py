"""params.yaml: every mistake becomes one line with the key, the value and what would be right."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import PLAIN
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import IdLists, LossesParams
from mgd_pipeline.params_file import load_params, override_params, parse_params
from mgd_stages.projects.presets import preset, render_params

SHAPES = override_params(preset("shapes", "data/raw/shapes", "1/8"), PLAIN).model_dump()
WIDE = SHAPES["teachers"]["wide"]
ABSENT = object()
VOC = {"dataset": "voc", "root": "x", "partition": "1/8"}
FOLDER = {**VOC, "dataset": "folder", "classes": ["a", "b"]}


def changed(changes: dict[str, object]) -> dict[str, Any]:
    """The parameters of shapes with some dotted keys set, or removed where the value is ABSENT."""
    raw = copy.deepcopy(SHAPES)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        section = raw
        for parent in parents:
            section = section[parent]
        section[last] = value
        if value is ABSENT:
            del section[last]
    return raw


def complaint(changes: dict[str, object]) -> str:
    with pytest.raises(ParamsError) as caught:
        parse_params(changed(changes))
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sed": 1}, "sed = 1: unknown key; nearest is 'seed'"),
        ({"student.network.encodr": "a"}, "student.network.encodr = 'a': unknown key; nearest is 'encoder'"),
        ({"teachers.wide.wieghts": "a"}, "teachers.wide.wieghts = 'a': unknown key; nearest is 'weights'"),
        ({"cutmix.zzz": None}, "cutmix.zzz = null: unknown key; known keys: boxes, area, partner"),
        ({"student.ohem": {"treshold": 0.7}}, "student.ohem.treshold = 0.7: unknown key; nearest is 'threshold'"),
        ({"data": {**VOC, "pratition_seed": 1}}, "data.pratition_seed = 1: unknown key; nearest is 'partition_seed'"),
        ({"data": {**VOC, "test": 9}}, "data.test = 9: unknown key; it belongs to dataset shapes, not voc; remove it"),
        # A teacher called like the tag by which pydantic names a data set.
        (
            {"teachers.voc": {**WIDE, "decoder": "unet"}},
            "teachers.voc.decoder = 'unet': must be one of deeplabv3plus, fpn, upernet...",
        ),
        ({"student.learning_rate": False}, "student.learning_rate = false: must be a number"),
        ({"student.learning_rate": None}, "student.learning_rate = null: must be a number"),
        ({"student.learning_rate": 0}, "student.learning_rate = 0: must be greater than 0"),
        ({"student.learning_rate": float("nan")}, "student.learning_rate = nan: must be finite"),
        ({"student.steps": 10.5}, "student.steps = 10.5: must be a whole number"),
        ({"student.steps": "10"}, "student.steps = '10': must be a whole number"),
        ({"student.steps": True}, "student.steps = true: must be a whole number"),
        ({"student.labelled_batch": 1}, "student.labelled_batch = 1: must be at least 2"),
        ({"student.momentum": 1}, "student.momentum = 1: must be less than 1"),
        ({"views.flip": 2}, "views.flip = 2: must be at most 1"),
        ({"views.scales": []}, "views.scales = []: must have at least 1 entry, not 0"),
        ({"views.scales": 1.0}, "views.scales = 1.0: must be a list; write [1.0]"),
        ({"views.crop": 64}, "views.crop = 64: must be a list; write [64, 64]"),
        ({"views.crop": [64, 64, 3]}, "views.crop = [64, 64, 3]: must have at most 2 entries, not 3"),
        ({"views.crop": ["64", 64]}, "views.crop[0] = '64': must be a whole number"),
        ({"views.crop": [100, 64]}, "views.crop = [100, 64]: sides must be multiples of 32, such as [96, 64]"),
        ({"views.crop": [8, 64]}, "views.crop = [8, 64]: sides must be multiples of 32, such as [32, 64]"),
        ({"teachers.deep.decoder_channels": 48}, "teachers.deep.decoder_channels = 48: fpn normalises in 32 groups; take a..."),
        ({"cutmix.area": [0.5, 0.2]}, "cutmix.area = [0.5, 0.2]: write the lower bound first, both at most 1, such as [0.25, 0.5]"),
        ({"cutmix.area": [0.5, 2]}, "cutmix.area = [0.5, 2]: write the lower bound first, both at most 1, such as [0.25, 0.5]"),
        ({"data.root": ""}, "data.root = '': must not be empty"),
        ({"data.root": 3}, "data.root = 3: must be text; put it in quotes"),
        ({"data": None}, "data = null: must be a section with keys such as dataset, root, partition"),
        ({"views": 3}, "views = 3: must be a section with keys such as crop, scales, flip"),
        ({"student.ohem": True}, "student.ohem = true: must be a section with keys such as threshold, min_kept"),
        ({"teachers": ["wide"]}, "teachers = ['wide']: must hold a section for each teacher, such as wide: and deep:"),
        ({"teachers": {}}, "teachers = {}: name at least one teacher"),
        ({"teachers.wide": "x"}, "teachers.wide = 'x': must be a section with keys such as decoder, encoder, decoder_channels"),
        ({"teachers": {3: WIDE}}, "teachers: the name 3 must be text; put it in quotes"),
        ({"train_teachers": "wide"}, "train_teachers = 'wide': must be a list; write [wide]"),
        ({"train_teachers": None}, "train_teachers = null: must be a list"),
        ({"data": {**FOLDER, "classes": ["a"]}}, "data.classes = ['a']: must have at least 2 entries, not 1"),
        ({"data": {**FOLDER, "classes": ["a", 1]}}, "data.classes[1] = 1: must be text; put it in quotes"),
        ({"data": {**FOLDER, "images": "x"}}, "data: give both globs, images and masks, or neither"),
        ({"data": {**FOLDER, "val_fraction": 0.6, "test_fraction": 0.4}}, "data: val_fraction and test_fraction together must..."),
        ({"data.dataset": "vocc"}, "data.dataset = 'vocc': must be one of shapes, voc, cityscapes, folder; nearest is 'voc'"),
        ({"data.dataset": 3}, "data.dataset = 3: must be one of shapes, voc, cityscapes, folder"),
        ({"data.dataset": ABSENT}, "data.dataset: missing; must be one of shapes, voc, cityscapes, folder"),
        ({"student.optimizer": "adam"}, "student.optimizer = 'adam': must be one of sgd, adamw; nearest is 'adamw'"),
        ({"student": ABSENT}, "student: missing; add it: The small network and its training."),
        ({"student.steps": ABSENT}, "student.steps: missing; add it: Optimiser steps."),
        ({"teachers.wide.weights": ABSENT}, "teachers.wide.weights: missing; add it: The finished teacher, safetensors..."),
        # Teachers must exist and be told apart.
        ({"train_teachers": ["wid"]}, "train_teachers: 'wid' is not among teachers: wide, deep; nearest is 'wide'"),
        ({"losses.pixel_teachers": ["wide", "x"]}, "losses.pixel_teachers: 'x' is not among teachers: wide, deep"),
        ({"losses.region_teacher": "x"}, "losses.region_teacher: 'x' is not among teachers: wide, deep"),
        ({"losses.image_teacher": "x"}, "losses.image_teacher: 'x' is not among teachers: wide, deep"),
        ({"train_teachers": ["wide", "wide"]}, "train_teachers: 'wide' stands twice"),
        ({"teachers.A b": WIDE}, "teachers: 'A b' names files; use lower-case letters, digits, - and _"),
        ({"teachers." + 151 * "a": WIDE}, f"teachers: {20 * 'a'}... names files, and has 151 letters; 150 are allowed"),
        ({"teachers.distilled": WIDE}, "teachers: 'distilled' is the name of a student; call it otherwise"),
        (
            {"teachers.deep.weights": WIDE["weights"]},
            "teachers.deep.weights = 'data/teachers/wide.safetensors': wide is written there, too",
        ),
        # What a decoder and an encoder are for.
        (
            {"student.network.decoder": "dpt"},
            "student.network.decoder = 'dpt': is for teachers: a student needs cells of 4 pixels; take deeplabv3plus, fpn or...",
        ),
        (
            {"teachers.wide.frozen_encoder": True},
            "teachers.wide.encoder_weights = 'none': a frozen encoder (teachers.wide.frozen_encoder) of random weights teaches "
            "nothing; take imagenet or a file, or set teachers.wide.frozen_encoder to false",
        ),
        (
            {"teacher_training.frozen_encoder": True, "teacher_training.encoder_learning_rate": 0.1},
            "teacher_training: encoder_learning_rate: a frozen encoder has none; leave it out, or set frozen_encoder to false",
        ),
        (
            {
                "teacher_training.frozen_encoder": True,
                "teachers.wide": {**WIDE, "encoder_weights": "w", "encoder_learning_rate": 1.0},
            }
            | {"teachers.deep.frozen_encoder": False},
            "teachers.wide.encoder_learning_rate: its encoder is frozen (teacher_training.frozen_encoder) and has none; leave it "
            "out, or set teachers.wide.frozen_encoder to false",
        ),
        # What a student can hear.
        ({"losses.region_teacher": []}, "losses.region_teacher = []: must have at least 1 entry, not 0"),
        ({"losses.region_teacher": ["wide", "x"]}, "losses.region_teacher: 'x' is not among teachers: wide, deep"),
        ({"losses.region_teacher": 3}, "losses.region_teacher = 3: must be a list; write [3]"),
        (
            {"losses.pixel_weights": ["edge"]},
            "losses.pixel_weights[0] = 'edge': must be one of agreement, correct, margin, edges, balance; ...",
        ),
        # A value that is the name of another key, or a value of one.
        (
            {"losses.pixel_weights": ["confidence"]},
            "losses.pixel_weights[0] = 'confidence': must be one of agreement, correct, margin, edges, balance; losses.confidence "
            "is a key of its own: A teacher's pixel term ignores pixels whose largest probability is below this; MGD ignores none.",
        ),
        (
            {"losses.pixel_weights": ["prior"]},
            "losses.pixel_weights[0] = 'prior': must be one of agreement, correct, margin, edges, balance; losses.prior_adjustment "
            "is a key of its own: Takes this times...",
        ),
        (
            {"losses.pixel_distance": "soft"},
            "losses.pixel_distance = 'soft': must be one of cross-entropy, kl, dist, cauchy-schwarz, ttm, binary; soft is a value "
            "of losses.pixel_labels",
        ),
        (
            {"losses.pixel_choice": "mean"},
            "losses.pixel_choice = 'mean': must be one of each, ensemble, by-class: Which of several pixel_teachers is heard at a "
            "pixel: each, with a term of its own, as in MGD; ensemble, the mean of their probabilities; by-class...",
        ),
        (
            {"losses.region_distance": "l2"},
            "losses.region_distance = 'l2': must be one of mse, kl: How the region term compares similarities of regions: by the "
            "squared difference...",
        ),
        # A key of another section, and a value of another key.
        ({"losses.logit_adjustment": 1.0}, "losses.logit_adjustment = 1.0: unknown key; there is student.logit_adjustment"),
        ({"losses.agreement": True}, "losses.agreement = true: unknown key; agreement is a value of losses.pixel_weights"),
        ({"losses.pixel_weights": ["edges", "edges"]}, "losses: pixel_weights: edges stands twice; name it once"),
        (
            {"losses.pixel_weights": ["agreement"], "losses.pixel_teachers": ["deep"]},
            "losses: pixel_weights: agreement compares two teachers, but pixel_teachers is [deep]; name two there, or leave "
            "agreement out",
        ),
        (
            {"losses.pixel_weights": ["correct"], "losses.images": ["unlabelled"]},
            "losses: pixel_weights: correct weighs labelled images, but images is [unlabelled]; add labelled there, or leave "
            "correct out",
        ),
        (
            {"losses.pixel_weights": ["margin"], "losses.images": ["labelled"]},
            "losses: pixel_weights: margin weighs unlabelled images, but images is [labelled]; ...",
        ),
        (
            {"losses.pixel_weights": ["correct", "edges"], "losses.pixel_distance": "dist"},
            "losses: pixel_weights: dist compares all pixels together, and edges weighs single ones; leave edges out, or choose "
            "another pixel_distance",
        ),
        (
            {"losses.pixel_distance": "dist", "targets.top_k": 3},
            "losses.pixel_distance: dist compares all classes, but targets.top_k stores 3 of them; set targets.top_k to null, or "
            "take cross-entropy or kl",
        ),
        (
            {"losses.channel": 3.0, "targets.top_k": 3},
            "losses.channel: this term compares all classes, but targets.top_k stores 3 of them; set targets.top_k to null, or set "
            "losses.channel to 0",
        ),
        (
            {"losses.prior_adjustment": 0.5, "targets.top_k": 3},
            "losses.prior_adjustment = 0.5: would lift rare classes above scores that no teacher gave them, because targets.top_k "
            "stores 3 scores of a cell and the mean of the rest; set targets.top_k to null, or prior_adjustment to 0",
        ),
        (
            {"losses.pixel_distance": "kl", "losses.temperature": 0.4},
            "losses.temperature = 0.4: magnifies the rounding of targets.logits uint8; take a temperature of 0.5 or more, or set "
            "targets.logits to float16",
        ),
        (
            {"targets.floor": 8.0},
            "targets: floor: is of log-probabilities, but logits is uint8; set logits to log-probability, or floor to null",
        ),
        *(
            ({"targets.logits": "log-probability", "losses.image_distance": "presence", **losses}, f"{said}, or set ...")
            for losses, said in (
                (
                    {"losses.image_distance": "l1"},
                    "losses.image_distance: l1 compares mean logits, and targets.logits log-probability does not keep their level; "
                    "set it to log-probability, set losses.image to 0",
                ),
                (
                    {"losses.channel": 3.0},
                    "losses.channel: this term compares logits of different pixels, and targets.logits log-probability does not "
                    "keep their level; set it to 0",
                ),
                (
                    {"losses.pixel_distance": "ttm"},
                    "losses.pixel_distance: ttm magnifies unlikely classes, and targets.logits log-probability has cut them off; "
                    "take kl",
                ),
                (
                    {"losses.pixel_distance": "kl", "losses.temperature": 4.0},
                    "losses.temperature = 4.0: magnifies unlikely classes, and targets.logits log-probability has cut them off; "
                    "set it to 1",
                ),
            )
        ),
        (
            {"losses.pixel_ensemble": True},
            "losses: pixel_ensemble: is the former name of pixel_choice: ensemble; write only pixel_choice",
        ),
        ({"losses.pixel_ensemble": "yes", "losses.pixel_choice": ABSENT}, "losses.pixel_choice = 'yes': must be one of each, ..."),
        # Partitions.
        ({"data.partition": 18}, "data.partition = 18: YAML reads 1_8 as the number 18; write 1/8 (or 1/18)"),
        (
            {"data.partition": "1-8"},
            "data.partition = '1-8': write a share such as 1/8, or two id lists (labelled: and unlabelled:)",
        ),
        ({"data.partition": 0.0625}, "data.partition = 0.0625: write a share such as 1/16, ..."),
        ({"data.partition": "12.5 %"}, "data.partition = '12.5 %': write a share such as 1/8, ..."),
        ({"data.partition": "2/8"}, "data.partition = '2/8': write a share such as 1/4, ..."),
        ({"data.partition": 10}, "data.partition = 10: write a share such as 1/10, ..."),
        ({"data.partition": "1/0"}, "data.partition = '1/0': write a share such as 1/8, ..."),
        ({"data.partition": "1/8x"}, "data.partition = '1/8x': write a share such as 1/8, ..."),
        ({"data.partition": None}, "data.partition = null: write a share such as 1/8, ..."),
        ({"data.partition": True}, "data.partition = true: write a share such as 1/8, ..."),
        ({"data.partition": [1, 8]}, "data.partition = [1, 8]: write a share such as 1/8, ..."),
    ],
)
def test_mistakes_name_key_value_and_what_would_be_right(changes: dict[str, object], line: str) -> None:
    """The whole line, or its beginning where `...` follows."""
    said = complaint(changes)
    assert said == f"params.yaml: {line}" or (line.endswith("...") and said.startswith(f"params.yaml: {line[:-3]}"))
    assert "\n" not in said


def test_losses_of_version_0_1_0_mean_what_they_meant() -> None:
    """And stand in files as they stood."""
    for former, now in ((True, "ensemble"), (False, "each")):
        losses = parse_params(changed({"losses.pixel_ensemble": former, "losses.pixel_choice": ABSENT})).losses
        assert losses.pixel_choice == now and losses.pixel_weights == [] and losses.pixel_distance == "cross-entropy"
    for written, names in (("deep", ["deep"]), (["deep", "wide"], ["deep", "wide"])):
        losses = parse_params(changed({"losses.region_teacher": written})).losses
        assert losses.region_teacher == names and losses.model_dump()["region_teacher"] == written


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, ["wide", "deep"]),
        ({"pixel": 0.0, "image": 0.0}, ["wide"]),
        ({"pixel": 0.0, "image": 0.0, "channel": 1.0, "region": 0.0, "pixel_teachers": ["deep"]}, ["deep"]),
        ({"pixel": 0.0, "image": 0.0, "region_teacher": ["deep", "wide"]}, ["deep", "wide"]),
        ({"region": 0.0, "image": 0.0, "pixel_teachers": ["deep"]}, ["deep"]),
        ({"region": 0.0, "image": 0.0, "pixel_teachers": ["deep"], "pixel_weights": ["margin"]}, ["deep", "wide"]),
        ({"pixel": 0.0, "region": 0.0, "pixel_weights": ["margin"]}, ["deep"]),
    ],
)
def test_the_teachers_that_a_student_hears(changes: dict[str, object], used: list[str]) -> None:
    assert parse_params(changed({f"losses.{key}": value for key, value in changes.items()})).losses.used_teachers == used


def test_keys_that_change_nothing_are_named() -> None:
    def of(**keys: Any) -> list[str]:
        return LossesParams(region=1, image=1, **keys).in_vain

    why = "nothing reads this, because the pixel term has the weight 0 (losses.pixel)"
    assert of(pixel=0, channel=3, pixel_weights=["balance"], confidence=0.5) == [f"losses.confidence, losses.pixel_weights: {why}"]
    assert of(pixel=0, prior_adjustment=0.5) == [f"losses.prior_adjustment: {why}"] and not of(pixel=0)
    assert "losses.images has no unlabelled images" in of(prior_adjustment=0.5, images=["labelled"])[0]
    assert not of(pixel_weights=["balance"], confidence=0.5, prior_adjustment=0.5)


def test_shares_and_id_lists_are_partitions() -> None:
    """A mistake in a list is not told as one in a share."""
    for value in ("1/1", "1/92"):
        assert parse_params(changed({"data.partition": value})).data.partition == value
    lists = parse_params(changed({"data.partition": {"labelled": "a.txt"}})).data.partition
    assert lists == IdLists(labelled="a.txt", unlabelled=None)
    assert complaint({"data.partition": {"labeled": "a"}}).splitlines() == [
        "params.yaml: data.partition.labelled: missing; add it: "
        "Text file with the labelled training images: one id per line, or an image path and a mask path per line.",
        "params.yaml: data.partition.labeled = 'a': unknown key; nearest is 'labelled'",
    ]


def test_all_mistakes_are_told_at_once_each_in_one_line() -> None:
    said = complaint({"sed": 1, "student.steps": 0, "data.partition": 18, "losses.region": -1}).splitlines()
    keys = [re.sub(r"^params\.yaml: ([\w.]+) = .*", r"\1", line) for line in said]
    assert sorted(keys) == ["data.partition", "losses.region", "sed", "student.steps"]
    several = complaint({"train_teachers": ["a"], "losses.image_teacher": "b"}).splitlines()
    assert [line.split(":")[1].strip() for line in several] == ["train_teachers", "losses.image_teacher"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(render_params(parse_params(SHAPES)))
    return path


MERGE = b"<<<<<<< HEAD\nseed: 0\n||||||| base\nseed: 2\n=======\nseed: 1\n>>>>>>> b"
KEEP = "; keep one version of each conflict and remove the marked lines"


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: [1", "not valid YAML: line 1, column 6: expected ',' or ']'"),
        (b"a:\n\t- b", "not valid YAML: line 2, column 1: found character '\\t' that cannot start any token; write spaces instead"),
        (b"seed: 1\nseed: 2\n", "not valid YAML: line 2: the key 'seed' stands there a second time; keep one of both"),
        (b"a: !!python/object/apply:os.system [x]", "not valid YAML: line 1, column 4: could not determine a constructor"),
        (b"a: 2020-13-45", "not valid YAML: month must be in 1..12"),
        (b"a: \xff", "not UTF-8 text (byte 3)"),
        (b"", "expected sections such as data: and student:, found nothing; see `mgd-pipeline init`"),
        (b"- a", "expected sections such as data: and student:, found ['a']; see `mgd-pipeline init`"),
        (MERGE, f"a merge left <<<<<<< in line 1, ||||||| in line 3, ======= in line 5, >>>>>>> in line 7{KEEP}"),
        (MERGE + b"\n" + MERGE, f">>>>>>> in line 7 and 4 more markers{KEEP}"),
        (b"seed: 0\n>>>>>>> b", f"a merge left >>>>>>> in line 2{KEEP}"),
    ],
)
def test_files_that_are_no_parameters(file: Path, content: bytes, problem: str, newline: bytes) -> None:
    file.write_bytes(content.replace(b"\n", newline))
    with pytest.raises(ParamsError, match=re.escape(problem)) as caught:
        load_params(file)
    assert str(caught.value).startswith(f"{file}: ") and len(str(caught.value).splitlines()) == 1


def test_files_that_are_parameters(file: Path) -> None:
    """Of other systems, with a mark of the byte order; and with 1e-3, which YAML 1.1 takes for a text."""
    before, text = load_params(file), file.read_text(encoding="utf-8")
    file.write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    assert load_params(file) == before
    file.write_text(re.sub(r"learning_rate: .*", "learning_rate: 1e-3", text))
    params = load_params(file, ["student.weight_decay=5e-4"])
    assert params.student.learning_rate == params.teacher_training.learning_rate == 1e-3
    assert params.student.weight_decay == 5e-4
    with pytest.raises(Exception, match="frozen"):
        params.student.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_what_a_teacher_says_of_its_encoder_comes_before_what_all_say() -> None:
    def of(common: dict[str, Any], own: dict[str, Any]) -> tuple[bool, float | None]:
        raw = changed({f"teacher_training.{key}": value for key, value in common.items()})
        raw["teachers"]["wide"] |= {"encoder_weights": "imagenet", **own}
        training = parse_params({**raw, "train_teachers": ["wide"]}).training_of("wide")
        return training.frozen_encoder, training.encoder_learning_rate

    assert of({}, {}) == (False, None)
    assert of({"frozen_encoder": True}, {}) == (True, None) and of({"encoder_learning_rate": 0.1}, {}) == (False, 0.1)
    assert of({}, {"frozen_encoder": True}) == (True, None)
    assert of({"frozen_encoder": True}, {"frozen_encoder": False, "encoder_learning_rate": 0.2}) == (False, 0.2)
    assert of({"encoder_learning_rate": 0.1}, {"frozen_encoder": True}) == (True, None)
    assert of({"encoder_learning_rate": 0.1}, {"encoder_learning_rate": 0.2}) == (False, 0.2)


def test_a_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"params\.yaml: no such file; write one with `mgd-pipeline init`"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(ParamsError, match=r"cannot be read \(Is a directory\); check the file"):
        load_params(tmp_path)


def test_overrides_change_what_they_name_and_nothing_else(file: Path) -> None:
    file.write_text(json.dumps(changed({"cutmix": ABSENT})))
    texts = ["student.steps=7", "views.crop=[32, 96]", "data.partition=1/4", "teachers.wide.decoder=fpn", "evaluation.window=null"]
    values: dict[str, object] = {
        "student.steps": 7,
        "views.crop": [32, 96],
        "data.partition": "1/4",
        "teachers.wide.decoder": "fpn",
    }
    params = load_params(file, [*texts, "seed=1", "seed=2", "cutmix.boxes=9"])
    assert params == parse_params(changed({**values, "seed": 2, "cutmix": {"boxes": 9}})), "the last of two counts"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("student.steps", "write key=value, such as student.steps=500"),
        ("=3", "write key=value, such as student.steps=500"),
        ("student..steps=3", "write key=value, such as student.steps=500"),
        ("studnt.steps=3", "no section 'studnt'; nearest is 'student'"),
        ("teachers.extra.encoder=x", "no section 'teachers.extra'; there are wide, deep"),
        ("student.network.encodr=x", "unknown key; nearest is 'encoder'"),
        ("seed.x=3", "seed is 0, not a section that could hold x"),
        ("student.ohem.threshold=0.5", "student.ohem is null, not a section that could hold threshold"),
        ("views.crop=[64", "'[64' is not a YAML value"),
        ("seed=2020-13-45", "'2020-13-45' is not a YAML value"),
        ("seed=2020-01-01", "must be a whole number"),
        ("seed=", "must be a whole number"),
        ("data.partition=1_8", "YAML reads 1_8 as the number 18; write 1/8 (or 1/18)"),
        ("losses.region_teacher=wid", "'wid' is not among teachers: wide, deep; nearest is 'wide'"),
    ],
)
def test_bad_overrides_are_named_as_the_user_wrote_them(file: Path, override: str, problem: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load_params(file, [override])
    assert str(caught.value) == f"--set {override}: {problem}"


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["back", "crack", "crack"], "'crack' stands twice; give each class a name of its own, such as 'crack 2'"),
        (["crack", "crack "], "'crack' and 'crack ' look the same"),
        (["road sign", "road\u00a0 sign"], r"'road sign' and 'road\xa0 sign' look the same"),
        (["\u00e9", "e\u0301"], r"'\xe9' and 'e\u0301' look the same"),
        (["crack", "cr\u200back"], r"'crack' and 'cr\u200back' look the same"),
        (["a", ""], "'': a class needs a name that can be seen"),
        (["a", " \u200b"], "a class needs a name that can be seen"),
        (["a", "b\nc"], r"'b\nc': a class name is one line of text"),
        (["a", "b\u2028c"], r"'b\u2028c': a class name is one line of text"),
        (["a", "b\ud800"], r"'b\ud800': a class name is one line of text"),
    ],
)
def test_class_names_that_tables_could_not_tell_apart(names: list[str], fault: str) -> None:
    line = complaint({"data": {**FOLDER, "classes": names}})
    assert fault in line and line.startswith("params.yaml: data.classes = ") and len(line.splitlines()) == 1


def test_class_names_of_all_scripts_pass() -> None:
    names = [
        "Car",
        "car",
        "car, parked",
        "a|b",
        "<b>",
        "$x$",
        "\u8eca",
        "\u0917\u093e\u0921\u093c\u0940",
        "road sign",
        "e\u0301t\u00e9",
    ]
    assert parse_params(changed({"data": {**FOLDER, "classes": names}})).data.classes == names  # type: ignore[union-attr]
