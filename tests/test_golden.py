"""golden.py: what is packed comes back."""

import golden
import numpy as np
import torch


def test_a_packed_file_gives_the_arrays_of_the_whole_one(tmp_path):
    weight = golden.uniform([48, 64], seed=1, at=100, bound=64**-0.5)
    torch.manual_seed(1)
    torch.empty(100).uniform_()
    np.testing.assert_allclose(weight, torch.nn.Linear(64, 48).weight.detach(), atol=1e-8)

    tokens = np.zeros((5000, 8), np.float32)
    tokens[[3, 777]] = np.random.default_rng(0).normal(size=(2, 8))
    noise = np.random.default_rng(1).normal(size=(30, 40))
    arrays = {"x": noise, "layer.weight": weight, "token_embedding.weight": tokens}
    arrays |= {"count": np.array(7), "copy": noise, "tokens": tokens}
    (tmp_path / "whole").mkdir()
    np.savez(tmp_path / "whole" / "tiny.npz", **arrays)
    golden.pack(tmp_path / "whole", tmp_path / "packed")
    assert (tmp_path / "packed" / "tiny.npz").stat().st_size < noise.nbytes + 4000
    for folder in ("whole", "packed"):
        loaded = golden.load("tiny", tmp_path / folder)
        assert list(loaded) == list(arrays)
        for name, array in arrays.items():
            assert loaded[name].dtype == array.dtype
            np.testing.assert_array_equal(loaded[name], array)
