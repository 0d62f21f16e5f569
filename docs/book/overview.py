"""The figures of section 3.1: the pair, and the thesis's figure 3.1 with the pair's tensors."""

from docs.book.draw import blend, chip, every, pixels, row, shaded, signed, strip, tile
from docs.book.observe import Observation, Observations, Pairs


def figures(seen: Observations) -> dict[str, str]:
    return {"pair": the_pair(seen[0].pairs), "pipeline": every(seen, pipeline, "div")}


def the_pair(pairs: Pairs) -> str:
    """The image, and the caption with its nouns."""
    nouns, caption = pairs.nouns[0], pairs.captions[0]
    said = " ".join(chip(w, nouns.index(w)) if w in nouns else w for w in caption.split())
    image = tile(pixels(pairs.batch.images[0]), f"The image: {caption}")
    return row(image, f'<p class="caption">{said}</p>', kind="pair")


def pipeline(o: Observation) -> str:
    """From X to e in two lanes, for the first drawn noun."""
    d, noun, words = o.d, o.pairs.nouns[0][0], o.pairs.tokens()[1:-1]
    region, mask = d.m_v[0, 0], d.m_t[0, 0, 1 : len(words) + 1].tolist()
    image, h_v = pixels(o.pairs.batch.images[0]), pixels(d.h_v[0, 0])
    said = f"Region mask of {noun}: {100 * region.mean():.0f} % of the image"
    cells = {
        "xv": ("X<sup>v</sup>", tile(image, f"The image: {o.pairs.captions[0]}")),
        "mv": ("(a) M<sup>v</sup>", tile(region, said)),
        "hv": ("(b) H<sup>v</sup>", tile(h_v, f"The region of {noun}, the prompt elsewhere")),
        "ev": ("(c) e<sup>v</sup>", strip(d.e_v[0, 0], f"e^v of {noun}")),
        "xt": ("X<sup>t</sup>", f'<span class="words">{" ".join(words)}</span>'),
        "mt": ("(a) M<sup>t</sup>", shaded(words, mask, 0)),
        "ht": ("(b) H<sup>t</sup>", blend(words, mask, 0)),
        "et": ("(c) e<sup>t</sup>", strip(d.e_t[0, 0], f"e^t of {noun}")),
        "s": ("cosine", f'<span class="cosine">{signed(float(d.e_v[0, 0] @ d.e_t[0, 0]))}</span>'),
    }
    shown = "".join(
        f'<div class="cell" style="grid-area:{area}"><span class="mark">{letter}</span>{cell}</div>'
        for area, (letter, cell) in cells.items()
    )
    return f'<div class="pipeline">{shown}</div>'
