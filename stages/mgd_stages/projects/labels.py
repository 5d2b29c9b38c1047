"""What `init` finds in a folder: labels of which kind, where, and of which classes."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.folders import split_lists
from mgd_pipeline.data.images import IGNORE, SUFFIXES, open_image, read_raw_mask
from mgd_pipeline.data.index import Colour
from mgd_pipeline.data.labels.colours import colours_in, read_labelmap
from mgd_pipeline.data.labels.files import ImageFiles, split_of
from mgd_pipeline.data.labels.label_studio import PNG_EXPORT
from mgd_pipeline.data.labels.read import TOOLS, Tool, read_labels, tools_of
from mgd_pipeline.data.labels.yolo import names_file
from mgd_pipeline.data.labels.yolo import read_names as names_of
from mgd_pipeline.data.layouts import Pairing, compared_on, pairing_of
from mgd_pipeline.data.listing import read_text
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.params import FolderData
from mgd_pipeline.words import counted, first_of, listed, ranges, verb
from mgd_stages.run.data_notes import are_grey_levels, missing_values

_READ = 200
"""Masks that are read, at most, spread evenly over all of them."""
_MOST_COLOURS, _MOST_CLASSES = 64, 254
_VOID_COLOUR = (224, 224, 192)
"""Of PASCAL VOC's borders."""
BACKGROUND = ("background", "_background_", "bg", "unlabeled", "unlabelled")
_IGNORED = ("ignore", "ignored", "void")
"""Names of no class, without the underscores of LabelMe's __ignore__."""
_NAMES = ("classes.txt", "class_names.txt", "labels.txt", "names.txt", "obj.names")
_FOLDERS = "splits are read from the names of folders and files (data.splits)"
_DRAWN = "a tenth each of the labelled images, at least five of twenty, is drawn for validation and test (data.val_fraction)"


@dataclass
class Seen:
    """Labels that lie in a folder."""

    data: dict[str, Any]
    """The section data of params.yaml, but for root and partition."""
    split: str | None = None
    """The split to compare networks on, if folders name splits."""
    said: list[str] = field(default_factory=list)
    """What init prints."""
    labelled: bool = True
    """Whether there is any label; without one, a text-prompted teacher draws the first masks."""


def look_at_labels(root: Path, names: Sequence[str] | None = None) -> Seen:
    """The labels below a folder, of the first kind that there is: masks in images/ and masks/, files of an annotation tool, masks
    of colours with a labelmap, masks in other folders.

    `names`: the classes in the order of their ids, if the user gives them. Photos in images/ alone are a data set without labels if
    the user names its classes. Raises ParamsError where nothing can be read as labels.
    """
    files = ImageFiles(root)
    standard = all(any(path.parts[0] == folder for path in files.images) for folder in ("images", "masks"))
    tools = {} if standard else tools_of(files)
    if not files.images:
        labels = f" beside its {listed([TOOLS[tool] for tool in tools])}; put the photos into {root}, too" if tools else ""
        raise ParamsError(f"--root {root}: holds no photo{labels}; readable suffixes are {', '.join(SUFFIXES)}")
    if tools:
        seen = _of_tool(files, next(iter(tools)), names)
        if others := [f"{TOOLS[tool]} ({counted(count, 'file')})" for tool, count in list(tools.items())[1:]]:
            seen.said.append(f"there is {listed(others)} too, which is not read; set data.labels in params.yaml to read it")
        return seen
    return _of_masks(files, names, standard)


def read_names(text: str) -> list[str]:
    """The classes of `init --classes`: names between commas, or a file as `yolo.read_names` reads it. Raises ParamsError for an
    empty name, and for two classes of one name.
    """
    path = Path(text)
    if path.suffix in (".txt", ".names", ".yaml", ".yml") or path.is_file():
        return _names_of_file(path)
    names = [name.strip() for name in text.split(",")]
    if wrong := next((name for name in names if not name or names.count(name) > 1), None):
        raise ParamsError(f"--classes {text}: {wrong!r} stands twice; give each class a name of its own")
    if not all(names):
        raise ParamsError(f"--classes {text}: a name is empty; name all classes, such as background,road")
    return names


