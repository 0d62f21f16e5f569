"""PASCAL VOC 2012 without background, as TCL reports it: its pixels are ignored."""

from datasets import IGNORED, Benchmark, from_files, lookup, voc


def load(root: str) -> Benchmark:
    table = lookup([*((i + 1, i) for i in range(20)), (0, IGNORED), (255, IGNORED)])
    more = dict(raw_ids=tuple(range(1, 21)), strict_palette=True)
    files = voc.files(root)
    return from_files("voc20", voc.CLASS_NAMES[1:], False, files, table, voc.seems, **more)
