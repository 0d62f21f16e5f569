"""The figures of sections 3.4, 3.5 and 4.1 in docs/read.html: alignment, training, evaluation."""

import html
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import TrainConfig
from evaluate import IoU
from experiments.read_draw import (
    GREY,
    NOUNS,
    STRIP,
    Observations,
    at,
    chip,
    every,
    heat,
    plot,
    readable,
    row,
    scale,
    signed,
    strip,
    tile,
    value,
)
from experiments.read_pair import Large, Pairs
from segmenter import window_starts, with_background
from support.page import data_uri
from train import learning_rate

TERMS = {  # of log.jsonl, as the bars are called
    "kg": "noun embeddings, Eq. 3.1",
    "image_contrast": "regions against nouns",
    "region_contrast": "pooled features against nouns",
    "area": "area of own masks",
    "area_others": "area of other masks",
    "smooth_features": "smoothness of features",
    "smooth_masks": "smoothness of masks",
    "seg_t": "word masks",
    "hcl": "regions against word segments, Eq. 3.7",
}
BACKGROUND = (30, 30, 34)
COLOURS = [  # of the label map's words: far from each other, and none of them green
    (230, 25, 75),
    (255, 225, 25),
    (67, 99, 216),
    (245, 130, 49),
    (66, 212, 244),
    (240, 50, 230),
    (255, 250, 200),
    (154, 99, 36),
    (145, 30, 180),
    (250, 190, 212),
    (170, 170, 170),
    (128, 0, 0),
]
SHOWN = 2  # words of the large scene whose masks are shown, in the colours after the pair's


# --- 3.4 ------------------------------------------------------------------------------------------


def embeddings(pairs: Pairs, observations: Observations) -> str:
    """Eq. 3.6: e^v and e^t of both nouns, and how alike they are."""

    def both(o: SimpleNamespace) -> str:
        lines = []
        for j, noun in enumerate(pairs.drawn[0]):
            cosine = float(o.d.e_v[j, 0] @ o.d.e_t[j, 0])
            strips = strip(o.d.e_v[j, 0], f"e^v of {noun}") + strip(o.d.e_t[j, 0], f"e^t of {noun}")
            lines.append(
                f'<div class="vectors"><span>{chip(noun, j)}</span>'
                f'<span class="names"><i>e<sup>v</sup></i><i>e<sup>t</sup></i></span>'
                f'<span class="strips">{strips}</span><span>cosine {signed(cosine)}</span></div>'
            )
        return "".join(lines)

    ends = scale(-STRIP, STRIP, "number")
    return at([both(o) for o in observations], "div") + ends


def matrix(similarity: Tensor, names: Sequence[str], title: str) -> str:
    """S as an SVG with its nouns on both sides; rows are regions, columns word segments."""
    size, side = len(names), 20
    uri = data_uri(Image.fromarray(heat(similarity, -0.1, 1)), "PNG")
    texts = "".join(
        f'<text class="tiny end" x="66" y="{72 + side * i + 14}">{n}</text>'
        f'<text class="tiny" transform="translate({70 + side * i + 14} 66) rotate(-90)">{n}</text>'
        for i, n in enumerate(names)
    )
    own = similarity.diagonal().mean().item()
    rest = (similarity.sum().item() - own * size) / (size * size - size)
    said = f"{title}: {signed(own)} on the diagonal, {signed(rest)} elsewhere"
    return (
        f'<svg class="matrix" viewBox="0 0 {74 + side * size} {76 + side * size}" role="img" '
        f'aria-label="Cosines {said}">{texts}<image class="px" href="{uri}" x="70" y="72" '
        f'width="{side * size}" height="{side * size}"/></svg><span class="under">{said}</span>'
    )


def similarities(pairs: Pairs, observations: Observations, steps: Sequence[int]) -> str:
    """Eq. 3.7: the T x T matrix S before and after, the temperature and the loss."""
    names = [noun for j in range(2) for noun in (pair[j] for pair in pairs.drawn)]  # noun-major

    def shown(o: SimpleNamespace, title: str) -> str:
        s = o.d.e_v.flatten(0, 1) @ o.d.e_t.flatten(0, 1).T
        return f'<span class="tile half">{matrix(s, names, title)}</span>'

    def reading(o: SimpleNamespace) -> str:
        loss = value("l_hcl", o.seen["losses.info_nce"][-1].item())
        return (
            f"<p class='reading'>L<sub>hcl</sub> = {loss}, τ = "
            f"{value('tau', 1 / o.scales['hcl'], 4)}</p>"
        )

    before = shown(observations[0], "before training")
    after = [shown(o, f"after {step} steps") for o, step in zip(observations, steps)]
    ends = scale(-0.1, 1, "cosine")
    return row(before, at(after), kind="halves") + ends + every(observations, reading)


