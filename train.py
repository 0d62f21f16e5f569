"""Train CoDe (section 3.5) from pairs of image and caption.

Examples:
    python train.py --preset shapes                     # the built-in world, no download
    python train.py --pairs DIR                         # images with same-named .txt captions
    torchrun --nproc_per_node=4 train.py --pairs DIR    # the same on four GPUs
"""

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    Run,
    model_content,
    read_checkpoint,
    resume_run,
    save_checkpoint,
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
    given_options,
    parse,
    run_script,
    settle,
)
from data import Batch, PairStream, make_loader, nltk_tagger, open_source, shapes_tagger
from datasets import load_benchmark
from evaluate import Segmenter, benchmark_words, check_world, evaluate
from losses import code_loss
from model import CoDe
from support.device import (
    autocast,
    choose_device,
    choose_precision,
    enough_memory,
    make_scaler,
    update_scale,
)
from support.distributed import (
    any_process,
    end_workers,
    first_process_first,
    lost_processes,
    process_count,
    process_rank,
    start_processes,
    stop_processes,
    stop_signals,
)
from support.files import save_text
from support.log import Log

# --- what a step is made of -----------------------------------------------------------------------


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up from 1e-4 of the peak, then a cosine down to `final_lr` of it."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (1e-4 + (1 - 1e-4) * step / warmup)
    done = (step - warmup) / max(1, config.steps - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
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


def logistic_noise(model: CoDe, batch: Batch, seed: int, step: int) -> Tensor:
    """Noise of the Gumbel-sigmoid for the hard masks of this process's batch: (J, b, H, W).

    It is drawn for the global batch from the seed and the step, so that it depends neither on how
    many processes share the batch nor on whether the run was interrupted before this step.
    """
    pairs, device = len(batch.images), model.context.device
    nouns = len(batch.noun_tokens) // pairs
    grid = [model.config.cells_per_patch * side for side in model.clip.visual.grid_size]
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
    shape = (nouns, pairs * process_count(), *grid)
    uniform = torch.rand(shape, generator=generator, device=device).clamp(1e-6, 1 - 1e-6)
    return torch.logit(uniform).chunk(process_count(), dim=1)[process_rank()]


def evaluate_model(model: CoDe, config: TrainConfig) -> float:
    """mIoU on --eval-dataset, the images being shared by all processes."""
    settings = MaskConfig(**MASK_PRESETS.get(config.eval_dataset, {}))
    limited = EvalConfig(config.eval_dataset, limit=config.eval_limit)
    benchmark = load_benchmark(config.eval_dataset, config.eval_root)
    model.eval()
    words = benchmark_words(benchmark, settings)
    metrics = evaluate(Segmenter(model.clip, model, words, settings), benchmark, limited)
    model.train()
    if metrics["mIoU"] is None:
        raise UserError(f"--eval-dataset {config.eval_dataset}: no pixel is labelled")
    return metrics["mIoU"]


# --- the run --------------------------------------------------------------------------------------


def check_options(config: TrainConfig, model_config: ModelConfig, loss_config: LossConfig) -> None:
    """What the dataclasses cannot say. Raises UserError."""
    if config.preset not in TRAIN_PRESETS:
        raise UserError(f"--preset {config.preset}: not one of {', '.join(TRAIN_PRESETS)}")
    if loss_config.pseudo_labels not in ("thesis", "release"):
        raise UserError(f"--pseudo-labels {loss_config.pseudo_labels}: 'thesis' or 'release'")
    if model_config.text_attention not in ("words", "all"):
        raise UserError(f"--text-attention {model_config.text_attention}: 'words' or 'all'")
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
    if beyond := [step for step in config.keep_steps if not 1 <= step <= config.steps]:
        raise UserError(f"--keep-steps {beyond[0]}: not among the {config.steps} steps of the run")
    if config.eval_dataset:
        try:
            load_benchmark(config.eval_dataset, config.eval_root)  # told now, not after an hour
        except UserError as error:
            text = str(error).replace("--root", "--eval-root")
            raise UserError(text.replace("--dataset", "--eval-dataset")) from None


def main() -> None:
    config, model_config, loss_config = parse(
        __doc__, TrainConfig, ModelConfig, LossConfig, presets=TRAIN_PRESETS
    )
    settle(model_config, loss_config, given_options())
    stopping = stop_signals()
    device = choose_device(config.device)
    start_processes(device, config.timeout)
    check_options(config, model_config, loss_config)
    precision = choose_precision(config.precision, device)
    source = open_source(config)
    torch.manual_seed(config.seed)
    with first_process_first():  # which fetches NLTK's data and CLIP's weights
        tagger = shapes_tagger() if config.preset == "shapes" else nltk_tagger()
        clip = load_clip(model_config.clip, model_config.clip_weights)
    if config.eval_dataset:
        check_world(clip, [config.eval_dataset], f"--clip {model_config.clip}", "--eval-dataset")

    model = CoDe(clip, model_config).to(device)
    parts = (make_optimizer(model, config), make_scaler(device, precision))
    data = zlib.crc32("\n".join(source.names).encode(errors="surrogateescape"))
    run = Run(model, *parts, config, loss_config, precision, data=data)
    if config.resume:
        resume_run(run, Path(config.out, "last.pt"))
        best = Path(config.out, "best.pt")  # a kill may have come between it and last.pt
        if best.exists():
            run.best = max(run.best, read_checkpoint(best).get("mIoU", -1.0))
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
        with_released_labels=loss_config.pseudo_labels == "release",
        start=run.offsets,
        next_worker=run.next_worker,
    )
    if process_rank() == 0:
        configs = {"train": config, "model": model_config, "loss": loss_config}
        configs = {name: asdict(value) for name, value in configs.items()}
        save_text(json.dumps(configs, indent=1), Path(config.out, "config.json"))
    smaller = "a smaller --batch-size, or more processes that share it"
    fewer = (
        "often memory or shared memory ran out; fewer --workers need less, --workers 0 no shared "
        f"memory; --resume goes on from {config.out}/last.pt if there is one"
    )
    try:
        with enough_memory(smaller), lost_processes(fewer):
            train(run, make_loader(stream, config.workers, device.type == "cuda"), stopping)
    finally:
        end_workers()
    stop_processes()


