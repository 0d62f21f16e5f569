"""Eqs. 3.1, 3.7, 3.8 and the terms of L_seg^v and L_seg^t: tensors in, tensors out.

Shapes: b pairs in this process, B in the global batch, T = J * B triplets, as in `model.py`. The
statistics are of each image and caption where it is; `train.py` gathers them, and the losses are
functions of the global batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from config import LossConfig

# --- contrastive losses ---------------------------------------------------------------------------


def symmetric_cross_entropy(logits: Tensor) -> Tensor:
    """Mean cross-entropy of rows and of columns, the diagonal being right: (T, T) -> ()."""
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def info_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Eq. 3.7: symmetric InfoNCE over T triplets, of unit vectors a, b (T, C); scale: 1 / tau."""
    return symmetric_cross_entropy(scale * a @ b.T)


def knowledge_loss(n: Tensor, n_knowledge: Tensor) -> Tensor:
    """Eq. 3.1: L_kg, mean squared distance of noun embeddings to hand-written ones (T, C) -> ()."""
    return (n - n_knowledge).square().sum(-1).mean()


# --- L_seg^v (TCL's loss on nouns) ----------------------------------------------------------------


def region_cosines(x_v: Tensor, masks: Tensor, nouns: Tensor) -> Tensor:
    """cos(f_ij, n_j): f_ij = sum m_ij x^v_i / (sum m_ij + 1e-6), image i under noun j.

    x_v: (b, H, W, C); masks: (b, T, H, W); nouns: (T, C). Returns (b, T).
    """
    pooled = torch.einsum("bthw,bhwc->btc", masks, x_v)
    pooled = pooled / (masks.sum((-2, -1))[..., None] + 1e-6)
    return (F.normalize(pooled, dim=-1, eps=1e-6) * nouns).sum(-1)


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of horizontal plus of vertical neighbours: (b, N, H, W) -> (b,)."""
    horizontal = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
    vertical = (x[..., 1:, :] - x[..., :-1, :]).abs().mean((1, 2, 3))
    return horizontal + vertical


def region_statistics(x_v: Tensor, masks: Tensor, nouns: Tensor) -> tuple[Tensor, ...]:
    """All that L_seg^v needs of each image, small enough to travel between processes.

    As for `region_cosines`. Returns these cosines and the mean of every mask, (b, T) each, and the
    total variation of x^v and of the masks, (b,) each.
    """
    cosines, areas = region_cosines(x_v, masks, nouns), masks.mean((-2, -1))
    return cosines, areas, total_variation(x_v.movedim(-1, 1)), total_variation(masks)


def area_losses(areas: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    """|mean area of own - prior| and |mean area of others - 0|, of the mean of every mask (B, T).

    Own: the matching entries of the T x T matrix of triplets. Others: all its off-diagonal ones, an
    image's own other noun included (each image stands for J rows of that matrix).
    """
    triplets = areas.repeat(areas.shape[1] // areas.shape[0], 1)  # (T, T)
    own = triplets.diagonal()
    others = (triplets.sum() - own.sum()) / (triplets.numel() - own.numel())
    return (own.mean() - prior).abs(), others.abs()


# --- L_seg^t --------------------------------------------------------------------------------------


def pseudo_labels(word_logits: Tensor, eot: Tensor) -> Tensor:
    """Section 3.2: the label of a word is the likeliest of its J + 1 classes.

    word_logits: (b, J + 1, L), "none" first. Returns (b, L): -1 at SOS, EOT and padding.
    """
    position = torch.arange(word_logits.shape[-1], device=eot.device)
    word = (position > 0) & (position < eot[:, None])
    return word_logits.argmax(dim=1).masked_fill(~word, -1)


def word_statistics(word_logits: Tensor, labels: Tensor, none_weight: float) -> Tensor:
    """Weighted cross-entropy of each caption's words over J + 1 classes, and the weights' sum.

    word_logits: (b, J + 1, L); labels: (b, L), -1 is ignored; class 0 ("none") weighs
    `none_weight`, the others 1. Returns (b, 2).
    """
    loss = F.cross_entropy(word_logits, labels, ignore_index=-1, reduction="none")
    weight = torch.where(labels == 0, none_weight, 1.0).masked_fill(labels < 0, 0.0)
    return torch.stack([(weight * loss).sum(1), weight.sum(1)], dim=1)


def word_mask_loss(statistics: Tensor) -> Tensor:
    """L_seg^t: weighted mean over all words, from `word_statistics` of all captions (B, 2)."""
    losses, weights = statistics.sum(0)
    return losses / weights.clamp(min=1e-6)


# --- all together ---------------------------------------------------------------------------------


def code_losses(
    n: Tensor,
    n_knowledge: Tensor,
    e_v: Tensor,
    e_t: Tensor | None,
    regions: tuple[Tensor, ...],
    words: Tensor | None,
    scales: dict[str, Tensor],
    config: LossConfig,
) -> dict[str, Tensor]:
    """Eq. 3.8: the total loss L, under "total", and every term as weighted in it.

    n, n_knowledge, e_v, e_t: (T, C). regions: `region_statistics` of all B images; words:
    `word_statistics` of all captions; e_t and words are None where an ablation has none. scales:
    1 / tau of the three contrasts, "image", "region" and "hcl".
    """
    cosines, areas, variation_of_features, variation_of_masks = regions
    own, others = area_losses(areas, config.area_prior)
    cosines = cosines.repeat(len(n) // len(cosines), 1)  # (T, T): a row for every triplet
    region_contrast = symmetric_cross_entropy(scales["region"] * cosines)
    seg_v = {
        "image_contrast": config.image_contrast * info_nce(e_v, n, scales["image"]),
        "region_contrast": config.region_contrast * region_contrast,
        "area": config.area * own,
        "area_others": config.area_others * others,
        "smooth_features": config.smooth_features * variation_of_features.mean(),
        "smooth_masks": config.smooth_masks * variation_of_masks.mean(),
    }
    terms = {"kg": config.lambda_kg * knowledge_loss(n, n_knowledge)}
    terms |= {name: config.lambda_seg_v * term for name, term in seg_v.items()}
    if words is not None:
        terms["seg_t"] = config.lambda_seg_t * word_mask_loss(words)
    if e_t is not None:
        terms["hcl"] = config.lambda_hcl * info_nce(e_v, e_t, scales["hcl"])
    return {"total": torch.stack(list(terms.values())).sum(), **terms}
