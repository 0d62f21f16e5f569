"""Pairs of image and text for training: noun selection (3.1, 3.5), augmentation, batches.

Every reader (one loader worker of one training process) has its own share of the pairs. Its order
and everything random about a pair follow from the seed, the epoch and the offset in the epoch
alone, so that a reader can go on anywhere and nothing has to be saved but epoch and offset.
"""

import collections
import html
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import nltk
import numpy as np
import torch
from nltk.tokenize import NLTKWordTokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms.functional import normalize, to_tensor

from clip import IMAGE_MEAN, IMAGE_STD, IMAGENET_TEMPLATES, noun_prompts, tokenize
from config import UserError
from datasets import shapes
from sources import BadSample, Folder, ShapesWorld, Shards
from support.distributed import start_worker

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
                        f"({listed(causes)}): is this the right data?"
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
                yield UserError(f"a whole epoch gave 0 usable pairs ({listed(bad)})")
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


def listed(counts: Counts) -> str:
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
