"""Pairs of image and text for training: noun selection (3.1, 3.5), reading, augmentation, batches.

The order of the pairs and everything random about one of them follow from the seed, the pass over
the data and the pair's number alone. A reader (one loader worker of one training process) can
therefore go on at any position, and nothing about it has to be saved but that position.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

import nltk
import numpy as np
import open_clip
import torch
from nltk.tokenize import NLTKWordTokenizer
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms.functional import normalize, to_tensor

from clip import IMAGE_MEAN, IMAGE_STD, noun_prompts, tokenize
from config import UserError
from datasets import shapes

# CLIP's 80 hand-written ImageNet templates, for n'_j.
KNOWLEDGE_TEMPLATES = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS, MIN_SIDE, MAX_CAPTION = 100_000_000, 8, 5_000

Tagger = Callable[[list[str]], list[tuple[str, str]]]


class BadSample(Exception):
    """A pair that cannot be trained on; the message is the cause it is counted under."""


# --- nouns ----------------------------------------------------------------------------------------


def select_nouns(caption: str, tagger: Tagger) -> list[str]:
    """The noun selector (sections 3.1, 3.5): the nouns of a caption, in order.

    Words tagged NN, NNS, NNP or NNPS; without repeats and single letters.
    """
    nouns: dict[str, None] = {}  # an ordered set
    for word, tag in tagger(NLTKWordTokenizer().tokenize(caption)):
        word = word.strip(".,;:!?'\"-*#/\\")
        if tag in ("NN", "NNS", "NNP", "NNPS") and len(word) > 1 and any(map(str.isalpha, word)):
            nouns.setdefault(word.lower())
    return list(nouns)


def nltk_tagger() -> Tagger:
    """NLTK's ordinary English tagger; fetched if it is missing, otherwise a UserError says how."""
    try:
        nltk.pos_tag(["word"])
    except LookupError:
        nltk.download("averaged_perceptron_tagger_eng", quiet=True)
        try:
            nltk.pos_tag(["word"])
        except LookupError as error:
            raise UserError(
                "NLTK's tagger data is missing and could not be fetched: run `python -m nltk."
                "downloader averaged_perceptron_tagger_eng` on a machine with internet, copy its "
                "nltk_data folder here and point the variable NLTK_DATA to it"
            ) from error
    return nltk.pos_tag


def shapes_tagger() -> Tagger:
    """The shapes world's vocabulary is closed: a tagger that needs no download."""
    return nltk.UnigramTagger(model=dict.fromkeys(shapes.NOUNS, "NN")).tag


# --- sources of pairs: a length, and pair number i as (RGB picture, caption) ----------------------


class Folder:
    """Pictures (JPEG, PNG, WebP) with captions in .txt files of the same name, at any depth."""

    def __init__(self, root: str):
        if not Path(root).is_dir():
            raise UserError(
                f"--pairs {root}: no such folder (pictures with same-named .txt captions)"
            )
        found = sorted(p for p in Path(root).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        self.paths = [path for path in found if path.with_suffix(".txt").exists()]
        if not self.paths:
            raise UserError(
                f"--pairs {root}: none of its {len(found)} pictures (.jpg, .png, .webp) has a "
                "caption in a .txt file of the same name"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, rng: np.random.Generator) -> tuple[Image.Image, str]:
        path = self.paths[index]
        return read_image(path), read_caption(path.with_suffix(".txt").read_bytes())


class ShapesWorld:
    """Scenes of the built-in world; a scene is drawn once and described anew every time."""

    def __init__(self, count: int, split: str = "train"):
        self.count = count
        self.scene = lru_cache(maxsize=None)(lambda index: shapes.scene(split, index))

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, rng: np.random.Generator) -> tuple[Image.Image, str]:
        scene = self.scene(index)
        return Image.fromarray(scene.image), shapes.caption_of(rng, scene.things, scene.surface)


