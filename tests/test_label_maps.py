"""Label maps that are not the benchmark's are refused before anything is computed, and named."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import EvalConfig, UserError
from datasets import (
    LOOKED_AT,
    Benchmark,
    ade20k,
    cityscapes,
    coco_object,
    coco_stuff,
    colours,
    context,
    context59,
    voc,
    voc20,
)
from evaluate import evaluate, read_prediction

SHAPE = (6, 64)  # room for every id


def of_ids(ids) -> np.ndarray:
    """A label map that holds these ids."""
    ids = list(ids)
    return np.resize(np.array(ids, np.uint8), SHAPE)


def indexed(label: np.ndarray, palette: list[int]) -> Image.Image:
    image = Image.fromarray(label).convert("P")
    image.putpalette(palette)
    return image


def rebuilt(label: np.ndarray) -> Image.Image:
    """The same picture in VOC's colours, which are numbered anew, as optimizers do."""
    used = np.unique(label).tolist()
    new = np.searchsorted(used, label).astype(np.uint8)
    return indexed(new, sum((colours()[3 * i : 3 * i + 3] for i in used), []))


def write(images: Path, labels: Path, maps, stem="{}", suffix=".jpg", label="{}") -> None:
    """Images of the maps' size, and the maps: arrays of raw ids or whole pictures."""
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for i, content in enumerate(maps):
        picture = content if isinstance(content, Image.Image) else Image.fromarray(content)
        Image.new("RGB", picture.size).save(images / (stem.format(i) + suffix))
        picture.save(labels / (label.format(i) + ".png"))


def write_voc(root: Path, maps) -> None:
    folder = root / "VOCdevkit/VOC2012"
    write(folder / "JPEGImages", folder / "SegmentationClass", maps)
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    split = "\n".join(map(str, range(len(maps))))
    (folder / "ImageSets/Segmentation/val.txt").write_text(split)


def write_context(root: Path, maps, objects=()) -> None:
    folder = root / "VOCdevkit/VOC2010"
    write(folder / "JPEGImages", folder / "SegmentationClassContext", maps)
    (folder / "ImageSets/SegmentationContext").mkdir(parents=True)
    split = "\n".join(map(str, range(len(maps))))
    (folder / "ImageSets/SegmentationContext/val.txt").write_text(split)
    (folder / "Annotations").mkdir()
    for i, names in enumerate(objects):
        listed = "".join(f"<object><name>{name}</name></object>" for name in names)
        (folder / f"Annotations/{i}.xml").write_text(f"<annotation>{listed}</annotation>")


def write_coco(root: Path, maps) -> None:
    folder = root / "coco_stuff164k"
    write(folder / "images/val2017", folder / "annotations/val2017", maps)


def write_cityscapes(root: Path, maps) -> None:
    images, labels = (root / "cityscapes" / name for name in ("leftImg8bit", "gtFine"))
    names = dict(stem="a_{}_leftImg8bit", suffix=".png", label="a_{}_gtFine_labelIds")
    write(images / "val/a", labels / "val/a", maps, **names)


def write_ade(root: Path, maps) -> None:
    folder = root / "ade/ADEChallengeData2016"
    write(folder / "images/validation", folder / "annotations/validation", maps)


def message(module, root: Path) -> str:
    with pytest.raises(UserError) as error:
        module.load(str(root))
    return str(error.value)


# --- ids ------------------------------------------------------------------------------------------

STUFF = coco_stuff.PIXEL_IDS


@pytest.mark.parametrize("module", [coco_object, coco_stuff])
@pytest.mark.parametrize(
    "ids, unknown, seems",
    [
        (range(92, 184), "182, 183", "stuff_val2017_pixelmaps"),
        ([0, *(i + 1 for i in STUFF)], "11, 25, 28, 44, 65", "COCO's category ids"),
        ([*range(171), 255], "11, 25, 28, 29, 44", "_labelTrainIds.png"),
        ([0, 1, 200], "200", None),
    ],
)
def test_other_label_maps_of_coco(module, ids, unknown, seems, tmp_path):
    write_coco(tmp_path, [of_ids(ids)])
    said = message(module, tmp_path)
    assert f"0.png holds ids that {module.__name__.split('.')[1]} does not have: {unknown}" in said
    if seems:
        assert seems in said and "take stuffthingmaps_trainval2017.zip" in said


