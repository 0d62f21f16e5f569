"""The evaluator: IoU, windows, background, and mistakes on its command line."""

import json
import os
import subprocess
import sys

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, random_clip, random_model
from PIL import Image

from clip import load_clip
from config import MaskConfig, UserError
from datasets import IGNORED, THESIS_DATASETS, load_benchmark
from evaluate import (
    IoU,
    Scores,
    Segmenter,
    average,
    check_world,
    main,
    printable,
    table_4_1,
    window_starts,
)

RAW = golden.folder() / "raw"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment
    )


# --- metrics --------------------------------------------------------------------------------------


def test_iou_against_sets_of_pixels():
    rng = np.random.default_rng(0)
    iou, predictions, labels = IoU(5), [], []
    for _ in range(3):
        predicted, label = rng.integers(0, 4, (2, 6, 7)).astype(np.uint8)
        label[rng.random((6, 7)) < 0.2] = IGNORED
        iou.add(predicted, label)
        predictions.append(predicted.ravel())
        labels.append(label.ravel())
    predicted, label = np.concatenate(predictions), np.concatenate(labels)
    counted = label != IGNORED
    wanted = []
    for c in range(4):
        a = {i for i in range(len(label)) if counted[i] and predicted[i] == c}
        b = {i for i in range(len(label)) if label[i] == c}
        wanted.append(100 * len(a & b) / len(a | b))
    np.testing.assert_allclose(iou.per_class()[:4], wanted)
    assert np.isnan(iou.per_class()[4])  # never predicted, never labelled: not in the mean
    assert iou.mean() == pytest.approx(np.mean(wanted))
    assert iou.pixel_accuracy() == pytest.approx(100 * (predicted == label)[counted].mean())


@pytest.mark.parametrize(
    "side, starts",
    [(448, [0]), (449, [0, 1]), (672, [0, 224]), (700, [0, 224, 252]), (300, [0])],
)
def test_windows(side, starts):
    assert window_starts(side, 448, 224) == starts


def test_overlapping_windows_are_averaged():
    """With masks that depend on the position in the window only, the mean is known."""
    config = MaskConfig(short_side=8, window=8, stride=4)
    segmenter = Segmenter(random_clip(), None, ["kite"], config)
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    segmenter.window_scores = lambda images: ramp
    scores = segmenter.scores(Image.new("RGB", (12, 8)))
    want = [0, 1, 2, 3, (4 + 0) / 2, (5 + 1) / 2, (6 + 2) / 2, (7 + 3) / 2, 4, 5, 6, 7]
    np.testing.assert_allclose(scores.classes[0, 0], want)


def test_sides_are_rounded_and_the_long_one_is_limited():
    config = MaskConfig(short_side=32, long_side=64, window=32, stride=32, pamr=False)
    segmenter = Segmenter(random_clip(), None, ["kite"], config)
    assert segmenter.scores(Image.new("RGB", (44, 30))).classes.shape == (1, 32, 47)  # 46.93
    assert segmenter.scores(Image.new("RGB", (30, 41))).classes.shape == (1, 44, 32)  # 43.73
    assert segmenter.scores(Image.new("RGB", (200, 40))).classes.shape == (1, 13, 64)  # 12.8


def test_odd_sizes_are_padded_and_cut_back():
    segmenter = Segmenter(random_clip(), random_model(), ["kite", "bug"], MaskConfig(pamr=False))
    image = torch.randn(1, 3, 35, 30)
    masks = segmenter.window_scores(image)
    assert masks.shape == (1, 2, 35, 30)
    padded = torch.zeros(1, 3, 40, 32)
    padded[..., 2:37, 1:31] = image
    assert torch.allclose(segmenter.window_scores(padded)[..., 2:37, 1:31], masks, atol=1e-6)


