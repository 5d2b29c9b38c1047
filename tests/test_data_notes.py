"""Data sets that every reader accepts and that are wrong all the same: one line of init, prepare-data and doctor says so."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import annotated
from conftest import Counted
from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.folders import Shown, index_folder, with_splits
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.params import FolderData
from mgd_stages.cli import app
from mgd_stages.projects.init import QUICK, init_project
from mgd_stages.run.data_notes import are_grey_levels, few_to_compare_on, missing_values
from test_manifest import exif, folder_params, save_image, save_mask


def data_set(root: Path, train: int = 6, val: int = 10, *, suffix: str = "jpg", values: tuple[int, ...] = (0, 1)) -> Path:
    """A folder data set of so many labelled images, and two unlabelled ones."""
    for number in range(train + val + 2):
        split, name = ("val" if train <= number < train + val else "train"), f"i{number:02}"
        save_image(root / f"images/{split}/{name}.{suffix}", 16, 24, seed=number)
        if number < train + val:
            save_mask(root / f"masks/{split}/{name}.png", 16, 24, values)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return data_set(tmp_path / "d")


def made(root: Path, name: str = "project") -> tuple[Path, list[str]]:
    """The folder of a new project, and the warnings of init."""
    base = root.with_name(name)
    said = init_project("folder", root, "1/1", base, preset_name=QUICK)
    notes = [line.removeprefix("warning: ") for line in said if line.startswith("warning: ")]
    return base, [note for note in notes if not note.startswith("the edges of the masks")]  # these photos are noise


def run(base: Path, command: str, *sets: str) -> Any:
    options = [part for text in sets for part in ("--set", text)]
    return CliRunner().invoke(app, [command, "--config", str(base / "params.yaml"), *options])


def warned(base: Path, command: str, *sets: str) -> list[str]:
    """The warnings of prepare-data or doctor about the data, but for the one that these photos are noise."""
    return re.findall(r"^warning(?:: | +data: )(?!the edges of the masks)(.*)$", run(base, command, *sets).output, re.MULTILINE)


def told(base: Path, *sets: str) -> list[str]:
    """The warnings of prepare-data, which are also doctor's."""
    said = warned(base, "prepare-data", *sets)
    assert sorted(warned(base, "doctor", *sets)) == sorted(said)
    return said


def refused(base: Path, *sets: str) -> str:
    result = run(base, "prepare-data", *sets)
    assert isinstance(result.exception, SystemExit) and result.exit_code, result.output
    assert not (base / "data/manifest").exists()
    (line,) = result.stderr.splitlines()
    return line


def ignoring(base: Path) -> Path:
    """The project, whose masks were drawn on stored pixels."""
    params = (base / "params.yaml").read_text()
    (base / "params.yaml").write_text(params.replace("exif_orientation: applied", "exif_orientation: ignored"))
    return base


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_orientation_that_a_mask_may_have_followed(tmp_path: Path, suffix: str) -> None:
    """Turned by 180 degrees, both have one size: only a person sees which way the mask lies."""
    root, turned = data_set(tmp_path / "d", suffix=suffix), {f"images/train/i02.{suffix}": 3, f"images/val/i07.{suffix}": 4}
    for name, orientation in turned.items():
        save_image(root / name, 16, 24, orientation=orientation)
    base = ignoring(made(root)[0])
    (said,) = warned(base, "prepare-data")
    assert said.startswith(
        f"2 images have an EXIF orientation, such as images/train/i02.{suffix} (viewers show it turned by 180 de"
    )
    assert "the orientation is ignored, and masks must be drawn on the stored pixels" in said and "exiftran -ai" in said
    assert f"2 masks fit the photo turned or not, such as masks/train/i02.png: look at it over images/train/i02.{suffix}" in said
    assert read_manifest(base / "data/manifest", base).orientations == turned


