"""Label maps that another program wrote, evaluated as if they were ours."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from config import EvalConfig, MaskConfig, UserError
from datasets import (
    Benchmark,
    check_palette,
    ids_in,
    lookup,
    missing_files,
    read_label,
    unknown_ids,
)


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
        if missing := missing_files(folder / f"{stem}.png" for stem in stems):
            raise UserError(
                f"--predictions {folder}: {len(missing)} of the {len(stems)} label maps of "
                f"{benchmark.name} are missing, {missing[0].name} first"
            )


def read_prediction(
    folder: Path, benchmark: Benchmark, i: int, size: tuple[int, int]
) -> np.ndarray:
    """Class indices (H, W) of the i-th image, whose size (width, height) the map must have.

    The file holds raw label ids, as --save-predictions writes them. Raises UserError naming it.
    """
    path = folder / f"{benchmark.stems[i]}.png"
    raw, palette = read_label(path)
    if raw.shape != (size[1], size[0]):
        height, width = raw.shape
        raise UserError(f"label map {path} is {width} x {height}, its image {size[0]} x {size[1]}")
    table = lookup((raw_id, index) for index, raw_id in enumerate(benchmark.raw_ids))
    check_palette(path, raw, palette, benchmark.palette, table, strict=False)
    present = ids_in(raw)
    if unknown := unknown_ids(present, table):
        ids = ", ".join(map(str, sorted(unknown)[:5]))
        own, count = benchmark.raw_ids, len(benchmark.raw_ids)
        hint = f"; its own are {own[0]} to {own[-1]}"
        if own != tuple(range(count)) and max(present - {255}, default=count) < count:
            hint += f"; these seem to be class indices, 0 to {count - 1}"
        raise UserError(
            f"label map {path} holds ids that {benchmark.name} does not have: {ids}{hint}"
        )
    return table[raw]
