"""The built-in data set: scenes of shapes with exact masks, for tests, tutorials and experiments without a download.

The data set is hard with few labels and learnable with many. Three cues point to a class, and none is enough alone: outline (but
the two discs have the same outline, and objects hide each other), texture (but some objects, the background and clutter have the
texture of another class) and hue (but neighbouring classes overlap; brightness does not depend on the class). `star` and
`crescent` are rare.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.index import SPLITS, DatasetIndex, Sample, lookup_of, sorted_unique
from mgd_pipeline.durable import naming
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import ShapesData

_OBJECTS = (  # class, colour in the palette, its own texture
    ("rectangle", (230, 80, 60), "grid"),
    ("triangle", (70, 150, 230), "dots"),
    ("cross", (240, 190, 50), "speckle"),
    ("ring", (90, 190, 110), "plain"),
    ("striped_disc", (170, 100, 210), "stripes"),
    ("checkered_disc", (240, 140, 190), "checks"),
    ("star", (110, 220, 220), "rings"),
    ("crescent", (190, 130, 80), "zigzag"),
)
CLASSES = ("background", *(name for name, _, _ in _OBJECTS))
PALETTE = ((40, 40, 48), *(colour for _, colour, _ in _OBJECTS))
RARE = ("star", "crescent")
RARE_SHARE = 0.3  # share of the scenes that hold each rare class
HUE_SPREAD = 0.55  # radians; neighbouring classes are 0.785 apart, so colour alone decides few objects
OWN_TEXTURES = {name: texture for name, _, texture in _OBJECTS}
OWN_TEXTURE_SHARE = 0.85  # share of the objects with the texture of their class; the discs always have it
TEXTURES = tuple(OWN_TEXTURES.values())


def render_scene(render_seed: int, split: str, index: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image (height, width, 3) uint8 RGB and mask (height, width) uint8 of indices into CLASSES.

    A pure function of its arguments. Raises ValueError for a split that is not train, val or test.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([render_seed % 2**64, SPLITS.index(split), index])
    image = _background(rng, height, width)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(0, 3)):
        _paint(rng, image, mask, rng.choice(["blob", "bar"], p=[0.7, 0.3]))
    names = list(rng.choice([name for name in CLASSES[1:] if name not in RARE], size=rng.integers(5, 9)))
    for rare, slot in zip(RARE, rng.permutation(len(names)), strict=False):
        if rng.random() < RARE_SHARE:
            names[slot] = rare
    for name in names:
        _paint(rng, image, mask, name)
    if rng.random() < 0.25:  # something in front without a class
        _paint(rng, image, mask, "bar")
    return _photograph(rng, image), mask


def write_shapes(params: ShapesData, root: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Renders all scenes to root/images/<split>/<id>.png and root/masks/<split>/<id>.png (palette), replacing former ones.

    Ids are `train_00012`. Every scene gets its mask; the partition decides which of them count as labelled.
    `progress(done, total)` is called after each scene.
    """
    counts = _counts(params)
    total, done = sum(counts.values()), 0
    flat_palette = [value for colour in PALETTE for value in colour]
    for split, count in counts.items():
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, mask = render_scene(params.render_seed, split, index, params.height, params.width)
            coloured = Image.fromarray(mask)
            coloured.putpalette(flat_palette)
            for kind, picture, level in (("images", Image.fromarray(image), 1), ("masks", coloured, -1)):  # -1: zlib's default
                path = root / kind / split / f"{scene_id(split, index)}.png"
                # DVC may have made it a link into a cache that others share: writing into it would change their images.
                path.unlink(missing_ok=True)
                with naming(path):
                    picture.save(path, compress_level=level)
            done += 1
            if progress:
                progress(done, total)


def _counts(params: ShapesData) -> dict[str, int]:
    return {"train": params.train, "val": params.val, "test": params.test}


def scene_id(split: str, index: int) -> str:
    """The image_id of a scene, such as `train_00012`."""
    return f"{split}_{index:05d}"


def index_shapes(root: Path, params: ShapesData) -> DatasetIndex:
    """The scenes that `write_shapes(params, root)` made; files of an earlier, larger rendering are left out."""
    samples = []
    for split, count in _counts(params).items():
        for index in range(count):
            name = f"{scene_id(split, index)}.png"
            image, mask = Path("images", split, name), Path("masks", split, name)
            for path in (image, mask):
                if not (root / path).is_file():
                    raise DataError(f"{root / path}: this scene is missing; run `mgd-pipeline prepare-data`, which renders it")
            samples.append(Sample(scene_id(split, index), image, mask, split))
    return DatasetIndex(sorted_unique(samples), CLASSES, PALETTE, lookup_of(len(CLASSES), IGNORE))


