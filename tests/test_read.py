"""docs/read.html: its code is the sources', its values are the code's, and it can be read."""

import html
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, listened, model_config
from runs import train

from checkpoints.ours import model_content, read_checkpoint, save_checkpoint
from clip import embed_texts, load_clip
from config import TRAIN_PRESETS, LossConfig, TrainConfig
from experiments.read import CODE, TEMPLATE, ReadConfig, fill, kept_figures, new_figures
from experiments.read_pair import first_model, small_batch
from experiments.read_results import TERMS
from model import CoDe
from train import logistic_noise

PATH = ROOT / "docs" / "read.html"
PAGE = PATH.read_text()
EQUATIONS = [f"eq-3-{i}" for i in range(1, 9)]
REBUILD = "stale: `python -m experiments.read --keep-figures` takes text and code anew"


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="([\w-]+)"(.*?)</section>', page, re.DOTALL))


def stale(page: str) -> list[str]:
    """The objects whose code on a page is not what stands at that place of that file."""
    blocks = re.findall(
        r'<details class="code" data-object="(.*?)" data-file="(.*?)" data-line="(\d+)".*?'
        r"<pre.*?><code>(.*?)</code></pre>",
        page,
        re.DOTALL,
    )
    assert len(blocks) == sum(map(len, CODE.values()))
    wrong = []
    for name, file, line, code in blocks:
        shown = html.unescape(re.sub(r"<.*?>", "", code)).splitlines()
        start = int(line) - 1
        there = (ROOT / file).read_text().splitlines()[start : start + len(shown)]
        named = re.search(rf"\b(def|class) {name.rsplit('.')[-1]}\b", "\n".join(shown))
        if shown != there or not named:
            wrong.append(name)
    return wrong


def numbers(page: str, name: str) -> list[float]:
    """All values of a name on a page, in the order of the snapshots."""
    return [float(v) for v in re.findall(rf'data-name="{name}" value="(.*?)"', page)]


# --- the committed page ---------------------------------------------------------------------------


def test_every_equation_has_its_section_mathml_code_and_an_output():
    found = sections(PAGE)
    for anchor in EQUATIONS:
        text, number = found[anchor], anchor[3:].replace("-", ".")
        assert re.search(r'<math display="block">.*</math>', text)
        assert f'href="#{anchor}" aria-label="Equation {number}">({number})</a>' in text
        code = re.search(r'<details class="code".*?</details>', text, re.DOTALL)[0]
        assert f"Eq. {number}" in re.sub("<.*?>", "", code), "its first function does it"
        assert '<span class="line eq">' in text
        output = re.search(r"<figure>.*?</figure>", text, re.DOTALL)[0]
        assert all(f'class="at at-{i}"' in output for i in range(5)), "it changes with the steps"
    order = [name for name in found if name in EQUATIONS]
    assert order == EQUATIONS


def test_the_code_on_the_page_is_the_sources():
    assert stale(PAGE) == [], REBUILD
    assert fill(TEMPLATE.read_text(), kept_figures(PATH)).rstrip("\n") == PAGE.rstrip("\n"), REBUILD


def test_a_stale_page_fails():
    assert stale(PAGE.replace('nf">info_nce<', 'nf">infonce<')) == ["losses.info_nce"]
    moved = re.sub(
        r'(data-object="model.word_mask".*?data-line=")(\d+)', r"\g<1>1\2", PAGE, count=1
    )
    assert stale(moved) == ["model.word_mask"]


def test_it_is_one_small_file_that_asks_for_nothing():
    assert len(PAGE.encode()) <= 2e6
    assert not re.search(
        r'(src|srcset)="(?!data:)|url\(|@import|<link(?! rel="icon")|fetch\(', PAGE
    )
    assert "default-src 'none'" in PAGE


def test_images_speak():
    for image in re.findall(r"<img [^>]*>", PAGE):
        assert re.search(r'alt="[^"]', image) or "hidden" in image
    for drawing in re.findall(r"<svg [^>]*>", PAGE):
        assert 'role="img"' in drawing and re.search(r'aria-label="[^"]', drawing)


def test_the_reading_guide_leads_to_every_equation():
    guide = (ROOT / "docs" / "reading.md").read_text("utf-8")
    for anchor in re.findall(r"read\.html#([\w-]+)", guide):
        assert f'id="{anchor}"' in PAGE
    for anchor in EQUATIONS:
        assert f"](read.html#{anchor})" in guide


# --- values ---------------------------------------------------------------------------------------