def loss_bars(log: Sequence[dict], steps: Sequence[int]) -> str:
    """Eq. 3.8: every logged step's L as a bar of its weighted terms."""
    left, bottom = 36, 270
    top = max(line["total"] for line in log)
    unit = (bottom - 12) / top

    def drawn(width: int) -> str:
        def x(step: int) -> float:
            return left + (width - left) * step / log[-1]["step"]

        bar = (width - left) / len(log) * 0.8
        floor = np.zeros(len(log))
        parts = []
        for v in range(0, int(top) + 1, 2):
            parts.append(
                f'<path class="grid" d="M{left} {bottom - v * unit:.1f}H{width}"/>'
                f'<text class="small end" x="{left - 6}" y="{bottom - v * unit + 4:.1f}">{v}</text>'
            )
        for i, term in enumerate(TERMS):
            path = ""
            for k, line in enumerate(log):
                tall = line[term] * unit
                corner = f"M{x(line['step']) - bar:.1f} {bottom - floor[k]:.1f}"
                path += f"{corner}h{bar:.1f}v{-tall:.2f}h{-bar:.1f}z"
                floor[k] += tall
            parts.append(f'<path class="term-{i}" d="{path}"/>')
        for s in steps if width > 500 else steps[::2]:
            place = min(x(s), width - 14)
            parts.append(f'<text class="small middle" x="{place:.1f}" y="290">{s}</text>')
        cursors = [
            f'<path class="cursor" d="M{max(x(s), left + 1):.1f} 4V{bottom}"/>' for s in steps
        ]
        return "".join(parts) + at(cursors, "g")

    legend = [
        f'<span><i class="patch term-{i}"></i>{name}</span>'
        for i, name in enumerate(TERMS.values())
    ]
    first, last = f"{log[0]['total']:.1f} at step {log[0]['step']}", f"{log[-1]['total']:.1f}"
    alt = f"Stacked bars of the nine terms of L over the training: from {first} to {last}"
    return f'{plot(300, alt, drawn)}<p class="legend">{"".join(legend)}</p>'


# --- 3.5 ------------------------------------------------------------------------------------------


def schedule(config: TrainConfig) -> str:
    """The learning rate of the thesis's training, and the two phases."""
    left, bottom = 76, 180
    steps = np.linspace(0, config.steps, 201).round().astype(int)

    def y(rate: float) -> float:
        return bottom - 150 * rate / config.lr

    first, last = config.lr, config.lr * config.final_lr
    warm, free = round(config.warmup * config.steps), round(config.unfreeze * config.steps)

    def drawn(width: int) -> str:
        def x(step: int) -> float:
            return left + (width - left - 10) * step / config.steps

        line = "L".join(f"{x(s):.1f} {y(learning_rate(int(s), config)):.1f}" for s in steps)
        marks = "".join(
            f'<path class="grid" d="M{x(s):.1f} 20V{bottom}"/>'
            f'<text class="small {side}" x="{x(s):.1f}" y="{bottom + 18}">{s:,}</text>'
            for s, side in ((0, ""), (warm, "middle"), (free, "middle"), (config.steps, "end"))
        )
        texts = "".join(
            f'<text class="small end" x="{left - 8}" y="{y(rate) + 4:.1f}">{readable(rate)}</text>'
            for rate in (first, last)
        )
        said = "the block copy trains from here" if width > 500 else "the block trains"
        texts += (
            f'<text class="small" x="{x(free) + 8:.1f}" y="36">{said}</text>'
            f'<text class="small" x="{left + 8}" y="36">warm-up</text>'
        )
        return f'{marks}{texts}<path class="line" d="M{line}"/>'

    alt = f"Learning rate: up to {readable(first)} at step {warm:,}, then a cosine down"
    return plot(205, alt, drawn)


# --- 4.1 ------------------------------------------------------------------------------------------


