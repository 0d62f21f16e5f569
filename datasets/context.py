"""PASCAL Context, validation split: 59 classes and background (5,104 images).

The labels are read either from PNGs of the 59 classes or, where those are missing, straight from
`trainval_merged.json` with its 459 classes.

The PNGs must be numbered in the alphabetical order of the classes, as MMSegmentation's conversion
of `trainval_merged.json` writes them. The authors' own archive `59_context_labels.tar.gz` has
another order (PASCAL VOC's 20 classes first). A PNG does not say which it is: the ids are the same.
VOC 2010's `Annotations/*.xml`, which come with its images, do: they name objects of each image,
whose ids must be in its label map. Where that folder is missing the order cannot be checked.
"""

import json
import re
from pathlib import Path

import numpy as np

from config import UserError
from datasets import (
    IGNORED,
    Benchmark,
    check_size,
    from_files,
    lookup,
    missing_files,
    need,
    read_image,
    read_split,
    reason,
    voc,
)

TREE = (
    "VOCdevkit/VOC2010/JPEGImages/*.jpg with either SegmentationClassContext/*.png and "
    "ImageSets/SegmentationContext/val.txt or trainval_merged.json"
)
SOURCE = (
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/ (VOCtrainval_03-May-2010.tar: images) and "
    "https://codalabuser.blob.core.windows.net/public/trainval_merged.json (labels, or PNGs made "
    "from it by MMSegmentation's tools; the archives of 33 and 59 classes at "
    "https://www.cs.stanford.edu/~roozbeh/pascal-context/ number the classes otherwise)"
)
# What to take instead of label maps that are others.
INSTEAD = "take trainval_merged.json, or PNGs that MMSegmentation's tools made from it"
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
        files = read_split(need(split, root, TREE, SOURCE), images, labels)

        def seems_here(maps: dict[str, set[int]]) -> str:
            return seems(maps, folder / "Annotations")

        return from_files(name, class_names, background, files, table, seems_here, **more)

    content = read_json(merged)
    files = [images / image["file_name"] for image in content]
    if missing := missing_files(files):
        raise UserError(
            f"{images}: {len(missing)} of the {len(files)} images of {merged.name} are missing, "
            f"{missing[0].name} first"
        )

    def label(i: int) -> np.ndarray:
        check_size((content[i]["height"], content[i]["width"]), files[i], merged)
        return table[paint(content[i], merged)]

    return Benchmark(
        name,
        class_names,
        background,
        stems=[path.stem for path in files],
        image=lambda i: read_image(files[i]),
        label=label,
        **more,
    )


def seems(maps: dict[str, set[int]], annotations: Path) -> str:
    """What label maps with these ids seem to be (`from_files`).

    annotations: folder of VOC's XML files, which name objects that are in an image. Counted are
    the images whose label map has all of them, by either order of the classes.
    """
    ids = set().union(*maps.values()) - {255}
    if len(maps) >= 10 and 0 < max(ids, default=0) <= 33:  # no sky, tree, wall, water or person
        kind = (
            "33 classes (33_context_labels.tar.gz)" if max(ids) > 20 else "PASCAL VOC's 20 classes"
        )
        return f"they seem to be of {kind}; {INSTEAD}"
    by_name = by_list = 0
    for stem, present in maps.items():
        objects = named_objects(annotations / f"{stem}.xml")
        by_name += bool(objects) and {CLASS_NAMES.index(name) for name in objects} <= present
        by_list += bool(objects) and {voc.CLASS_NAMES.index(name) for name in objects} <= present
    if by_list > by_name:
        return (
            "they seem to have the order of 59_context_labels.tar.gz, PASCAL VOC's 20 classes "
            f"first, instead of the alphabetical one; {INSTEAD}"
        )
    return ""


