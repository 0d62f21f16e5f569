"""The figures of sections 3.1 to 3.3 in docs/read.html, of what `read_pair.observe` saw.

Every function returns one figure as HTML. Observations are those of the snapshots of one training;
where they differ, all variants stand in the page and its slider shows one of them (`at`).
"""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from experiments.read_draw import (
    GREY,
    NOUNS,
    Observations,
    at,
    blend,
    chip,
    every,
    heat,
    pixels,
    plot,
    row,
    scale,
    shaded,
    signed,
    strip,
    tile,
    token_table,
    tokens,
    value,
)
from experiments.read_pair import Pairs
from losses import area_losses

# --- 3.1 ------------------------------------------------------------------------------------------


def the_pair(pairs: Pairs) -> str:
    """The image before and after augmentation, and the caption with its nouns."""
    drawn, caption = pairs.drawn[0], pairs.captions[0]
    said = " ".join(
        chip(w, drawn.index(w)) if w in drawn else f"<u>{w}</u>" if w in pairs.others[0] else w
        for w in caption.split()
    )
    scene = tile(np.asarray(pairs.scenes[0]), f"The scene: {caption}", "the scene")
    ready = tile(
        pixels(pairs.batch.images[0]),
        f"The same scene, cropped and perhaps flipped at random: {caption}",
        "X<sup>v</sup>, a random crop",
    )
    return row(scene, ready, f'<p class="caption">{said}</p>', kind="pair")


def pipeline(pairs: Pairs, observations: Observations) -> str:
    """Figure 3.1 with the pair's own tensors, for the first drawn noun."""
    noun, words = pairs.drawn[0][0], tokens(pairs)[1:-1]
    image = pixels(pairs.batch.images[0])

    def lane(o: SimpleNamespace) -> str:
        mask = o.seen["model.word_mask"][0][0, 0, 1 : len(words) + 1].tolist()
        h_v, hard = o.seen["model.highlight_image"][0][0, 0], o.hard[0][0]
        cosine = float(o.d.e_v[0, 0] @ o.d.e_t[0, 0])
        cells = {
            "xv": tile(image, f"The image: {pairs.captions[0]}"),
            "mv": tile(hard, f"Region mask of {noun}: {100 * hard.mean():.0f} % of the image"),
            "hv": tile(pixels(h_v), f"The image inside the mask of {noun}, the prompt elsewhere"),
            "ev": strip(o.d.e_v[0, 0], f"e^v of {noun}"),
            "xt": f'<span class="words">{" ".join(words)}</span>',
            "mt": shaded(words, mask, 0),
            "ht": blend(words, mask, 0),
            "et": strip(o.d.e_t[0, 0], f"e^t of {noun}"),
            "s": f'<span class="cosine">{signed(cosine)}</span>',
        }
        marks = {"s": "cosine"}  # behind the letters of the thesis's modules
        for module, letter in (("", "X"), ("(a) ", "M"), ("(b) ", "H"), ("(c) ", "e")):
            for kind in "vt":
                marks[letter.lower() + kind] = f"{module}<i>{letter}<sup>{kind}</sup></i>"
        return "".join(
            f'<div class="cell" style="grid-area:{k}"><span class="mark">{marks[k]}</span>{v}</div>'
            for k, v in cells.items()
        )

    return at([f'<div class="pipeline">{lane(o)}</div>' for o in observations], "div")


# --- 3.2 ------------------------------------------------------------------------------------------


def knowledge(pairs: Pairs, observations: Observations) -> str:
    """Cosines of each n_j with both nouns in all 80 hand-written prompts, and L_kg."""
    low = min(int(10 * o.templates.min()) for o in observations)  # the axis starts at a tenth

    def x(cosine: float, right: int) -> float:
        return 14 + (right - 14) * (cosine - low / 10) / (1 - low / 10)

    def lines(o: SimpleNamespace, right: int) -> str:
        parts = []
        for j, noun in enumerate(pairs.drawn[0]):
            y = 14 + 96 * j
            parts.append(f'<text x="0" y="{y}" class="label">n of {noun}</text>')
            for k in range(len(pairs.drawn[0])):
                cosines = o.templates[j, k].tolist()
                level = y + (12 if k == j else 44)
                dots = "".join(f"M{x(c, right):.1f} {level}v16" for c in cosines)
                mean, name = sum(cosines) / len(cosines), pairs.drawn[0][k]
                parts.append(f'<path class="tick {NOUNS[k]}" d="{dots}"/>')
                parts.append(f'<path class="mean" d="M{x(mean, right):.1f} {level - 3}v22"/>')
                said = f'x="{right + 12}" y="{level + 12}">{name} {signed(mean)}'
                parts.append(f'<text class="small" {said}</text>')
        return "".join(parts)

    def drawn(width: int) -> str:
        right = width - 90
        axis = "".join(
            f'<path class="grid" d="M{x(tenth / 10, right):.1f} 20V190"/>'
            f'<text x="{x(tenth / 10, right):.1f}" y="206" class="small middle">'
            f"{signed(tenth / 10, 1)}</text>"
            for tenth in range(10, low - 1, -1 if width > 500 else -2)
        )
        axis += f'<text class="small" x="{right + 24}" y="206">cosine</text>'
        return axis + at([lines(o, right) for o in observations], "g")

    alt = "Cosines of both noun embeddings with the nouns in 80 hand-written prompts"
    svg = plot(212, alt, drawn)
    loss = every(
        observations, lambda o: value("l_kg", o.seen["losses.knowledge_loss"][0].item(), 4)
    )
    return f"{svg}<p class='reading'>L<sub>kg</sub> of the small batch: {loss}</p>"


