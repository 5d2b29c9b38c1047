"""The manifest: one row an image, with the hash of its bytes, and which images are labelled. Two Parquet and two JSON files.

    images.parquet      image_id, image_path, image_sha256, height, width, mask_path, mask_sha256, split
    partition.parquet   image_id, subset
    labelled.json       what a teacher must be trained again for, see `labels_of`; nothing reads it but DVC and `mgd-pipeline run`
    classes.json        names and colours of the classes, see `classes`

They are apart so that another partition does not change the table of images, nor what was made from all images, and so that another
name of a class changes neither. Version 0.1.0 wrote the names into the metadata of images.parquet. All paths are
relative, so members with different folders get the same bytes. The metadata of images.parquet lists the images that were left out
on request, each with its reason, the EXIF orientations that are not applied, and the decoding of files that need one; an empty list
is not written. A list of
unlabelled images may name images of val and test; the metadata of partition.parquet then names them again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from dataclasses import field as attribute
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mgd_pipeline.access import access_error, is_there, says_nothing
from mgd_pipeline.data.classes import Names, parsed_names, read_names, write_names
from mgd_pipeline.data.images import AS_STORED, IGNORE, ORIENTATIONS, Decoding, read_image, read_mask, scaled_size
from mgd_pipeline.data.index import SPLITS, Colour
from mgd_pipeline.data.partition import partition_fingerprint
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError
from mgd_pipeline.tables import open_parquet, parquet_bytes, read_parquet

MANIFEST_VERSION = 1
SUBSETS = ("labelled", "unlabelled")
LABELLED = "labelled.json"
PARTITION = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("image_id", "subset")])
_REMEDY = "run `mgd-pipeline prepare-data`"


class ImageKey(NamedTuple):
    """What a row of a teacher cache belongs to: the image's id and the SHA-256 of its file."""

    image_id: str
    image_sha256: str


@dataclass(frozen=True)
class ImageRow:
    image_id: str
    image_path: str
    """Relative to the root of the data set, with / between parts; `mask_path` likewise, or relative to `Manifest.masks`."""
    image_sha256: str
    height: int
    """Pixels of the decoded image, its EXIF turn applied, before long_side."""
    width: int
    mask_path: str | None
    mask_sha256: str | None
    split: str
    """train, val or test."""


IMAGES = pa.schema(
    pa.field(column.name, pa.int32() if column.type == "int" else pa.string(), nullable=column.name.startswith("mask"))
    for column in fields(ImageRow)
)


@dataclass(frozen=True)
class Skipped:
    """An image that was left out because it or its mask cannot be used."""

    image_id: str
    path: str
    """The image or mask at fault, relative to the root of the data set."""
    reason: str


