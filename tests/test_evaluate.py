"""The evaluator: IoU, windows, background, raw folders of every benchmark, and their mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_clip, random_model
from PIL import Image

from config import DATASETS, MaskConfig, UserError
from datasets import (
    IGNORED,
    ade20k,
    cityscapes,
    coco_object,
    coco_stuff,
    context,
    context59,
    voc,
    voc20,
)
from evaluate import IoU, Segmenter, load_benchmark, main, window_starts

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment
    )


# --- figures --------------------------------------------------------------------------------------


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
    segmenter.masks = lambda images: ramp
    planes = segmenter.planes(Image.new("RGB", (12, 8)), torch.device("cpu"))
    want = [0, 1, 2, 3, (4 + 0) / 2, (5 + 1) / 2, (6 + 2) / 2, (7 + 3) / 2, 4, 5, 6, 7]
    np.testing.assert_allclose(planes[0, 0], want)


def test_odd_sizes_are_padded_and_cut_back():
    segmenter = Segmenter(random_clip(), random_model(), ["kite", "bug"], MaskConfig(pamr=False))
    image = torch.randn(1, 3, 35, 30)
    masks = segmenter.masks(image)
    assert masks.shape == (1, 2, 35, 30)
    padded = torch.zeros(1, 3, 40, 32)
    padded[..., 2:37, 1:31] = image
    assert torch.allclose(segmenter.masks(padded)[..., 2:37, 1:31], masks, atol=1e-6)


def test_background_is_a_plane_in_front_of_the_classes():
    segmenter = Segmenter(random_clip(), None, ["a", "b"], MaskConfig(background=0.4))
    planes = torch.tensor([[[0.3, 0.6, 0.4]], [[0.2, 0.5, 0.9]]])
    segmenter.planes = lambda image, device: planes
    image, cpu = Image.new("RGB", (3, 1)), torch.device("cpu")
    assert segmenter.label_map(image, cpu, True).tolist() == [[0, 1, 2]]
    assert segmenter.label_map(image, cpu, False).tolist() == [[0, 0, 1]]
    # Many classes are resized a few at a time: as if it were all at once, ties included.
    planes = (torch.rand(40, 5, 7) * 8).round() / 8
    full = F.interpolate(planes[None], (9, 13), mode="bilinear", align_corners=False)[0]
    image = Image.new("RGB", (13, 9))
    assert torch.equal(segmenter.label_map(image, cpu, False), full.argmax(0))


# --- raw folders ----------------------------------------------------------------------------------


def png(path: Path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(array, np.uint8)).save(path)


def picture(path: Path, size=(3, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def write_voc(root: Path, label) -> Path:
    folder = root / "VOCdevkit/VOC2012"
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    (folder / "ImageSets/Segmentation/val.txt").write_text("a\n")
    picture(folder / "JPEGImages/a.jpg")
    png(folder / "SegmentationClass/a.png", label)
    return folder


def test_voc_and_voc20(tmp_path):
    write_voc(tmp_path, [[0, 1, 20], [255, 2, 0]])
    assert voc.load(tmp_path).label(0).tolist() == [[0, 1, 20], [255, 2, 0]]
    without = voc20.load(tmp_path)
    assert without.label(0).tolist() == [[255, 0, 19], [255, 1, 255]]
    assert len(without.class_names) == 20 and not without.background
    assert without.raw_ids[0] == 1


def test_ade20k(tmp_path):
    folder = tmp_path / "ade/ADEChallengeData2016"
    picture(folder / "images/validation/x.jpg")
    png(folder / "annotations/validation/x.png", [[0, 1, 150], [2, 2, 2]])
    assert ade20k.load(tmp_path).label(0).tolist() == [[255, 0, 149], [1, 1, 1]]


def test_coco_stuff_and_coco_object(tmp_path):
    folder = tmp_path / "coco_stuff164k"
    picture(folder / "images/val2017/7.jpg")
    png(folder / "annotations/val2017/7.png", [[0, 12, 89], [91, 181, 255]])
    assert coco_stuff.load(tmp_path).label(0).tolist() == [[0, 11, 79], [80, 170, 255]]
    assert coco_object.load(tmp_path).label(0).tolist() == [[1, 12, 80], [0, 0, 0]]


def test_cityscapes(tmp_path):
    folder = tmp_path / "cityscapes"
    picture(folder / "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png")
    png(folder / "gtFine/val/ulm/ulm_1_gtFine_labelIds.png", [[7, 8, 33], [0, 3, 26]])
    benchmark = cityscapes.load(tmp_path)
    assert benchmark.label(0).tolist() == [[0, 1, 18], [255, 255, 13]]
    assert benchmark.palette[3 * 7 : 3 * 7 + 3] == [128, 64, 128]


def compress(counts: list[int]) -> str:
    """COCO's compressed run lengths, written from their description."""
    text = ""
    for i, value in enumerate(counts):
        value -= counts[i - 2] if i > 2 else 0
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = not (value == 0 and not bits & 16 or value == -1 and bits & 16)
            text += chr(48 + (bits | 32 if more else bits))
    return text


