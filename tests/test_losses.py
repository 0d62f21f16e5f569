"""Eqs. 3.1, 3.7, 3.8 and the terms of L_seg^v and L_seg^t, against loops from the thesis."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, some_batch

import losses
from config import LossConfig


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive_symmetric(logits: np.ndarray) -> float:
    """Eq. 3.7 as it is printed, for S / tau."""
    count, total = len(logits), 0.0
    for i in range(count):
        row = sum(math.exp(logits[i, j]) for j in range(count))
        column = sum(math.exp(logits[j, i]) for j in range(count))
        own = math.exp(logits[i, i])
        total -= math.log(own / row) / (2 * count) + math.log(own / column) / (2 * count)
    return total


def test_eq_3_1_knowledge_loss():
    n, given = unit(5, 7), unit(5, 7, seed=1)
    want = (
        sum(sum((float(n[i, c]) - float(given[i, c])) ** 2 for c in range(7)) for i in range(5)) / 5
    )
    assert losses.knowledge_loss(n, given).item() == pytest.approx(want, rel=1e-5)
    cosine = 2 * (1 - (n * given).sum(-1)).mean().item()  # the released form, doubled
    assert losses.knowledge_loss(n, given).item() == pytest.approx(cosine, rel=1e-5)


def test_eq_3_7_info_nce():
    a, b, log_scale = unit(6, 8), unit(6, 8, seed=1), torch.tensor(1.3)
    similarity = np.array([[float(x @ y) for y in b] for x in a])
    want = naive_symmetric(similarity * math.exp(1.3))
    assert losses.info_nce(a, b, log_scale.exp()).item() == pytest.approx(want, rel=1e-5)


def test_the_temperatures_start_at_0_07(model):
    scales = {name: scale.item() for name, scale in model.logit_scales().items()}
    assert scales == pytest.approx(dict.fromkeys(("image", "region", "hcl"), 1 / 0.07), rel=1e-5)


def test_the_scales_of_the_contrasts_are_capped_at_100(model):
    with torch.no_grad():
        model.image_log_scale.fill_(1.3)
        model.region_log_scale.fill_(math.log(100.0))
        model.hcl_log_scale.fill_(9.0)
    scales = {name: scale.item() for name, scale in model.logit_scales().items()}
    assert scales == pytest.approx({"image": math.exp(1.3), "region": 100, "hcl": 100}, rel=1e-5)


def test_region_cosines():
    x_v, masks, nouns = unit(2, 3, 4, 8), torch.rand(2, 5, 3, 4), unit(5, 8, seed=1)
    got = losses.region_cosines(x_v, masks, nouns)
    for i in range(2):
        for j in range(5):
            pooled, area = np.zeros(8), 1e-6
            for y in range(3):
                for x in range(4):
                    pooled += float(masks[i, j, y, x]) * x_v[i, y, x].numpy()
                    area += float(masks[i, j, y, x])
            pooled /= area
            want = pooled @ nouns[j].numpy() / np.linalg.norm(pooled)
            assert got[i, j].item() == pytest.approx(want, abs=1e-5)


def test_area_losses():
    pairs, nouns = 3, 2
    areas = torch.rand(pairs, nouns * pairs)
    own, others = losses.area_losses(areas, 0.25)
    matching, rest = [], []
    for t in range(nouns * pairs):  # triplet t is image t % pairs with noun t
        for u in range(nouns * pairs):
            (matching if t == u else rest).append(float(areas[t % pairs, u]))
    assert own.item() == pytest.approx(abs(np.mean(matching) - 0.25), abs=1e-6)
    assert others.item() == pytest.approx(np.mean(rest), abs=1e-6)


def test_total_variation():
    images = torch.randn(2, 3, 4, 5)
    got = losses.total_variation(images)
    for i, image in enumerate(images.numpy()):
        across = [abs(image[c, y, x + 1] - image[c, y, x]) for c, y, x in np.ndindex(3, 4, 4)]
        down = [abs(image[c, y + 1, x] - image[c, y, x]) for c, y, x in np.ndindex(3, 3, 5)]
        assert got[i].item() == pytest.approx(np.mean(across) + np.mean(down), rel=1e-5)


def test_pseudo_labels_are_the_likeliest_class_of_real_words():
    logits, position = torch.randn(3, 2, 6), torch.arange(6)
    is_word = (position > 0) & (position < torch.tensor([[5], [3]]))
    labels = losses.pseudo_labels(logits, is_word)
    for b, eot in enumerate((5, 3)):
        for i in range(6):
            want = int(np.argmax(logits[:, b, i])) if 0 < i < eot else -1
            assert labels[b, i].item() == want


def test_word_cross_entropy():
    logits = torch.randn(3, 2, 6)
    labels = torch.tensor([[-1, 0, 1, 2, 0, -1], [-1, 2, 2, -1, -1, -1]])
    losses_of, weights = losses.word_cross_entropy(logits, labels, 0.5)
    got = (losses_of.sum() / weights.sum()).item()
    above = below = 0.0
    for b in range(2):
        for i in range(6):
            label = int(labels[b, i])
            if label >= 0:
                weight = 0.5 if label == 0 else 1.0
                total = sum(math.exp(float(logits[k, b, i])) for k in range(3))
                above -= weight * (float(logits[label, b, i]) - math.log(total))
                below += weight
    assert got == pytest.approx(above / below, rel=1e-5)


def test_a_batch_without_a_labelled_word_has_no_text_loss(model):
    batch = some_batch(model)
    labels = torch.full_like(batch.noun_labels, -1)
    terms = losses.loss_seg_t(model(batch), labels, LossConfig(pseudo_labels="release"))
    assert terms["seg_t"].item() == 0


@pytest.mark.parametrize("labels", ["thesis", "release"])
def test_eq_3_8_is_the_weighted_sum_of_the_parts(model, labels):
    batch = some_batch(model)
    d = model(batch)
    config = LossConfig(
        lambda_kg=1.1, lambda_seg_v=1.3, lambda_seg_t=1.7, lambda_hcl=1.9, pseudo_labels=labels
    )
    terms = losses.code_loss(d, model, config, batch.noun_labels)
    n = d.n.detach().flatten(0, 1)
    masks = model.image_segmenter.mask_logits(d.x_v, n).sigmoid()
    areas = masks.mean((-2, -1)).detach()
    image_scale, region_scale = (
        model.image_log_scale.exp().item(),
        model.region_log_scale.exp().item(),
    )
    regions = losses.region_cosines(d.x_v, masks, n).detach().repeat(2, 1).numpy()
    own, others = losses.area_losses(areas, config.area_prior)
    e_v = d.e_v.flatten(0, 1)
    seg_v = (
        0.1 * naive_symmetric((e_v @ n.T).detach().numpy() * image_scale)
        + 0.1 * naive_symmetric(regions * region_scale)
        + 0.5 * own.item()
        + 0.05 * others.item()
        + losses.total_variation(d.x_v.movedim(-1, 1)).mean().item()
        + losses.total_variation(masks).mean().item()
    )
    targets = batch.noun_labels
    if labels == "thesis":
        targets = losses.pseudo_labels(d.word_logits, d.is_word)
    words, weights = losses.word_cross_entropy(d.word_logits, targets, 0.5)
    hcl = naive_symmetric(
        (e_v @ d.e_t.flatten(0, 1).T).detach().numpy() * model.hcl_log_scale.exp().item()
    )
    want = (
        1.1 * losses.knowledge_loss(n, d.n_prime.flatten(0, 1)).item()
        + 1.3 * seg_v
        + 1.7 * (words.sum() / weights.sum()).item()
        + 1.9 * hcl
    )
    assert terms["total"].item() == pytest.approx(want, rel=1e-5)
    assert terms["total"].item() == pytest.approx(
        sum(value.item() for name, value in terms.items() if name != "total"), rel=1e-6
    )


def test_the_baseline_has_neither_text_nor_alignment_losses():
    model = random_model(co_decomposition=False)
    batch = some_batch(model)
    terms = losses.code_loss(model(batch), model, LossConfig())
    assert "seg_t" not in terms and "hcl" not in terms