def features(pairs: Pairs, observations: Observations) -> str:
    """MaskCLIP's features beside x^v, as colours and as cosines with the nouns."""
    x_v = [o.seen["model.ImageSegmenter.forward"][0][0] for o in observations]  # (H, W, C)
    flat = x_v[-1].flatten(0, 1)
    centre = flat.mean(0)
    basis = torch.linalg.svd(flat - centre, full_matrices=False)[2][:3].T  # (C, 3)
    low, high = torch.quantile((flat - centre) @ basis, torch.tensor([0.02, 0.98]), dim=0)

    def colours(x: Tensor) -> np.ndarray:
        share = (((x - centre) @ basis - low) / (high - low)).clamp(0, 1)
        return (40 + 200 * share).round().byte().numpy()

    what = "first three principal components as colours"
    dense = observations[0].dense
    patches, cells = (" × ".join(map(str, x.shape[:2])) for x in (dense, x_v[0]))
    parts = [
        tile(colours(dense), f"MaskCLIP's features, {what}", f"MaskCLIP, {patches}"),
        at([tile(colours(x), f"x^v, {what}", f"x<sup>v</sup>, {cells}") for x in x_v]),
    ]
    for j, noun in enumerate(pairs.drawn[0]):
        frozen = [heat(o.dense @ o.n[j, 0], -0.1, 0.8) for o in observations]
        own = [heat(x @ o.n[j, 0], -0.1, 0.8) for x, o in zip(x_v, observations)]
        pair = [
            ("MaskCLIP's features times n", "MaskCLIP · n", frozen),
            ("x^v times n", "x<sup>v</sup> · n", own),
        ]
        parts += [
            at([tile(v, f"{said} of {noun}", f"{title} {chip(noun, j)}") for v in variants])
            for said, title, variants in pair
        ]
    return row(*parts, kind="six") + scale(-0.1, 0.8, "cosine with n")


def masks(pairs: Pairs, observations: Observations) -> str:
    """The soft mask of each noun, and three hard ones with other noise."""
    lines = []
    for j, noun in enumerate(pairs.drawn[0]):

        def line(o: SimpleNamespace, j: int = j, noun: str = noun) -> str:
            soft, share = o.soft[j], 100 * o.soft[j].mean()
            hard = [
                tile(
                    h[j], f"Hard mask of {noun}, noise {i}: {100 * h[j].mean():.0f} %", f"noise {i}"
                )
                for i, h in enumerate(o.hard, start=1)
            ]
            title = f"σ(w s + b) of {chip(noun, j)} {share:.0f} %"
            return tile(soft, f"Soft mask of {noun}: {share:.0f} % of the image", title) + "".join(
                hard
            )

        lines.append(row(every(observations, line), kind="four"))
    return "".join(lines) + scale(0, 1, "mask", GREY)


def seg_v(pairs: Pairs, observations: Observations, prior: float) -> str:
    """What L_seg^v measures on the small batch."""

    def line(o: SimpleNamespace) -> str:
        areas = o.d.masks.mean((-2, -1))  # (b, T)
        b, t = areas.shape
        own, others = (area.item() for area in area_losses(areas, 0.0))  # distances to 0
        features, mask = (v.mean().item() for v in o.seen["losses.total_variation"])
        rows = [
            ("mean area under an own noun", own, f"{prior}"),
            ("mean area under other nouns", others, "0"),
            ("total variation of x<sup>v</sup>", features, "small"),
            ("total variation of the masks", mask, "small"),
        ]
        body = "".join(
            f"<tr><th scope=row>{n}</th><td>{signed(v, 3)}</td><td>{w}</td></tr>"
            for n, v, w in rows
        )
        head = "<tr><th scope=col></th><th scope=col>here</th><th scope=col>wanted</th></tr>"
        cosines = o.seen["losses.region_cosines"][0]
        grid = tile(
            heat(cosines, 0, 1),
            f"Cosines of the pooled features of {b} images with {t} nouns",
            f"cos(f<sub>ij</sub>, n<sub>j</sub>): {b} images, {t} nouns",
            "wide",
        )
        return f"<table>{head}{body}</table>{grid}"

    return row(every(observations, line), kind="loose") + scale(0, 1, "cosine")


