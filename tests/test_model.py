"""Equations 3.2 to 3.6 and the two segmenters, against loops in NumPy written from the thesis."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAPTIONS, NOUNS, random_clip, random_model, some_batch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import nn

import model as m
from clip import (
    dense_embedding,
    embed_texts,
    end_of_text,
    image_embedding,
    maskclip,
    text_hidden,
    tokenize,
    transformer_block,
    visual_hidden,
)
from config import ModelConfig, UserError


def test_eq_3_2_word_logits(model):
    x_t, nouns = torch.randn(2, 5, 64), torch.randn(3, 2, 64)
    got = model.text_segmenter.word_logits(x_t, nouns).detach().numpy()
    w, b = model.text_segmenter.word_scale.item(), model.text_segmenter.word_bias.item()
    for caption in range(2):
        for j in range(3):
            for i in range(5):
                dot = sum(
                    float(x_t[caption, i, c]) * float(nouns[j, caption, c]) for c in range(64)
                )
                assert got[1 + j, caption, i] == pytest.approx(w * dot + b, rel=1e-4, abs=1e-4)
    assert (got[0] == 0).all()  # "none"


def test_eq_3_3_word_mask():
    logits = torch.randn(3, 2, 4) * 3
    none = torch.zeros(1, 2, 4)
    got = m.word_mask(torch.cat([none, logits]))
    for caption in range(2):
        for i in range(4):
            below = 1 + sum(np.exp(float(logits[j, caption, i])) for j in range(3))
            for j in range(3):
                want = np.exp(float(logits[j, caption, i])) / below
                assert got[j, caption, i].item() == pytest.approx(want, rel=1e-5)
            rest = 1 - got[:, caption, i].sum().item()  # of "none"
            assert rest == pytest.approx(1 / below, rel=1e-4, abs=1e-6)


def test_eq_3_4_highlighted_image():
    image, prompt = torch.randn(2, 3, 8, 8), torch.randn(3, 8, 8)
    mask = (torch.rand(3, 2, 4, 4) > 0.5).float()
    got = m.highlight_image(image, mask, prompt)
    for j, b, c, y, x in np.ndindex(3, 2, 3, 8, 8):
        on = mask[j, b, y // 2, x // 2].item()
        want = image[b, c, y, x] * on + prompt[c, y, x] * (1 - on)
        assert got[j, b, c, y, x].item() == pytest.approx(want.item())


def test_eq_3_5_highlighted_text():
    embeddings, prompt = torch.randn(2, 6, 4), torch.randn(77, 4)
    mask, eot = torch.rand(3, 2, 6), torch.tensor([5, 3])
    got = m.highlight_text(embeddings, mask, prompt, eot)
    for j in range(3):
        for b in range(2):
            for i in range(6):
                keep = 1.0 if i in (0, int(eot[b])) else mask[j, b, i].item()
                want = embeddings[b, i] * keep + prompt[i] * (1 - keep)
                assert torch.allclose(got[j, b, i], want, atol=1e-6)


def test_eq_3_6_embeddings_are_those_of_open_clip():
    clip = random_clip()
    images, texts = torch.randn(2, 3, 32, 32), tokenize(CAPTIONS)
    padded = F.pad(texts, (0, 77 - texts.shape[1]))
    with torch.no_grad():
        got, want = image_embedding(clip, images), clip.encode_image(images, normalize=True)
        assert torch.allclose(got, want, atol=1e-6)
        got, want = embed_texts(clip, texts), clip.encode_text(padded, normalize=True)
        assert torch.allclose(got, want, atol=1e-6)


def test_positions_after_eot_change_nothing(model):
    """Cutting every batch of texts to its longest is exact."""
    short = tokenize(CAPTIONS)
    long = F.pad(short, (0, 77 - short.shape[1]))
    with torch.no_grad():
        a, b = (embed_texts(model.clip, t) for t in (short, long))
        assert torch.allclose(a, b, atol=1e-6)
        features = []
        for tokens in (short, long):
            hidden = text_hidden(model.clip, model.clip.token_embedding(tokens))
            features.append(model.text_segmenter(hidden, end_of_text(tokens)))
    for row, eot in enumerate(end_of_text(short)):
        a, b = features[0][row, : eot + 1], features[1][row, : eot + 1]
        assert torch.allclose(a, b, atol=1e-5)


def test_text_segmenter_looks_both_ways_at_real_tokens_only(model):
    hidden, eot = torch.randn(1, 8, 64), torch.tensor([5])
    with torch.no_grad():
        before = model.text_segmenter(hidden, eot)
        changed = hidden.clone()
        changed[0, 7] += torch.randn(64)  # padding
        assert torch.equal(before[0, :6], model.text_segmenter(changed, eot)[0, :6])
        changed[0, 5] += torch.randn(64)  # a later word
        assert not torch.allclose(before[0, 1], model.text_segmenter(changed, eot)[0, 1])


def test_a_block_at_one_position_is_the_block_there():
    """E^v is read at the class token and E^t at EOT: their last block is computed there alone."""
    block = ResidualAttentionBlock(32, 4, act_layer=QuickGELU).double()
    x, at = torch.randn(3, 6, 32, dtype=torch.double, requires_grad=True), torch.tensor([0, 5, 2])
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    for mask, mask_at in ((None, None), (causal, causal[at][:, None, None])):
        whole, alone = transformer_block(block, x, mask), transformer_block(block, x, mask_at, at)
        want = torch.stack([whole[i, p] for i, p in enumerate(at)])[:, None]
        assert alone.shape == (3, 1, 32) and torch.allclose(alone, want, atol=1e-12)
        inputs = [x, *block.parameters()]
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (want, alone))):
            assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("quick", [True, False])
def test_transformer_block_is_open_clips(quick):
    """Values and gradients, with and without a mask."""
    torch.manual_seed(0)
    act = QuickGELU if quick else torch.nn.GELU
    block = ResidualAttentionBlock(32, 4, act_layer=act).double()
    x = torch.randn(2, 6, 32, dtype=torch.double, requires_grad=True)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    blocked = torch.zeros(6, 6, dtype=torch.double).masked_fill(~causal, -torch.inf)
    for mask, theirs in ((None, None), (causal, blocked)):
        want, got = block(x, attn_mask=theirs), transformer_block(block, x, mask)
        assert got.shape == want.shape and torch.allclose(got, want, atol=1e-10)
        inputs = [x, *block.parameters()]
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (got, want))):
            assert torch.allclose(a, b, atol=1e-9)


def test_maskclip_block_is_attention_to_oneself():
    clip = random_clip()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden = visual_hidden(clip, images)
        block = clip.visual.transformer.resblocks[-1]
        alone = torch.full((17, 17), -torch.inf).fill_diagonal_(0)
        assert torch.allclose(
            maskclip(block, hidden, (4, 4)), block(hidden, attn_mask=alone), atol=1e-5
        )
        dense = dense_embedding(clip, hidden, (4, 4))
        want = clip.visual.ln_post(block(hidden, attn_mask=alone))[:, 1:] @ clip.visual.proj
        assert torch.allclose(dense, F.normalize(want, dim=-1), atol=1e-5)


def test_visual_tower_at_its_own_size_and_at_another():
    clip = random_clip()
    with torch.no_grad():
        x = torch.randn(1, 3, 32, 32)
        last = clip.visual.transformer.resblocks[-1](visual_hidden(clip, x))
        want = clip.visual(x)
        assert torch.allclose(clip.visual.ln_post(last)[:, 0] @ clip.visual.proj, want, atol=1e-5)
        assert visual_hidden(clip, torch.randn(1, 3, 48, 72)).shape == (1, 1 + 6 * 9, 64)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_upsampling_then_convolving_is_one_transposed_convolution(size):
    conv = nn.Conv2d(6, 6, 3, padding=1).double()
    x = torch.randn(2, 6, *size, dtype=torch.double, requires_grad=True)
    plain = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    fast = m.upsample_and_convolve(x, conv)
    assert torch.allclose(fast, plain, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), [x, conv.weight]) for y in (plain, fast)]
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("convs", [1, 2])
def test_upsampling_block(convs):
    block = m.UpsamplingBlock(8, convs)
    with torch.no_grad():
        for gate in block.gates:
            gate.fill_(0.7)
        x = torch.randn(2, 8, 3, 4)
        want = F.interpolate(x, scale_factor=2, mode="nearest")
        for norm, conv, gate in zip(block.norms, block.convs, block.gates):
            y = F.gelu(F.layer_norm(want.movedim(1, -1), (8,), norm.weight, norm.bias, 1e-5))
            want = want + torch.tanh(gate) * conv(y.movedim(-1, 1))
        assert torch.allclose(block(x), want, atol=1e-5)


def test_hard_mask_value_and_gradient():
    logits = torch.randn(2, 3, 3, dtype=torch.double, requires_grad=True)
    noise = torch.randn(2, 3, 3, dtype=torch.double)
    hard = m.hard_mask(logits, noise)
    assert torch.equal(hard.detach().round(decimals=9), ((logits + noise) > 0).double())
    weight = torch.randn_like(noise)
    (gradient,) = torch.autograd.grad((hard * weight).sum(), logits)
    for i in np.ndindex(2, 3, 3):  # the gradient is the soft mask's: central differences
        step = torch.zeros_like(noise)
        step[i] = 1e-6
        up, down = (torch.sigmoid(logits.detach() + noise + s)[i] for s in (step, -step))
        assert gradient[i].item() == pytest.approx(float(weight[i] * (up - down) / 2e-6), abs=1e-7)


def test_noun_embedding_puts_the_context_before_the_noun():
    """With the context at the embeddings of its own words, n_j is the plain text's embedding."""
    model = random_model()
    with torch.no_grad():
        got = model.noun_embedding(m.noun_prompts(["red kite", "bug"], len(model.context)))
        want = embed_texts(model.clip, tokenize(["a photo of a red kite", "a photo of a bug"]))
        assert torch.allclose(got, want, atol=1e-6)
        model.context += 0.1 * torch.randn(4, 64)
        moved = model.noun_embedding(m.noun_prompts(["red kite", "bug"], len(model.context)))
        assert not torch.allclose(moved, want, atol=1e-3)