def _paint(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, name: str) -> None:
    """Draws one object, rotated and shaded, onto image (H, W, 3) float and mask (H, W), in place."""
    height, width = mask.shape
    smallest, largest = (0.06, 0.2) if name == "blob" else (0.18, 0.36)
    radius = min(height, width) * np.exp(rng.uniform(np.log(smallest), np.log(largest)))
    if name == "bar":
        radius = min(height, width) * rng.uniform(0.2, 0.6)
    x0, y0 = rng.uniform(0.03, 0.97, 2) * (width, height)
    top, left = max(0, int(y0 - radius - 2)), max(0, int(x0 - radius - 2))
    bottom, right = min(height, int(y0 + radius + 3)), min(width, int(x0 + radius + 3))
    y, x = np.ogrid[top:bottom, left:right]
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    u = ((x - x0) * cos + (y - y0) * sin).astype(np.float32)  # the object's own axes, pixels
    v = ((y - y0) * cos - (x - x0) * sin).astype(np.float32)
    coverage = np.clip(0.5 - _distance(rng, name, u / radius, v / radius) * radius, 0, 1)

    texture, wears_its_own = rng.choice(TEXTURES), rng.random() < OWN_TEXTURE_SHARE or name.endswith("disc")
    if name in OWN_TEXTURES and wears_its_own:
        texture = OWN_TEXTURES[name]
    hue = _hue(rng, CLASSES.index(name)) if name in CLASSES else rng.uniform(0, 2 * np.pi)
    colour = _textured(rng, texture, u, v, period=rng.uniform(5.5, max(7.0, radius / 2.5)), hue=hue)
    tilt, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.35)
    colour *= (1 + strength * (u * np.cos(tilt) + v * np.sin(tilt)) / radius)[..., None]

    window = image[top:bottom, left:right]
    window += coverage[..., None] * (colour - window)
    mask[top:bottom, left:right][coverage >= 0.5] = CLASSES.index(name) if name in CLASSES else 0


def _distance(rng: np.random.Generator, name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the outline, negative inside, in units of the object's radius (approximate beside corners)."""
    rho = np.hypot(u, v)
    if name in ("striped_disc", "checkered_disc"):
        return rho - 0.95
    if name == "rectangle":
        return np.maximum(abs(u) - 0.85, abs(v) - rng.uniform(0.5, 0.85))
    if name == "triangle":
        v = v / rng.uniform(0.8, 1.1)
        return np.maximum(np.maximum(-v, 0.866 * u + 0.5 * v), -0.866 * u + 0.5 * v) - 0.5
    if name == "cross":
        arm = rng.uniform(0.24, 0.36)
        return np.minimum(np.maximum(abs(u) - 0.95, abs(v) - arm), np.maximum(abs(u) - arm, abs(v) - 0.95))
    if name == "ring":
        inner = rng.uniform(0.42, 0.6)
        return abs(rho - (0.97 + inner) / 2) - (0.97 - inner) / 2
    if name == "star":  # fold the plane into one of ten wedges, whose outline is a straight edge between tip and notch
        notch, half = rng.uniform(0.38, 0.46), np.pi / 5
        wedge = abs(np.mod(np.arctan2(v, u), 2 * half) - half)
        tip, dent = np.array([np.cos(half), np.sin(half)]), np.array([notch, 0.0])
        edge = (tip - dent) / np.hypot(*(tip - dent))
        return edge[1] * (rho * np.cos(wedge) - dent[0]) - edge[0] * (rho * np.sin(wedge) - dent[1])
    if name == "crescent":
        return np.maximum(rho - 0.97, rng.uniform(0.7, 0.8) - np.hypot(u - rng.uniform(0.42, 0.55), v))
    if name == "bar":
        return np.maximum(abs(u) - 0.95, abs(v) - rng.uniform(0.03, 0.09))
    turn = np.arctan2(v, u)  # blob: a disc whose outline wanders
    waves = [rng.uniform(0.06, 0.2) * np.cos(k * turn + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5)]
    return rho - 0.65 - sum(waves)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3) float32: soft colours, with regions of the objects' textures that have no outline."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    image = _textured(rng, "plain", x, y, period=1.0)
    for _ in range(rng.integers(0, 2)):
        angle, texture = rng.uniform(0, np.pi), rng.choice(TEXTURES)
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        colour = _textured(rng, texture, u, v, period=rng.uniform(5.5, 16.0))
        region = np.clip(3 * (_smooth_noise(rng, height, width, cell=min(height, width) / 2.5) - 0.55), 0, 1)
        image += region[..., None] * (colour - image)
    return image