def test_masks_that_fit_a_turned_photo_either_way_are_told_of(root: Path) -> None:
    """Turned by 90 degrees the size tells; with the photo's own orientation the mask is turned, too."""
    save_image(root / "images/train/i00.jpg", 16, 24, orientation=3)
    save_image(root / "images/train/i01.jpg", 16, 24, 1, orientation=3)
    save_mask(root / "masks/train/i01.png", 16, 24, (0, 1), orientation=3)
    save_image(root / "images/train/i17.jpg", 16, 24, 17, orientation=6)  # unlabelled
    base, _ = made(root)
    (said,) = [note for note in told(base) if "turned" in note]
    assert said.startswith("1 photo is turned as viewers show it, and its mask would fit the stored pixels as well, such as masks/")
    assert "images/train/i00.jpg is turned by 180 degrees" in said and said.endswith("set data.exif_orientation to ignored")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((), None),
        (
            range(6),
            "6 photos are turned as viewers show them, and their masks fit the stored pixels better, such as masks/train/",
        ),
        ((4,), "1 photo is turned as viewers show it, and its mask fits the stored pixels better, such as masks/train/i04.png"),
    ],
)
def test_masks_that_fit_a_turned_photo_as_shown_are_not_told_of(root: Path, wrong: Sequence[int], said: str | None) -> None:
    """The photos show edges where their masks have them; the masks of `wrong` were drawn on the stored pixels."""
    for number in range(6):
        mask = np.zeros((16, 24), np.uint8)
        mask[2 + number : 9, 3 : 20 - number] = 1
        noise = np.random.default_rng(number).integers(0, 20, (16, 24, 3))
        stored = (100 * mask[::-1, ::-1, None] + noise).astype(np.uint8)
        Image.fromarray(stored).save(root / f"images/train/i{number:02}.jpg", quality=95, exif=exif(3))
        Image.fromarray(mask[::-1, ::-1] if number in wrong else mask).save(root / f"masks/train/i{number:02}.png")
    notes = [note for note in told(made(root)[0]) if "turned" in note]
    assert [note[: len(str(said))] for note in notes] == ([] if said is None else [said])