def first_content(steps: int = 400) -> dict:
    """What a checkpoint of the shapes world says of its run."""
    preset = TRAIN_PRESETS["shapes"]
    training, losses = (
        kind(**{k: v for k, v in preset.items() if k in kind.__dataclass_fields__})
        for kind in (TrainConfig, LossConfig)
    )
    training.steps = steps
    return {
        "model_config": asdict(model_config()),
        "train_config": asdict(training),
        "loss_config": asdict(losses),
        "step": steps,
    }


def cross_entropy(scores: np.ndarray) -> float:
    return float(np.mean([-s[i] + np.log(np.exp(s).sum()) for i, s in enumerate(scores)]))


def check_against_numpy(page: str, model: CoDe, which: int) -> None:
    """L_kg, L_hcl and the first pair's word masks on a page, beside plain NumPy."""
    pairs = small_batch(ReadConfig().pair, TrainConfig(), len(model.context))
    grid = tuple(4 * side for side in model.clip.visual.grid_size)
    noise = logistic_noise(2, len(pairs.captions), grid, 0, 0, torch.device("cpu"))
    with torch.no_grad():
        d = model(pairs.batch, noise)
        written = embed_texts(model.clip, pairs.batch.knowledge_tokens)
    n, written, e_v, e_t, logits = (
        x.double().numpy() for x in (d.n, written, d.e_v, d.e_t, d.word_logits[0])
    )
    squares = [sum((a - b) ** 2 for a, b in zip(*rows)) for rows in zip(n, written)]
    assert numbers(page, "l_kg")[which] == pytest.approx(np.mean(squares), abs=1e-5)

    s = e_v.reshape(16, -1) @ e_t.reshape(16, -1).T * model.logit_scales()["hcl"].item()
    both = (cross_entropy(s) + cross_entropy(s.T)) / 2
    assert numbers(page, "l_hcl")[which] == pytest.approx(both, abs=1e-4)

    for i in range(1, len(pairs.captions[0].split()) + 1):
        first, second = np.exp(logits[1:, i])
        assert numbers(page, f"logit-1-{i}")[which] == pytest.approx(logits[1, i], abs=1e-4)
        want = first / (1 + first + second)
        assert numbers(page, f"mask-0-{i}")[which] == pytest.approx(want, abs=1e-5)


def test_values_before_training_are_the_codes():
    check_against_numpy(PAGE, first_model(first_content()), 0)


def test_words_of_every_snapshot_follow_from_their_logits():
    masks = [numbers(PAGE, f"mask-{j}-3") for j in (0, 1)]
    logits = np.exp([numbers(PAGE, f"logit-{j}-3") for j in (1, 2)])
    assert np.allclose(masks, logits / (1 + logits.sum(0)), atol=1e-6)
    assert len(set(masks[0])) == 5


@pytest.mark.slow
def test_training_starts_from_the_model_of_step_0(tmp_path):
    options = ("--preset", "shapes", "--steps", "1", "--lr", "0", "--batch-size", "4")
    train(*options, "--out", tmp_path)
    content = read_checkpoint(tmp_path / "last.pt")
    first = first_model(content).learned_state()
    assert all(torch.equal(first[name], value) for name, value in content["model"].items())


@pytest.mark.slow
def test_a_page_of_other_snapshots_has_their_values(tmp_path):
    """The whole builder, on five models that differ in their context and some scalars."""
    trained, content = CoDe(load_clip("shapes"), model_config()).eval(), first_content(16)
    for step, name in ((1, "snapshots/1"), (4, "snapshots/4"), (8, "snapshots/8"), (16, "last")):
        with torch.no_grad():
            trained.text_segmenter.word_scale.fill_(10 + step)
            trained.hcl_log_scale.fill_(2 + step / 16)
            trained.image_segmenter.mask_bias.add_(0.5)
            trained.context.add_(0.01)
        saved = content | model_content(trained) | {"step": step}
        save_checkpoint(saved, tmp_path / f"{name}.pt")
    line = {"step": 16, "total": 9.0} | dict.fromkeys(TERMS, 1.0)
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    page = fill(TEMPLATE.read_text(), new_figures(ReadConfig(demo=str(tmp_path))))
    check_against_numpy(page, trained, 4)
    assert [numbers(page, "tau")[i] for i in (1, 4)] == pytest.approx(
        [np.exp(-2 - 1 / 16), np.exp(-3)], rel=1e-5
    )
    assert len(numbers(page, "miou")) == 5


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(browser):
    page = listened(browser.new_page(viewport={"width": 1400, "height": 1000}))
    page.goto(PATH.as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=30_000)
    return page


