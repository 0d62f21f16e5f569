"""Half precision, and GPUs without one: autocast on the CPU, and fake CUDA tensors.

Fake tensors have shapes, types and devices but no values, so that what mixes devices or reads a
value off the GPU in the middle of a step fails here, on a machine without a GPU.
"""

from dataclasses import replace

import pytest
import torch
from conftest import CPU, random_model, some_batch
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from config import LossConfig, MaskConfig, UserError
from evaluate import Segmenter
from losses import code_loss
from pamr import neighbours
from support.device import autocast, choose_device, choose_precision
from train import logistic_noise
from training_free import TrainingFree, TrainingFreeConfig


def losses_of(model, batch, precision: torch.dtype) -> dict[str, torch.Tensor]:
    noise = logistic_noise(model, batch, seed=0, step=0)
    with autocast(CPU, precision):
        decomposition = model(batch, noise)
    for name, value in vars(decomposition).items():
        assert value.dtype == (torch.bool if name == "is_word" else torch.float32), name
    return code_loss(decomposition, model, LossConfig(), batch.noun_labels)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_loss_terms_in_half_precision(precision):
    """Every term within 2 % of float32's; the hard masks differ in a cell or two at most."""
    model = random_model()
    batch = some_batch(model)
    full, half = (losses_of(model, batch, p) for p in (torch.float32, precision))
    for name, value in full.items():
        assert half[name].dtype == torch.float32
        assert half[name].item() == pytest.approx(value.item(), rel=0.02, abs=1e-4), name
    half["total"].backward()
    gradients = [p.grad for n, p in model.named_parameters() if not n.startswith("clip.")]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


def test_masks_of_bfloat16_move_in_small_steps():
    """From before the sigmoid they are float32: far more values than bfloat16 has in [0.5, 1]."""
    model = random_model()
    config = MaskConfig(pamr=False, prior_weight=0.0, precision="bfloat16")
    segmenter = Segmenter(model.clip, model, ["kite"], config)
    masks = segmenter.window_scores(torch.randn(1, 3, 64, 64))
    assert masks.dtype == torch.float32
    assert len(masks.unique()) > 1000  # of 4,096; in bfloat16 128 at most
    full = Segmenter(model.clip, model, ["kite"], replace(config, precision="float32"))
    torch.manual_seed(0)
    image = torch.randn(1, 3, 64, 64)
    assert torch.allclose(segmenter.window_scores(image), full.window_scores(image), atol=0.02)


def test_precisions_by_name():
    assert choose_precision("auto", CPU) == torch.float32
    assert choose_precision("float16", CPU) == torch.float16
    with pytest.raises(UserError, match="--precision half: not one of auto, float32, bfloat16"):
        choose_precision("half", CPU)


def test_bfloat16_only_where_the_gpu_computes_in_it(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda emulated=True: asked.append(emulated) or emulated
    )
    assert choose_precision("auto", torch.device("cuda", 0)) == torch.float16
    assert asked == [False]


def test_cuda_is_this_processes_gpu(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: made.append(str(device)))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(choose_device("cuda")) == "cuda:3" and str(choose_device("cuda:1")) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(choose_device("auto")) == "cuda:3" and made == ["cuda:3", "cuda:1", "cuda:3"]


def test_processes_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--device cuda:1: the 4 processes would share one GPU"):
        choose_device("cuda:1")
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["mps", "meta", "xpu"])
def test_only_devices_that_were_thought_through(name):
    with pytest.raises(UserError, match=f"--device {name}: "):
        choose_device(name)


# --- fake CUDA tensors ----------------------------------------------------------------------------


@pytest.fixture
def fake_cuda(monkeypatch):
    """Tensors lie on a GPU that does not exist; reading a value of theirs raises. Without a driver
    the autograd engine cannot run on them: backward passes in half precision are tested above."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: True)
    try:
        with FakeTensorMode():
            table, index = (torch.zeros(2, 2, device="cuda:0", dtype=d) for d in (None, torch.long))
            torch.nn.functional.embedding(index, table)
    except RuntimeError:  # torch 2.5
        pytest.skip("this torch's fake tensors ask for a driver")
    neighbours.cache_clear()
    yield FakeTensorMode
    neighbours.cache_clear()  # it must not keep fake ones


def on_gpu(module: torch.nn.Module) -> torch.nn.Module:
    """The module with fake parameters and buffers on cuda:0."""
    for part in module.modules():
        for names in (part._parameters, part._buffers):
            for name, value in names.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cuda:0")
                    learned = isinstance(value, torch.nn.Parameter)
                    names[name] = torch.nn.Parameter(fake, value.requires_grad) if learned else fake
    return module


@pytest.mark.parametrize("labels", ["thesis", "release"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_on_a_fake_gpu(precision, labels, fake_cuda):
    """Forward pass and losses: nothing is left on the CPU, nothing is read off the GPU."""
    model = random_model()
    batch = some_batch(model)
    with fake_cuda():
        model = on_gpu(model)
        batch = replace(batch, **{k: fake(v) for k, v in batch.tensors().items()})
        noise = torch.rand(2, 3, 16, 16, device="cuda:0")
        with autocast(torch.device("cuda", 0), precision):
            decomposition = model(batch, noise)
        terms = code_loss(decomposition, model, LossConfig(pseudo_labels=labels), batch.noun_labels)
        for name, value in (vars(decomposition) | terms).items():
            kind = torch.bool if name == "is_word" else torch.float32
            assert value.device.type == "cuda" and value.dtype == kind, name
        with pytest.raises(DataDependentOutputException):
            terms["total"].item()  # so a hidden synchronisation would have been noticed


def fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cuda:0")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "method, protocol",
    [
        ("code", "thesis"),
        ("maskclip", "thesis"),
        ("code", "training-free"),
        ("sclip", "training-free"),
        ("clearclip", "training-free"),
        ("naclip", "training-free"),
    ],
)
def test_a_window_on_a_fake_gpu(precision, method, protocol, fake_cuda):
    model = random_model()
    kind, of = (
        (Segmenter, MaskConfig) if protocol == "thesis" else (TrainingFree, TrainingFreeConfig)
    )
    config = of(window=32, stride=16, short_side=32, precision=precision, method=method)
    words = ["kite", "bug, beetle"]
    segmenter = kind(model.clip, model if method == "code" else None, words, config)
    with fake_cuda():
        on_gpu(model)
        segmenter.device = torch.device("cuda", 0)
        for name, value in vars(segmenter).items():
            if isinstance(value, torch.Tensor):
                setattr(segmenter, name, fake(value))
        scores = segmenter.scores(Image.new("RGB", (48, 40))).classes
        assert scores.device.type == "cuda" and scores.dtype == torch.float32
        assert scores.shape == ((2, 32, 38) if protocol == "thesis" else (2, 40, 48))
