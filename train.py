"""One loop for every stage (paper Sec. 3.4 and 4.1).

    python train.py vqgan  --preset tiny --out runs/vqgan
    python train.py text   --preset tiny --out runs/text
    python train.py stage1 --preset tiny --out runs/stage1 --vqgan runs/vqgan --language runs/text
    python train.py stage2 --preset tiny --out runs/stage2 --init runs/stage1
    python train.py stage3 --preset cascade --out runs/stage2/stage3 --init runs/stage2 --vqgan runs/cascade
    python train.py joint  --preset tiny --out runs/joint  --init runs/stage2        (Sec. 4.6: text and pictures)
    python train.py all    --preset nano --out runs/nano      (those that the preset has, in a row)
    torchrun --nproc_per_node=8 train.py stage1 ...           (see distributed.py)

Shapes: B batch, T tokens.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import pickle
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from checkpoint import fingerprint, one_line_errors, write_beside
from distributed import Ranks, load_whole_state, start, stop, whole_state
from generate import TINY
from mars import MARSConfig
from mars import PRESETS as SIZES
from stages import STAGES, Preset, Recipe
from vqgan import VQGANConfig, VQGANTraining


# ----------------------------------------------------------------------------- the loop

def learning_rate(step: int, recipe: Recipe) -> float:
    """Not in the paper beyond "warm-up 1%": a linear rise, then a cosine down to a tenth of the peak."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def make_optimizer(trained: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Sec. 4.1: AdamW over what is trainable, and nothing else; weight decay on matrices alone, not on codebooks nor on
    the rows that `SharedRows` adds to."""
    parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    decays = {name: p.ndim >= 2 and "quantize." not in name and not name.endswith(".original")
              for name, p in parameters.items()}
    groups = [{"params": [p for name, p in parameters.items() if decays[name]], "weight_decay": recipe.weight_decay},
              {"params": [p for name, p in parameters.items() if not decays[name]], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))


def save_checkpoint(out: Path, step: int, trained: nn.Module, optimizer, ranks: Ranks, inputs: dict) -> None:
    """All that a run needs to go on, beside and renamed; the last two are kept. Raises ValueError on a full disk.

    The data of step n are drawn from the seed and n alone, so the step is the data's position.
    """
    state = {"step": step, "ranks": ranks.count, "inputs": inputs, "rng": torch.get_rng_state(),
             **whole_state(trained, optimizer)}
    if not ranks.is_first:
        return
    try:
        write_beside(out / f"checkpoint-{step:06d}.pt", lambda p: torch.save(state, p))
    except (OSError, RuntimeError) as error:                     # torch.save has its own words for a full disk
        raise ValueError(f"{out}: cannot write the checkpoint of step {step} ({str(error).splitlines()[0]}); "
                         f"the last whole one is {newest(out)}") from None
    for old in sorted(out.glob("checkpoint-*.pt"))[:-2]:
        old.unlink()


def newest(out: Path) -> str:
    """Name of the newest checkpoint, for messages."""
    return str(max(out.glob("checkpoint-*.pt"), default="none"))


def resume(out: Path, trained: nn.Module, optimizer, ranks: Ranks, inputs: dict) -> int:
    """Loads the newest whole checkpoint -> the step to go on with.

    Raises ValueError, one line, where there is none, or it is of a run that began with other `inputs`.
    """
    for path in sorted(out.glob("checkpoint-*.pt"), reverse=True):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError):
            print(f"{path} is not whole, trying the one before", file=sys.stderr)
            continue
        for name, found in inputs.items():
            if state["inputs"].get(name) != found:
                raise ValueError(f"{path}: that run began with another --{name}; expected the same folder to go on")
        load_whole_state(trained, optimizer, state)
        torch.set_rng_state(state["rng"])
        if state["ranks"] != ranks.count and ranks.is_first:
            print(f"{path}: written by {state['ranks']} processes, this run has {ranks.count}: the same batches, but "
                  "sums are added in another order, so the last digits will differ")
        return state["step"]
    raise ValueError(f"{out}: no checkpoint to resume from")


def keep_lines_before(path: Path, step: int) -> None:
    """Drops the lines of a metrics file from `step` on: a resumed run writes them again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines(keepends=True)
                 if line.endswith("\n") and json.loads(line)["step"] < step]
        write_beside(path, lambda p: p.write_text("".join(lines)))


