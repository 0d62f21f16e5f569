"""Segmentation without any training: CLIP's last visual block changed, by a protocol of its own.

MaskCLIP is the prior branch that TCL and the released program mix in (`clip.maskclip`); SCLIP,
ClearCLIP and NACLIP came later. What they change is one function each, below. From the block's
output to a label map they publish by another protocol than section 4.1's:

1. Channels have CLIP's own statistics. The image is resized to a short side of 336 (Cityscapes 560)
   and cut into windows of 224, one every 112 pixels; NACLIP takes an image of VOC whole.
2. A patch's score is its cosine with a name's embedding: the mean over CLIP's 80 templates.
   Names come from published lists, with several alternatives for a class and, on VOC and
   COCO-Object, 26 things that surround objects for the background.
3. Cosines are averaged where windows overlap and resized to the image's own size.
4. PAMR refines them there (10 iterations, distances 8 and 16), unless --no-pamr.
5. softmax(40 cosine) over all names of all classes. SCLIP: 65 on VOC, 50 on Context and on
   COCO-Object.
6. Of the alternatives of a class the best counts. The label is the arg-max over classes;
   background where it is below 0.1 or a name of the background is best.

Steps 3 and 6 are `evaluate.Segmenter`'s, like everything that is not written here. Figures of this
protocol and of `evaluate.py` are no comparison: the words alone may move VOC by ten points. The
protocol is NACLIP's, with SCLIP's scales. ClearCLIP's own program has other settings (short side
448; thresholds 0.5 on VOC, 0.4 on COCO-Object); here it runs by this one.

Examples:
    python training_free.py --dataset voc                        # NACLIP
    python training_free.py --dataset all --method sclip --no-pamr
    python training_free.py --dataset voc --method code --checkpoint code_released.pth
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor

from clip import (
    IMAGE_MEAN,
    IMAGE_STD,
    IMAGENET_TEMPLATES,
    cosines,
    dense_embedding,
    maskclip,
    merge_heads,
    split_heads,
    visual_hidden,
)
from config import (
    MASK_PRESETS,
    EvalConfig,
    MaskConfig,
    UserError,
    given_options,
    option,
    parse,
    run_script,
)
from datasets import Benchmark
from evaluate import (
    Segmenter,
    check_world,
    choose_checkpoint,
    evaluate_all,
    load_benchmarks,
    load_method,
    resize,
    words_of,
)
from model import CoDe
from pamr import pamr
from support.device import autocast, choose_device
from support.distributed import (
    first_process_first,
    lost_processes,
    start_processes,
    stop_processes,
)

# --- what the last visual block does instead of attending -----------------------------------------
# From hidden states with the class token first, x (B, 1 + h*w, width), to the block's output.


def sclip(block: ResidualAttentionBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A = softmax(s q q^T) + softmax(s k k^T), s = 1 / sqrt(d); residual and MLP kept (SCLIP, Wang
    et al., ECCV 2024)."""
    q, k, v = split_heads(block, x)
    attention = F.scaled_dot_product_attention
    x = x + merge_heads(block, attention(q, q, v) + attention(k, k, v))
    return x + block.mlp(block.ln_2(x))


