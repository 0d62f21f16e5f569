"""Dense features without training: MaskCLIP, SCLIP, ClearCLIP and NACLIP."""

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_clip
from PIL import Image

import evaluate
import training_free
from clip import dense_embedding, visual_hidden
from released import rebuild_released
from training_free import DENSE, TrainingFree, TrainingFreeConfig


@pytest.mark.parametrize("method", DENSE)
def test_dense_features_are_the_golden_ones(method):
    """On three grids, projected and not normalised."""
    expected = golden.load("dense")
    state = {k: torch.tensor(v) for k, v in golden.load("tiny_code_checkpoint").items()}
    visual = rebuild_released(state, "tiny_code").clip.visual
    cases = sum(name.startswith("grid") for name in expected)
    assert cases == 3
    for i in range(cases):
        hidden, grid = torch.tensor(expected[f"hidden{i}"]), tuple(expected[f"grid{i}"].tolist())
        with torch.no_grad():
            x = DENSE[method](visual.transformer.resblocks[-1], hidden, grid)
            features = visual.ln_post(x[:, 1:]) @ visual.proj
        np.testing.assert_allclose(features, expected[f"{method}{i}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["sclip", "clearclip", "naclip"])
def test_dense_attention_against_a_loop(method):
    """One head and one query at a time, from the papers' formulas."""
    clip, grid = random_clip(), (2, 3)
    block = clip.visual.transformer.resblocks[-1].double()
    x = torch.randn(1, 1 + 6, 64, dtype=torch.double)
    with torch.no_grad():
        got = DENSE[method](block, x, grid)[0]
        y = block.ln_1(x)[0]
        q, k, v = (y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).split(64, dim=-1)
        rows = []
        for p in range(7):
            weights = {}
            for name, a in (("q", q), ("k", k)):
                logits = [float(a[p] @ a[r]) / 64**0.5 for r in range(7)]
                if method == "naclip" and p > 0:
                    for r in range(1, 7):
                        apart = [(i - 1) // 3 - (j - 1) // 3 for i, j in [(p, r)]]
                        apart += [(p - 1) % 3 - (r - 1) % 3]
                        logits[r] += np.exp(-sum(d * d for d in apart) / 50)
                weights[name] = np.exp(logits) / np.exp(logits).sum()
            mix = {"sclip": weights["q"] + weights["k"], "clearclip": weights["q"]}
            mix["naclip"] = weights["k"]
            rows.append(sum(float(w) * v[r] for r, w in enumerate(mix[method])))
        want = block.attn.out_proj(torch.stack(rows))
        if method == "sclip":
            want = x[0] + want
            want = want + block.mlp(block.ln_2(want))
    assert torch.allclose(got, want, atol=1e-6)  # NACLIP's weights are made in single precision


def test_methods_differ():
    clip, image = random_clip(), Image.radial_gradient("L").convert("RGB").resize((40, 32))
    scores = {}
    for method in DENSE:
        config = TrainingFreeConfig(method=method, short_side=32, window=32, stride=32, pamr=False)
        scores[method] = TrainingFree(clip, None, ["kite", "bug"], config).scores(image).classes
    names = list(scores)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert not torch.allclose(scores[a], scores[b], atol=1e-5), (a, b)


def test_dense_embeddings_are_unit_vectors_of_patches():
    clip = random_clip()
    with torch.no_grad():
        hidden = visual_hidden(clip, torch.randn(2, 3, 24, 40))
        for method in DENSE:
            dense = dense_embedding(clip, hidden, (3, 5), DENSE[method])
            assert dense.shape == (2, 15, 64)
            assert torch.allclose(dense, F.normalize(dense, dim=-1), atol=1e-6)


def test_an_unknown_method_is_refused(mistake):
    for script in (training_free, evaluate):
        assert "--method dino: 'code' or" in mistake(
            script.main, "--dataset", "shapes", "--method", "dino"
        )