@dataclass(frozen=True)
class Manifest:
    base: Path = attribute(kw_only=True, compare=False, repr=False)
    """Folder of params.yaml on this machine; it is not written."""
    root: Path
    """Folder of the data set, relative to the folder of params.yaml."""
    long_side: int | None
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    lookup: tuple[int, ...]
    """256 train ids, one for each stored mask value: 255 = ignore, -1 = not allowed."""
    rows: dict[str, ImageRow]
    """By image_id, sorted by it."""
    subsets: dict[str, str]
    """image_id -> labelled or unlabelled, sorted by id; images of train, and the declared ones."""
    skipped: tuple[Skipped, ...] = ()
    """Images of the data set that have no row, sorted by id."""
    orientations: Mapping[str, int] = attribute(default_factory=dict)
    """EXIF orientation, 2 to 8, of images and masks by path, if it is not applied; 0.1.0 noted none."""
    decodings: Mapping[str, Decoding] = attribute(default_factory=dict)
    """How images and masks are decoded that need more than decoding, by path."""
    masks: Path | None = None
    """Folder of the masks, relative to the folder of params.yaml, if labels were converted; None if masks lie below `root`."""
    pixels: Mapping[str, np.ndarray] = attribute(default_factory=dict, compare=False, repr=False)
    """Pixels of each class, (K,) int64, by image_id, where `build_manifest` has just read the masks; not written."""

    def split(self, name: str) -> list[ImageRow]:
        """The rows of train, val or test, sorted by id; train holds images that the partition leaves out, too."""
        return [row for row in self.rows.values() if row.split == name]

    @cached_property
    def labelled(self) -> list[ImageRow]:
        return [row for row in self.training if self.subsets[row.image_id] == "labelled"]

    @cached_property
    def unlabelled(self) -> list[ImageRow]:
        return [row for row in self.training if self.subsets[row.image_id] == "unlabelled"]

    @cached_property
    def for_consistency(self) -> list[ImageRow]:
        """The images for terms that need no labels: the unlabelled images or, where every image is labelled, the labelled ones."""
        return self.unlabelled or self.labelled

    @cached_property
    def training(self) -> list[ImageRow]:
        """Labelled and unlabelled together, sorted by id."""
        return [self.rows[image_id] for image_id in self.subsets]

    @cached_property
    def declared(self) -> list[ImageRow]:
        """Images of val and test that the user's list declares unlabelled: their pixels train, their masks never."""
        return [row for row in self.training if row.split != "train"]

    @cached_property
    def unlabelled_fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the ids and the decoded content of the unlabelled images."""
        return hashlib.sha256(json.dumps(sorted(self.key(row) for row in self.unlabelled), allow_nan=False).encode()).hexdigest()

    @cached_property
    def partition_fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the labelled ids."""
        return partition_fingerprint(row.image_id for row in self.labelled)

    def size(self, row: ImageRow) -> tuple[int, int]:
        """(height, width) in pixels of an image as `read_image` returns it, long_side applied."""
        return scaled_size(row.height, row.width, self.long_side)

    def key(self, row: ImageRow) -> ImageKey:
        """What a cache knows the image by: its id, and a hash of its file and of its decoding."""
        decoding = self.decoding(row)
        if decoding == AS_STORED:
            return ImageKey(row.image_id, row.image_sha256)
        text = json.dumps([row.image_sha256, decoding.as_json()], sort_keys=True, allow_nan=False)
        return ImageKey(row.image_id, hashlib.sha256(text.encode()).hexdigest())

    def decoding(self, row: ImageRow) -> Decoding:
        return self.decodings.get(row.image_path, AS_STORED)

    def mask_decoding(self, row: ImageRow) -> Decoding:
        """A converted mask is drawn as the photo is shown; its path below `masks` may be that of its photo below `root`."""
        return AS_STORED if self.masks is not None else self.decodings.get(row.mask_path or "", AS_STORED)

    def image_file(self, row: ImageRow) -> Path:
        return self.base / self.root / row.image_path

    def mask_file(self, row: ImageRow) -> Path:
        """Raises DataError for an image without a mask."""
        if row.mask_path is None:
            raise DataError(f"{self.image_file(row)}: has no mask in the manifest; {_REMEDY}")
        return self.base / (self.masks or self.root) / row.mask_path

    def image(self, row: ImageRow) -> np.ndarray:
        """(H, W, 3) uint8 at the working size, long_side applied."""
        return read_image(self.image_file(row), self.long_side, self.decoding(row))

    def whole_image(self, row: ImageRow) -> np.ndarray:
        """(H, W, 3) uint8 at the size of the file."""
        return read_image(self.image_file(row), None, self.decoding(row))

    def mask(self, row: ImageRow, size: tuple[int, int] | None = None) -> np.ndarray:
        """(H, W) uint8 train ids, 255 = void, at the size of the file or resized to `size`."""
        return read_mask(self.mask_file(row), np.array(self.lookup, np.int16), size, self.mask_decoding(row).orientation)


def labels_of(manifest: Manifest) -> dict[str, Any]:
    """What decides whether a teacher knows the right labels and none that it must not know; unlabelled images are no part of it.

    Masks: "values" is the train id of each stored value, 255 = no class. "held_out" are the SHA-256 of the images of val and test,
    without those that the user's list declares unlabelled: an image that was unlabelled, and which a teacher has seen, may move
    there with its first mask.
    """

    def file(sha256: str | None, decoding: Decoding) -> dict[str, Any]:
        return {"sha256": sha256, **decoding.as_json()}

    held_out = [row for row in manifest.rows.values() if row.split != "train" and row.image_id not in manifest.subsets]
    return {
        "classes": len(manifest.classes),
        "values": {str(value): train_id for value, train_id in enumerate(manifest.lookup) if train_id >= 0},
        "long_side": manifest.long_side,
        "labelled": {
            row.image_id: {
                "image": file(row.image_sha256, manifest.decoding(row)),
                "mask": file(row.mask_sha256, manifest.mask_decoding(row)),
            }
            for row in sorted(manifest.labelled, key=lambda row: row.image_id)
        },
        "held_out": sorted({row.image_sha256 for row in held_out}),
    }


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes the four files of the manifest into `folder`, each complete or not at all; same content, same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    meta: dict[str, Any] = {
        "manifest_version": MANIFEST_VERSION,
        "root": manifest.root.as_posix(),
        "long_side": manifest.long_side,
        "class_count": len(manifest.classes),
        "lookup": manifest.lookup,
    }
    if manifest.skipped:
        meta["skipped"] = [asdict(bad) for bad in manifest.skipped]
    if manifest.orientations:
        meta["orientations"] = dict(manifest.orientations)
    if manifest.decodings:
        meta["decodings"] = {path: decoding.as_json() for path, decoding in manifest.decodings.items()}
    if manifest.masks is not None:
        meta["masks"] = manifest.masks.as_posix()
    images = [asdict(manifest.rows[image_id]) for image_id in sorted(manifest.rows)]
    _write_table(images, IMAGES, meta, folder / "images.parquet")
    subsets = [{"image_id": image_id, "subset": manifest.subsets[image_id]} for image_id in sorted(manifest.subsets)]
    note: dict[str, Any] = {"manifest_version": MANIFEST_VERSION}
    if manifest.declared:
        note["declared_unlabelled"] = [row.image_id for row in manifest.declared]
    _write_table(subsets, PARTITION, note, folder / "partition.parquet")
    labels = json.dumps(labels_of(manifest), indent=1, ensure_ascii=False, allow_nan=False)
    replace_file(folder / LABELLED, f"{labels}\n".encode())
    write_names(Names(manifest.classes, manifest.palette), folder)


