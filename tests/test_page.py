"""The page of segment.py --html, in headless Chromium."""

import numpy as np
import pytest
from conftest import CPU, listened
from PIL import Image
from runs import OPTIONS, SETTINGS, segment

from checkpoint import load_model
from config import MaskConfig
from evaluate import Segmenter
from segment import word_masks

pytestmark = pytest.mark.slow


CAPTION = "a bug & a <b>wheel</b> </script><script>document.title='taken'</script> on sand"


@pytest.fixture(scope="module")
def written(world):
    """The page of a scene and a caption full of markup."""
    done = segment(
        *("scene.png", "--caption", "\ufeff " + CAPTION, "--html", "page.html", "--out", "page"),
        *OPTIONS,
        folder=world,
    )
    assert done.returncode == 0, done.stderr
    return world / "page.html"


@pytest.fixture
def page(written, browser):
    """It, opened anew; what it says and asks for is kept."""
    page = listened(browser.new_page())
    page.goto(written.as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=30_000)
    yield page
    page.close()


def shown_on(page) -> np.ndarray:
    """Where the overlay shows a region: (H, W) bool."""
    alphas = page.evaluate(
        """() => { const c = document.querySelector(".image canvas");
        const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        return Array.from(d).filter((_, i) => i % 4 === 3); }"""
    )
    return np.array(alphas).reshape(96, 96) == 153


def test_hovering_and_focusing_a_noun_shows_its_region(page, world):
    labels = np.asarray(Image.open(world / "page" / "scene.labels.png"))
    buttons = page.locator("button")
    assert buttons.all_inner_texts() == ["bug", "wheel", "sand"]
    assert np.array_equal(shown_on(page), labels > 0)
    for i in range(3):
        buttons.nth(i).hover()
        assert np.array_equal(shown_on(page), labels == i + 1) and (labels == i + 1).any()
        share = 100 * (labels == i + 1).mean()
        assert f"{share:.1f} % of the image" in page.locator("output").inner_text()
    page.mouse.move(0, 0)
    assert np.array_equal(shown_on(page), labels > 0)
    page.keyboard.press("Tab")  # the first noun
    page.keyboard.press("Tab")
    assert np.array_equal(shown_on(page), labels == 2)
    assert buttons.nth(1).get_attribute("aria-pressed") == "true"
    page.evaluate("document.activeElement.blur()")


def test_hovering_the_image_shows_the_region_under_the_pointer(page, world):
    labels = np.asarray(Image.open(world / "page" / "scene.labels.png"))
    y, x = np.argwhere(labels == 2)[5]
    box = page.locator(".image canvas").bounding_box()
    page.mouse.move(
        box["x"] + (x + 0.5) * box["width"] / 96, box["y"] + (y + 0.5) * box["width"] / 96
    )
    assert np.array_equal(shown_on(page), labels == 2)
    page.mouse.move(0, 0)


def test_the_slider_moves_the_threshold(page, world):
    model = load_model(str(world / "code.pt"), CPU)
    settings = MaskConfig(**SETTINGS | {"background": 0.9})
    segmenter = Segmenter(model.clip, model, ["bug", "wheel", "sand"], settings)
    image = Image.open(world / "scene.png").convert("RGB")
    want = segmenter.label_map(image, background=True).numpy() > 0
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