def _names_of_file(path: Path) -> list[str]:
    try:
        names = names_of(path)
    except DataError as error:
        raise ParamsError(f"{error}, or name the classes, such as --classes background,road") from None
    if list(names) != list(range(len(names))):
        raise ParamsError(f"{path}: names the classes {listed(list(map(str, names)))}, not 0, 1 and so on; add what is missing")
    return list(names.values())


# --- annotation tools -------------------------------------------------------------------------------------------------


def _of_tool(files: ImageFiles, tool: Tool, names: Sequence[str] | None) -> Seen:
    labels = read_labels(files, tool)
    drawings = [drawing for drawing in labels.drawings if drawing.regions]
    if not drawings:
        if not labels.drawings and labels.notes:
            missing, photo = labels.notes[0], files.images[0]
            raise ParamsError(f"--root {files.root}: {missing.text}; {missing.remedy}; the photos here are called {photo}")
        notes = "".join(f"; {note.text}" for note in labels.notes)
        raise ParamsError(f"--root {files.root}: {TOOLS[tool]} without a region of any photo{notes}; draw some and export again")
    regions = Counter(region.name for drawing in drawings for region in drawing.regions)
    own = [name for name in labels.names if name.lower() in BACKGROUND]
    background = own[0] if own else "background"
    void = [] if names else [name for name in labels.names if name.lower().strip("_") in _IGNORED]
    classes = [background, *(name for name in labels.names if name not in (background, *void))]
    data: dict[str, Any] = {"labels": tool, "classes": classes, "uncovered": background}
    if names is None and len(classes) > _MOST_CLASSES:
        raise ParamsError(
            f"--root {files.root}: {TOOLS[tool]} of {len(classes)} classes, {len(regions)} of them with a region; a data set has "
            f"at most {_MOST_CLASSES}: name the classes that you need with --classes, or join some in the annotation tool"
        )
    if void:
        data["names"] = dict.fromkeys(void)
    if names is not None:
        if missing := [name for name in regions if name not in names]:
            raise ParamsError(f"--classes: lacks {listed([repr(name) for name in missing])}, which the annotations have; add it")
        data |= {"classes": list(names), "uncovered": names[0] if names[0] not in regions or names[0] in own else None}
    if labels.colours:
        data["colours"] = _distinct([labels.colours.get(name, (0, 0, 0)) for name in data["classes"]])
    sources = {split_of(drawing.source) for drawing in drawings}
    folders = compared_on(drawing.image for drawing in drawings)
    split = "val" if "val" in sources else folders or ("test" if "test" in sources else None)
    if split is not None:
        data["splits"] = "folders"
    said = [
        f"{TOOLS[tool]}: {counted(sum(regions.values()), 'region')} on {len(drawings)} of {counted(len(files.images), 'image')}",
        f"classes: {first_of([f'{name} ({regions[name]})' for name in labels.names])}",
    ]
    if void:
        said.append(f"{listed(void)}: no class, because of the name (data.names)")
    outside = "have no class" if data["uncovered"] is None else f"become the class {data['uncovered']}"
    said.append(f"pixels outside of all regions {outside} (data.uncovered)")
    said.append(_FOLDERS if "splits" in data else _DRAWN)
    return Seen(data, split, said)


def _distinct(colours: Sequence[Colour]) -> list[list[int]] | None:
    """Colours for the parameters; None where two are equal, because pictures could not tell their classes apart."""
    return [list(colour) for colour in colours] if len(set(colours)) == len(colours) else None


# --- masks ------------------------------------------------------------------------------------------------------------