def clearclip(block: ResidualAttentionBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A = softmax(s q q^T), neither residual nor MLP (ClearCLIP, Lan et al., ECCV 2024)."""
    q, _, v = split_heads(block, x)
    return merge_heads(block, F.scaled_dot_product_attention(q, q, v))


def naclip(block: ResidualAttentionBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A = softmax(s k k^T + w), neither residual nor MLP (NACLIP, Hajimiri et al., WACV 2025).

    w_pq = exp(-|p - q|^2 / (2 * 5^2)) of patches p, q of the grid, 0 with the class token.
    """
    _, k, v = split_heads(block, x)
    return merge_heads(block, F.scaled_dot_product_attention(k, k, v, attn_mask=nearness(grid, k)))


def nearness(grid: tuple[int, int], like: Tensor) -> Tensor:
    """NACLIP's w, (1 + h*w, 1 + h*w), on the device and in the type of another tensor."""
    ys, xs = (torch.arange(side, device=like.device, dtype=torch.float32) for side in grid)
    place = torch.cartesian_prod(ys, xs)  # (h*w, 2)
    weight = (-(place[:, None] - place).square().sum(-1) / (2 * 5**2)).exp()
    return F.pad(weight, (1, 0, 1, 0)).to(like.dtype)


DENSE = {"maskclip": maskclip, "sclip": sclip, "clearclip": clearclip, "naclip": naclip}


# --- the protocol ---------------------------------------------------------------------------------

SCLIP_SCALES = {"voc": 65.0, "context": 50.0, "coco_object": 50.0}
# Lines as `evaluate.read_names` reads them, the background's first where a benchmark has one.
NAMES = Path(__file__).parent / "datasets" / "names_training_free.json"


@dataclass
class TrainingFreeConfig(MaskConfig):
    """How these methods make masks of words. CoDe is evaluated by their protocol too.

    `prior_scale` and `prior_bias` have no effect: cosines are mixed as they are.
    """

    method: str = option(
        "naclip", "'maskclip', 'sclip', 'clearclip', 'naclip', or with --checkpoint 'code'"
    )
    background: float = option(0.1, "threshold of the background, of a probability", low=0, high=1)
    softmax_scale: float = option(40.0, "factor of the cosines before the softmax over all words")
    pamr_dilations: tuple[int, ...] = option((8, 16), "distances of PAMR's neighbours")
    short_side: int = option(336, "images are resized to this short side", low=1)
    window: int = option(224, "side of a sliding window", low=1)
    stride: int = option(112, "distance of two windows", low=1)


def for_benchmark(
    config: TrainingFreeConfig, dataset: str, given: Sequence[str] | set[str] = ()
) -> TrainingFreeConfig:
    """The options with the published exceptions of a benchmark, but for those that are given."""
    changes: dict = {}
    if dataset == "cityscapes":
        changes["short_side"] = 560
    if config.method == "naclip" and dataset == "voc":  # taken whole, without windows
        changes["window"] = config.long_side
    if config.method == "sclip" and dataset in SCLIP_SCALES:
        changes["softmax_scale"] = SCLIP_SCALES[dataset]
    return replace(config, **{k: v for k, v in changes.items() if k not in given})


def training_free_names(dataset: str) -> list[str]:
    """The lines of a benchmark's classes, the background's first where it has one."""
    return json.loads(NAMES.read_text("utf-8"))[dataset]


class TrainingFree(Segmenter):
    """Masks by the training-free protocol: a softmax over all words of all classes.

    model: None, or a trained CoDe, which sees images as it did in training and is mixed with the
    frozen prior branch as in section 4.1, cosines with cosines.
    """

    protocol, templates = "training-free", IMAGENET_TEMPLATES
    usual_names = "training-free names"

    def statistics(self) -> tuple:
        """CLIP's own, but for CoDe."""
        if self.model is not None:
            return IMAGE_MEAN, IMAGE_STD
        return open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD

    def word_scores(self, pixels: Tensor) -> Tensor:
        """Probabilities of all words, at the image's own size: (1, 3, H, W) -> (words, h, w).

        A large image is taken at `long_side`: refined at 12 million pixels, 30 words would fill a
        laptop.
        """
        config = self.config
        scale = min(1.0, config.long_side / max(pixels.shape[-2:]))
        size = [max(1, round(side * scale)) for side in pixels.shape[-2:]]
        cosine = resize(self.slide(pixels)[None], size)
        if config.pamr:
            cosine = pamr(pixels, cosine, dilations=config.pamr_dilations)
        return (config.softmax_scale * cosine[0]).softmax(0)

    def patch_scores(self, images: Tensor) -> Tensor:
        """Cosines of patches with the words; of CoDe's cells, on the mask grid."""
        patches = tuple(side // self.patch for side in images.shape[-2:])
        config = self.config
        features = maskclip if self.model is not None else DENSE[config.method]
        with autocast(self.device, self.precision):
            hidden = visual_hidden(self.clip, images)
            dense = dense_embedding(self.clip, hidden, patches, features)
            prior = cosines("bpc,nc->bnp", dense, self.prior_embedding).unflatten(2, patches)
            if self.model is None:
                return prior
            x_v = self.model.image_segmenter(hidden, tuple(images.shape[-2:]))
            masks = cosines("bhwc,nc->bnhw", x_v, self.class_embedding)
        prior = resize(prior, masks.shape[-2:])
        return (1 - config.prior_weight) * masks + config.prior_weight * prior


# --- the script -----------------------------------------------------------------------------------


def lines_of(benchmark: Benchmark, config: TrainingFreeConfig) -> tuple[list[str], str | None]:
    """The line of every class, and the background's own where a benchmark has one."""
    names = training_free_names(benchmark.name)
    background, names = names[: int(benchmark.background)], names[int(benchmark.background) :]
    behind = ",".join(background) if config.background_words is None else config.background_words
    return words_of(names, benchmark, config), behind or None


def segmenter_of(
    benchmark: Benchmark,
    clip: open_clip.CLIP,
    model: CoDe | None,
    config: TrainingFreeConfig,
    given: set[str],
) -> TrainingFree:
    """A segmenter of a benchmark's classes, with the exceptions and words that belong to it."""
    words, background = lines_of(benchmark, config)
    config = for_benchmark(config, benchmark.name, given)
    return TrainingFree(clip, model, words, replace(config, background_words=background))


def check_method(config: MaskConfig) -> None:
    """Raises UserError for an unknown method."""
    if config.method not in ("code", *DENSE):
        raise UserError(f"--method {config.method}: 'code' or one of {', '.join(DENSE)}")


def main() -> None:
    config, settings = parse(__doc__, EvalConfig, TrainingFreeConfig, presets=MASK_PRESETS)
    given = given_options()
    if "checkpoint" in given and "method" not in given:
        settings.method = "code"
    check_method(settings)
    if config.predictions:
        raise UserError("--predictions: evaluate.py reads label maps of any protocol")
    benchmarks = load_benchmarks(config)
    for benchmark in benchmarks:  # mistakes in words, before CLIP's weights are fetched
        lines_of(benchmark, settings)
    device = choose_device(settings.device)
    start_processes(device, config.timeout)
    choose_checkpoint(settings, config.dataset)
    with lost_processes():
        with first_process_first():  # which fetches CLIP's weights
            clip, model = load_method(settings, device)
        names = [benchmark.name for benchmark in benchmarks]
        check_world(clip, names, settings.checkpoint or f"--clip {settings.clip}")
        evaluate_all(
            lambda benchmark: segmenter_of(benchmark, clip, model, settings, given),
            benchmarks,
            config,
        )
    stop_processes()


if __name__ == "__main__":
    run_script(main)
