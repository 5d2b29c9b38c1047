"""What teacher caches will cost, before anything is built: bytes, files, and the time to send them.

Sizes without compression follow from shapes alone. Compressed sizes depend on the data: they are measured by encoding some rows of
a teacher's present cache again, or else they are typical shares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, get_args

import numpy as np

from mgd_pipeline.caches.decoding import stored_logits
from mgd_pipeline.caches.encoding import encode_logits
from mgd_pipeline.caches.format import ZSTD_LEVEL, Layout
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.data.manifest import Manifest, read_manifest
from mgd_pipeline.errors import CacheError, DataError, MGDError, ParamsError
from mgd_pipeline.networks.segmentation import output_grid
from mgd_pipeline.params import SmpTeacher, TargetsParams
from mgd_pipeline.words import size_text
from mgd_stages.run.progress import answer, answer_json, duration
from mgd_stages.run.project import Project
from mgd_stages.run.teacher_cache import cached_images, commit_bytes, index_bytes, planned_layout, require_fits

ENCODINGS: dict[str, dict[str, Any]] = {
    "float16": {"logits": "float16", "region_embeddings": "float16", "compression": "none"},
    "uint8": {"logits": "uint8", "region_embeddings": "float16", "compression": "none"},
    "log-probability": {"logits": "log-probability", "region_embeddings": "uint8", "compression": "zstd"},
}
"""Values of `targets` for each encoding, by the name that its row has."""
_SECOND = 100e6
"""Bytes that a network sends in a second."""
_FEW, _MANY = (21, 0.20), (150, 0.11)
"""Compressed log-probabilities of so many classes take this share of one byte for each: teachers of 11 classes on CamVid took 0.21
to 0.35, teachers that the script simulated.py simulates 0.14 to 0.24 (19 and 21 classes) and 0.11 (150 and 171 classes)."""
_SPREAD = 1.75
"""The largest typical share by the smallest one, as those of CamVid."""
_REGIONS = (0.65, 0.95)
"""The same for region embeddings in uint8; a teacher on CamVid took 0.78."""
_LOSSLESS = {"logits": (0.5, 0.96), "region_embeddings": (0.8, 0.96)}
"""The same for compressed uint8 logits or float16 values."""
_SAMPLE = 16
"""Rows that are encoded to measure shares."""

Shares = Mapping[str, tuple[float, float]]
"""The smallest and the largest share of its bytes that each compressed array keeps."""


@dataclass(frozen=True)
class Teacher:
    """What the size of a teacher's cache depends on, besides its encoding."""

    name: str
    rows: int
    """images, and mirror images if the cache has them"""
    classes: int
    features: int
    frame: tuple[int, int]
    """height and width of the largest padded input, pixels"""
    cache: TargetCache | None = None
    """a cache that is there, to measure shares"""


@dataclass(frozen=True)
class Size:
    """What one cache takes. `low` and `high` differ only with compression."""

    low: int
    """bytes"""
    high: int
    files: int
    source: str
    """where the shares of a compressed cache come from: measured or typical; calculated without compression"""