def run_lengths(mask: np.ndarray) -> list[int]:
    flat, counts, current = mask.T.ravel(), [], False
    length = 0
    for value in flat:
        if value != current:
            counts.append(length)
            current, length = value, 0
        length += 1
    return [*counts, length]


@pytest.mark.parametrize("compressed", [False, True])
def test_context_from_json_equals_context_from_pngs(tmp_path, compressed):
    """Random overlapping masks, painted by hand into PNGs and given as run lengths in the JSON."""
    rng = np.random.default_rng(0)
    pngs, merged = tmp_path / "pngs/VOCdevkit/VOC2010", tmp_path / "json/VOCdevkit/VOC2010"
    (pngs / "ImageSets/SegmentationContext").mkdir(parents=True)
    images, annotations, stems = [], [], []
    for number in range(4):
        height, width = rng.integers(20, 60, 2).tolist()
        stem, phase = f"2008_{number:06d}", "train" if number == 0 else "val"
        label = np.zeros((height, width), np.uint8)
        for _ in range(5):
            mask = rng.random((height, width)) < 0.4
            mask[: height // 2] = mask[0, 0]  # long runs as well as short ones
            index = int(rng.integers(60))
            category = context.IDS_OF_459[index] or 1  # 1 is none of the 59: background
            counts = run_lengths(mask)
            rle = {"size": [height, width], "counts": compress(counts) if compressed else counts}
            annotations.append({"image_id": number, "category_id": category, "segmentation": rle})
            label[mask] = index
        facts = {"image_id": number, "file_name": f"{stem}.jpg", "phase": phase}
        images.append(facts | {"height": height, "width": width})
        for root in (pngs, merged):
            picture(root / f"JPEGImages/{stem}.jpg", (width, height))
        if phase == "val":
            stems.append(stem)
            png(pngs / f"SegmentationClassContext/{stem}.png", label)
    (pngs / "ImageSets/SegmentationContext/val.txt").write_text("\n".join(stems))
    content = {"images": images, "annos_segmentation": annotations}
    (merged / "trainval_merged.json").write_text(json.dumps(content))
    for module in (context, context59):
        a, b = module.load(tmp_path / "pngs"), module.load(tmp_path / "json")
        assert a.stems == b.stems == stems
        for i in range(3):
            np.testing.assert_array_equal(a.label(i), b.label(i))


def test_class_names_are_as_many_as_they_should_be():
    counts = {
        module.__name__.split(".")[-1]: len(module.CLASS_NAMES)
        for module in (voc, context, coco_object, coco_stuff, cityscapes, ade20k)
    }
    assert counts == dict(
        voc=21, context=60, coco_object=81, coco_stuff=171, cityscapes=19, ade20k=150
    )
    assert len(set(coco_stuff.PIXEL_IDS)) == 171 and len(set(context.IDS_OF_459)) == 60


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "shapes"])
def test_a_missing_folder_says_what_was_looked_for(name, tmp_path):
    with pytest.raises(UserError) as error:
        load_benchmark(name, str(tmp_path))
    message = str(error.value)
    assert str(tmp_path) in message and "should hold" in message and "http" in message


