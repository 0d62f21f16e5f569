"""The page of `segment.py --html`: images, regions and words in one file, to be explored."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from support.draw import enlargement, palette
from support.files import whole_file


def data_uri(image: Image.Image, form: str) -> str:
    """An image inside a page, as "PNG", "WEBP" (both exact, the latter smaller) or "JPEG"."""
    file = io.BytesIO()
    image.save(file, form, quality=88, optimize=True, lossless=True)
    return f"data:image/{form.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def page_item(
    name: str,
    image: Image.Image,
    best: np.ndarray,
    index: np.ndarray,
    names: Sequence[str],
    threshold: float,
) -> dict:
    """What page.html shows of one image, at 1,024 pixels at most.

    best, index: (H, W), the highest score and whose it is; threshold: what is below is background.
    """
    scale = min(1.0, 1024 / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    rows = ((np.arange(height) + 0.5) / height * len(index)).astype(int)
    columns = ((np.arange(width) + 0.5) / width * index.shape[1]).astype(int)
    here = np.ix_(rows, columns)
    # Red: the best query; green and blue: its score in 16 bits, which the page's threshold cuts.
    quantised = (best[here] * 65535).round().astype(np.uint16)
    query = np.where(index[here] < 0, 255, index[here])  # -1: a word of the background is best
    packed = np.stack([query, quantised >> 8, quantised & 255], axis=-1)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    return {
        "name": name,
        "width": width,
        "height": height,
        "image": data_uri(image, "PNG" if enlargement(image) > 1 else "JPEG"),
        "masks": data_uri(Image.fromarray(packed.astype(np.uint8)), "PNG"),
        "threshold": threshold,
        "queries": [{"name": n, "colour": c} for n, c in zip(names, palette(len(names)))],
    }


def word_content(caption: str | None, masks: np.ndarray | None) -> dict:
    """What it shows of a caption: its words and every query's word mask, (J, words)."""
    return {
        "caption": caption or "",
        "words": [] if masks is None else caption.split(),
        "word_masks": [] if masks is None else masks.round(3).tolist(),
    }


def write_page(items: list[dict], path: str | Path) -> None:
    """The page of all images. Raises UserError."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    content = json.dumps(items).replace("<", "\\u003c")  # no caption can close the script
    with whole_file(path) as temporary:
        temporary.write_text(page.replace("/*DATA*/[]", content), encoding="utf-8")
