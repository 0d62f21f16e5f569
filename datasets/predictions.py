"""Label maps that another program wrote, evaluated as if they were ours."""

from pathlib import Path

import numpy as np

from config import UserError
from datasets import UNKNOWN, Benchmark, lookup, read_label


def check_predictions(folder: Path, benchmark: Benchmark) -> None:
    """Whether a folder has STEM.png for every image of a benchmark. Raises UserError."""
    missing = [stem for stem in benchmark.stems if not (folder / f"{stem}.png").is_file()]
    if missing:
        raise UserError(
            f"--predictions {folder}: {len(missing)} of the {len(benchmark.stems)} label maps of "
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
