"""The sheet of comparisons: which images it shows, what is drawn and written, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from conftest import ROOT, random_clip
from PIL import Image

from config import UserError
from datasets import IGNORED, Benchmark, load_benchmark
from evaluate import Segmenter
from experiments.compare import (
    WIDTH,
    CompareConfig,
    Method,
    Result,
    choose,
    class_colours,
    classes_shown,
    draw_sheet,
    image_iou,
    main,
    make_segmenter,
    read_methods,
    segment_images,
    settings_of,
)
from support.draw import indexed, legend, save_png
from training_free import TrainingFree

RAW = golden.folder() / "raw"


def write_maps(folder: Path, benchmark: Benchmark, maps: dict[str, np.ndarray]) -> str:
    """Class indices by stem, as a folder of raw ids."""
    for stem, labels in maps.items():
        raw = np.array(benchmark.raw_ids, np.uint8)[labels]
        save_png(indexed(raw, benchmark.palette), folder / f"{stem}.png")
    return str(folder)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Label maps of the first scenes, a folder a method: right, empty and shifted."""
    folder = tmp_path_factory.mktemp("scenes")
    benchmark = load_benchmark("shapes", "")
    labels = {benchmark.stems[i]: benchmark.label(i) for i in range(8)}
    write_maps(folder / "right", benchmark, labels)
    write_maps(folder / "empty", benchmark, {k: 0 * v for k, v in labels.items()})
    shifted = {k: np.roll(v, 2 * i, axis=1) for i, (k, v) in enumerate(labels.items())}
    write_maps(folder / "shifted", benchmark, shifted)
    return folder


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    """Two released files with CLIPs of their own, and label maps of VOC and Cityscapes."""
    folder = tmp_path_factory.mktemp("miniature")
    for name, source in (("code.pth", "raw/checkpoint"), ("tcl.pth", "tiny_tcl_checkpoint")):
        state = {k: torch.tensor(v) for k, v in golden.load(source).items()}
        torch.save({"model": state}, folder / name)
    expected = golden.load("raw/expected_predictions")
    for name in ("voc", "cityscapes"):
        benchmark = load_benchmark(name, str(RAW))
        maps = {stem: expected[f"{name}/{stem}"] for stem in benchmark.stems}
        write_maps(folder / name, benchmark, maps)
    return folder


