"""Two protocols of evaluation: constants and words by which a benchmark's classes are looked for.

"thesis" is section 4.1's, "training-free" the one with which SCLIP, ClearCLIP and NACLIP publish
theirs. Metrics of two protocols are no comparison: the words alone may move VOC by ten points.
"""

import json
from dataclasses import replace
from pathlib import Path

from config import MaskConfig, UserError
from datasets import Benchmark, reason
from support.tables import printable

PROTOCOLS = {
    "thesis": dict(
        short_side=448,
        window=448,
        stride=224,
        pamr_dilations=(1, 2, 4, 8, 12, 24),
        background=0.4,  # of a mask; TCL's
    ),
    "training-free": dict(
        short_side=336,
        window=224,
        stride=112,
        pamr_dilations=(8, 16),
        background=0.1,  # of a probability
        softmax_scale=40.0,
    ),
}
SCLIP_SCALES = {"voc": 65.0, "context": 50.0, "coco_object": 50.0}
# Lines as `read_names` reads them, the background's first where a benchmark has one.
TRAINING_FREE_NAMES = Path(__file__).with_name("names_training_free.json")


def completed(config: MaskConfig, dataset: str | None = None) -> MaskConfig:
    """The options with everything filled in that they leave to the protocol.

    dataset: a benchmark's name; None is any image. Raises UserError for an unknown protocol.
    """
    protocol, method = config.protocol or "thesis", config.method or "code"
    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol {protocol}: not one of {', '.join(PROTOCOLS)}")
    values = PROTOCOLS[protocol] | {"protocol": protocol, "method": method}
    if protocol == "thesis":
        values |= {} if config.pamr else {"background": 0.5}
    elif dataset == "cityscapes":
        values |= {"short_side": 560}
    elif method == "naclip" and dataset == "voc":  # taken whole, without windows
        values |= {"window": config.long_side}
    elif method == "sclip" and dataset in SCLIP_SCALES:
        values |= {"softmax_scale": SCLIP_SCALES[dataset]}
    return replace(config, **{k: v for k, v in values.items() if getattr(config, k) is None})


def described(config: MaskConfig) -> str:
    """What metrics depend on, in a line: protocol, method, prior, refinement and names."""
    mixed = config.method == "code" and config.prior_weight > 0
    prior = f" with {config.prior_weight:.0%} {config.prior} prior" if mixed else ""
    refined = "refined" if config.pamr else "not refined"
    names = config.names and printable(config.names)
    names = names or ("class" if config.protocol == "thesis" else config.protocol) + " names"
    if config.background_words:
        names += f" and {config.background_words.count(',') + 1} of the background"
    return f"{config.protocol} protocol, {config.method}{prior}, {refined}, {names}"


# --- words ----------------------------------------------------------------------------------------


def alternatives(line: str, where: str) -> list[str]:
    """The names in a line, between commas. Raises UserError for an empty one."""
    names = [" ".join(name.split()) for name in line.split(",")]
    if not all(names):
        raise UserError(f"{where}: an empty name in {line.strip()!r}: name words to look for")
    return names


def read_names(path: str) -> list[str]:
    """A file of --names: a class a line, its alternatives separated by commas."""
    try:
        text = Path(path).read_text("utf-8-sig").rstrip()
    except (OSError, ValueError) as error:
        raise UserError(f"--names {path}: cannot be read ({reason(error)})") from error
    if not text:
        raise UserError(f"--names {path}: it is empty")
    lines = text.split("\n")
    for i, line in enumerate(lines, start=1):
        alternatives(line, f"--names {path}, line {i}")
    return lines


def training_free_names(dataset: str) -> list[str]:
    """The lines of a benchmark's classes, the background's first where it has one."""
    return json.loads(TRAINING_FREE_NAMES.read_text("utf-8"))[dataset]


def with_words(config: MaskConfig, benchmark: Benchmark) -> tuple[list[str], MaskConfig]:
    """The lines of all classes but the background, and the options with the background's words.

    Raises UserError for names of another number, or background words where there is none.
    """
    names = list(benchmark.class_names)
    if config.protocol == "training-free":
        names = training_free_names(benchmark.name)
    background, names = names[: int(benchmark.background)], names[int(benchmark.background) :]
    if config.names is not None:
        given = read_names(config.names)
        if len(given) != len(names):
            rest = " (the background is none of them)" if benchmark.background else ""
            raise UserError(
                f"--names {config.names}: {len(given)} lines, but {benchmark.name} has "
                f"{len(names)} classes{rest}"
            )
        names = given
    if config.background_words is not None:
        if not benchmark.background:
            raise UserError(f"--background-words: {benchmark.name} has no background")
    elif config.protocol == "training-free":
        config = replace(config, background_words=",".join(background))
    return names, config
