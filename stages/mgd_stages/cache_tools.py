"""Tools for target caches: what is in them, whether they are whole, how they differ, and what may be removed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mgd_pipeline.cache import TargetCache, open_cache
from mgd_pipeline.cache_format import COMMIT, ImageKey
from mgd_pipeline.cache_verify import sampled_rows, store_difference, verify_store
from mgd_pipeline.errors import CacheError, CacheIncomplete, DataError, ParamsError
from mgd_pipeline.manifest import Manifest, read_manifest
from mgd_stages.progress import console, progress
from mgd_stages.project import Project


def parse_share(text: str) -> float:
    """'5%' -> 0.05; ParamsError for anything but a percentage above 0 and up to 100."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not text.endswith("%") or not 0 < share <= 1:
        raise ParamsError(f"--sample {text}: write a percentage of the rows, such as 5%")
    return share


def find_stores(paths: Sequence[Path]) -> list[Path]:
    """The stores that are named, and those directly below named folders. Raises CacheIncomplete where there is none."""
    found = []
    for path in paths:
        inside = [] if (path / "zarr.json").exists() else sorted(path.glob("*.zarr"))
        found += inside or [path]
    missing = [path for path in found if not path.exists()]
    if missing:
        raise CacheIncomplete(f"{missing[0]}: does not exist; name a store, or a folder of stores such as data/targets")
    return found


def list_stores(paths: Sequence[Path]) -> None:
    """One line for each store: its identity, its size, and whether it can be read."""
    for path in find_stores(paths):
        try:
            cache = open_cache(path)
        except CacheError as error:
            console.print(f"{path}  cannot be read: {type(error).__name__}, {size_text(path)}; `cache verify` says more")
            continue
        images, generation = len(cache.index.place), cache.generation
        console.print(
            f"{path}  {cache.fingerprint[:12]}  {images} images, {size_text(path)}, generation {generation}, {teacher_text(cache)}"
        )


def show_store(path: Path, project: Project | None) -> None:
    """What a store holds and where it comes from; with the project's manifest also how good its targets are."""
    cache = open_cache(path)
    layout, provenance = cache.layout, cache.provenance
    gaps = [(key.image_id, problem) for key, problem in zip(cache.index.keys, cache.index.problems, strict=True) if problem]
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))} {dtype}" for name, (shape, dtype) in layout.records.items())
    machines = {
        ", ".join(f"{key} {value}" for key, value in sorted(shard["made_by"].items())): None for shard in cache.commit["shards"]
    }
    teacher = provenance["teacher"]
    lines = {
        "store": f"{path}, {size_text(path)}",
        "fingerprint": f"{cache.fingerprint}, generation {cache.generation}",
        "teacher": f"{teacher_text(cache)}, weights {str(teacher.get('weights_sha256'))[:12]}",
        "trained on": f"labels of partition {str(teacher['trained_on'])[:12]}" if teacher.get("trained_on") else "not recorded",
        "classes": ", ".join(provenance.get("classes", [])),
        "images": f"{len(cache.index.place)} in {len(cache.commit['shards'])} shards of up to {layout.rows_per_shard}",
        "skipped": "; ".join(f"{image_id}: {problem}" for image_id, problem in gaps[:5]) or "none",
        "each row": shapes,
        "preprocessing": ", ".join(f"{key} {value}" for key, value in provenance.get("preprocessing", {}).items()),
        "made by": "; ".join(machines),
    }
    if project is not None:
        lines["on labelled images"] = quality_text(cache, project)
    for key, value in lines.items():
        console.print(f"{key + ':':20}{value}")


def quality_text(cache: TargetCache, project: Project) -> str:
    """mIoU of the stored targets against the masks of the labelled images that the store has."""
    try:
        manifest = read_manifest(project.manifest, project.base)
    except DataError as error:
        return f"not known: {error}"
    if not cache.layout.classes:
        return "not known: this teacher names no classes"
    rows = [row for row in manifest.labelled if ImageKey(row.image_id, row.image_sha256) in cache.index.place]
    if not rows:
        return "not known: the store has none of this manifest's labelled images"
    from mgd_pipeline.metrics import class_iou, confusion_matrix, mean_iou
    from mgd_pipeline.stored import stored_prediction

    classes = len(manifest.classes)
    total = np.zeros((classes, classes), np.int64)
    with progress("cache info: labelled images", len(rows), "images") as advance:
        for done, row in enumerate(rows, 1):
            total += confusion_matrix(_mask(manifest, project, row.image_id), stored_prediction(cache, row.image_id), classes)
            advance(done, "")
    iou = class_iou(total)
    per_class = ", ".join(
        f"{name} {value * 100:.1f}" for name, value in zip(manifest.classes, iou, strict=True) if not np.isnan(value)
    )
    return f"{mean_iou(total) * 100:.1f} mIoU ({len(rows)} images; {per_class})"


def _mask(manifest: Manifest, project: Project, image_id: str) -> np.ndarray:
    from mgd_pipeline.images import read_mask

    row = manifest.rows[image_id]
    assert row.mask_path is not None, "labelled images have masks"
    path = project.base / manifest.root / row.mask_path
    return read_mask(path, np.asarray(manifest.lookup), manifest.size(row))