def shown(page) -> str:
    """The soft mask that stands on the page now."""
    masks = page.locator("#region-mask img").filter(visible=True)
    assert masks.count() == 8  # a soft and three hard ones of two nouns
    return masks.first.get_attribute("src")


@pytest.mark.slow
def test_the_slider_moves_every_figure_through_the_training(opened):
    slider = opened.locator("#at")
    seen = []
    for at in range(5):
        slider.fill(str(at))
        seen.append(shown(opened))
        assert opened.locator(".ticks .now").inner_text() == ["0", "25", "100", "200", "400"][at]
        loss = opened.locator('[data-name="l_hcl"]').filter(visible=True)
        assert float(loss.get_attribute("value")) == numbers(PAGE, "l_hcl")[at]
    assert len(set(seen)) == 5
    opened.locator("#play").click()  # from the end it starts anew
    opened.wait_for_selector(':root[data-at="1"]')
    opened.locator("#play").click()
    assert opened.locator("#play").inner_text() == "play"


@pytest.mark.slow
def test_keys_move_it_too(opened):
    opened.locator("#at").fill("4")
    opened.evaluate("document.activeElement.blur()")
    opened.keyboard.press("ArrowLeft")
    opened.keyboard.press("ArrowLeft")
    assert opened.evaluate("document.documentElement.dataset.at") == "2"
    assert opened.locator("[tabindex]").count() == 0  # nothing here is wider than its place
    opened.locator(".skip").focus()
    opened.keyboard.press("Tab")
    opened.keyboard.press("Tab")  # "play", then the slider, before the contents and the text
    assert opened.evaluate("document.activeElement.id") == "at"
    opened.keyboard.press("End")
    assert opened.evaluate("document.documentElement.dataset.at") == "4"
    summary = opened.locator("#eq-3-7 summary").nth(1)
    summary.focus()
    opened.keyboard.press("Enter")
    assert opened.locator("#eq-3-7 pre").nth(1).is_visible()


@pytest.mark.slow
def test_the_threshold_redraws_the_large_scene(opened):
    opened.locator("#at").fill("4")
    threshold, output = (opened.locator(f".threshold {tag}") for tag in ("input", "output"))
    start = threshold.input_value()
    assert f"mIoU {numbers(PAGE, 'miou')[4]:.1f} %" in output.inner_text()
    threshold.fill("1")
    assert "100 % background" in output.inner_text()
    threshold.fill(start)
    assert "100 % background" not in output.inner_text()


@pytest.mark.slow
def test_nothing_is_said_or_asked_for(opened):
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [PATH.as_uri()]


@pytest.mark.slow
def test_contents_lead_to_sections(opened):
    links = opened.locator("nav a").evaluate_all("links => links.map((a) => a.hash.slice(1))")
    assert set(links) == set(sections(PAGE)) and len(links) > 20
    opened.locator("nav a").last.focus()
    bottom = opened.locator("nav a").last.bounding_box()
    assert bottom["y"] + bottom["height"] < opened.locator("#training-slider").bounding_box()["y"]
    opened.locator("nav a[href='#eq-3-4']").click()
    opened.wait_for_selector("nav a[href='#eq-3-4'][aria-current=true]")


@pytest.mark.slow
def test_on_a_phone_in_the_dark(browser):
    phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    phone.goto(PATH.as_uri())
    phone.wait_for_selector("body[data-ready=yes]")
    assert phone.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
    for at in range(5):
        phone.locator("#at").fill(str(at))
        assert phone.evaluate("document.documentElement.scrollWidth") == 390
        beyond = phone.evaluate(
            """() => [...document.querySelectorAll("body *")].filter((e) =>
            e.getBoundingClientRect().right > 391 && !e.closest(".scroll, pre"))
            .map((e) => e.outerHTML.slice(0, 80))"""
        )
        assert beyond == []
        # Words, equations and settings fit; only code is moved sideways.
        assert phone.locator(".scroll[tabindex], .equation[tabindex]").count() == 0
        assert phone.locator("#nouns pre[tabindex]").count() == 2
    assert not phone.locator("nav ol").is_visible()  # folded, above the text
    phone.close()


@pytest.mark.slow
def test_print_leaves_the_controls_out(opened):
    opened.emulate_media(media="print")
    for part in ("#training-slider", "nav", ".threshold .control", ".screen"):
        assert not opened.locator(part).first.is_visible(), part
    assert opened.locator("#eq-3-4 .equation math").is_visible()
    assert opened.locator("#eq-3-4 pre").first.is_visible()
    assert opened.locator("#eq-3-4 .when").inner_text() == "after 400 steps"
    opened.emulate_media(media="screen")
    assert opened.locator("#training-slider").is_visible()