def test_forward_is_made_of_the_named_functions(model):
    """One pass, triplet by triplet: own masks, highlighted image and text, and their embeddings."""
    batch = some_batch(model)
    d = model(batch)
    clip = model.clip
    with torch.no_grad():
        x_v = model.image_segmenter(visual_hidden(clip, batch.images), (32, 32))
        eot = end_of_text(batch.caption_tokens)
        embeddings = clip.token_embedding(batch.caption_tokens)
        x_t = model.text_segmenter(text_hidden(clip, embeddings), eot)
        for j in range(2):
            for i in range(3):
                n = model.noun_embedding(m.noun_prompts([NOUNS[i][j]], 4))
                assert torch.allclose(d.n[j, i], n[0], atol=1e-5)
                scale, bias = model.image_segmenter.mask_scale, model.image_segmenter.mask_bias
                soft = torch.sigmoid(scale * (x_v[i] @ n[0]) + bias)
                assert torch.allclose(d.soft_v[j, i], soft, atol=1e-5)
                hard = (soft > 0.5).float()
                assert torch.allclose(d.m_v[j, i], hard, atol=1e-6)
                image = m.highlight_image(
                    batch.images[i : i + 1], hard[None, None], model.region_prompt
                )
                assert torch.allclose(d.h_v[j, i], image[0, 0], atol=1e-5)
                assert torch.allclose(d.e_v[j, i], image_embedding(clip, image[0])[0], atol=1e-5)
                both = d.n[:, i : i + 1]
                logits = model.text_segmenter.word_logits(x_t[i : i + 1], both)
                m_t = m.word_mask(logits)[j, 0]
                assert torch.allclose(d.m_t[j, i], m_t, atol=1e-5)
                text = m.highlight_text(
                    embeddings[i : i + 1], m_t[None, None], model.word_prompt, eot[i : i + 1]
                )
                assert torch.allclose(d.h_t[j, i], text[0, 0], atol=1e-5)
                want = m.text_embedding(clip, text[0], eot[i : i + 1])[0]
                assert torch.allclose(d.e_t[j, i], want, atol=1e-5)