@contextlib.contextmanager
def stop_signals():
    """A list that SIGTERM and Ctrl-C are noted in, so that a step can end; a second one acts at once."""
    came, before = [], {}

    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_for_bad_loss(loss: float, step: int, names: list[str], out: Path, ranks: Ranks) -> None:
    """Raises ValueError, one line: the step, what was in the batch, the last good checkpoint."""
    shown = ", ".join(names[:4])
    if ranks.is_first and len(names) > 4:
        write_beside(out / "bad-batch.txt", lambda p: p.write_text("\n".join(names) + "\n"))
        shown += f" and {len(names) - 4} more, all in {out / 'bad-batch.txt'}"
    raise ValueError(f"the loss is {loss} at step {step}; the last good checkpoint is {newest(out)}; "
                     f"in the batch: {shown}")


def train(args, preset: Preset) -> None:
    """One stage from its first step, or its newest checkpoint, to its last."""
    recipe, out, ranks = args.recipe, args.out, args.ranks
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0                  # torchrun --max-restarts
    held = any(out.glob("checkpoint-*.pt"))
    args.resume = args.resume or (restarted and held)
    if held and not args.resume:
        raise ValueError(f"{out}: holds an earlier run; pass --resume to go on with it, or another --out")
    torch.manual_seed(args.seed)
    stage = STAGES[args.stage](args, preset)
    stage.trained.train()
    optimizer = make_optimizer(stage.trained, recipe)
    inputs = {name: fingerprint(getattr(args, name)) for name in stage.inputs if getattr(args, name)}
    first = resume(out, stage.trained, optimizer, ranks, inputs) if args.resume else 0
    if ranks.is_first:
        keep_lines_before(out / "metrics.jsonl", first)
        count = sum(p.numel() for p in stage.trained.parameters())
        trainable = sum(p.numel() for p in stage.trained.parameters() if p.requires_grad)
        print(f"{args.stage}: {count / 1e6:.2f}M parameters, {trainable / 1e6:.2f}M of them train; {recipe}")
    log = out / "metrics.jsonl" if ranks.is_first else os.devnull
    with open(log, "a", buffering=1) as metrics, stop_signals() as signals:
        bar = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc=args.stage, mininterval=1,
                   disable=not ranks.is_first)
        for step in bar:
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            optimizer.zero_grad()
            logs, tokens, names = stage.backward(step, random.Random(f"{args.seed}/{args.stage}/{step}"))
            if not math.isfinite(logs["loss"]):
                stop_for_bad_loss(logs["loss"], step, names(), out, ranks)
            nn.utils.clip_grad_norm_([p for p in stage.trained.parameters() if p.requires_grad], recipe.clip)
            optimizer.step()
            if step == 0 and stage.uniform:
                bar.write(f"first loss {logs['loss']:.3f}; ln V = ln {stage.uniform} = {math.log(stage.uniform):.3f}")
            speed = tokens / (time.perf_counter() - started)
            if (step + 1) % args.sample_every == 0 or step + 1 == recipe.steps:
                stage.trained.eval()
                found = stage.sample(out / "samples" / f"{step + 1:06d}")
                stage.trained.train()
                logs |= found
                bar.write(f"step {step + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in logs.items()))
            metrics.write(json.dumps({"step": step, **logs, "lr": learning_rate(step, recipe),
                                      "tokens_per_s": round(speed)}) + "\n")
            bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            stopping = ranks.sum(len(signals)) > 0
            if stopping or (step + 1) % args.save_every == 0:
                save_checkpoint(out, step + 1, stage.trained, optimizer, ranks, inputs)
            if stopping:
                bar.close()
                print(f"stopped after step {step + 1} and saved; --resume goes on", file=sys.stderr)
                sys.exit(128 + max(signals, default=signal.SIGTERM))
    stage.save(out)
    ranks.wait()                                                 # the next stage of `all` reads what the first wrote
    if ranks.is_first:
        print(f"{args.stage}: wrote {out}")


# ----------------------------------------------------------------------------- presets and the command line

def small(width: int, layers: int, heads: int) -> MARSConfig:
    """Not in the paper: a Qwen of toy sizes; its feed-forward width is Qwen-7B's 2.69 times the width."""
    return MARSConfig(width=width, heads=heads, kv_heads=heads, ffn_width=round(width * 2.6875 / 16) * 16,
                      layers=layers, context=512, text_vocab=1024)


CELLS = dict(hidden_channels=16, channel_mult=(1, 1, 1, 1, 2), num_res_blocks=1, attn_resolutions=(), z_channels=768,
             patches=True)        # a codec whose code sees its own 16 x 16 pixels, and no others

PRESETS = {
    "qwen": Preset(     # the paper's: 200 million pairs once, 50 million twice, 4,096 a step; 10 million triplets once
        language=SIZES["qwen-7b"], codec=VQGANConfig(), codec_training=VQGANTraining(),
        recipes={"stage1": Recipe(48_000, 4096, 1e-4), "stage2": Recipe(24_000, 4096, 1e-4),
                 "stage3": Recipe(6_500, 1536, 1e-4)},
        pictures=60_000, look_alike=False, long_side=1024),
    "tiny": Preset(
        language=small(160, 4, 5),
        codec=VQGANConfig(**CELLS, resolution=96, num_embeddings=2304, quantized_embed_dim=96),
        codec_training=VQGANTraining(gan=0.0, foreground=4.0, ema=0.9),
        recipes={"vqgan": Recipe(150, 64, 3e-5), "text": Recipe(3000, 16, 2.5e-3), "stage1": Recipe(12_000, 32, 2e-3),
                 "stage2": Recipe(8000, 32, 1.5e-3, compete=1 / 4), "joint": Recipe(1500, 16, 1e-3)},
        pictures=60_000, caption_share=0.3, curriculum=0.15),
    "cascade": Preset(                   # Stage III of tiny: twice as long sides, whose cells need more codes
        language=None,                   # goes on from tiny's
        codec=VQGANConfig(**CELLS, resolution=96, num_embeddings=8192, quantized_embed_dim=192),
        codec_training=VQGANTraining(gan=0.0, foreground=4.0, ema=0.9), frames=((6, 6, 32), (12, 12, 16)),
        recipes={"vqgan": Recipe(150, 32, 3e-5), "stage3": Recipe(8000, 8, 1.5e-3)},
        pictures=24_000, ahead=16),
    "nano": Preset(
        language=small(128, 4, 4),
        codec=VQGANConfig(**CELLS, resolution=64, num_embeddings=2304, quantized_embed_dim=96),
        codec_training=VQGANTraining(gan=0.0, foreground=4.0, ema=0.9),
        recipes={"vqgan": Recipe(150, 64, 3e-5), "text": Recipe(1200, 16, 3e-3), "stage1": Recipe(10_500, 32, 2e-3)},
        pictures=10_000, things=1, frames=((4, 4, 16),), row=128, caption_share=0.15),
}


USED_BY = {"vqgan": ("stage1", "stage3"), "language": ("stage1",), "init": ("stage2", "stage3", "joint"),
           "ahead": ("stage1", "stage3"), "corruption": ("stage3",), "without_experts": ("stage1",),
           "route_output": ("stage1",), "caption_share": ("stage1", "stage2"),
           "english": ("stage1", "stage2", "stage3"), "skip_bad": ("stage1", "stage2", "stage3"),
           "save_bf16": ("stage1", "stage2", "stage3", "joint"),
           "micro_batch": ("text", "stage1", "stage2", "stage3", "joint"),
           "checkpoint_activations": ("text", "stage1", "stage2", "stage3", "joint")}    # flags not of every stage


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains one stage of MARS.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes and recipes, at the end of train.py")
    parser.add_argument("--data", default="world", help='"world", or a folder of images with metadata.jsonl')
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, checkpoints, metrics and samples")
    parser.add_argument("--vqgan", metavar="DIR", help="stage1: the codec; stage3: another one than in --init")
    parser.add_argument("--language", default=TINY, metavar="DIR", help="stage1: the language model and its tokenizer")
    parser.add_argument("--init", default=TINY, metavar="DIR",
                        help="stage2, stage3, joint: the stage before, or an earlier run of this one")
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--batch", type=int, help="instead of the preset's")
    parser.add_argument("--lr", type=float, help="instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints")
    parser.add_argument("--sample-every", type=int, default=500, metavar="N", help="steps between sample grids")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--ahead", type=int, metavar="K", help="Eq. 2: codes a pass; default: 1, stage3: the preset's")
    parser.add_argument("--corruption", type=float, default=0.05, help="stage3: share of wrong codes in the small")
    parser.add_argument("--without-experts", action="store_true", help="Table 3: no visual experts, and all trains")
    parser.add_argument("--route-output", action="store_true", help="Eq. 3: a W_O of its own for the visual side")
    parser.add_argument("--caption-share", type=float, help="of pairs used for captioning; default: the preset's")
    parser.add_argument("--english", type=int, default=1, metavar="N",
                        help="rendered world: English captions for each Chinese one")
    parser.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be read, and list them")
    parser.add_argument("--device", default="cpu", help="cuda: with torchrun, each process takes a GPU of its own")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on the CPU")
    parser.add_argument("--save-bf16", action="store_true", help="half as large files; default: as what came before")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="rows in one pass of one process; default: all")
    parser.add_argument("--checkpoint-activations", action="store_true", help="compute blocks twice, store them once")
    parser.add_argument("--shard", action="store_true", help="under torchrun: shard all over the GPUs, as ZeRO-3 does")
    args = parser.parse_args(arguments)
    if args.data != "world" and args.english != 1:
        parser.error(f"--english is of the rendered world's captions, not of --data {args.data}")
    args.precision = args.precision or ("bf16" if args.device.startswith("cuda") else "fp32")
    if not 0 <= args.corruption <= 1:
        parser.error(f"--corruption is {args.corruption}, expected 0 to 1")
    for name in ("vqgan", "language", *["init"] * ("stage1" in PRESETS[args.preset].recipes)):
        if args.stage == "all" and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} names an earlier stage: all trains its own; give the stages one by one")
    for name, stages in USED_BY.items():
        if args.stage not in (*stages, "all") and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for {', '.join(stages)}: {args.stage} does not use it")
    for name in ("steps", "batch", "micro_batch", "ahead", "english", "save_every", "sample_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    return args


def run_stage(args, preset: Preset) -> None:
    """Fills in the stage's recipe, changed by the flags, and trains."""
    changed = {name: getattr(args, name) for name in ("steps", "batch", "lr") if getattr(args, name) is not None}
    if args.stage not in preset.recipes:
        known = ", ".join(name for name, other in PRESETS.items() if args.stage in other.recipes)
        raise ValueError(f"preset {args.preset!r} has no recipe for {args.stage}; expected --preset {known}")
    args.recipe = dataclasses.replace(preset.recipes[args.stage], **changed)
    if args.recipe.batch % args.ranks.count:
        raise ValueError(f"a batch of {args.recipe.batch} does not divide over {args.ranks.count} processes")
    if args.shard and "RANK" not in os.environ:
        raise ValueError("--shard spreads a model over processes: start it with torchrun --nproc_per_node=N train.py")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{args.out}: cannot write there ({error.strerror})") from None
    train(args, preset)


def main(arguments: list[str] | None = None) -> None:
    """The command: one clear line and exit code 2 for bad input."""
    args = parse_arguments(arguments)
    preset = PRESETS[args.preset]
    with one_line_errors("train.py"):
        args.ranks = start(args.device)
        if args.stage != "all":
            run_stage(args, preset)
        else:
            for stage in STAGES:
                if stage in preset.recipes:
                    out = args.out / stage
                    before = [name for name in ("stage2", "stage1") if name in preset.recipes and name != stage]
                    run_stage(argparse.Namespace(**{
                        **vars(args), "stage": stage, "out": out, "vqgan": args.out / "vqgan",
                        "language": args.out / "text", "resume": args.resume and any(out.glob("checkpoint-*.pt")),
                        "init": args.out / before[0] if before else args.init}), preset)
        stop()


if __name__ == "__main__":
    main()
