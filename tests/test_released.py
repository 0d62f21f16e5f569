"""Against what the authors' programs computed: features, masks, losses and gradients.

The values are in tests/golden, or in the folder that CODE_GOLDEN names.
"""

import json
import os
from pathlib import Path

import golden
import numpy as np
import pytest
import torch

from checkpoint import load_model
from clip import visual_hidden
from config import (
    TRAIN_PRESETS,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    parse,
)
from data import Batch, collate
from evaluate import Segmenter
from losses import code_loss
from pamr import pamr
from released import rebuild_released, rename_released

GOLDEN = golden.folder()
TRIPLES = sorted(path.stem for path in GOLDEN.glob("tiny_*.json"))


def load(name: str):
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    state = {k: torch.tensor(v) for k, v in golden.load(f"{name}_checkpoint").items()}
    return facts, rebuild_released(state, name), golden.load(f"{name}_expected")


def golden_batch(facts: dict, images: np.ndarray, context_length: int) -> Batch:
    captions, by_noun = facts["captions"], facts["nouns"]
    return collate(
        torch.tensor(images).unbind(),
        captions,
        list(zip(*by_noun)),
        [()] * len(captions),
        [[facts["kg_template"]] * len(by_noun)] * len(captions),
        context_length,
        with_released_labels=True,
    )


