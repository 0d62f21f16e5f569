"""ADE20K (MIT scene parsing), validation split: 150 classes, no background (2,000 images)."""

from pathlib import Path

from datasets import IGNORED, Benchmark, find, from_files, lookup, need

TREE = "ade/ADEChallengeData2016/{images/validation/*.jpg,annotations/validation/*.png}"
SOURCE = "http://sceneparsing.csail.mit.edu (ADEChallengeData2016.zip)"
# fmt: off
CLASS_NAMES = (
    "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed ", "windowpane", "grass",
    "cabinet", "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain",
    "chair", "car", "water", "painting", "sofa", "shelf", "house", "sea", "mirror", "rug",
    "field", "armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp", "bathtub",
    "railing", "cushion", "base", "box", "column", "signboard", "chest of drawers", "counter",
    "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path", "stairs",
    "runway", "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge",
    "bookcase", "blind", "coffee table", "toilet", "flower", "book", "hill", "bench",
    "countertop", "stove", "palm", "kitchen island", "computer", "swivel chair", "boat", "bar",
    "arcade machine", "hovel", "bus", "towel", "light", "truck", "tower", "chandelier", "awning",
    "streetlight", "booth", "television receiver", "airplane", "dirt track", "apparel", "pole",
    "land", "bannister", "escalator", "ottoman", "bottle", "buffet", "poster", "stage", "van",
    "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything", "swimming pool",
    "stool", "barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball",
    "food", "step", "tank", "trade name", "microwave", "pot", "animal", "bicycle", "lake",
    "dishwasher", "screen", "blanket", "sculpture", "hood", "sconce", "vase", "traffic light",
    "tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor", "bulletin board", "shower",
    "radiator", "glass", "clock", "flag",
)
# fmt: on


def load(root: str) -> Benchmark:
    """Label id i is class i - 1; 0 is ignored."""
    folder = Path(root) / "ade/ADEChallengeData2016"
    images = need(folder / "images/validation", root, TREE, SOURCE)
    labels = need(folder / "annotations/validation", root, TREE, SOURCE)
    found = find([images], ".jpg", root, TREE)
    files = [(image, labels / f"{image.stem}.png") for image in found]
    table = lookup([(0, IGNORED), *((i + 1, i) for i in range(150))])
    raw_ids = tuple(range(1, 151))
    return from_files("ade20k", CLASS_NAMES, False, files, table, seems, raw_ids=raw_ids)


def seems(maps: dict[str, set[int]]) -> str:
    """What label maps with these ids seem to be (`from_files`)."""
    ids = set().union(*maps.values())
    if 255 in ids and ids <= {*range(150), 255}:
        return (
            "they seem to be numbered from 0, with 255 for what is ignored; take the annotations "
            f"of {SOURCE} as they are, 1 to 150 and 0"
        )
    return ""
