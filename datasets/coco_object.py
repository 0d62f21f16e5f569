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
    """Things (pixel ids up to 90) are classes 1 to 80; all else, 255 included, is background."""
    things = [(raw, i + 1) for i, raw in enumerate(coco_stuff.PIXEL_IDS) if raw <= 90]
    table = lookup(things, others=0)
    return from_files("coco_object", CLASS_NAMES, True, coco_stuff.files(root), table)
