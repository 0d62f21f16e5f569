"""Benchmarks: a file each with `load(root) -> Benchmark`, and what they have in common."""

import importlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from config import UserError
from support.system_files import added_by_system

# The six of the thesis's table 4.1, in its order; TCL's two variants without background; our own.
THESIS_DATASETS = ("voc", "context", "coco_object", "coco_stuff", "cityscapes", "ade20k")
DATASETS = (*THESIS_DATASETS, "voc20", "context59", "shapes")

IGNORED = 255  # class index of pixels that do not count
UNKNOWN = 254  # in a lookup table: a raw label id that the benchmark does not have
LOOKED_AT = 50  # label maps, spread over the set, that are looked at when a benchmark is loaded


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
    seems: Callable[[dict[str, set[int]]], str],
    strict_palette: bool = False,
    **more,
) -> Benchmark:
    """A benchmark of image files with label files (single-channel PNGs of raw ids).

    table: class index of every raw id, UNKNOWN for one that the benchmark does not have.
    seems: what label maps of another kind seem to be, and what to take instead, from the raw ids
    in them by stem; "" where nothing speaks against them.
    strict_palette: the label files have the benchmark's own palette, or are greyscale.

    Raises UserError if a file is missing, or if the label maps are not the benchmark's: all files
    are looked for, and LOOKED_AT label maps read, before anything is computed.
    """
    for what, paths in zip(("images", "label files"), zip(*files)):
        if missing := missing_files(paths):
            raise UserError(
                f"{missing[0].parent}: {len(missing)} of the {len(files)} {what} of {name} are "
                f"missing, {missing[0].name} first"
            )

    def raw_label(i: int) -> np.ndarray:
        """(H, W) raw ids; their palette is checked, the ids are not."""
        raw, palette = read_label(files[i][1])
        check_palette(files[i][1], raw, palette, benchmark.palette, table, strict_palette)
        return raw

    def refuse(label: Path, maps: dict[str, set[int]], unknown: set[int]) -> None:
        ids = ", ".join(map(str, sorted(unknown)[:5]))
        guess = seems(maps)
        raise UserError(
            f"label {label} holds ids that {name} does not have: {ids}"
            + (f"; {guess}" if guess else "")
        )

    def label(i: int) -> np.ndarray:
        raw = raw_label(i)
        check_size(raw.shape, *files[i])
        mapped = table[raw]
        if (mapped == UNKNOWN).any():
            ids = ids_in(raw)
            refuse(files[i][1], {files[i][0].stem: ids}, unknown_ids(ids, table))
        return mapped

    benchmark = Benchmark(
        name,
        class_names,
        background,
        stems=[image.stem for image, _ in files],
        image=lambda i: read_image(files[i][0]),
        label=label,
        **more,
    )
    chosen = spread(len(files))
    maps = {benchmark.stems[i]: ids_in(raw_label(i)) for i in chosen}
    for i in chosen:
        if unknown := unknown_ids(maps[benchmark.stems[i]], table):
            refuse(files[i][1], maps, unknown)
    guess = seems(maps)
    classes = {int(table[raw]) for ids in maps.values() for raw in ids}
    if background and len(maps) >= 5 and classes <= {0, IGNORED}:
        guess = f"none of {len(maps)} holds any class but the background"
    if guess:
        raise UserError(f"the label maps of {name} in {files[0][1].parent}: {guess}")
    return benchmark


def spread(count: int) -> list[int]:
    """Indices of LOOKED_AT label maps, evenly over a set of so many (of all of them, if fewer)."""
    return np.unique(np.linspace(0, count - 1, LOOKED_AT, dtype=int)).tolist()


# --- files ----------------------------------------------------------------------------------------


def need(path: Path, root: str, tree: str, source: str) -> Path:
    """`path` if it exists. Raises UserError with what was looked for and where it is obtained."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        problem = "is missing"
    except (OSError, ValueError) as error:  # too long, not permitted, a zero byte in it
        problem = f"cannot be read ({reason(error)})"
    else:
        return path
    raise UserError(f"{path} {problem}; --root {root} should hold {tree}; obtained from {source}")


def entries(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, by name, but for what systems add. Raises UserError."""
    try:
        with os.scandir(folder) as found:
            kept = [entry for entry in found if not added_by_system(entry.name)]
    except (OSError, ValueError) as error:
        raise UserError(f"folder {folder} cannot be read ({reason(error)})") from error
    return sorted(kept, key=lambda entry: entry.name)


def find(folders: Sequence[Path], suffix: str, root: str, tree: str) -> list[Path]:
    """The files of folders whose names end so, in order. Raises UserError if there are none."""
    found = [
        folder / entry.name
        for folder in folders
        for entry in entries(folder)
        if entry.name.endswith(suffix)
    ]
    if not found:
        where = folders[0] if folders else "a folder without subfolders"
        raise UserError(f"{where} holds no *{suffix}; --root {root} should hold {tree}")
    return found


