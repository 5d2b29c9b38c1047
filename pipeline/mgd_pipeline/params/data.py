"""The section data: which images, and which of them count as labelled."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from mgd_pipeline.params.sections import PositiveInt, Section, Text


class IdLists(Section):
    labelled: Text
    """Text file with the labelled training images: one id per line, or an image path and a mask path per line."""
    unlabelled: Text | None = None
    """The same for the unlabelled training images; null takes all other training images."""


Colour = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]


class _Data(Section):
    root: Text
    """Folder of the data set, relative to this file. A link such as data/raw/voc is the same for all members of a group."""
    partition: Annotated[
        Annotated[str, Tag("share")] | Annotated[IdLists, Tag("lists")],
        Discriminator(lambda value: "share" if isinstance(value, str) else "lists"),
    ]
    """Labelled share of the training images, such as 1/8, or two id lists."""
    partition_seed: Annotated[int, Field(ge=0)] = 0
    """Seed for drawing a fractional partition."""
    long_side: PositiveInt | None = None
    """Longer sides above this many pixels are scaled down to it; null keeps the size of every image."""

    @field_validator("partition", mode="before")
    @classmethod
    def _share(cls, value: object) -> object:
        if isinstance(value, (dict, IdLists)) or (isinstance(value, str) and re.fullmatch(r"1/[1-9]\d{0,5}", value)):
            return value
        if type(value) is int and str(value).startswith("1") and int(str(value)[1:] or 0) > 0:
            meant = int(str(value)[1:])
            raise ValueError(f"YAML reads 1_{meant} as the number {value}; write 1/{meant} (or 1/{value})")
        raise ValueError(f"write a share such as {_nearest_share(value)}, or two id lists (labelled: and unlabelled:)")


def _nearest_share(value: object) -> str:
    """The 1/n that was probably meant: 0.125 and '12.5 %' -> 1/8, 8 and '1-8' -> 1/8, '2/8' -> 1/4; 1/8 for no number at all."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", str(value))]
    if "%" in str(value):
        numbers = [number / 100 for number in numbers]
    ratio = numbers[0] / numbers[1] if len(numbers) == 2 and numbers[1] else numbers[0] if len(numbers) == 1 else 0
    denominator = round(1 / ratio) if 0 < ratio < 1 else round(ratio)
    return f"1/{denominator}" if 2 <= denominator < 10**6 else "1/8"


class ShapesData(_Data):
    dataset: Literal["shapes"]
    """The built-in data set, rendered by prepare-data. Other kinds are voc, cityscapes and folder (your own images)."""
    height: PositiveInt = 96
    """Height of a rendered scene, pixels."""
    width: PositiveInt = 128
    """Width of a rendered scene, pixels."""
    train: PositiveInt = 480
    """Number of training scenes."""
    val: PositiveInt = 128
    """Number of validation scenes."""
    test: PositiveInt = 128
    """Number of test scenes."""
    render_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the renderer; scene i of a split is a function of (render_seed, split, i)."""


class VocData(_Data):
    dataset: Literal["voc"]
    """PASCAL VOC 2012, with SBD's masks if SegmentationClassAug exists. Other kinds are shapes, cityscapes and folder."""


class CityscapesData(_Data):
    dataset: Literal["cityscapes"]
    """Cityscapes with fine annotations, 19 classes. Other kinds are shapes, voc and folder."""


