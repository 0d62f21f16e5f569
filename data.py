"""Pairs of image and text for training: from files and shards to batches of tokens and images.

First where pairs come from: a folder, webdataset shards, the shapes world. Every source has
`order(seed, epoch, reader, readers, offset)`: what one of many readers reads in one epoch from an
offset on, a shuffled share of the whole that no other reader has, the same for the same arguments.
It gives pairs of the offset behind an item and the item; START is the offset of the first one;
`names` are those of its files. Items are cheap; `read(item, rng)` gives the image and the caption
of one. What cannot be used is a BadSample, raised by `read` or among the items; what was left out
before is in `found`, the parts of the line that is printed at the start.

Then what becomes of a pair: noun selection (sections 3.1, 3.5), augmentation, batches. Every reader
(one loader worker of one training process) has its own share of the pairs. Its order and everything
random about a pair follow from the seed, the epoch and the offset in the epoch alone, so that a
reader can go on anywhere and nothing has to be saved but epoch and offset.

Shards are read with the standard library's tarfile: it finds a sample's offset without reading the
sample, so that shuffling a shard and resuming in the middle of it cost headers only; webdataset
cannot resume inside an epoch.
"""

import collections
import glob
import html
import io
import itertools
import os
import posixpath
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import nltk
import numpy as np
import torch
from nltk.tokenize import NLTKWordTokenizer
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms.functional import normalize, to_tensor

from clip import IMAGE_MEAN, IMAGE_STD, IMAGENET_TEMPLATES, noun_prompts, tokenize
from config import TrainConfig, UserError
from datasets import shapes
from support.distributed import process_rank, start_worker
from support.system_files import added_by_system

# Where a sample of a shard has several images, the first of these counts.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".jfif", ".bmp", ".tif", ".tiff", ".gif", ".avif"
)  # fmt: skip
MAX_PIXELS, MIN_SIDE, MAX_CAPTION = 100_000_000, 8, 5_000  # captions in bytes


class BadSample(Exception):
    """A pair that cannot be trained on; the message is the cause it is counted under."""


def reason(error: OSError) -> str:
    """What the system says of a file, as a cause: "permission denied"."""
    return (error.strerror or "unreadable file").lower()


def several(count: int, noun: str, rest: str = "") -> str:
    """A count in words: several(3, "image", " without a caption")."""
    return f"{count} {noun}{'' if count == 1 else 's'}{rest}"


def share(
    count: int, seed: tuple[int, ...], reader: int, readers: int, first: int
) -> Iterator[tuple[int, int]]:
    """A reader's share of `count` shuffled items from the first-th on: its next offset and item."""
    mine = np.random.default_rng(seed).permutation(count)[reader::readers]
    return enumerate(mine[first:].tolist(), start=first + 1)


# --- a folder -------------------------------------------------------------------------------------


class Folder:
    """Images with captions in .txt files of the same name, at any depth.

    Links to folders are followed. Raises UserError where there is no pair at all.
    """

    START = (0,)

    def __init__(self, root: str):
        root = os.path.expanduser(root)
        if not os.path.isdir(root):
            raise UserError(
                f"--pairs {root}: no such folder (images with same-named .txt captions)"
            )
        files, unreadable = files_below(root)
        images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        texts = [path for path in files if path.suffix.lower() == ".txt"]
        caption_of = {path.with_suffix(""): path for path in texts}
        self.paths = sorted(path for path in images if path.with_suffix("") in caption_of)
        self.captions = [caption_of[path.with_suffix("")] for path in self.paths]
        self.names = [path.relative_to(root).as_posix() for path in self.paths]

        left_out = []
        if lonely := len(images) - len(self.paths):
            left_out.append(several(lonely, "image", " without a caption"))
        if unused := len(texts) - len(set(self.captions)):
            left_out.append(several(unused, ".txt file", " without an image of the same name"))
        if unreadable:
            first = f"{unreadable[0].filename}: {reason(unreadable[0])}"
            left_out.append(several(len(unreadable), "folder", f" that cannot be read ({first})"))
        if not self.paths:
            none = (
                f"--pairs {root}: none of its {len(images)} images ({', '.join(IMAGE_SUFFIXES)}) "
                "has a caption in a .txt file of the same name"
            )
            raise UserError("; ".join([none, *left_out]))
        self.found = [several(len(self.paths), "pair"), *left_out]

    def order(
        self, seed: int, epoch: int, reader: int, readers: int, offset: Sequence[int]
    ) -> Iterator[tuple[tuple[int], tuple[Path, Path]]]:
        for after, i in share(len(self.paths), (seed, epoch), reader, readers, offset[0]):
            yield (after,), (self.paths[i], self.captions[i])

    def read(self, item: tuple[Path, Path], rng: np.random.Generator) -> tuple[Image.Image, str]:
        image, caption = item
        try:
            content = caption.read_bytes()
        except OSError as error:
            raise BadSample(f"caption: {reason(error)}") from None
        return read_image(image), read_caption(content)


