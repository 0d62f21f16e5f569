"""segment.py --captions: figure 4.2 of several pairs."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU
from PIL import Image
from runs import OPTIONS, SETTINGS

from checkpoint import load_model, model_content, save_checkpoint
from clip import noun_prompts, text_hidden, tokenize
from config import MaskConfig, run_script
from datasets import shapes
from evaluate import Segmenter
from segment import likeliest_nouns, main, noun_in, word_masks
from support.draw import PAPER, overlay, palette

pytestmark = pytest.mark.slow

GAP, SIDE = 16, 360  # of the sheet
CAPTION = "a bug near a kite"
LONG = "a bug, a kite and a ball, with a house on the grass, which is what is here " * 2
PAIRS = {
    "0.png": (CAPTION, ["bug", "kite"]),
    "1.png": (LONG, ["bug", "kite", "ball", "house", "grass"]),
    "wide.png": ("Wheel! On SAND", ["wheel", "sand"]),
    "tall.png": ("a star.", ["star"]),
    "4.png": ("the box on the snow", ["box", "snow"]),
}


@pytest.fixture(scope="module")
def pairs(world) -> Path:
    """Images in a folder of `world`, and half.pt, where "none" is likeliest for some words."""
    folder = world / "pairs"
    folder.mkdir()
    for i, name in enumerate(PAIRS):
        image = Image.fromarray(shapes.scene("test", i).image)
        size = {"wide.png": (400, 60), "tall.png": (50, 160)}.get(name, image.size)
        image.resize(size).save(folder / name)
    model = load_model(str(world / "code.pt"), CPU)
    logits = np.sort(naive_logits(model, CAPTION, ["bug", "kite"]).max(1))
    with torch.no_grad():  # between two of the five words
        model.text_segmenter.word_bias.fill_(-float(logits[1:3].mean()))
    save_checkpoint(model_content(model), world / "half.pt")
    return folder


def naive_logits(model, caption: str, nouns: list[str]) -> np.ndarray:
    """Eq. 3.2 of a caption whose words are a token each: (words, J)."""
    tokens = tokenize([caption])
    hidden = text_hidden(model.clip, model.clip.token_embedding(tokens))
    x = model.text_segmenter(hidden, tokens.argmax(-1))[0].detach().numpy()
    n = model.noun_embedding(noun_prompts(nouns, len(model.context))).detach().numpy()
    w, b = model.text_segmenter.word_scale.item(), model.text_segmenter.word_bias.item()
    assert len(x) == len(caption.split()) + 2
    return np.array([[w * float(word @ noun) + b for noun in n] for word in x[1:-1]])


def naive_nouns(logits: np.ndarray) -> list[int]:
    """The arg-max of Eq. 3.3 for every word, -1 for "none"."""
    found = []
    for word in logits:
        total = 1 + sum(np.exp(value) for value in word)
        best, likeliest = 1 / total, -1
        for j, value in enumerate(word):
            if np.exp(value) / total > best:
                best, likeliest = np.exp(value) / total, j
        found.append(likeliest)
    return found


def run(world: Path, lines: list[str], out: Path, *more, code: int = 0) -> None:
    """--captions on these lines, from another folder."""
    (world / "pairs" / "pairs.txt").write_bytes("\n".join(lines).encode())
    arguments = ["--captions", world / "pairs" / "pairs.txt", "--out", out, *OPTIONS]
    arguments += ["--checkpoint", world / "half.pt", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["segment.py", *map(str, arguments)])
        left = 0
        try:
            run_script(main)
        except SystemExit as error:
            left = error.code
    assert left == code


def place_of(image: np.ndarray, sheet: np.ndarray, x: int) -> int:
    """The row of the sheet where an image lies, whose left edge is at x."""
    height, width = image.shape[:2]
    rows = range(len(sheet) - height + 1)
    (found,) = [
        y
        for y in rows
        if np.array_equal(sheet[y, x : x + width], image[0])  # fast, and seldom true
        and np.array_equal(sheet[y : y + height, x : x + width], image)
    ]
    return found


def runs_of_colour(row: np.ndarray) -> list[tuple]:
    """The colours in a row of pixels from left to right, but for the paper's."""
    colours = [tuple(pixel) for pixel in row.tolist()]
    starts = [c for c, before in zip(colours, [PAPER, *colours]) if c != before]
    return [colour for colour in starts if colour != PAPER]