def logits(pairs: Pairs, observations: Observations) -> str:
    """Eq. 3.2: l_j,i of every token, with "none"'s constant 0."""
    names = ["none", *(chip(noun, j) for j, noun in enumerate(pairs.drawn[0]))]

    def table(o: SimpleNamespace) -> str:
        values = o.d.word_logits[0, :, : len(tokens(pairs))]
        rows = []
        for c, (name, line) in enumerate(zip(names, values.tolist())):
            kind = f"word {NOUNS[c - 1]}" if c else ""
            cells = [
                f'<td class="{kind}" style="--m:{max(0, v) / 10:.3f}">'
                f"{value(f'logit-{c}-{i}', v, 1) if c else '0'}</td>"
                for i, v in enumerate(line)
            ]
            rows.append((name, cells))
        return token_table(pairs, "Word logits by token", rows)

    return at([table(o) for o in observations], "div")


def word_masks(pairs: Pairs, observations: Observations) -> str:
    """Eq. 3.3: m^t of both nouns as shades of the words and as numbers."""
    count = len(tokens(pairs))

    def both(o: SimpleNamespace) -> str:
        m = o.seen["model.word_mask"][0][0, :, :count].tolist()
        lines, rows = [], []
        for j, noun in enumerate(pairs.drawn[0]):
            lines.append(
                f'<p class="said">{chip(noun, j)} {shaded(tokens(pairs)[1:-1], m[j][1:-1], j)}</p>'
            )
            cells = [f"<td>{value(f'mask-{j}-{i}', v, 2)}</td>" for i, v in enumerate(m[j])]
            rows.append((chip(noun, j), cells))
        return "".join(lines) + token_table(pairs, "Word masks by token", rows)

    return at([both(o) for o in observations], "div")


def labels(pairs: Pairs, observations: Observations) -> str:
    """The pseudo-labels of the thesis and those of the released program, and L_seg^t."""
    names, count = ["none", *pairs.drawn[0]], len(tokens(pairs))

    def cells(row: Sequence[int]) -> list[str]:
        return [
            f'<td class="{f"word {NOUNS[v - 1]}" if v > 0 else ""}" style="--m:1">'
            f"{names[v] if v >= 0 else '·'}</td>"
            for v in row
        ]

    def table(o: SimpleNamespace) -> str:
        thesis = o.seen["losses.pseudo_labels"][0][0, :count].tolist()
        released = pairs.batch.noun_labels[0, :count].tolist()
        rows = [("thesis", cells(thesis)), ("release", cells(released))]
        loss = value("l_seg_t", o.seen["losses.word_mask_loss"][0].item())
        said = f"<p class='reading'>L<sub>seg</sub><sup>t</sup> of the small batch: {loss}</p>"
        return token_table(pairs, "Pseudo-labels by token", rows) + said

    return at([table(o) for o in observations], "div")


# --- 3.3 ------------------------------------------------------------------------------------------


def highlighted_image(pairs: Pairs, observations: Observations) -> str:
    """Eq. 3.4 written with images."""
    image = pixels(pairs.batch.images[0])
    lines = []
    for j, noun in enumerate(pairs.drawn[0]):

        def line(o: SimpleNamespace, j: int = j, noun: str = noun) -> str:
            mask = o.hard[0][j]
            parts = [
                tile(image, f"The image: {pairs.captions[0]}", "X<sup>v</sup>"),
                "<b>∗</b>",
                tile(mask, f"Region mask of {noun}", "M<sup>v</sup>"),
                "<b>+</b>",
                tile(pixels(o.region_prompt), "The learned region prompt", "P<sup>v</sup>"),
                "<b>∗</b>",
                tile(1 - mask, f"All that is not {noun}", "1 − M<sup>v</sup>"),
                "<b>=</b>",
                tile(
                    pixels(o.seen["model.highlight_image"][0][j, 0]),
                    f"{noun} in the image, the prompt elsewhere",
                    f"H<sup>v</sup> of {chip(noun, j)}",
                ),
            ]
            return "".join(parts)

        lines.append(row(every(observations, line), kind="sum"))
    return "".join(lines)


def highlighted_text(pairs: Pairs, observations: Observations) -> str:
    """Eq. 3.5: which positions of H^t are the prompt."""
    words = tokens(pairs)

    def both(o: SimpleNamespace) -> str:
        m = o.seen["model.word_mask"][0][0, :, : len(words)].tolist()
        lines = []
        for j, noun in enumerate(pairs.drawn[0]):
            mask = [1.0, *m[j][1:-1], 1.0]  # SOS and EOT stay as they are
            mostly = [w for w, v in zip(words, mask) if v < 0.5]
            said = f"mostly the prompt: {', '.join(mostly) or 'none'}"
            lines.append(
                f'<p class="said">{chip(noun, j)} {blend(words, mask, j)} <small>{said}</small></p>'
            )
        return "".join(lines)

    return at([both(o) for o in observations], "div")