def read_image(file) -> Image.Image:
    """Decode a picture of any mode to upright RGB. Raises BadSample."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSample("picture too large")
            if min(image.size) < MIN_SIDE:
                raise BadSample("picture too small")
            image.draft("RGB", (512, 512))  # large JPEGs are decoded at a half, quarter or eighth
            return to_rgb(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except UnidentifiedImageError:
        raise BadSample("not a picture") from None
    except Image.DecompressionBombError:
        raise BadSample("picture too large") from None
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BadSample("corrupt picture") from None


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


# --- batches --------------------------------------------------------------------------------------


@dataclass
class Batch:
    """b pairs with J nouns each; noun rows are noun-major, as all triplets are."""

    images: Tensor  # (b, 3, S, S), normalised
    caption_tokens: Tensor  # (b, L)
    noun_tokens: Tensor  # (J*b, L'), `clip.noun_prompts`
    knowledge_tokens: Tensor  # (J*b, L''), the nouns in hand-written templates
    noun_labels: Tensor  # (b, L), the released pseudo-labels
    skipped: collections.Counter = field(default_factory=collections.Counter)  # bad pairs by cause
    position: tuple[int, int, int] = (0, 0, 0)  # reader, and its pass and place after this batch

    def to(self, device: torch.device) -> "Batch":
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if f.type is Tensor
        }
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        pinned = {
            f.name: getattr(self, f.name).pin_memory() for f in fields(self) if f.type is Tensor
        }
        return replace(self, **pinned)


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
) -> Batch:
    """Tokenise b pairs. drawn: each pair's J nouns; others: its remaining nouns; templates: one
    hand-written template with a {} per drawn noun."""
    captions = tokenize(captions)
    nouns = [pair[j] for j in range(len(drawn[0])) for pair in drawn]  # noun-major
    forms = [pair[j] for j in range(len(drawn[0])) for pair in templates]
    return Batch(
        torch.stack(list(images)),
        captions,
        noun_prompts(nouns, context_length),
        tokenize([form.format(noun) for form, noun in zip(forms, nouns)]),
        torch.stack([released_labels(*row) for row in zip(captions, drawn, others)]),
    )


@dataclass
class PairStream(IterableDataset):
    """Endless batches of one training process, read by its loader's workers.

    Reader k of K reads places k, k + K, ... of every pass, each pass being a new permutation of the
    source. start: places already read, {reader: (pass, place)}; first_reader: whose turn it is.
    """

    source: Folder | ShapesWorld
    tagger: Tagger
    pairs: int  # in a batch of this process
    nouns: int
    context_length: int
    size: int
    min_crop: float
    seed: int
    rank: int = 0
    processes: int = 1
    start: dict[int, tuple[int, int]] = field(default_factory=dict)
    first_reader: int = 0

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        # Workers deliver in turn: after resuming, the first one takes over whose turn it was.
        turn = ((worker.id if worker else 0) + self.first_reader) % workers
        reader, readers = self.rank * workers + turn, self.processes * workers
        samples: list[tuple] = []
        skipped: collections.Counter = collections.Counter()
        good_in_pass, history = 0, collections.deque(maxlen=1000)
        pass_, place = self.start.get(reader, (0, reader))
        while True:
            order = np.random.default_rng((self.seed, pass_)).permutation(len(self.source))
            while place < len(order):
                index = int(order[place])
                place += readers
                try:
                    samples.append(self.prepare(index, pass_))
                    good_in_pass += 1
                    history.append(0)
                except BadSample as cause:
                    skipped[str(cause)] += 1
                    history.append(1)
                    if sum(history) > 500:
                        yield UserError(
                            f"{sum(history)} of the last {len(history)} pairs could not be used "
                            f"({_listed(skipped)}): is this the right data?"
                        )
                if len(samples) == self.pairs:
                    batch = collate(*zip(*samples), self.context_length)
                    yield replace(batch, skipped=skipped, position=(reader, pass_, place))
                    samples, skipped = [], collections.Counter()
            if good_in_pass < 1:
                cause = (
                    _listed(skipped)
                    if skipped
                    else f"only {len(order)} pairs for {readers} readers"
                )
                yield UserError(f"a whole pass over the data gave no usable pair ({cause})")
            pass_, place, good_in_pass = pass_ + 1, reader, 0

    def prepare(self, index: int, pass_: int) -> tuple:
        """Read and augment one pair, draw its nouns and templates: the arguments of `collate`."""
        rng = np.random.default_rng((self.seed, pass_, index))
        image, caption = self.source.read(index, rng)
        nouns = select_nouns(caption, self.tagger)
        if len(nouns) < self.nouns:
            raise BadSample(f"fewer than {self.nouns} nouns")
        nouns = [nouns[i] for i in rng.permutation(len(nouns))]
        templates = [KNOWLEDGE_TEMPLATES[i] for i in rng.integers(80, size=self.nouns)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**31)))
            image = RandomResizedCrop(self.size, (self.min_crop, 1.0))(image)
            image = RandomHorizontalFlip()(image)
        image = normalize(to_tensor(image), IMAGE_MEAN, IMAGE_STD)
        return image, caption, nouns[: self.nouns], nouns[self.nouns :], templates


def _listed(counts: collections.Counter) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in counts.most_common())


def make_loader(stream: PairStream, workers: int, pin_memory: bool) -> DataLoader:
    """A loader of ready batches; each worker has its own share of the pairs."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=4 if workers else None,
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
