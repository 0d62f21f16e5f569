"""Train CoDe (section 3.5) from pairs of image and caption.

Examples:
    python train.py --preset shapes                     # the built-in world, no download
    python train.py --pairs DIR                         # pictures with same-named .txt captions
    torchrun --nproc_per_node=4 train.py --pairs DIR    # the same on four GPUs
"""

import collections
import json
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import load_learned, model_content, read_checkpoint, save_atomically
from clip import load_clip
from config import (
    TRAIN_PRESETS,
    LossConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    choose_device,
    parse,
    process_count,
    process_rank,
    run,
    save_text,
    start_processes,
    stop_processes,
)
from data import Batch, PairStream, Tagger, make_loader, nltk_tagger, shapes_tagger
from losses import capped_scale, code_losses, local_rows
from model import CoDe
from sources import Folder, ShapesWorld, Shards


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up from 1e-4 of the peak, then a cosine down to `final_lr` of it."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (1e-4 + (1 - 1e-4) * step / warmup)
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * (
        config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2
    )


def make_optimizer(model: CoDe, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over everything learned; weight decay on matrices and kernels only."""
    learned = [(name, p) for name, p in model.named_parameters() if not name.startswith("clip.")]
    prompts = ("context", "region_prompt", "word_prompt")
    decayed = [p for name, p in learned if p.ndim > 1 and name not in prompts]
    plain = [p for name, p in learned if p.ndim <= 1 or name in prompts]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain}]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, fused=fused
    )


def logistic_noise(batch: Batch, grid: tuple[int, int], seed: int, step: int) -> Tensor:
    """Noise of the Gumbel-sigmoid for this process's triplets: (J*b, *grid).

    It is drawn for the global batch from the seed and the step, so that it depends neither on how
    many processes share the batch nor on whether the run was interrupted before this step.
    """
    device, pairs = batch.images.device, len(batch.images)
    nouns = len(batch.noun_tokens) // pairs
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
    shape = (nouns, pairs * process_count(), *grid)
    uniform = torch.rand(shape, generator=generator, device=device).clamp(1e-6, 1 - 1e-6)
    return torch.logit(uniform)[:, local_rows(pairs, device)].flatten(0, 1)


def open_source(config: TrainConfig) -> tuple[Folder | ShapesWorld | Shards, Tagger]:
    """The pairs that the options ask for, and the tagger of their nouns. Raises UserError."""
    if config.pairs is not None:
        return Folder(config.pairs), nltk_tagger()
    if config.preset == "shapes":
        return ShapesWorld(5000), shapes_tagger()
    return Shards(config.shards), nltk_tagger()


def check_options(config: TrainConfig, loss_config: LossConfig) -> None:
    """What the dataclasses cannot say. Raises UserError."""
    if config.preset not in TRAIN_PRESETS:
        raise UserError(f"--preset {config.preset}: not one of {', '.join(TRAIN_PRESETS)}")
    if loss_config.pseudo_labels not in ("thesis", "release"):
        raise UserError(f"--pseudo-labels {loss_config.pseudo_labels}: 'thesis' or 'release'")
    if config.batch_size % process_count() or config.batch_size < 2:
        raise UserError(
            f"--batch-size {config.batch_size}: must be at least 2 and a multiple of the "
            f"{process_count()} processes that share it"
        )


def main() -> None:
    config, model_config, loss_config = parse(
        __doc__, TrainConfig, ModelConfig, LossConfig, presets=TRAIN_PRESETS
    )
    device = choose_device(config.device)
    start_processes(device)
    main_process = process_rank() == 0
    check_options(config, loss_config)
    source, tagger = open_source(config)

    torch.manual_seed(config.seed)
    model = CoDe(load_clip(model_config.clip, model_config.clip_weights), model_config).to(device)
    optimizer = make_optimizer(model, config)
    out, step, start = Path(config.out), 0, {}
    if config.resume:
        step, start = resume(model, optimizer, out / "last.pt", config, model_config, loss_config)
    stream = PairStream(
        source,
        tagger,
        pairs=config.batch_size // process_count(),
        nouns=config.nouns,
        context_length=len(model.context),
        size=model.clip.visual.image_size[0],
        min_crop=config.min_crop,
        seed=config.seed,
        rank=process_rank(),
        processes=process_count(),
        **start,
    )
    if main_process:
        configs = {
            "train": asdict(config),
            "model": asdict(model_config),
            "loss": asdict(loss_config),
        }
        save_text(json.dumps(configs, indent=1), out / "config.json")

    # bfloat16 where the GPU has it, float16 with loss scaling on older ones, float32 on CPU.
    half = (
        torch.bfloat16
        if device.type == "cuda" and torch.cuda.is_bf16_supported()
        else torch.float16
    )
    autocast = torch.autocast(device.type, half, enabled=device.type == "cuda")
    scaler = torch.amp.GradScaler(enabled=device.type == "cuda" and half is torch.float16)

    # Clusters preempt with SIGTERM: finish the step, save, and leave in good order.
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.append(number))

    unfreeze_step = round(config.unfreeze * config.steps)
    grid = tuple(4 * side for side in model.clip.visual.grid_size)
    positions, skipped = dict(stream.start), collections.Counter()
    ddp = None
    loader = iter(make_loader(stream, config.workers, pin_memory=device.type == "cuda"))
    bar = tqdm(
        total=config.steps, initial=step, desc="training", disable=not main_process, file=sys.stderr
    )
    model.train()
    learned = [p for name, p in model.named_parameters() if not name.startswith("clip.")]
    tick, waited = time.perf_counter(), 0.0

    while step < config.steps and not stopping:
        # Two phases: the copy of the last visual block joins in the second.
        if ddp is None or step == unfreeze_step:
            model.image_segmenter.block.requires_grad_(step >= unfreeze_step)
            ddp = DistributedDataParallel(model) if process_count() > 1 else model
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)

        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        if isinstance(batch, UserError):
            raise batch
        reader, *place = batch.position
        positions[reader] = tuple(place)
        skipped += batch.skipped
        batch = batch.to(device)

        with autocast:
            decomposition = ddp(batch, logistic_noise(batch, grid, config.seed, step))
        terms = code_losses(
            decomposition, model, batch.caption_tokens, batch.noun_labels, loss_config
        )
        if not torch.isfinite(terms["total"]):
            bad = [name for name, value in terms.items() if not torch.isfinite(value)]
            raise UserError(
                f"step {step}: {', '.join(bad)} not finite; {out}/last.pt is from before"
            )
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(terms["total"]).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(learned, config.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        step += 1
        bar.update()

        if step % config.log_every == 0 and main_process:
            seconds = time.perf_counter() - tick
            line = {"step": step, "lr": learning_rate(step - 1, config)}
            line |= {name: value.item() for name, value in terms.items()}
            line |= {
                "grad_norm": norm.item(),
                "mask_area": decomposition.masks.mean().item(),
                "pairs_per_second": config.log_every * config.batch_size / seconds,
                "data_wait": waited / seconds,
                "skipped": dict(skipped),
            }
            scales = [name for name, _ in model.named_parameters() if name.endswith("_log_scale")]
            line |= {
                name.replace("log_scale", "temperature"): 1
                / capped_scale(getattr(model, name)).item()
                for name in scales
            }
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            bar.set_postfix(
                loss=f"{line['total']:.3f}", lr=f"{line['lr']:.1e}", wait=f"{line['data_wait']:.0%}"
            )
            tick, waited = time.perf_counter(), 0.0
        if step % config.checkpoint_every == 0 or step == config.steps:
            save(model, optimizer, step, positions, out, config, loss_config)
    if stopping:
        save(model, optimizer, step, positions, out, config, loss_config)
    bar.close()
    if main_process:
        print(f"{out}/last.pt: step {step} of {config.steps}")
    stop_processes()


def save(
    model: CoDe,
    optimizer: torch.optim.Optimizer,
    step: int,
    positions: dict[int, tuple[int, int]],
    out: Path,
    config: TrainConfig,
    loss_config: LossConfig,
) -> None:
    """Write last.pt, everything needed to go on; process 0 gathers all readers' positions."""
    if process_count() > 1:
        parts = [None] * process_count()
        dist.all_gather_object(parts, positions)
        positions = {reader: place for part in parts for reader, place in part.items()}
        if process_rank() > 0:
            return
    content = model_content(model) | {
        "optimizer": optimizer.state_dict(),
        "step": step,
        "positions": positions,
        "train_config": asdict(config),
        "loss_config": asdict(loss_config),
    }
    save_atomically(content, out / "last.pt")


def resume(
    model: CoDe,
    optimizer: torch.optim.Optimizer,
    path: Path,
    config: TrainConfig,
    model_config: ModelConfig,
    loss_config: LossConfig,
) -> tuple[int, dict]:
    """Load last.pt; returns the step and where the data goes on. Refuses another configuration."""
    content = read_checkpoint(path)
    free = ("out", "device", "log_every", "checkpoint_every", "resume")
    pairs = [
        (content["train_config"], asdict(config)),
        (content["model_config"], asdict(model_config)),
        (content["loss_config"], asdict(loss_config)),
    ]
    differing = [
        f"{name} was {old.get(name)}, is {value}"
        for old, new in pairs
        for name, value in new.items()
        if name not in free and old.get(name) != value
    ]
    if differing:
        raise UserError(f"--resume: {path} is of another configuration: {'; '.join(differing)}")
    load_learned(model, content["model"], path)
    optimizer.load_state_dict(content["optimizer"])
    step, workers = content["step"], max(1, config.workers)
    return step, {"start": content["positions"], "turn": step % workers}


if __name__ == "__main__":
    run(main)
