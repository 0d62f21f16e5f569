"""segment.py: any image, any words, and the caption beside it."""

import functools
import io
import json
import os
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT
from PIL import Image
from runs import OPTIONS, SETTINGS, segment

from checkpoint import SHAPES_MODEL, load_model
from clip import noun_prompts, text_hidden, tokenize, tokens_of
from config import MaskConfig, UserError, run_script
from datasets import shapes
from evaluate import Segmenter
from segment import (
    Result,
    images_and_words,
    load_segmenter,
    main,
    measure_shares,
    name_of_output,
    surroundings,
    word_masks,
)
from support.draw import heat
from support.page import page_item

pytestmark = pytest.mark.slow


def test_words_in_an_image(world):
    done = segment(
        *("scene.png", "bug", "wheel", "--json", "s.json", "--show-scores", *OPTIONS),
        folder=world,
    )
    assert done.returncode == 0, done.stderr
    out = world / "out" / "segment"
    with Image.open(out / "scene.labels.png") as stored:
        assert stored.mode == "P" and stored.size == (96, 96)
        labels = np.asarray(stored)
    model = load_model(str(world / "code.pt"), CPU)
    segmenter = Segmenter(model.clip, model, ["bug", "wheel"], MaskConfig(**SETTINGS))
    image = Image.open(world / "scene.png").convert("RGB")
    want = segmenter.label_map(image, background=True).numpy()
    assert np.array_equal(labels, want) and set(np.unique(want)) == {0, 1, 2}
    found = json.loads((world / "s.json").read_text())["scene.png"]
    assert found["bug"]["share"] == pytest.approx((want == 1).mean())
    assert 0.3 < found["bug"]["score"] < 1
    best, _ = segmenter.scores(image).label_map((96, 96), 0.3)
    assert found["bug"]["score"] == pytest.approx(best.numpy()[want == 1].mean(), abs=1e-6)
    for name in ("scene.overlay.png", "scene.score-1.png", "scene.score-2.png"):
        assert Image.open(out / name).width >= 96
    assert f"bug {100 * found['bug']['share']:.1f} %" in done.stdout


def test_without_background_every_pixel_has_a_word(world, tmp_path):
    arguments = ("scene.png", "bug", "sand", "--no-background", "--out", tmp_path, *OPTIONS[:-2])
    assert segment(*arguments, folder=world).returncode == 0
    assert set(np.unique(Image.open(tmp_path / "scene.labels.png"))) == {1, 2}


@pytest.mark.parametrize(
    "options, first, second",
    [
        (
            ("--preset", "shapes"),
            "no --checkpoint: the trained model that comes with the shapes world",
            "thesis protocol, code with 30% maskclip prior, refined, 2 queries",
        ),
        (
            ("--preset=shapes", "--method", "code"),
            "no --checkpoint: the trained model that comes with the shapes world",
            "thesis protocol, code with 30% maskclip prior, refined, 2 queries",
        ),
        (
            ("--preset", "shapes", "--method", "maskclip"),
            None,  # what was asked for needs no announcement
            "training-free protocol, maskclip, refined, 2 queries and 5 of the background",
        ),
        (  # where nothing can be fetched; few words of the background: their embeddings take long
            ("--clip-weights", "none", "--background-words", "sky"),
            "no --checkpoint: NACLIP, without training, on ViT-B-16-quickgelu (random weights, so "
            "the masks mean nothing)",
            "training-free protocol, naclip, refined, 2 queries and 1 of the background",
        ),
    ],
)
def test_without_a_checkpoint(options, first, second, world, tmp_path):
    """As a new user types it."""
    done = segment("scene.png", "bug", "sand", *options, "--out", tmp_path, folder=world)
    assert done.returncode == 0, done.stderr
    *said, line = done.stdout.splitlines()
    assert said == [text for text in (first, second) if text]
    assert line.startswith("scene.png: bug ")
    with Image.open(tmp_path / "scene.labels.png") as stored:
        assert stored.size == (96, 96)


