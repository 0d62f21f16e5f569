"""The figures of section 3.2: noun embeddings, region masks, word logits, word masks, labels."""

import numpy as np
import torch
from torch import Tensor

from docs.book.draw import (
    NOUNS,
    chip,
    every,
    every_noun,
    pixels,
    shaded,
    tile,
    token_table,
    two_strips,
    value,
)
from docs.book.observe import Observation, Observations
from losses import knowledge_loss, pseudo_labels


def figures(seen: Observations) -> dict[str, str]:
    return {
        "regions": regions(seen),
        "eq-3-1": every(seen, noun_embeddings, "div"),
        "eq-3-2": every(seen, logits, "div"),
        "eq-3-3": every(seen, word_masks, "div"),
    }


def regions(seen: Observations) -> str:
    """x^v as colours, and the soft and the hard mask of each noun."""
    trained = seen[-1].d.x_v[0].flatten(0, 1)  # (H W, C)
    centre = trained.mean(0)
    basis = torch.linalg.svd(trained - centre, full_matrices=False)[2][:3].T  # (C, 3)
    low, high = torch.quantile((trained - centre) @ basis, torch.tensor([0.02, 0.98]), dim=0)

    def colours(x_v: Tensor) -> np.ndarray:
        share = (((x_v - centre) @ basis - low) / (high - low)).clamp(0, 1)
        return (40 + 200 * share).round().byte().numpy()

    def line(o: Observation, j: int, noun: str) -> str:
        soft, hard = o.d.soft_v[j, 0], o.d.m_v[j, 0]
        share = f"{100 * soft.mean():.0f} %"
        return (
            tile(pixels(o.pairs.batch.images[0]), "The image", "X<sup>v</sup>")
            + tile(colours(o.d.x_v[0]), "Features x^v as colours", "x<sup>v</sup>")
            + tile(
                soft, f"Soft mask of {noun}: {share}", f"m<sup>v</sup> of {chip(noun, j)} {share}"
            )
            + tile(hard, f"Hard mask of {noun}", f"M<sup>v</sup> of {chip(noun, j)}")
        )

    return every_noun(seen, line, "four")


def noun_embeddings(o: Observation) -> str:
    """Eq. 3.1: n_j beside n'_j, and L_kg of the batch."""
    names = ("n<sub>j</sub>", "n′<sub>j</sub>")
    strips = "".join(
        two_strips(noun, j, o.d.n[j, 0], o.d.n_prime[j, 0], names)
        for j, noun in enumerate(o.pairs.nouns[0])
    )
    loss = knowledge_loss(o.d.n.flatten(0, 1), o.d.n_prime.flatten(0, 1)).item()
    return f"{strips}<p class='reading'>L<sub>kg</sub> of the batch: {value('l_kg', loss, 4)}</p>"


def logits(o: Observation) -> str:
    """Eq. 3.2: l_j,i of every token, behind the constant 0 of "none"."""
    tokens = o.pairs.tokens()
    rows = [("none", ["<td>0</td>"] * len(tokens))]
    for j, noun in enumerate(o.pairs.nouns[0]):
        numbers = o.d.word_logits[j + 1, 0, : len(tokens)].tolist()
        cells = [
            f'<td class="word {NOUNS[j]}" style="--m:{max(0, v) / 10:.3f}">'
            f"{value(f'logit-{j + 1}-{i}', v, 1)}</td>"
            for i, v in enumerate(numbers)
        ]
        rows.append((chip(noun, j), cells))
    return token_table(tokens, "Word logits by token", rows)


def word_masks(o: Observation) -> str:
    """Eq. 3.3: m^t of both nouns as shades and as numbers, and the pseudo-labels of L_seg^t."""
    tokens, nouns = o.pairs.tokens(), o.pairs.nouns[0]
    masks = o.d.m_t[:, 0, : len(tokens)].tolist()
    lines, rows = "", []
    for j, noun in enumerate(nouns):
        words = shaded(tokens[1:-1], masks[j][1:-1], j)
        lines += f'<p class="said">{chip(noun, j)} {words}</p>'
        cells = [f"<td>{value(f'mask-{j}-{i}', v, 2)}</td>" for i, v in enumerate(masks[j])]
        rows.append((chip(noun, j), cells))
    labels = pseudo_labels(o.d.word_logits, o.d.is_word)[0, : len(tokens)].tolist()
    cells = []
    for label in labels:
        kind = f"word {NOUNS[label - 1]}" if label > 0 else ""
        text = "·" if label < 0 else ["none", *nouns][label]
        cells.append(f'<td class="{kind}" style="--m:1">{text}</td>')
    rows.append(("label", cells))
    return lines + token_table(tokens, "Word masks by token", rows)