def test_every_id_of_cocos_label_maps_is_taken(tmp_path):
    write_coco(tmp_path, [of_ids([*STUFF, 255])])
    label = coco_object.load(str(tmp_path)).label(0)
    assert set(np.unique(label)) == set(range(81)) and label.flat[171] == 0  # 255: background
    assert set(np.unique(coco_stuff.load(str(tmp_path)).label(0))) == {*range(171), 255}


def test_train_ids_of_cityscapes(tmp_path):
    for name, ids in (("whole", [*range(19), 255]), ("crop", range(19)), ("tiny", [3, 255])):
        write_cityscapes(tmp_path / name, [of_ids(ids)])
        said = message(cityscapes, tmp_path / name)
        assert "they seem to be trainIds" in said and "*_gtFine_labelIds.png" in said
    write_cityscapes(tmp_path / "beyond", [of_ids([7, 34, 200])])
    said = message(cityscapes, tmp_path / "beyond")
    assert said.endswith("a_0_gtFine_labelIds.png holds ids that cityscapes does not have: 34, 200")
    # Ids that nothing tells from labelIds are labelIds: out of the picture, a road's edge.
    for name, ids in (("void", [0, 1, 4]), ("all", range(34))):
        write_cityscapes(tmp_path / name, [of_ids(ids)])
        label = cityscapes.load(str(tmp_path / name)).label(0)
        assert set(np.unique(label)) == ({255} if name == "void" else {*range(19), 255})


def test_label_maps_of_ade20k_that_are_numbered_from_0(tmp_path):
    write_ade(tmp_path, [of_ids([*range(150), 255])])
    assert "ade20k does not have: 255; they seem to be numbered from 0" in message(ade20k, tmp_path)


def test_label_maps_are_looked_at_all_over_the_set(tmp_path):
    """At load so many of them, the last one included; every other one when it is reached."""
    good, bad = of_ids([0, 2, 92, 255]), of_ids([0, 2, 182])
    write_coco(tmp_path, [good] * (2 * LOOKED_AT))
    benchmark = coco_object.load(str(tmp_path))
    paths = [
        tmp_path / f"coco_stuff164k/annotations/val2017/{stem}.png" for stem in benchmark.stems
    ]
    Image.fromarray(bad).save(paths[1])
    benchmark = coco_object.load(str(tmp_path))
    benchmark.label(0)
    with pytest.raises(UserError, match=f"{paths[1].name} holds ids .*: 182"):
        benchmark.label(1)
    Image.fromarray(bad).save(paths[-1])
    assert f"{paths[-1].name} holds ids" in message(coco_object, tmp_path)


@pytest.mark.parametrize(
    "picture, found",
    [
        (Image.new("RGB", SHAPE[::-1]), "a picture in colours (RGB)"),
        (Image.new("RGBA", SHAPE[::-1]), "a picture in colours (RGBA)"),
        (Image.fromarray(np.full(SHAPE, 300, np.uint16)), "16 bits a pixel"),
        (Image.new("1", SHAPE[::-1]), "one bit a pixel"),
    ],
)
def test_pictures_that_are_no_label_maps(picture, found, tmp_path):
    """gtFine_color and the full ADE20K are in colours, instanceIds have 16 bits."""
    write_ade(tmp_path, [picture])
    said = message(ade20k, tmp_path)
    assert f"0.png: {found}" in said and "one channel of 8-bit label ids is needed" in said


# --- VOC ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [voc, voc20])
def test_the_palette_tells_whether_vocs_masks_were_rewritten(module, tmp_path):
    label = of_ids([0, 5, 15, 255])
    grey = Image.fromarray(label).convert("P")
    assert grey.getpalette()[:6] == [0, 0, 0, 1, 1, 1]
    for name, kept in (("own", indexed(label, colours())), ("L", label), ("grey", grey)):
        write_voc(tmp_path / name, [kept])
        np.testing.assert_array_equal(
            module.load(str(tmp_path / name)).label(0),
            np.resize([0, 5, 15, 255] if module is voc else [255, 4, 14, 255], SHAPE),
        )
    write_voc(tmp_path / "rebuilt", [rebuilt(label)])
    assert "0.png: its palette gives id 1 the colour of id 5" in message(
        module, tmp_path / "rebuilt"
    )
    other = indexed(label, [(7 * i + 3) % 256 for i in range(768)])
    write_voc(tmp_path / "other", [other])
    assert "0.png: its palette is not the benchmark's" in message(module, tmp_path / "other")


