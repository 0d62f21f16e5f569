"""On a real GPU: precisions, processes, windows and resuming. Without one all of it skips."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import CPU, free_port, random_model, some_batch
from PIL import Image
from runs import TINY, log, preempt, to_launcher, train

from config import LossConfig, MaskConfig
from evaluate import Segmenter
from losses import code_loss
from pamr import pamr
from support.device import autocast, choose_device
from training_free import TrainingFree, TrainingFreeConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(autouse=True)
def exact_float32():
    """Matrix products in float32, not in TF32, to compare them with the CPU's."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def step(device: torch.device, precision: torch.dtype) -> tuple[dict, dict]:
    """Loss terms and gradients of one step without noise, on the CPU."""
    model = random_model().to(device)
    batch = some_batch(random_model()).to(device)
    with autocast(device, precision):
        decomposition = model(batch)
    terms = code_loss(decomposition, model, LossConfig(), batch.noun_labels)
    terms["total"].backward()
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in terms.items()}, gradients


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_in_each_precision_against_the_cpus(precision):
    if precision == torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        pytest.skip("this GPU does not compute in bfloat16")
    (want, exact), (got, gradients) = (
        step(CPU, torch.float32),
        step(choose_device("cuda"), precision),
    )
    full = precision == torch.float32
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-4 if full else 0.02, abs=1e-4), name
    for name, value in exact.items():
        difference = (gradients[name] - value).abs().max() / value.abs().max().clamp(min=1e-9)
        assert torch.isfinite(gradients[name]).all() and (not full or difference < 1e-2), name


def gathered(rank: int, port: int, path: str) -> None:
    """Two processes on one GPU: gloo carries tensors of a GPU, NCCL wants a GPU for each."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    device = choose_device("cuda:0")
    model = random_model().to(device)
    captions = ["a red kite and a ball", "a tiny bug near a house"] * 2
    nouns = [("kite", "ball"), ("bug", "house")] * 2
    mine = slice(2 * rank, 2 * rank + 2)
    batch = some_batch(random_model(), captions[mine], nouns[mine]).to(device)
    terms = code_loss(model(batch), model, LossConfig(), batch.noun_labels)
    terms["total"].backward()
    if rank == 0:
        torch.save({name: value.item() for name, value in terms.items()}, path)
    dist.destroy_process_group()


def test_processes_that_share_a_gpu_have_the_losses_of_one(tmp_path):
    path = str(tmp_path / "terms.pt")
    mp.spawn(gathered, (free_port(), path), nprocs=2)
    device = choose_device("cuda")
    model = random_model().to(device)
    captions = ["a red kite and a ball", "a tiny bug near a house"] * 2
    nouns = [("kite", "ball"), ("bug", "house")] * 2
    batch = some_batch(random_model(), captions, nouns)
    images = some_batch(random_model(), captions[:2], nouns[:2]).images
    batch.images = torch.cat([images, images])  # both processes drew the same
    batch = batch.to(device)
    terms = code_loss(model(batch), model, LossConfig(), batch.noun_labels)
    for name, value in torch.load(path).items():
        assert value == pytest.approx(terms[name].item(), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("method, protocol", [("code", "thesis"), ("naclip", "training-free")])
def test_windows_and_refinement_against_the_cpus(method, protocol):
    torch.manual_seed(0)
    image, masks = torch.rand(1, 3, 60, 80), torch.rand(1, 5, 60, 80)
    assert torch.allclose(pamr(image, masks), pamr(image.cuda(), masks.cuda()).cpu(), atol=1e-4)
    kind, of = (
        (Segmenter, MaskConfig) if protocol == "thesis" else (TrainingFree, TrainingFreeConfig)
    )
    config = of(window=32, stride=16, short_side=40, method=method)
    picture = Image.radial_gradient("L").convert("RGB").resize((90, 70))
    scores = []
    for device in (CPU, choose_device("cuda")):
        model = random_model().to(device)
        trained = model if method == "code" else None
        segmenter = kind(model.clip, trained, ["kite", "bug"], config)
        scores.append(segmenter.scores(picture).classes.cpu())
    assert torch.allclose(*scores, atol=1e-4)


def test_training_and_resuming(tmp_path):
    """On a GPU sums may come in another order: close, not bit for bit."""
    options = (*TINY, "--steps", "40", "--workers", "1", "--device", "cuda")
    train(*options, "--out", tmp_path / "whole", "--precision", "float32")
    options += ("--precision", "float32")
    preempt(tmp_path / "parts", options, (3,), to_launcher)
    train(*options, "--out", tmp_path / "parts", "--resume")
    whole, parts = (log(tmp_path / name) for name in ("whole", "parts"))
    assert [line["step"] for line in parts] == [line["step"] for line in whole]
    for a, b in zip(whole[:10], parts[:10]):
        assert a["total"] == pytest.approx(b["total"], rel=1e-3)