def files_below(root: str) -> tuple[list[Path], list[OSError]]:
    """All files of a folder at any depth, and an error for each folder that could not be read.

    Links to folders are followed after the folders themselves, each target once; not those to a
    folder that holds the link, nor what systems add.
    """
    files, unreadable, seen, roots = [], [], set(), [root]
    for start in roots:  # which grows by the links that are found
        for folder, below, names in os.walk(start, onerror=unreadable.append):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            below[:] = sorted(name for name in below if not added_by_system(name))
            links = [path for name in below if os.path.islink(path := os.path.join(folder, name))]
            roots += [p for p in links if not Path(real).is_relative_to(os.path.realpath(p))]
            files += [Path(folder, name) for name in names if not added_by_system(name)]
    return files, unreadable


# --- the shapes world -----------------------------------------------------------------------------


class ShapesWorld:
    """Scenes of the built-in world, drawn when they are read and described anew every time.

    Kept, they would save a tenth of a training step and cost every reader 185 MB.
    """

    START = (0,)

    def __init__(self, count: int, split: str = "train"):
        self.count, self.split, self.names = count, split, [split, str(count)]
        self.found = [several(count, "drawn scene")]

    def order(
        self, seed: int, epoch: int, reader: int, readers: int, offset: Sequence[int]
    ) -> Iterator[tuple[tuple[int], int]]:
        for after, i in share(self.count, (seed, epoch), reader, readers, offset[0]):
            yield (after,), i

    def read(self, item: int, rng: np.random.Generator) -> tuple[Image.Image, str]:
        scene = shapes.scene(self.split, item)
        return Image.fromarray(scene.image), shapes.caption_of(rng, scene.things, scene.surfaces)


# --- shards ---------------------------------------------------------------------------------------


class Shards:
    """img2dataset's webdataset tars: KEY.jpg|png|... and KEY.txt, other members ignored.

    patterns: paths with braces ({000..331}, numbers with leading zeros; {a,b}) and globs
    (* ? [] **), and folders of .tar files. Shards are read in shuffled order, and the samples of
    each. An offset is the number of a shard and of a sample in it: whoever goes on there reads the
    headers of one shard. Raises UserError where no shard is found.
    """

    START = (0, 0)

    def __init__(self, patterns: Sequence[str]):
        named = [path for pattern in patterns for path in expand_braces(pattern)]
        shards = {path: find_shards(path) for path in named}
        self.paths = [shard for path in named for shard in shards[path]]
        self.found = [several(len(self.paths), "shard")]
        if missing := [path for path in named if not shards[path]]:
            first = f"{missing[0]}: {why_missing(missing[0])}"
            self.found.append(f"{len(missing)} of the named ones missing ({first})")
        if not self.paths:
            raise UserError(
                f"no shard of CC3M + CC12M found (looked for --shards {' '.join(patterns)}; "
                f"{first}); --pairs DIR trains on images and captions, --preset shapes needs no "
                "data at all"
            )
        self.names = [Path(path).name for path in self.paths]

    def order(
        self, seed: int, epoch: int, reader: int, readers: int, offset: Sequence[int]
    ) -> Iterator:
        order = np.random.default_rng((seed, epoch)).permutation(len(self.paths))
        few = len(order) < readers  # then every reader takes its share of every shard
        shards = order if few else order[reader::readers]
        one_of = (reader, readers) if few else (0, 1)
        shard, first = offset
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
        except OSError as error:
            raise BadSample(f"shard: {reason(error)}") from None
        return read_image(image), read_caption(caption)


