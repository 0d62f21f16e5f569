"""Where pairs of image and text come from: a folder, webdataset shards, the shapes world.

Every source has `order(seed, epoch, reader, readers, offset)`: what one of many readers reads in
one epoch from an offset on, a shuffled share of the whole that no other reader has, the same for
the same arguments. It gives pairs of the offset behind an item and the item; START is the offset of
the first one; `names` are those of its files. Items are cheap; `read(item, rng)` gives the image
and the caption of one. What cannot be used is a BadSample, raised by `read` or among the items.

Shards are read with the standard library's tarfile: it finds a sample's offset without reading the
sample, so that shuffling a shard and resuming in the middle of it cost headers only; webdataset
cannot resume inside an epoch.
"""

import glob
import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from config import TrainConfig, UserError
from datasets import shapes
from support.distributed import process_rank

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS, MIN_SIDE, MAX_CAPTION = 100_000_000, 8, 5_000  # captions in bytes


class BadSample(Exception):
    """A pair that cannot be trained on; the message is the cause it is counted under."""


def share(
    count: int, seed: tuple[int, ...], reader: int, readers: int, first: int
) -> Iterator[tuple[int, int]]:
    """A reader's share of `count` shuffled items from the first-th on: its next offset and item."""
    mine = np.random.default_rng(seed).permutation(count)[reader::readers]
    return enumerate(mine[first:].tolist(), start=first + 1)


