"""The figures of section 3.3: both equations written with the pair's own image and words."""

from docs.book.draw import blend, chip, every, every_noun, pixels, tile
from docs.book.observe import Observation, Observations


def figures(seen: Observations) -> dict[str, str]:
    return {
        "eq-3-4": every_noun(seen, highlighted_image, "sum"),
        "eq-3-5": every(seen, highlighted_text, "div"),
    }


def highlighted_image(o: Observation, j: int, noun: str) -> str:
    """Eq. 3.4: X^v * M^v + P^v * (1 - M^v) = H^v."""
    mask, prompt = o.d.m_v[j, 0], pixels(o.region_prompt)
    parts = [
        tile(pixels(o.pairs.batch.images[0]), "The image", "X<sup>v</sup>"),
        tile(mask, f"Region mask of {noun}", "M<sup>v</sup>"),
        tile(prompt, "The learned region prompt", "P<sup>v</sup>"),
        tile(1 - mask, f"All that is not {noun}", "1 − M<sup>v</sup>"),
        tile(
            pixels(o.d.h_v[j, 0]),
            f"{noun} in the image, the prompt elsewhere",
            f"H<sup>v</sup> of {chip(noun, j)}",
        ),
    ]
    signs = [f"<b>{sign}</b>" for sign in "∗+∗="] + [""]
    return "".join(part + sign for part, sign in zip(parts, signs))


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
