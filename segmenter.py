"""Words and an image to masks (section 4.1): windows, the prior branch, refinement, background.

What `evaluate.py`, `segment.py` and training's own evaluation share.
"""

from collections.abc import Sequence

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from checkpoints.ours import load_model
from clip import (
    DENSE,
    IMAGE_MEAN,
    IMAGE_STD,
    PRIOR_TEMPLATES,
    cosines,
    dense_embedding,
    load_clip,
    template_embedding,
    visual_hidden,
)
from config import MaskConfig, ModelConfig, UserError
from model import CoDe
from pamr import pamr
from support.device import autocast, choose_precision


class Segmenter:
    """Masks of N given words in any image; what depends on the words alone is computed once.

    model: a trained CoDe, or None for the prior branch alone, with the features of --method.
    """

    def __init__(
        self, clip: open_clip.CLIP, model: CoDe | None, names: Sequence[str], config: MaskConfig
    ):
        self.clip, self.model, self.config = clip, model, config
        self.features = config.method if config.method in DENSE else config.prior
        self.device = clip.text_projection.device
        self.precision = choose_precision(config.precision, self.device)
        self.patch = clip.visual.patch_size[0]
        self.cells_per_patch = (model.config if model else ModelConfig()).cells_per_patch
        self.mean, self.std = (
            torch.tensor(v, device=self.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD)
        )
        self.prior_embedding = template_embedding(clip, names, PRIOR_TEMPLATES)  # (N, C)
        if model is not None:  # n_c; TCL's released model has no learned context
            learned = len(model.context) > 0
            self.class_embedding = model.class_embedding(names) if learned else self.prior_embedding

    @torch.no_grad()
    def masks(self, images: Tensor) -> Tensor:
        """Soft masks of normalised images: (B, 3, H, W) -> (B, N, H, W) in [0, 1].

        Sizes that are no multiple of the patch are padded with zeros on all sides (the odd pixel
        right and below); all of it runs on the padded image and only the result is cut back.
        """
        config, (height, width) = self.config, images.shape[-2:]
        extra_h, extra_w = -height % self.patch, -width % self.patch
        top, left = extra_h // 2, extra_w // 2
        images = F.pad(images, (left, extra_w - left, top, extra_h - top))
        size = tuple(images.shape[-2:])
        grid = tuple(self.cells_per_patch * side // self.patch for side in size)

        masks = prior = None
        with autocast(self.device, self.precision):
            hidden = visual_hidden(self.clip, images)
            if self.model is None or config.prior_weight > 0:
                masks = prior = self.prior_masks(hidden, size, grid)
            if self.model is not None:
                x_v = self.model.image_segmenter(hidden, size)
                masks = self.model.image_segmenter.mask_logits(x_v, self.class_embedding).sigmoid()
        if config.pamr:
            masks = pamr(images, masks, config.pamr_iterations, config.pamr_dilations)
        if self.model is not None and prior is not None:
            masks = (1 - config.prior_weight) * masks + config.prior_weight * prior
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        return masks[..., top : top + height, left : left + width]

    def prior_masks(
        self, hidden: Tensor, image_size: tuple[int, int], grid: tuple[int, int]
    ) -> Tensor:
        """The prior branch: sigmoid(w (s - b)), s: cosines of patches and words: (B, N, *grid)."""
        patches = tuple(side // self.patch for side in image_size)
        dense = dense_embedding(self.clip, hidden, patches, self.features)  # (B, h*w, C)
        similarity = cosines("bpc,nc->bnp", dense, self.prior_embedding).unflatten(2, patches)
        prior = (self.config.prior_scale * (similarity - self.config.prior_bias)).sigmoid()
        return F.interpolate(prior, grid, mode="bilinear", align_corners=False)

    def scores(self, image: Image.Image) -> Tensor:
        """Masks of a whole RGB image by sliding windows, at the size these see: (N, h, w)."""
        config = self.config
        x = torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1)[None].float()
        scale = min(config.short_side / min(image.size), config.long_side / max(image.size))
        size = [max(1, int(side * scale + 0.5)) for side in (image.height, image.width)]
        x = F.interpolate(x, size, mode="bilinear", align_corners=False).round().clamp(0, 255) / 255
        x = (x - self.mean) / self.std

        rows, columns = (window_starts(side, config.window, config.stride) for side in size)
        total = torch.zeros(1, len(self.prior_embedding), *size, device=self.device)
        count = torch.zeros(size, device=self.device)
        for top in rows:
            for left in columns:
                here = ..., slice(top, top + config.window), slice(left, left + config.window)
                total[here] += self.masks(x[here])
                count[here] += 1
        return (total / count)[0]

    def label_map(self, image: Image.Image, background: bool) -> Tensor:
        """Class index of every pixel: (H, W) int64. With background, 0 is "none of the words"."""
        best, index = arg_max(self.scores(image), (image.height, image.width))
        if not background:
            return index
        return with_background(best, index, background_threshold(self.config))


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride`, the last one pulled back inside."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, side - window), 0) for i in range(count)]


def arg_max(scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Maximum and arg-max over the classes of scores (N, h, w), resized to an image's own size.

    Returns (H, W) in [0, 1] and (H, W) int64. A few classes are resized at a time: all of them at
    the image's own size could fill the memory.
    """
    best = torch.zeros(size, device=scores.device)
    index = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for start in range(0, len(scores), 16):
        some = scores[None, start : start + 16]
        some = F.interpolate(some, size, mode="bilinear", align_corners=False)[0]
        value, which = some.max(0)
        index = torch.where(value > best, which + start, index)
        best = torch.maximum(best, value)
    return best, index


def with_background(best: Tensor, index: Tensor, threshold: float) -> Tensor:
    """Labels of `arg_max` with the background as class 0, where no mask exceeds the threshold."""
    return torch.where(best > threshold, index + 1, 0)


def background_threshold(config: MaskConfig) -> float:
    """The given threshold, or TCL's: 0.4 on refined masks, 0.5 on unrefined ones."""
    if config.background is not None:
        return config.background
    return 0.4 if config.pamr else 0.5


def load_method(config: MaskConfig, device: torch.device) -> tuple[open_clip.CLIP, CoDe | None]:
    """The CLIP and the model (None without training) that the options ask for. Raises UserError."""
    if config.stride > config.window:
        raise UserError(
            f"--stride {config.stride} beyond --window {config.window}: gaps would stay"
        )
    if config.method not in ("code", *DENSE):
        raise UserError(f"--method {config.method}: 'code' or one of {', '.join(DENSE)}")
    if config.prior not in DENSE:
        raise UserError(f"--prior {config.prior}: not one of {', '.join(DENSE)}")
    if config.checkpoint is None:
        if config.method == "code":
            raise UserError("--method code needs --checkpoint FILE (train.py writes one)")
        return load_clip(config.clip, config.clip_weights).to(device), None
    model = load_model(config.checkpoint, device)
    return model.clip, model if config.method == "code" else None
