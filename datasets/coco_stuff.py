"""COCO-Stuff 164k, validation split: 171 classes, no background (5,000 images)."""

from pathlib import Path

from datasets import IGNORED, Benchmark, find, from_files, lookup, need

TREE = "coco_stuff164k/{images/val2017/*.jpg,annotations/val2017/*.png}"
SOURCE = "https://github.com/nightrome/cocostuff (val2017.zip and stuffthingmaps_trainval2017.zip)"
# fmt: off
CLASS_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote",
    "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush", "banner", "blanket",
    "branch", "bridge", "building-other", "bush", "cabinet", "cage", "cardboard", "carpet",
    "ceiling-other", "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard",
    "curtain", "desk-stuff", "dirt", "door-stuff", "fence", "floor-marble", "floor-other",
    "floor-stone", "floor-tile", "floor-wood", "flower", "fog", "food-other", "fruit",
    "furniture-other", "grass", "gravel", "ground-other", "hill", "house", "leaves", "light",
    "mat", "metal", "mirror-stuff", "moss", "mountain", "mud", "napkin", "net", "paper",
    "pavement", "pillow", "plant-other", "plastic", "platform", "playingfield", "railing",
    "railroad", "river", "road", "rock", "roof", "rug", "salad", "sand", "sea", "shelf",
    "sky-other", "skyscraper", "snow", "solid-other", "stairs", "stone", "straw",
    "structural-other", "table", "tent", "textile-other", "towel", "tree", "vegetable",
    "wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone", "wall-tile",
    "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood",
)
# fmt: on
# The pixel id of every class in stuffthingmaps.
# fmt: off
PIXEL_IDS = (
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 26,
    27, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 45, 46, 47, 48, 49, 50, 51, 52,
    53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 66, 69, 71, 72, 73, 74, 75, 76, 77, 78, 79,
    80, 81, 83, 84, 85, 86, 87, 88, 89, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100, 101, 102, 103,
    104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116, 117, 118, 119, 120, 121,
    122, 123, 124, 125, 126, 127, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139,
    140, 141, 142, 143, 144, 145, 146, 147, 148, 149, 150, 151, 152, 153, 154, 155, 156, 157,
    158, 159, 160, 161, 162, 163, 164, 165, 166, 167, 168, 169, 170, 171, 172, 173, 174, 175,
    176, 177, 178, 179, 180, 181,
)
# fmt: on


def files(root: str) -> list[tuple[Path, Path]]:
    folder = Path(root) / "coco_stuff164k"
    images = need(folder / "images/val2017", root, TREE, SOURCE)
    labels = need(folder / "annotations/val2017", root, TREE, SOURCE)
    found = find([images], ".jpg", root, TREE)
    return [(image, labels / f"{image.stem}.png") for image in found]


def load(root: str) -> Benchmark:
    """Pixel ids go by PIXEL_IDS; 255 is ignored."""
    table = lookup([*((raw, index) for index, raw in enumerate(PIXEL_IDS)), (255, IGNORED)])
    return from_files(
        "coco_stuff", CLASS_NAMES, False, files(root), table, seems, raw_ids=PIXEL_IDS
    )


def seems(maps: dict[str, set[int]]) -> str:
    """What label maps with these ids seem to be (`from_files`).

    Other files of COCO have ids that stuffthingmaps have too, of other classes; what tells them are
    the ids that COCO never gave to a class, 11, 25, 28, ..., and the one beyond the last.
    """
    ids = set().union(*maps.values())
    categories = {raw + 1 for raw in PIXEL_IDS}
    kind = ""
    if ids <= {0, *range(92, 184)} and not ids.isdisjoint({182, 183}):
        kind = "those of stuff_val2017_pixelmaps, which have no things (183 stands for all)"
    elif ids <= {0, *categories} and not ids <= {*PIXEL_IDS, 255}:
        kind = "COCO's category ids (1 to 182, 0 for no label), one more than the ids expected"
    elif ids <= {*range(171), 255} and not ids <= {*PIXEL_IDS, 255}:
        kind = "numbered without gaps (0 to 170, 255), as *_labelTrainIds.png"
    return f"they seem to be {kind}; take stuffthingmaps_trainval2017.zip" if kind else ""
