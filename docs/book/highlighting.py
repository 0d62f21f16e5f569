"""The figures of section 3.3: both equations written with the pair's own image and words."""

from docs.book.draw import blend, chip, every, pixels, row, tile
from docs.book.observe import Observation, Observations


def figures(seen: Observations) -> dict[str, str]:
    return {
        "eq-3-4": every(seen, highlighted_image, "div"),
        "eq-3-5": every(seen, highlighted_text, "div"),
    }


def highlighted_image(o: Observation) -> str:
    """Eq. 3.4 in images: X^v * M^v + P^v * (1 - M^v) = H^v, a row for each noun."""
    rows = ""
    for j, noun in enumerate(o.pairs.nouns[0]):
        mask = o.d.m_v[j, 0]
        title = f"H<sup>v</sup> of {chip(noun, j)}"
        rows += row(
            tile(pixels(o.pairs.batch.images[0]), "The image", "X<sup>v</sup>"),
            "<b>∗</b>",
            tile(mask, f"Region mask of {noun}", "M<sup>v</sup>"),
            "<b>+</b>",
            tile(pixels(o.region_prompt), "The learned region prompt", "P<sup>v</sup>"),
            "<b>∗</b>",
            tile(1 - mask, f"All that is not {noun}", "1 − M<sup>v</sup>"),
            "<b>=</b>",
            tile(pixels(o.d.h_v[j, 0]), f"{noun} in the image, the prompt elsewhere", title),
            kind="sum",
        )
    return rows


def highlighted_text(o: Observation) -> str:
    """Eq. 3.5: how much of every position of H^t is the caption's own, and how much the prompt."""
    tokens, lines = o.pairs.tokens(), ""
    for j, noun in enumerate(o.pairs.nouns[0]):
        mask = o.d.m_t[j, 0, : len(tokens)].tolist()
        mask = [1.0, *mask[1:-1], 1.0]  # SOS and EOT stay as they are
        mostly = [token for token, m in zip(tokens, mask) if m < 0.5]
        said = f"mostly the prompt: {', '.join(mostly) or 'none'}"
        boxes = blend(tokens, mask, j)
        lines += f'<p class="said">{chip(noun, j)} {boxes} <small>{said}</small></p>'
    return lines
