"""Plain dataclasses shared by the scripts, their presets, and how they become a command line."""

import argparse
import math
import sys
import types
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin


class UserError(Exception):
    """A mistake of the user: the message says what, where, and what to do."""


def option(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    positional: bool = False,
) -> Any:
    """A dataclass field with its line of --help and, for numbers, the range that makes sense.

    positional: what stands on the command line without a --name before it.
    """
    metadata = {"help": help, "low": low, "high": high, "positional": positional}
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """What the network is. Stored in every checkpoint."""

    clip: str = option("ViT-B-16-quickgelu", "an open_clip ViT, or 'shapes' for the built-in one")
    clip_weights: str = option(
        "openai", "open_clip tag, a local file, or 'none' for random weights"
    )
    context_init: str = option(
        "A photo of" + " x" * 13, "text whose tokens start the learned context"
    )
    upsampling_blocks: int = option(2, "image segmenter: blocks that double the mask grid", low=0)
    convs_per_block: int = option(
        1, "residual convolutions per block (TCL's own release: 2)", low=1
    )
    text_layers: int = 2  # text segmenter: learned residual attention blocks
    mask_scale: float = option(10.0, "start of w in the soft mask sigmoid(w s + b)")
    mask_bias: float = option(-2.5, "start of b in the soft mask sigmoid(w s + b)")
    word_scale: float = 10.0  # start of w in Eq. 3.2
    word_bias: float = 0.0  # start of b in Eq. 3.2
    co_decomposition: bool = option(
        True, "ablation C: decompose the text too and align (section 3.4)"
    )
    text_attention: str = option(
        "words", "what the text segmenter attends to: a caption's 'words', or 'all' 77 (release)"
    )
    word_prompt: bool = option(True, "ablation W: learn P^t of Eq. 3.5 (otherwise zeros)")
    region_prompt: bool = option(True, "ablation R: learn P^v of Eq. 3.4 (otherwise zeros)")
    word_segments: bool = option(
        True, "align with word segments (otherwise with bare noun embeddings)"
    )

    @property
    def cells_per_patch(self) -> int:
        """How many cells of the mask grid lie along a patch: every upsampling block doubles it."""
        return 2**self.upsampling_blocks


@dataclass
class LossConfig:
    """Weights of the total loss and of the terms inside L_seg^v and L_seg^t."""

    lambda_kg: float = option(8.0, "noun embedding loss, Eq. 3.1")
    lambda_seg_v: float = option(1.0, "image segmentation loss")
    lambda_seg_t: float = option(1.0, "text segmentation loss")
    lambda_hcl: float = option(0.5, "highlighted region-word contrastive loss, Eq. 3.7")
    image_contrast: float = option(0.1, "in L_seg^v: highlighted image against noun")
    region_contrast: float = option(0.1, "in L_seg^v: mask-pooled features against noun")
    area: float = option(0.5, "in L_seg^v: area of the masks of an image's own nouns")
    area_prior: float = option(0.25, "share of the image that an own noun should cover")
    area_others: float = option(0.05, "in L_seg^v: area of the masks of all other nouns (prior 0)")
    smooth_features: float = 1.0  # in L_seg^v: total variation of the image embedding
    smooth_masks: float = 1.0  # in L_seg^v: total variation of the soft masks
    none_weight: float = 0.5  # in L_seg^t: weight of words that belong to no noun
    pseudo_labels: str = option(
        "thesis", "in L_seg^t: 'thesis' (arg-max) or 'release' (noun tokens)"
    )


@dataclass
class TrainConfig:
    """How it is trained (section 3.5)."""

    preset: str = option("thesis", "named set of defaults: thesis, release, shapes")
    pairs: str | None = option(None, "folder of images with same-named .txt captions")
    shards: tuple[str, ...] = option(
        ("data/cc3m-wds/*.tar", "data/cc12m-wds/*.tar"),
        "webdataset shards of pairs; braces and globs",
    )
    out: str = option("out/train", "folder for the checkpoint, the configuration and the log")
    init: str | None = option(
        None, "start from this checkpoint: one of train.py, or the authors' (its network is used)"
    )
    steps: int = option(50_000, "optimizer steps", low=1)
    batch_size: int = option(64, "image-text pairs in a step, over all processes", low=2)
    nouns: int = option(2, "J, nouns drawn per pair", low=1)
    lr: float = option(5e-6, "peak learning rate", low=0)
    final_lr: float = option(
        0.125, "learning rate at the end, as a share of the peak", low=0, high=1
    )
    warmup: float = option(0.3, "share of the steps with linear warm-up", low=0, high=1)
    unfreeze: float = option(
        0.6, "share of the steps before the last visual block's copy trains", low=0, high=1
    )
    weight_decay: float = option(
        0.05, "AdamW; none on biases, LayerNorms, prompts and scalars", low=0
    )
    decay_prompts: bool = option(
        False, "weight decay on prompts, context and scalars as well (release)"
    )
    max_grad_norm: float = 5.0  # gradient clipping
    min_crop: float = 0.9  # least share of the image that a random crop keeps
    seed: int = option(0, "everything random follows from it", low=0)
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: a GPU if there is one)")
    precision: str = option(
        "auto", "float32, bfloat16 or float16 (auto: float32 on a CPU, else what the GPU can)"
    )
    workers: int = option(
        2, "data loading processes per training process; 0 loads in the main one", low=0
    )
    log_every: int = option(10, "steps between two lines of log.jsonl", low=1)
    checkpoint_every: int = option(1000, "steps between two checkpoints", low=1)
    keep_steps: tuple[int, ...] = option((), "keep the model after each of these: step-N.pt")
    resume: bool = option(False, "go on from last.pt in --out")
    timeout: int = option(60, "minutes that processes wait for each other", low=1)
    eval_dataset: tuple[str, ...] = option(
        (), "benchmarks to evaluate on, or 'all' six; the best average goes to best.pt"
    )
    eval_root: str = option("data", "folder with the raw benchmark folders")
    eval_every: int = option(5000, "steps between two evaluations (at a checkpoint)", low=1)
    eval_limit: int | None = option(None, "evaluate on the first N images only", low=1)
    tensorboard: bool = option(False, "write TensorBoard files into --out too")


