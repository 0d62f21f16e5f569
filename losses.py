"""Eqs. 3.1, 3.7, 3.8 and the terms of L_seg^v and L_seg^t, as functions of the global batch.

Every process calls these with its own pairs; what a loss needs of the others is gathered, with
gradients. So every process computes the same losses, and K processes with b pairs each give the
gradients of one process with K * b pairs once DistributedDataParallel has averaged them.
Shapes: b pairs here, B in the global batch, T = J * B triplets in noun-major order.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from config import LossConfig, process_count, process_rank


@dataclass
class Decomposition:
    """What the model makes of b pairs: all that the losses need."""

    n: Tensor  # noun embeddings n_j (J*b, C)
    n_knowledge: Tensor  # n'_j of the same nouns (J*b, C), without gradient
    x_v: Tensor  # pixel-wise image embedding (b, H, W, C)
    masks: Tensor  # soft masks of these images under the nouns of all: (b, T, H, W)
    e_v: Tensor  # region embeddings of Eq. 3.6 (J*b, C)
    e_t: Tensor | None = None  # word segment embeddings of Eq. 3.6 (J*b, C); None without C
    word_cases: Tensor | None = None  # Eq. 3.3: log-probabilities (b, J + 1, L), case 0 = none


# --- the global batch -----------------------------------------------------------------------------


def local_rows(pairs: int, device: torch.device) -> Tensor:
    """Which pairs of the global batch are this process's `pairs` ones."""
    return process_rank() * pairs + torch.arange(pairs, device=device)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(process_count())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(process_count())[process_rank()]


def gather(x: Tensor, dim: int = 0) -> Tensor:
    """Concatenate every process's x along `dim`, in rank order, with gradients to all of them.

    All processes must hold the same shape. With one process this is the identity.
    """
    if process_count() == 1:
        return x
    return _Gather.apply(x.movedim(dim, 0).contiguous()).movedim(0, dim)


def gather_triplets(x: Tensor, pairs: int) -> Tensor:
    """Gather noun-major triplets: (J*b, ...) -> (T, ...)."""
    return gather(x.unflatten(0, (-1, pairs)), dim=1).flatten(0, 1)


# --- contrastive losses ---------------------------------------------------------------------------


