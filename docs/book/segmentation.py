"""The figures of section 3.2: noun embeddings, region masks, word logits, word masks, labels."""

import numpy as np
import torch
from torch import Tensor

from docs.book.draw import (
    NOUNS,
    chip,
    every,
    pixels,
    row,
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

    def line(o: Observation) -> str:
        parts = [
            tile(pixels(o.pairs.batch.images[0]), "The image", "X<sup>v</sup>"),
            tile(colours(o.d.x_v[0]), "Features x^v as colours", "x<sup>v</sup>"),
        ]
        for j, noun in enumerate(o.pairs.nouns[0]):
            soft, hard, title = o.d.soft_v[j, 0], o.d.m_v[j, 0], chip(noun, j)
            said = f"Soft mask of {noun}: {100 * soft.mean():.0f} % of the image"
            parts.append(tile(soft, said, f"m<sup>v</sup> of {title}"))
            parts.append(tile(hard, f"Hard mask of {noun}", f"M<sup>v</sup> of {title}"))
        return "".join(parts)

    return row(every(seen, line), kind="six")


def noun_embeddings(o: Observation) -> str:
    """Eq. 3.1: n_j beside n'_j, and L_kg of the batch."""
    names = ("n<sub>j</sub>", "n′<sub>j</sub>")
    strips = "".join(
        two_strips(noun, j, o.d.n[j, 0], o.d.n_prime[j, 0], names)
        for j, noun in enumerate(o.pairs.nouns[0])
    )
    loss = knowledge_loss(o.d.n.flatten(0, 1), o.d.n_prime.flatten(0, 1)).item()
    return f"{strips}<p class='reading'>L<sub>kg</sub> of the batch: {value('l_kg', loss, 4)}</p>"


def cells(o: Observation, j: int, name: str, values: Tensor, top: float, digits: int) -> list[str]:
    """A number for every token, on the noun's colour: as strong as its share of `top`."""
    return [
        f'<td class="word {NOUNS[j]}" style="--m:{max(0, v) / top:.3f}">'
        f"{value(f'{name}-{i}', v, digits)}</td>"
        for i, v in enumerate(values[: len(o.pairs.tokens())].tolist())
    ]


def logits(o: Observation) -> str:
    """Eq. 3.2: l_j,i of every token, behind the constant 0 of "none"."""
    tokens = o.pairs.tokens()
    rows = [("none", ["<td>0</td>"] * len(tokens))]
    for j, noun in enumerate(o.pairs.nouns[0]):
        line = cells(o, j, f"logit-{j + 1}", o.d.word_logits[j + 1, 0], top=10, digits=1)
        rows.append((chip(noun, j), line))
    return token_table(tokens, "Word logits by token", rows)


def word_masks(o: Observation) -> str:
    """Eq. 3.3: m^t of both nouns, and the pseudo-labels of L_seg^t."""
    tokens, nouns = o.pairs.tokens(), o.pairs.nouns[0]
    rows = [
        (chip(noun, j), cells(o, j, f"mask-{j}", o.d.m_t[j, 0], top=1, digits=2))
        for j, noun in enumerate(nouns)
    ]
    labels = []
    for label in pseudo_labels(o.d.word_logits, o.d.is_word)[0, : len(tokens)].tolist():
        kind = f"word {NOUNS[label - 1]}" if label > 0 else ""
        text = "·" if label < 0 else ["none", *nouns][label]
        labels.append(f'<td class="{kind}" style="--m:1">{text}</td>')
    return token_table(tokens, "Word masks by token", [*rows, ("label", labels)])