def test_pamr():
    cases = golden.load("pamr")
    count = sum(name.startswith("image") for name in cases)
    assert count > 0
    for i in range(count):
        image, mask = torch.tensor(cases[f"image{i}"]), torch.tensor(cases[f"mask{i}"])
        refined = pamr(image, mask, int(cases[f"iters{i}"]), cases[f"dilations{i}"].tolist())
        np.testing.assert_allclose(refined, cases[f"refined{i}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TRIPLES)
def test_features_and_masks(name):
    facts, model, expected = load(name)
    for prior in (0.0, 0.3):
        for refine in (0, 1):
            config = MaskConfig(pamr=bool(refine), prior_weight=prior)
            segmenter = Segmenter(model.clip, model, facts["classes"], config)
            for i in range(len(facts["shapes"])):
                masks = segmenter.window_scores(torch.tensor(expected[f"image{i}"]))
                want = expected[f"masks{i}_pamr{refine}_kp{prior}"]
                np.testing.assert_allclose(masks, want, atol=1e-5, rtol=0)
    for i in range(len(facts["shapes"])):
        if f"features{i}" in expected:
            image = torch.tensor(expected[f"image{i}"])
            with torch.no_grad():
                x_v = model.image_segmenter(
                    visual_hidden(model.clip, image), tuple(image.shape[-2:])
                )
            want = expected[f"features{i}"]
            np.testing.assert_allclose(x_v.movedim(-1, 1), want, atol=1e-5, rtol=0)
    if "class_embedding" in expected:
        np.testing.assert_allclose(
            segmenter.class_embedding, expected["class_embedding"], atol=1e-5
        )
    if "class_embedding_templates" in expected:
        want = expected["class_embedding_templates"]
        np.testing.assert_allclose(segmenter.prior_embedding, want, atol=1e-5)


# Their name of a weighted term -> ours. Their L_kg is 8 (1 - cos), half our squared distance.
TERMS = {
    "hlf_noun_loss": "region_contrast",
    "hli_noun_loss": "image_contrast",
    "area_loss": "area",
    "neg_area_loss": "area_others",
    "tv_img_loss": "smooth_features",
    "tv_mask_loss": "smooth_masks",
    "tseg_loss": "seg_t",
    "hcl_loss": "hcl",
    "kg_loss": "kg",
}


@pytest.mark.parametrize("name", TRIPLES)
def test_training_step(name):
    facts, model, expected = load(name)
    if "train_image" not in expected:
        pytest.skip("this file has no training step")
    model.text_segmenter.attends_to_all = False  # as these values were computed
    by_noun = facts["nouns"]
    batch = golden_batch(facts, expected["train_image"], len(model.context))
    length = batch.caption_tokens.shape[1]
    np.testing.assert_array_equal(batch.noun_labels, expected["pseudo_label"][:, :length])
    assert (expected["pseudo_label"][:, length:] == -1).all()

    model.train()
    decomposition = model(batch, noise=None)
    with torch.no_grad():
        n = decomposition.n.flatten(0, 1)
        np.testing.assert_allclose(n, expected["noun_embedding"], atol=1e-5)
        masks = model.image_segmenter.mask_logits(decomposition.x_v, n).sigmoid()
        masks = masks.repeat(len(by_noun), 1, 1, 1)
        np.testing.assert_allclose(masks, expected["train_mask_soft_all"], atol=1e-5)
        triplets = torch.arange(len(masks))
        soft = masks[triplets, triplets][:, None]
        np.testing.assert_allclose(decomposition.soft_v.flatten(0, 1), soft[:, 0], atol=1e-6)
        np.testing.assert_allclose(soft, expected["train_mask_soft_pos"], atol=1e-5)
        np.testing.assert_array_equal(soft > 0.5, expected["train_mask_pos"] > 0.5)
        m_t = decomposition.m_t.flatten(0, 1)
        eot = batch.caption_tokens.argmax(-1).repeat(len(by_noun))
        for row, want, end in zip(m_t, expected["word_mask"], eot):
            np.testing.assert_allclose(row[: end + 1], want[: end + 1], atol=1e-5)

    config = LossConfig(lambda_kg=4.0, pseudo_labels="release")
    terms = code_loss(decomposition, model, config, batch.noun_labels)
    check_losses_and_gradients(model, terms, expected, more_than=40)


def check_losses_and_gradients(model, terms, expected, more_than: int) -> None:
    for theirs, ours in TERMS.items():
        assert terms[ours].item() == pytest.approx(float(expected[f"loss_{theirs}"]), abs=1e-5), (
            ours
        )
    assert terms["total"].item() == pytest.approx(float(expected["loss_total"]), abs=1e-5)

    terms["total"].backward()
    state = {k[5:]: torch.tensor(v) for k, v in expected.items() if k.startswith("grad_")}
    gradients = rename_released(state, tcl=False)["learned"]
    assert len(gradients) > more_than
    parameters = dict(model.named_parameters())
    for key, want in gradients.items():
        want = want.numpy().reshape(parameters[key].shape)
        tolerance = 1e-3 * np.abs(want).max() + 1e-7
        np.testing.assert_allclose(parameters[key].grad, want, atol=tolerance, rtol=0, err_msg=key)


def test_training_step_as_released():
    """The text segmenter of a released file attends to all 77 positions, as it was trained."""
    name = next(n for n in TRIPLES if "code" in n)
    facts, model, step = load(name)
    expected = golden.load(f"{name}_as_released")
    assert model.config.text_attention == "all"
    batch = golden_batch(facts, step["train_image"], len(model.context))
    decomposition = model(batch, noise=None)
    m_t = decomposition.m_t.flatten(0, 1).detach()
    eot = batch.caption_tokens.argmax(-1).repeat(len(facts["nouns"]))
    shifted = 0.0
    for row, want, words, end in zip(m_t, expected["word_mask"], step["word_mask"], eot):
        np.testing.assert_allclose(row[: end + 1], want[: end + 1], atol=1e-5)
        shifted = max(shifted, np.abs(want - words)[: end + 1].max())
    assert shifted > 0.005  # the values do tell the two apart
    # With the options of --preset release: every term and every gradient.
    configs, preset = (TrainConfig, ModelConfig, LossConfig), ["--preset", "release"]
    _, network, losses = parse("", *configs, presets=TRAIN_PRESETS, words=preset)
    assert network.text_attention == model.config.text_attention
    terms = code_loss(decomposition, model, losses, batch.noun_labels)
    check_losses_and_gradients(model, terms, expected, more_than=20)


# --- released files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """A file like the released one at ViT-B/16: random tensors, a real OmegaConf object, and an
    optimizer state. Slow (324 M numbers), but the only way to know that it loads."""
    omegaconf = pytest.importorskip("omegaconf")
    torch.manual_seed(0)
    state = {}
    for line in (GOLDEN / "released_keys.tsv").read_text().splitlines()[1:]:
        name, *shape = line.split("\t")
        sides = [int(side) for side in shape[0].split("x") if side.isdigit()] if shape else []
        state[name] = torch.randn(sides, dtype=torch.bfloat16)
    path = tmp_path_factory.mktemp("released") / "code.pth"
    config = omegaconf.OmegaConf.create({"model": {"type": "CoDe", "sizes": [1, 2]}, "lr": 5e-6})
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 5e-6}]}
    torch.save({"model": state, "cfg": config, "optimizer": optimizer, "epoch": 3}, path)
    return path, state


def test_a_released_file_of_full_size(full_size):
    path, state = full_size
    model = load_model(path, torch.device("cpu"))
    assert model.clip.visual.image_size == (224, 224)
    assert len(model.clip.visual.transformer.resblocks) == 12
    assert len(model.clip.transformer.resblocks) == 12
    for module, heads in ((model.clip.visual.transformer, 12), (model.clip.transformer, 8)):
        assert module.resblocks[0].attn.num_heads == heads
    text, image = "clip_text_encoder.prompt_learner.clip_model.", "clip_image_encoder."
    block = "masker.image_encoder.backbone.transformer.resblocks.11."
    net = "masker.image_encoder.decoder.decoder.net."
    lands = {
        "context": "clip_text_encoder.prompt_learner.ctx",
        "region_prompt": "learnable_image_bg",
        "word_prompt": "bg_text",
        "clip.visual.conv1.weight": image + "clip_visual.conv1.weight",
        "clip.visual.ln_post.bias": image + "clip_proj.ln.bias",
        "clip.visual.proj": image + "clip_proj.proj",
        "clip.visual.transformer.resblocks.11.attn.in_proj_weight": image
        + "clip_visual.transformer.resblocks.11.attn.in_proj_weight",
        "clip.token_embedding.weight": text + "token_embedding.weight",
        "clip.text_projection": text + "text_projection",
        "clip.transformer.resblocks.3.mlp.c_fc.weight": text
        + "transformer.resblocks.3.mlp.c_fc.weight",
        "image_segmenter.block.mlp.c_proj.weight": block + "mlp.c_proj.weight",
        "image_segmenter.upsampling.0.convs.0.weight": net + "0.conv.conv.weight",
        "image_segmenter.upsampling.1.norms.0.weight": net + "1.conv.norm.weight",
        "image_segmenter.upsampling.1.gates.0": net + "1.conv.gate.gate",
        "image_segmenter.ln_post.weight": "masker.image_encoder.decoder.image_proj.ln.weight",
        "image_segmenter.proj": "masker.image_encoder.decoder.image_proj.proj",
        "image_segmenter.mask_scale": "masker.sim2mask.w",
        "image_segmenter.mask_bias": "masker.sim2mask.b",
        "text_segmenter.blocks.1.attn.out_proj.weight": "text_decoder.transformer.resblocks.1."
        "attn.out_proj.weight",
        "text_segmenter.word_scale": "text_mask_w",
        "text_segmenter.word_bias": "text_mask_b",
        "image_log_scale": "tcli_loss.logit_scale",
        "region_log_scale": "tclf_loss.logit_scale",
        "hcl_log_scale": "hcl_loss.logit_scale",
    }
    ours = dict(model.state_dict())
    for name, theirs in lands.items():
        assert torch.equal(ours[name], state[theirs].float().reshape(ours[name].shape)), name
    # And every learned tensor came from the file: none kept its start.
    assert model.learned_state().keys() == rename_released(state, tcl=False)["learned"].keys()


class Exploding:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_released_file_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = next(n for n in TRIPLES if "code" in n)
    tensors = golden.load(f"{name}_checkpoint")
    state = {key: torch.tensor(value) for key, value in tensors.items()}
    content = {"cfg": Exploding(), "model": state, "hook": [Exploding(), {"x": Exploding()}]}
    torch.save(content, "bomb.pth")
    model = load_model("bomb.pth", torch.device("cpu"))
    assert len(model.context) == len(state["clip_text_encoder.prompt_learner.ctx"])
    assert not Path("exploded").exists()


def test_unknown_and_missing_tensors_are_named():
    name = next(n for n in TRIPLES if "code" in n)
    tensors = golden.load(f"{name}_checkpoint")
    state = {key: torch.tensor(value) for key, value in tensors.items()}
    with pytest.raises(UserError, match="x.pth: unknown tensors masker.extra"):
        rebuild_released(state | {"masker.extra": torch.zeros(1)}, "x.pth")
    without = {key: value for key, value in state.items() if key != "masker.sim2mask.w"}
    with pytest.raises(UserError, match="missing image_segmenter.mask_scale"):
        rebuild_released(without, "x.pth")
    without = {key: value for key, value in state.items() if "clip_visual.conv1" not in key}
    with pytest.raises(UserError, match="missing tensor visual.conv1.weight"):
        rebuild_released(without, "x.pth")