def _of_masks(files: ImageFiles, names: Sequence[str] | None, standard: bool) -> Seen:
    root = files.root
    if any(PNG_EXPORT.fullmatch(path.name) for path in files.images):
        raise ParamsError(
            f"--root {root}: the masks of Label Studio's PNG export do not name their photos; in Label Studio choose Export, JSON, "
            "and put that file here, beside the photos"
        )
    if not standard and (root / "images").is_dir() and (root / "masks").is_dir():
        raise DataError(f"{root / 'masks'}: no mask found; expected masks/<split>/<id>.png")
    labelmap = next((path for path in files.with_suffix(".txt") if path.name == "labelmap.txt"), None)
    data, split, lists = dict[str, Any](), None, split_lists(root, files.files)
    if not (standard and (root / "masks/val").is_dir()):
        pairing = _pairing(files, standard)
        if pairing is None and names is not None and labelmap is None and _photos_in_images(files):
            data = {"images": "images/**/*", "masks": "masks/**/*", "classes": list(names)}
            said = f"{counted(len(files.images), 'photo')} without labels: the teacher words draws the first masks, from phrases"
            return Seen(data, None, [said], labelled=False)
        if pairing is None:
            raise ParamsError(f"--root {root}: {_no_labels(files, labelmap)}")
        data = {"images": pairing.images, "masks": pairing.masks}
        if len(set(lists.values())) > 1:
            data["splits"], split = "lists", "val" if "val" in lists.values() else "test"
        elif (split := compared_on(path for path in files.images if pairing.image_id(path) is not None)) is not None:
            data["splits"] = "folders"
    data_set = {"dataset": "folder", "root": str(root), "partition": "1/1", "classes": ["not", "known"], **data}
    params = FolderData.model_validate({**data_set, "val_fraction": 0, "test_fraction": 0})  # to draw splits, masks would be read
    index = index_dataset(params, Path())  # what prepare-data would refuse is said here already
    masks = sorted(root / sample.mask for sample in index.samples if sample.mask)
    if not masks:
        raise DataError(f"{root / 'masks'}: no mask found; expected masks/<split>/<id>.png")
    places = np.unique(np.linspace(0, len(masks) - 1, _READ).astype(int))
    chosen = [masks[place] for place in places]
    given = _Names(names, "--classes") if names is not None else _names_in(files)
    palette = _palette_of(chosen)
    if labelmap is not None or palette is None:
        kind, said = _colours(chosen, read_labelmap(root / labelmap) if labelmap else {}, given)
    else:
        occurs = np.zeros(256, bool)
        for path in chosen:
            occurs[read_raw_mask(path)] = True
        kind, said = _values(root, np.flatnonzero(occurs).tolist(), given)
        colours = [palette.get(value) for value in kind.get("values", range(len(kind["classes"])))]
        if None not in colours and len(set(colours)) == len(colours):
            kind["colours"] = [list(colour) for colour in colours if colour]
    where = "" if standard else f" ({data['images']} and {data['masks']})"
    counts = f"{counted(len(masks), 'mask')} of {counted(len(index.samples), 'image')}{where}"
    if data:
        of_lists = f"splits are read from {listed(list(map(str, lists)))} (data.splits)"
        said.append({"folders": _FOLDERS, "lists": of_lists}.get(data.get("splits", ""), _DRAWN))
        if len(set(lists.values())) == 1:
            said.append(f"{listed(list(map(str, lists)))}: not used, because there is no list of another split (data.splits)")
    return Seen({**data, **kind}, split, [counts, *said])


@dataclass(frozen=True)
class _Names:
    """Names that a user or a file gives to the values of masks."""

    names: Sequence[str]
    source: str

    def require(self, count: int, what: str) -> list[str]:
        """The names. Raises ParamsError unless there is one for each of `count` values or colours."""
        if len(self.names) != count:
            raise ParamsError(f"{self.source}: {counted(len(self.names), 'name')}, but {what}; name each of them once")
        return list(self.names)


def _pairing(files: ImageFiles, standard: bool) -> Pairing | None:
    pairing = Pairing("images/**/*", "masks/**/*")
    if standard:
        ids = ({of(path) for path in files.images} - {None} for of in (pairing.image_id, pairing.mask_id))
        if set.intersection(*ids):
            return pairing
    return pairing_of(files.images) or (pairing if standard else None)


def _photos_in_images(files: ImageFiles) -> bool:
    """Whether masks can be drawn beside the photos, in masks/, and no file may be a damaged label."""
    return all(path.parts[0] == "images" for path in files.images) and all(files.kinds_of_json({}).values())


def _no_labels(files: ImageFiles, labelmap: Path | None) -> str:
    """Why a folder has no masks, and what to do."""
    photos = counted(len(files.images), "image")
    if labelmap is not None:
        return f"has {labelmap} and masks, but not their photos; export with 'Save images', or put the photos into JPEGImages/"
    if damaged := [path for path, kind in files.kinds_of_json({}).items() if not kind]:
        return f"has {photos} and no labels, but {damaged[0]} is damaged, it is not JSON; export it again"
    return (
        f"has {photos} and no labels; put the export of your annotation tool here ({', '.join(TOOLS.values())}), or masks called "
        "like their images in masks/ beside images/; or let a text-prompted teacher draw the first masks: put the photos into "
        f"{files.root / 'images'} and name the classes, such as --classes background,road"
    )


