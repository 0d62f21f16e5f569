"""segment.py: any picture, any words; the caption beside it; the page in a real browser."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint import load_model, model_content, save_atomically
from clip import load_clip, noun_prompts, text_hidden, tokenize
from config import MASK_PRESETS, TRAIN_PRESETS, MaskConfig, ModelConfig, UserError
from datasets import shapes
from draw import heat
from evaluate import Segmenter
from model import CoDe
from segment import (
    Result,
    SegmentConfig,
    main,
    page_item,
    pictures_and_words,
    score,
    tokens_of,
    word_masks,
)

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def segment(*arguments, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "segment.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def model_config(**changes) -> ModelConfig:
    names = ModelConfig.__dataclass_fields__
    preset = {k: v for k, v in TRAIN_PRESETS["shapes"].items() if k in names}
    return ModelConfig(**preset | changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with an untrained checkpoint and a scene: regions are MaskCLIP's, words random."""
    folder = tmp_path_factory.mktemp("segment")
    torch.manual_seed(0)
    for name, changes in (("code.pt", {}), ("baseline.pt", {"co_decomposition": False})):
        model = CoDe(load_clip("shapes"), model_config(**changes))
        save_atomically(model_content(model), folder / name)
    Image.fromarray(shapes.scene("test", 1).image).save(folder / "scene.png")
    return folder


# Without training the masks are high: a threshold that leaves something of every word.
SETTINGS = MASK_PRESETS["shapes"] | {"background": 0.7}
OPTIONS = ("--preset", "shapes", "--checkpoint", "code.pt", "--background", "0.7")


def test_words_in_a_picture(world):
    done = segment(
        *("scene.png", "bug", "wheel", "--json", "s.json", "--show-scores", *OPTIONS),
        folder=world,
    )
    assert done.returncode == 0, done.stderr
    out = world / "out" / "segment"
    with Image.open(out / "scene.labels.png") as picture:
        assert picture.mode == "P" and picture.size == (64, 64)
        labels = np.asarray(picture)
    model = load_model(str(world / "code.pt"), CPU)
    segmenter = Segmenter(model.clip, model, ["bug", "wheel"], MaskConfig(**SETTINGS))
    image = Image.open(world / "scene.png").convert("RGB")
    want = segmenter.label_map(image, CPU, background=True).numpy()
    assert np.array_equal(labels, want) and set(np.unique(want)) == {0, 1, 2}
    found = json.loads((world / "s.json").read_text())["scene.png"]
    assert found["bug"]["share"] == pytest.approx((want == 1).mean())
    assert 0.7 < found["bug"]["score"] < 1
    for name in ("scene.overlay.png", "scene.score-1.png", "scene.score-2.png"):
        assert Image.open(out / name).width >= 64
    assert f"bug {100 * found['bug']['share']:.1f} %" in done.stdout


def test_without_background_every_pixel_has_a_word(world, tmp_path):
    arguments = ("scene.png", "bug", "sand", "--no-background", "--out", tmp_path, *OPTIONS[:-2])
    assert segment(*arguments, folder=world).returncode == 0
    assert set(np.unique(Image.open(tmp_path / "scene.labels.png"))) == {1, 2}