@dataclass
class ShardItem:
    """Where in a tar a sample lies: (offset, size) of its image and of its caption."""

    path: str
    image: tuple[int, int]
    caption: tuple[int, int]


def expand_braces(pattern: str) -> list[str]:
    """Every path that a{00..12}b or {a,b} stands for; several braces multiply.

    What exists is meant as it stands, whatever characters are in its name; so is ~ for one's home.
    """
    known, rest = existing_part(pattern)
    return [str(known / path) for path in _expand(rest)]


def _expand(pattern: str) -> list[str]:
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    first, last, words = match.groups()
    if words is None:
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        values = [f"{number:0{len(first)}d}" for number in numbers]
    else:
        values = words.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    paths = [path for value in values for path in _expand(before + value + after)]
    return list(dict.fromkeys(paths))  # braces in braces repeat the words beside them


def existing_part(path: str) -> tuple[Path, str]:
    """The longest beginning of a path that exists, and the rest; ~ is the home folder."""
    known = whole = Path(os.path.expanduser(path))
    while not os.path.exists(known) and known != known.parent:
        known = known.parent
    return known, str(whole.relative_to(known))


def find_shards(path: str) -> list[str]:
    """The files of a path that may hold a glob, or name a folder: then its .tar files. Sorted."""
    known, rest = existing_part(path)
    found = sorted(glob.glob(str(Path(glob.escape(str(known)), rest)), recursive=True))
    found = [path for path in found if not added_by_system(os.path.relpath(path, known))]
    shards = []
    for path in found:
        if os.path.isdir(path):
            shards += sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        else:
            shards.append(path)
    return shards


def why_missing(path: str) -> str:
    """Why `find_shards` finds nothing there."""
    known, rest = existing_part(path)
    if known.is_dir() and not os.access(known, os.R_OK | os.X_OK):
        return f"{known} cannot be read"
    if rest == ".":
        return "a folder without .tar files (compressed ones are not read)"
    if not known.is_dir():
        return f"{known} is no folder"
    return "nothing of that name" if glob.has_magic(rest) else "no such file"


# What gzip, compress, bzip2, xz, zstd, lz4 and zip begin their files with.
COMPRESSED = (
    b"\x1f\x8b", b"\x1f\x9d", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18",
    b"PK\x03\x04",
)  # fmt: skip
COMPRESSED_SHARD = "compressed shard: unpack it, a sample is found by its place in a plain .tar"


def index_shard(path: str) -> Iterator[ShardItem | BadSample]:
    """The samples of a tar, found by its headers alone; what is damaged comes as a BadSample.

    A sample is an image and a .txt of the same name, wherever in the tar they are; a name that
    comes again is another sample. Order: as the samples begin in the tar.
    """
    samples: list[tuple[str, dict]] = []  # key, and the place of each suffix
    latest: dict[str, dict] = {}  # the last of them of each key
    places: dict[str, tuple[int, int] | str | None] = {}  # of members; a symbolic link's is a name
    key, damage = "", None
    try:
        for tar, member in tar_members(path):
            name = f"{tar}/{posixpath.normpath(member.name)}"
            if added_by_system(name):
                continue
            if member.isfile():
                place = (member.offset_data, member.size)
            elif member.islnk():  # a hard link, to a member before it
                place = places.get(f"{tar}/{posixpath.normpath(member.linkname)}")
            elif member.issym():
                folder = posixpath.dirname(member.name)
                place = f"{tar}/{posixpath.normpath(posixpath.join(folder, member.linkname))}"
            else:
                continue
            places[name] = place
            key, _, suffix = name.rpartition(".")
            suffix = "." + suffix.lower()
            if suffix in IMAGE_SUFFIXES or suffix == ".txt":
                if key not in latest or suffix in latest[key]:
                    latest[key] = {}
                    samples.append((key, latest[key]))
                latest[key][suffix] = place
    except OSError as error:
        damage = f"unreadable shard: {reason(error)}"
    except Exception:  # tarfile raises ReadError, ValueError, OverflowError, MemoryError, ...
        compressed = not places and begins_compressed(path)
        damage = COMPRESSED_SHARD if compressed else "damaged shard"

    for of_key, sample in samples:
        image = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
        if image and ".txt" in sample:
            found = [follow_links(sample[suffix], places) for suffix in (image, ".txt")]
            lost = BadSample("link to a file that is not in the shard")
            yield ShardItem(path, *found) if all(found) else lost
            continue
        # KEY.mask.png beside KEY.jpg is no sample of its own; the damage took the rest of the last.
        further = webdataset_key(of_key) != of_key and webdataset_key(of_key) in latest
        cut_off = damage and of_key in (key, webdataset_key(key))
        if not further and not cut_off:
            yield BadSample("image without caption" if image else "caption without image")
    if damage or not samples:
        yield BadSample(damage or "shard without images and captions")


