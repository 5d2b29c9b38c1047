"""What `init` finds in a folder: labels of which kind, where, and of which classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.images import IGNORE, SUFFIXES, open_image, read_raw_mask
from mgd_pipeline.data.index import Colour
from mgd_pipeline.data.labels.colours import colours_in, read_labelmap
from mgd_pipeline.data.labels.files import ImageFiles
from mgd_pipeline.data.labels.read import TOOLS, Tool, read_labels, tools_of
from mgd_pipeline.data.layouts import Pairing, compared_on, pairing_of
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.params import FolderData
from mgd_pipeline.words import counted, listed
from mgd_stages.run.data_notes import are_grey_levels, missing_values

_READ = 200
"""Masks that are read, at most, spread evenly over all of them."""
_MOST_COLOURS = 64
_VOID_COLOUR = (224, 224, 192)
"""Of PASCAL VOC's borders."""
_BACKGROUND = ("background", "_background_", "bg", "unlabeled", "unlabelled")
_NAMES = ("classes.txt", "class_names.txt", "labels.txt", "names.txt", "obj.names")
_LABEL_STUDIO_PNG = re.compile(r"task-\d+-annotation-\d+-.*-tag-.+\.png", re.I)


@dataclass
class Seen:
    """Labels that lie in a folder."""

    data: dict[str, Any]
    """The section data of params.yaml, but for root and partition."""
    split: str | None = None
    """The split to compare networks on, if folders name splits."""
    said: list[str] = field(default_factory=list)
    """What init prints."""


def look_at_labels(root: Path, names: Sequence[str] | None = None) -> Seen:
    """The labels below a folder, of the first kind that there is: masks in images/ and masks/, files of an annotation tool, masks
    of colours with a labelmap, masks in other folders.

    `names`: the classes in the order of their ids, if the user gives them. Raises ParamsError where nothing can be read as labels.
    """
    files = ImageFiles(root)
    if not files.images:
        raise ParamsError(f"--root {root}: holds no photo; readable suffixes are {', '.join(SUFFIXES)}")
    standard = (root / "images").is_dir() and (root / "masks").is_dir()
    tools = {} if standard else tools_of(files)
    if tools:
        seen = _of_tool(files, next(iter(tools)), names)
        if others := [f"{TOOLS[tool]} ({counted(count, 'file')})" for tool, count in list(tools.items())[1:]]:
            seen.said.append(f"there is {listed(others)} too, which is not read; set data.labels in params.yaml to read it")
        return seen
    return _of_masks(files, names, standard)


def read_names(text: str) -> list[str]:
    """The classes of `init --classes`: names between commas, or a file with one name a line."""
    path = Path(text)
    if path.suffix in (".txt", ".names") or path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ParamsError(f"--classes {text}: cannot be read ({error}); name the classes, such as background,road") from None
        return [line.strip() for line in lines if line.strip()]
    return [name.strip() for name in text.split(",") if name.strip()]


# --- annotation tools -------------------------------------------------------------------------------------------------


def _of_tool(files: ImageFiles, tool: Tool, names: Sequence[str] | None) -> Seen:
    labels = read_labels(files, tool)
    drawings = [drawing for drawing in labels.drawings if drawing.regions]
    if not drawings:
        raise ParamsError(f"--root {files.root}: {TOOLS[tool]} without a region of any photo; draw some and export again")
    own = [name for name in labels.names if name.lower() in _BACKGROUND]
    background = own[0] if own else "background"
    classes = [background, *(name for name in labels.names if name != background)]
    data: dict[str, Any] = {"labels": tool, "classes": classes, "uncovered": background}
    if names is not None:
        if missing := [name for name in labels.names if name not in names]:
            raise ParamsError(f"--classes: lacks {listed([repr(name) for name in missing])}, which the annotations have; add it")
        data |= {"classes": list(names), "uncovered": names[0] if names[0] not in labels.names else None}
    if labels.colours:
        data["colours"] = _distinct([labels.colours.get(name, (0, 0, 0)) for name in data["classes"]])
    split = compared_on([drawing.image.as_posix() for drawing in drawings] + [drawing.source.as_posix() for drawing in drawings])
    if split is not None:
        data["splits"] = "folders"
    regions = Counter(region.name for drawing in drawings for region in drawing.regions)
    said = [
        f"{TOOLS[tool]}: {counted(sum(regions.values()), 'region')} on {len(drawings)} of {counted(len(files.images), 'image')}",
        f"classes: {', '.join(f'{name} ({regions[name]})' for name in labels.names)}",
    ]
    if not own and names is None:
        said.append("pixels outside of all regions become the class background (data.uncovered)")
    return Seen(data, split, said)


def _distinct(colours: Sequence[Colour]) -> list[list[int]] | None:
    """Colours for the parameters; None where two are equal, because pictures could not tell their classes apart."""
    return [list(colour) for colour in colours] if len(set(colours)) == len(colours) else None


# --- masks ------------------------------------------------------------------------------------------------------------