def symmetric_cross_entropy(logits: Tensor) -> Tensor:
    """Mean cross-entropy of rows and of columns, the diagonal being right: (T, T) -> ()."""
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def info_nce(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """Eq. 3.7: symmetric InfoNCE over all T triplets, of unit vectors a, b (T, C).

    1 / tau = exp(log_scale), capped at 100.
    """
    return symmetric_cross_entropy(capped_scale(log_scale) * a @ b.T)


def capped_scale(log_scale: Tensor) -> Tensor:
    """1 / tau of a learned log scale, at most 100."""
    return log_scale.exp().clamp(max=100)


def knowledge_loss(n: Tensor, n_knowledge: Tensor) -> Tensor:
    """Eq. 3.1: L_kg, mean squared distance of noun embeddings to hand-written ones (T, C) -> ()."""
    return (n - n_knowledge).square().sum(-1).mean()


# --- terms of L_seg^v (TCL's loss on nouns) -------------------------------------------------------


def region_logits(x_v: Tensor, masks: Tensor, nouns: Tensor) -> Tensor:
    """cos(f_ij, n_j): f_ij = sum m_ij x^v_i / (sum m_ij + 1e-6), image i under noun j.

    x_v: (b, H, W, C); masks: (b, T, H, W); nouns: (T, C). Returns (b, T).
    """
    pooled = torch.einsum("btp,bpc->btc", masks.flatten(2), x_v.flatten(1, 2))
    pooled = pooled / (masks.flatten(2).sum(-1, keepdim=True) + 1e-6)
    return (F.normalize(pooled, dim=-1, eps=1e-6) * nouns).sum(-1)


def area_losses(areas: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    """Area terms from the mean of every mask, (B, T): |mean of own - prior|, |mean of others - 0|.

    Own: the matching entries of the T x T matrix of triplets. Others: all its off-diagonal ones, an
    image's own other noun included (each image stands for J rows of that matrix).
    """
    nouns_per_pair = areas.shape[1] // areas.shape[0]
    triplets = areas.repeat(nouns_per_pair, 1)  # (T, T)
    own = triplets.diagonal()
    others = (triplets.sum() - own.sum()) / (triplets.numel() - own.numel())
    return (own.mean() - prior).abs(), others.abs()


def total_variation(planes: Tensor) -> Tensor:
    """Mean absolute difference of horizontal plus of vertical neighbours: (..., H, W) -> (...).

    The mean is taken per plane, so that planes of several processes can be averaged.
    """
    horizontal = (planes[..., 1:] - planes[..., :-1]).abs().mean((-2, -1))
    vertical = (planes[..., 1:, :] - planes[..., :-1, :]).abs().mean((-2, -1))
    return horizontal + vertical


# --- L_seg^t --------------------------------------------------------------------------------------


def pseudo_labels(word_cases: Tensor, eot: Tensor) -> Tensor:
    """Section 3.2: the label of a word is the likeliest of its J + 1 cases.

    word_cases: (b, J + 1, L). SOS, EOT and padding get -1 (no label). Returns (b, L) int64.
    """
    position = torch.arange(word_cases.shape[-1], device=eot.device)
    word = (position > 0) & (position < eot[:, None])
    return word_cases.argmax(dim=1).masked_fill(~word, -1)


def word_mask_loss(word_cases: Tensor, labels: Tensor, none_weight: float) -> Tensor:
    """L_seg^t: cross-entropy of words over J + 1 cases, weighted mean over the global batch.

    word_cases: log-probabilities (b, J + 1, L); labels: (b, L), -1 is ignored; class 0 ("none")
    weighs `none_weight`, the others 1.
    """
    weight = torch.where(labels == 0, none_weight, 1.0).masked_fill(labels < 0, 0.0)
    picked = word_cases.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    per_caption = torch.stack([-(weight * picked).sum(1), weight.sum(1)], dim=1)
    losses, weights = gather(per_caption).sum(0)
    return losses / weights.clamp(min=1e-6)


# --- all together ---------------------------------------------------------------------------------


def code_losses(
    d: Decomposition, model, caption_tokens: Tensor, noun_labels: Tensor, config: LossConfig
) -> dict[str, Tensor]:
    """Eq. 3.8: the total loss L, under "total", and every term as weighted in it.

    model: for its three temperatures; caption_tokens, noun_labels: (b, L) as in `data.Batch`.
    """
    pairs = len(d.x_v)
    n = gather_triplets(d.n, pairs)
    e_v = gather_triplets(d.e_v, pairs)
    terms = {"kg": config.lambda_kg * knowledge_loss(n, gather_triplets(d.n_knowledge, pairs))}

    similarity = gather(region_logits(d.x_v, d.masks, n))  # (B, T)
    similarity = similarity.repeat(len(n) // len(similarity), 1)  # (T, T)
    own, others = area_losses(gather(d.masks.mean((-2, -1))), config.area_prior)
    features = total_variation(d.x_v.movedim(-1, 1)).mean(1)  # (b,)
    smooth = gather(torch.stack([features, total_variation(d.masks).mean(1)], dim=1)).mean(0)
    seg_v = {
        "image_contrast": config.image_contrast * info_nce(e_v, n, model.image_log_scale),
        "region_contrast": config.region_contrast
        * symmetric_cross_entropy(capped_scale(model.region_log_scale) * similarity),
        "area": config.area * own,
        "area_others": config.area_others * others,
        "smooth_features": config.smooth_features * smooth[0],
        "smooth_masks": config.smooth_masks * smooth[1],
    }
    terms |= {name: config.lambda_seg_v * value for name, value in seg_v.items()}

    if d.word_cases is not None:
        labels = noun_labels
        if config.pseudo_labels == "thesis":
            labels = pseudo_labels(d.word_cases, caption_tokens.argmax(dim=-1))
        loss = word_mask_loss(d.word_cases, labels, config.none_weight)
        terms["seg_t"] = config.lambda_seg_t * loss
    if d.e_t is not None:
        e_t = gather_triplets(d.e_t, pairs)
        terms["hcl"] = config.lambda_hcl * info_nce(e_v, e_t, model.hcl_log_scale)
    return {"total": torch.stack(list(terms.values())).sum(), **terms}
