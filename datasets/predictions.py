"""Label maps that another program wrote, evaluated as if they were ours."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from config import EvalConfig, MaskConfig, UserError
from datasets import UNKNOWN, Benchmark, lookup, read_label


def folder_of(folder: str, benchmark: Benchmark, config: EvalConfig) -> Path:
    """With --dataset all, every benchmark has a folder of its own."""
    return Path(folder) / benchmark.name if config.dataset == "all" else Path(folder)


def check_predictions(
    config: EvalConfig, settings: MaskConfig, benchmarks: Sequence[Benchmark]
) -> None:
    """Whether --predictions holds a label map of every image, and nothing asks for other masks.
    Raises UserError."""
    for name in ("checkpoint", "method", "protocol", "names", "background_words"):
        if getattr(settings, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--predictions and {flag}: give one of them")
    for benchmark in benchmarks:
        folder = folder_of(config.predictions, benchmark, config)
        stems = benchmark.stems[: config.limit]
        missing = [stem for stem in stems if not (folder / f"{stem}.png").is_file()]
        if missing:
            raise UserError(
                f"--predictions {folder}: {len(missing)} of the {len(stems)} label maps of "
                f"{benchmark.name} are missing, {missing[0]}.png first"
            )


def read_prediction(
    folder: Path, benchmark: Benchmark, i: int, size: tuple[int, int]
) -> np.ndarray:
    """Class indices (H, W) of the i-th image, whose size (width, height) the map must have.

    The file holds raw label ids, as --save-predictions writes them. Raises UserError naming it.
    """
    path = folder / f"{benchmark.stems[i]}.png"
    raw = read_label(path)
    if raw.shape != (size[1], size[0]):
        height, width = raw.shape
        raise UserError(f"label map {path} is {width} x {height}, its image {size[0]} x {size[1]}")
    predicted = lookup((raw_id, index) for index, raw_id in enumerate(benchmark.raw_ids))[raw]
    if (predicted == UNKNOWN).any():
        ids = ", ".join(map(str, np.unique(raw[predicted == UNKNOWN])[:5]))
        raise UserError(f"label map {path} holds ids that {benchmark.name} does not have: {ids}")
    return predicted
