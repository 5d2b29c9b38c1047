"""Tools for teacher caches: what is in them, whether they are whole, how they differ, and what may be removed."""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mgd_pipeline.access import is_there
from mgd_pipeline.caches.encoding import decoded
from mgd_pipeline.caches.fidelity import what_is_kept
from mgd_pipeline.caches.format import COMMIT, count_images
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.caches.remote import Place, RangesRefused, RemotePath, counter, place_of
from mgd_pipeline.caches.verify import Checked, cache_difference, sampled_rows, verify_cache
from mgd_pipeline.data.classes import compare_names
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import AccessError, CacheError, CacheIncomplete, DataError, ParamsError, shell_command
from mgd_pipeline.words import counted, listed, per_cent, size_text
from mgd_stages.run.progress import answer, answer_json, progress
from mgd_stages.run.project import Project


def parse_share(text: str) -> float:
    """'5%' -> 0.05; ParamsError for anything but a percentage above 0 and up to 100."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not text.endswith("%") or not 0 < share <= 1:
        raise ParamsError(f"--sample {text}: write a percentage of the rows, such as 5%")
    return share


def find_caches(paths: Sequence[str]) -> list[Place]:
    """The caches that are named by path or URL, and the caches directly in named folders; nothing lists what a URL holds. Raises
    CacheIncomplete for a path that is not there, and what `place_of` raises."""
    caches: list[Place] = []
    for path in map(place_of, paths):
        if isinstance(path, RemotePath):
            caches.append(path)
            continue
        if not is_there(path):
            raise CacheIncomplete(f"{path}: does not exist; name a teacher cache, or a folder of them such as data/targets")
        caches += _caches_in(path) or [path]
    return caches


def _caches_in(path: Path) -> list[Path]:
    """The caches directly in a folder; none in a cache, and none in a folder that may not be listed: opening it says so."""
    try:
        return [] if is_there(path / "zarr.json") else sorted(path / name for name in os.listdir(path) if name.endswith(".zarr"))
    except (AccessError, OSError):
        return []


def _open_named(name: str) -> TargetCache:
    """A cache that a user names and may have mistyped: `open_cache` would advise to compute it."""
    path = place_of(name)
    if isinstance(path, Path) and not is_there(path):
        raise CacheIncomplete(f"{path}: does not exist; `mgd-pipeline cache list` shows which caches there are")
    return open_cache(path)


def list_caches(paths: Sequence[str], as_json: bool) -> None:
    """One line for each cache: its identity, its size, and whether it can be read. Raises AccessError at the end for caches that
    may not be read."""
    listed: list[dict[str, Any]] = []
    for path in find_caches(paths):
        try:
            cache = open_cache(path)
        except (AccessError, CacheError) as error:
            size = None if isinstance(error, AccessError) else size_of(path)
            facts = {"bytes": size, "error": type(error).__name__, "reason": str(error)}
        else:
            facts = {"bytes": size_of(path), "fingerprint": cache.fingerprint, "images": count_images(cache.index.place)}
            facts |= {"generation": cache.generation, "teacher": teacher_text(cache)}
        listed.append({"store": str(path), **facts})
    if as_json:
        answer_json(listed)
    for facts in [] if as_json else listed:
        if "error" not in facts:
            what = f"{counted(facts['images'], 'image')}, {size_text(facts['bytes'])}, generation {facts['generation']}"
            answer(f"{facts['store']}  {facts['fingerprint'][:12]}  {what}, {facts['teacher']}")
        elif facts["bytes"] is not None:
            more = shell_command("mgd-pipeline", "cache", "verify", facts["store"])
            size = f", {size_text(facts['bytes'])}" if facts["bytes"] else ""  # of a URL only what its commit says is known
            answer(f"{facts['store']}  cannot be read: {facts['error']}{size}; `{more}` says more")
    if closed := [facts["reason"] for facts in listed if facts["bytes"] is None]:
        raise AccessError("\n".join(closed))


def show_cache(name: str, project: Project | None, as_json: bool) -> None:
    """What a cache holds and where it comes from; with the project's manifest also how good its targets are."""
    cache = _open_named(name)
    path = cache.path
    layout, provenance, shards = cache.layout, cache.provenance, cache.commit["shards"]
    gaps = {key.image_id: problem for key, problem in zip(cache.index.keys, cache.index.problems, strict=True) if problem}
    shapes = {name: f"{'x'.join(map(str, shape))} {dtype}" for name, (shape, dtype) in layout.records.items()}
    made_by = [tuple(sorted((key, str(value)) for key, value in shard["made_by"].items())) for shard in shards]
    machines = [dict(machine) for machine in dict.fromkeys(made_by)]
    teacher, preprocessing = provenance["teacher"], provenance.get("preprocessing", {})
    quality, kept = None if project is None else stored_quality(cache, project), what_is_kept(cache)
    if as_json:
        facts: dict[str, Any] = {"store": str(path), "bytes": size_of(path), "fingerprint": cache.fingerprint}
        facts |= {"generation": cache.generation, "images": count_images(cache.index.place), "shards": len(shards)}
        facts |= {"rows_per_shard": layout.rows_per_shard, "row": shapes, "provenance": provenance}
        facts |= {"encoding": None if kept is None else kept._asdict()}
        return answer_json({**facts, "skipped": gaps, "made_by": machines, "on_labelled": quality})
    lines = {
        "cache": f"{path}, {size_text(size_of(path))}",
        "fingerprint": f"{cache.fingerprint}, generation {cache.generation}",
        "teacher": f"{teacher_text(cache)}, weights {str(teacher.get('weights_sha256'))[:12]}",
        "trained on": f"labels of partition {str(teacher['trained_on'])[:12]}" if teacher.get("trained_on") else "not recorded",
        "classes": ", ".join(provenance.get("classes", [])),
        "images": f"{count_images(cache.index.place)}{' and their mirror images' if preprocessing.get('mirrored') else ''} in "
        f"{counted(len(cache.commit['shards']), 'shard')} of up to {counted(layout.rows_per_shard, 'row')}",
        "skipped": "; ".join(f"{image_id}: {problem}" for image_id, problem in list(gaps.items())[:5]) or "none",
        "each row": ", ".join(f"{name} {shape}" for name, shape in shapes.items()),
        "preprocessing": ", ".join(f"{key} {value}" for key, value in preprocessing.items()),
        "made by": "; ".join(", ".join(f"{key} {value}" for key, value in machine.items()) for machine in machines),
    }
    if kept is not None:
        lines["encoding"] = str(kept)
    if quality is not None:
        lines["on labelled images"] = _quality_text(quality)
    for key, value in lines.items():
        answer(f"{key + ':':20}{value}")