def test_the_first_time_is_announced(monkeypatch, capsys, world):
    def fetched(*_):
        raise UserError("no network")

    monkeypatch.setattr("segment.load_method", fetched)
    monkeypatch.setattr(sys, "argv", ["segment.py", str(world / "scene.png"), "bug"])
    with pytest.raises(UserError, match="no network"):
        main()
    said = capsys.readouterr().out
    assert "(openai's weights, fetched the first time: 600 MB)" in said


def test_names_from_a_file(world, tmp_path):
    """A line a class, the best alternative counts; the first one is what it is called."""
    (tmp_path / "names.txt").write_text("bug, beetle\nsand\n")
    options = ("--names", tmp_path / "names.txt", "--json", tmp_path / "s.json")
    done = segment("scene.png", *options, "--out", tmp_path, *OPTIONS, folder=world)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s.json").read_text())["scene.png"]
    assert list(found) == ["bug", "sand"]
    with Image.open(tmp_path / "scene.labels.png") as stored:
        labels = np.asarray(stored)
    model = load_model(str(world / "code.pt"), CPU)
    segmenter = Segmenter(model.clip, model, ["bug,beetle", "sand"], MaskConfig(**SETTINGS))
    image = Image.open(world / "scene.png").convert("RGB")
    assert np.array_equal(labels, segmenter.label_map(image, background=True).numpy())


def test_words_of_the_background_that_are_asked_for_are_none():
    assert surroundings(["bug", "sand, snow"], "shapes") == "grass,water,brick,wood"
    assert surroundings(["Sky"], "thesis").startswith("wall,tree")  # as CLIP reads
    assert len(surroundings(["dog"], "thesis").split(",")) == 26