def missing_files(paths: Iterable[Path]) -> list[Path]:
    """Those that do not exist. Every folder is listed once: asking for each of thousands of files
    takes minutes on a network's disk. Raises UserError."""
    present: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        if path.parent not in present:
            there = entries(path.parent) if os.path.isdir(path.parent) else ()
            present[path.parent] = {entry.name for entry in there if not entry.is_symlink()}
        # A link may lead nowhere, and some systems write letters in two ways: these are asked for.
        if path.name not in present[path.parent] and not os.path.isfile(path):
            missing.append(path)
    return missing


def read_split(split: Path, images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Image (.jpg) and label (.png) files of the stems in a split file, one a line."""
    try:
        lines = split.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"split {split} cannot be read ({reason(error)})") from error
    stems: dict[str, None] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        more = len(line.split()) > 1 or any(c in line for c in "/\\\0")
        if more or line.lower().endswith((".jpg", ".png")):
            raise UserError(
                f"split {split}, line {number}: {line[:80]!r}: a name alone is needed, without "
                "folder, suffix or flag"
            )
        if line in stems:
            raise UserError(f"split {split}, line {number}: {line} is listed twice")
        if line:
            stems[line] = None
    if not stems:
        raise UserError(f"{split} lists no image")
    return [(images / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]


def read_image(path: Path) -> Image.Image:
    """RGB as stored (labels are not turned by EXIF either). Raises UserError naming the file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"image {path} cannot be read ({reason(error)})") from error


# --- label maps -----------------------------------------------------------------------------------


def read_label(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Raw label ids (H, W) uint8, and the palette (256, 3) of an indexed PNG.

    Raises UserError naming the file.
    """
    palette = None
    try:
        with Image.open(path) as image:
            mode, label = image.mode, np.asarray(image)
            if mode == "P":
                flat = np.array(image.getpalette(), np.uint8)
                palette = np.zeros((256, 3), np.uint8)
                palette[: len(flat) // 3] = flat.reshape(-1, 3)
    except Exception as error:
        raise UserError(f"label {path} cannot be read ({reason(error)})") from error
    if mode not in ("L", "P"):
        found = f"a picture in colours ({mode})"
        if mode.startswith("I"):
            found = "16 bits a pixel, as maps of instances or of more than 255 categories have"
        elif mode in ("1", "F"):
            found = {"1": "one bit a pixel", "F": "floats"}[mode]
        raise UserError(f"label {path}: {found}; one channel of 8-bit label ids is needed")
    return label, palette


def ids_in(label: np.ndarray) -> set[int]:
    """The raw ids that occur in a label map."""
    present = np.zeros(256, bool)
    present[label] = True
    return set(np.flatnonzero(present).tolist())


def unknown_ids(ids: set[int], table: np.ndarray) -> set[int]:
    return {raw for raw in ids if table[raw] == UNKNOWN}


def check_palette(
    path: Path,
    label: np.ndarray,
    palette: np.ndarray | None,
    own: list[int],
    table: np.ndarray,
    strict: bool,
) -> None:
    """Whether the palette of a file says the same ids as its pixels. Raises UserError.

    Programs that make files smaller, and editors, number colours anew: the picture looks the same,
    its ids are others. So the colours of the ids in the file may not be those of other ids, neither
    in the benchmark's palette (`own`, flat) nor as levels of grey. Other colours say nothing:
    they are refused only if `strict`.
    """
    if palette is None or not strict and (palette == palette[0]).all():
        return
    ids = sorted(ids_in(label))
    known = np.flatnonzero(table != UNKNOWN)
    greys = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    meanings = (np.array(own, np.uint8).reshape(256, 3), greys)
    if any((palette[ids] == meaning[ids]).all() for meaning in meanings):
        return
    for meaning in meanings:
        same = (palette[ids][:, None] == meaning[known]).all(axis=-1)  # (ids, known ids)
        others = known[same.argmax(axis=1)]
        distinct = len(np.unique(palette[ids], axis=0)) == len(ids)
        if same.any(axis=1).all() and distinct:
            here, there = next((a, b) for a, b in zip(ids, others) if a != b)
            raise UserError(
                f"{path}: its palette gives id {here} the colour of id {there}, so some program "
                "numbered the colours anew; take the file as it was before"
            )
    if strict:
        raise UserError(
            f"{path}: its palette is not the benchmark's, so its ids need not be either; take the "
            "files as downloaded"
        )


def check_size(shape: tuple[int, int], image: Path, label: Path) -> None:
    """Whether a label of (height, width) is as large as its image. Raises UserError."""
    try:
        with Image.open(image) as opened:
            width, height = opened.size
    except Exception as error:
        raise UserError(f"image {image} cannot be read ({reason(error)})") from error
    if tuple(shape) != (height, width):
        raise UserError(
            f"label {label} is {shape[1]} x {shape[0]}, its image {image.name} {width} x {height}"
        )


def reason(error: Exception) -> str:
    """Why a file could not be read, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]