def run_here(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    main()


# --- the IoU of an image, and the images that it chooses ------------------------------------------


def naive_iou(predicted: np.ndarray, label: np.ndarray) -> float | None:
    """With sets of pixels."""
    counted = {tuple(p) for p in np.argwhere(label != IGNORED)}
    values = []
    for c in {*predicted.ravel().tolist(), *label.ravel().tolist()} - {IGNORED}:
        a = {tuple(p) for p in np.argwhere(predicted == c)} & counted
        b = {tuple(p) for p in np.argwhere(label == c)} & counted
        if a | b:
            values.append(100 * len(a & b) / len(a | b))
    return float(np.mean(values)) if values else None


def random_benchmark() -> tuple[Benchmark, dict[str, dict[int, np.ndarray]]]:
    """Twelve small random images of four classes, and label maps of two methods; one image is
    without a labelled pixel, and two are the same."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (12, 6, 8)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = IGNORED
    labels[3] = IGNORED
    benchmark = Benchmark(
        name="random",
        class_names=("background", "a", "b", "c"),
        background=True,
        stems=[f"image_{i}" for i in range(12)],
        image=lambda i: Image.new("RGB", (8, 6), (20 * i, 0, 0)),
        label=lambda i: labels[i],
    )
    maps: dict[str, dict[int, np.ndarray]] = {}
    for name, share in (("one", 0.3), ("two", 0.6)):
        wrong = rng.random(labels.shape) < share
        found = np.where(wrong, rng.integers(0, 4, labels.shape), labels % 4).astype(np.uint8)
        maps[name] = dict(enumerate(found))
    labels[5] = labels[2]
    for found in maps.values():
        found[5] = found[2]
    return benchmark, maps


def test_the_iou_of_an_image_against_sets_of_pixels():
    benchmark, maps = random_benchmark()
    for found in maps.values():
        for i, predicted in found.items():
            label = benchmark.label(i)
            got, want = image_iou(predicted, label, 4), naive_iou(predicted, label)
            assert got == (None if want is None else pytest.approx(want))
            assert (got is None) == (i == 3)
    label = np.array([[0, 0, 1, IGNORED]], np.uint8)
    predicted = np.array([[0, 2, 1, 3]])  # 3 is where no pixel counts: not among the classes
    assert image_iou(predicted, label, 4) == pytest.approx((50 + 100 + 0) / 3)


def test_worst_and_gain_against_a_loop():
    """Ties by the order of the benchmark; an image without a labelled pixel is never chosen."""
    benchmark, maps = random_benchmark()
    ious = {
        name: {i: naive_iou(found[i], benchmark.label(i)) for i in found}
        for name, found in maps.items()
    }
    results = {name: Result(name, values, {}) for name, values in ious.items()}

    def by_loop(rank: dict[int, float], count: int) -> list[int]:
        """The lowest rank that is left, the first of equal ones, again and again."""
        chosen: list[int] = []
        while len(chosen) < count and len(chosen) < len(rank):
            best = None
            for i in sorted(rank):
                if i not in chosen and (best is None or rank[i] < rank[best]):
                    best = i
            chosen.append(best)
        return chosen

    counted = [i for i in range(12) if i != 3]
    worst = {i: ious["one"][i] for i in counted}
    gain = {i: ious["two"][i] - ious["one"][i] for i in counted}
    for count in (1, 4, 12):
        config = CompareConfig(worst="one", count=count)
        assert choose(results, config) == by_loop(worst, count)
        config = CompareConfig(gain=("one", "two"), count=count)
        assert choose(results, config) == by_loop(gain, count)
    every = choose(results, CompareConfig(worst="one", count=12))
    assert every.index(5) == every.index(2) + 1 and len(every) == 11


# --- what is written ------------------------------------------------------------------------------


def test_the_sheet_has_a_row_an_image_and_a_column_a_method():
    """Rows as high as their images ask for, the benchmark's own colours, one legend."""
    benchmark, _ = random_benchmark()
    sizes = [(8, 6), (6, 12)]
    labels = [np.full((h, w), i + 1, np.uint8) for i, (w, h) in enumerate(sizes)]
    benchmark.image = lambda i: Image.new("RGB", sizes[i], (100, 100, 100))
    benchmark.label = lambda i: labels[i]
    results = {
        "one": Result("the first", {0: 100.0, 1: 100.0}, dict(enumerate(labels))),
        "two": Result("the second", {0: 0.0, 1: None}, {i: 0 * m for i, m in enumerate(labels)}),
    }
    sheet = np.asarray(draw_sheet(benchmark, [0, 1], results, "a note"))
    cell = WIDTH + 6
    assert sheet.shape[1] == 4 * cell  # image, ground truth, one, two
    colours = np.array(class_colours(benchmark))
    assert [tuple(c) for c in colours[:3]] == [(0, 0, 0), (128, 0, 0), (0, 128, 0)]  # VOC's

    def height_of(column: int, colour) -> int:
        """Of the pixels of a colour in the middle of a column."""
        return int((sheet[:, column * cell + cell // 2] == colour).all(-1).sum())

    for index, (width, height) in zip((1, 2), sizes):
        tint = (100 * 0.3 + colours[index] * 0.7).astype(np.uint8)
        for column, wanted in ((1, WIDTH * height // width), (2, WIDTH * height // width), (3, 0)):
            assert height_of(column, tint) == pytest.approx(wanted, abs=1)
    assert height_of(0, (100, 100, 100)) == WIDTH * 6 // 8 + 2 * WIDTH
    assert classes_shown([*labels, 0 * labels[0]], benchmark) == [1, 2]
    wanted = np.asarray(legend(["a", "b"], [(128, 0, 0), (0, 128, 0)], 4 * cell))
    rows = len(wanted)
    found = [y for y in range(len(sheet) - rows) if (sheet[y : y + rows] == wanted).all()]
    assert len(found) == 1 and found[0] > WIDTH * 6 // 8 + 2 * WIDTH


@pytest.mark.slow
def test_folders_checkpoints_and_methods_in_one_sheet(world, scenes, tmp_path):
    """The script itself, on the shapes world."""
    methods = (f"code={world / 'code.pt'}", f"maps={scenes / 'right'}/", "maskclip", "naclip")
    arguments = ("--dataset", "shapes", "--of", *methods, "--no-pamr", "--worst", "naclip")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compare", *arguments, "--limit", "5", "--count", "2"]
        + ["--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "shapes, 2 of the first 5 of 500 images: those with the lowest IoU of naclip" in (
        done.stdout
    )
    content = json.loads((tmp_path / "sheet.json").read_text())
    found = content["methods"]
    assert list(found) == ["code", "maps", "maskclip", "naclip"]
    stems = [f"test_0000{i}" for i in range(5)]
    for method in found.values():
        assert list(method["IoU"]) == stems
        assert method["mean_of_images"] == pytest.approx(np.mean(list(method["IoU"].values())))
    assert set(found["maps"]["IoU"].values()) == {100.0}
    naclip = found["naclip"]["IoU"]
    assert content["images"] == sorted(stems, key=naclip.get)[:2]
    assert [method["description"] for method in found.values()] == [
        "thesis protocol, code with 30% maskclip prior, not refined, class names",
        f"label maps in {scenes / 'right'}/",
        "thesis protocol, maskclip, not refined, class names",
        "training-free protocol, naclip, not refined, training-free names and 6 of the background",
    ]
    assert content["settings"]["clip"] == "shapes"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 6 * (WIDTH + 6) and sheet.height > 2 * WIDTH


def test_a_miniature_of_voc(miniature, tmp_path, monkeypatch):
    """A released checkpoint, its label maps as saved, and a method on the same CLIP."""
    config = CompareConfig(dataset="voc", root=str(RAW))
    benchmark = load_benchmark("voc", str(RAW))
    code = Method("code", str(miniature / "code.pth"), "checkpoint")
    clip = make_segmenter(code, benchmark, config).clip
    monkeypatch.setattr("evaluate.load_clip", lambda name, weights: clip)
    monkeypatch.setattr(TrainingFree, "templates", ["a photo of a {}."])  # not all 80
    of = (f"code={miniature / 'code.pth'}", f"maps={miniature / 'voc'}", "sclip")
    stem = benchmark.stems[1]
    arguments = ("--dataset", "voc", "--root", RAW, "--images", stem, "--no-pamr")
    run_here(monkeypatch, *arguments, "--out", tmp_path, "--of", *of)
    content = json.loads((tmp_path / "sheet.json").read_text())
    assert content["images"] == [stem] and content["chosen"].endswith("named by hand")
    maps = golden.load("raw/expected_predictions")
    want = naive_iou(maps[f"voc/{stem}"], benchmark.label(1))
    assert content["methods"]["maps"]["IoU"] == {stem: pytest.approx(want)}
    assert content["methods"]["sclip"]["description"].startswith("training-free protocol, sclip")
    assert all(list(method["IoU"]) == [stem] for method in content["methods"].values())


def test_methods_run_as_their_own_scripts_run_them(world):
    """Settings and label maps are those of evaluate.py and training_free.py."""
    benchmark = load_benchmark("shapes", "")
    config = CompareConfig(dataset="shapes", clip="shapes", pamr=False)
    checkpoint = Method("code", str(world / "code.pt"), "checkpoint")
    settings = settings_of(checkpoint, config)
    assert (settings.window, settings.method, settings.threshold) == (96, "code", 0.5)
    sclip = make_segmenter(Method("s", "sclip", "untrained"), benchmark, config)
    assert isinstance(sclip, TrainingFree) and sclip.config.method == "sclip"
    maskclip = make_segmenter(Method("m", "maskclip", "untrained"), benchmark, config)
    assert type(maskclip) is Segmenter and maskclip.model is None
    result = segment_images(checkpoint, benchmark, [2, 0], config, keep_maps=True)
    segmenter = make_segmenter(checkpoint, benchmark, config)
    assert list(result.ious) == list(result.maps) == [2, 0]
    for i, found in result.maps.items():
        assert (found == segmenter.label_map(benchmark.image(i), True).numpy()).all()
        assert result.ious[i] == pytest.approx(naive_iou(found, benchmark.label(i)))
    assert segment_images(checkpoint, benchmark, [0], config, keep_maps=False).maps == {}


def test_clip_weights_reach_whoever_needs_them(world, miniature):
    """Methods without training and our checkpoints; released files hold their own."""
    config = CompareConfig(dataset="voc", clip_weights="weights.pt")
    for method, weights in (
        (Method("n", "naclip", "untrained"), "weights.pt"),
        (Method("m", "maskclip", "untrained"), "weights.pt"),
        (Method("c", str(world / "code.pt"), "checkpoint"), "weights.pt"),
        (Method("r", str(miniature / "code.pth"), "checkpoint"), None),
    ):
        assert settings_of(method, config).clip_weights == weights


def test_images_keep_the_order_that_they_are_named_in(scenes, tmp_path, monkeypatch):
    names = ("test_00004", "test_00001")
    of = ("--of", f"right={scenes / 'right'}", f"shifted={scenes / 'shifted'}")
    common = ("--dataset", "shapes", "--out", tmp_path, *of)
    run_here(monkeypatch, *common, "--images", *names)
    assert json.loads((tmp_path / "sheet.json").read_text())["images"] == list(names)
    run_here(monkeypatch, *common, "--count", "2")
    content = json.loads((tmp_path / "sheet.json").read_text())
    assert content["images"] == ["test_00000", "test_00001"]
    assert list(content["methods"]["right"]["IoU"]) == content["images"]
    run_here(monkeypatch, *common, "--gain", "right", "shifted", "--limit", "8", "--count", "8")
    content = json.loads((tmp_path / "sheet.json").read_text())
    gained = [100 - content["methods"]["shifted"]["IoU"][stem] for stem in content["images"]]
    assert gained == sorted(gained, reverse=True) and gained[-1] == 0  # the first is not shifted
    assert content["images"][-1] == "test_00000"


# --- mistakes -------------------------------------------------------------------------------------


def test_a_bare_word_is_a_method_of_its_name(tmp_path, monkeypatch):
    assert read_methods(["naclip", "x=naclip"]) == [
        Method("naclip", "naclip", "untrained"),
        Method("x", "naclip", "untrained"),
    ]
    monkeypatch.chdir(tmp_path)
    Path("naclip").mkdir()  # a folder of the name of a method
    assert [m.kind for m in read_methods(["a=naclip", "b=naclip/"])] == ["untrained", "maps"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "--dataset is needed: one of voc, context"),
        (("--dataset", "voc"), "--of is needed: NAME=WHAT"),
        (("--dataset", "imagenet", "--of", "naclip"), "--dataset imagenet: not one of voc"),
        (("--dataset", "all", "--of", "naclip"), "--dataset all: not one of voc"),
        (("--dataset", "voc", "--root", "nowhere", "--of", "naclip"), "nowhere/VOCdevkit/VOC2012"),
        (("--dataset", "voc", "--of", "last.pt"), "a checkpoint or a folder needs a name, as in"),
        (("--dataset", "voc", "--of", "=last.pt"), "--of =last.pt: NAME=WHAT is needed"),
        (("--dataset", "voc", "--of", "code="), "--of code=: NAME=WHAT is needed"),
        (("--dataset", "voc", "--of", "a=no.pt"), "--of a=no.pt: no.pt is no file, no folder and"),
        (("--dataset", "voc", "--of", "naclip", "naclip=sclip"), "two methods named naclip"),
        (("--dataset", "voc", "--of", "sclip", "--checkpoint", "a.pt"), "unrecognized arguments"),
        (("--dataset", "shapes", "--of", "sclip", "--worst", "code"), "--worst code: not one of"),
        (("--of", "sclip", "--gain", "sclip", "code", "--dataset", "voc"), "--gain code: not one"),
        (("--of", "sclip", "--gain", "sclip", "--dataset", "voc"), "two methods are needed"),
        (("--of", "sclip", "--gain", "sclip", "sclip", "--dataset", "voc"), "two methods are need"),
        (
            ("--dataset", "shapes", "--of", "sclip", "--worst", "sclip", "--images", "a"),
            "--images and --worst: give one of them",
        ),
        (
            ("--dataset", "shapes", "--of", "sclip", "--worst", "sclip", "--gain", "a", "b"),
            "--worst and --gain: give one of them",
        ),
        (
            ("--dataset", "shapes", "--of", "sclip", "--images", "a", "--count", "3"),
            "--images and --count: give one of them",
        ),
        (
            ("--dataset", "shapes", "--of", "sclip", "--images", "cat"),
            "--images cat: not in shapes",
        ),
        (
            ("--dataset", "shapes", "--of", "sclip", "--limit", "2", "--images", "test_00002"),
            "test_00002: not in the first 2 images of shapes (--limit)",
        ),
        (
            ("--dataset", "shapes", "--of", "sclip", "--images", "test_00002", "test_00002"),
            "--images test_00002: it stands twice",
        ),
        (("--dataset", "shapes", "--of", "sclip", "--count", "0"), "--count 0: must be at least 1"),
        (("--dataset", "shapes", "--of", "sclip", "--out", __file__), "a file, and a folder is"),
    ],
)
def test_mistakes_are_one_line(arguments, words, mistake, monkeypatch, tmp_path):
    refuse_to_segment(monkeypatch)
    assert words in mistake(main, *arguments)


def refuse_to_segment(monkeypatch) -> None:
    """A mistake is found before anything is segmented."""

    def segmented(*arguments, **more):
        raise AssertionError("something was segmented")

    monkeypatch.setattr("experiments.compare.segment_images", segmented)


def test_options_that_no_method_uses_are_refused(world, miniature, scenes, mistake, monkeypatch):
    refuse_to_segment(monkeypatch)
    maps, code = f"maps={scenes / 'right'}", f"code={world / 'code.pt'}"
    released = f"code={miniature / 'code.pth'}"
    common = ("--dataset", "shapes", "--of")
    said = mistake(main, *common, maps, "--no-pamr")
    assert "--no-pamr: --of names label maps alone, which are as they are" in said
    assert "--clip-weights: --of names label maps" in mistake(
        main, *common, maps, "--clip-weights", "a"
    )
    said = mistake(main, *common, maps, code, "--clip", "ViT-B-16")
    assert "--clip ViT-B-16: that of methods without training, and --of names none" in said
    said = mistake(main, *common, maps, released, "--clip-weights", "a.pt")
    assert "--clip-weights a.pt: the released files of --of hold CLIP's weights" in said


def test_folders_of_another_benchmark_are_refused(
    scenes, miniature, mistake, monkeypatch, tmp_path
):
    refuse_to_segment(monkeypatch)
    voc, cities = f"a={miniature / 'voc'}", f"a={miniature / 'cityscapes'}"
    said = mistake(main, "--dataset", "shapes", "--of", voc)
    assert f"--of {voc}: 4 of the 4 label maps of shapes are missing, test_00000.png first" in said
    said = mistake(main, "--dataset", "voc", "--root", RAW, "--of", cities)
    assert "2 of the 2 label maps of voc are missing, 2007_001011.png first" in said
    eight = ("--of", f"a={scenes / 'right'}", "--limit", "9")  # with --worst all nine are needed
    said = mistake(main, "--dataset", "shapes", *eight, "--worst", "a")
    assert "1 of the 9 label maps of shapes are missing, test_00008.png first" in said
    benchmark = load_benchmark("shapes", "")
    for i in range(4):  # the right names, another benchmark's ids
        save_png(indexed(np.full((96, 96), 20), benchmark.palette), tmp_path / f"test_0000{i}.png")
    said = mistake(main, "--dataset", "shapes", "--of", f"a={tmp_path}")
    assert "test_00000.png holds ids that shapes does not have: 20; its own are 0 to 12" in said
    save_png(indexed(np.zeros((9, 96)), benchmark.palette), tmp_path / "test_00000.png")
    said = mistake(main, "--dataset", "shapes", "--of", f"a={tmp_path}")
    assert "test_00000.png is 96 x 9, its image 96 x 96" in said


def test_another_clip_is_refused(miniature, world, mistake, monkeypatch):
    refuse_to_segment(monkeypatch)
    code, tcl = f"code={miniature / 'code.pth'}", f"tcl={miniature / 'tcl.pth'}"
    common = ("--dataset", "voc", "--root", RAW, "--of")
    said = mistake(main, *common, code, tcl)
    assert "--of tcl: its CLIP is another than that of code; save its label maps with evaluate" in (
        said
    )
    assert "evaluate.py --save-predictions DIR, and give --of tcl=DIR" in said
    monkeypatch.setattr("evaluate.load_clip", lambda name, weights: random_clip(5))
    said = mistake(main, *common, code, "naclip")
    assert "--of naclip: its CLIP is another than that of code" in said
    assert "training_free.py --save-predictions DIR, and give --of naclip=DIR" in said


def test_another_world_is_refused(miniature, world, scenes, mistake, monkeypatch):
    refuse_to_segment(monkeypatch)
    ours, released = f"a={world / 'code.pt'}", f"a={miniature / 'code.pth'}"
    said = mistake(main, "--dataset", "voc", "--root", RAW, "--of", ours)
    assert f"--of {ours}: of the shapes world, see --dataset shapes" in said
    said = mistake(main, "--dataset", "shapes", "--of", released)
    assert f"--dataset shapes: --of {released} is not of the shapes world" in said
    said = mistake(main, "--dataset", "voc", "--root", RAW, "--of", "naclip", "--clip", "shapes")
    assert "--clip shapes: of the shapes world" in said
    said = mistake(main, "--dataset", "shapes", "--of", f"a={scenes / 'right/test_00000.png'}")
    assert "test_00000.png is not a readable checkpoint" in said


def test_an_image_without_a_labelled_pixel(monkeypatch, tmp_path):
    """It is drawn where it is asked for, and never chosen."""
    folder = tmp_path / "ade/ADEChallengeData2016"
    for name in ("images/validation", "annotations/validation"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (4, 3)).save(folder / "images/validation/x.jpg")
    Image.new("L", (4, 3)).save(folder / "annotations/validation/x.png")
    Image.new("L", (4, 3), 1).save(tmp_path / "x.png")
    common = ("--dataset", "ade20k", "--root", tmp_path, "--of", f"maps={tmp_path}")
    run_here(monkeypatch, *common, "--out", tmp_path / "out")
    content = json.loads((tmp_path / "out/sheet.json").read_text())
    assert content["methods"]["maps"]["IoU"] == {"x": None}
    assert content["methods"]["maps"]["mean_of_images"] is None
    with pytest.raises(UserError, match="no pixel of the 1 images is labelled: there is no IoU"):
        run_here(monkeypatch, *common, "--worst", "maps", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