def test_what_is_said_of_an_orientation_by_the_shape_and_the_mask(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 90 degrees the size tells, but for squares; without a mask nothing is at risk; viewers turn a mask that has one too.

    A manifest notes orientations of all images; a manifest of 0.1.0 notes none, and then what doctor reads itself counts.
    """
    save_image(root / "images/train/i17.jpg", 16, 24, 17, orientation=6)  # unlabelled
    save_image(root / "images/train/i00.jpg", 16, 24, orientation=6)  # its mask has the stored size
    save_image(root / "images/train/i01.jpg", 16, 24, 1, orientation=3)
    save_mask(root / "masks/train/i01.png", 16, 24, (0, 1), orientation=3)
    base = ignoring(made(root)[0])
    photos, masks = warned(base, "prepare-data")
    assert photos.startswith("3 images have an EXIF orientation") and "fit" not in photos and "before anybody draws" in photos
    assert masks.startswith("1 mask has an EXIF orientation, such as masks/train/i01.png (viewers show it turned by 180 degrees)")
    save_image(root / "images/train/i03.jpg", 20, 20, 3, orientation=8)
    save_mask(root / "masks/train/i03.png", 20, 20, (0, 1))
    said = warned(base, "prepare-data")
    assert "; 1 mask fits the photo turned or not, such as masks/train/i03.png" in said[0]
    with monkeypatch.context() as patched:
        patched.setattr("mgd_stages.doctor.data._SAMPLE", 0)
        assert set(said) <= set(warned(base, "doctor"))
    with monkeypatch.context() as patched:
        patched.setattr("mgd_pipeline.data.build.ORIENTATIONS", {})
        run(base, "prepare-data")
    assert read_manifest(base / "data/manifest", base).orientations == {} and set(said) <= set(warned(base, "doctor"))


@pytest.mark.parametrize(
    ("split", "where"),
    [("train", "nor does any other of the 6 masks of the labelled images"), ("val", "of the 10 masks of the val images, on which")],
)
def test_masks_that_say_nothing_are_refused_at_once(root: Path, split: str, where: str) -> None:
    """A few masks without a class are told of."""
    base, _ = made(root)
    for name in ("train/i03", "val/i08"):
        save_mask(root / f"masks/{name}.png", 16, 24, (255,))
    assert told(base) == [
        "2 of the 16 labelled, val and test masks hold no class at all, such as masks/train/i03.png; draw classes into these masks"
    ]
    (base / "data/manifest").rename(base / "before")
    for path in (root / "masks" / split).iterdir():
        save_mask(path, 16, 24, (255,))
    line = refused(base)
    assert f"masks/{split}/" in line and "holds no class" in line and where in line
    assert 'every pixel has value 255, which means "no class"; draw classes into the masks' in line
    assert re.search(rf"problem +data: .*masks/{split}/.*holds no class, nor does any other", run(base, "doctor").output)


def test_a_copied_configuration_that_labels_one_image_is_told_of(tmp_path: Path) -> None:
    """1/30 of 40 masks, for 11 classes of which the masks hold two."""
    base, _ = made(data_set(tmp_path / "d", train=40))
    few, absent = told(base, "data.partition=1/30", f"data.classes=[{', '.join(f'c{number}' for number in range(11))}]")
    assert few.startswith("only 1 image is labelled: data.partition is 1/30, and of the masks train has 40, val 10, test 0; take a")
    assert absent.startswith("none of the 1 labelled masks holds the 9 classes c2, c3, c4, c5, c6, c7, c8, c9, c10; label images")
    assert f"warning: {few}" in init_project("folder", tmp_path / "d", "1/30", tmp_path / "again", preset_name=QUICK)


def test_pictures_that_are_not_used_are_told_of_once(root: Path) -> None:
    """A split folder called validation, photos beside images/, hidden folders within it, globs that stop at the first folder.

    Pictures that another note tells of, and pictures that are used by way of a link, are not "not used". Beside images/ lie .dvc
    and the like.
    """
    save_image(root / ".dvc/cache/x.jpg", 16, 24, 90)
    base, notes = made(root)
    assert notes == told(base) == [], "a sound data set"
    for number, place in enumerate(("images/validation/a.jpg", "unlabelled/b.jpg", "images/train/.ipynb_checkpoints/i00.jpg")):
        save_image(root / place, 16, 24, 91 + number)
    save_mask(root / "masks/validation/a.png", 16, 24, (0, 1))
    for path in ("images/train/phone.jp2", "images/extra/y.gif"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).touch()
    save_image(root / "elsewhere/more/z.jpg", 16, 24, 95)
    (root / "images/train/more").symlink_to(root / "elsewhere/more")
    base, notes = made(root, "again")
    for said in (notes, told(base)):
        unread, unused, hidden = [note for note in said if "dvc" not in note]
        assert unread.startswith("1 picture is left out, such as phone.jp2")
        assert re.match(
            r"4 of the 42 pictures below .* are not used, such as images/extra/y\.gif; move them into images/ and", unused
        )
        assert hidden.startswith("pictures in hidden folders are not used, such as images/train/.ipynb_checkpoints/i00.jpg")
    first, *_ = warned(base, "prepare-data", "data.images=images/train/*.jpg", "data.masks=masks/train/*.png")
    assert re.match(r"26 of the 42 pictures below .* are not used", first)
    assert "data.images is images/train/*.jpg and data.masks masks/train/*.png" in first


def test_copies_are_told_of_and_those_of_held_out_images_found_by_doctor(root: Path) -> None:
    (root / "images/train/copy.jpg").write_bytes((root / "images/train/i00.jpg").read_bytes())
    base, _ = made(root)
    (said,) = told(base)
    assert said.startswith("1 training image is byte for byte another training image, such as images/train/i00.jpg and images/tra")
    assert "problems: 0" in run(base, "doctor").output
    (root / "images/train/copy.jpg").write_bytes((root / "images/val/i10.jpg").read_bytes())
    leak, seen = "images/train/copy.jpg: is byte for byte the val image images/val/i10.jpg, so training", run(base, "doctor").output
    assert leak in seen and "problems: 0" not in seen and leak in run(base, "prepare-data").output
    (root / "images/train/i00.jpg").unlink()
    (root / "images/train/i00.jpg").symlink_to(root / "away.jpg")  # named once, not as what DVC cannot read as well
    assert run(base, "doctor").output.count("i00.jpg: is a link that leads to no file") == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_handful_of_masks_trains_before_anything_is_measured(tmp_path: Path, count: int) -> None:
    for number in range(count + 3):
        save_image(tmp_path / f"d/images/i{number}.jpg", 16, 24, number)
        if number < count:
            save_mask(tmp_path / f"d/masks/i{number}.png", 16, 24, (0, 1))
    base, notes = made(tmp_path / "d")
    shares = f"of the masks train has 1, val {min(1, count - 1)}, test {max(0, count - 2)}; draw masks for more images"
    assert any(shares in note for note in notes)
    if count > 1:
        assert any(shares in line for line in warned(base, "prepare-data"))
        return
    assert "val has no images; only 1 image has a mask, and train takes the first, val the second, test the th" in refused(base)
    base, (refusal,) = made(data_set(tmp_path / "in_val_alone", train=0), "again")
    assert refusal == "prepare-data will refuse this data set: " + refused(base).removeprefix("error: ")


def test_grey_levels_become_classes_and_values_that_no_mask_holds_are_told_of(tmp_path: Path) -> None:
    base, notes = made(data_set(tmp_path / "d", values=(0, 75, 150)))
    assert notes == [] and "values: [0, 75, 150]" in (base / "params.yaml").read_text()
    _, notes = made(data_set(tmp_path / "e", values=(1, 2, 3)), "other")
    assert notes[0].startswith(
        "no mask holds the value 0, which is the first class; where your ids begin at 1, set data.values to [1"
    )
    (inner,) = missing_values([0, 3, 255])
    assert inner.text == "no mask holds the values 1, 2, and each is a class without a pixel"
    assert missing_values([0, 1, 2, 255]) == []
    levels = ((0, 128, 255), (75, 150), (0, 85, 170, 255), (0, 10, 20), (0, 38, 75, 113), (0, 100), (0, 1, 200))
    assert all(are_grey_levels(values) for values in levels)
    sparse = ((0, 1), (0, 1, 2, 255), (1, 2, 3), (0, 3), (0, 15), (0, 7, 15), tuple(range(0, 150, 2)), (1, 255))
    assert not any(are_grey_levels(values) for values in sparse)


def drawn(root: Path, **changes: Any) -> dict[str, str]:
    """The split of each image below images/, every one of which has a mask."""
    params = folder_params(images="images/*", masks="masks/*", **changes)
    return {sample.image_id: sample.split for sample in index_folder(root, params).samples}


def test_labels_always_reach_train_and_larger_sets_are_drawn_as_before(tmp_path: Path) -> None:
    for count in range(1, 41):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / f"{folder}/i{count:02}.png").touch()
        for seed in range(10):
            splits = drawn(tmp_path, partition_seed=seed)
            counts = [list(splits.values()).count(split) for split in ("train", "val", "test")]
            assert counts[0] > 0 and counts[1] >= (count > 1) and counts[2] >= (count > 2), (count, seed, counts)
            before = list((of_0_1_0 := drawn_by_0_1_0(sorted(splits), seed)).values())
            if "train" in before and (count < 20 or min(map(before.count, ("val", "test"))) >= 5):
                assert splits == of_0_1_0, "a set that 0.1.0 could train on is drawn as it drew it"
            assert count < 20 or min(counts) >= 5
        if count == 3:
            # With val_fraction 0.9 the hash of every id lies in val.
            assert set(drawn_by_0_1_0(["i01", "i02", "i03"], 2, 0.9, 0.05).values()) == {"val"}
            shares = {"val_fraction": 0.9, "test_fraction": 0.05}
            assert sorted(drawn(tmp_path, partition_seed=2, **shares).values()) == ["test", "train", "val"]


def split_by_split(ids: Iterable[str], params: FolderData, shown: Shown = lambda image_id: frozenset()) -> dict[str, str]:
    samples = with_splits(Path(), [(image_id, Path(image_id), Path(image_id)) for image_id in ids], params, shown)
    return {sample.image_id: sample.split for sample in samples}


@pytest.mark.parametrize("classes", [0, 6])
def test_an_added_image_moves_few(classes: int, counted: Counted) -> None:
    """Of sets that grow by random images: the fewer images a split lacks, the fewer move, and then none.

    Without classes to look for, an added image moves at most one, and only back to train.
    """
    generator, moves, additions = random.Random(0), Counter[bool](), Counter[bool]()
    shows = ClassesByHash(classes)
    for seed in range(counted.of(12, 500)):
        shares = {"val_fraction": generator.choice([0.05, 0.1, 0.2]), "test_fraction": generator.choice([0.05, 0.1, 0.2])}
        params = folder_params(images="*", masks="*", partition_seed=seed, **shares)
        ids, before, enough = [f"{generator.random()}" for _ in range(20)], dict[str, str](), False
        for _ in range(120):
            splits = split_by_split(ids, params, shows)
            assert min(map([*splits.values()].count, ("train", "val", "test"))) >= 5
            moved = [(split, splits[i]) for i, split in before.items() if splits[i] != split]
            assert classes or moved in ([], [("val", "train")], [("test", "train")]), moved
            moves[enough] += len(moved)
            additions[enough] += bool(before)
            drawn_alone = [*drawn_by_0_1_0(ids, seed, *shares.values()).values()]
            before, enough = splits, enough or min(map(drawn_alone.count, ("val", "test"))) >= 5
            ids.append(f"{generator.random()}")
    assert 0 < moves[False] < additions[False] / (2 if classes else 4) and moves[True] == 0 < additions[True]
    counted.say(f"{additions[False]} images of {classes} rare classes that were added to small sets moved {moves[False]} images")


@dataclass(frozen=True)
class ClassesByHash:
    """What an image shows, by its id: of so many classes each with its own rarity."""

    classes: int

    def __call__(self, image_id: str) -> frozenset[int]:
        generator = random.Random(image_id)
        return frozenset(name for name in range(self.classes) if generator.random() < 0.4 / (1 + name))


def test_val_and_test_are_filled_up_with_the_classes_that_they_lack(counted: Counted) -> None:
    """Of random small sets, each class in at least three masks: one image after the other finds what a full search finds."""
    generator, tally = random.Random(0), Counter[str]()
    for seed in range(counted.of(150, 3000)):
        ids = [f"{generator.random()}" for _ in range(generator.randint(20, 60))]
        rarity = [generator.random() ** 2 for _ in range(6)]
        shows = {i: frozenset(name for name in range(6) if generator.random() < rarity[name]) for i in ids}
        often = Counter(name for i in ids for name in shows[i])
        shows = {i: frozenset(name for name in shows[i] if often[name] >= 3) for i in ids}
        params = folder_params(images="*", masks="*", partition_seed=seed)
        splits, by_hash = split_by_split(ids, params, shows.__getitem__), split_by_split(ids, params)
        assert splits == split_by_split(generator.sample(ids, len(ids)), params, shows.__getitem__), "in any order"
        assert Counter(splits.values()) == Counter(by_hash.values()), "as many images as by the hash alone"
        assert by_hash == split_by_split(ids, params, lambda image_id: frozenset({image_id})), "each image is the last of a class"
        # What the hash draws, before anything is filled up.
        key = {i: int.from_bytes(hashlib.sha256(f"{seed}:{i}".encode()).digest()[:6], "big") / 2**48 for i in ids}
        drawn = {i: "val" if key[i] < 0.1 else "test" if key[i] < 0.2 else "train" for i in ids}
        slots = {split: max(0, 5 - [*drawn.values()].count(split)) for split in ("val", "test")}
        assert all(splits[i] == split for i, split in drawn.items() if split != "train"), "an image that the hash draws stays"
        assert any(slots.values()) or splits == by_hash
        names, of = frozenset(name for name in often if often[name] >= 3), classes_of_splits(drawn, shows)
        assert classes_of_splits(splits, shows)["train"] == of["train"], "train keeps every class"
        lacks = frozenset((split, name) for split in slots for name in names - of[split])
        train = frozenset(i for i in ids if drawn[i] == "train")
        possible = of["train"] == names and _fillable(train, slots, lacks, shows)
        complete = [how for how, made in (("classes", splits), ("hash", by_hash)) if _is_complete(made, shows, names)]
        assert possible or not complete
        tally.update([*complete, *["possible"] * possible])
    assert tally["hash"] < 0.6 * tally["possible"] and tally["classes"] >= 0.99 * tally["possible"], tally
    counted.say("of {possible} small sets whose splits can have all classes {classes} do, and {hash} by hash".format(**tally))


def classes_of_splits(splits: dict[str, str], shows: dict[str, frozenset[int]]) -> dict[str, frozenset[int]]:
    held = {split: [shows[image_id] for image_id, own in splits.items() if own == split] for split in ("train", "val", "test")}
    return {split: frozenset[int]().union(*classes) for split, classes in held.items()}


def _is_complete(splits: dict[str, str], shows: dict[str, frozenset[int]], names: frozenset[int]) -> bool:
    return all(classes == names for classes in classes_of_splits(splits, shows).values())


def _fillable(
    train: frozenset[str], slots: dict[str, int], lacks: frozenset[tuple[str, int]], shows: dict[str, frozenset[int]]
) -> bool:
    """Whether so many images of train can show each split what it lacks and leave train each class; by full search."""
    if any(not slots[split] for split, _ in lacks):
        return False
    showing = {(split, name): [i for i in train if name in shows[i]] for split, name in lacks}
    if not showing:
        return True
    split, name = min(sorted(showing), key=lambda lack: len(showing[lack]))
    for i in showing[split, name]:
        rest, left = train - {i}, frozenset(lack for lack in lacks if lack[0] != split or lack[1] not in shows[i])
        kept = all(any(name in shows[j] for j in rest) for name in shows[i])
        if kept and _fillable(rest, {**slots, split: slots[split] - 1}, left, shows):
            return True
    return False


def test_where_nothing_is_filled_up_no_mask_is_read_for_the_splits(tmp_path: Path) -> None:
    def never(image_id: str) -> frozenset[int]:
        raise AssertionError(f"{image_id} is read")

    for count, changes in ((19, {}), (200, {}), (30, {"val_fraction": 0, "test_fraction": 0})):
        split_by_split(map(str, range(count)), folder_params(images="*", masks="*", **changes), never)
    read = Counter[str]()

    def counting(image_id: str) -> frozenset[int]:
        read[image_id] += 1
        return frozenset()

    split_by_split(map(str, range(2000)), folder_params(images="*", masks="*", val_fraction=0.001, test_fraction=0.5), counting)
    assert 0 < len(read) < 170 and set(read.values()) == {1}, "of a large set the ends of train, each mask once"


def test_splits_of_a_small_set_are_the_same_whatever_the_labels_are(tmp_path: Path) -> None:
    """Of masks of ids, masks of colours and files of a tool; with an unlabelled photo, converted masks and a damaged mask."""
    kinds = {"car": range(0, 40, 9), "tree": range(3, 40, 13), "road": range(40)}
    made = [
        annotated.Photo(f"images/{number:02}", (16, 24), tuple(box for box in BOXES if number in kinds[box.name]))
        for number in range(40)
    ]
    for photo in made:
        annotated.write_image(tmp_path, photo)
        ids = photo.mask()
        ids[0, 0] = 255 if photo in made[11::10] else 0  # as rare as a tree, and ignored
        colours = np.array([*annotated.COLOURS.values(), *[(9, 9, 9)] * 252], np.uint8)
        for folder, pixels in (("masks", ids), ("colours", colours[ids])):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{photo.name.removeprefix('images/')}.png")
    annotated.labelme(tmp_path, made)
    colours = [list(colour) for colour in annotated.COLOURS.values()]
    own = {"root": str(tmp_path), "classes": [*annotated.COLOURS], "images": "images/*", "labels": "labelme"}
    settings = folder_params(partition_seed=5, **own).model_dump()  # the hash draws one image for val and three for test

    def splits(**changes: Any) -> dict[str, str]:
        index = index_dataset(FolderData.model_validate({**settings, **changes}), tmp_path / "project")
        return {sample.image_id: sample.split for sample in index.samples if sample.mask}

    of_masks = splits(labels="masks", masks="masks/*")
    assert of_masks != split_by_split(of_masks, folder_params(images="*", masks="*", partition_seed=5))
    for name, numbers in kinds.items():
        assert {of_masks[f"{number:02}"] for number in numbers} == {"train", "val", "test"}, name
    assert of_masks == splits(labels="colours", masks="colours/*", colours=colours, ignore_colours=[[9, 9, 9]])
    for _ in range(2):
        assert of_masks == splits(uncovered="background")
        save_mask(tmp_path / "project/data/labels/00.png", 16, 24, (0, 1, 2))
    assert of_masks == splits(names={"road": "street"}, classes=["background", "street", "car", "tree"])
    save_image(tmp_path / "images/unlabelled.png")
    assert of_masks == splits(labels="masks", masks="masks/*")
    (tmp_path / "masks/05.png").write_bytes(b"no mask")  # prepare-data names it
    assert of_masks == splits(labels="masks", masks="masks/*")


BOXES = tuple(annotated.Shape(name, left, 4, np.ones((6, 5), bool)) for left, name in enumerate(annotated.NAMES))


def drawn_by_0_1_0(ids: list[str], seed: int, val_share: float = 0.1, test_share: float = 0.1) -> dict[str, str]:
    """The rule of 0.1.0, written down again."""
    key = {i: int.from_bytes(hashlib.sha256(f"{seed}:{i}".encode()).digest()[:6], "big") / 2**48 for i in ids}
    order = sorted(ids, key=lambda i: key[i])
    val = [i for i in order if key[i] < val_share] or order[:1]
    test = [i for i in order if val_share <= key[i] < val_share + test_share and i not in val]
    test = test or [i for i in order if i not in val][:1]
    return {i: "val" if i in val else "test" if i in test else "train" for i in ids}


def test_one_class_alone_and_ids_from_one_are_told_of(tmp_path: Path) -> None:
    base, _ = made(data_set(tmp_path / "one"))
    alone = "every pixel of the 6 labelled masks is class_0, or has no class; a network learns nothing from one class"
    assert any(note.startswith(alone) for note in told(base, "data.ignore=1"))
    base, _ = made(data_set(tmp_path / "shifted", values=(1, 2, 3)), "shifted_project")
    assert any(
        note.startswith(
            "the labelled masks hold the value 3, the last class, and never 0, the class class_0; if your ids begin at 1"
        )
        for note in told(base)
    )
    refusal = run(base, "prepare-data", "data.classes=[a,b,c]").output
    assert "pixel value 3 (" in refusal and "; if your ids begin at 1, list them in data.values" in refusal
    listed = ("data.classes=[a,b,c]", "data.values=[1,2,3]")
    assert not any("never 0" in note for note in told(base, *listed))


def test_classes_that_val_or_test_lacks_are_told_of(root: Path) -> None:
    save_mask(root / "masks/train/i02.png", 16, 24, (0, 1, 2))
    base, _ = made(root)
    lacks = "val (10 masks) lacks the class class_2, which labelled masks hold: a comparison on val says nothing of it"
    assert told(base) == [f"{lacks}; label more images with it, or move such images from train to val"]
    *drawn, few = warned(base, "prepare-data", "data.images=images/**/*.jpg", "data.masks=masks/**/*.png")
    assert [note.split(" ")[0] for note in drawn] == ["val", "test"] and "or draw other splits by data.partition_seed" in drawn[0]
    assert few.startswith("networks will be compared on 1 image (val), which says little; raise data.val_fraction")
    for changes, remedy in (({}, "raise data.test_fraction or"), ({"splits": "folders"}, "add more images with masks to test")):
        (note,) = few_to_compare_on("test", folder_params(labels="labelme", **changes), 9)
        assert note.remedy.startswith(remedy) and not few_to_compare_on("test", folder_params(), 10)


def test_masks_that_do_not_lie_on_their_photos_are_told_of_by_doctor(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(8):
        mask = np.zeros((40, 40), np.uint8)
        mask[rng.integers(4, 18) :, : rng.integers(12, 30)] = 1
        for folder, pixels in (("images", np.dstack([mask * 200] * 3)), ("masks", mask[::-1, ::-1])):
            path = tmp_path / f"d/{folder}/i{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(pixels)).save(path)
    base, _ = made(tmp_path / "d")
    assert re.search(r"warning +data: \d of \d masks fit their photos better if they are turned by 180", run(base, "doctor").output)