def tar_members(path: str) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """The members of a file of one tar or several (`cat a.tar b.tar`), with the tar's number.

    Raises OSError, and almost anything (tarfile.ReadError, ValueError, ...) for damage.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        for number in itertools.count():
            with tarfile.TarFile(fileobj=file) as tar:
                for member in tar:
                    tar.members = []  # tarfile would keep them all
                    has_data = member.isfile() or member.type not in tarfile.SUPPORTED_TYPES
                    if has_data and not 0 <= member.size <= size - member.offset_data:
                        raise tarfile.ReadError
                    yield number, member
                file.seek(tar.offset)
            # tarfile takes a broken header for the end; the real end is a block of zeros.
            block = file.read(tarfile.BLOCKSIZE)
            if any(block):
                raise tarfile.ReadError
            while block and not any(block):
                block = file.read(tarfile.BLOCKSIZE)
            if not block:
                break
            file.seek(-len(block), os.SEEK_CUR)


def follow_links(
    place: tuple[int, int] | str | None, places: dict[str, tuple[int, int] | str | None]
) -> tuple[int, int] | None:
    """Where the data of a member is, through symbolic links; None if they lead nowhere."""
    for _ in range(40):  # as many as Linux follows
        if not isinstance(place, str):
            return place
        place = places.get(place)
    return None


def webdataset_key(name: str) -> str:
    """What is before the first dot of a name, its folder with it."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def begins_compressed(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(8).startswith(COMPRESSED)


# --- images and captions --------------------------------------------------------------------------

# Texts and colour profiles of more than a megabyte are unpacked as well, up to Pillow's 64 in all.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# What EXIF's orientation asks for.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"


def read_image(file: str | Path | bytes, whole: bool = False) -> Image.Image:
    """Decode an image of any mode, a file or its content, to upright RGB. Raises BadSample.

    Large JPEGs are decoded at a half, a quarter or an eighth of their size, unless `whole`.
    """
    try:
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
    except OSError as error:
        raise BadSample(reason(error)) from None
    try:
        return decode(content, whole)
    except BadSample:
        raise
    except UnidentifiedImageError:
        raise BadSample("not an image") from None
    except Image.DecompressionBombError:
        raise BadSample("image too large") from None
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        image = decode_without_end(content, whole)
        if image is None:
            raise BadSample("corrupt image") from None
        return image


