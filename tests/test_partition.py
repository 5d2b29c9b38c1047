"""The partition: drawn or listed, over the train split only; test_bad_inputs has more lists that are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgd_pipeline.data.index import Sample
from mgd_pipeline.data.partition import draw_partition, listed_images, partition_fingerprint, partition_images
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import IdLists
from test_manifest import folder_params

LISTS = Path(__file__).parents[2] / "shared" / "datasets" / "splits"


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


def images(*names: str, split: str = "train", masks: bool = True) -> list[Sample]:
    """Of the split layout, by their paths below images/<split>/."""
    where, drawn = Path("images", split), Path("masks", split)
    paths = [Path(name) for name in names]
    return [
        Sample(path.with_suffix("").as_posix(), where / path, drawn / path.with_suffix(".png") if masks else None, split)
        for path in paths
    ]


def test_a_fraction_labels_images_with_masks_only_and_lists_name_them(tmp_path: Path) -> None:
    samples = [*images(*(f"t{i}.jpg" for i in range(6))), *images("t6.jpg", "t7.jpg", "t8.jpg", masks=False)]
    samples += [*images("v0.jpg", split="val"), *images("x0.jpg", split="test")]
    subsets = partition_images(folder_params(partition="1/2"), samples)
    assert list(subsets) == [f"t{i}" for i in range(9)] and set(subsets.values()) == {"labelled", "unlabelled"}
    labelled = [image_id for image_id, subset in subsets.items() if subset == "labelled"]
    assert len(labelled) == 3 and set(labelled) <= {f"t{i}" for i in range(6)}
    assert partition_fingerprint(labelled[::-1]) == hashlib.sha256("\n".join(labelled).encode()).hexdigest()

    (tmp_path / "labelled.txt").write_text("t3\nt1\n")
    (tmp_path / "unlabelled.txt").write_text("t8\nt0\n")
    rest = partition_images(folder_params(partition=IdLists(labelled="labelled.txt")), samples, tmp_path)
    assert rest == {**dict.fromkeys([f"t{i}" for i in range(9)], "unlabelled"), "t1": "labelled", "t3": "labelled"}
    lists = IdLists(labelled="labelled.txt", unlabelled="unlabelled.txt")
    both = partition_images(folder_params(partition=lists), samples, tmp_path)
    assert both == {"t0": "unlabelled", "t1": "labelled", "t3": "labelled", "t8": "unlabelled"}


def resolved(folder: Path, text: str | bytes, samples: list[Sample], *, by_name: bool = False) -> list[str]:
    (folder / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return [sample.image_id for sample in listed_images(folder / "list.txt", samples, folder / "data", by_name=by_name)]


PUBLISHED = [
    Sample("2007_000032", Path("JPEGImages/2007_000032.jpg"), Path("SegmentationClassAug/2007_000032.png"), "train"),
    *(Sample(n, Path(f"leftImg8bit/train/jena/{n}_leftImg8bit.png"), None, "train") for n in ("jena_000078_000019", "jena_1")),
]


@pytest.mark.parametrize(
    ("line", "image_id"),
    [
        ("JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png", "2007_000032"),
        ("/JPEGImages/2007_000032.jpg   /SegmentationClassAug/2007_000032.png  ", "2007_000032"),
        ("/images/train/jena_000078_000019.png\t/segmentation/train/jena_000078_000019_gtFine.png", "jena_000078_000019"),
        ("leftImg8bit/train/jena/jena_1_leftImg8bit.png gtFine/train/jena/jena_1_gtFine_labelTrainIds.png", "jena_1"),
        ("jena_1_leftImg8bit.png", "jena_1"),
    ],
)
def test_both_published_formats(tmp_path: Path, line: str, image_id: str) -> None:
    """The file name alone identifies an image of VOC and Cityscapes, whatever folders stand before it."""
    last = Sample("last", Path("JPEGImages/last.jpg"), None, "train")
    assert resolved(tmp_path, f"\ufeff{line}\r\n\r\nlast\r\n", [*PUBLISHED, last], by_name=True) == [image_id, "last"]


FOLDERS = [
    *images("im000.png", "seq1/im000.png", "seq2/im000.jpg", "seq2/im001.jpg", "deep/seq1/x.png", "frame.001.png"),
    *images("Gr\u00f6\u00dfe.jpg", "street one.JPG", "val/only.webp"),
    *images("v.png", "seq9/x9.png", split="val"),
]


@pytest.mark.parametrize(
    ("line", "image_id"),
    [
        ("im000", "im000"),
        ("./seq1/im000", "seq1/im000"),
        ("seq2/im000.png", "seq2/im000"),
        ("images/train/seq1/im000.png masks/train/seq1/im000.png", "seq1/im000"),
        ("images/train/im000.png\tmasks/train/im000.png", "im000"),
        ("train/seq1/im000.png", "seq1/im000"),
        ("/home/anna/my photos/images/train/seq1/im000.png", "seq1/im000"),
        ("/SegNet/CamVid/train/seq2/im000.png /SegNet/CamVid/trainannot/seq2/im000.png", "seq2/im000"),
        ("../photos/images/train/seq1/../seq2/im000.jpg", "seq2/im000"),
        ("C:\\photos\\images\\train\\seq1\\im000.png\tC:\\photos\\masks\\train\\seq1\\im000.png", "seq1/im000"),
        ("masks/train/seq2/im000.png", "seq2/im000"),
        ("im001", "seq2/im001"),
        ("seq1/im000.png, masks/train/seq1/im000.png", "seq1/im000"),
        ("seq1/x.png", "deep/seq1/x"),
        ("images/val/v.png", "v"),
        ("only", "val/only"),
        ("images/train/street one.JPG masks/train/street one.png", "street one"),
        ("Gro\u0308\u00dfe.jpg", "Gr\u00f6\u00dfe"),
    ],
)
def test_a_path_means_the_image_of_this_path(tmp_path: Path, line: str, image_id: str) -> None:
    assert resolved(tmp_path, f"{line}\n", FOLDERS) == [image_id]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("images/train/seq3/im000.png", r"line 2: no image has the id or path 'images/train/seq3/im000\.png'; images of this name"),
        ("JPEGImages/im001.jpg", r"images of this name are images/train/seq2/im001\.jpg: write the path of one"),
        ("seq1/IM000\nt88", r"line 2: no image has the id or path 'seq1/IM000' \(and 1 more\); nearest is 'seq1/im000'"),
        ("seq1/im000.gif", "no image has the id or path 'seq1/im000.gif'; nearest is 'seq1/im000'"),
        ("completely else", "no image has the id or path 'completely else'; check that the list belongs"),
        ("seq1/im000 masks/train/seq2/im000.png", "may be images/train/seq2/im000.jpg or images/train/seq1/im000.png"),
        ("seq1/im000,masks/train/seq2/im000.png", "may be images/train/seq2/im000.jpg or images/train/seq1/im000.png"),
        ("2007_000032  1", "no image has the id or path '2007_000032  1'"),
        ("images/val/seq1/im000.png", "no image has the id or path"),
        ("im777", r"line 2: 'im777' may be images/train/a/im777\.png or images/train/b/im777\.png; write the path of one"),
        ("images/train/seq1/im000.png masks/train/seq2/im000.png", "'masks/train/seq2/im000.png' is the mask of 'seq2/im000', not"),
        ("im000\nseq1/im000\nimages/train/im000.png", r"'im000' stands 2 times \(lines 2, 4\); keep one line of each"),
        ("Gr\u00f6\u00dfe".encode("latin-1"), "cannot be read .*expected UTF-8"),
        (
            "<<<<<<< HEAD\nb\n=======\nc\n>>>>>>> other",
            "a merge left <<<<<<< in line 2, ======= in line 4, >>>>>>> in line 6; keep",
        ),
    ],
)
def test_another_image_never_stands_in(tmp_path: Path, line: str | bytes, words: str) -> None:
    samples = [*FOLDERS, *images("a/im777.png", "b/im777.png", "alone.png")]
    with pytest.raises(DataError, match=rf"list\.txt[,:] .*{words}"):
        resolved(tmp_path, b"alone\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n", samples)


def test_the_file_of_another_folder_is_no_image_of_this_one(tmp_path: Path) -> None:
    for folder in ("data", "elsewhere"):
        (tmp_path / folder / "images/train").mkdir(parents=True)
        (tmp_path / folder / "images/train/im000.png").touch()
    (tmp_path / "link").symlink_to("data")
    assert resolved(tmp_path, f"{tmp_path}/link/images/train/im000.png", FOLDERS) == ["im000"]
    with pytest.raises(DataError, match=r"line 1: '.*/elsewhere/images/train/im000\.png' is not the file .*data/images/train"):
        resolved(tmp_path, f"{tmp_path}/elsewhere/images/train/im000.png", FOLDERS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lists_in_any_encoding_with_a_mark_and_any_line_ends(tmp_path: Path, encoding: str) -> None:
    for end in ("\n", "\r\n", "\r", "  \n\n"):
        assert resolved(tmp_path, f"im000{end}Gr\u00f6\u00dfe{end}".encode(encoding), FOLDERS) == ["im000", "Gr\u00f6\u00dfe"]


@pytest.mark.skipif(not LISTS.is_dir(), reason="the published lists in ../shared are not here")
def test_published_lists() -> None:
    """One image for each line, in its order, on a disk with exactly these images."""
    listed: list[set[str]] = []
    for name, count, first in (
        ("mgd-ssss/voc_train_aug_labeled_1-16.txt", 662, "2007_000032"),
        ("mgd-ssss/voc_train_aug_unlabeled_1-16.txt", 9920, "2007_000039"),
        ("mgd-ssss/voc_val.txt", 1449, "2007_000033"),
        ("mgd-ssss/city_train_aug_labeled_1-16.txt", 186, "jena_000078_000019"),
        ("unimatch/pascal_92_labeled.txt", 92, "2007_000733"),
        ("unimatch/cityscapes_1_16_labeled.txt", 186, "jena_000078_000019"),
    ):
        ids = [Path(line.split()[0]).stem.removesuffix("_leftImg8bit") for line in (LISTS / name).read_text().splitlines()]
        place = "leftImg8bit/train/{1}/{0}_leftImg8bit.png" if "cit" in name else "JPEGImages/{0}.jpg"
        samples = [Sample(i, Path(place.format(i, i.split("_")[0])), None, "train") for i in ids]
        assert listed_images(LISTS / name, samples[::-1], LISTS, by_name=True) == samples
        assert ids[0] == first and len(ids) == count
        listed.append(set(ids))
    labelled, unlabelled, val, *_ = listed
    assert not labelled & unlabelled and not (labelled | unlabelled) & val
    assert len(labelled) + len(unlabelled) == 10_582