def train(run: Run, loader: Iterable[Batch | UserError], stopping: Sequence[float] = ()) -> None:
    """The loop of section 3.5, from `run.step` to the last step or until a signal asks to stop."""
    model, optimizer, scaler, config = run.model, run.optimizer, run.scaler, run.config
    out, device, batches = Path(config.out), model.context.device, iter(loader)
    learned = [p for name, p in model.named_parameters() if not name.startswith("clip.")]
    unfreeze_step = round(config.unfreeze * config.steps)
    log, ddp = Log(out, config, run.step, writes=process_rank() == 0), None
    model.train()

    def every(steps: int) -> bool:
        return run.step % steps == 0 or run.step == config.steps

    while run.step < config.steps:
        # Two phases: the copy of the last visual block joins in the second.
        if ddp is None or run.step == unfreeze_step:
            model.image_segmenter.block.requires_grad_(run.step >= unfreeze_step)
            ddp = model
            if process_count() > 1:  # CLIP's buffers are constant: nothing to broadcast
                ddp = DistributedDataParallel(model, broadcast_buffers=False)
        rate = learning_rate(run.step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate

        batch = log.wait_for(batches)
        run.follow(batch.position)
        batch = batch.to(device)
        noise = logistic_noise(model, batch, config.seed, run.step)
        with autocast(device, run.precision):
            d = ddp(batch, noise)
        terms = code_loss(d, model, run.loss_config, batch.noun_labels)  # Eq. 3.8
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(terms["total"]).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(learned, config.max_grad_norm)
        scaler.step(optimizer)  # leaves the weights alone if a gradient is not finite
        update_scale(scaler, device, run.precision)
        log.record(terms, norm)
        run.step += 1

        stop = any_process(bool(stopping))
        evaluates = config.eval_dataset is not None and every(config.eval_every)
        if every(config.log_every) or stop:
            more = {"grad_norm": norm, "mask_area": d.soft_v.mean()}
            more |= {f"{k}_temperature": 1 / scale for k, scale in model.logit_scales().items()}
            log.write(run.step, rate, terms, more)
        if run.step in config.keep_steps and process_rank() == 0:  # again, if killed before last.pt
            save_checkpoint(model_content(model), out / f"step-{run.step}.pt")
        if every(config.checkpoint_every) or evaluates or stop:
            save_run(run, out / "last.pt")
        if evaluates:  # after saving: whatever happens in it, the steps are kept
            reached = evaluate_model(model, config)
            if reached > run.best and process_rank() == 0:
                save_checkpoint(model_content(model) | {"mIoU": reached}, out / "best.pt")
            run.best = max(run.best, reached)
            save_run(run, out / "last.pt")
        if stop:
            break
    log.close()
    if process_rank() == 0:
        print(f"{out}/last.pt: step {run.step} of {config.steps}")


if __name__ == "__main__":
    run_script(main)