def test_background_is_where_no_class_exceeds_the_threshold():
    segmenter = Segmenter(random_clip(), None, ["a", "b"], MaskConfig(background=0.4))
    scores = torch.tensor([[[0.3, 0.6, 0.4]], [[0.2, 0.5, 0.9]]])
    segmenter.scores = lambda image: Scores(scores)
    image = Image.new("RGB", (3, 1))
    assert segmenter.label_map(image, True).tolist() == [[0, 1, 2]]
    assert segmenter.label_map(image, False).tolist() == [[0, 0, 1]]
    best, labels = Scores(scores).label_map((1, 3), 0.6)
    assert torch.equal(best, torch.tensor([[0.3, 0.6, 0.9]]))
    assert labels.tolist() == [[0, 0, 2]]  # it must exceed it
    behind = Scores(scores, torch.tensor([[0.1, 0.6, 0.95]]))  # words of the background
    assert behind.label_map((1, 3), 0.2)[1].tolist() == [[1, 0, 0]]  # and exceed these
    # Many classes are resized a few at a time: as if it were all at once, ties included.
    scores = (torch.rand(40, 5, 7) * 8).round() / 8
    full = F.interpolate(scores[None], (9, 13), mode="bilinear", align_corners=False)[0]
    image = Image.new("RGB", (13, 9))
    assert torch.equal(segmenter.label_map(image, False), full.argmax(0))
    # The same at the size of a larger drawing of the scene.
    small = Image.new("RGB", (7, 5))
    assert torch.equal(segmenter.label_map(small, False, (9, 13)), full.argmax(0))


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--dataset", "imagenet"), "not one of"),
        (("--dataset", "voc", "--root", "nowhere"), "nowhere/VOCdevkit/VOC2012 is missing"),
        (
            ("--dataset", "voc", "--root", str(ROOT / "tests" / "golden" / "raw")),
            "needs --checkpoint",
        ),
        (("--dataset", "shapes", "--checkpoint", "nowhere.pt"), "nowhere.pt: no such checkpoint"),
        (("--dataset", "shapes", "--method", "sam"), "'code' or 'maskclip'; see training_free.py"),
        (("--limit", "many"), "invalid int value: 'many'"),
        (("--limit", "0"), "--limit 0: must be at least 1"),
        (
            ("--dataset", "shapes", "--method", "maskclip", "--stride", "96", "--window", "32"),
            "gaps would stay",
        ),
        (("--json", "/tmp"), "a folder, not a file"),
        (("--datasets", "voc"), "unrecognized arguments"),
        (
            ("--dataset", "shapes", "--device", "cuda:99", "--method", "maskclip"),
            "--device cuda:99",
        ),
        ((), "--dataset is needed: one of voc, context, coco_object, coco_stuff, cityscapes"),
        (("--method", "naclip"), "--dataset is needed"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_and_exit_code_2(
    arguments, words, mistake, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)  # where no training has left a model
    assert words in mistake(main, *arguments)


def test_a_mistake_in_a_process_of_its_own():
    done = run("evaluate.py", "--dataset", "imagenet")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("evaluate.py: error: --dataset imagenet")


def test_names_of_files_are_printed_on_every_terminal():
    """Bytes that are not UTF-8 stop no table; other letters stay as they are."""
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\udce9"
    assert printable("jalapeño") == "jalapeño"


# --- benchmarks that are not the checkpoint's -----------------------------------------------------


def test_clip_and_benchmark_are_of_one_world():
    """In both directions; the shapes world's sizes are none for photos, nor theirs for it."""
    shapes, other = load_clip("shapes"), random_clip()  # which sees images of 32 pixels
    check_world(shapes, ["shapes"], "a.pt")
    check_world(other, THESIS_DATASETS, "a.pt")
    for datasets in (["voc"], ["voc", "shapes"], THESIS_DATASETS):
        with pytest.raises(UserError, match="a.pt: of the shapes world, see --dataset shapes"):
            check_world(shapes, datasets, "a.pt")
    with pytest.raises(UserError, match="a.pt is not of the shapes world: name another bench"):
        check_world(other, ["shapes"], "a.pt")


@pytest.mark.parametrize("method", ["maskclip", "code"])
def test_another_world_is_refused_on_the_command_line(method, mistake, monkeypatch):
    """Also where only the CLIP of a checkpoint is used."""
    model = random_model()
    loaded = model.clip, model if method == "code" else None
    monkeypatch.setattr("evaluate.load_method", lambda config, device: loaded)
    arguments = ("--dataset", "shapes", "--method", method, "--checkpoint", "a.pt")
    assert "--dataset shapes: a.pt is not of the shapes world" in mistake(main, *arguments)
    monkeypatch.setattr("evaluate.load_method", lambda config, device: (load_clip("shapes"), None))
    arguments = ("--dataset", "voc", "--root", RAW, "--method", method, "--checkpoint", "a.pt")
    assert "a.pt: of the shapes world, see --dataset shapes" in mistake(main, *arguments)


# --- nothing is labelled --------------------------------------------------------------------------


def test_without_a_labelled_pixel_there_is_no_miou(tmp_path, monkeypatch, capsys):
    """null in JSON, which has no NaN, and a line that says why; the mean of all six is none."""
    folder = tmp_path / "ade/ADEChallengeData2016"
    for name in ("images/validation", "annotations/validation"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (4, 3)).save(folder / "images/validation/x.jpg")
    Image.new("L", (4, 3)).save(folder / "annotations/validation/x.png")
    Image.new("L", (4, 3), 1).save(tmp_path / "x.png")
    arguments = ["--dataset", "ade20k", "--root", tmp_path, "--predictions", tmp_path]
    arguments += ["--json", tmp_path / "m.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("ade20k: no pixel of any image is labelled, so there is no mIoU, 1 im")

    def no_constant(name: str):
        raise AssertionError(f"{name} in JSON")

    text = (tmp_path / "m.json").read_text()
    metrics = json.loads(text, parse_constant=no_constant)
    assert metrics["mIoU"] is None and metrics["pixel_accuracy"] is None
    assert set(metrics["IoU"].values()) == {None}
    others = [metrics | {"mIoU": 12.0}] * 5
    assert average(others) == 12 and average([metrics, *others]) is None
    row = table_4_1([metrics, *others]).splitlines()[2]
    assert row.endswith("| - | 12.0 | 12.0 | 12.0 | 12.0 | 12.0 | - |")


# --- the real thing -------------------------------------------------------------------------------


def test_maskclip_on_the_shapes_world(tmp_path):
    done = run(
        *("evaluate.py", "--dataset", "shapes", "--method", "maskclip", "--limit", "12"),
        *("--json", str(tmp_path / "metrics.json"), "--show", "2"),
        *("--show-dir", str(tmp_path / "show"), "--save-predictions", str(tmp_path / "maps")),
    )
    assert done.returncode == 0, done.stderr
    assert "partial" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["partial"] and metrics["images"] == 12
    assert metrics["settings"]["pamr"] and metrics["settings"]["background"] == 0.4
    assert len(list((tmp_path / "show").glob("*.png"))) == 2
    maps = sorted((tmp_path / "maps").glob("*.png"))
    assert len(maps) == 12
    benchmark, iou = load_benchmark("shapes", ""), IoU(13)
    for i, path in enumerate(maps):  # the metrics follow from the saved maps
        with Image.open(path) as image:
            assert image.mode == "P" and path.stem == benchmark.stems[i]
            iou.add(np.asarray(image), benchmark.label(i))
    assert iou.mean() == pytest.approx(metrics["mIoU"])