def test_the_sheet_holds_every_pair(world, pairs, tmp_path, capsys):
    run(world, [f"{name}\t{caption}" for name, (caption, _) in PAIRS.items()], tmp_path)
    said = capsys.readouterr()
    assert said.err == "" and f"{tmp_path / 'captions.png'}: 5 pairs" in said.out
    assert "the nouns of 5 captions" in said.out
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"captions.png", *(name.replace(".", ".labels.") for name in PAIRS)}
    sheet = np.asarray(Image.open(tmp_path / "captions.png"))
    assert sheet.shape[1] == GAP + 4 * (SIDE + GAP)
    model = load_model(str(world / "half.pt"), CPU)
    for i, (name, (caption, nouns)) in enumerate(PAIRS.items()):
        image = Image.open(pairs / name).convert("RGB")
        segmenter = Segmenter(model.clip, model, nouns, MaskConfig(**SETTINGS))
        want = segmenter.label_map(image, background=True).numpy()
        stored = Image.open(tmp_path / name.replace(".", ".labels."))
        assert stored.mode == "P" and np.array_equal(np.asarray(stored), want)

        size = [round(SIDE * side / max(image.size)) for side in image.size]
        shown = image.resize(size, Image.Resampling.LANCZOS)
        labels = Image.fromarray(want.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        regions = overlay(shown, np.asarray(labels, int) - 1, palette(len(nouns)))
        left = GAP + i % 4 * (SIDE + GAP)
        x = left + (SIDE - size[0]) // 2
        top, below = (place_of(np.asarray(part), sheet, x) for part in (shown, regions))
        assert below - top == SIDE + GAP  # the band's highest image is a square
        # Above are the nouns underlined, below are word segments in the same colours.
        middle = top + size[1] // 2
        bands = np.nonzero((sheet[:, GAP] == (200, 200, 204)).all(-1))[0]
        start, end = (0, bands[0]) if i < 4 else (bands[-1] + 1, len(sheet))
        text = sheet[start : middle - SIDE // 2, left : left + SIDE]
        segments = sheet[middle + SIDE + GAP + SIDE // 2 : end, left : left + SIDE]
        for colour in palette(len(nouns)):
            assert (text == colour).all(-1).sum() > 20, (name, colour)
        masks = word_masks(model, caption, nouns)
        for j, colour in enumerate(palette(len(nouns))):
            assert (segments == colour).all(-1).any() == (j in likeliest_nouns(masks))
        assert (segments != PAPER).any()


def test_words_stand_on_the_colour_of_the_likeliest_noun(world, pairs, tmp_path):
    run(world, [f"0.png\t{CAPTION}"], tmp_path, "--json", tmp_path / "s.json")
    model = load_model(str(world / "half.pt"), CPU)
    want = naive_nouns(naive_logits(model, CAPTION, ["bug", "kite"]))
    assert -1 in want and max(want) >= 0
    sheet = np.asarray(Image.open(tmp_path / "captions.png"))
    assert sheet.shape[1] == SIDE + 2 * GAP
    end_of_regions = max(np.nonzero((sheet[:, GAP] != PAPER).any(-1))[0])
    below = sheet[end_of_regions + 1 :, GAP : GAP + SIDE]
    colours = palette(2)
    patched = [colours[i] for i in want if i >= 0]
    rows = [runs_of_colour(row) for row in below]
    assert patched in rows  # a row of the patches above all letters
    entry = json.loads((tmp_path / "s.json").read_text())[0]
    assert entry["image"] == str(pairs / "0.png") and entry["caption"] == CAPTION
    labels = np.asarray(Image.open(tmp_path / "0.labels.png"))
    for j, noun in enumerate(["bug", "kite"]):
        words = [word for word, i in zip(CAPTION.split(), want) if i == j]
        assert entry["nouns"][noun]["words"] == words
        assert entry["nouns"][noun]["share"] == pytest.approx((labels == j + 1).mean())


def test_likeliest_nouns_are_the_arg_max_with_none():
    logits = np.random.default_rng(0).normal(0, 2, (50, 3))
    masks = np.exp(logits) / (1 + np.exp(logits).sum(1, keepdims=True))
    found = likeliest_nouns(masks.T).tolist()
    assert found == naive_nouns(logits) and set(found) == {-1, 0, 1, 2}


@pytest.mark.parametrize(
    "word, noun",
    [
        ("dog", "dog"),
        ("Dog's,", "dog"),
        ('("dog")', "dog"),
        ("DOG.", "dog"),
        ("dogs", None),
        ("hot-dog", None),
        ("&amp;", None),
        ("cat!", "cat"),
        ("a", None),
    ],
)
def test_the_noun_in_a_word(word, noun):
    assert noun_in(word, ["dog", "cat"]) == noun


def test_lines_as_editors_write_them(world, pairs, tmp_path):
    """A BOM, line ends of Windows, blank lines, spaces, an absolute path, a tab in the caption."""
    lines = ["\ufeff0.png\ta  bug\r", "\r", f" {pairs / '1.png'} \t the\tkite \r", "  \t", ""]
    run(world, lines, tmp_path, "--json", tmp_path / "s.json", "--show-scores")
    found = json.loads((tmp_path / "s.json").read_text())
    assert [Path(one["image"]) for one in found] == [pairs / "0.png", pairs / "1.png"]
    assert [one["caption"] for one in found] == ["a bug", "the kite"]
    assert (tmp_path / "0.score-1.png").exists() and (tmp_path / "1.score-1.png").exists()


def test_an_image_in_two_pairs_has_nouns_of_its_own_in_each(world, pairs, tmp_path):
    page = tmp_path / "page.html"
    more = ("--json", tmp_path / "s.json", "--html", page, "--background", "0")
    run(world, ["0.png\ta bug and a kite", "0.png\tthe ball"], tmp_path, *more)
    found = json.loads((tmp_path / "s.json").read_text())
    assert [list(one["nouns"]) for one in found] == [["bug", "kite"], ["ball"]]
    assert found[1]["nouns"]["ball"]["share"] == 1
    assert set(np.unique(Image.open(tmp_path / "0-2.labels.png"))) == {1}
    (data,) = re.findall(r"const DATA = (\[.*\]);", page.read_text("utf-8"))
    items = json.loads(data)
    assert [item["name"] for item in items] == ["0", "0-2"]
    assert [[q["name"] for q in item["queries"]] for item in items] == [["bug", "kite"], ["ball"]]
    assert [item["caption"] for item in items] == ["a bug and a kite", "the ball"]
    assert [np.shape(item["word_masks"]) for item in items] == [(2, 5), (1, 2)]


def test_a_page_of_pairs_shows_each_ones_nouns(world, pairs, tmp_path, browser):
    lines = ["0.png\ta bug and a kite", "1.png\tthe ball"]
    run(world, lines, tmp_path, "--html", tmp_path / "page.html")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=30_000)
    sections = page.locator("section")
    for i, nouns in enumerate((["bug", "kite"], ["ball"])):
        buttons = sections.nth(i).locator("button")
        assert buttons.all_inner_texts() == nouns
        buttons.last.hover()
        labels = np.asarray(Image.open(tmp_path / f"{i}.labels.png"))
        share = f"{nouns[-1]}: {100 * (labels == len(nouns)).mean():.1f} % of the image"
        assert share in sections.nth(i).locator("output").inner_text()
    page.close()


def test_an_image_that_cannot_be_decoded_is_left_out(world, pairs, tmp_path, capsys):
    (pairs / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    lines = ["0.png\ta bug", "broken.jpg\ta kite", "1.png\ta ball"]
    run(world, lines, tmp_path, "--json", tmp_path / "s.json", code=2)
    first, last = capsys.readouterr().err.splitlines()
    assert f"{pairs / 'broken.jpg'}: " in first
    assert last == "1 of 3 images could not be read or written"
    assert Image.open(tmp_path / "captions.png").width == GAP + 2 * (SIDE + GAP)
    assert len(json.loads((tmp_path / "s.json").read_text())) == 2


def test_no_sheet_of_nothing(world, pairs, tmp_path):
    (pairs / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    run(world, ["broken.jpg\ta kite"], tmp_path, code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "--captions pairs.txt: it is empty"),
        (b"\n  \n", "--captions pairs.txt: it is empty"),
        (b"scene.png\ta bug \xe9", "--captions pairs.txt: cannot be read (not UTF-8)"),
        (b"scene.png\ta bug\n\nscene.png a bug", "line 3: no tab between an image and its caption"),
        (b"scene.png\ta bug\n\ta bug", "line 2: no image before the tab"),
        (b"scene.png\t ", "line 1, caption: it is empty"),
        (b"none.png\ta bug", "line 1: none.png: no such image"),
        (b"scene.png\ta bug\nfolder\ta bug", "line 2: folder: no such image"),
        (b"scene.png\ta bug\nscene.png\tit is so", "line 2: no nouns found in 'it is so'"),
        (b"scene.png\t" + b"a bug " * 40, "line 1, caption: 80 tokens, but CLIP's"),
    ],
)
def test_mistakes_in_the_file(content, message, world, monkeypatch, mistake):
    monkeypatch.chdir(world)
    monkeypatch.setattr("segment.load_method", lambda *_: pytest.fail("it was loaded"))
    (world / "folder").mkdir(exist_ok=True)
    (world / "pairs.txt").write_bytes(content)
    assert message in mistake(main, *OPTIONS, "--captions", "pairs.txt")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--captions", "none.txt"), "--captions none.txt: cannot be read (no such file)"),
        (("--captions", "folder"), "--captions folder: cannot be read (Is a directory)"),
        (("scene.png", "--captions", "pairs.txt"), "--captions and scene.png: give one of them"),
        (("bug", "--captions", "pairs.txt"), "--captions and bug: give one of them"),
        (("--captions", "pairs.txt", "--words", "bug"), "--captions and --words: give one"),
        (("--captions", "pairs.txt", "--names", "x.txt"), "--captions and --names: give one"),
        (("--captions", "pairs.txt", "--caption", "a"), "--captions and --caption: give one"),
        (("--captions", "pairs.txt", "--checkpoint", "baseline.pt"), "no text segmenter"),
        (("--captions", "pairs.txt", "--method", "maskclip"), "no text segmenter"),
        (("--captions", "pairs.txt", "--out", "taken"), "captions.png: a folder, not a file"),
        (("--captions", "pairs.txt", "--out", "scene.png"), "could not be written"),
        (("--captions", "pairs.txt", "--no-background"), "give one of them"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, world, monkeypatch, mistake):
    monkeypatch.chdir(world)
    monkeypatch.setattr(Segmenter, "scores", lambda *_: pytest.fail("an image was segmented"))
    (world / "folder").mkdir(exist_ok=True)
    (world / "taken" / "captions.png").mkdir(parents=True, exist_ok=True)
    (world / "pairs.txt").write_text("scene.png\ta bug")
    assert message in mistake(main, *OPTIONS, *arguments)


def test_a_checkpoint_is_needed(world, monkeypatch, mistake):
    """And nothing is fetched before."""
    monkeypatch.chdir(world)
    monkeypatch.setattr("segment.load_method", lambda *_: pytest.fail("it was loaded"))
    (world / "pairs.txt").write_text("scene.png\ta bug")
    for more in (("--captions", "pairs.txt"), ("scene.png", "--caption", "a bug")):
        message = mistake(main, "--preset", "shapes", "--method", "maskclip", *more)
        assert f"{more[-2]}: this method has no text segmenter" in message
        assert "a --checkpoint of CoDe" in message


def test_a_noun_of_too_many_tokens(world, monkeypatch, mistake):
    """The caption fits, its noun behind the learned context or in a template does not."""
    monkeypatch.chdir(world)
    monkeypatch.setattr("segment.tagger_of", lambda _: lambda text: [(text, "NN")])
    (world / "pairs.txt").write_text("scene.png\ta bug\nscene.png\t" + "bug " * 72)
    message = mistake(main, *OPTIONS, "--captions", "pairs.txt")
    assert "--captions pairs.txt, line 2: " in message and "a query holds" in message
