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

from clip import (
    IMAGE_MEAN,
    IMAGE_STD,
    IMAGENET_TEMPLATES,
    PRIOR_TEMPLATES,
    check_lengths,
    cosines,
    template_embedding,
    visual_hidden,
)
from config import MaskConfig, ModelConfig
from datasets.protocols import alternatives, completed
from dense import DENSE, word_probabilities, word_similarity
from model import CoDe
from pamr import pamr
from sources import to_rgb
from support.device import autocast, choose_precision, enough_memory


class Segmenter:
    """Masks of N given words in any image; what depends on the words alone is computed once.

    model: a trained CoDe, or None for the prior branch alone, with the features of --method.
    names: the words; of alternatives, separated by commas, the best counts.
    """

    def __init__(
        self, clip: open_clip.CLIP, model: CoDe | None, names: Sequence[str], config: MaskConfig
    ):
        self.clip, self.model, self.config = clip, model, completed(config)
        self.by_thesis = self.config.protocol == "thesis"
        self.features = config.method if config.method in DENSE else config.prior
        self.device = clip.text_projection.device
        self.precision = choose_precision(config.precision, self.device)
        self.patch = clip.visual.patch_size[0]
        self.cells_per_patch = (model.config if model else ModelConfig()).cells_per_patch
        # CoDe sees images as it did in training, under either protocol.
        imagenet = self.by_thesis or model is not None
        clips = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        statistics = (IMAGE_MEAN, IMAGE_STD) if imagenet else clips
        self.mean, self.std = (
            torch.tensor(v, device=self.device).view(3, 1, 1) for v in statistics
        )
        # Words of the background are one class more, in row 0 of the scores.
        self.first_class = int(bool(config.background_words))
        words = [alternatives(line, "query") for line in names]
        if self.first_class:
            words.insert(0, alternatives(config.background_words, "--background-words"))
        self.counts, words = [len(line) for line in words], sum(words, [])
        templates = PRIOR_TEMPLATES if self.by_thesis else IMAGENET_TEMPLATES
        check_lengths(words, len(model.context) if model else 0, templates)
        self.prior_embedding = template_embedding(clip, words, templates)  # (words, C)
        if model is not None:  # n_c; TCL's released model has no learned context
            learned = len(model.context) > 0
            self.class_embedding = model.class_embedding(words) if learned else self.prior_embedding

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Boolean masks of the words and their scores in [0, 1]: (N, H, W) each, the image's size.

        image: of any mode, taken as it stands (EXIF's orientation is the caller's to apply).
        A pixel is in at most one mask: in none where no score exceeds the background's threshold.
        """
        size, scores = (image.height, image.width), self.scores(to_rgb(image))
        best, index = arg_max(scores, size)
        labels = with_background(best, index - self.first_class, self.config.background)
        scores = F.interpolate(scores[None, self.first_class :], size, mode="bilinear")[0]
        return torch.stack([labels == i + 1 for i in range(len(scores))]), scores

    @torch.no_grad()
    def masks(self, images: Tensor) -> Tensor:
        """Soft masks of normalised images, (B, 3, H, W) -> (B, words, H, W) in [0, 1]; under the
        training-free protocol the bare cosines of pixels and words.

        Sizes that are no multiple of the patch are padded with zeros on all sides (the odd pixel
        right and below); all of it runs on the padded image and only the result is cut back.
        """
        config, (height, width) = self.config, images.shape[-2:]
        extra_h, extra_w = -height % self.patch, -width % self.patch
        top, left = extra_h // 2, extra_w // 2
        images = F.pad(images, (left, extra_w - left, top, extra_h - top))
        size = tuple(images.shape[-2:])
        patches = tuple(side // self.patch for side in size)

        masks = prior = None
        with autocast(self.device, self.precision):
            hidden = visual_hidden(self.clip, images)
            if self.model is None or config.prior_weight > 0:
                s = word_similarity(self.clip, hidden, patches, self.features, self.prior_embedding)
                if self.by_thesis:
                    s = (config.prior_scale * (s - config.prior_bias)).sigmoid()
                if self.by_thesis or self.model is not None:  # to the grid of CoDe's masks
                    grid = tuple(self.cells_per_patch * side for side in patches)
                    s = F.interpolate(s, grid, mode="bilinear", align_corners=False)
                masks = prior = s
            if self.model is not None:
                segmenter = self.model.image_segmenter
                x_v = segmenter(hidden, size)
                if self.by_thesis:
                    masks = segmenter.mask_logits(x_v, self.class_embedding).sigmoid()
                else:
                    masks = cosines("bhwc,nc->bnhw", x_v, self.class_embedding)
        if config.pamr and self.by_thesis:
            masks = pamr(images, masks, config.pamr_iterations, config.pamr_dilations)
        if self.model is not None and prior is not None:
            masks = (1 - config.prior_weight) * masks + config.prior_weight * prior
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        return masks[..., top : top + height, left : left + width]

    def scores(self, image: Image.Image) -> Tensor:
        """Masks of a whole RGB image by sliding windows, at the size these see: (N, h, w); under
        the training-free protocol their probabilities, at the image's own size (its long side at
        most `long_side`). Words of the background have one more row, the first."""
        config = self.config
        pixels = torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1)[None].float()
        scale = min(config.short_side / min(image.size), config.long_side / max(image.size))
        size = [max(1, int(side * scale + 0.5)) for side in (image.height, image.width)]
        x = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        x = (x.round().clamp(0, 255) / 255 - self.mean) / self.std

        rows, columns = (window_starts(side, config.window, config.stride) for side in size)
        with enough_memory("use --no-pamr, fewer words, or a smaller --long-side"):
            total = torch.zeros(1, len(self.prior_embedding), *size, device=self.device)
            count = torch.zeros(size, device=self.device)
            for top in rows:
                for left in columns:
                    here = ..., slice(top, top + config.window), slice(left, left + config.window)
                    total[here] += self.masks(x[here])
                    count[here] += 1
            scores = (total / count)[0]
            if not self.by_thesis:
                scores = word_probabilities(scores, pixels, config)
            # Of words to classes: the best of each one's alternatives.
            return torch.stack([some.amax(0) for some in scores.split(self.counts)])

    def label_map(
        self, image: Image.Image, background: bool, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Class index of every pixel, (H, W) int64, at the image's own size or another one. With
        background, 0 is "none of the words"."""
        best, index = arg_max(self.scores(image), size or (image.height, image.width))
        if not background:
            return index
        return with_background(best, index - self.first_class, self.config.background)


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
    """Labels of `arg_max` with the background as class 0: where no mask exceeds the threshold, or a
    word of the background, index -1, is the best."""
    return torch.where(best > threshold, index + 1, 0)
