"""The shapes world: small drawn scenes with captions for training and exact masks for evaluation.

Everything is a function of a seed: `scene("train", 7)` is the same image on every machine, and
`scene("train", 7, scale=4)` the same scene in more pixels, for people to look at. A scene has one
to three objects, which may hide parts of each other, on one or two named surfaces. Every noun has
an outline *and* an inner texture of its own, as things in nature do; colour, pattern and size vary
freely within a noun and are what the adjectives of the caption speak of.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from datasets import Benchmark
from datasets.shapes_art import OBJECTS, SURFACES

SIDE = 96  # pixels; the mask grid of an 8-pixel patch is 4 x 12 = 48 cells wide
_OVERSAMPLING = 2  # scenes are painted this much larger and averaged down, for smooth outlines

COLOURS = {
    "red": (205, 45, 40),
    "yellow": (238, 216, 50),
    "green": (50, 150, 60),
    "white": (240, 240, 238),
    "black": (38, 38, 44),
    "brown": (120, 76, 42),
    "gray": (134, 136, 142),
    "golden": (214, 160, 28),
}
PATTERNS = ("striped", "spotted", "shiny")
SMALL, LARGE = ("small", "tiny"), ("big", "large", "huge")
ADJECTIVES = (*COLOURS, *PATTERNS, *SMALL, *LARGE)
NOUNS = tuple(OBJECTS) + tuple(SURFACES)
CLASS_NAMES = ("background", *OBJECTS)  # label 0 is any surface


@dataclass(frozen=True)
class Thing:
    """One drawn object: its noun, the adjectives that are true of it, and where it is.

    x, y: centre, radius: half its side, as shares of the scene's side. angle: radians.
    """

    noun: str
    colour: str
    pattern: str | None
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    image: (96, 96, 3) uint8; label: (96, 96) uint8, indices into CLASS_NAMES (0 = a surface), both
    `scale` times larger where that was asked for; things: its objects in the order they were
    painted; surfaces: one, or two with a border between them.
    """

    image: np.ndarray
    label: np.ndarray
    things: tuple[Thing, ...]
    surfaces: tuple[str, ...]
    caption: str


def _shade(colour: np.ndarray, tone: np.ndarray) -> np.ndarray:
    """Mix a colour (..., 3) with black (tone -1) or white (tone +1); tone (h, w)."""
    tone = np.clip(tone, -1, 1).astype(np.float32)[..., None]
    return colour * (1 - np.abs(tone)) + 255 * np.maximum(tone, 0)


def _erode(inside: np.ndarray, reach: int) -> np.ndarray:
    """What of a silhouette (h, w) has its four neighbours at `reach` samples inside as well."""
    padded = np.pad(inside, reach)
    shifts = [(reach, 0), (-reach, 0), (0, reach), (0, -reach)]
    for dy, dx in shifts:
        inside = inside & np.roll(padded, (dy, dx), (0, 1))[reach:-reach, reach:-reach]
    return inside