def test_any_mode_and_orientation_and_a_bad_one_between_them(world, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    image = Image.fromarray(shapes.scene("test", 2).image).resize((90, 60))
    image.convert("L").save(pictures / "grey.png")
    image.convert("LA").save(pictures / "grey_alpha.png")
    image.convert("RGBA").save(pictures / "alpha.png")
    image.convert("P").save(pictures / "indexed.png")
    image.convert("CMYK").save(pictures / "cmyk.jpg")
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    deep.save(pictures / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    image.save(pictures / "turned.jpg", exif=exif)
    image.resize((3000, 40)).save(pictures / "wide.webp")
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "notes.txt").write_text("no picture, and not called one")
    done = segment(pictures, "wheel", "--out", tmp_path / "out", *OPTIONS, folder=world)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 2 and "broken.jpg" in lines[0] and "empty.png" in lines[1]
    assert "2 of 10 pictures could not be read" in done.stderr and "Traceback" not in done.stderr
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
        ((), "no picture given"),
        (("scene.png",), "no words to look for"),
        (("missing.png", "bug"), "missing.png: no such picture"),
        (("scene.png", " "), "an empty query"),
        (("scene.png", "bug", "--caption", "a bug"), "not both"),
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
        (("nothing", "bug"), "no pictures (.jpg"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(world, arguments, message, monkeypatch, mistake):
    (world / "nothing").mkdir(exist_ok=True)
    monkeypatch.chdir(world)
    assert message in mistake(main, *OPTIONS, *arguments)


def test_words_and_pictures_may_come_in_any_order(world):
    picture = str(world / "scene.png")
    assert pictures_and_words(["a  bug", picture, "bug", "a bug"]) == (
        [Path(picture)],
        ["a bug", "bug"],
    )
    with pytest.raises(UserError, match="no such picture"):
        pictures_and_words(["other.jpeg"])


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
    found = score(result, ["here", "absent"])
    assert found["here"] == {"share": 0.75, "score": pytest.approx(0.6)}
    assert found["absent"] == {"share": 0.0, "score": None}


def test_heat_goes_from_dark_to_bright():
    picture = np.asarray(heat(Image.new("RGB", (2, 1)), np.array([[0.0, 1.0]])), int)
    assert picture[0, 0].sum() < 100 < 300 < picture[0, 1].sum()


def test_large_pictures_are_shown_smaller_on_the_page():
    index = np.zeros((30, 4000), np.int64)
    index[:, 2000:] = 1
    result = Result("x", Image.new("RGB", (4000, 30)), np.full((30, 4000), 0.6), index + 1)
    item = page_item(result, index, ["a", "b"], SegmentConfig(), 0.4, None)
    assert (item["width"], item["height"]) == (1024, 8)


# --- the page, in headless Chromium ---------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu", *quiet]
        )
        yield browser
        browser.close()


CAPTION = "a bug & a <b>wheel</b> </script><script>document.title='taken'</script> on sand"


@pytest.fixture(scope="module")
def page(world, browser):
    """The page of a scene and a caption full of markup; what it says and asks for is kept."""
    done = segment(
        *(
            "scene.png",
            "--caption",
            "\ufeff " + CAPTION,
            "--html",
            "page.html",
            "--out",
            "page",
            *OPTIONS,
        ),
        folder=world,
    )
    assert done.returncode == 0, done.stderr
    page = browser.new_page()
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto((world / "page.html").as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=30_000)
    return page


def shown_on(page) -> np.ndarray:
    """Where the overlay shows a region: (H, W) bool."""
    alphas = page.evaluate(
        """() => { const c = document.querySelector(".picture canvas");
        const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        return Array.from(d).filter((_, i) => i % 4 === 3); }"""
    )
    return np.array(alphas).reshape(64, 64) == 153


def test_hovering_and_focusing_a_noun_shows_its_region(page, world):
    labels = np.asarray(Image.open(world / "page" / "scene.labels.png"))
    buttons = page.locator("button")
    assert buttons.all_inner_texts() == ["bug", "wheel", "sand"]
    assert np.array_equal(shown_on(page), labels > 0)
    for i in range(3):
        buttons.nth(i).hover()
        assert np.array_equal(shown_on(page), labels == i + 1) and (labels == i + 1).any()
        share = 100 * (labels == i + 1).mean()
        assert f"{share:.1f} % of the picture" in page.locator("output").inner_text()
    page.mouse.move(0, 0)
    assert np.array_equal(shown_on(page), labels > 0)
    page.keyboard.press("Tab")  # the first noun
    page.keyboard.press("Tab")
    assert np.array_equal(shown_on(page), labels == 2)
    assert buttons.nth(1).get_attribute("aria-pressed") == "true"
    page.evaluate("document.activeElement.blur()")


def test_hovering_the_picture_shows_the_region_under_the_pointer(page, world):
    labels = np.asarray(Image.open(world / "page" / "scene.labels.png"))
    y, x = np.argwhere(labels == 2)[5]
    box = page.locator(".picture canvas").bounding_box()
    page.mouse.move(
        box["x"] + (x + 0.5) * box["width"] / 64, box["y"] + (y + 0.5) * box["width"] / 64
    )
    assert np.array_equal(shown_on(page), labels == 2)
    page.mouse.move(0, 0)


def test_the_slider_moves_the_threshold(page, world):
    model = load_model(str(world / "code.pt"), CPU)
    settings = MaskConfig(**SETTINGS | {"background": 0.9})
    segmenter = Segmenter(model.clip, model, ["bug", "wheel", "sand"], settings)
    image = Image.open(world / "scene.png").convert("RGB")
    want = segmenter.label_map(image, CPU, background=True).numpy() > 0
    slider = page.locator("input[type=range]")
    before = slider.input_value()
    slider.fill("0.9")
    assert np.array_equal(shown_on(page), want) and not want.all()
    slider.fill("0")
    assert shown_on(page).all()  # no background at all
    slider.fill(before)


def test_words_are_shaded_by_the_shown_nouns_mask(page, world):
    model = load_model(str(world / "code.pt"), CPU)
    masks = word_masks(model, CAPTION, ["bug", "wheel", "sand"])
    page.locator("button").nth(2).hover()
    spans = page.locator(".caption span")
    assert spans.all_inner_texts() == CAPTION.split()
    shades = spans.evaluate_all("spans => spans.map((s) => getComputedStyle(s).backgroundColor)")
    for shade, mask in zip(shades, masks[2]):
        alpha = float(shade.split(",")[-1].strip(" )"))
        assert alpha == pytest.approx(0.75 * mask, abs=5e-3)
    page.mouse.move(0, 0)


def test_nothing_is_said_asked_for_or_run(page, world):
    assert page.said == []
    outside = [url for url in page.asked if not url.startswith("data:")]
    assert outside == [(world / "page.html").as_uri()]
    assert page.title() == "Regions and words"
    assert page.locator(".caption b").count() == 0


def test_on_a_phone_in_the_dark(browser, world, page):
    phone = browser.new_page(
        viewport={"width": 360, "height": 700}, color_scheme="dark", has_touch=True
    )
    phone.goto((world / "page.html").as_uri())
    phone.wait_for_selector("body[data-ready=yes]")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    assert phone.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(24, 25, 27)"
    labels = np.asarray(Image.open(world / "page" / "scene.labels.png"))
    phone.locator("button").nth(0).tap()
    assert np.array_equal(shown_on(phone), labels == 1)
    phone.close()