def decode(content: bytes, whole: bool) -> Image.Image:
    """Raises BadSample, and whatever Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that nobody needs here
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MAX_PIXELS:
            raise BadSample("image too large")
        if min(image.size) < MIN_SIDE:
            raise BadSample("image too small")
        if not whole:
            image.draft("RGB", (512, 512))
        image.load()
        try:
            turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
        except Exception:  # EXIF data that are no such; the image is whole
            turn = None
    return to_rgb(image if turn is None else image.transpose(turn))


def decode_without_end(content: bytes, whole: bool) -> Image.Image | None:
    """Decode a JPEG that lacks its end marker alone; None for any other image.

    With an end marker the decoder fills in what is missing without a word. But an image that lacks
    nothing stays the same whatever further data come behind its own. (So does a progressive one
    that ends exactly between two of its scans: whole, but coarse.)
    """
    if not content.startswith(JPEG_START):
        return None
    content = content.rstrip(b"\xff")  # half a marker
    try:
        image = decode(content + JPEG_END, whole)
        for seed in range(2):
            data = np.random.default_rng(seed).integers(0, 255, 256, np.uint8).tobytes()
            # A decoder may wait for one of the eight markers that data go on behind.
            further = data + b"".join(bytes([255, mark]) + data for mark in range(0xD0, 0xD8))
            if decode(content + further + JPEG_END, whole).tobytes() != image.tobytes():
                return None
    except Exception:
        return None
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any Pillow mode: wide numbers are scaled down, transparency is laid on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = scaled_grey(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def scaled_grey(image: Image.Image) -> Image.Image:
    """8-bit grey of an image of floats (mode F) or of 16- or 32-bit integers (I, I;16, ...).

    White is the first of 1 (floats only), 255 and 65,535 that holds all values, or the largest
    value where that would use less than a tenth of the range. Negative values are shifted to 0.
    NaN is black.
    """
    whites = (1, 255, 65_535) if image.mode == "F" else (255, 65_535)
    array = np.asarray(image if image.mode == "F" else image.convert("I"), np.float64)
    finite = array[np.isfinite(array)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0, 0)
    low = min(low, 0)
    array = np.nan_to_num(array, nan=low, posinf=high, neginf=low) - low
    high = high - low
    white = next((w for w in whites if w / 10 < high <= w), max(high, whites[0]))
    return Image.fromarray((array / (white / 255)).round().clip(0, 255).astype(np.uint8))


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


# --- what the options ask for ---------------------------------------------------------------------


def open_source(config: TrainConfig) -> Folder | ShapesWorld | Shards:
    """The pairs that the options ask for; process 0 prints what was found. Raises UserError."""
    if config.pairs is not None:
        source = Folder(config.pairs)
    elif config.preset == "shapes":
        source = ShapesWorld(5000)
    else:
        source = Shards(config.shards)
    if process_rank() == 0:
        print("; ".join(source.found), flush=True)
    return source


def data_checksum(source: Folder | ShapesWorld | Shards) -> int:
    """Of the names of its files, wherever these lie: data that has moved is the same."""
    return zlib.crc32("\n".join(source.names).encode(errors="surrogateescape"))


# From a caption to its words and their tags. A function of a module: loader workers may be
# spawned, and then it is pickled.
Tagger = Callable[[str], list[tuple[str, str]]]
Counts = collections.Counter[str]


# --- nouns ----------------------------------------------------------------------------------------


def select_nouns(caption: str, tagger: Tagger) -> list[str]:
    """The noun selector (sections 3.1, 3.5): the nouns of a caption, in order.

    Words tagged NN, NNS, NNP or NNPS; without repeats and single letters.
    """
    # Captions of the web hold HTML entities, some of them escaped twice ("&amp;nbsp;"): they are
    # resolved twice, as CLIP's tokeniser does. Spaces of all kinds, one of no width among them,
    # become plain ones, and a hyphen that is shown at a line's end only goes.
    caption = html.unescape(html.unescape(caption))
    caption = " ".join(caption.replace("\u200b", " ").replace("\u00ad", "").split())
    nouns: dict[str, None] = {}  # an ordered set
    for word, tag in tagger(caption):
        word = word.strip(".,;:!?'\"-*#/\\")
        if tag in ("NN", "NNS", "NNP", "NNPS") and len(word) > 1 and any(map(str.isalpha, word)):
            nouns.setdefault(word.lower())
    return list(nouns)


def shapes_tagger() -> Tagger:
    """The shapes world's vocabulary is closed: a tagger that needs no download."""
    return tag_shapes


def tag_shapes(caption: str) -> list[tuple[str, str]]:
    """Words of the shapes world, its nouns as NN and all others without a tag."""
    tagged = []
    for word in NLTKWordTokenizer().tokenize(caption):
        word = word.rstrip(".")  # of a sentence before the last one
        tagged.append((word, "NN" if word.lower() in shapes.NOUNS else ""))
    return tagged


def nltk_tagger() -> Tagger:
    """NLTK's ordinary English tagger, of words in sentences as Punkt splits them.

    The data of both is fetched where it is missing. Raises UserError for data that could not be
    fetched, and for damaged data.
    """
    # What is here first: damage is named also where nothing can be fetched.
    for package in sorted(NLTK_DATA, key=lambda package: not _nltk_copies(package)):
        _check_nltk_data(package, NLTK_DATA[package])
    return tag_english


def tag_english(caption: str) -> list[tuple[str, str]]:
    """Words of a caption and their tags, as the authors' program finds them."""
    return nltk.pos_tag(nltk.word_tokenize(caption))


def _punkt_works() -> bool:
    return nltk.sent_tokenize("This is Dr. Smith. It is late.") == [
        "This is Dr. Smith.",
        "It is late.",
    ]