def cache_size(teacher: Teacher, options: TargetsParams) -> Size:
    """Bytes and files of a teacher's cache in the encoding of these options. Raises ParamsError where a cache cannot hold them."""
    layout = planned_layout(options, (teacher.classes, teacher.features), *teacher.frame)
    compressed = [name for name in layout.records if layout.is_compressed(name)]
    shares, source = typical_shares(layout, options), "typical"
    if compressed and teacher.cache is not None and (measured := measured_shares(teacher.cache, layout, options)):
        shares, source = measured, "measured"
    shards = -(-teacher.rows // layout.rows_per_shard)
    files = len(layout.records) * (shards + 1) + 3
    require_fits(layout, teacher.rows)
    control = index_bytes(teacher.rows) + commit_bytes(layout, teacher.rows) + 5_000
    ends = []
    for end in (0, 1):
        sizes = {name: layout.bytes_of(name) * (shares[name][end] if name in compressed else 1) for name in layout.records}
        indexes = shards * len(layout.records) * (layout.rows_per_shard * 16 + 4)
        ends.append(round(teacher.rows * sum(size + 4 for size in sizes.values()) + indexes + control))
    return Size(ends[0], ends[1], files, source if compressed else "calculated")


def typical_shares(layout: Layout, options: TargetsParams) -> Shares:
    """Shares of the arrays that compression changes, for a teacher that nobody has measured."""
    shares = dict(_LOSSLESS)
    if options.logits == "log-probability" and layout.classes:
        (few, most), (many, least) = _FEW, _MANY
        low = float(np.interp(math.log(layout.classes), np.log([few, many]), [most, least]))
        shares["logits"] = low, low * _SPREAD
    if options.region_embeddings == "uint8":
        shares["region_embeddings"] = _REGIONS
    return shares


def measured_shares(cache: TargetCache, layout: Layout, options: TargetsParams) -> Shares | None:
    """The shares of some rows of a cache that are decoded, encoded and compressed; None if its cells have another size."""
    import torch
    from numcodecs.zstd import compress

    from mgd_pipeline.caches.levels import as_targets

    same = ("classes", "features", "stride", "region_stride")
    rows = cache.index.rows[cache.index.has_targets]
    if not len(rows) or any(getattr(layout, key) != getattr(cache.layout, key) for key in same):
        return None
    kept: dict[str, int] = dict.fromkeys((name for name in layout.records if layout.is_compressed(name)), 0)
    sample = rows[:: -(-len(rows) // _SAMPLE)].tolist()
    for row in sample:
        extent = cache.record("extents", row)
        logits, regions = np.empty((0, 2, 2), np.float32), np.empty((0, 1, 1), np.float32)
        if layout.classes:
            logits = stored_logits(cache, row)[0]
        if layout.features:
            r, c = (-(-int(side) // layout.region_stride) for side in extent[:2])
            regions = cache.embeddings(row)[:, :r, :c].astype(np.float32)
        said, seen = (torch.from_numpy(np.ascontiguousarray(values))[None] for values in (logits, regions))
        made = as_targets(said, seen, torch.zeros(1, layout.classes), options)[0]
        if made.logits_affine is None and layout.classes:
            made = made._replace(logits=encode_logits(made.logits, layout.encoding).values)  # pyright: ignore[reportArgumentType]
        for name in kept:
            values, record = getattr(made, name), np.zeros(*layout.records[name])
            height, width = (min(sides) for sides in zip(values.shape[1:], record.shape[1:], strict=True))
            record[:, :height, :width] = values[:, :height, :width]
            kept[name] += len(compress(record, ZSTD_LEVEL))
    shares = {name: size / len(sample) / layout.bytes_of(name) for name, size in kept.items()}
    return {name: (share, share) for name, share in shares.items()}


def encodings(options: TargetsParams) -> dict[str, TargetsParams]:
    """The options in each of ENCODINGS, and as they are if that is none of them."""
    made = {name: options.model_copy(update=changes) for name, changes in ENCODINGS.items()}
    return made if options in made.values() else {**made, "params.yaml": options}


class Numbers(NamedTuple):
    """A teacher and its images, as somebody describes them who has neither."""

    images: int
    size: str
    """height and width of the images, pixels: 512x683"""
    classes: int
    features: int
    stride: int
    region_stride: int

    @property
    def teacher(self) -> Teacher:
        sides = self.size.lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and 0 < int(side) <= 2**20 for side in sides):
            raise ParamsError(f"--size {self.size}: write height and width of the images in pixels, such as 512x683")
        if not self.classes and not self.features:
            raise ParamsError("--classes 0 --features 0: a teacher gives classes, features or both")
        (height, width), *_ = output_grid([(int(sides[0]), int(sides[1]))]).frames
        return Teacher("", self.images, self.classes, self.features, (int(height), int(width)))

    @property
    def options(self) -> TargetsParams:
        for key, value in (("stride", self.stride), ("region_stride", self.region_stride)):
            if value not in (known := get_args(TargetsParams.model_fields[key].annotation)):
                raise ParamsError(f"--{key.replace('_', '-')} {value}: must be one of {', '.join(map(str, known))}")
        return TargetsParams.model_validate({"stride": self.stride, "region_stride": self.region_stride})


def estimate_numbers(numbers: Numbers, as_json: bool) -> None:
    """What a cache takes in each encoding, one and two of them. Raises ParamsError for numbers that no cache can have."""
    teacher, options = numbers.teacher, numbers.options
    sizes, unfit = {}, {}
    for name, changed in encodings(options).items():
        try:
            sizes[name] = cache_size(teacher, changed)
        except ParamsError as error:
            unfit[name] = error
    if not sizes:
        raise next(iter(unfit.values()))
    if as_json:
        return answer_json({name: asdict(size) for name, size in sizes.items()})
    head = ("encoding", "an image", "one teacher", "two teachers", "files of a cache", "to send a cache at 100 MB/s")
    _answer_table(
        head,
        [
            (
                name,
                _range(size.low / teacher.rows, size.high / teacher.rows),
                _range(size.low, size.high),
                _range(2 * size.low, 2 * size.high),
                f"{size.files:,}",
                _sent(size.low, size.high),
            )
            for name, size in sizes.items()
        ],
    )
    for name, error in unfit.items():
        answer(f"{name}: {error}")


def estimate_project(project: Project, as_json: bool) -> None:
    """What the caches of a project's teachers take in each encoding. Raises ParamsError for a project without a manifest."""
    try:
        manifest = read_manifest(project.manifest, project.base)
    except DataError as error:
        raise ParamsError(
            f"{error}\nWithout a manifest, name the numbers: "
            "`mgd-pipeline cache estimate --images 20000 --size 512x683 --classes 150`"
        ) from None
    options, rows, facts = project.params.targets, [], []
    totals: dict[str, list[Size]] = {}
    for name in project.params.teachers:
        try:
            teacher = _of_project(project, name, manifest)
        except MGDError as error:
            rows.append((name, "not known", "", "", "", "", str(error).splitlines()[0]))
            facts.append({"teacher": name, "unknown": str(error)})
            continue
        for encoding, changed in encodings(options).items():
            try:
                size = cache_size(teacher, changed)
            except ParamsError as error:
                rows.append((name, encoding, "", "", "", "", str(error)))
                facts.append({"teacher": name, "encoding": encoding, "unknown": str(error)})
                continue
            totals.setdefault(encoding, []).append(size)
            facts.append({"teacher": name, "encoding": encoding, "images": teacher.rows, **asdict(size)})
            rows.append((name, encoding, *_cells(size, teacher.rows), size.source))
    for encoding, parts in totals.items() if len(project.params.teachers) > 1 else ():
        whole = Size(sum(part.low for part in parts), sum(part.high for part in parts), sum(part.files for part in parts), "")
        rows.append(("**together**", encoding, *_cells(whole, None), ""))
    if as_json:
        return answer_json(facts)
    _answer_table(("teacher", "encoding", "an image", "all", "files", "to send at 100 MB/s", "size is"), rows)


def _of_project(project: Project, name: str, manifest: Manifest) -> Teacher:
    """Raises MGDError for a teacher whose channels only its weights can tell, where these are missing."""
    images, params, cache = cached_images(project, name, manifest), project.params.teachers[name], None
    try:
        cache = open_cache(project.targets(name))
        channels = cache.layout.classes, cache.layout.features
    except CacheError:
        if isinstance(params, SmpTeacher):
            channels = len(manifest.classes), params.decoder_channels
        else:
            import torch

            from mgd_stages.run.loaded_head import load_any

            channels = load_any(project, name, manifest, torch.device("cpu")).channels
    height, width = (max(image.frame[axis] for image in images) for axis in (0, 1))
    return Teacher(name, len(images), *channels, (height, width), cache)


def _cells(size: Size, rows: int | None) -> tuple[str, str, str, str]:
    image = "" if rows is None else _range(size.low / rows, size.high / rows)
    return image, _range(size.low, size.high), f"{size.files:,}", _sent(size.low, size.high)


def _range(low: float, high: float) -> str:
    first, last = size_text(low), size_text(high)
    return first if first == last else f"{first} to {last}"


def _sent(low: float, high: float) -> str:
    first, last = duration(low / _SECOND), duration(high / _SECOND)
    return first if first == last else f"{first} to {last}"


def _answer_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of Markdown: it can be copied into a page."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    for line in [head, ["-" * width for width in widths], *rows]:
        answer("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