def test_masks_of_objects_instead_of_classes(tmp_path):
    objects = [indexed(of_ids([0, *range(1, n + 1), 255]), colours()) for n in (1, 2, 3, 1, 2)]
    write_voc(tmp_path / "objects", objects)
    assert "SegmentationObject; take SegmentationClass" in message(voc, tmp_path / "objects")
    write_voc(tmp_path / "aeroplanes", [of_ids([0, 1, 255])] * 9)  # a class of its own
    assert len(voc.load(str(tmp_path / "aeroplanes")).stems) == 9
    write_voc(tmp_path / "nothing", [of_ids([0, 255])] * 5)
    assert "none of 5 holds any class but the background" in message(voc, tmp_path / "nothing")


# --- PASCAL Context -------------------------------------------------------------------------------


def test_the_order_of_contexts_classes(tmp_path):
    """What the same ids mean is told by VOC's lists of objects, and by nothing else."""
    objects = [["person", "horse"], ["dog"], ["car", "diningtable"]]
    both = [[name for name in names if name in context.CLASS_NAMES] for names in objects]
    by_name = [of_ids([0, 47, *map(context.CLASS_NAMES.index, names)]) for names in both]
    by_list = [of_ids([0, 50, *map(voc.CLASS_NAMES.index, names)]) for names in both]
    write_context(tmp_path / "name", by_name, objects)
    write_context(tmp_path / "list", by_list, objects)
    write_context(tmp_path / "silent", by_list)
    for module in (context, context59):
        assert "the order of 59_context_labels.tar.gz" in message(module, tmp_path / "list")
        assert len(module.load(str(tmp_path / "name")).stems) == 3
        assert len(module.load(str(tmp_path / "silent")).stems) == 3  # nothing tells it


def test_label_maps_of_fewer_classes_of_context(tmp_path):
    write_context(tmp_path / "33", [of_ids(range(34))] * 10)
    assert "33 classes (33_context_labels.tar.gz)" in message(context, tmp_path / "33")
    write_context(tmp_path / "20", [of_ids(range(21))] * 10)
    assert "they seem to be of PASCAL VOC's 20 classes" in message(context, tmp_path / "20")
    write_context(tmp_path / "459", [of_ids(range(120))])
    assert "context does not have: 60, 61" in message(context, tmp_path / "459")


# --- predictions ----------------------------------------------------------------------------------


def some_benchmark(raw_ids: tuple[int, ...]) -> Benchmark:
    label = of_ids(range(len(raw_ids)))
    names = tuple(map(str, raw_ids))
    image = Image.new("RGB", SHAPE[::-1])
    return Benchmark("some", names, False, ["x"], lambda i: image, lambda i: label, raw_ids)


def test_class_indices_as_predictions(tmp_path):
    benchmark = some_benchmark(cityscapes.LABEL_IDS)
    Image.fromarray(of_ids(range(19))).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="its own are 7 to 33; these seem to be class indices"):
        read_prediction(tmp_path, benchmark, 0, SHAPE[::-1])
    Image.fromarray(of_ids([7, 99])).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="does not have: 99; its own are 7 to 33$"):
        read_prediction(tmp_path, benchmark, 0, SHAPE[::-1])


def test_predictions_whose_palette_was_rebuilt(tmp_path):
    """Refused where the colours say other ids; colours of the writer's own choice say nothing."""
    benchmark = some_benchmark(tuple(range(21)))
    label = of_ids([0, 5, 15])
    rebuilt(label).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x.png: its palette gives id 1 the colour of id 5"):
        read_prediction(tmp_path, benchmark, 0, SHAPE[::-1])
    for palette in ([0] * 768, colours(), [(7 * i + 3) % 256 for i in range(768)]):
        indexed(label, palette).save(tmp_path / "x.png")
        np.testing.assert_array_equal(read_prediction(tmp_path, benchmark, 0, SHAPE[::-1]), label)
    grey = np.array([0, 5, 15], np.uint8).repeat(3).tolist()
    indexed(of_ids([0, 1, 2]), grey).save(tmp_path / "x.png")  # levels of grey, numbered anew
    with pytest.raises(UserError, match="the colour of id 5"):
        read_prediction(tmp_path, benchmark, 0, SHAPE[::-1])


# --- files ----------------------------------------------------------------------------------------