def _textured(
    rng: np.random.Generator, texture: str, u: np.ndarray, v: np.ndarray, period: float, hue: float | None = None
) -> np.ndarray:
    """(H, W, 3) float32 colours of a texture over the coordinates u, v, pixels; most repeat every `period` pixels."""
    first, second = _two_colours(rng, hue)
    height, width = u.shape
    x, y, phase = 2 * np.pi * u / period, 2 * np.pi * v / period, rng.uniform(0, 2 * np.pi, 2)
    if texture == "plain":
        blend = 0.6 * _smooth_noise(rng, height, width, cell=rng.uniform(12, 40))
    elif texture == "speckle":
        blend = np.clip(2 * _smooth_noise(rng, height, width, cell=rng.uniform(2.5, 5)) - 0.5, 0, 1)
    elif texture == "dots":
        blend = np.clip(1.5 * (np.cos(x + phase[0]) + np.cos(y + phase[1])) - 0.5, 0, 1)
    elif texture == "grid":
        blend = np.clip(4 * np.maximum(np.cos(x + phase[0]), np.cos(y + phase[1])) - 2.2, 0, 1)
    else:
        wave = {
            "stripes": np.sin(x + phase[0]),
            "checks": 2.5 * np.sin(x + phase[0]) * np.sin(y + phase[1]),
            "rings": np.sin(np.hypot(x, y) + phase[0]),
            "zigzag": np.sin(x + 2 * np.pi * abs(np.mod(v / period, 2) - 1) + phase[0]),
        }[texture]
        blend = 0.5 + 0.5 * np.clip(2.5 * wave, -1, 1)
    return first + blend[..., None].astype(np.float32) * (second - first)


def _hue(rng: np.random.Generator, class_index: int) -> float:
    """An angle in the plane of colours: around the class's own, so widely that two neighbours overlap for the most part."""
    return 2 * np.pi * class_index / (len(CLASSES) - 1) + rng.normal(0, HUE_SPREAD)


def _two_colours(rng: np.random.Generator, hue: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Two RGB colours near `hue` (none: nearly grey) whose brightness differs by 0.22 to 0.5 on a scale of 1."""
    bright = rng.uniform(0.1, 0.9)
    step = rng.uniform(0.22, 0.5) * (1 if bright < 0.5 else -1)
    chroma = rng.normal(0, 0.05, (2, 3))
    if hue is not None:
        chroma += rng.uniform(0.1, 0.22) * np.cos(hue - 2 * np.pi / 3 * np.arange(3))
    chroma -= chroma.mean(1, keepdims=True)
    first, second = ((value + tint).astype(np.float32) for value, tint in zip((bright, bright + step), chroma, strict=True))
    return first, second


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """(height, width) float32 in 0 to 1: uniform noise on a grid with `cell` pixels between nodes, interpolated linearly."""
    nodes = rng.random((int(height / cell) + 2, int(width / cell) + 2), dtype=np.float32)
    rows, columns = (
        np.maximum(0, 1 - abs(np.arange(length)[:, None] / cell - np.arange(count))).astype(np.float32)
        for length, count in zip((height, width), nodes.shape, strict=True)
    )
    return rows @ nodes @ columns.T


def _photograph(rng: np.random.Generator, scene: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: light that falls off across the scene, exposure, and sensor noise."""
    height, width = scene.shape[:2]
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.5)
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    light = rng.uniform(0.75, 1.15) * (1 + strength * (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2))
    noise = rng.standard_normal(scene.shape, dtype=np.float32) * np.float32(rng.uniform(0.01, 0.04))
    lit = scene * light[..., None].astype(np.float32) + noise
    return (255 * np.clip(lit, 0, 1) + 0.5).astype(np.uint8)
