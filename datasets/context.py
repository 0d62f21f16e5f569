"""PASCAL Context, validation split: 59 classes and background (5,104 images).

The labels are read either from PNGs of the 59 classes or, where those are missing, straight from
the original `trainval_merged.json` with its 459 classes.
"""

import json
from pathlib import Path

import numpy as np

from config import UserError
from datasets import IGNORED, Benchmark, from_files, listed, lookup, map_label, need, read_image

TREE = (
    "VOCdevkit/VOC2010/JPEGImages/*.jpg with either SegmentationClassContext/*.png and "
    "ImageSets/SegmentationContext/val.txt or trainval_merged.json"
)
SOURCE = (
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/ (images) and "
    "https://www.cs.stanford.edu/~roozbeh/pascal-context/ (labels)"
)
# fmt: off
CLASS_NAMES = (
    "background", "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat",
    "book", "bottle", "building", "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth",
    "computer", "cow", "cup", "curtain", "dog", "door", "fence", "floor", "flower", "food",
    "grass", "ground", "horse", "keyboard", "light", "motorbike", "mountain", "mouse", "person",
    "plate", "platform", "pottedplant", "road", "rock", "sheep", "shelves", "sidewalk", "sign",
    "sky", "snow", "sofa", "table", "track", "train", "tree", "truck", "tvmonitor", "wall",
    "water", "window", "wood",
)
# fmt: on
# The 459-way category id of every class; all other categories are background.
# fmt: off
IDS_OF_459 = (
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105,
    113, 115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308,
    324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454,
    458,
)
# fmt: on


def load(root: str) -> Benchmark:
    """Label ids are class indices; 255, where it occurs, is ignored."""
    table = lookup([*((i, i) for i in range(60)), (255, IGNORED)])
    return read(root, "context", CLASS_NAMES, True, table)


def read(root: str, name: str, class_names: tuple, background: bool, table, **more) -> Benchmark:
    """The benchmark from its PNGs or its JSON file. table: from the 60 class indices."""
    folder = need(Path(root) / "VOCdevkit/VOC2010", root, TREE, SOURCE)
    images = need(folder / "JPEGImages", root, TREE, SOURCE)
    labels = folder / "SegmentationClassContext"
    split = folder / "ImageSets/SegmentationContext/val.txt"
    merged = folder / "trainval_merged.json"
    if labels.exists() and split.exists() or not merged.exists():
        need(labels, root, TREE, SOURCE)
        files = listed(need(split, root, TREE, SOURCE), images, labels)
        return from_files(name, class_names, background, files, table, **more)

    content = read_json(merged)
    files = [images / image["file_name"] for image in content]
    return Benchmark(
        name,
        class_names,
        background,
        stems=[path.stem for path in files],
        image=lambda i: read_image(files[i]),
        label=lambda i: map_label(paint(content[i]), table, files[i], merged),
        **more,
    )


def read_json(path: Path) -> list[dict]:
    """Images of phase "val", each with its annotations in the file's order under "annotations"."""
    try:
        content = json.loads(path.read_text())
        images = {
            image.get("image_id", image.get("id")): image | {"annotations": []}
            for image in content["images"]
            if image["phase"] == "val"
        }
        for annotation in content.get("annos_segmentation", content.get("annotations")):
            if annotation["image_id"] in images:
                images[annotation["image_id"]]["annotations"].append(annotation)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not PASCAL Context's trainval_merged.json ({error!r})"
        ) from error
    if not images:
        raise UserError(f"{path} has no image of phase 'val'")
    return list(images.values())


def paint(image: dict) -> np.ndarray:
    """Class indices of one image of the JSON file; later annotations paint over earlier ones."""
    index_of = {raw: index for index, raw in enumerate(IDS_OF_459)}
    label = np.zeros((image["height"], image["width"]), np.uint8)
    for annotation in image["annotations"]:
        mask = decode_rle(annotation["segmentation"])
        if mask.shape != label.shape:
            raise UserError(f"{image['file_name']}: an annotation has another size than the image")
        label[mask] = index_of.get(annotation["category_id"], 0)
    return label


def decode_rle(rle: dict) -> np.ndarray:
    """COCO's run lengths (column by column, zeros first) to a bool mask of rle["size"] = (h, w).

    Compressed counts are text, five bits a character, the sixth bit meaning "more follows" and the
    last fifth bit the sign; from the fourth on a count is a difference to the last but one.
    """
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        text = counts.encode() if isinstance(counts, str) else counts
        counts, value, shift = [], 0, 0
        for byte in text:
            bits = byte - 48
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                if bits & 16:
                    value -= 1 << shift
                counts.append(value + (counts[-2] if len(counts) > 2 else 0))
                value = shift = 0
    height, width = rle["size"]
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    if flat.size != height * width:
        raise UserError("trainval_merged.json: a run-length mask does not fill its image")
    return flat.reshape(width, height).T
