"""Raw folders of every benchmark, and their mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import UserError
from datasets import (
    DATASETS,
    ade20k,
    cityscapes,
    coco_object,
    coco_stuff,
    context,
    context59,
    load_benchmark,
    voc,
    voc20,
)


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


IMAGE = {"image_id": 1, "file_name": "a.jpg", "phase": "val", "height": 2, "width": 3}
RLE = {"size": [2, 3], "counts": [0, 6]}
ANNOTATION = {"image_id": 1, "category_id": 2, "segmentation": RLE}


def merged(root: Path, text: str) -> Path:
    folder = root / "VOCdevkit/VOC2010"
    picture(folder / "JPEGImages/a.jpg")
    (folder / "trainval_merged.json").write_text(text)
    return root


def without(entry: dict, name: str) -> dict:
    return {key: value for key, value in entry.items() if key != name}


@pytest.mark.parametrize(
    "image, annotation, said",
    [
        (3, ANNOTATION, "image 1 has no text 'phase'"),
        (IMAGE | {"phase": 3}, ANNOTATION, "image 1 has no text 'phase'"),
        (IMAGE | {"phase": "train"}, ANNOTATION, "no image of phase 'val'"),
        (without(IMAGE, "image_id"), ANNOTATION, "image 1 has no number or text 'image_id'"),
        (IMAGE | {"image_id": [1]}, ANNOTATION, "image 1 has no number or text 'image_id'"),
        (IMAGE | {"file_name": 3}, ANNOTATION, "image 1 has no text 'file_name'"),
        (IMAGE | {"file_name": "../a.jpg"}, ANNOTATION, "image 1 has the file_name '../a.jpg'"),
        (IMAGE | {"file_name": "b.jpg"}, ANNOTATION, "1 of the 1 images .* missing, b.jpg first"),
        (IMAGE | {"file_name": "b" * 400}, ANNOTATION, "1 of the 1 images .* are missing, bbb"),
        (IMAGE | {"height": "2"}, ANNOTATION, "image 1 has no number 'height'"),
        (IMAGE | {"width": float("nan")}, ANNOTATION, "image 1 has no number 'width'"),
        (IMAGE | {"height": 0}, ANNOTATION, r"image 1 is of size \[0, 3\]"),
        (IMAGE, "x", "annotation 1 has no number or text 'image_id'"),
        (IMAGE, ANNOTATION | {"image_id": [1]}, "annotation 1 has no number or text 'image_id'"),
        (IMAGE, without(ANNOTATION, "category_id"), "annotation 1 has no number 'category_id'"),
        (IMAGE, ANNOTATION | {"category_id": "2"}, "annotation 1 has no number 'category_id'"),
        (IMAGE, ANNOTATION | {"category_id": 600}, "annotation 1 has the category_id 600, of 459"),
        (IMAGE, ANNOTATION | {"category_id": -1}, "annotation 1 has the category_id -1, of 459"),
        (IMAGE, ANNOTATION | {"segmentation": [[1, 2]]}, "annotation 1 has no dict 'segmentation'"),
        (IMAGE, RLE | {"counts": 5}, "the segmentation of annotation 1 has no text or list"),
        (IMAGE, RLE | {"size": "2x3"}, "the segmentation of annotation 1 has no list 'size'"),
        (IMAGE, RLE | {"size": [2, 3, 1]}, "annotation 1 has another size than its image"),
        (IMAGE, RLE | {"counts": [-1, 7]}, "a.jpg: run lengths that are no counts"),
        (IMAGE, RLE | {"counts": ["a"]}, "a.jpg: run lengths that are no counts"),
        (IMAGE, RLE | {"counts": [0, 10**12]}, "a.jpg: a run-length mask does not fill its image"),
        (IMAGE, RLE | {"counts": "\xff\u20ac"}, "a.jpg: 'ÿ' in compressed run lengths"),
        (IMAGE, RLE | {"counts": "Oo"}, "a.jpg: run lengths that are no counts"),
        (IMAGE, RLE | {"counts": "ooo"}, "a.jpg: a run-length mask does not fill its image"),
    ],
)
def test_odd_entries_of_contexts_json(image, annotation, said, tmp_path):
    if isinstance(annotation, dict) and "counts" in annotation:
        annotation = ANNOTATION | {"segmentation": annotation}
    merged(tmp_path, json.dumps({"images": [image], "annos_segmentation": [annotation]}))
    with pytest.raises(UserError, match=f"(trainval_merged.json|JPEGImages).*{said}"):
        context.load(tmp_path).label(0)


def test_a_size_that_is_not_the_images_is_no_memory_error(tmp_path):
    image = IMAGE | {"height": 10**9, "width": 10**9}
    merged(tmp_path, json.dumps({"images": [image], "annos_segmentation": []}))
    with pytest.raises(UserError, match="is 1000000000 x 1000000000, its image a.jpg 3 x 2"):
        context.load(tmp_path).label(0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{",
        "[" * 100_000,
        '{"images": null}',
        json.dumps({"images": [IMAGE]}),
        json.dumps({"images": [IMAGE, IMAGE], "annos_segmentation": []}),
    ],
)
def test_files_that_are_not_contexts_json(text, tmp_path):
    with pytest.raises(UserError, match="is not PASCAL Context's trainval_merged.json"):
        context.load(merged(tmp_path, text))


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
    with pytest.raises(UserError, match=r"1 of the 1 label files of voc are missing, a\.png first"):
        voc.load(tmp_path)


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