def _palette_of(masks: Sequence[Path]) -> dict[int, Colour] | None:
    """The colours of the indices that masks hold, none for grey masks. None where colours say the class: in masks without a
    palette, and where one index has two colours in two masks, as programs write it that number the colours of each picture anew.
    """
    seen: dict[int, Colour] = {}
    for path in masks:
        with open_image(path) as image:
            if image.mode in ("RGB", "RGBA"):
                return None
            palette = (image.getpalette() if image.mode == "P" else None) or []
            for index in np.unique(np.asarray(image)).tolist() if palette else ():
                red, green, blue = palette[3 * index : 3 * index + 3]
                if seen.setdefault(index, (red, green, blue)) != (red, green, blue):
                    return None
    return seen


def _colours(masks: Sequence[Path], labelmap: dict[str, Colour], given: _Names | None) -> tuple[dict[str, Any], list[str]]:
    pixels: Counter[Colour] = Counter()
    for path in masks:
        pixels.update(colours_in(path))
        if len(pixels) > _MOST_COLOURS + len(labelmap):
            raise ParamsError(
                f"{path}: the masks have more than {_MOST_COLOURS} colours; export them as PNG without smooth edges, or export "
                "the annotations themselves"
            )
    if not labelmap and all(len(set(colour)) == 1 for colour in pixels):
        data, said = _values(masks[0].parent, sorted(colour[0] for colour in pixels), given)
        levels = data.pop("values", range(len(data["classes"])))
        white = [] if IGNORE in levels else [[IGNORE] * 3]
        return {**data, "labels": "colours", "colours": [[level] * 3 for level in levels], "ignore_colours": white}, said
    void = [_VOID_COLOUR] if _VOID_COLOUR in pixels and _VOID_COLOUR not in labelmap.values() else []
    colours = sorted(colour for colour in pixels if colour not in void)
    if len(colours) < 2 and not labelmap:
        raise ParamsError(f"{masks[0].parent}: the masks have the colour {list(colours[0])} alone; each class needs its own")
    if labelmap:
        known = dict(labelmap)
        if foreign := [colour for colour in colours if colour not in known.values()]:
            count = counted(sum(pixels[colour] for colour in foreign), "pixel")
            raise ParamsError(
                f"{masks[0].parent}: {counted(len(foreign), 'colour')} of {count}, such as {list(foreign[0])}, "
                f"{verb(len(foreign), 'is', 'are')} not in labelmap.txt; add a line for each class, or export the masks without "
                "smooth edges"
            )
        if given is not None and given.source == "--classes":
            if missing := [name for name, colour in known.items() if name not in given.names and colour in pixels]:
                raise ParamsError(f"--classes: lacks {listed([repr(name) for name in missing])}, which the masks hold; add it")
            if strange := [name for name in given.names if name not in known]:
                raise ParamsError(
                    f"--classes: {strange[0]!r} has no colour in labelmap.txt; correct the name, or add a line for it"
                )
            known = {name: known[name] for name in given.names}
    else:
        names = [f"colour_{'_'.join(map(str, colour))}" for colour in colours]
        if given is not None:
            names = given.require(len(colours), f"the masks have {len(colours)} colours: {[list(colour) for colour in colours]}")
        known = dict(zip(names, colours, strict=True))
    data: dict[str, Any] = {"labels": "colours", "classes": list(known), "colours": [list(colour) for colour in known.values()]}
    if void:
        data["ignore_colours"] = [list(colour) for colour in void]
    what = "labelmap.txt" if labelmap else given.source if given else "give the classes their names in params.yaml, data.classes"
    shares = first_of([f"{name} {list(colour)}" for name, colour in known.items()])
    said = [f"masks of {len(known)} colours, {what}: {shares}"]
    if not labelmap and len(blended := _blended(pixels)) > 2:
        count = sum(pixels[colour] for colour in blended)
        said.append(
            f"warning: {len(blended)} of the colours, with {counted(count, 'pixel')}, lie between two other colours, such as "
            f"{list(blended[0])}: smooth edges make such colours; export the masks without smooth edges, or move these colours "
            "from data.colours and data.classes to data.ignore_colours"
        )
    return data, said


