"""The partition: drawn or listed, over the train split only, with every contradiction named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgd_pipeline.datasets import Sample
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import FolderData, IdLists
from mgd_pipeline.partition import draw_partition, partition_fingerprint, partition_images, read_id_list

LISTS = Path(__file__).parents[2] / "shared" / "datasets" / "splits"
VOC_PARTS = ("train_aug_labeled_1-16", "train_aug_unlabeled_1-16", "val")
SAMPLES = [
    *(Sample(f"t{i}", Path(f"images/t{i}.jpg"), Path(f"masks/t{i}.png") if i < 6 else None, "train") for i in range(9)),
    Sample("v0", Path("images/v0.jpg"), Path("masks/v0.png"), "val"),
    Sample("x0", Path("images/x0.jpg"), Path("masks/x0.png"), "test"),
]


def params(partition: str | IdLists, seed: int = 0) -> FolderData:
    return FolderData(dataset="folder", root="r", partition=partition, partition_seed=seed, classes=["a", "b"])


def listed(folder: Path, labelled: str, unlabelled: str | None = None) -> dict[str, str]:
    (folder / "labelled.txt").write_text(labelled, encoding="utf-8")
    if unlabelled is not None:
        (folder / "unlabelled.txt").write_text(unlabelled, encoding="utf-8")
    lists = IdLists(labelled="labelled.txt", unlabelled=None if unlabelled is None else "unlabelled.txt")
    return partition_images(params(lists), SAMPLES, folder)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=60, unique=True), st.integers(1, 40), st.integers(-5, 2**40))
def test_a_draw_splits_the_ids_in_two(ids: list[str], denominator: int, seed: int) -> None:
    labelled, rest = draw_partition(ids, denominator, seed)
    assert sorted(labelled + rest) == sorted(ids)
    assert len(labelled) == max(1, round(len(ids) / denominator))
    assert draw_partition(ids[::-1], denominator, seed) == (labelled, rest), "the order of the files must not matter"


def test_a_draw_depends_on_its_seed_and_is_pinned() -> None:
    ids = [f"{i:02d}" for i in range(64)]
    draws = {tuple(draw_partition(ids, 8, seed)[0]) for seed in range(100)}
    assert len(draws) == 100
    assert set().union(*draws) == set(ids), "each image is drawn by some seed"
    # Pinned: a change would move every experiment to other labels.
    assert draw_partition(ids, 16, seed=0)[0] == ["08", "16", "27", "36"]


def test_nothing_to_draw_from() -> None:
    with pytest.raises(DataError, match="no train image has a mask"):
        draw_partition([], 8, 0)


def test_a_fraction_labels_images_with_masks_only() -> None:
    subsets = partition_images(params("1/2"), SAMPLES)
    assert list(subsets) == [f"t{i}" for i in range(9)]
    labelled = [image_id for image_id, subset in subsets.items() if subset == "labelled"]
    assert len(labelled) == 3 and set(labelled) <= {f"t{i}" for i in range(6)}
    assert set(subsets.values()) == {"labelled", "unlabelled"}


def test_a_fraction_that_leaves_nothing_unlabelled() -> None:
    with pytest.raises(DataError, match=r"data\.partition: all 6 train images are labelled.*choose a smaller share"):
        partition_images(params("1/1"), SAMPLES[:6])


def test_lists(tmp_path: Path) -> None:
    rest = listed(tmp_path, "t3\nt1\n")
    assert [image_id for image_id, subset in rest.items() if subset == "labelled"] == ["t1", "t3"]
    assert len(rest) == 9
    assert listed(tmp_path, "t3\n", "t8\nt0\n") == {"t0": "unlabelled", "t3": "labelled", "t8": "unlabelled"}


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "words"),
    [
        ("t1\nt2\n", "t2\nt3\n", r"unlabelled\.txt: 't2' is also in .*labelled\.txt"),
        ("t1\nv0\n", None, r"labelled\.txt: 'v0' is in the val split; labels of val and test never enter training"),
        ("t1\n", "x77\n", r"unlabelled\.txt: no train image has the id 'x77'"),
        ("t1\nt77\nt88\n", None, r"labelled\.txt: no train image has the id 't77' \(and 1 more\); nearest is 't7'"),
        ("completely else\n", None, r"no train image has the id 'completely else'; check that the list belongs"),
        ("t1\nt7\n", None, r"labelled\.txt: labelled image 't7' has no mask; add the mask or move the id"),
        ("t1\nt2\nt1\n", None, r"labelled\.txt: 't1' stands 2 times; keep one"),
        ("\n \n", None, r"labelled\.txt: holds no id"),
        ("t1\n", "", r"unlabelled\.txt: holds no id"),
    ],
)
def test_lists_that_contradict(tmp_path: Path, labelled: str, unlabelled: str | None, words: str) -> None:
    with pytest.raises(DataError, match=words):
        listed(tmp_path, labelled, unlabelled)


def test_all_labelled_by_list_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("\n".join(f"t{i}" for i in range(6)))
    with pytest.raises(DataError, match="none is left to distil on"):
        partition_images(params(IdLists(labelled="all.txt")), SAMPLES[:6], tmp_path)


@pytest.mark.parametrize(
    ("line", "image_id"),
    [
        ("2007_000032", "2007_000032"),
        ("JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png", "2007_000032"),
        ("JPEGImages/2007_000032.jpg   SegmentationClass/2007_000032.png  ", "2007_000032"),
        ("/images/train/jena_000078_000019.png\t/segmentation/train/jena_000078_000019_gtFine.png", "jena_000078_000019"),
        ("leftImg8bit/train/jena/jena_1_leftImg8bit.png gtFine/train/jena/jena_1_gtFine_labelTrainIds.png", "jena_1"),
        ("my photos/street one.JPG\tmy masks/street one.png", "street one"),
        ("my photos/street one.jpg my masks/street one.png", "street one"),
        ("photos\\win.bmp\tmasks\\win.png", "win"),
        ("street one", "street one"),
        ("sub/a", "sub/a"),
        ("frame.001", "frame.001"),
        ("Größe", "Größe"),
        ("Gro\u0308ße", "Größe"),
        ("only/image.webp", "image"),
    ],
)
def test_both_published_formats(tmp_path: Path, line: str, image_id: str) -> None:
    (tmp_path / "list.txt").write_text(f"\ufeff{line}\r\n\r\nlast\r\n", encoding="utf-8")
    assert read_id_list(tmp_path / "list.txt") == [image_id, "last"]


def test_lists_that_a_merge_left_in_conflict(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a\n<<<<<<< HEAD\nb\n=======\nc\n>>>>>>> other\n")
    with pytest.raises(
        DataError, match=r"list\.txt: a merge left <<<<<<< in line 2, ======= in line 4, >>>>>>> in line 6; keep one"
    ):
        read_id_list(tmp_path / "list.txt")


def test_lists_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: no such list of ids; correct data\.partition"):
        read_id_list(tmp_path / "gone.txt")
    (tmp_path / "latin.txt").write_bytes("Größe\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: cannot be read .*expected UTF-8"):
        read_id_list(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("mgd-ssss/voc_train_aug_labeled_1-16.txt", 662, "2007_000032"),
        ("mgd-ssss/voc_train_aug_unlabeled_1-16.txt", 9920, "2007_000039"),
        ("mgd-ssss/voc_val.txt", 1449, "2007_000033"),
        ("mgd-ssss/city_train_aug_labeled_1-16.txt", 186, "jena_000078_000019"),
        ("mgd-ssss/city_val.txt", 500, "frankfurt_000001_066574"),
        ("unimatch/pascal_1_16_labeled.txt", 662, "2007_000032"),
        ("unimatch/pascal_92_labeled.txt", None, "2007_000733"),
        ("unimatch/cityscapes_1_16_labeled.txt", 186, "jena_000078_000019"),
    ],
)
def test_published_lists(name: str, count: int | None, first: str) -> None:
    if not (LISTS / name).is_file():
        pytest.skip("the published lists in ../shared are not here")
    ids = read_id_list(LISTS / name)
    assert ids[0] == first
    assert len(ids) == (count or 92), "one id for each image"
    assert not any(character in image_id for image_id in ids for character in " \t/.")


def test_published_lists_fit_together() -> None:
    if not LISTS.is_dir():
        pytest.skip("the published lists in ../shared are not here")
    labelled, unlabelled, val = (read_id_list(LISTS / f"mgd-ssss/voc_{part}.txt") for part in VOC_PARTS)
    assert not set(labelled) & set(unlabelled) and not (set(labelled) | set(unlabelled)) & set(val)
    assert len(labelled) + len(unlabelled) == 10_582


def test_fingerprint_is_of_the_set() -> None:
    expected = hashlib.sha256(b"a\nb\nc").hexdigest()
    assert partition_fingerprint(["c", "a", "b"]) == partition_fingerprint({"a", "b", "c"}) == expected
    assert partition_fingerprint(["a", "b"]) != expected