def stored_quality(cache: TargetCache, project: Project) -> dict[str, Any]:
    """The stored targets against the masks of labelled images: miou, rare_miou, class_iou and images; or `unknown`, the reason."""
    try:
        manifest = read_manifest(project.manifest, project.base)
    except DataError as error:
        return {"unknown": str(error)}
    if not cache.layout.classes:
        return {"unknown": "this teacher names no classes"}
    if fault := compare_names("the cache", cache.provenance.get("classes", ()), manifest.classes).fault:
        return {"unknown": fault}
    rows = [row for row in manifest.labelled if manifest.key(row) in cache.index.place]
    if not rows:
        return {"unknown": "the cache has none of this manifest's labelled images"}
    from mgd_pipeline.caches.decoding import stored_prediction
    from mgd_pipeline.metrics import confusion_matrix, iou_by_class, mean_iou, rare_numbers

    classes = len(manifest.classes)
    total = np.zeros((classes, classes), np.int64)
    with progress("cache info: labelled images", len(rows), "image") as advance:
        for done, row in enumerate(rows, 1):
            try:
                prediction = stored_prediction(cache, row.image_id)
            except RangesRefused as error:
                return {"unknown": str(error)}
            total += confusion_matrix(manifest.mask(row, manifest.size(row)), prediction, classes)
            advance(done, "")
    miou = mean_iou(total) if total.sum() else None
    rare = rare_numbers(total, total.sum(1), manifest.classes)
    return {"miou": miou, **rare, "class_iou": iou_by_class(total, manifest.classes), "images": len(rows)}


