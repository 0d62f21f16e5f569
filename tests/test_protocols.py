"""Protocols: words, alternatives, the background's words, softmax, and others' label maps."""

import json
import math

import golden
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import random_clip, random_model
from PIL import Image

import training_free
from clip import dense_embedding, embed_texts, tokenize, visual_hidden
from config import EvalConfig, MaskConfig, UserError
from datasets import DATASETS, Benchmark, load_benchmark
from evaluate import (
    Segmenter,
    alternatives,
    benchmark_words,
    check_predictions,
    evaluate,
    main,
    read_names,
    read_prediction,
    window_starts,
)
from pamr import pamr
from support.device import enough_memory
from support.draw import indexed
from training_free import (
    DENSE,
    TrainingFree,
    TrainingFreeConfig,
    for_benchmark,
    segmenter_of,
    training_free_names,
)
from training_free import main as training_free_main

RAW = str(golden.folder() / "raw")


def noise_image(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def resized(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def softmax_protocol(clip, image, classes, background, method, scale, threshold, refine, settings):
    """The training-free protocol with loops: label map (H, W) of lists of names a class."""
    short_side, window, stride = settings
    forms = [form("{}") for form in open_clip.OPENAI_IMAGENET_TEMPLATES]
    words = [*background, *(name for names in classes for name in names)]
    rows = []
    for word in words:
        vectors = [embed_texts(clip, tokenize([form.format(word)]))[0] for form in forms]
        mean = sum(vectors) / len(forms)
        rows.append(mean / mean.norm())
    width, height = image.size
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float()
    factor = short_side / min(width, height)
    small = resized(pixels, (round(height * factor), round(width * factor))).round().clamp(0, 255)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    x = (small / 255 - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    total, count = np.zeros((len(words), *x.shape[2:])), np.zeros(x.shape[2:])
    for top in window_starts(x.shape[2], window, stride):
        for left in window_starts(x.shape[3], window, stride):
            part = x[..., top : top + window, left : left + window]
            grid = part.shape[2] // 8, part.shape[3] // 8
            features = dense_embedding(clip, visual_hidden(clip, part), grid, DENSE[method])[0]
            cosine = torch.stack([features @ row for row in rows]).unflatten(1, grid)[None]
            here = slice(top, top + window), slice(left, left + window)
            total[(slice(None), *here)] += resized(cosine, part.shape[2:])[0].numpy()
            count[here] += 1
    cosine = resized(torch.tensor(total / count)[None].float(), (height, width))
    cosine = (pamr(pixels, cosine, 10, (8, 16)) if refine else cosine)[0].numpy()
    labels = np.zeros((height, width), int)
    for y in range(height):
        for z in range(width):
            powers = [math.exp(scale * c) for c in cosine[:, y, z]]
            shares = [power / sum(powers) for power in powers]
            best = [max(shares[: len(background)], default=0)]
            at = len(background)
            for names in classes:
                best.append(max(shares[at : at + len(names)]))
                at += len(names)
            winner = best.index(max(best))
            labels[y, z] = winner if best[winner] >= threshold else 0
    return labels


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("method, window", [("sclip", 32), ("naclip", 2048), ("maskclip", 24)])
def test_softmax_protocol_against_a_loop(method, window, refine):
    """Names, threshold, windows; 2048: an image that one window covers whole, as on VOC."""
    clip, image = random_clip(), noise_image(60, 40)
    classes, background = [["kite", "red kite"], ["bug"], ["moon", "sun"]], ["sky", "grass"]
    scale, threshold = 30.0, 0.22
    config = TrainingFreeConfig(
        method=method,
        background_words="sky, grass",
        background=threshold,
        softmax_scale=scale,
        short_side=32,
        window=window,
        stride=16,
        pamr=refine,
    )
    segmenter = TrainingFree(clip, None, ["kite,red kite", "bug", "moon, sun"], config)
    got = segmenter.label_map(image, background=True).numpy()
    settings = (32, window, 16)
    arguments = (classes, background, method, scale, threshold, refine, settings)
    with torch.no_grad():
        want = softmax_protocol(clip, image, *arguments)
    assert (got == want).mean() > 0.998  # a tie of two roundings may fall to either side
    assert len(np.unique(want)) >= 3
    low = TrainingFree(clip, None, ["kite,red kite", "bug", "moon, sun"], config)
    low.config.background = 0.0
    assert (low.label_map(image, True).numpy() == 0).mean() < (want == 0).mean()


@pytest.mark.parametrize(
    "method, size, count", [("naclip", (336, 448), 1), ("sclip", (224, 224), 6)]
)
def test_voc_is_taken_whole_by_naclip_alone(method, size, count):
    config = TrainingFreeConfig(method=method, background_words="sky")
    segmenter = segmenter_of(load_benchmark("voc", RAW), random_clip(), None, config, set())
    seen = []

    def masks(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.shape[-2:])
        return torch.rand(1, len(segmenter.prior_embedding), *images.shape[-2:])

    segmenter.window_scores = masks
    segmenter.scores(Image.new("RGB", (500, 375)))
    assert seen == [size] * count


def test_the_best_alternative_counts_and_words_of_the_background_win():
    """Under the thesis's protocol too: masks of single words, put together by hand."""
    model, image = random_model(), noise_image(48, 32)
    sizes = dict(short_side=32, window=32, stride=16, background=0.0)
    words = ["kite", "bug", "moon", "star"]
    each = Segmenter(model.clip, model, words, MaskConfig(**sizes)).scores(image).classes
    both = Segmenter(model.clip, model, ["kite,moon", "bug"], MaskConfig(**sizes)).scores(image)
    assert both.background is None
    both = both.classes
    assert torch.allclose(both, torch.stack([each[[0, 2]].amax(0), each[1]]), atol=1e-6)
    config = MaskConfig(**sizes, background_words="moon,star")
    behind = Segmenter(model.clip, model, ["kite", "bug"], config)
    scores = behind.scores(image)
    assert torch.allclose(scores.classes, each[:2], atol=1e-6)
    assert torch.allclose(scores.background, each[2:].amax(0), atol=1e-6)
    won = each[:2].amax(0) > each[2:].amax(0)
    assert won.any() and not won.all()
    small = image.resize((48, 32))  # the size of the scores
    assert torch.equal(behind.label_map(small, True) > 0, won)
    masks, scores = behind(small)
    assert len(masks) == len(scores) == 2 and torch.equal(masks.any(0), won)


def test_masks_and_scores_of_a_call():
    model, image = random_model(), noise_image(48, 32)
    config = MaskConfig(short_side=32, window=32, stride=16, background=0.5)
    segmenter = Segmenter(model.clip, model, ["kite", "bug"], config)
    masks, scores = segmenter(image.convert("RGBA"))
    assert masks.shape == scores.shape == (2, 32, 48) and masks.dtype == torch.bool
    labels = segmenter.label_map(image, background=True)
    assert torch.equal(masks, torch.stack([labels == 1, labels == 2]))
    assert (scores[masks] > 0.5).all() and (scores <= 1).all()


def test_names_of_every_benchmark():
    """As many lines as classes; the published lists (context has a word for its background)."""
    for name in DATASETS:
        lines = training_free_names(name)
        if name != "shapes":
            benchmark = load_benchmark(name, RAW)
            assert len(lines) == len(benchmark.class_names), name
        for line in lines:
            assert alternatives(line, "here") == line.split(",")
    assert len(training_free_names("voc")[0].split(",")) == 26
    assert training_free_names("voc")[0] == training_free_names("coco_object")[0]
    assert training_free_names("context")[0] == "background"
    assert training_free_names("voc")[4] == "ship"  # where the class is "boat"


def test_words_of_a_benchmark(tmp_path):
    benchmark, clip = load_benchmark("shapes", ""), random_clip()
    names = list(benchmark.class_names[1:])
    assert benchmark_words(benchmark, MaskConfig()) == names
    file = tmp_path / "names.txt"
    file.write_text("\n".join(["ball, round thing", *names[1:]]) + "\n")
    given = benchmark_words(benchmark, MaskConfig(names=str(file)))
    assert given[0] == "ball, round thing" and len(given) == 12

    config = TrainingFreeConfig(method="maskclip")
    free = segmenter_of(benchmark, clip, None, config, set())
    assert free.config.background_words == "grass,sand,water,brick,wood,snow"
    assert free.counts == [1] * 12 + [6]
    config = TrainingFreeConfig(method="code", names=str(file), background_words="sky")
    free = segmenter_of(benchmark, clip, random_model(), config, set())
    assert free.counts == [2, *[1] * 11, 1]
    want = "training-free protocol, code with 30% maskclip prior, refined, mine"
    assert free.description("mine") == want + " and 1 of the background"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--names", "two.txt"), "two.txt: 2 lines, but shapes has 12 classes (the background is"),
        (("--names", "empty.txt"), "empty.txt, line 2: an empty name in 'bug,,kite'"),
        (("--names", "none.txt"), "--names none.txt: cannot be read"),
        (("--background-words", "sky,,wall"), "an empty name in 'sky,,wall'"),
        (("--predictions", "none"), "500 of the 500 label maps of shapes are missing"),
        (("--predictions", "none", "--limit", "9"), "9 of the 9 label maps of shapes are missing"),
        (("--predictions", "none", "--method", "maskclip"), "--predictions and --method: give one"),
        (("--predictions", "none", "--names", "two.txt"), "--predictions and --names: give one"),
        (("--names", "nothing.txt"), "--names nothing.txt: it is empty"),
        (("--background-words", "very " * 90), "90 tokens, a query holds 69 at most"),
        (("--dataset", "cityscapes", "--background-words", "sky"), "cityscapes has no background"),
    ],
)
def test_mistakes(arguments, message, mistake, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing.txt").write_text("\n")
    (tmp_path / "two.txt").write_text("ball\nbox\n")
    (tmp_path / "empty.txt").write_text("ball\nbug,,kite\n")
    options = ("--dataset", "shapes", "--root", RAW, "--clip", "shapes")
    if "--predictions" not in arguments:
        options += ("--method", "maskclip")
    assert message in mistake(main, *options, *arguments)


def test_training_free_reads_no_label_maps(mistake):
    said = mistake(training_free_main, "--dataset", "shapes", "--predictions", "maps")
    assert "--predictions: evaluate.py reads label maps" in said


def test_a_line_of_names_is_read_as_it_stands(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffred  kite , kite\nbug\n\n".encode())
    assert read_names(str(tmp_path / "names.txt")) == ["red  kite , kite", "bug"]
    assert alternatives("red  kite , kite", "here") == ["red kite", "kite"]
    (tmp_path / "windows.txt").write_bytes("\ufeffkite\r\nb\u2028ug\r\n".encode())
    assert read_names(str(tmp_path / "windows.txt")) == ["kite", "b\u2028ug"]


def test_files_of_names_that_cannot_be_read(tmp_path):
    (tmp_path / "utf16.txt").write_text("kite\nbug\n", encoding="utf-16")
    for path, why in (
        (tmp_path / "utf16.txt", "not UTF-8"),
        (tmp_path, "Is a directory"),
        ("x" * 5000, "File name too long"),
        ("a\0b", "embedded null byte"),
    ):
        with pytest.raises(UserError, match=rf"cannot be read \({why}\)"):
            read_names(str(path))


# --- label maps of another program ----------------------------------------------------------------


def two_images(raw_ids: tuple[int, ...]) -> Benchmark:
    """Two 4 x 2 images, whose labels are classes 0 to 3."""
    label = np.array([[0, 1, 2, 3], [0, 1, 2, 255]], np.uint8)
    image = Image.new("RGB", (4, 2))
    names = ("a", "b", "c", "d")
    return Benchmark(
        "two", names, False, ["x", "y"], lambda i: image, lambda i: label, raw_ids=raw_ids
    )


def save(labels, path) -> None:
    indexed(np.array(labels, np.uint8), [0] * 768).save(path)


def test_metrics_of_label_maps(tmp_path):
    benchmark = two_images((7, 8, 11, 12))
    save([[7, 8, 11, 12], [7, 8, 11, 7]], tmp_path / "x.png")
    save([[7, 7, 11, 12], [7, 8, 11, 12]], tmp_path / "y.png")
    config = EvalConfig(predictions=str(tmp_path))
    check_predictions(config, [benchmark])
    metrics = evaluate(None, benchmark, config)
    assert metrics["IoU"] == {"a": 80.0, "b": 75.0, "c": 100.0, "d": 100.0}
    assert metrics["method"] == f"predictions of {tmp_path}"
    assert json.dumps(metrics["settings"])


def test_a_label_map_that_does_not_fit_is_named(tmp_path):
    benchmark = two_images((7, 8, 11, 12))
    save([[7, 8, 11, 12]], tmp_path / "x.png")
    with pytest.raises(UserError, match="1 of the 2 label maps of two are missing, y.png first"):
        check_predictions(EvalConfig(predictions=str(tmp_path)), [benchmark])
    with pytest.raises(UserError, match=r"x.png is 4 x 1, its image 4 x 2"):
        read_prediction(tmp_path, benchmark, 0, (4, 2))
    save([[7, 8, 11, 12], [0, 8, 11, 255]], tmp_path / "x.png")
    with pytest.raises(UserError, match="x.png holds ids that two does not have: 0, 255"):
        read_prediction(tmp_path, benchmark, 0, (4, 2))
    (tmp_path / "y.png").write_text("no image")
    with pytest.raises(UserError, match="y.png cannot be read"):
        read_prediction(tmp_path, benchmark, 1, (4, 2))


def test_running_out_of_memory_is_an_error():
    with (
        pytest.raises(UserError, match="out of memory: use --no-pamr"),
        enough_memory("use --no-pamr"),
    ):
        torch.empty(2**55)
    with pytest.raises(UserError), enough_memory(""):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="another"), enough_memory(""):
        raise RuntimeError("another")


def test_the_steps_that_the_docstrings_tell_have_the_figures_of_the_options():
    """So that nobody needs to open config.py for them."""
    thesis, free = MaskConfig(), TrainingFreeConfig()
    told = " ".join(Segmenter.__doc__.split())
    for sentence in (
        f"a short side of {thesis.short_side}",
        f"one every {thesis.stride} pixels",
        f"{1 - thesis.prior_weight} mask + {thesis.prior_weight} sigmoid("
        f"{thesis.prior_scale:.0f} (s - {thesis.prior_bias}))",
        f"no mask exceeds {thesis.threshold} ({MaskConfig(pamr=False).threshold} without PAMR)",
        f"x^v on {4 * thesis.window // 16} x {4 * thesis.window // 16} cells",
    ):
        assert sentence in told, sentence
    told = " ".join(training_free.__doc__.split())
    city, object_ = (
        for_benchmark(TrainingFreeConfig(method="sclip"), name)
        for name in ("cityscapes", "coco_object")
    )
    for sentence in (
        f"a short side of {free.short_side} (Cityscapes {city.short_side})",
        f"windows of {free.window}, one every {free.stride} pixels",
        "distances {} and {}".format(*free.pamr_dilations),
        f"softmax({free.softmax_scale:.0f} cosine)",
        f"65 on VOC, {object_.softmax_scale:.0f} on Context",
        f"where it is below {free.background}",
        f"{len(training_free_names('voc')[0].split(','))} things that surround",
    ):
        assert sentence in told, sentence