def verify(paths: Sequence[Path], share: float) -> None:
    """Checks stores and names every damaged file and record; raises CacheError (exit code 3) if there is any."""
    damaged = []
    for path in find_stores(paths):
        found: list[str] = []
        with progress(f"cache verify {path.name}", 100, "% of the rows") as advance:
            checked = verify_store(path, share, found.append, lambda done, total: advance(done * 100 // total, ""))
        damaged += found
        console.print(
            f"{path}: {len(found) or 'no'} damage{'s' if len(found) > 1 else ''} found; sizes of {checked.files} files, hashes of "
            f"{checked.hashed}, checksums of {checked.records} records compared"
            + ("" if share >= 1 else "; --full compares all of them")
        )
    if damaged:
        raise CacheError("\n".join(damaged))


def diff(a: Path, b: Path) -> bool:
    """Prints in what two stores differ, field by field; False where they hold the same targets of the same images."""
    lines = store_difference(open_cache(a), open_cache(b))
    for line in lines:
        console.print(line)
    console.print(f"{len(lines)} differences" if lines else "the same teacher, the same images, the same targets")
    return bool(lines)


def recheck(project: Project, name: str, share: float, device_name: str) -> None:
    """Runs a teacher again over a share of its images, and reports how far the stored targets are from what it says now."""
    from mgd_pipeline.stored import stored_logits
    from mgd_pipeline.teachers import dense_targets
    from mgd_stages.precompute_teachers import load_teacher, shown_images
    from mgd_stages.project import choose_device

    manifest = read_manifest(project.manifest, project.base)
    teacher, provenance = load_teacher(project, name, manifest, choose_device(device_name))
    cache = open_cache(project.targets(name), provenance)
    position = {row: i for i, row in enumerate(cache.index.rows)}
    shown = shown_images(manifest, project.params.targets)
    current = {key.image_id: key for key in shown}
    rows = [row for row in sampled_rows(cache, share) if cache.index.keys[position[row]].image_id in current]
    errors: dict[str, list[float]] = {}
    sums: dict[str, float] = {}
    step, agree, cells = 0.0, 0, 0
    with progress(f"cache recheck {name}", len(rows), "images") as advance:
        for done, row in enumerate(rows, 1):
            key = current[cache.index.keys[position[row]].image_id]
            cache.row(key)  # raises StaleTarget where the image is another one by now
            now = dense_targets(teacher, [shown[key].pixels(project, manifest)], project.params.targets)[0]
            differences = {}
            if cache.layout.classes:
                logits, _ = stored_logits(cache, row)
                differences["logits"] = logits - now.logits
                differences["global descriptors"] = cache.record("global_descriptors", row) - now.global_descriptor
                step = max(step, float(cache.record("logits_affine", row)[1]) if cache.layout.encoding == "uint8" else 0.0)
                agree += int((logits.argmax(0) == now.logits.argmax(0)).sum())
                cells += now.logits[0].size
            if cache.layout.features:
                _, r, c = now.region_embeddings.shape
                stored = cache.record("region_embeddings", row)[:, :r, :c].astype(np.float32)
                differences["region embeddings"] = stored - now.region_embeddings
            for what, difference in differences.items():
                errors.setdefault(what, []).append(float(np.abs(difference).max()))
                sums[what] = sums.get(what, 0.0) + float(np.abs(difference).mean())
            advance(done, "")
    console.print(f"{cache.path}: {len(rows)} of {len(cache.index.place)} images seen again by {teacher_text(cache)}")
    for what, largest in errors.items():
        console.print(f"{what + ':':20}largest error {max(largest):.3g}, mean {sums[what] / len(rows):.3g}")
    if cells:
        console.print(f"{'same class:':20}{agree / cells * 100:.3f} % of the stored cells; largest uint8 step {step:.3g}")


def collect_garbage(project: Project, days: float, delete: bool) -> None:
    """Lists, or deletes, what builders of stores left in .mgd/work and nobody needs: older than `days`, and not the kept shards
    of a store that is there."""
    kept = {cache.fingerprint[:16] for cache in _readable(project.base / "data/targets")}
    oldest = time.time() - days * 86400
    found = [
        path
        for family in sorted((project.base / ".mgd/work").glob("targets-*"))
        for path in ([family] if family.name.removeprefix("targets-") not in kept else sorted(family.glob("*/stage-*")))
        if newest(path) < oldest
    ]
    for path in found:
        console.print(f"{'deleted' if delete else 'would delete'}: {path} ({size_text(path)})")
        if delete:
            shutil.rmtree(path)
    if not found:
        console.print(f"nothing of targets in {project.base / '.mgd/work'} is unused and older than {days:g} days")
    elif not delete:
        console.print("nothing was deleted; --delete does it")


def _readable(folder: Path) -> Iterator[TargetCache]:
    for path in sorted(folder.glob("*.zarr")):
        if (path / COMMIT).exists():
            yield open_cache(path)


def newest(path: Path) -> float:
    """Time of the latest change below a folder."""
    return max(entry.lstat().st_mtime for entry in [path, *path.rglob("*")])


def teacher_text(cache: TargetCache) -> str:
    """What a store says of its teacher's network, without its weights."""
    known = ("decoder", "encoder", "torchvision", "transformers", "timm", "import")
    return " ".join(str(cache.provenance["teacher"][key]) for key in known if key in cache.provenance["teacher"])


def size_text(path: Path) -> str:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