def _paint(image: np.ndarray, label: np.ndarray, thing: Thing) -> None:
    """Paint a thing with a dark outline over image (S, S, 3) and label (S, S), in place."""
    side, n = len(label), _OVERSAMPLING
    reach = thing.radius * 1.45  # the corner of a turned square
    top, left = (max(0, int((centre - reach) * side)) for centre in (thing.y, thing.x))
    bottom, right = (min(side, int((centre + reach) * side) + 1) for centre in (thing.y, thing.x))
    # Object coordinates of every sample: painted finer than the pixels and averaged.
    y = (np.arange(top * n, bottom * n) + 0.5)[:, None] / (n * side) - thing.y
    x = (np.arange(left * n, right * n) + 0.5)[None, :] / (n * side) - thing.x
    cos, sin = np.cos(thing.angle) / thing.radius, np.sin(thing.angle) / thing.radius
    u, v = (cos * x + sin * y).astype(np.float32), (cos * y - sin * x).astype(np.float32)
    inside, tone = OBJECTS[thing.noun](u, v)
    colour = np.array(COLOURS[thing.colour], np.float32)
    second = np.array((245, 245, 240) if colour.mean() < 150 else (40, 50, 120), np.float32)
    if thing.pattern == "striped":
        colour = np.where((np.sin(9 * (u + v)) > 0.4)[..., None], second, colour)
    elif thing.pattern == "spotted":
        spots = np.hypot((2.6 * u + 0.5) % 1 - 0.5, (2.6 * v) % 1 - 0.5) < 0.25
        colour = np.where(spots[..., None], second, colour)
    elif thing.pattern == "shiny":
        tone = tone + 0.9 * np.exp(-9 * ((u - 0.3) ** 2 + (v + 0.35) ** 2))
    tone = np.where(_erode(inside, n * side // SIDE), tone, -0.7)
    paint = _shade(colour, tone) * inside[..., None]
    paint, coverage = (
        sum(fine[i::n, j::n].astype(np.float32) for i in range(n) for j in range(n)) / n**2
        for fine in (paint, inside)
    )
    patch = image[top:bottom, left:right]
    patch[:] = patch * (1 - coverage[..., None]) + paint
    label[top:bottom, left:right][coverage >= 0.5] = CLASS_NAMES.index(thing.noun)


def _place(rng: np.random.Generator, nouns: list[str]) -> list[Thing]:
    """Scatter things so that they touch and overlap, but hardly ever hide most of one."""
    things: list[Thing] = []
    for noun in nouns:
        radius = rng.uniform(0.16, 0.36 if len(nouns) < 3 else 0.27)
        best, best_gap = None, -np.inf
        for _ in range(30):
            x, y = rng.uniform(radius * 0.9, 1 - radius * 0.9, 2)
            # How far two circles are apart, in radii of the smaller one.
            gap = min(
                (
                    (np.hypot(x - t.x, y - t.y) - radius - t.radius) / min(radius, t.radius)
                    for t in things
                ),
                default=0,
            )
            if gap > best_gap:
                best, best_gap = (x, y), gap
            if best_gap >= -0.4:
                break
        pattern = PATTERNS[rng.integers(3)] if rng.random() < 0.4 else None
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        angle = np.deg2rad(rng.uniform(-20, 20))
        things.append(Thing(noun, colour, pattern, *best, radius, angle))
    return things


def _ground(rng: np.random.Generator, surfaces: Sequence[str], scale: int) -> np.ndarray:
    """One surface, or two on either side of a wavy border: (S, S, 3) float32."""
    side = SIDE * scale
    y, x = (np.mgrid[:side, :side].astype(np.float32) + 0.5) / scale
    angle, bend = rng.uniform(-0.5, 0.5), rng.uniform(0, 6)
    border = SIDE * rng.uniform(0.35, 0.65) + np.tan(angle) * (x - SIDE / 2)
    border = border + 3 * np.sin(0.1 * x + bend)
    painted = []
    for surface in surfaces:
        texture, colour = SURFACES[surface]
        colour = np.array(colour) * rng.uniform(0.88, 1.08) + rng.uniform(-8, 8, 3)
        grain = rng.standard_normal((SIDE, SIDE)).repeat(scale, 0).repeat(scale, 1)
        colour = np.clip(colour, 0, 255).astype(np.float32)
        painted.append(_shade(colour, texture(x, y, rng, grain)))
    return np.where((y > border)[..., None], painted[0], painted[-1])


def describe(
    rng: np.random.Generator, thing: Thing, article: bool = True, coloured: float = 0.9
) -> str:
    """A noun phrase that is true of a thing: "a striped red kite", "the big yellow bug".

    coloured: how often it names the colour, as a share.
    """
    words = []
    if rng.random() < coloured:
        words.append(thing.colour)
    if thing.pattern and rng.random() < 0.7:
        words.insert(int(rng.integers(len(words) + 1)), thing.pattern)
    share = 2 * thing.radius
    if rng.random() < 0.5 and (share < 0.42 or share > 0.54):
        sizes = SMALL if share < 0.42 else LARGE
        words.insert(0, sizes[rng.integers(len(sizes))])
    phrase = " ".join([*words, thing.noun])
    return f"{'the' if rng.random() < 0.2 else 'a'} {phrase}" if article else phrase


def caption_of(
    rng: np.random.Generator,
    things: Sequence[Thing],
    surfaces: Sequence[str],
    coloured: float = 0.9,
) -> str:
    """A sentence about the scene, from many templates with varying word order.

    As in captions of the web not all of it is exact: of two surfaces it may name the lower one
    alone, on whichever the objects are. coloured: how often at least a colour is named.
    """
    things = [things[i] for i in rng.permutation(len(things))]
    phrases = [describe(rng, thing, coloured=coloured) for thing in things]
    first, ground = things[0], ("the " if rng.random() < 0.6 else "") + surfaces[0]
    if len(surfaces) == 2 and rng.random() < 0.5:
        ground = f"{ground} and {surfaces[1]}"
    if len(things) == 1:
        plain = describe(rng, first, article=False, coloured=coloured)
        forms = [
            f"{phrases[0]} on {ground}",
            f"on {ground} is {phrases[0]}",
            f"{ground} and {phrases[0]}",
            f"the {first.noun} on {ground} is {first.colour}",
            f"there is {phrases[0]} on {ground}",
            f"one {plain} on {ground}",
            f"{ground} with {phrases[0]} on it",
            f"this {first.noun} is {first.colour} and it lies on {ground}",
        ]
    else:
        *most, last = phrases
        listed = f"{', '.join(most)} and {last}"
        joined = " and ".join(phrases)
        relation = "above" if things[0].y < things[1].y else "below"
        rest = f" with {phrases[2]}" if len(things) == 3 else ""
        forms = [
            f"{listed} on {ground}",
            f"on {ground} are {listed}",
            f"{ground} with {joined}",
            f"{phrases[0]} {relation} {phrases[1]}{rest} on {ground}",
            f"{phrases[0]} near {phrases[1]}{rest}",
            f"there is {phrases[0]} beside {phrases[1]}{rest} on {ground}",
            f"the {first.noun} is {first.colour} and near it is {' and '.join(phrases[1:])}",
            f"{joined}",
        ]
    return forms[rng.integers(len(forms))]


def draw(rng: np.random.Generator, objects: int | None = None, scale: int = 1) -> Scene:
    """Draw a scene of one to three objects (or of exactly `objects`), `scale` times as large."""
    if objects is None:
        objects = int(rng.choice(3, p=(0.25, 0.45, 0.30))) + 1
    nouns = rng.choice(list(OBJECTS), objects, replace=False).tolist()
    things = _place(rng, nouns)
    surfaces = tuple(rng.permutation(list(SURFACES))[: 1 + int(rng.random() < 0.4)].tolist())
    image = _ground(rng, surfaces, scale)
    label = np.zeros(image.shape[:2], np.uint8)
    for thing in things:
        _paint(image, label, thing)
    image += rng.normal(0, 3, (SIDE, SIDE, 3)).repeat(scale, 0).repeat(scale, 1)
    image = np.clip(image + 0.5, 0, 255).astype(np.uint8)
    return Scene(image, label, tuple(things), surfaces, caption_of(rng, things, surfaces))


_SPLITS = {"train": 0, "val": 1, "test": 2, "pretrain": 3}


def scene(split: str, index: int, objects: int | None = None, scale: int = 1) -> Scene:
    """Scene `index` of a split, the same on every machine.

    split: "train" trains CoDe, "val" is for choosing a recipe, "test" for reporting,
    "pretrain" trains the world's CLIP. objects: exactly so many objects instead of 1 to 3.
    scale: draw it so many times as large; nothing but the number of pixels changes.
    """
    return draw(np.random.default_rng((_SPLITS[split], objects or 0, index)), objects, scale)


def load(root: str, split: str = "test", count: int = 500) -> Benchmark:
    """The world as a benchmark: the first `count` scenes of a split, drawn when they are asked for.

    root is not used: nothing has to be downloaded.
    """
    return Benchmark(
        name="shapes",
        class_names=CLASS_NAMES,
        background=True,
        stems=[f"{split}_{index:05d}" for index in range(count)],
        image=lambda index: Image.fromarray(scene(split, index).image),
        label=lambda index: scene(split, index).label,
    )