@dataclass
class MaskConfig:
    """How masks of given words are made (section 4.1); the constants are the released programs'."""

    checkpoint: str | None = option(None, "trained model: of train.py or a released one")
    method: str = option("code", "'code', or 'maskclip': the frozen prior branch alone")
    names: str | None = option(
        None, "file of words, a class a line, alternatives by commas: the best one counts"
    )
    background_words: str | None = option(
        None, "words by commas; where one of them is the best, a pixel is background"
    )
    clip: str = option("ViT-B-16-quickgelu", "CLIP of a method without training")
    clip_weights: str | None = option(
        None,
        "CLIP's weights: open_clip tag, local file or 'none'; default: where the checkpoint's were "
        "in training, without a checkpoint 'openai'",
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: a GPU if there is one)")
    precision: str = option("float32", "of the matrix products: float32, bfloat16 or float16")
    background: float | None = option(
        None, "threshold of the background; default: 0.4, without PAMR 0.5", low=0, high=1
    )
    pamr: bool = option(True, "refine the masks with PAMR")
    pamr_dilations: tuple[int, ...] = option((1, 2, 4, 8, 12, 24), "distances of PAMR's neighbours")
    prior_weight: float = option(0.3, "share of the prior branch in the masks", low=0, high=1)
    prior_scale: float = option(10.0, "prior branch: w in sigmoid(w (s - b))")
    prior_bias: float = option(0.25, "prior branch: b in sigmoid(w (s - b))")
    short_side: int = option(448, "images are resized to this short side", low=1)
    long_side: int = option(2048, "or to this long side if it would be longer", low=1)
    window: int = option(448, "side of a sliding window", low=1)
    stride: int = option(224, "distance of two windows", low=1)

    @property
    def threshold(self) -> float:
        """Of the background: what no mask exceeds is none of the words. TCL's."""
        if self.background is not None:
            return self.background
        return 0.4 if self.pamr else 0.5


@dataclass
class EvalConfig:
    """What is evaluated, and what is written."""

    dataset: str | None = option(
        None, "a benchmark, or 'all' for the six of the thesis's table 4.1; needed"
    )
    root: str = option("data", "folder with the raw benchmark folders")
    predictions: str | None = option(
        None, "folder of label maps to be evaluated, as --save-predictions writes them"
    )
    json: str | None = option(None, "file to write the metrics to")
    save_predictions: str | None = option(None, "folder for label maps as indexed PNGs, raw ids")
    show: int = option(0, "write N images: image, ground truth, prediction, legend", low=0)
    show_dir: str = option("out/show", "folder for the images of --show")
    limit: int | None = option(
        None, "evaluate the first N images only; the metrics are partial", low=1
    )
    timeout: int = option(60, "minutes that processes wait for each other", low=1)


# --- presets --------------------------------------------------------------------------------------

# What differs from the thesis: in the authors' released program, as far as it can be switched
# (docs/differences.md); in the shapes world, images of 96 pixels and a CLIP of high cosines.
TRAIN_PRESETS = {
    "thesis": {},
    "release": dict(
        lambda_kg=4.0,  # its L_kg is 8 (1 - cos), and |n - n'|^2 = 2 (1 - cos)
        pseudo_labels="release",
        text_attention="all",
        decay_prompts=True,
    ),
    "shapes": dict(
        clip="shapes",
        steps=400,
        batch_size=16,
        lr=3e-3,
        final_lr=0.1,
        warmup=0.1,
        context_init="a photo of a",
        mask_scale=20.0,
        mask_bias=-6.5,
        image_contrast=0.5,
        region_contrast=0.5,
        lambda_seg_t=0.5,
        area=2.0,
        area_others=10.0,
        area_prior=0.3,
        workers=1,
    ),
}
MASK_PRESETS = {
    "shapes": dict(
        clip="shapes",
        short_side=96,
        window=96,
        stride=96,
        pamr_dilations=(1, 2, 4, 8),
        prior_scale=15.0,
    ),
}


