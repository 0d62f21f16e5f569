"""Pixel-adaptive mask refinement (Araslanov & Roth, CVPR 2020), used on masks at evaluation (4.1).

Every pixel has 8 neighbours at each of several dilations, weighted by how alike the image is in
both places. The weights of a pixel sum to one, so refinement is a random walk on the pixels: a
sparse row-stochastic matrix (H*W rows with 8 * len(dilations) entries each) that is applied to all
masks a few times. `F.embedding_bag` is that product: row p of the result is the weighted sum of
the rows of its neighbours, computed without ever forming the neighbours of every mask.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_AROUND = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


@lru_cache(maxsize=4)  # the same for all windows of a size
def neighbours(height: int, width: int, dilations: tuple[int, ...], device: torch.device) -> Tensor:
    """Flat index of every pixel's neighbours, borders replicated: (H*W, 8 * len(dilations)) int32.

    The walk reads it as often as the weights: half as many bytes as int64 is almost twice as fast.
    """
    kind = {"dtype": torch.int32, "device": device}
    rows = torch.arange(height, **kind)[:, None, None]
    columns = torch.arange(width, **kind)[None, :, None]
    steps = torch.tensor([(d * y, d * x) for d in dilations for y, x in _AROUND], **kind)
    y = (rows + steps[:, 0]).clamp(0, height - 1)  # (H, 1, K)
    x = (columns + steps[:, 1]).clamp(0, width - 1)  # (1, W, K)
    return (y * width + x).flatten(0, 1)


def affinity(image: Tensor, index: Tensor, dilations: Sequence[int]) -> Tensor:
    """Weights of a pixel's neighbours: softmax of -|x_p - x_q| / (1e-8 + 0.1 std), channel mean.

    The standard deviation is each channel's over the sampled values, the pixel itself counted once
    per dilation. image: (3, H, W), index: `neighbours`. Returns (H*W, K), rows sum to 1.
    """
    again = len(dilations)
    count = index.shape[1] + again
    logits = 0.0
    for channel in image.flatten(1):  # (H*W,); one at a time keeps the memory small
        around, centre = channel[index], channel[:, None]  # (H*W, K), (H*W, 1)
        mean = (around.sum(1, keepdim=True) + again * centre) / count
        squares = (around - mean).square().sum(1, keepdim=True) + again * (centre - mean).square()
        spread = 1e-8 + 0.1 * (squares / (count - 1)).sqrt()
        logits = logits - (around - centre).abs() / spread
    return (logits / len(image)).softmax(dim=1)


@torch.no_grad()
def pamr(
    image: Tensor,
    masks: Tensor,
    iterations: int = 10,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
) -> Tensor:
    """Refine masks by the colours of the image.

    image: (B, 3, H, W), any range; masks: (B, N, h, w). The image is resized bilinearly (corners
    aligned) to the masks' size. Returns masks of the same shape, each value a weighted mean of the
    given ones. Extra memory: two copies of the masks and 16 * len(dilations) numbers
    per pixel, or 48 * len(dilations) while the weights are made.
    """
    height, width = masks.shape[-2:]
    image = F.interpolate(image.float(), (height, width), mode="bilinear", align_corners=True)
    index = neighbours(height, width, tuple(dilations), masks.device)
    refined = []
    for pixels, mask in zip(image, masks.float().flatten(2)):  # (3, H, W) and (N, H*W)
        weights = affinity(pixels, index, dilations)
        mask = mask.T.contiguous()
        for _ in range(iterations):
            mask = F.embedding_bag(index, mask, mode="sum", per_sample_weights=weights)
        refined.append(mask.T.unflatten(1, (height, width)))
    return torch.stack(refined)