def test_order_of_nouns_and_of_pairs_does_not_matter(model):
    batch = some_batch(model)
    with torch.no_grad():
        d = model(batch)
        swapped = some_batch(model, nouns=[pair[::-1] for pair in NOUNS])
        e = model(swapped)
    for name in ("n", "soft_v", "m_v", "h_v", "e_v", "m_t", "h_t", "e_t"):
        a, b = getattr(d, name), getattr(e, name).flip(0)
        assert torch.allclose(a, b, atol=1e-5), name
    with torch.no_grad():
        order = [2, 0, 1]
        moved = replace(
            batch,
            images=batch.images[order],
            caption_tokens=batch.caption_tokens[order],
            noun_tokens=batch.noun_tokens.unflatten(0, (2, 3))[:, order].flatten(0, 1),
        )
        e = model(moved)
    for name in ("n", "soft_v", "m_v", "h_v", "e_v", "m_t", "h_t", "e_t"):
        assert torch.allclose(getattr(d, name)[:, order], getattr(e, name), atol=1e-5), name


def test_ablations_learn_what_they_say():
    def learned(**changes):
        return {name for name in random_model(**changes).learned_state()}

    full = learned()
    assert full - learned(word_prompt=False) == {"word_prompt"}
    assert full - learned(region_prompt=False) == {"region_prompt"}
    baseline = full - learned(co_decomposition=False)
    assert {"word_prompt", "region_prompt", "hcl_log_scale"} <= baseline
    bare = full - learned(word_segments=False)
    assert "region_prompt" not in bare and "hcl_log_scale" not in bare
    for gone in (baseline, bare):
        rest = gone - {"word_prompt", "region_prompt", "hcl_log_scale"}
        assert rest and all(name.startswith("text_segmenter.") for name in rest)


def test_bare_noun_embeddings_stand_in_for_word_segments():
    model = random_model(word_segments=False)
    d = model(some_batch(model))
    assert d.word_logits is None and torch.equal(d.e_t, d.n)


def test_gradients_reach_every_learned_tensor_and_clip_has_none(model):
    d = model(some_batch(model))
    (d.e_v.sum() + d.e_t.sum() + d.word_logits.sum() + d.soft_v.sum()).backward()
    without = [
        name
        for name, p in model.named_parameters()
        if not name.startswith("clip.") and not name.endswith("_log_scale") and p.grad is None
    ]
    assert without == []
    assert all(p.grad is None for p in model.clip.parameters())


def test_a_context_that_leaves_no_room_for_nouns_is_refused():
    with pytest.raises(UserError, match="context-init"):
        m.CoDe(random_clip(), ModelConfig(context_init="x " * 75))