def test_an_unknown_dataset(tmp_path):
    with pytest.raises(UserError, match="not one of voc, context"):
        load_benchmark("imagenet", str(tmp_path))


def test_label_of_another_size(tmp_path):
    write_voc(tmp_path, [[0, 1]])
    with pytest.raises(UserError, match=r"a\.png is 2 x 1, its image a\.jpg 3 x 2"):
        voc.load(tmp_path).label(0)


def test_unknown_label_id(tmp_path):
    write_voc(tmp_path, [[0, 1, 77], [0, 0, 0]])
    with pytest.raises(UserError, match=r"a\.png holds ids .*: 77"):
        voc.load(tmp_path).label(0)


def test_image_without_label(tmp_path):
    folder = write_voc(tmp_path, [[0, 1, 2], [0, 0, 0]])
    (folder / "SegmentationClass/a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png cannot be read \(no such file\)"):
        voc.load(tmp_path).label(0)


def test_truncated_image(tmp_path):
    folder = write_voc(tmp_path, [[0, 1, 2], [0, 0, 0]])
    path = folder / "JPEGImages/a.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"image .*a\.jpg cannot be read"):
        voc.load(tmp_path).image(0)


def test_missing_split_and_empty_split(tmp_path):
    folder = write_voc(tmp_path, [[0, 1, 2], [0, 0, 0]])
    split = folder / "ImageSets/Segmentation/val.txt"
    split.write_text("")
    with pytest.raises(UserError, match=r"val\.txt lists no image"):
        voc.load(tmp_path)
    split.unlink()
    with pytest.raises(UserError, match=r"val\.txt is missing"):
        voc.load(tmp_path)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--dataset", "imagenet"), "not one of"),
        (("--dataset", "voc", "--root", "nowhere"), "nowhere/VOCdevkit/VOC2012 is missing"),
        (("--dataset", "shapes"), "needs --checkpoint"),
        (("--dataset", "shapes", "--checkpoint", "nowhere.pt"), "nowhere.pt: no such checkpoint"),
        (("--dataset", "shapes", "--method", "sam"), "'code' or 'maskclip'"),
        (("--limit", "many"), "invalid int value: 'many'"),
        (("--limit", "0"), "--limit 0: must be at least 1"),
        (("--stride", "96", "--window", "32"), "gaps would stay"),
        (("--json", "/tmp"), "a folder, not a file"),
        (("--datasets", "voc"), "unrecognized arguments"),
        (("--device", "cuda:99", "--method", "maskclip"), "--device cuda:99"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_and_exit_code_2(arguments, words, mistake):
    assert words in mistake(main, *arguments)


def test_a_mistake_in_a_process_of_its_own():
    done = run("evaluate.py", "--dataset", "imagenet")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("evaluate.py: error: --dataset imagenet")


# --- the real thing -------------------------------------------------------------------------------


def test_maskclip_on_the_shapes_world(tmp_path):
    done = run(
        *("evaluate.py", "--dataset", "shapes", "--method", "maskclip", "--limit", "12"),
        *("--json", str(tmp_path / "figures.json"), "--show", "2"),
        *("--show-dir", str(tmp_path / "show"), "--save-predictions", str(tmp_path / "maps")),
    )
    assert done.returncode == 0, done.stderr
    assert "partial" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["partial"] and figures["images"] == 12
    assert figures["settings"]["pamr"] and figures["settings"]["background"] == 0.4
    assert len(list((tmp_path / "show").glob("*.png"))) == 2
    maps = sorted((tmp_path / "maps").glob("*.png"))
    assert len(maps) == 12
    benchmark, iou = load_benchmark("shapes", ""), IoU(13)
    for i, path in enumerate(maps):  # the figures follow from the saved maps
        with Image.open(path) as image:
            assert image.mode == "P" and path.stem == benchmark.stems[i]
            iou.add(np.asarray(image), benchmark.label(i))
    assert iou.mean() == pytest.approx(figures["mIoU"])