def named_objects(path: Path) -> set[str]:
    """The classes of both VOC and Context that one of VOC's XML files names; none without it."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except (OSError, ValueError):
        return set()
    names = {name.strip() for name in re.findall(r"<name>([^<]*)</name>", text)}
    return names & set(voc.CLASS_NAMES) & set(CLASS_NAMES)


def read_json(path: Path) -> list[dict]:
    """Images of phase "val", each with its annotations in the file's order under "annotations".

    Raises UserError if something that is needed is missing or of another type.
    """
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise not_merged(path, reason(error)) from error

    def value(entry: object, names: tuple[str, ...], kinds: tuple[type, ...], where: str):
        """What an entry has under the first of the names that it has."""
        found = next((entry[n] for n in names if n in entry), None) if type(entry) is dict else None
        if type(found) not in kinds:
            kind = " or ".join({int: "number", str: "text"}.get(k, k.__name__) for k in kinds)
            raise not_merged(path, f"{where} has no {kind} {names[0]!r}")
        return found

    images: dict = {}
    for number, image in enumerate(value(content, ("images",), (list,), "it"), start=1):
        where = f"image {number}"
        if value(image, ("phase",), (str,), where) != "val":
            continue
        name = value(image, ("file_name",), (str,), where)
        key = value(image, ("image_id", "id"), (int, str), where)
        size = [value(image, (side,), (int,), where) for side in ("height", "width")]
        if not name or any(c in name for c in "/\\\0"):
            raise not_merged(path, f"{where} has the file_name {name[:80]!r}")
        if key in images:
            raise not_merged(path, f"{where} has the image_id of another one, {key}")
        if min(size) < 1:
            raise not_merged(path, f"{where} is of size {size}")
        images[key] = image | {"annotations": []}
    if not images:
        raise UserError(f"{path} has no image of phase 'val'")

    both = ("annos_segmentation", "annotations")
    for number, annotation in enumerate(value(content, both, (list,), "it"), start=1):
        where = f"annotation {number}"
        image = images.get(value(annotation, ("image_id",), (int, str), where))
        if image is None:
            continue
        category = value(annotation, ("category_id",), (int,), where)
        if not 0 <= category <= 459:
            raise not_merged(path, f"{where} has the category_id {category}, of 459")
        rle = value(annotation, ("segmentation",), (dict,), where)
        value(rle, ("counts",), (str, list), f"the segmentation of {where}")
        size = value(rle, ("size",), (list,), f"the segmentation of {where}")
        if size != [image["height"], image["width"]]:
            raise not_merged(path, f"{where} has another size than its image")
        image["annotations"].append(annotation)
    return list(images.values())


def not_merged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not PASCAL Context's trainval_merged.json ({why})")


def paint(image: dict, path: Path) -> np.ndarray:
    """Class indices of one image of the JSON file; later annotations paint over earlier ones."""
    index_of = {raw: index for index, raw in enumerate(IDS_OF_459)}
    label = np.zeros((image["height"], image["width"]), np.uint8)
    for annotation in image["annotations"]:
        try:
            mask = decode_rle(annotation["segmentation"])
        except UserError as error:
            raise not_merged(path, f"{image['file_name']}: {error}") from error
        label[mask] = index_of.get(annotation["category_id"], 0)
    return label


def decode_rle(rle: dict) -> np.ndarray:
    """COCO's run lengths (column by column, zeros first) to a bool mask of rle["size"] = (h, w).

    Compressed counts are text, five bits a character, the sixth bit meaning "more follows" and the
    last fifth bit the sign; from the fourth on a count is a difference to the last but one.
    Raises UserError for what is no run lengths or does not fill the mask.
    """
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        text = [ord(c) for c in counts] if isinstance(counts, str) else counts
        counts, value, shift = [], 0, 0
        for byte in text:
            bits = byte - 48
            if not 0 <= bits < 64:
                raise UserError(f"{chr(byte)!r} in compressed run lengths")
            value |= (bits & 31) << shift
            shift += 5
            if not bits & 32:
                if bits & 16:
                    value -= 1 << shift
                counts.append(value + (counts[-2] if len(counts) > 2 else 0))
                value = shift = 0
    height, width = rle["size"]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise UserError("run lengths that are no counts")
    if sum(counts) != height * width:
        raise UserError("a run-length mask does not fill its image")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(width, height).T