def _blended(pixels: Counter[Colour]) -> list[Colour]:
    """Colours that are a mixture of two colours with ten times as many pixels, as smooth edges have them."""
    blended = []
    for colour in sorted(pixels):
        often = np.array([other for other, count in pixels.items() if count >= 10 * pixels[colour]], np.float64).reshape(-1, 3)
        first, way = often[:, None], often[None] - often[:, None]
        share = ((colour - first) * way).sum(-1) / np.maximum((way**2).sum(-1), 1)
        distance = np.abs(colour - first - share[..., None] * way).max(-1)
        if ((share > 0) & (share < 1) & (distance <= 2)).any():
            blended.append(colour)
    return blended


def _values(root: Path, values: list[int], given: _Names | None) -> tuple[dict[str, Any], list[str]]:
    """`values`: the stored values of masks, sorted."""
    said = f"the masks hold the values {ranges(values)}"
    ids = [value for value in values if value != IGNORE]
    named = f"{given.source}, {first_of(given.names)}" if given else "give the classes their names in params.yaml, data.classes"
    if len(values) < 2 or not ids:
        raise ParamsError(f"--root {root}: {said} alone; a class needs a value of its own, such as 0 for background and 1 for road")
    gaps = np.diff(values)
    if values[0] == 0 and values[-1] == IGNORE and gaps.max() - gaps.min() <= 1:  # 0 and 255, or 0, 128 and 255: white is a class
        ids = values
    if ids == values == [0, IGNORE]:
        classes = given.require(2, said) if given else ["background", "foreground"]
        return {"classes": classes, "values": values}, [f"{said}: 255 becomes the class {classes[-1]}"]
    if ids[-1] == IGNORE or are_grey_levels(values):
        if len(ids) > _MOST_COLOURS:
            raise ParamsError(f"--root {root}: {said}: more than {_MOST_COLOURS} grey levels; export masks without smooth edges")
        classes = given.require(len(ids), f"{said}, {len(ids)} of them classes") if given else [f"grey_{value}" for value in ids]
        white = "" if values == ids else f"; {IGNORE} is no class"
        return {"classes": classes, "values": ids}, [f"{said}: grey levels, each a class (data.values){white}; {named}"]
    if max(ids) > 253:
        raise ParamsError(f"--root {root}: a mask holds the value {max(ids)}; class ids must be 0 to 253, and {IGNORE} is no class")
    if given is not None and ids == list(range(1, len(given.names) + 1)):
        return {"classes": list(given.names), "values": ids}, [f"{said}, the first class is 1 (data.values): {named}"]
    count = max(2, max(ids) + 1)
    if given is not None and len(given.names) < count:
        names = counted(len(given.names), "name")
        raise ParamsError(f"{given.source}: {names}, but the masks hold the class id {max(ids)}; name all classes")
    classes = list(given.names) if given else [f"class_{value}" for value in range(count)]
    notes = [f"warning: {note}" for note in missing_values(values)]
    return {"classes": classes}, [f"{said}: {named}", *notes]


def _names_in(files: ImageFiles) -> _Names | None:
    """Names from a file beside the masks: Roboflow's _classes.csv, or a name a line."""
    for path in sorted(path for path in files.files if path.name == "_classes.csv"):
        names = _names_of_csv(files.root / path)
        return _Names(names, str(files.root / path))
    beside = next((Path(name) for name in _NAMES if (files.root / name).is_file()), None) or names_file(files)
    if beside is None or beside.parent != Path():
        return None
    path = files.root / beside
    names = _names_of_file(path)
    return _Names(names[1:] if names[:1] == ["__ignore__"] else names, str(path))  # LabelMe's labels.txt begins with id -1


def _names_of_csv(path: Path) -> list[str]:
    """The names of Roboflow's table `Pixel Value, Class`, in the order of the values."""
    try:
        rows = list(csv.reader(read_text(path).splitlines()[1:], skipinitialspace=True))
        names = {int(row[0]): row[1].strip() for row in rows if row}
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise ParamsError(f"{path}: cannot be read as pixel values and names ({error}); correct or remove it") from None
    return [names.get(value, f"class_{value}") for value in range(max(names, default=-1) + 1)]