def read_manifest(folder: Path, base: Path, known: Names | None = None) -> Manifest:
    """Reads what `write_manifest` wrote and checks it; `base` is the folder of params.yaml, where the data set must still be.

    `known` stands in for a missing classes.json, see `read_names`.

    Raises DataError for a manifest that is missing, damaged, inconsistent or of another version, AccessError without permission.
    """
    images_path, partition_path = folder / "images.parquet", folder / "partition.parquet"
    images, meta = _read_table(images_path, IMAGES)
    partition, note = _read_table(partition_path, PARTITION)
    declared = note.get("declared_unlabelled", [])
    if not isinstance(declared, list):
        raise DataError(f"{partition_path}: metadata 'declared_unlabelled' is not what prepare-data writes; {_REMEDY}")
    _require_meta(images_path, meta)
    if not (is_there(base / meta["root"]) and (base / meta["root"]).is_dir()):
        raise DataError(f"{base / meta['root']}: the data set of {images_path} is not here; link it again or {_REMEDY}")
    rows = {row["image_id"]: ImageRow(**row) for row in sorted(images, key=lambda row: row["image_id"])}
    if len(rows) < len(images):
        ((repeated, _),) = Counter(row["image_id"] for row in images).most_common(1)
        raise DataError(f"{images_path}: image_id {repeated!r} stands twice; {_REMEDY}")
    for row in rows.values():
        if row.split not in SPLITS:
            raise DataError(f"{images_path}: {row.image_id!r} has split {row.split!r}, not {', '.join(SPLITS)}; {_REMEDY}")
        if row.height < 1 or row.width < 1:
            raise DataError(f"{images_path}: {row.image_id!r} has a size of {row.width} x {row.height} pixels; {_REMEDY}")
    subsets: dict[str, str] = {}
    for row in sorted(partition, key=lambda row: row["image_id"]):
        image_id, subset = row["image_id"], row["subset"]
        if subset not in SUBSETS:
            raise DataError(f"{partition_path}: {image_id!r} has subset {subset!r}, not {' or '.join(SUBSETS)}; {_REMEDY}")
        if image_id in subsets:
            both = "both labelled and unlabelled" if subsets[image_id] != subset else "there twice"
            raise DataError(f"{partition_path}: {image_id!r} is {both}; {_REMEDY}")
        held_out = image_id in rows and rows[image_id].split != "train"
        if image_id not in rows or (held_out and (subset == "labelled" or image_id not in declared)):
            where = f"in the {rows[image_id].split} split" if image_id in rows else f"not in {images_path}"
            raise DataError(f"{partition_path}: {image_id!r} is {where}, but only train may be partitioned; {_REMEDY}")
        if subset == "labelled" and rows[image_id].mask_path is None:
            raise DataError(f"{partition_path}: labelled image {image_id!r} has no mask in {images_path}; {_REMEDY}")
        subsets[image_id] = subset
    if "labelled" not in subsets.values():
        raise DataError(f"{partition_path}: no image is labelled; {_REMEDY}")
    # Of 0.1.0 the names inside count, also beside a classes.json: that one is of another manifest.
    names = parsed_names(images_path, meta) if "classes" in meta else read_names(folder, meta["class_count"], known)
    return Manifest(
        base=base,
        root=Path(meta["root"]),
        long_side=meta["long_side"],
        classes=names.classes,
        palette=names.palette,
        lookup=tuple(meta["lookup"]),
        rows=rows,
        subsets=subsets,
        skipped=tuple(Skipped(**bad) for bad in meta.get("skipped", ())),
        orientations=meta.get("orientations", {}),
        decodings={path: _decoding(values) for path, values in meta.get("decodings", {}).items()},
        masks=Path(meta["masks"]) if "masks" in meta else None,
    )


