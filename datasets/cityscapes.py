"""Cityscapes, validation split: 19 classes, no background (500 images)."""

from pathlib import Path

from datasets import IGNORED, Benchmark, entries, find, from_files, lookup, need

TREE = "cityscapes/{leftImg8bit/val/*/*_leftImg8bit.png,gtFine/val/*/*_gtFine_labelIds.png}"
SOURCE = (
    "https://www.cityscapes-dataset.com (leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip)"
)
# fmt: off
CLASS_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
    "motorcycle", "bicycle",
)
# fmt: on
# The labelId of every class; all other ids up to 33 are ignored. -1 (licence plates) is not drawn.
# fmt: off
LABEL_IDS = (
    7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33,
)
# fmt: on
# fmt: off
COLOURS = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
    (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
    (0, 80, 100), (0, 0, 230), (119, 11, 32),
)
# fmt: on


def load(root: str) -> Benchmark:
    """Label ids are the labelIds of the dataset, not its trainIds. Raises UserError."""
    folder = Path(root) / "cityscapes"
    images = need(folder / "leftImg8bit/val", root, TREE, SOURCE)
    labels = need(folder / "gtFine/val", root, TREE, SOURCE)
    cities = [images / entry.name for entry in entries(images) if entry.is_dir()]
    found = find(cities, "_leftImg8bit.png", root, TREE)
    files = []
    for image in found:
        name = image.name.replace("_leftImg8bit", "_gtFine_labelIds")
        files.append((image, labels / image.parent.name / name))
    table = lookup((raw, IGNORED) for raw in range(34))
    table[list(LABEL_IDS)] = range(len(LABEL_IDS))
    palette = [0] * 768
    for raw, colour in zip(LABEL_IDS, COLOURS):
        palette[3 * raw : 3 * raw + 3] = colour
    return from_files(
        "cityscapes", CLASS_NAMES, False, files, table, seems, raw_ids=LABEL_IDS, palette=palette
    )


def seems(maps: dict[str, set[int]]) -> str:
    """What label maps with these ids seem to be (`from_files`).

    trainIds are 0 to 18 and 255. Most of them are labelIds too, of other classes; but 255 is none,
    and whoever sees more than ten of the first 19 labelIds also sees vegetation (21), the sky (23)
    or a car (26).
    """
    ids = set().union(*maps.values())
    if ids <= {*range(19), 255} and (255 in ids or len(ids) > 10):
        return (
            "they seem to be trainIds (0 to 18, 255); take the files *_gtFine_labelIds.png of "
            "gtFine_trainvaltest.zip as downloaded"
        )
    return ""
