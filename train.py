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
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    check_clip,
    load_learned,
    model_content,
    places_to_go_on,
    read_run,
    save_atomically,
    save_run,
)
from clip import load_clip
from config import (
    MASK_PRESETS,
    TRAIN_PRESETS,
    EvalConfig,
    LossConfig,
    MaskConfig,
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
from evaluate import evaluate, load_benchmark, make_segmenter
from log import Log
from losses import code_losses, local_rows
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
    shards = Shards(config.shards)
    if shards.missing and process_rank() == 0:
        print(f"{len(shards.paths)} shards found, {shards.missing} of the named ones are missing")
    return shards, nltk_tagger()


def check_options(config: TrainConfig, loss_config: LossConfig) -> None:
    """What the dataclasses cannot say. Raises UserError."""
    if config.preset not in TRAIN_PRESETS:
        raise UserError(f"--preset {config.preset}: not one of {', '.join(TRAIN_PRESETS)}")
    if loss_config.pseudo_labels not in ("thesis", "release"):
        raise UserError(f"--pseudo-labels {loss_config.pseudo_labels}: 'thesis' or 'release'")
    sources = {"--pairs": config.pairs, "--preset shapes": config.preset == "shapes"}
    sources["--shards"] = config.shards != TrainConfig().shards
    if len(asked := [name for name, given in sources.items() if given]) > 1:
        raise UserError(f"{asked[0]} and {asked[1]} are two sources of pairs: give one of them")
    if config.batch_size % process_count():
        raise UserError(
            f"--batch-size {config.batch_size}: must be a multiple of the {process_count()} "
            "processes that share it"
        )
    if not config.resume and (Path(config.out) / "last.pt").exists():
        raise UserError(
            f"{config.out} holds a run: --resume goes on with it, or name another --out"
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

    out = Path(config.out)
    content = read_run(out / "last.pt", config, model_config, loss_config) if config.resume else {}
    if config.eval_dataset:
        try:
            load_benchmark(config.eval_dataset, config.eval_root)  # not after an hour
        except UserError as error:
            text = str(error).replace("--root", "--eval-root")
            raise UserError(text.replace("--dataset", "--eval-dataset")) from None

    torch.manual_seed(config.seed)
    model = CoDe(load_clip(model_config.clip, model_config.clip_weights), model_config).to(device)
    optimizer = make_optimizer(model, config)
    step, best, places, turn = 0, -1.0, {}, 0
    if content:
        check_clip(content, model, out / "last.pt")
        load_learned(model, content["model"], out / "last.pt")
        optimizer.load_state_dict(content["optimizer"])
        step, best = content["step"], content["best"]
        places, turn = places_to_go_on(content, config.workers)
        if main_process and places != content["places"]:
            before, now = content["processes"], process_count()
            print(f"{before} processes before, {now} now, or other workers: next pass of data")
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
        start=places,
        turn=turn,
    )
    if main_process:
        configs = {"train": config, "model": model_config, "loss": loss_config}
        configs = {name: asdict(value) for name, value in configs.items()}
        save_text(json.dumps(configs, indent=1), out / "config.json")

    # bfloat16 where the GPU has it, float16 with loss scaling on older ones, float32 on CPU.
    on_gpu = device.type == "cuda"
    half = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float16
    autocast = torch.autocast(device.type, half, enabled=on_gpu)
    scaler = make_scaler(device, scaled=on_gpu and half is torch.float16)
    if content:
        scaler.load_state_dict(content["scaler"])

    # Clusters preempt with SIGTERM: finish the step, save, and leave in good order.
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.append(number))

    unfreeze_step = round(config.unfreeze * config.steps)
    finer = 2**model_config.upsampling_blocks  # the mask grid against the patch grid
    grid = tuple(finer * side for side in model.clip.visual.grid_size)
    loader = iter(make_loader(stream, config.workers, pin_memory=on_gpu))
    log = Log(out, config, step) if main_process else None
    learned = [p for name, p in model.named_parameters() if not name.startswith("clip.")]
    ddp, bad_step, bad_terms = (
        None,
        torch.tensor(-1, device=device),
        torch.tensor(False, device=device),
    )
    waited, skipped = 0.0, collections.Counter()
    model.train()

    while step < config.steps:
        # Two phases: the copy of the last visual block joins in the second.
        if ddp is None or step == unfreeze_step:
            model.image_segmenter.block.requires_grad_(step >= unfreeze_step)
            ddp = DistributedDataParallel(model) if process_count() > 1 else model
            ddp = torch.compile(ddp) if config.compile else ddp
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)

        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        if isinstance(batch, UserError):
            raise batch
        reader, *place = batch.position
        places[reader], turn = tuple(place), (turn + 1) % max(1, config.workers)
        skipped += batch.skipped
        batch = batch.to(device)

        with autocast:
            decomposition = ddp(batch, logistic_noise(batch, grid, config.seed, step))
        tokens, labels = batch.caption_tokens, batch.noun_labels
        terms = code_losses(decomposition, model, tokens, labels, loss_config)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(terms["total"]).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(learned, config.max_grad_norm)
        scaler.step(optimizer)  # leaves the weights alone if a gradient is not finite
        scaler.update()
        # No value is read from the device in a step: that would wait for all of its work.
        unsound = ~torch.isfinite(torch.stack(list(terms.values())))
        first = (bad_step < 0) & unsound[0]
        bad_step = torch.where(first, step, bad_step)
        bad_terms = torch.where(first, unsound, bad_terms)
        step += 1

        last = step == config.steps
        talk = step % config.log_every == 0 or last
        stop = agreed(bool(stopping), device) if talk or process_count() == 1 else False
        if talk or stop:
            if bad_step.item() >= 0:
                names = [name for name, bad in zip(terms, bad_terms.tolist()) if bad]
                raise UserError(
                    f"step {bad_step.item()}: {', '.join(names)} not finite; the weights were not "
                    f"changed by it; --resume goes on from {out}/last.pt if there is one"
                )
            if log:
                rate = learning_rate(step - 1, config)
                log.write(step, rate, model, terms, norm, decomposition, waited, skipped)
            waited = 0.0
        due = step % config.checkpoint_every == 0 or last or stop
        if config.eval_dataset and (step % config.eval_every == 0 or last):
            reached, due = evaluate_model(model, config, device), True
            if reached > best and main_process:
                save_atomically(model_content(model) | {"mIoU": reached}, out / "best.pt")
            best = max(best, reached)
        if due:
            state = (model, optimizer, scaler, step, best, places, turn)
            save_run(out / "last.pt", *state, config, loss_config)
        if stop:
            break
    if log:
        log.close()
        print(f"{out}/last.pt: step {step} of {config.steps}")
    stop_processes()


def make_scaler(device: torch.device, scaled: bool) -> torch.amp.GradScaler:
    """Loss scaling for float16. Elsewhere a scale that starts at 1 and never grows, for what else
    the scaler does: an update with a gradient that is not finite is left out."""
    if scaled:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


def agreed(stop: bool, device: torch.device) -> bool:
    """Whether any process was told to stop: all must leave at the same step."""
    if process_count() == 1:
        return stop
    flag = torch.tensor(int(stop), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def evaluate_model(model: CoDe, config: TrainConfig, device: torch.device) -> float:
    """mIoU on --eval-dataset, the images being shared by all processes."""
    settings = MaskConfig(**MASK_PRESETS.get(config.eval_dataset, {}))
    limited = EvalConfig(config.eval_dataset, limit=config.eval_limit)
    benchmark = load_benchmark(config.eval_dataset, config.eval_root)
    model.eval()
    segmenter = make_segmenter(model.clip, model, benchmark, settings)
    figures = evaluate(segmenter, benchmark, limited, device)
    model.train()
    return figures["mIoU"]


if __name__ == "__main__":
    run(main)
