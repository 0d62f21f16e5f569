"""The plain forms that bench.py measures against, written from their definitions."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

import clip
import model
import segmenter
from data import Batch


def plain_pamr(
    image: Tensor,
    masks: Tensor,
    iterations: int = 10,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
) -> Tensor:
    """PAMR as it is defined: all neighbours of all masks are formed in every step."""
    height, width = masks.shape[-2:]
    image = F.interpolate(image, (height, width), mode="bilinear", align_corners=True)

    def neighbours(x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 8 * len(dilations), H, W)
        shifted = []
        for d in dilations:
            padded = F.pad(x, (d, d, d, d), mode="replicate")
            for y in (0, d, 2 * d):
                for left in (0, d, 2 * d):
                    if (y, left) != (d, d):
                        shifted.append(padded[..., y : y + height, left : left + width])
        return torch.stack(shifted, dim=2)

    around, centre = neighbours(image), image[:, :, None]
    sampled = torch.cat([around, *[centre] * len(dilations)], dim=2)
    spread = 1e-8 + 0.1 * sampled.std(dim=2, keepdim=True)
    weights = (-(around - centre).abs() / spread).mean(1, keepdim=True).softmax(dim=2)
    for _ in range(iterations):
        masks = (neighbours(masks) * weights).sum(dim=2)
    return masks


def plain_upsample_and_convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def plain_block(block: ResidualAttentionBlock, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """open_clip's own forward pass of a block."""
    if mask is not None and mask.dim() > 2:  # of the text segmenter: one for every text and head
        mask = mask.expand(len(x), block.attn.num_heads, x.shape[1], x.shape[1]).flatten(0, 1)
    if mask is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return block(x, attn_mask=mask)


@contextlib.contextmanager
def plain_forms():
    """Ours with every piece replaced by its plain form."""
    with (
        mock.patch.object(model, "upsample_and_convolve", plain_upsample_and_convolve),
        mock.patch.object(model, "transformer_block", plain_block),
        mock.patch.object(clip, "transformer_block", plain_block),
        mock.patch.object(segmenter, "pamr", plain_pamr),
    ):
        yield


def padded(batch: Batch) -> Batch:
    """All texts of 77 tokens."""
    texts = ("caption_tokens", "noun_tokens", "knowledge_tokens")
    longer = {name: getattr(batch, name) for name in texts}
    return replace(batch, **{k: F.pad(v, (0, 77 - v.shape[1])) for k, v in longer.items()})