class FolderData(_Data):
    dataset: Literal["folder"]
    """Your own images and masks, in folders or named by globs. Other kinds are shapes, voc and cityscapes."""
    labels: Literal["masks", "colours", "coco", "cvat", "label_studio", "labelme", "supervisely", "yolo"] = "masks"
    """What the labels are: masks of class ids, masks of colours, or files of an annotation tool below root."""
    annotations: str | None = None
    """Glob of the annotation files below root; null reads all files of the tool."""
    classes: Annotated[list[str], Field(min_length=2, max_length=254)]
    """Names of the classes. Class i has the id i, and may be renamed; an annotation tool's classes are found by their names."""
    values: list[Annotated[int, Field(ge=0, le=255)]] | None = None
    """Pixel value of each class in a mask, such as [0, 75, 150]; null means 0, 1, 2 and so on."""
    colours: list[Colour] | None = None
    """RGB of each class, 0 to 255, in all pictures, and in masks of colours; null takes PASCAL VOC's colours."""
    ignore: Annotated[int, Field(ge=0, le=255)] = 255
    """Pixel value of a mask that means "no class"."""
    ignore_colours: list[Colour] = []
    """Colours of masks that mean "no class"."""
    names: dict[str, str | None] = {}
    """An annotation tool's names for a class that is called otherwise, such as truck: car; null means "no class"."""
    uncovered: str | None = None
    """Class of the pixels that no annotation covers, such as background; null means "no class"."""
    empty: Literal["unlabelled", "labelled"] = "unlabelled"
    """Images that an annotation tool lists without a region: unlabelled, or labelled with `uncovered` everywhere."""
    images: str | None = None
    """Glob of the images below root, such as photos/**/*.jpg; null expects images/<split>/, with a tool all images."""
    masks: str | None = None
    """Glob of the masks below root, matched to images by path; null expects masks/<split>/."""
    splits: Literal["drawn", "folders", "lists"] = "drawn"
    """With globs or an annotation tool: splits are drawn, or are folders and files called train, val and test, or VOC's lists."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the labelled images that becomes the validation split, if splits are drawn; of 20 images and more at least five."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the labelled images that becomes the test split, if splits are drawn; of 20 images and more at least five."""
    exif_orientation: Literal["applied", "ignored"] = "applied"
    """Whether photos are turned as viewers and annotation tools show them; ignored is for masks drawn on stored pixels."""
    value_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Values of 16-bit, 32-bit and float images that become black and white; null refuses such images."""
    background_colour: Colour | None = None
    """RGB behind transparent pixels; null refuses images with transparent pixels."""

    @field_validator("classes")
    @classmethod
    def _names(cls, value: list[str]) -> list[str]:
        """Tables, files and class_map hold numbers by the name of a class, a line each."""
        names: dict[str, str] = {}
        for name in value:
            if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
                raise ValueError(f"{name!a}: a class name is one line of text; remove the line break, tab or control character")
            seen = _as_seen(name)
            if not seen:
                raise ValueError(f"{name!r}: a class needs a name that can be seen")
            if seen in names:
                same = f"{name!r} stands twice" if names[seen] == name else f"{names[seen]!a} and {name!a} look the same"
                raise ValueError(f"{same}; give each class a name of its own, such as '{seen} 2'")
            names[seen] = name
        return value

    @model_validator(mode="after")
    def _splits(self) -> FolderData:
        if self.labels in ("masks", "colours") and (self.images is None) != (self.masks is None):
            raise ValueError("give both globs, images and masks, or neither")
        if self.labels not in ("masks", "colours") and self.masks is not None:
            raise ValueError(f"labels: {self.labels} reads no masks; leave the glob of masks out")
        read = self.labels if self.labels in _READ_WITH else "files of an annotation tool"
        for what, keys in _READ_WITH.items():
            if what != read and (idle := [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]):
                raise ValueError(f"{idle[0]}: is for labels that are {what}, and has no effect on {self.labels}; leave it out")
        for name, given in (("values", self.values), ("colours", self.colours)):
            if given is not None and (len(given) != len(self.classes) or len({str(one) for one in given}) < len(given)):
                raise ValueError(f"{name}: {len(given)} for {len(self.classes)} classes; give each class one of its own")
        if self.labels == "colours" and self.colours is None:
            raise ValueError("labels: colours needs data.colours, one for each class")
        if foreign := [name for name in self.names.values() if name is not None and name not in self.classes]:
            raise ValueError(f"names: {foreign[0]!r} is not among the classes; add it there or correct the name")
        if self.uncovered is not None and self.uncovered not in self.classes:
            raise ValueError(f"uncovered: {self.uncovered!r} is not among the classes; add it there or write null")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError("value_range: the first value must be less than the second")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction together must be less than 1, or nothing is left to train on")
        return self


_READ_WITH = {
    "masks": ("values", "ignore"),
    "colours": ("ignore_colours",),
    "files of an annotation tool": ("annotations", "names", "uncovered", "empty"),
}
"""Keys of FolderData that nothing reads with labels of another kind."""


def _as_seen(name: str) -> str:
    """A name as a reader tells it from others: composed, without invisible characters, each run of blanks one blank."""
    composed = unicodedata.normalize("NFC", name)
    visible = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return " ".join(visible.split())


DATASETS: dict[str, type[Section]] = {"shapes": ShapesData, "voc": VocData, "cityscapes": CityscapesData, "folder": FolderData}
DataParams = Annotated[ShapesData | VocData | CityscapesData | FolderData, Field(discriminator="dataset")]
