"""The loss of chapter 3: Eq. 3.8 and its four parts, as functions of the global batch.

What travels between processes. Every process decomposes its own b pairs; the losses compare all
with all. So `gather` joins what Eq. 3.8 needs of every process, with gradients: embeddings of all B
triplets, and small statistics of each image and caption. Every process then computes the same L.
All K of them together compute K L. `gather`'s backward pass is the transpose of its forward pass:
what all processes send back to one process's share is added. So their backward passes together
differentiate K L, each with respect to its own copy of the weights, and DistributedDataParallel's
mean, the sum over the copies divided by K, is dL/dweights: that of one process with the same K b
pairs, temperatures included (`tests/test_parallel.py`). The noise of the hard masks is drawn for
the global batch as well (`train.logistic_noise`).

Shapes: b pairs with J nouns each in this process, N pairs in the global batch, B = J N triplets
(image, text, noun) in the thesis's sense, in the order: first noun of all pairs, then the second.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from config import LossConfig
from model import CoDe, Decomposition, ImageSegmenter

# --- Eq. 3.8 --------------------------------------------------------------------------------------


def code_loss(
    d: Decomposition, model: CoDe, config: LossConfig, noun_labels: Tensor | None = None
) -> dict[str, Tensor]:
    """Eq. 3.8: L = lambda_kg L_kg + lambda_seg^v L_seg^v + lambda_seg^t L_seg^t + lambda_hcl L_hcl.

    noun_labels: the released pseudo-labels (b, L), if the configuration asks for them. Returns L
    under "total", and every term as weighted in it.
    """
    scales = model.logit_scales()  # 1 / tau of the contrasts
    n, e_v = gather_triplets(d.n), gather_triplets(d.e_v)  # (B, C)
    terms = loss_kg(n, gather_triplets(d.n_prime), config)
    terms |= loss_seg_v(d, n, e_v, model.image_segmenter, scales, config)
    if d.word_logits is not None:
        terms |= loss_seg_t(d, noun_labels, config)
    if d.e_t is not None:
        terms |= loss_hcl(e_v, gather_triplets(d.e_t), scales, config)
    return {"total": torch.stack(list(terms.values())).sum(), **terms}


def loss_kg(n: Tensor, n_prime: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """lambda_kg L_kg: "kg"."""
    return {"kg": config.lambda_kg * knowledge_loss(n, n_prime)}


def loss_seg_v(
    d: Decomposition,
    n: Tensor,
    e_v: Tensor,
    image_segmenter: ImageSegmenter,
    scales: dict[str, Tensor],
    config: LossConfig,
) -> dict[str, Tensor]:
    """lambda_seg^v L_seg^v, TCL's loss on nouns (section 3.2): contrasts, areas and smoothness.

    n, e_v: of all B triplets (B, C).
    """
    masks = image_segmenter.mask_logits(d.x_v, n).sigmoid()  # these images, all nouns: (b, B, H, W)
    cosines = gather(region_cosines(d.x_v, masks, n))  # (N, B)
    cosines = cosines.repeat(len(n) // len(cosines), 1)  # a row for every triplet: (B, B)
    own, others = area_losses(gather(masks.mean((-2, -1))), config.area_prior)
    variation_of_features = gather(total_variation(d.x_v.movedim(-1, 1)))  # (N,)
    variation_of_masks = gather(total_variation(masks))  # (N,)
    terms = {
        "image_contrast": config.image_contrast * info_nce(e_v, n, scales["image"]),
        "region_contrast": config.region_contrast
        * symmetric_cross_entropy(scales["region"] * cosines),
        "area": config.area * own,
        "area_others": config.area_others * others,
        "smooth_features": config.smooth_features * variation_of_features.mean(),
        "smooth_masks": config.smooth_masks * variation_of_masks.mean(),
    }
    return {name: config.lambda_seg_v * term for name, term in terms.items()}


def loss_seg_t(
    d: Decomposition, noun_labels: Tensor | None, config: LossConfig
) -> dict[str, Tensor]:
    """lambda_seg^t L_seg^t (section 3.2), "seg_t": the weighted mean of the cross-entropies of all
    words of the global batch."""
    labels = noun_labels
    if config.pseudo_labels == "thesis":
        labels = pseudo_labels(d.word_logits, d.is_word)
    losses, weights = word_cross_entropy(d.word_logits, labels, config.none_weight)  # (b,) each
    mean = gather(losses).sum() / gather(weights).sum().clamp(min=1e-6)
    return {"seg_t": config.lambda_seg_t * mean}


def loss_hcl(
    e_v: Tensor, e_t: Tensor, scales: dict[str, Tensor], config: LossConfig
) -> dict[str, Tensor]:
    """lambda_hcl L_hcl (section 3.4) of all B regions and word segments, "hcl"."""
    return {"hcl": config.lambda_hcl * info_nce(e_v, e_t, scales["hcl"])}


# --- their formulas -------------------------------------------------------------------------------


def knowledge_loss(n: Tensor, n_prime: Tensor) -> Tensor:
    """Eq. 3.1: L_kg = 1/B sum_j ||n_j - n'_j||^2, (B, C) each, unit vectors."""
    return (n - n_prime).square().sum(-1).mean()


