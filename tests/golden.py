"""The golden values of tests/golden (its README explains them): reading, and packing.

python tests/golden.py pack SOURCE TARGET    # SOURCE: a folder of whole .npz files

Most of a tiny network's tensors are copies of one another, zero, or what torch drew for a new
layer. A packed NAME.npz therefore holds only the other arrays, and a JSON text named `recipes`:
{array's name: recipe}. A recipe is one of

    "OTHER"                                               the array named OTHER again
    {"shape": [...], "rows": [...]}                       what is stored are these rows, others zero
    {"shape": [...], "seed": S, "at": A, "bound": B}      torch's uniform_(-B, B) from S's A-th draw
"""

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

DRAWS = 8_000_000  # of a seed: more than a tiny network's initialisation takes


def folder() -> Path:
    """Where the golden values are: CODE_GOLDEN if that is set, else tests/golden."""
    return Path(os.environ.get("CODE_GOLDEN", Path(__file__).with_suffix("")))


def load(name: str, source: Path | None = None) -> dict[str, np.ndarray]:
    """All arrays of NAME.npz in `folder()` (or in `source`), the file being packed or whole."""
    with np.load((source or folder()) / f"{name}.npz") as file:
        stored = dict(file)
    arrays: dict[str, np.ndarray] = {}
    recipes = json.loads(str(stored.pop("recipes", "{}")))
    for key, recipe in recipes.items():
        if recipe is None:
            arrays[key] = stored.pop(key)
        elif isinstance(recipe, str):
            arrays[key] = arrays[recipe]
        elif "rows" in recipe:
            arrays[key] = np.zeros(recipe["shape"], stored[key].dtype)
            arrays[key][recipe["rows"]] = stored.pop(key)
        else:
            arrays[key] = uniform(**recipe)
    return arrays | stored


def uniform(shape: list[int], seed: int, at: int, bound: float) -> np.ndarray:
    """What torch's `uniform_(-bound, bound)` gave, to the bit, on every machine.

    torch multiplies and adds with one rounding; in double precision both are exact, and the
    conversion rounds once. The draws are numpy's, which never change for a given seed.
    """
    count = int(np.prod(shape))
    low, width = -np.float32(bound), np.float32(bound) - -np.float32(bound)
    values = draws(seed)[at : at + count] * (2.0**-24 * float(width)) + float(low)
    return values.astype(np.float32).reshape(shape)


@functools.lru_cache(maxsize=1)
def draws(seed: int) -> np.ndarray:
    """The 24 bits that torch makes a float of: its generator is numpy's, the Mersenne Twister."""
    return np.frombuffer(np.random.RandomState(seed).bytes(4 * DRAWS), "<u4") & 0xFFFFFF


# --- packing --------------------------------------------------------------------------------------


def pack(source: Path, target: Path) -> None:
    """Write `source` into `target`, smaller, and check that the arrays come back."""
    for path in sorted(path for path in source.rglob("*") if path.suffix not in ("", ".md")):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            pack_file(path, copy)
            name = str(copy.relative_to(target).with_suffix(""))
            before, after = load(name, source), load(name, target)
            assert list(before) == list(after)
            for key, array in before.items():
                same = array.dtype == after[key].dtype and array.shape == after[key].shape
                # Bit for bit, but for the signs of zeros in rows left out: -0.0 + 0 is 0.0.
                assert same and (array + 0).tobytes() == (after[key] + 0).tobytes(), (name, key)
        elif path.name.endswith(("_color.png", "_instanceIds.png")):
            Image.new("L", (1, 1)).save(copy)  # Cityscapes has them; nothing should read them
        else:
            shutil.copyfile(path, copy)


def pack_file(path: Path, copy: Path) -> None:
    """One .npz; a file in which nothing can be left out is copied as it is."""
    stored, recipes, first = {}, {}, {}
    for key, array in np.load(path).items():
        contents = (array.dtype.str, array.shape, array.tobytes())
        recipes[key] = None
        if array.size > 16 and contents in first:
            recipes[key] = first[contents]
            continue
        first[contents] = key
        if recipe := drawn(array):
            recipes[key] = recipe
        elif key.endswith("token_embedding.weight"):
            rows = np.flatnonzero(array.any(1))
            recipes[key] = {"shape": array.shape, "rows": rows.tolist()}
            stored[key] = array[rows]
        else:
            stored[key] = array
    if any(recipes.values()):
        np.savez_compressed(copy, **stored, recipes=json.dumps(recipes))
    else:
        shutil.copyfile(path, copy)


def drawn(array: np.ndarray) -> dict | None:
    """The recipe of a weight that is as torch initialised it, after one of the first ten seeds."""
    if array.ndim < 2 or array.size < 1000:
        return None
    fan_in = array[0].size
    kaiming, xavier = fan_in**-0.5, (6 / (len(array) + fan_in)) ** 0.5
    for bound in (bound for bound in (kaiming, xavier) if abs(array).max() <= 1.001 * bound):
        first = (float(array.flat[0]) / bound + 1) * 2**23
        for seed in range(10):
            for at in np.flatnonzero(abs(draws(seed) - first) < 4).tolist():
                recipe = {"shape": array.shape, "seed": seed, "at": at, "bound": bound}
                if at + array.size <= DRAWS and uniform(**recipe).tobytes() == array.tobytes():
                    return recipe
    return None


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "pack":
        sys.exit("usage: python tests/golden.py pack SOURCE TARGET")
    pack(Path(sys.argv[2]), Path(sys.argv[3]))