def _of_masks(files: ImageFiles, names: Sequence[str] | None, standard: bool) -> Seen:
    root = files.root
    labelmap = next((path for path in files.with_suffix(".txt") if path.name == "labelmap.txt"), None)
    data, split = dict[str, Any](), None
    if not (standard and (root / "masks/val").is_dir()):
        pairing = Pairing("images/**/*", "masks/**/*") if standard else pairing_of(files.images)
        if pairing is None:
            if any(_LABEL_STUDIO_PNG.fullmatch(path.name) for path in files.images):
                raise ParamsError(
                    f"--root {root}: Label Studio's PNG export does not say which photo a mask is of; put its JSON export here"
                )
            raise ParamsError(
                f"--root {root}: has {counted(len(files.images), 'image')} and no labels; put the export of your annotation tool "
                f"here ({', '.join(TOOLS.values())}), or masks called like their images in masks/ beside images/"
            )
        data = {"images": pairing.images, "masks": pairing.masks}
        ids = [image_id for path in files.images if (image_id := pairing.image_id(path)) is not None]
        if (split := compared_on(ids)) is not None:
            data["splits"] = "folders"
    params = FolderData(dataset="folder", root=str(root), partition="1/1", classes=["not", "known"], **data)
    index = index_dataset(params, Path())  # what prepare-data would refuse is said here already
    masks = sorted(root / sample.mask for sample in index.samples if sample.mask)
    if not masks:
        raise DataError(f"{root / 'masks'}: no mask found; expected masks/<split>/<id>.png")
    places = np.unique(np.linspace(0, len(masks) - 1, _READ).astype(int))
    chosen = [masks[place] for place in places]
    given = list(names) if names is not None else _names_in(root)
    if labelmap is not None or any(_is_coloured(path) for path in chosen):
        kind, said = _colours(chosen, read_labelmap(root / labelmap) if labelmap else {}, given)
    else:
        kind, said = _values(root, chosen, given)
    where = "" if standard else f" ({data['images']} and {data['masks']})"
    counts = f"{counted(len(masks), 'mask')} of {counted(len(index.samples), 'image')}{where}"
    if data and "splits" not in data:
        said.append("a tenth each of these images is drawn for validation and test: data.val_fraction, data.test_fraction")
    return Seen({**data, **kind}, split, [counts, *said])


def _is_coloured(path: Path) -> bool:
    with open_image(path) as image:
        return image.mode in ("RGB", "RGBA")


def _colours(masks: Sequence[Path], labelmap: dict[str, Colour], names: Sequence[str] | None) -> tuple[dict[str, Any], list[str]]:
    pixels: Counter[Colour] = Counter()
    for path in masks:
        pixels.update(colours_in(path))
        if len(pixels) > _MOST_COLOURS:
            raise ParamsError(
                f"{path}: the masks have more than {_MOST_COLOURS} colours; export them as PNG without smooth edges, or export "
                "the annotations themselves"
            )
    void = [_VOID_COLOUR] if _VOID_COLOUR in pixels and _VOID_COLOUR not in labelmap.values() else []
    if labelmap:
        known = dict(labelmap)
        if foreign := [colour for colour in pixels if colour not in known.values() and colour not in void]:
            raise ParamsError(f"{masks[0].parent}: the colour {list(foreign[0])} is not in labelmap.txt; add a line for it")
    else:
        colours = sorted(colour for colour in pixels if colour not in void)
        if names is not None and len(names) != len(colours):
            raise ParamsError(f"--classes: {len(names)} names, but the masks have {len(colours)} colours: {colours}")
        known = dict(zip(names or [f"colour_{'_'.join(map(str, colour))}" for colour in colours], colours, strict=True))
    data: dict[str, Any] = {"labels": "colours", "classes": list(known), "colours": [list(colour) for colour in known.values()]}
    if void:
        data["ignore_colours"] = [list(colour) for colour in void]
    what = "labelmap.txt" if labelmap else "names to be given in params.yaml, data.classes"
    shares = ", ".join(f"{name} {list(colour)}" for name, colour in known.items())
    return data, [f"masks of {len(known)} colours, {what}: {shares}"]


def _values(root: Path, masks: Sequence[Path], names: Sequence[str] | None) -> tuple[dict[str, Any], list[str]]:
    occurs = np.zeros(256, bool)
    for path in masks:
        occurs[read_raw_mask(path)] = True
    values = np.flatnonzero(occurs).tolist()
    said = f"the masks hold the values {', '.join(map(str, values))}"
    ids = [value for value in values if value != IGNORE]
    name_them = "give the classes their names in params.yaml, data.classes"
    if values == [0, IGNORE]:
        classes = list(names or ("background", "foreground"))
        return {"classes": classes, "values": values}, [f"{said}: 255 becomes the class {classes[-1]}"]
    if len(values) < 2 or not ids:
        raise ParamsError(f"--root {root}: {said} alone; a class needs a value of its own, such as 0 for background and 1 for road")
    if are_grey_levels(values):
        if len(ids) > _MOST_COLOURS:
            raise ParamsError(f"--root {root}: {said}: more than {_MOST_COLOURS} grey levels; export masks without smooth edges")
        classes = list(names or (f"grey_{value}" for value in ids))
        return {"classes": classes, "values": ids}, [f"{said}: grey levels, each a class (data.values); {name_them}"]
    if max(ids) > 253:
        raise ParamsError(f"--root {root}: a mask holds the value {max(ids)}; class ids must be 0 to 253, and {IGNORE} is no class")
    count = max(2, max(ids) + 1)
    if names is not None and len(names) < count:
        raise ParamsError(f"--classes: {counted(len(names), 'name')}, but the masks hold the class id {max(ids)}; name all classes")
    classes = list(names or (f"class_{value}" for value in range(count)))
    notes = [f"warning: {note}" for note in missing_values(values)]
    return {"classes": classes}, [said if names else f"{said}: {name_them}", *notes]


def _names_in(root: Path) -> list[str] | None:
    """Names from a file beside the masks, one a line."""
    path = next((root / name for name in _NAMES if (root / name).is_file()), None)
    return read_names(str(path)) if path else None