def test_how_words_are_looked_for_from_python(world):
    free = load_segmenter(["bug", "sand"], preset="shapes", method="maskclip")
    assert (free.protocol, free.config.method) == ("training-free", "maskclip")
    assert free.config.background_words == "grass,water,brick,wood,snow"
    options = {"method": "maskclip", "background_words": "sky"}
    given = load_segmenter(["bug", "sand"], preset="shapes", **options)
    assert given.config.background_words == "sky"
    shipped = load_segmenter(["bug"], preset="shapes", method=None)
    assert shipped.protocol == "thesis" and shipped.config.checkpoint == str(SHAPES_MODEL)
    trained = load_segmenter(["bug"], preset="shapes", checkpoint=str(world / "code.pt"))
    assert trained.protocol == "thesis" and trained.model is not None
    assert trained.config.background_words is None
    for options, message in (
        ({"preset": "shape"}, "preset 'shape': 'thesis' or 'shapes'"),
        ({"softmax": 3}, "softmax: not one of background, background_words"),
        ({"checkpoint": "x.pt", "softmax_scale": 40}, "softmax_scale: not one of"),
        ({"checkpoint": "x.pt", "method": "naclip"}, "--method naclip and --checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            load_segmenter(["bug"], **options)


def test_from_python_as_the_docs_show_it(world, tmp_path, monkeypatch):
    """Three lines, of a training-free method and of a trained one."""
    page = (ROOT / "docs" / "segmenting.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if not line.startswith(("from", "import"))]) <= 3
    monkeypatch.chdir(tmp_path)
    Image.fromarray(shapes.scene("test", 1).image).save("photo.jpg")
    for more in ({"method": "maskclip"}, {}, {"checkpoint": str(world / "code.pt")}):
        of_shapes = functools.partial(load_segmenter, preset="shapes", **more)
        monkeypatch.setattr("segment.load_segmenter", of_shapes)
        names: dict = {}
        exec(code, names)
        masks, scores = names["masks"], names["scores"]
        assert masks.shape == scores.shape == (2, 96, 96) and masks.dtype == torch.bool
        assert (masks.sum(0) <= 1).all() and 0 <= scores.min() < scores.max() <= 1
        assert (names["segmenter"].model is None) == ("method" in more)


@pytest.mark.parametrize(
    "words, options, message",
    [
        ("bug", {}, "words: a list of at least one"),
        ([], {}, "words: a list of at least one"),
        (["bug"], {"names": "names.txt"}, "no file of names beside it"),
        (["bug"], {"background": 2.0}, "--background 2.0: must be at most 1"),
        (["very " * 90], {"preset": "shapes"}, "90 tokens, a query holds"),
        (["bug"], {"checkpoint": "code.pt"}, "add --preset shapes"),
        ([" "], {"preset": "shapes"}, "an empty name in ''"),
    ],
)
def test_mistakes_from_python(words, options, message, world, monkeypatch):
    monkeypatch.chdir(world)
    with pytest.raises(UserError, match=message):
        load_segmenter(words, **options)


def test_images_of_any_mode_from_python(world):
    image = Image.fromarray(shapes.scene("test", 2).image)
    grey = np.asarray(image.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    segmenter = load_segmenter(["bug", "wheel"], preset="shapes")
    for a, b in zip(segmenter(Image.fromarray(grey)), segmenter(deep)):
        assert torch.equal(a, b)


def test_any_mode_and_orientation_and_a_bad_one_between_them(world, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    image = Image.fromarray(shapes.scene("test", 2).image).resize((90, 60))
    image.convert("L").save(folder / "grey.png")
    image.convert("LA").save(folder / "grey_alpha.png")
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("P").save(folder / "indexed.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    deep.save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    image.save(folder / "turned.jpg", exif=exif)
    image.resize((3000, 40)).save(folder / "wide.webp")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image, and not called one")
    done = segment(folder, "wheel", "--out", tmp_path / "out", *OPTIONS, folder=world)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 2 and "broken.jpg" in lines[0] and "empty.png" in lines[1]
    assert "2 of 10 images could not be read" in done.stderr and "Traceback" not in done.stderr
    sizes = {p.name.split(".")[0]: Image.open(p).size for p in (tmp_path / "out").glob("*labels*")}
    assert sizes.pop("turned") == (60, 90) and sizes.pop("wide") == (3000, 40)
    assert len(sizes) == 6 and set(sizes.values()) == {(90, 60)}
    grey, deep, alpha = (
        np.asarray(Image.open(tmp_path / "out" / f"{name}.labels.png"))
        for name in ("grey", "deep", "grey_alpha")
    )
    assert np.array_equal(grey, deep) and np.array_equal(grey, alpha)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "no image given: name"),
        (("photo", "bug"), "no image given (photo, bug: no such file): name"),
        (("photos/", "bug"), "photos/: no such image or folder"),
        (("scene.png",), "no words to look for"),
        (("missing.png", "bug"), "missing.png: no such image"),
        (("scene.png", " "), "query: an empty name in ''"),
        (("scene.png", "bug", "--caption", "a bug"), "give one of them"),
        (("scene.png", "--caption", " "), "--caption: it is empty"),
        (("scene.png", "--caption", "it is so"), "no nouns found"),
        (("scene.png", "--caption", "a bug " * 40), "80 tokens"),
        (("scene.png", "bug " * 80), "80 tokens"),
        (("scene.png", "bug " * 70), "a query holds 69 at most"),
        (("scene.png", "x" * 2000), "tokens, a query holds"),
        (("scene.png", "--caption", "a bug " + "x" * 2000), "tokens, but CLIP's"),
        (("scene.png", "&nbsp;"), "an empty query"),
        (("scene.png", "bug", "--no-background"), "give one of them"),
        (("scene.png", "bug", "--html", "."), "a folder, not a file"),
        (("scene.png", "bug", "--json", "scene.png/x"), "scene.png/x could not be written"),
        (("scene.png", "bug", "--out", "scene.png"), "could not be written"),
        (("scene.png", "bug", "--preset", "thesis"), "add --preset shapes"),
        (("scene.png", "bug", "--preset", "thesis", "--method", "maskclip"), "add --preset"),
        (("scene.png", "bug", "--preset", "forms"), "'thesis' or 'shapes'"),
        (("scene.png", "--caption", "a bug", "--checkpoint", "baseline.pt"), "no text segmenter"),
        ((".", "--checkpoint", "none.pt", "bug"), "none.pt"),
        (("scene.png", "--names", "twice.txt"), "twice.txt: two lines begin with 'bug'"),
        (("scene.png", "bug", "--names", "none.txt"), "words and --names: give one of them"),
        (("scene.png", "--names", "none.txt"), "--names none.txt: cannot be read"),
        (("scene.png", "bug,"), "an empty name in 'bug,'"),
        (("scene.png", "bug", "--method", "sam"), "--method sam: 'code' or one of"),
        (("nothing", "bug"), "no images (.jpg"),
        (("scene.png", "phto.tiff", "bug"), "phto.tiff: no such image"),
        (("scene.png", "phto.HEIC", "bug"), "phto.HEIC: no such image"),
        (("scene.png", "caf\udce9"), r"'caf\udce9': its bytes are not UTF-8"),
        (("scene.png", "--caption", "a bug \udce9"), "its bytes are not UTF-8"),
        (("scene.png", "nothing", "bug"), "nothing: there is a folder of this name; write ./n"),
        (("scene.png", "a_file", "bug"), "a_file: there is a file of this name"),
        (("scene.png", "bug", "--words", "wheel"), "bug: no such image or folder"),
        (("scene.png", "--words", "bug", "--caption", "a bug"), "give one of them"),
        (("scene.png", "--words", " "), "an empty name in ''"),
        (("scene.png", "bug", "--out", "scene.png/x"), "--out scene.png/x could not be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(world, arguments, message, monkeypatch, mistake):
    (world / "nothing").mkdir(exist_ok=True)
    (world / "a_file").write_text("")
    (world / "twice.txt").write_text("bug, beetle\nsand\nBug, fly\n")
    monkeypatch.chdir(world)
    assert message in mistake(main, *OPTIONS, *arguments)


def test_words_and_images_may_come_in_any_order(world):
    image = str(world / "scene.png")
    assert images_and_words(["a  bug", image, "bug", "A bug"]) == (
        [Path(image)],
        ["a bug", "bug"],
    )
    with pytest.raises(UserError, match="no such image"):
        images_and_words(["other.jpeg"])


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """An empty working directory, and `photo(NAME)` in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photo(path, **options) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(shapes.scene("test", 2).image).save(path, **options)


def segmented(capsys, *arguments, code: int = 0) -> tuple[list[str], str]:
    """The images that a run names as done, and its stderr."""
    with pytest.MonkeyPatch.context() as patch:
        words = ["segment.py", "--preset", "shapes", "--no-pamr", "--out", "out", *arguments]
        patch.setattr(sys, "argv", list(map(str, words)))
        left = 0
        try:
            run_script(main)
        except SystemExit as error:
            left = error.code
    said = capsys.readouterr()
    assert left == code and "Traceback" not in said.err, said.err
    lines = [line for line in said.out.splitlines() if " %" in line]
    return [line.split(": ")[0] for line in lines], said.err


def test_all_images_of_a_folder_that_pillow_reads(photos, capsys):
    readable = ["a.jpg", "b.bmp", "b.tif", "b.TIFF", "b.gif", "c.jfif", "d.jp2", "e.webp", "f.ppm"]
    for name in readable:
        photo(Path("fm", name), **({"format": "JPEG"} if name.endswith("jfif") else {}))
    for name in ("notes.txt", "clip.mpg", "data.h5", "report.pdf", "Thumbs.db", "._a.jpg"):
        Path("fm", name).write_text("no image")
    photo("fm/deep/g.jpg")
    photo("fm/__MACOSX/a.jpg")
    Path("fm/folder.jpg").mkdir()
    done, said = segmented(capsys, "fm", "ball", "--json", "s.json")
    assert done == [f"fm/{name}" for name in sorted(readable)] and said == ""
    assert len(json.loads(Path("s.json").read_text())) == len(readable)
    assert len(list(Path("out").glob("*.labels.png"))) == len(readable)  # b-2, b-3, ...


def test_images_that_pillow_does_not_read_are_named(photos, capsys):
    photo("fm/a.jpg")
    photo("fm/b.heic", format="JPEG")  # named so, but what it holds counts
    for name in ("c.heic", "d.CR2", "e.svg"):
        Path("fm", name).write_bytes(b"\0\0\0\x18ftypheic")
    done, said = segmented(capsys, "fm", "ball", code=2)
    assert done == ["fm/a.jpg", "fm/b.heic"]
    lines = said.splitlines()
    assert len(lines) == 4 and lines[-1] == "3 of 5 images could not be read or written"
    for line, name in zip(lines, ("c.heic", "d.CR2", "e.svg")):
        assert f"fm/{name}: " in line and line.endswith("convert it to PNG")


def test_words_that_are_folders_too(photos, capsys):
    for name in ("a.jpg", "ball/0.jpg", "ball/1.jpg"):
        photo(name)
    words = ["ball", "kite"]
    with pytest.raises(UserError, match=r"ball: there is a folder.* write \./ball if.* --words"):
        images_and_words(["ball/0.jpg", *words])
    assert images_and_words(["ball/0.jpg"], words) == ([Path("ball/0.jpg")], words)
    both = [Path("ball/0.jpg"), Path("ball/1.jpg")]
    assert images_and_words(["ball"], words) == (both, words)
    # The short form, where it has one meaning.
    assert images_and_words(["ball", "kite"]) == (both, ["kite"])
    assert images_and_words(["a.jpg", "./ball", "kite"]) == ([Path("a.jpg"), *both], ["kite"])
    assert images_and_words(["ball/", "a.jpg", "kite"]) == ([*both, Path("a.jpg")], ["kite"])
    assert images_and_words([".", "ball/", "kite"])[0] == [Path("a.jpg"), *both]
    assert images_and_words(["ball/0.jpg", "ball/", "kite"])[0] == both  # each once
    done, _ = segmented(capsys, "ball/0.jpg", "--words", *words, "--json", "s.json")
    assert done == ["ball/0.jpg"]
    assert list(json.loads(Path("s.json").read_text())["ball/0.jpg"]) == words


def test_a_folder_that_cannot_be_read(photos, monkeypatch):
    def denied(_):
        raise PermissionError(13, "Permission denied")

    Path("locked").mkdir()
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(UserError, match=r"locked: this folder cannot be read \(Permission denied"):
        images_and_words(["locked", "ball"])


def test_long_names(photos, capsys):
    long = ["漢" * 83, "漢" * 82 + "字", "x" * 251]
    for name in (*long, "z"):
        photo(Path("lg", f"{name}.jpg"[-255:]))
    done, said = segmented(capsys, "lg", "ball", "--show-scores")
    assert len(done) == 4 and said == ""
    names = sorted(path.name for path in Path("out").glob("*.labels.png"))
    assert len(names) == 4 and "z.labels.png" in names
    for name in long:
        (found,) = [n for n in names if n.endswith(f"-{zlib.crc32(name.encode()):08x}.labels.png")]
        assert name.startswith(found.split("-")[0]) and len(found.encode()) < 215


def test_names_of_outputs_are_distinct():
    taken: set[str] = set()
    for path in ("a/0.jpg", "b/0.jpg", "b/0-2.jpg", "c/0.png", "D/a.jpg", "D/A.jpg"):
        name = name_of_output(Path(path), taken)
        assert name.lower() not in taken  # also where a file system knows one case
        taken.add(name.lower())
    assert taken == {"0", "0-2", "0-2-2", "0-3", "a", "a-2"}
    for _ in range(300):
        name = name_of_output(Path("x" * 250 + ".jpg"), taken)
        assert len(f"{name}.score-255.png.1234567.tmp") < 255
        taken.add(name)


def test_an_image_whose_files_cannot_be_written_is_named(photos, capsys):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        photo(Path("fm", name))
    Path("out/b.labels.png").mkdir(parents=True)
    done, said = segmented(capsys, "fm", "ball", "--json", "s.json", code=2)
    assert done == ["fm/a.jpg", "fm/c.jpg"]
    first, last = said.splitlines()
    assert "fm/b.jpg: out/b.labels.png: a folder, not a file to write" in first
    assert last == "1 of 3 images could not be read or written"
    assert list(json.loads(Path("s.json").read_text())) == done


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="such names cannot be there")
def test_names_that_are_not_utf8(photos, monkeypatch, capsys):
    name = os.fsdecode(b"caf\xe9 0")
    photo(Path("latin", f"{name}.jpg"))
    Path("latin", f"{name} 1.png").write_text("no image")
    options = ("ball", "--out", "out", "--json", "s.json", "--html", "page.html")
    strict = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", strict)
        patch.setattr(
            sys, "argv", ["segment.py", "--preset", "shapes", "--no-pamr", "latin", *options]
        )
        with pytest.raises(SystemExit) as left:
            run_script(main)
    strict.flush()
    said = strict.buffer.getvalue().decode()
    assert left.value.code == 2 and r"latin/caf\udce9 0.jpg: ball" in said
    assert r"caf\udce9 0 1.png" in capsys.readouterr().err
    assert list(json.loads(Path("s.json").read_text())) == [f"latin/{name}.jpg"]
    assert r"caf\udce9 0" in Path("page.html").read_text(encoding="utf-8")
    assert Path("out", f"{name}.labels.png").is_file()


def test_word_masks_are_eq_3_3_for_every_word(world):
    model = load_model(str(world / "code.pt"), CPU)
    caption = "a golden bug, big and unspeakablyxyz near a kite"  # one word of several tokens
    masks = word_masks(model, caption, ["bug", "kite"])
    assert masks.shape == (2, len(caption.split()))
    assert (masks > 0).all() and (masks.sum(0) < 1).all()
    tokens = tokenize([caption])
    hidden = text_hidden(model.clip, model.clip.token_embedding(tokens))
    x = model.text_segmenter(hidden, tokens.argmax(-1))[0].detach().numpy()
    n = model.noun_embedding(noun_prompts(["bug", "kite"], 4)).detach().numpy()
    w, b = model.text_segmenter.word_scale.item(), model.text_segmenter.word_bias.item()
    every = np.exp(w * x @ n.T + b)
    every = every / (1 + every.sum(1, keepdims=True))
    np.testing.assert_allclose(masks[:, 0], every[1], atol=1e-5)  # "a"
    np.testing.assert_allclose(masks[:, 2], every[3:5].mean(0), atol=1e-5)  # "bug" and ","
    long = len(tokens_of("unspeakablyxyz"))
    assert long > 1
    np.testing.assert_allclose(masks[:, 5], every[7 : 7 + long].mean(0), atol=1e-5)


def test_score_of_an_absent_word():
    labels = np.array([[0, 1], [1, 1]])
    result = Result("x", Image.new("RGB", (2, 2)), np.array([[0.1, 0.5], [0.6, 0.7]]), labels)
    found = measure_shares(result, ["here", "absent"])
    assert found["here"] == {"share": 0.75, "score": pytest.approx(0.6)}
    assert found["absent"] == {"share": 0.0, "score": None}


def test_heat_goes_from_dark_to_bright():
    image = np.asarray(heat(Image.new("RGB", (2, 1)), np.array([[0.0, 1.0]])), int)
    assert image[0, 0].sum() < 100 < 300 < image[0, 1].sum()


def test_large_images_are_shown_smaller_on_the_page():
    index = np.zeros((30, 4000), np.int64)
    index[:, 2000:] = 1
    best = np.full((30, 4000), 0.6)
    item = page_item("x", Image.new("RGB", (4000, 30)), best, index, ["a", "b"], 0.4)
    assert (item["width"], item["height"]) == (1024, 8)
