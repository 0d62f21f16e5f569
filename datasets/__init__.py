"""Benchmarks: a file each with `load(root) -> Benchmark`, and what they have in common."""

import importlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from config import UserError

# The six of the thesis's table 4.1, in its order; TCL's two variants without background; our own.
THESIS_DATASETS = ("voc", "context", "coco_object", "coco_stuff", "cityscapes", "ade20k")
DATASETS = (*THESIS_DATASETS, "voc20", "context59", "shapes")

IGNORED = 255  # class index of pixels that do not count
UNKNOWN = 254  # in a lookup table: a raw label id that the benchmark does not have


@dataclass
class Benchmark:
    """Images with labels, as evaluation wants them.

    image(i): RGB. label(i): (H, W) uint8 class indices into `class_names`, IGNORED where a pixel
    does not count. With `background`, class 0 is what belongs to none of the others.
    """

    name: str
    class_names: tuple[str, ...]
    background: bool
    stems: list[str]  # file names of the images without folder and suffix
    image: Callable[[int], Image.Image]
    label: Callable[[int], np.ndarray]
    raw_ids: tuple[int, ...] | None = None  # the benchmark's own label id of every class
    palette: list[int] | None = None  # its own colours by label id, flat; None: `colours()`

    def __post_init__(self) -> None:
        self.raw_ids = self.raw_ids or tuple(range(len(self.class_names)))
        self.palette = self.palette or colours()


def load_benchmark(name: str, root: str) -> Benchmark:
    """A benchmark by its name. Raises UserError for an unknown name or a wrong folder."""
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: not one of {', '.join(DATASETS)}")
    return importlib.import_module(f"datasets.{name}").load(root)


def read_ahead(benchmark: Benchmark, indices: Sequence[int]) -> Iterator:
    """Images and labels in order, decoded by threads while the images before are segmented."""
    with ThreadPoolExecutor(2) as pool:
        waiting: deque = deque()
        for i in indices:
            waiting.append((pool.submit(benchmark.image, i), pool.submit(benchmark.label, i)))
            if len(waiting) > 4:
                yield tuple(future.result() for future in waiting.popleft())
        while waiting:
            yield tuple(future.result() for future in waiting.popleft())


def colours() -> list[int]:
    """PASCAL VOC's colours of 256 label ids, flat r, g, b: an id's bits, spread over the three."""
    flat = []
    for index in range(256):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        flat += rgb
    return flat


def lookup(pairs: Iterable[tuple[int, int]], others: int = UNKNOWN) -> np.ndarray:
    """Table of 256 entries from raw label ids to class indices."""
    table = np.full(256, others, np.uint8)
    for raw, index in pairs:
        table[raw] = index
    return table


def from_files(
    name: str,
    class_names: tuple[str, ...],
    background: bool,
    files: list[tuple[Path, Path]],
    table: np.ndarray,
    **more,
) -> Benchmark:
    """A benchmark of image files with label files (single-channel PNGs of raw ids)."""
    return Benchmark(
        name,
        class_names,
        background,
        stems=[image.stem for image, _ in files],
        image=lambda i: read_image(files[i][0]),
        label=lambda i: map_label(read_label(files[i][1]), table, *files[i]),
        **more,
    )


def need(path: Path, root: str, tree: str, source: str) -> Path:
    """`path` if it exists. Raises UserError with what was looked for and where it is obtained."""
    if not path.exists():
        raise UserError(
            f"{path} is missing; --root {root} should hold {tree}; obtained from {source}"
        )
    return path


def find(folder: Path, pattern: str, root: str, tree: str) -> list[Path]:
    """The files of a folder that fit a pattern, in order. Raises UserError if there are none."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"{folder} holds no {pattern}; --root {root} should hold {tree}")
    return found


def listed(split: Path, images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Image (.jpg) and label (.png) files of the stems in a split file, one a line."""
    try:
        stems = split.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"split {split} cannot be read ({_reason(error)})") from error
    if not stems:
        raise UserError(f"{split} lists no image")
    return [(images / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]


def read_image(path: Path) -> Image.Image:
    """RGB as stored (labels are not turned by EXIF either). Raises UserError naming the file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"image {path} cannot be read ({_reason(error)})") from error


def read_label(path: Path) -> np.ndarray:
    """Raw label ids (H, W) uint8. Raises UserError naming the file."""
    try:
        with Image.open(path) as image:
            label = np.asarray(image)
    except Exception as error:
        raise UserError(f"label {path} cannot be read ({_reason(error)})") from error
    if label.ndim != 2 or label.dtype != np.uint8:
        raise UserError(f"label {path}: one channel of 8-bit label ids is needed")
    return label


def map_label(raw: np.ndarray, table: np.ndarray, image: Path, label: Path) -> np.ndarray:
    """Raw ids to class indices; UserError for an unknown id or a size that is not the image's."""
    with Image.open(image) as opened:
        width, height = opened.size
    if raw.shape != (height, width):
        raise UserError(
            f"label {label} is {raw.shape[1]} x {raw.shape[0]}, its image {image.name} "
            f"{width} x {height}"
        )
    mapped = table[raw]
    if (mapped == UNKNOWN).any():
        ids = ", ".join(map(str, np.unique(raw[mapped == UNKNOWN])[:5]))
        raise UserError(f"label {label} holds ids that this benchmark does not have: {ids}")
    return mapped


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return (str(error) or type(error).__name__).splitlines()[0]