def _quality_text(quality: dict[str, Any]) -> str:
    if "unknown" in quality:
        return f"not known: {quality['unknown']}"
    if quality["miou"] is None:
        return f"not known: no pixel of {counted(quality['images'], 'labelled image')} has a class"
    per_class = ", ".join(f"{name} {per_cent(value)}" for name, value in quality["class_iou"].items())
    rare = f"rare third {per_cent(quality['rare_miou'])}: {listed(quality['rare_classes'])}"
    return f"{per_cent(quality['miou'])} mIoU ({counted(quality['images'], 'image')}; {rare}; {per_class})"


def verify(paths: Sequence[str], share: float, as_json: bool) -> None:
    """Checks caches and names every damaged file and record.

    Raises CacheError (exit code 3) if there is any damage, else AccessError (7) if something could not be read.
    """
    results: list[dict[str, Any]] = []
    for path in find_caches(paths):
        damages: list[str] = []
        counter.take()
        with progress(f"cache verify {str(path).rpartition('/')[2]}", 100, "part") as advance:
            try:
                checked = verify_cache(path, share, damages.append, lambda done, total: advance(done * 100 // total, ""))
            except AccessError as error:
                checked = Checked(0, 0, 0, (str(error),))
        counts = {"files": checked.files, "hashes": checked.hashed, "records": checked.records}
        read = counter.take()
        if isinstance(path, RemotePath):
            counts |= {"requests": read.requests, "bytes_read": read.bytes}
        results.append({"store": str(path), **counts, "damages": damages, "unread": list(checked.unread)})
        if not as_json and (checked.records or not checked.unread):
            answer(
                f"{path}: {'only a part of it can be read; ' if checked.unread else ''}"
                f"{len(damages) or 'no'} damage{'s' if len(damages) > 1 else ''} found; sizes of "
                f"{counted(checked.files, 'file')}, hashes of {checked.hashed}, "
                f"checksums of {counted(checked.records, 'record')} compared"
                + (f"; {counted(read.requests, 'request')}, {size_text(read.bytes)} read" if isinstance(path, RemotePath) else "")
                + ("" if share >= 1 else "; --full compares all of them")
            )
    if as_json:
        answer_json(results)
    damaged, unread = ([line for facts in results for line in facts[kind]] for kind in ("damages", "unread"))
    if len(unread) > 10:  # one closed folder may hold ten thousand shards
        unread = [*unread[:10], f"... and {len(unread) - 10} more files that cannot be read"]
    if damaged or unread:
        raise (CacheError if damaged else AccessError)("\n".join([*damaged, *unread]))


def diff(a: str, b: str, as_json: bool) -> bool:
    """Prints in what two caches differ, field by field; returns whether they do."""
    lines = cache_difference(_open_named(a), _open_named(b))
    if as_json:
        answer_json(lines)
        return bool(lines)
    for line in lines:
        answer(line)
    answer(counted(len(lines), "difference") if lines else "the same teacher, the same images, the same targets")
    return bool(lines)


def recheck(project: Project, name: str, share: float, device_name: str, as_json: bool) -> None:
    """Runs a teacher again over a share of its images, and reports how far the stored targets are from its present outputs."""
    from mgd_pipeline.caches.decoding import stored_logits
    from mgd_pipeline.teachers.looks import dense_targets
    from mgd_stages.run.loaded_head import LoadedHead, load_any
    from mgd_stages.run.project import choose_device
    from mgd_stages.run.teacher_cache import shown_images

    manifest = read_manifest(project.manifest, project.base)
    loaded = load_any(project, name, manifest, choose_device(device_name))
    cache = open_cache(project.targets(name), loaded.provenance)
    images_of = dict(zip(cache.index.rows, cache.index.keys, strict=True))
    shown = shown_images(project, name, manifest)
    current = {key.image_id: key for key in shown}
    rows = [row for row in sampled_rows(cache, share) if images_of[row].image_id in current]
    errors: dict[str, list[tuple[float, float]]] = defaultdict(list)
    step, agree, cells = 0.0, 0, 0
    with progress(f"cache recheck {name}", len(rows), "image") as advance:
        for done, row in enumerate(rows, 1):
            key = current[images_of[row].image_id]
            cache.row(key)  # raises StaleTarget if the image has changed
            if isinstance(loaded, LoadedHead):
                now = loaded.targets(shown[key].row, mirrored=shown[key].mirrored)
            else:
                pixels = shown[key].pixels(loaded)
                now = dense_targets(loaded.teacher, [pixels], project.params.targets, manifest.long_side)[0]
            differences = {}
            if cache.layout.classes:
                logits, _ = stored_logits(cache, row)
                differences["logits"] = logits - decoded(now.logits, now.logits_affine)
                differences["global descriptors"] = cache.record("global_descriptors", row) - now.global_descriptor
                step = max(step, float(cache.record("logits_affine", row)[1]) if cache.layout.encoding == "uint8" else 0.0)
                agree += int((logits.argmax(0) == now.logits.argmax(0)).sum())
                cells += now.logits[0].size
            if cache.layout.features:
                _, r, c = now.region_embeddings.shape
                stored = cache.embeddings(row)[:, :r, :c].astype(np.float32)
                differences["region embeddings"] = stored - decoded(now.region_embeddings, now.region_affine)
            for what, difference in differences.items():
                errors[what].append((float(np.abs(difference).max()), float(np.abs(difference).mean())))
            advance(done, "")
    summary = {}
    for what, pairs in errors.items():
        largest, means = zip(*pairs, strict=True)
        summary[what] = {"largest": max(largest), "mean": sum(means) / len(rows)}
    same = agree / cells if cells else None
    if as_json:
        facts = {"images": len(rows), "errors": summary, "same_class": same, "largest_uint8_step": step}
        return answer_json({"store": str(cache.path), **facts})
    answer(f"{cache.path}: {len(rows)} of {counted(len(cache.index.place), 'image')} seen again by {teacher_text(cache)}")
    for what, error in summary.items():
        answer(f"{what + ':':20}largest error {error['largest']:.3g}, mean {error['mean']:.3g}")
    if same is not None:
        answer(f"{'same class:':20}{same * 100:.3f} % of the stored cells; largest uint8 step {step:.3g}")


def collect_garbage(project: Project, days: float, delete: bool) -> None:
    """Lists or deletes what builders of caches left in .mgd/work and nobody needs.

    Everything there is older than `days`, and is not a kept shard of a cache that is there.
    """
    folder = project.base / "data/targets"
    caches = [folder / name for name in (os.listdir(folder) if is_there(folder) else ()) if name.endswith(".zarr")]
    kept = {open_cache(path).fingerprint[:16] for path in caches if is_there(path / COMMIT)}
    oldest = time.time() - days * 86400
    unused = [
        path
        for family in sorted((project.base / ".mgd/work").glob("targets-*"))
        for path in ([family] if family.name.removeprefix("targets-") not in kept else sorted(family.glob("*/stage-*")))
        if max(entry.lstat().st_mtime for entry in [path, *path.rglob("*")]) < oldest
    ]
    for path in unused:
        answer(f"{'deleted' if delete else 'would delete'}: {path} ({size_text(size_of(path))})")
        if delete:
            shutil.rmtree(path)
    if not unused:
        answer(f"nothing of targets in {project.base / '.mgd/work'} is unused and older than {days:g} days")
    elif not delete:
        answer("nothing was deleted; --delete does it")


def teacher_text(cache: TargetCache) -> str:
    """The teacher's network as the cache names it, without its weights."""
    known = ("head", "decoder", "encoder", "torchvision", "transformers", "timm", "import")
    return " ".join(str(cache.provenance["teacher"][key]) for key in known if key in cache.provenance["teacher"])


def size_of(path: Place) -> int:
    """Bytes of all files below a folder, or of the files that the commit of a cache at a URL names."""
    if isinstance(path, RemotePath):
        return path.bytes_known
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
