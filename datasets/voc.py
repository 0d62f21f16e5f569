"""PASCAL VOC 2012, segmentation, validation split: 20 classes and background (1,449 images)."""

from pathlib import Path

from datasets import IGNORED, Benchmark, from_files, lookup, need, read_split

TREE = "VOCdevkit/VOC2012/{JPEGImages/*.jpg,SegmentationClass/*.png,ImageSets/Segmentation/val.txt}"
SOURCE = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ (VOCtrainval_11-May-2012.tar)"
# fmt: off
CLASS_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)
# fmt: on


def files(root: str) -> list[tuple[Path, Path]]:
    folder = need(Path(root) / "VOCdevkit/VOC2012", root, TREE, SOURCE)
    images, labels, split = (
        need(folder / part, root, TREE, SOURCE)
        for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/val.txt")
    )
    return read_split(split, images, labels)


def load(root: str) -> Benchmark:
    """Label ids are class indices; 255 is ignored."""
    table = lookup([*((i, i) for i in range(21)), (255, IGNORED)])
    return from_files("voc", CLASS_NAMES, True, files(root), table, seems, strict_palette=True)


def seems(maps: dict[str, set[int]]) -> str:
    """What label maps with these ids seem to be (`from_files`).

    In SegmentationObject every file numbers its objects 1, 2, 3, ...; that all of five files and
    more hold class ids without a gap, one of them with three classes, does not happen.
    """
    counts = [len(ids - {0, 255}) for ids in maps.values()]
    gapless = all(ids - {0, 255} == {*range(1, n + 1)} for ids, n in zip(maps.values(), counts))
    if len(maps) >= 5 and gapless and max(counts) >= 3:
        return "they seem to be the objects of SegmentationObject; take SegmentationClass"
    return ""