def info_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Eq. 3.7: symmetric InfoNCE of B pairs of unit vectors a, b (B, C), with scale = 1 / tau:

    -1/2B sum_i [log(exp(a_i.b_i / tau) / sum_j exp(a_i.b_j / tau))
                 + log(exp(a_i.b_i / tau) / sum_j exp(a_j.b_i / tau))]
    """
    return symmetric_cross_entropy(scale * a @ b.T)


def symmetric_cross_entropy(logits: Tensor) -> Tensor:
    """Mean cross-entropy of rows and of columns, the diagonal being right: (B, B) -> ()."""
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def region_cosines(x_v: Tensor, masks: Tensor, n: Tensor) -> Tensor:
    """cos(f_ij, n_j) with f_ij = sum m_ij x^v_i / (sum m_ij + 1e-6): image i under noun j.

    x_v: (b, H, W, C); masks: (b, B, H, W); n: (B, C). Returns (b, B).
    """
    pooled = torch.einsum("bthw,bhwc->btc", masks, x_v)
    pooled = pooled / (masks.sum((-2, -1))[..., None] + 1e-6)
    return (F.normalize(pooled, dim=-1, eps=1e-6) * n).sum(-1)


def area_losses(areas: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    """|mean area of own - prior| and the mean area of others, from the mean of every mask (N, B).

    Own: the matching entries of the B x B matrix of triplets. Others: all its off-diagonal ones, an
    image's own other noun included (each image stands for J rows of that matrix).
    """
    triplets = areas.repeat(areas.shape[1] // areas.shape[0], 1)  # (B, B)
    own = triplets.diagonal()
    others = (triplets.sum() - own.sum()) / (triplets.numel() - own.numel())
    return (own.mean() - prior).abs(), others


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of horizontal plus of vertical neighbours.

    (b, channels, H, W) -> (b,).
    """
    horizontal = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
    vertical = (x[..., 1:, :] - x[..., :-1, :]).abs().mean((1, 2, 3))
    return horizontal + vertical


def pseudo_labels(word_logits: Tensor, is_word: Tensor) -> Tensor:
    """Section 3.2: the label of a word is the likeliest of its J + 1 classes, 0 being "none".

    word_logits: (J + 1, b, L); is_word: (b, L). Returns (b, L): -1 at SOS, EOT and padding.
    """
    return word_logits.argmax(dim=0).masked_fill(~is_word, -1)


def word_cross_entropy(
    word_logits: Tensor, labels: Tensor, none_weight: float
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of each caption's words over J + 1 classes, and the weights' sum.

    word_logits: (J + 1, b, L); labels: (b, L), -1 is ignored; class 0 ("none") weighs
    `none_weight`, the others 1. Returns (b,) each.
    """
    by_class = word_logits.transpose(0, 1)  # (b, J + 1, L)
    loss = F.cross_entropy(by_class, labels, ignore_index=-1, reduction="none")
    weight = torch.where(labels == 0, none_weight, 1.0).masked_fill(labels < 0, 0.0)
    return (weight * loss).sum(1), weight.sum(1)


# --- what travels between processes ---------------------------------------------------------------


def gather(x: Tensor, dim: int = 0) -> Tensor:
    """Every process's x in the order of their ranks, joined along `dim`, with gradients to all.

    All processes must hold the same shape. With one process it is the identity.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x.movedim(dim, 0).contiguous()).movedim(0, dim)


def gather_triplets(x: Tensor) -> Tensor:
    """Every process's (J, b, ...) as the B triplets of the global batch: (B, ...)."""
    return gather(x, dim=1).flatten(0, 1)


class _Gather(torch.autograd.Function):
    """all_gather, and its transpose: the sum of what all processes send back, this one's part."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