class Folder:
    """Images (JPEG, PNG, WebP) with captions in .txt files of the same name, at any depth."""

    START = (0,)

    def __init__(self, root: str):
        if not Path(root).is_dir():
            raise UserError(
                f"--pairs {root}: no such folder (images with same-named .txt captions)"
            )
        found = sorted(p for p in Path(root).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        self.paths = [path for path in found if path.with_suffix(".txt").is_file()]
        if not self.paths:
            raise UserError(
                f"--pairs {root}: none of its {len(found)} images (.jpg, .png, .webp) has a "
                "caption in a .txt file of the same name"
            )
        self.names = [path.relative_to(root).as_posix() for path in self.paths]

    def order(
        self, seed: int, epoch: int, reader: int, readers: int, offset: Sequence[int]
    ) -> Iterator[tuple[tuple[int], Path]]:
        for after, i in share(len(self.paths), (seed, epoch), reader, readers, offset[0]):
            yield (after,), self.paths[i]

    def read(self, item: Path, rng: np.random.Generator) -> tuple[Image.Image, str]:
        try:
            caption = item.with_suffix(".txt").read_bytes()
        except OSError:
            raise BadSample("unreadable file") from None
        return read_image(item), read_caption(caption)


class ShapesWorld:
    """Scenes of the built-in world; a scene is drawn once and described anew every time."""

    START = (0,)

    def __init__(self, count: int, split: str = "train"):
        self.count, self.names = count, [split, str(count)]
        self.scene = lru_cache(maxsize=None)(lambda index: shapes.scene(split, index))

    def order(
        self, seed: int, epoch: int, reader: int, readers: int, offset: Sequence[int]
    ) -> Iterator[tuple[tuple[int], int]]:
        for after, i in share(self.count, (seed, epoch), reader, readers, offset[0]):
            yield (after,), i

    def read(self, item: int, rng: np.random.Generator) -> tuple[Image.Image, str]:
        scene = self.scene(int(item))
        return Image.fromarray(scene.image), shapes.caption_of(rng, scene.things, scene.surfaces)


class Shards:
    """img2dataset's webdataset tars: KEY.jpg|png|jpeg|webp and KEY.txt, other members ignored.

    patterns: paths with braces ({000..331}, numbers with leading zeros) and globs (* ? []). Shards
    are read in shuffled order, and the samples of each. An offset is the number of a shard and of a
    sample in it: whoever goes on there reads the headers of one shard.
    """

    START = (0, 0)

    def __init__(self, patterns: Sequence[str]):
        expanded = [path for pattern in patterns for path in expand_braces(pattern)]
        found = [sorted(glob.glob(path)) if glob.has_magic(path) else [path] for path in expanded]
        self.paths = [path for group in found for path in group if Path(path).is_file()]
        self.missing = sum(len(group) for group in found) - len(self.paths)
        if not self.paths:
            raise UserError(
                f"no shard of CC3M + CC12M found (looked for --shards {' '.join(patterns)}); "
                "--pairs DIR trains on images and captions, --preset shapes needs no data at all"
            )
        self.names = [Path(path).name for path in self.paths]

    def order(
        self, seed: int, epoch: int, reader: int, readers: int, offset: Sequence[int]
    ) -> Iterator:
        order = np.random.default_rng((seed, epoch)).permutation(len(self.paths))
        few = len(order) < readers  # then every reader takes its share of every shard
        shards = order if few else order[reader::readers]
        one_of = (reader, readers) if few else (0, 1)
        # A checkpoint of an earlier version counted samples: that epoch is read again.
        shard, first = offset if len(offset) == 2 else self.START
        for number in range(shard, len(shards)):
            samples = list(index_shard(self.paths[shards[number]]))
            for after, i in share(len(samples), (seed, epoch, number), *one_of, first):
                yield (number, after), samples[i]
            first = 0

    def read(self, item: "ShardItem", rng: np.random.Generator) -> tuple[Image.Image, str]:
        try:
            with open(item.path, "rb") as file:
                file.seek(item.caption[0])
                caption = file.read(item.caption[1])
                file.seek(item.image[0])
                image = file.read(item.image[1])
        except OSError:
            raise BadSample("unreadable file") from None
        return read_image(io.BytesIO(image)), read_caption(caption)


def open_source(config: TrainConfig) -> Folder | ShapesWorld | Shards:
    """The pairs that the options ask for. Raises UserError."""
    if config.pairs is not None:
        return Folder(config.pairs)
    if config.preset == "shapes":
        return ShapesWorld(5000)
    shards = Shards(config.shards)
    if shards.missing and process_rank() == 0:
        print(f"{len(shards.paths)} shards found, {shards.missing} of the named ones are missing")
    return shards


# --- shards ---------------------------------------------------------------------------------------


@dataclass
class ShardItem:
    """Where in a tar a sample lies: (offset, size) of its image and of its caption."""

    path: str
    image: tuple[int, int]
    caption: tuple[int, int]


def expand_braces(pattern: str) -> list[str]:
    """Every path that a{00..12}b stands for; several braces multiply."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match[1], match[2]
    numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for n in numbers for path in expand_braces(before + n + after)]


def index_shard(path: str) -> Iterator[ShardItem | BadSample]:
    """The samples of a tar, found by its headers alone; what is damaged comes as a BadSample."""
    key, parts = None, {}

    def sample(damaged: bool = False) -> Iterator[ShardItem | BadSample]:
        image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
        if image and ".txt" in parts:
            yield ShardItem(path, image, parts[".txt"])
        elif (image or ".txt" in parts) and not damaged:
            yield BadSample("image without caption" if image else "caption without image")

    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # tarfile would keep them all
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if (folder, stem) != key:
                    yield from sample()
                    key, parts = (folder, stem), {}
                if member.isfile():
                    parts["." + suffix.lower()] = (member.offset_data, member.size)
            # tarfile takes a broken header for the end; the real end is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(512)) or size == 0:
                raise tarfile.ReadError
        yield from sample()
    except tarfile.ReadError:
        yield from sample(damaged=True)
        yield BadSample("damaged shard")
    except OSError:
        yield BadSample("unreadable shard")


# --- images and captions --------------------------------------------------------------------------


def read_image(file, whole: bool = False) -> Image.Image:
    """Decode an image of any mode to upright RGB. Raises BadSample.

    Large JPEGs are decoded at a half, a quarter or an eighth of their size, unless `whole`.
    """
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample("image too large")
            if min(image.size) < MIN_SIDE:
                raise BadSample("image too small")
            if not whole:
                image.draft("RGB", (512, 512))
            return to_rgb(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except UnidentifiedImageError:
        raise BadSample("not an image") from None
    except Image.DecompressionBombError:
        raise BadSample("image too large") from None
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BadSample("corrupt image") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any Pillow mode: 16-bit grey is scaled down, transparency is laid on white."""
    if image.mode.startswith("I"):
        image = image.convert("I")
        array = np.asarray(image, np.float32)
        image = Image.fromarray(
            (array / (257 if array.max() > 255 else 1)).clip(0, 255).astype(np.uint8)
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_caption(content: bytes) -> str:
    """Decode a caption. Raises BadSample for an empty, enormous or non-UTF-8 one."""
    if len(content) > MAX_CAPTION:
        raise BadSample("caption too long")
    try:
        caption = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadSample("caption not UTF-8") from None
    if not caption:
        raise BadSample("caption empty")
    return caption