def _tagger_works() -> bool:
    return ("dog", "NN") in nltk.pos_tag(["a", "dog", "on", "the", "beach"])


# What is fetched, and whether what is there does its work.
NLTK_DATA = {
    "tokenizers/punkt_tab": _punkt_works,
    "taggers/averaged_perceptron_tagger_eng": _tagger_works,
}


def _check_nltk_data(package: str, works: Callable[[], bool]) -> None:
    """Fetch a package of NLTK's data if there is none. Raises UserError."""
    name = package.rpartition("/")[2]
    reason = None
    if not _nltk_copies(package):
        try:
            nltk.download(name, quiet=True)
        except Exception as error:  # no place to write to, a proxy's answer, ...
            reason = error
    copies = _nltk_copies(package)
    if not copies:
        names = " ".join(package.rpartition("/")[2] for package in NLTK_DATA)
        raise UserError(
            f"NLTK's {package} is missing and could not be fetched: run `python -m nltk."
            f"downloader {names}` on a machine with internet, copy its nltk_data folder here and "
            "point the variable NLTK_DATA to it"
        ) from reason
    try:
        fine = works()
    except Exception as error:  # zipfile, json, codecs and NLTK raise many kinds
        fine, reason = False, error
    if not fine:
        what = "it does not do its work"
        if reason is not None:
            what = getattr(reason, "strerror", None) or type(reason).__name__
        raise UserError(
            f"NLTK's {copies[0]} cannot be read or is incomplete ({what}): delete it, and it is "
            f"fetched anew, or run `python -m nltk.downloader {name}`"
        ) from reason


def _nltk_copies(package: str) -> list[str]:
    """Where NLTK looks for a package and something lies, in its order: folders before zips."""
    places = [
        os.path.join(folder, package + end) for end in ("", ".zip") for folder in nltk.data.path
    ]
    return [place for place in places if os.path.exists(place)]


# --- batches --------------------------------------------------------------------------------------


@dataclass
class Batch:
    """b pairs with J nouns each; noun rows are noun-major, as all triplets are."""

    images: Tensor  # (b, 3, S, S), normalised
    caption_tokens: Tensor  # (b, L)
    noun_tokens: Tensor  # (J*b, L'), `clip.noun_prompts`
    knowledge_tokens: Tensor  # (J*b, L''), the nouns in hand-written templates
    noun_labels: Tensor | None = None  # (b, L), the released pseudo-labels if they are asked for
    skipped: Counts = field(default_factory=Counts)  # bad pairs by cause
    position: tuple[int, ...] = ()  # reader, and its epoch and offset after this batch

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) for k, v in self.tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        return replace(self, **{k: v.pin_memory() for k, v in self.tensors().items()})


def released_labels(caption_tokens: Tensor, nouns: Sequence[str], others: Sequence[str]) -> Tensor:
    """The release's pseudo-labels of one caption: (L,) int64.

    Every occurrence of drawn noun j's tokens gets j (from 1), those of the caption's other nouns
    0 ("none"), every other token -1 (ignored).
    """
    caption = caption_tokens.tolist()
    labels = torch.full((len(caption),), -1)
    for label, noun in [*((0, noun) for noun in others), *enumerate(nouns, start=1)]:
        tokens = tokenize([noun])[0, 1:-1].tolist()
        for i in range(len(caption) - len(tokens) + 1):
            if caption[i : i + len(tokens)] == tokens:
                labels[i : i + len(tokens)] = label
    return labels


def collate(
    images: Sequence[Tensor],
    captions: Sequence[str],
    drawn: Sequence[Sequence[str]],
    others: Sequence[Sequence[str]],
    templates: Sequence[Sequence[str]],
    context_length: int,
    with_released_labels: bool = False,
) -> Batch:
    """Tokenise b pairs. drawn: each pair's J nouns; others: its remaining nouns; templates: one
    hand-written template with a {} per drawn noun."""
    captions = tokenize(captions)
    nouns = [pair[j] for j in range(len(drawn[0])) for pair in drawn]  # noun-major
    forms = [pair[j] for j in range(len(drawn[0])) for pair in templates]
    batch = Batch(
        torch.stack(list(images)),
        captions,
        noun_prompts(nouns, context_length),
        tokenize([form.format(noun) for form, noun in zip(forms, nouns)]),
    )
    if with_released_labels:
        labels = [released_labels(*row) for row in zip(captions, drawn, others)]
        batch.noun_labels = torch.stack(labels)
    return batch


