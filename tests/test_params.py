"""params.yaml: every mistake becomes one line with the key, the value and what would be right."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import IdLists
from mgd_pipeline.params_file import load_params, parse_params
from mgd_stages.projects.presets import preset, render_params

SHAPES = preset("shapes", "data/raw/shapes", "1/8").model_dump()
ABSENT = object()
FOLDER = {"dataset": "folder", "root": "x", "partition": "1/8", "classes": ["a", "b"]}


def changed(changes: dict[str, object]) -> dict[str, Any]:
    """The parameters of shapes with some dotted keys set, or removed where the value is ABSENT."""
    raw = copy.deepcopy(SHAPES)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        section = raw
        for parent in parents:
            section = section[parent]
        if value is ABSENT:
            del section[last]
        else:
            section[last] = value
    return raw


def complaint(changes: dict[str, object]) -> str:
    with pytest.raises(ParamsError) as caught:
        parse_params(changed(changes))
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sed": 1}, "sed = 1: unknown key; nearest is 'seed'"),
        ({"student.lerning_rate": 0.1}, "student.lerning_rate = 0.1: unknown key; nearest is 'learning_rate'"),
        ({"student.network.encodr": "a"}, "student.network.encodr = 'a': unknown key; nearest is 'encoder'"),
        ({"teachers.wide.wieghts": "a"}, "teachers.wide.wieghts = 'a': unknown key; nearest is 'weights'"),
        ({"cutmix.zzz": None}, "cutmix.zzz = null: unknown key; known keys: boxes, area, partner"),
        ({"student.ohem": {"treshold": 0.7}}, "student.ohem.treshold = 0.7: unknown key; nearest is 'threshold'"),
        ({"data.hieght": 3}, "data.hieght = 3: unknown key; nearest is 'height'"),
        (
            {"data": {"dataset": "voc", "root": "x", "partition": "1/8", "pratition_seed": 1}},
            "data.pratition_seed = 1: unknown key; nearest is 'partition_seed'",
        ),
        (
            {"data": {"dataset": "cityscapes", "root": "x", "partition": "1/8", "long_sid": 1}},
            "data.long_sid = 1: unknown key; nearest is 'long_side'",
        ),
        ({"data": {**FOLDER, "ignroe": 0}}, "data.ignroe = 0: unknown key; nearest is 'ignore'"),
        (
            {"data": {"dataset": "voc", "root": "x", "partition": "1/8", "test": 9}},
            "data.test = 9: unknown key; it belongs to dataset shapes, not voc; remove it",
        ),
    ],
)
def test_unknown_keys_name_key_value_and_the_nearest_right_one(changes: dict[str, object], line: str) -> None:
    assert complaint(changes) == f"params.yaml: {line}"


def test_teachers_may_be_called_like_a_data_set() -> None:
    """The tags by which pydantic names the members of a union are no part of a key, but such a name is."""
    raw = changed({"teachers.voc": {**SHAPES["teachers"]["wide"], "decoder": "unet"}})
    with pytest.raises(ParamsError, match=r"^params\.yaml: teachers\.voc\.decoder = 'unet'"):
        parse_params(raw)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (18, "YAML reads 1_8 as the number 18; write 1/8 (or 1/18)"),
        (116, "YAML reads 1_16 as the number 116; write 1/16 (or 1/116)"),
        ("1-8", "write a share such as 1/8,"),
        ("1:16", "write a share such as 1/16,"),
        ("0.125", "write a share such as 1/8,"),
        (0.0625, "write a share such as 1/16,"),
        ("12.5 %", "write a share such as 1/8,"),
        ("2/8", "write a share such as 1/4,"),
        (8, "write a share such as 1/8,"),
        (10, "write a share such as 1/10,"),
        ("1/0", "write a share such as 1/8,"),
        ("1/8x", "write a share such as 1/8,"),
        ("", "write a share such as 1/8,"),
        (None, "write a share such as 1/8,"),
        (True, "write a share such as 1/8,"),
        ([1, 8], "write a share such as 1/8,"),
    ],
)
def test_impossible_partitions_say_what_to_write(value: object, advice: str) -> None:
    said = complaint({"data.partition": value})
    assert said.startswith("params.yaml: data.partition = ") and advice in said and "\n" not in said


@pytest.mark.parametrize("value", ["1/1", "1/2", "1/16", "1/92"])
def test_shares_and_id_lists_are_partitions(value: str) -> None:
    assert parse_params(changed({"data.partition": value})).data.partition == value
    lists = parse_params(changed({"data.partition": {"labelled": "a.txt"}})).data.partition
    assert lists == IdLists(labelled="a.txt", unlabelled=None)


def test_mistakes_in_id_lists_are_not_told_as_mistakes_in_a_share() -> None:
    assert complaint({"data.partition": {"labeled": "a"}}).splitlines() == [
        "params.yaml: data.partition.labelled: missing; add it: "
        "Text file with the labelled training images: one id per line, or an image path and a mask path per line.",
        "params.yaml: data.partition.labeled = 'a': unknown key; nearest is 'labelled'",
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"student.learning_rate": "no"}, "student.learning_rate = 'no': must be a number"),
        ({"student.learning_rate": False}, "student.learning_rate = false: must be a number"),
        ({"student.learning_rate": None}, "student.learning_rate = null: must be a number"),
        ({"student.learning_rate": 0}, "student.learning_rate = 0: must be greater than 0"),
        ({"student.learning_rate": float("inf")}, "student.learning_rate = inf: must be finite"),
        ({"student.learning_rate": float("nan")}, "student.learning_rate = nan: must be finite"),
        ({"student.steps": 10.5}, "student.steps = 10.5: must be a whole number"),
        ({"student.steps": "10"}, "student.steps = '10': must be a whole number"),
        ({"student.steps": True}, "student.steps = true: must be a whole number"),
        ({"student.labelled_batch": 1}, "student.labelled_batch = 1: must be at least 2"),
        ({"student.momentum": 1}, "student.momentum = 1: must be less than 1"),
        ({"views.flip": 2}, "views.flip = 2: must be at most 1"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
        ({"views.scales": []}, "views.scales = []: must have at least 1 entry, not 0"),
        ({"views.scales": 1.0}, "views.scales = 1.0: must be a list; write [1.0]"),
        ({"views.crop": 64}, "views.crop = 64: must be a list; write [64, 64]"),
        ({"views.crop": [64]}, "views.crop = [64]: must have at least 2 entries, not 1"),
        ({"views.crop": [64, 64, 3]}, "views.crop = [64, 64, 3]: must have at most 2 entries, not 3"),
        ({"views.crop": ["64", 64]}, "views.crop[0] = '64': must be a whole number"),
        ({"views.crop": [100, 64]}, "views.crop = [100, 64]: sides must be multiples of 32, such as [96, 64]"),
        ({"views.crop": [8, 64]}, "views.crop = [8, 64]: sides must be multiples of 32, such as [32, 64]"),
        ({"teachers.deep.decoder_channels": 48}, "teachers.deep.decoder_channels = 48: fpn normalises in 32 groups; take a"),
        ({"evaluation.window": 512}, "evaluation.window = 512: must be a list; write [512, 512]"),
        ({"cutmix.area": [0.5, 0.2]}, "cutmix.area = [0.5, 0.2]: write the lower bound first, both at most 1, such as [0.25, 0.5]"),
        ({"cutmix.area": [0.5, 2]}, "cutmix.area = [0.5, 2]: write the lower bound first, both at most 1, such as [0.25, 0.5]"),
        ({"data.root": ""}, "data.root = '': must not be empty"),
        ({"data.root": 3}, "data.root = 3: must be text; put it in quotes"),
        ({"data": None}, "data = null: must be a section with keys such as dataset, root, partition"),
        ({"views": 3}, "views = 3: must be a section with keys such as crop, scales, flip"),
        ({"student.ohem": True}, "student.ohem = true: must be a section with keys such as threshold, min_kept"),
        ({"student.network": "resnet18"}, "student.network = 'resnet18': must be a section with keys such as decoder, encoder,"),
        ({"teachers": ["wide"]}, "teachers = ['wide']: must hold a section for each teacher, such as wide: and deep:"),
        ({"teachers": {}}, "teachers = {}: name at least one teacher"),
        ({"teachers.wide": "x"}, "teachers.wide = 'x': must be a section with keys such as decoder, encoder,"),
        ({"teachers": {3: SHAPES["teachers"]["wide"]}}, "teachers: the name 3 must be text; put it in quotes"),
        ({"train_teachers": "wide"}, "train_teachers = 'wide': must be a list; write [wide]"),
        ({"train_teachers": None}, "train_teachers = null: must be a list"),
        ({"data": {**FOLDER, "classes": ["a"]}}, "data.classes = ['a']: must have at least 2 entries, not 1"),
        ({"data": {**FOLDER, "classes": ["a", 1]}}, "data.classes[1] = 1: must be text; put it in quotes"),
        ({"data": {**FOLDER, "images": "x"}}, "data: give both globs, images and masks, or neither"),
        ({"data": {**FOLDER, "val_fraction": 0.6, "test_fraction": 0.4}}, "data: val_fraction and test_fraction together must"),
        ({"data.dataset": "vocc"}, "data.dataset = 'vocc': must be one of shapes, voc, cityscapes, folder; nearest is 'voc'"),
        ({"data.dataset": 3}, "data.dataset = 3: must be one of shapes, voc, cityscapes, folder"),
        ({"data.dataset": ABSENT}, "data.dataset: missing; must be one of shapes, voc, cityscapes, folder"),
        ({"student.optimizer": "adam"}, "student.optimizer = 'adam': must be one of sgd, adamw; nearest is 'adamw'"),
        ({"targets.logits": "uint16"}, "targets.logits = 'uint16': must be one of uint8, float16; nearest is 'uint8'"),
        ({"evaluation.split": "validation"}, "evaluation.split = 'validation': must be one of val, test; nearest is 'val'"),
        ({"teachers.wide.decoder": "deeplab"}, "teachers.wide.decoder = 'deeplab': must be one of deeplabv3plus, fpn,"),
        ({"student": ABSENT}, "student: missing; add it: The small network and its training."),
        ({"student.steps": ABSENT}, "student.steps: missing; add it: Optimiser steps."),
        ({"teachers.wide.weights": ABSENT}, "teachers.wide.weights: missing; add it: The finished teacher, safetensors"),
    ],
)  # fmt: skip
def test_impossible_values_say_what_is_possible(changes: dict[str, object], line: str) -> None:
    said = complaint(changes)
    assert said.startswith(f"params.yaml: {line}") and "\n" not in said


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train_teachers": ["wid"]}, "train_teachers: 'wid' is not among teachers: wide, deep; nearest is 'wide'"),
        ({"losses.pixel_teachers": ["wide", "x"]}, "losses.pixel_teachers: 'x' is not among teachers: wide, deep"),
        ({"losses.region_teacher": "wida"}, "losses.region_teacher: 'wida' is not among teachers: wide, deep; nearest is 'wide'"),
        ({"losses.image_teacher": "x"}, "losses.image_teacher: 'x' is not among teachers: wide, deep"),
        ({"train_teachers": ["wide", "wide"]}, "train_teachers: 'wide' stands twice"),
        (
            {"teachers.A b": SHAPES["teachers"]["wide"]},
            "teachers: 'A b' names files; use lower-case letters, digits, - and _",
        ),
        ({"teachers.distilled": SHAPES["teachers"]["wide"]}, "teachers: 'distilled' is the name of a student; call it otherwise"),
        (
            {"teachers.deep.weights": SHAPES["teachers"]["wide"]["weights"]},
            "teachers.deep.weights = 'data/teachers/wide.safetensors': wide is written there, too",
        ),
    ],
)
def test_teachers_must_exist_and_be_told_apart(changes: dict[str, object], line: str) -> None:
    assert complaint(changes) == f"params.yaml: {line}"


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


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: [1", "not valid YAML: line 1, column 6: expected ',' or ']'"),
        (b"a:\n\t- b", "not valid YAML: line 2, column 1: found character '\\t' that cannot start any token"),
        (b"seed: 1\nseed: 2\n", "not valid YAML: line 2: the key 'seed' stands there a second time; keep one of both"),
        (b"a: !!python/object/apply:os.system [x]", "not valid YAML: line 1, column 4: could not determine a constructor"),
        (b"a: 2020-13-45", "not valid YAML: month must be in 1..12"),
        (b"a: \xff", "not UTF-8 text (byte 3)"),
        (b"", "expected sections such as data: and student:, found nothing; see `mgd-pipeline init`"),
        (b"- a", "expected sections such as data: and student:, found ['a']; see `mgd-pipeline init`"),
    ],
)
def test_files_that_are_no_parameters(file: Path, content: bytes, problem: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ParamsError) as caught:
        load_params(file)
    assert str(caught.value).startswith(f"{file}: {problem}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("replacement", "problem"),
    [
        (
            "<<<<<<< HEAD\nseed: 0\n=======\nseed: 1\n>>>>>>> b",
            "a merge left <<<<<<< in line 5, ======= in line 7, >>>>>>> in line 9;",
        ),
        ("<<<<<<< HEAD\nseed: 0\n||||||| base\nseed: 2\n=======\nseed: 1\n>>>>>>> b", "||||||| in line 7, ======= in line 9, >>>>"),
        ("seed: 0\n>>>>>>> b", "a merge left >>>>>>> in line 6; keep one version of each conflict and remove the marked lines"),
        ("seed: 0\nseed: 1", "line 6: the key 'seed' stands there a second time; keep one of both"),
        ("seed:\t0", "found character '\\t' that cannot start any token; write spaces instead of tabs"),
    ],
)
def test_what_editors_and_merges_leave(file: Path, replacement: str, problem: str, newline: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.splitlines()[4] == "seed: 0"
    file.write_bytes(text.replace("seed: 0", replacement, 1).replace("\n", newline).encode())
    with pytest.raises(ParamsError, match=re.escape(problem)) as error:
        load_params(file)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")], ids=["BOM", "CRLF"])
def test_files_of_other_systems(file: Path, change: Callable[[str], str]) -> None:
    before = load_params(file)
    file.write_bytes(change(file.read_text(encoding="utf-8")).encode())
    assert load_params(file) == before


def test_a_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"params\.yaml: no such file; write one with `mgd-pipeline init`"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(ParamsError, match=r"cannot be read \(Is a directory\); check the file"):
        load_params(tmp_path)


def test_exponents_are_numbers(file: Path) -> None:
    """YAML 1.1, which most readers follow, takes 1e-3 for a text."""
    text = file.read_text()
    file.write_text(re.sub(r"learning_rate: .*", "learning_rate: 1e-3", text))
    params = load_params(file, ["student.weight_decay=5e-4"])
    assert params.student.learning_rate == params.teacher_training.learning_rate == 1e-3
    assert params.student.weight_decay == 5e-4


def test_overrides_change_what_they_name_and_nothing_else(file: Path) -> None:
    texts = ["student.steps=7", "views.crop=[32, 96]", "data.partition=1/4", "teachers.wide.decoder=fpn", "evaluation.window=null"]
    params = load_params(file, texts)
    expected = changed(
        {
            "student.steps": 7,
            "views.crop": [32, 96],
            "data.partition": "1/4",
            "teachers.wide.decoder": "fpn",
            "evaluation.window": None,
        }
    )
    assert params == parse_params(expected) != parse_params(SHAPES)
    assert load_params(file, ["seed=1", "seed=2"]).seed == 2, "the last of two counts"


def test_overrides_reach_sections_that_the_file_leaves_to_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(json.dumps(changed({"cutmix": ABSENT})))
    assert load_params(tmp_path / "params.yaml", ["cutmix.boxes=9"]).cutmix.boxes == 9


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("student.steps", "write key=value, such as student.steps=500"),
        ("=3", "write key=value, such as student.steps=500"),
        ("student..steps=3", "write key=value, such as student.steps=500"),
        ("studnt.steps=3", "no section 'studnt'; nearest is 'student'"),
        ("teachers.wid.encoder=x", "no section 'teachers.wid'; nearest is 'wide'"),
        ("teachers.extra.encoder=x", "no section 'teachers.extra'; there are wide, deep"),
        ("student.stps=3", "unknown key; nearest is 'steps'"),
        ("student.network.encodr=x", "unknown key; nearest is 'encoder'"),
        ("seed.x=3", "seed is 0, not a section that could hold x"),
        ("student.ohem.threshold=0.5", "student.ohem is null, not a section that could hold threshold"),
        ("views.crop=[64", "'[64' is not a YAML value"),
        ("seed=!!python/object:os.system x", "'!!python/object:os.system x' is not a YAML value"),
        ("seed=2020-13-45", "'2020-13-45' is not a YAML value"),
        ("seed=2020-01-01", "must be a whole number"),
        ("seed=", "must be a whole number"),
        ("student.learning_rate=no", "must be a number"),
        ("data.partition=1_8", "YAML reads 1_8 as the number 18; write 1/8 (or 1/18)"),
        ("losses.region_teacher=wid", "'wid' is not among teachers: wide, deep; nearest is 'wide'"),
    ],
)
def test_bad_overrides_are_named_as_the_user_wrote_them(file: Path, override: str, problem: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load_params(file, [override])
    assert str(caught.value) == f"--set {override}: {problem}"


def test_params_do_not_change_once_read() -> None:
    params = parse_params(SHAPES)
    with pytest.raises(Exception, match="frozen"):
        params.student.steps = 3


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
        (["a", "b\tc"], r"'b\tc': a class name is one line of text"),
        (["a", "b\nc"], r"'b\nc': a class name is one line of text"),
        (["a", "b\u2028c"], r"'b\u2028c': a class name is one line of text"),
        (["a", "b\x00"], r"'b\x00': a class name is one line of text"),
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