def settle(model: ModelConfig, loss: LossConfig, given: Collection[str] = ()) -> None:
    """Record what an ablation leaves out, so that a configuration says what was done.

    Without co-decomposition there is no text segmenter and neither prompt; with bare nouns instead
    of word segments (section 4.4) no text segmenter and no P^t. given: names of the options on the
    command line. Raises UserError for one that asks for what another leaves out.
    """
    off: dict[str, Any] = {}
    if not model.word_segments:
        off, cause = {"word_prompt": False, "lambda_seg_t": 0.0}, "word_segments"
    if not model.co_decomposition:
        off |= {"word_prompt": False, "region_prompt": False, "word_segments": False}
        off |= {"lambda_seg_t": 0.0, "lambda_hcl": 0.0}
        cause = "co_decomposition"
    for name, value in off.items():
        config = model if hasattr(model, name) else loss
        if name in given and getattr(config, name) != value:
            asked, flag = name.replace("_", "-"), cause.replace("_", "-")
            raise UserError(f"--{asked} asks for what --no-{flag} leaves out: give one of them")
        setattr(config, name, value)


# --- the command line -----------------------------------------------------------------------------


def parse(
    description: str,
    *configs: type,
    presets: dict[str, dict] | None = None,
    words: Sequence[str] | None = None,
) -> tuple:
    """Turn dataclasses into a command line and return their instances.

    words: what stands on it; default: this program's own arguments.

    Every field with an `option` becomes one of its name (`batch_size` -> --batch-size) with its
    explanation in --help; a bool becomes --name / --no-name (no_name: --no-name alone). `presets`
    maps values of --preset (or --dataset, whichever of the two exists) to other defaults, which
    the command line still overrides.
    Wrong options and values print one line on stderr and exit with 2.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=description, formatter_class=raw, allow_abbrev=False)
    names = [f.name for config in configs for f in fields(config)]
    chooser = "preset" if "preset" in names else "dataset"
    for config in configs:
        group = parser.add_argument_group(config.__doc__.splitlines()[0].rstrip("."))
        for f in fields(config):
            _add_option(group, f)
    arguments = vars(parser.parse_intermixed_args(words))
    chosen = arguments.get(chooser)
    if presets and chosen in presets:
        parser.set_defaults(**presets[chosen])
        arguments = vars(parser.parse_intermixed_args(words))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    made = [
        config(**{f.name: values[f.name] for f in fields(config) if f.name in values})
        for config in configs
    ]
    for config in made:
        try:
            check_ranges(config)
        except UserError as error:
            parser.error(str(error))
    return tuple(made)


def chosen(name: str, words: Sequence[str] | None = None) -> str | None:
    """An option's value on the command line, where it must be known before `parse`."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    chooser.add_argument(f"--{name}")
    try:
        return getattr(chooser.parse_known_args(words)[0], name)
    except argparse.ArgumentError:  # no value: `parse` says so
        return None


def given_options(words: Sequence[str] | None = None) -> set[str]:
    """The options that stand on the command line, --no-word-prompt as "no_word_prompt".

    words: what stands on it; default: this program's own arguments.
    """
    words = sys.argv[1:] if words is None else words
    words = words[: words.index("--")] if "--" in words else words
    flags = (word.split("=")[0] for word in words if word.startswith("--"))
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}


def check_ranges(config: Any) -> None:
    """Whether every number is finite and in its field's range. Raises UserError."""
    for f in fields(config):
        low, high = f.metadata.get("low"), f.metadata.get("high")
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} {value}: must be a finite number")
        if value is not None and low is not None and value < low:
            raise UserError(f"{flag} {value}: must be at least {low}")
        if value is not None and high is not None and value > high:
            raise UserError(f"{flag} {value}: must be at most {high}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, without the usage block before it."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists all options)\n")


def _add_option(group: argparse._ArgumentGroup, f) -> None:
    if "help" not in f.metadata:  # a constant that no one turns
        return
    flag = "--" + f.name.replace("_", "-")
    kind, default, text = f.type, f.default, f.metadata["help"]
    shown = "" if default is None else f" [{default}]"
    if get_origin(kind) is types.UnionType:  # "X | None"
        kind = next(t for t in get_args(kind) if t is not type(None))
    if f.metadata["positional"]:
        group.add_argument(f.name, nargs="*", default=default, help=text)
    elif kind is bool:
        action = "store_true" if f.name.startswith("no_") else argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, default=default, help=text + shown)
    elif get_origin(kind) is tuple:
        group.add_argument(
            flag, type=get_args(kind)[0], nargs="+", default=default, help=text + shown
        )
    else:
        group.add_argument(flag, type=kind, default=default, help=text + shown)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a UserError becomes one line on stderr and exit code 2."""
    # A file's name may hold what the terminal's encoding does not: it is printed with escapes.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