@dataclass
class PairStream(IterableDataset):
    """Endless batches of one training process, read by its loader's workers.

    start: where each reader goes on, {reader: (epoch, *offset)}, offset being what its source
    counts by; next_worker: the one that delivers the next batch; with_released_labels: whether
    batches have them.
    An epoch may be smaller than a batch. A UserError in the stream means that the data is unusable:
    more than half of the last 1,000 pairs, or all of an epoch. The training process raises it.
    """

    source: Folder | ShapesWorld | Shards
    tagger: Tagger
    pairs: int  # in a batch of this process
    nouns: int
    context_length: int
    size: int
    min_crop: float
    seed: int
    rank: int = 0
    processes: int = 1
    with_released_labels: bool = False
    start: dict[int, tuple[int, ...]] = field(default_factory=dict)
    next_worker: int = 0

    def __iter__(self) -> Iterator[Batch | UserError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # Workers deliver in turn: after resuming, the first one stands in for the next one.
        reader = self.rank * workers + (worker + self.next_worker) % workers
        readers = self.processes * workers
        epoch, *offset = self.start.get(reader, (0,))
        offset = offset or self.source.START
        samples: list[tuple] = []
        skipped: Counts = Counts()
        recent: collections.deque[str | None] = collections.deque(maxlen=1000)  # cause, if bad
        usable, epochs, bad = False, 0, Counts()  # before the first usable pair
        while True:
            whole = not any(offset)
            for after, item in self.source.order(self.seed, epoch, reader, readers, offset):
                rng = np.random.default_rng((self.seed, epoch, reader, *offset))
                offset = after
                try:
                    samples.append(self.prepare(item, rng))
                    usable = True
                    recent.append(None)
                except BadSample as cause:
                    skipped[str(cause)] += 1
                    bad[str(cause)] += 1
                    recent.append(str(cause))
                if len(recent) - recent.count(None) > 500:
                    causes = Counts(cause for cause in recent if cause)
                    yield UserError(
                        f"{causes.total()} of the last {len(recent)} pairs could not be used "
                        f"({list_counts(causes)}): is this the right data?"
                    )
                if len(samples) == self.pairs:
                    batch = collate(*zip(*samples), self.context_length, self.with_released_labels)
                    yield replace(batch, skipped=skipped, position=(reader, epoch, *offset))
                    samples, skipped = [], Counts()
            epochs += whole
            if whole and not any(offset):
                yield UserError(
                    f"fewer pairs than the {readers} loader workers of all processes: "
                    "fewer --workers need less"
                )
            # A share is another one in every epoch: so many are about one pass over all the pairs.
            elif not usable and epochs >= readers:
                yield UserError(f"a whole epoch gave 0 usable pairs ({list_counts(bad)})")
            epoch, offset = epoch + 1, self.source.START

    def prepare(self, item, rng: np.random.Generator) -> tuple:
        """Read and augment one pair, draw its nouns and templates: the arguments of `collate`."""
        if isinstance(item, BadSample):
            raise item
        image, caption = self.source.read(item, rng)
        nouns = select_nouns(caption, self.tagger)
        if len(nouns) < self.nouns:
            raise BadSample(f"fewer than {self.nouns} nouns")
        nouns = [nouns[i] for i in rng.permutation(len(nouns))]  # the first J are drawn
        chosen = rng.integers(len(IMAGENET_TEMPLATES), size=self.nouns)
        templates = [IMAGENET_TEMPLATES[i] for i in chosen]
        with torch.random.fork_rng(devices=[]):  # torch.manual_seed would seed every GPU too
            torch.default_generator.manual_seed(int(rng.integers(2**31)))
            image = RandomResizedCrop(self.size, (self.min_crop, 1.0))(image)
            image = RandomHorizontalFlip()(image)
        image = normalize(to_tensor(image), IMAGE_MEAN, IMAGE_STD)
        return image, caption, nouns[: self.nouns], nouns[self.nouns :], templates


def list_counts(counts: Counts) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in counts.most_common())


def make_loader(stream: PairStream, workers: int, pin_memory: bool) -> DataLoader:
    """A loader of ready batches; each worker has its own share of the pairs."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=start_worker,
    )