def _decoding(values: dict[str, Any]) -> Decoding:
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Decoding(**given)


def require_classes(manifest: Manifest, rows: Iterable[ImageRow], what: str) -> None:
    """Raises DataError where no mask of these images says a class of any pixel; `what` names the images.

    Masks are read until one has a class, most often the first. `build_manifest` has counted them already.
    """
    masked = [row for row in rows if row.mask_path is not None]
    for row in masked:
        counted = manifest.pixels.get(row.image_id)
        if counted is None:
            counted = np.bincount(manifest.mask(row).ravel(), minlength=256)[:IGNORE]
        if counted.any():
            return
    if not masked:
        return
    values = [value for value, train_id in enumerate(manifest.lookup) if train_id == IGNORE]
    stored = f"value {values[0]}" if len(values) == 1 else "a value without a class"
    others = "" if len(masked) == 1 else f", nor does any other of the {len(masked)} masks"
    raise DataError(
        f"{manifest.mask_file(masked[0])}: holds no class{others} of {what}: every pixel has {stored}, which "
        'means "no class"; draw classes into the masks, or correct data.ignore and data.classes'
    )


def _require_meta(path: Path, meta: dict[str, Any]) -> None:
    """Raises DataError for metadata of images.parquet that somebody edited."""
    count = "classes" if "classes" in meta else "class_count"
    if missing := [key for key in ("root", "long_side", count, "lookup") if key not in meta]:
        raise DataError(f"{path}: metadata lacks {missing[0]!r}; {_REMEDY}")
    long_side, lookup, skipped, turned = meta["long_side"], meta["lookup"], meta.get("skipped", []), meta.get("orientations", {})
    sound = {
        "root": isinstance(meta["root"], str),
        "long_side": long_side is None or (type(long_side) is int and long_side > 0),
        "class_count": count == "classes" or (type(meta[count]) is int and meta[count] > 1),
        "lookup": isinstance(lookup, list) and len(lookup) == 256 and all(type(v) is int and -1 <= v <= 255 for v in lookup),
        "orientations": isinstance(turned, dict) and all(type(v) is int and v in ORIENTATIONS for v in turned.values()),
        "decodings": _sound_decodings(meta.get("decodings", {})),
        "masks": isinstance(meta.get("masks", ""), str),
        "skipped": isinstance(skipped, list)
        and all(isinstance(bad, dict) and bad.keys() == {f.name for f in fields(Skipped)} for bad in skipped),
    }
    if unsound := [key for key, is_sound in sound.items() if not is_sound]:
        raise DataError(f"{path}: metadata {unsound[0]!r} is not what prepare-data writes; {_REMEDY}")


def _sound_decodings(decodings: Any) -> bool:
    try:
        return all(isinstance(path, str) and _decoding(values).orientation in range(1, 9) for path, values in decodings.items())
    except (AttributeError, TypeError):
        return False


def _write_table(rows: list[dict[str, Any]], schema: pa.Schema, meta: dict[str, Any], path: Path) -> None:
    note = json.dumps(meta, sort_keys=True, allow_nan=False)
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata({b"mgd": note.encode()}))
    replace_file(path, parquet_bytes(table, compression="zstd"))


def _read_table(path: Path, schema: pa.Schema) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and metadata of one of the two files; further columns are left out."""
    try:
        table = read_parquet(open_parquet(path.read_bytes()))
        meta = json.loads((table.schema.metadata or {}).get(b"mgd", b"null"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {_REMEDY}") from None
    except (OSError, pa.ArrowException, ValueError) as error:
        if isinstance(error, OSError) and says_nothing(error):
            raise access_error(path, error) from None
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: not a readable manifest ({reason}); remove it and {_REMEDY}") from None
    version = meta.get("manifest_version") if isinstance(meta, dict) else None
    if version != MANIFEST_VERSION:
        raise DataError(f"{path}: manifest version {version}, this program reads {MANIFEST_VERSION}; {_REMEDY}")
    for field in schema:
        if field.name not in table.column_names:
            raise DataError(f"{path}: column {field.name!r} is missing; {_REMEDY}")
        if table.schema.field(field.name).type != field.type:
            kind = table.schema.field(field.name).type
            raise DataError(f"{path}: column {field.name!r} is {kind}, not {field.type}; {_REMEDY}")
        if not field.nullable and table[field.name].null_count:
            raise DataError(f"{path}: column {field.name!r} has empty cells; {_REMEDY}")
    return table.select(schema.names).to_pylist(), meta
