"""The figures of section 3.4: embeddings, their similarities, and the whole loss over training."""

import json

from PIL import Image

from docs.book.draw import STRIP, at, every, heat, row, scale, signed, two_strips, value
from docs.book.observe import Observation, Observations
from losses import info_nce
from support.page import data_uri

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


def figures(seen: Observations) -> dict[str, str]:
    before = f'<span class="tile half">{similarities(seen[0])}</span>'
    after = every(seen, lambda o: f'<span class="tile half">{similarities(o)}</span>')
    return {
        "eq-3-6": every(seen, embeddings, "div") + scale(-STRIP, STRIP, "number"),
        "eq-3-7": row(before, after, kind="halves") + scale(-0.1, 1, "cosine") + every(seen, hcl),
        "eq-3-8": bars(seen),
    }


def embeddings(o: Observation) -> str:
    """Eq. 3.6: e^v and e^t of both nouns."""
    names = ("e<sup>v</sup>", "e<sup>t</sup>")
    return "".join(
        two_strips(noun, j, o.d.e_v[j, 0], o.d.e_t[j, 0], names)
        for j, noun in enumerate(o.pairs.nouns[0])
    )


def similarities(o: Observation) -> str:
    """S of Eq. 3.7 with its nouns on both sides; rows are regions, columns word segments."""
    s = o.d.e_v.flatten(0, 1) @ o.d.e_t.flatten(0, 1).T  # (B, B)
    names = [nouns[j] for j in range(len(o.d.n)) for nouns in o.pairs.nouns]
    size, side = len(names), 20
    texts = "".join(
        f'<text class="tiny end" x="66" y="{86 + side * i}">{n}</text>'
        f'<text class="tiny" transform="translate({84 + side * i} 66) rotate(-90)">{n}</text>'
        for i, n in enumerate(names)
    )
    own = s.diagonal().mean().item()
    rest = (s.sum().item() - own * size) / (size * size - size)
    when = f"after {o.step} steps" if o.step else "before training"
    said = f"{when}: {signed(own)} on the diagonal, {signed(rest)} elsewhere"
    return (
        f'<svg class="matrix" viewBox="0 0 {74 + side * size} {76 + side * size}" role="img" '
        f'aria-label="Cosines {said}">{texts}<image class="px" x="70" y="72" '
        f'href="{data_uri(Image.fromarray(heat(s, -0.1, 1)), "PNG")}" '
        f'width="{side * size}" height="{side * size}"/></svg><span class="under">{said}</span>'
    )


def hcl(o: Observation) -> str:
    """Eq. 3.7's value for this batch."""
    tau = o.temperature
    e_v, e_t = o.d.e_v.flatten(0, 1), o.d.e_t.flatten(0, 1)
    loss = value("l_hcl", info_nce(e_v, e_t, 1 / tau).item())
    return f"<p class='reading'>L<sub>hcl</sub> = {loss}, τ = {value('tau', tau, 4)}</p>"


def bars(seen: Observations) -> str:
    """Eq. 3.8: every logged step's L as a bar of its weighted terms."""
    log = [json.loads(line) for line in seen[0].log.read_text("utf-8").splitlines()]
    top, last = max(line["total"] for line in log), log[-1]["step"]
    columns, before = "", 0
    for line in log:
        # As wide as its steps: a run that was stopped has logged its last step besides.
        wide, before = line["step"] - before, line["step"]
        heights = enumerate(100 * line[term] / top for term in TERMS)
        parts = "".join(f'<i class="term-{i}" style="height:{h:.2f}%"></i>' for i, h in heights)
        title = f"step {line['step']}: L = {line['total']:.2f}"
        columns += f'<div style="flex-grow:{wide}" title="{title}">{parts}</div>'
    cursors = [f'<b style="right:{100 - 100 * o.step / last:.1f}%">{o.step}</b>' for o in seen]
    legend = "".join(
        f'<span><i class="patch term-{i}"></i>{name}</span>'
        for i, name in enumerate(TERMS.values())
    )
    ends = [f"{line['total']:.2f} at step {line['step']}" for line in (log[0], log[-1])]
    return (
        f'<div class="bars" role="img" aria-label="Stacked bars of the nine terms of L, from '
        f'{ends[0]} to {ends[1]}">{columns}{at(cursors)}</div>'
        f'<p class="legend">{legend}</p><p class="reading">L: from {ends[0]} to {ends[1]}</p>'
    )
