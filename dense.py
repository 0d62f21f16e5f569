"""Dense features of CLIP's own weights: the last visual block's features kept in place, four ways.

MaskCLIP is the thesis's prior branch and the start of its image segmenter (sections 3.2 and 4.1);
SCLIP, ClearCLIP and NACLIP came later. From features to masks they publish another protocol than
the thesis's, which is the second half of this file; its constants are in `datasets/protocols.py`.
"""

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor

from clip import cosines, heads, merged, project
from config import MaskConfig
from pamr import pamr

# --- what the last visual block does instead of attending -----------------------------------------
# From hidden states with the class token first, x (B, 1 + h*w, width), to the block's output.


def maskclip(block: ResidualAttentionBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A = 1: every token attends to itself alone; residual and MLP kept, as TCL does (MaskCLIP,
    Zhou et al., ECCV 2022). Token by token, so the class token may be missing."""
    _, _, v = heads(block, x)
    x = x + merged(block, v)
    return x + block.mlp(block.ln_2(x))


def sclip(block: ResidualAttentionBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A = softmax(s q q^T) + softmax(s k k^T), s = 1 / sqrt(d); residual and MLP kept (SCLIP, Wang
    et al., ECCV 2024)."""
    q, k, v = heads(block, x)
    attention = F.scaled_dot_product_attention
    x = x + merged(block, attention(q, q, v) + attention(k, k, v))
    return x + block.mlp(block.ln_2(x))


def clearclip(block: ResidualAttentionBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A = softmax(s q q^T), neither residual nor MLP (ClearCLIP, Lan et al., ECCV 2024)."""
    q, _, v = heads(block, x)
    return merged(block, F.scaled_dot_product_attention(q, q, v))


def naclip(block: ResidualAttentionBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A = softmax(s k k^T + w), neither residual nor MLP (NACLIP, Hajimiri et al., WACV 2025).

    w_pq = exp(-|p - q|^2 / (2 * 5^2)) of patches p, q of the grid, 0 with the class token.
    """
    _, k, v = heads(block, x)
    return merged(block, F.scaled_dot_product_attention(k, k, v, attn_mask=nearness(grid, k)))


def nearness(grid: tuple[int, int], like: Tensor) -> Tensor:
    """NACLIP's w, (1 + h*w, 1 + h*w), on the device and in the type of another tensor."""
    ys, xs = (torch.arange(side, device=like.device, dtype=torch.float32) for side in grid)
    place = torch.cartesian_prod(ys, xs)  # (h*w, 2)
    weight = (-(place[:, None] - place).square().sum(-1) / (2 * 5**2)).exp()
    return F.pad(weight, (1, 0, 1, 0)).to(like.dtype)


DENSE = {"maskclip": maskclip, "sclip": sclip, "clearclip": clearclip, "naclip": naclip}


def dense_embedding(
    clip: open_clip.CLIP, hidden: Tensor, grid: tuple[int, int], method: str = "maskclip"
) -> Tensor:
    """Dense features of a method in DENSE from `visual_hidden` of a grid of patches, projected and
    normalised: (B, h*w, C)."""
    visual = clip.visual
    x = DENSE[method](visual.transformer.resblocks[-1], hidden, grid)
    return project(visual.ln_post(x[:, 1:]), visual.proj)


def word_similarity(
    clip: open_clip.CLIP, hidden: Tensor, grid: tuple[int, int], method: str, words: Tensor
) -> Tensor:
    """Cosines of every patch's dense feature with words (N, C): (B, N, h, w)."""
    dense = dense_embedding(clip, hidden, grid, method)
    return cosines("bpc,nc->bnp", dense, words).unflatten(2, grid)


# --- from cosines to masks as these methods publish -----------------------------------------------


def word_probabilities(cosine: Tensor, image: Tensor, config: MaskConfig) -> Tensor:
    """softmax(scale * cosine) over all words, of cosines resized to the image and refined there.

    cosine: (N, h, w); image: (1, 3, H, W), any range. Returns (N, H, W), which sum to 1. A large
    image is taken at `long_side`: refined at 12 million pixels, 30 words would fill a laptop.
    """
    scale = min(1.0, config.long_side / max(image.shape[-2:]))
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    cosine = F.interpolate(cosine[None], size, mode="bilinear", align_corners=False)
    if config.pamr:
        cosine = pamr(image, cosine, config.pamr_iterations, config.pamr_dilations)
    return (config.softmax_scale * cosine[0]).softmax(0)