def test_what_systems_add_is_no_image(tmp_path):
    write_coco(tmp_path, [of_ids([1, 2])])
    for name in ("._0.jpg", "Thumbs.db", ".DS_Store"):
        (tmp_path / "coco_stuff164k/images/val2017" / name).write_bytes(b"\0\5\x16\7")
    assert coco_stuff.load(str(tmp_path)).stems == ["0"]
    write_cityscapes(tmp_path, [of_ids([7, 26])])
    images = tmp_path / "cityscapes/leftImg8bit/val"
    for name in ("__MACOSX/a_leftImg8bit.png", ".ipynb_checkpoints/b_leftImg8bit.png"):
        (images / name).parent.mkdir()
        (images / name).write_bytes(b"no image")
    (images / "a/._a_0_leftImg8bit.png").write_bytes(b"no image")
    assert cityscapes.load(str(tmp_path)).stems == ["a_0_leftImg8bit"]


def test_all_files_are_looked_for_at_load(tmp_path):
    write_ade(tmp_path, [of_ids([1])] * 4)
    labels = tmp_path / "ade/ADEChallengeData2016/annotations/validation"
    (labels / "1.png").unlink()
    (labels / "3.png").unlink()
    (labels / "3.png").symlink_to(tmp_path / "nowhere.png")
    said = message(ade20k, tmp_path)
    assert f"{labels}: 2 of the 4 label files of ade20k are missing, 1.png first" == said
    (labels / "3.png").unlink()
    for name in ("1.png", "3.png"):
        (labels / name).symlink_to(labels / "0.png")  # a link that leads somewhere is a file
    assert len(ade20k.load(str(tmp_path)).stems) == 4


def test_folders_that_cannot_be_read_and_names_that_cannot_be(tmp_path, monkeypatch):
    for root in ("x" * 5000, "a\0b"):
        said = message(voc, root)
        assert "cannot be read" in said and "--root" in said and "\n" not in said
    write_ade(tmp_path, [of_ids([1])])

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)
    assert "images/validation cannot be read (Permission denied)" in message(ade20k, tmp_path)


def test_names_that_are_not_utf8(tmp_path):
    """Label maps and figures are written under an image's name, whatever its bytes are."""
    write_ade(tmp_path, [of_ids([1, 2])])
    folder = tmp_path / "ade/ADEChallengeData2016"
    stem = os.fsdecode(b"caf\xe9")
    (folder / "images/validation/0.jpg").rename(folder / f"images/validation/{stem}.jpg")
    (folder / "annotations/validation/0.png").rename(folder / f"annotations/validation/{stem}.png")
    maps, out = tmp_path / os.fsdecode(b"maps\xe9"), tmp_path / "out"
    maps.mkdir()
    Image.fromarray(of_ids([1, 2])).save(maps / f"{stem}.png")
    benchmark = ade20k.load(str(tmp_path))
    config = EvalConfig("ade20k", predictions=str(maps), save_predictions=str(out), show=1)
    config.show_dir = str(tmp_path / "show")
    metrics = evaluate(None, benchmark, config)
    assert metrics["mIoU"] == 100 and metrics["method"].encode("utf-8").endswith(b"maps\\udce9")
    assert os.fsencode(stem) + b".png" in os.listdir(os.fsencode(out))
    assert os.fsencode(stem) + b".png" in os.listdir(os.fsencode(tmp_path / "show"))


@pytest.mark.parametrize(
    "content, said",
    [
        (b"\xef\xbb\xbf0\r\n\r\n1\r\n", None),  # Windows
        (b"0  1\n1 -1\n", "line 1: '0  1': a name alone is needed"),
        (b"0\nVOC2012/JPEGImages/1\n", "line 2: 'VOC2012/JPEGImages/1': a name alone"),
        (b"0.jpg\n", "line 1: '0.jpg': a name alone is needed, without folder, suffix or flag"),
        (b"0\0\n", "line 1: "),
        (b"0\n1\n0\n", "line 3: 0 is listed twice"),
        ("0\n1\n".encode("utf-16"), r"cannot be read (not UTF-8)"),
        (b"\n \n", "lists no image"),
    ],
)
def test_split_files(content, said, tmp_path):
    write_voc(tmp_path, [of_ids([0, 3]), of_ids([0, 5])])
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_bytes(content)
    if said is None:
        assert voc.load(str(tmp_path)).stems == ["0", "1"]
    else:
        assert said in message(voc, tmp_path)