def listed(numbers: Sequence[int]) -> str:
    """1, 2 and 3."""
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def windows(large: Large) -> str:
    """The large scene with its sliding windows."""
    width, height = large.image.size
    rows, columns = (
        window_starts(side, large.settings.window, large.settings.stride)
        for side in (height, width)
    )
    side = large.settings.window
    marks = {(0, columns[1]): NOUNS[SHOWN], (rows[-1], columns[-1]): NOUNS[SHOWN + 1]}
    boxes = "".join(
        f'<rect class="window {marks.get((top, left), "")}" x="{left + 1}" y="{top + 1}" '
        f'width="{side - 2}" height="{side - 2}" rx="2"/>'
        for top in rows
        for left in columns
    )
    count = len(rows) * len(columns)
    alt = f"A scene of {width} by {height} pixels under {count} windows of {side}"
    uri = data_uri(large.image, "JPEG")
    return (
        f'<svg class="large" viewBox="0 0 {width} {height}" role="img" aria-label="{alt}">'
        f'<image class="px" href="{uri}" width="{width}" height="{height}"/>{boxes}</svg>'
        f"<p class='reading'>{count} windows of {side} × {side}, one every "
        f"{large.settings.stride} pixels; rows begin at {listed(rows)}, columns at "
        f"{listed(columns)}</p>"
    )


def biggest(large: Large) -> list[int]:
    """The words with the largest regions."""
    areas = np.bincount(large.labels.ravel(), minlength=len(large.names) + 1)[1:]
    return sorted(np.argsort(-areas)[:SHOWN].tolist())


def branch_masks(large: Large, found: Sequence[dict[str, Tensor]]) -> str:
    """Prior, mask branch before and after refinement, and the mixture, of some words."""
    titles = {
        "prior": "prior branch",
        "mask": "mask branch",
        "refined": "refined by PAMR",
        "mixed": f"mixed, prior {large.settings.prior_weight:.0%}",
    }
    lines = []
    for j, i in enumerate(biggest(large)):
        name = large.names[i]
        cells = [
            at([tile(f[key][i], f"{title}: soft mask of {name}", title) for f in found])
            for key, title in titles.items()
        ]
        said = f'<p class="said">{chip(name, SHOWN + j)}</p>'
        lines.append(said + row(*cells, kind="four landscape"))
    return "".join(lines) + scale(0, 1, "mask", GREY)


def threshold(large: Large, found: Sequence[dict[str, Tensor]]) -> str:
    """The label map under a threshold that the reader moves, with its mIoU.

    Every pixel of the packed images: red the likeliest word, green its mask in 8 bits; of the last
    one: red the true label.
    """
    start = large.settings.background
    colours = COLOURS[: len(large.names)]
    packed, scores = [], []
    for f in found:
        best, index = f["mixed"].max(0)
        quantised = (best * 255).round().byte()
        labels = with_background(quantised / 255, index, start).numpy()
        iou = IoU(len(large.names) + 1)
        iou.add(labels, large.labels.astype(np.int64))
        scores.append(iou.mean())
        layers = torch.stack([index.byte(), quantised, torch.zeros_like(quantised)], dim=-1)
        packed.append(data_uri(Image.fromarray(layers.numpy()), "PNG"))
    truth = data_uri(Image.fromarray(np.stack([large.labels] * 3, axis=-1).astype(np.uint8)), "PNG")
    sources = "".join(f'<img class="packed" hidden alt="" src="{uri}">' for uri in [*packed, truth])
    legend = "".join(
        f'<span><i class="patch" style="background:rgb{c}"></i>{html.escape(n)}</span>'
        for n, c in zip(["background", *large.names], [BACKGROUND, *colours])
    )
    width, height = large.image.size
    said = at([f"{value('miou', score, 1)} %" for score in scores])
    return (
        f'<div class="threshold" data-colours="{[list(c) for c in colours]}">'
        f'<div class="stack"><img class="px" src="{data_uri(large.image, "JPEG")}" alt="The scene">'
        f'<canvas width="{width}" height="{height}" role="img" '
        f'aria-label="The regions of all words above the threshold"></canvas></div>{sources}'
        f'<p class="legend">{legend}</p>'
        f'<p class="reading">mIoU of this scene at {start}: {said}</p>'
        f'<label class="control">background below <input type="range" min="0" max="1" step="0.01" '
        f'value="{start}"> <output></output></label></div>'
    )
