"""COCO-Object: the 80 things of COCO-Stuff's validation split and background (5,000 images)."""

from datasets import Benchmark, coco_stuff, from_files, lookup

# fmt: off
CLASS_NAMES = (
    "background", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck",
    "boat", "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat",
    "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack",
    "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball",
    "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket",
    "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair",
    "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote",
    "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on


def load(root: str) -> Benchmark:
    """Things (pixel ids up to 90) are classes 1 to 80; stuff and 255 (no label) are background.

    Raises UserError for any other id.
    """
    pairs = [(raw, i + 1 if raw <= 90 else 0) for i, raw in enumerate(coco_stuff.PIXEL_IDS)]
    table = lookup([*pairs, (255, 0)])
    files = coco_stuff.files(root)
    return from_files("coco_object", CLASS_NAMES, True, files, table, coco_stuff.seems)
