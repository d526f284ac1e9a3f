"""One loop for every stage (paper Sec. 3.4 and 4.1).

    python train.py vqgan  --preset tiny --out runs/vqgan
    python train.py text   --preset tiny --out runs/text
    python train.py stage1 --preset tiny --out runs/stage1 --vqgan runs/vqgan --language runs/text
    python train.py all    --preset nano --out runs/nano      (the three in a row)

Shapes: B batch, T tokens.
"""
import argparse
import json
import math
import pickle
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import corpus
import world
from checkpoint import one_line_errors, write_beside
from data import (Folder, encode_once, fit, grid, open_source, save_image, stage1_batch, text_batch, to_image,
                  to_pixels)
from evaluate import accuracy, look_up
from generate import TINY, Painter, check_device
from mars import MARS, MARSConfig
from mars import PRESETS as SIZES
from tokenizer import Tokenizer, load_tokenizer
from vqgan import VQGAN, VQGANConfig, VQGANLoss, VQGANTraining


@dataclass(frozen=True)
class Recipe:
    """Sec. 4.1: how one stage is optimised."""
    steps: int
    batch: int                    # pictures, captions or rows of text a step
    lr: float                     # peak learning rate: 1e-4 in the paper, more for small models
    weight_decay: float = 0.1     # of matrices; biases, norms and codebooks have none
    warmup: float = 0.01          # share of the steps over which the learning rate rises
    clip: float = 1.0             # largest norm of the gradient


@dataclass(frozen=True)
class Preset:
    """Not in the paper: everything that a size of MARS needs to be trained from nothing on the rendered world."""
    language: MARSConfig          # the small language model; its text_vocab is the most that the tokenizer may learn
    codec: VQGANConfig
    codec_training: VQGANTraining
    recipes: dict[str, Recipe]    # by stage
    pictures: int                 # how many pictures of the rendered world there are
    things: int | None = None     # how many things a picture of the rendered world shows, None: one to three
    row: int = 192                # tokens in a row of pre-training text
    caption_share: float = 0.5    # of pairs used for captioning; ours, the paper gives none
    curriculum: float = 0.0       # share of Stage I's steps that show pictures of one thing alone, before all; ours
    codebook_start: bool = True   # visual rows start where the codebook puts them, see mars.look_alike


# ----------------------------------------------------------------------------- the stages

class VQGANStage:
    """Sec. 3.3, Tokenization: trains the codec on pictures alone."""

    def __init__(self, args, preset: Preset):
        self.args, self.recipe = args, args.recipe
        self.source = open_source(args.data, preset.pictures, args.seed, preset.things)
        self.model = VQGAN(preset.codec).to(args.device)
        if preset.codec.patches and not args.resume:
            n = min(20_000, len(self.source))
            self.model.initialise(self.pixels(range(i, min(i + 100, n))) for i in range(0, n, 100))
        self.criterion = VQGANLoss(preset.codec, preset.codec_training).to(args.device)
        self.trained = nn.ModuleDict({"vqgan": self.model, "criterion": self.criterion})
        self.uniform = None

    def pixels(self, indices):
        """(B, 3, H, W) in [0, 1]."""
        side = self.model.config.resolution
        images = [fit(self.source.image(i), side, side) for i in indices]
        return torch.stack([to_pixels(image) for image in images]).to(self.args.device)

    def loss(self, step: int, rng: random.Random):
        """-> loss to back-propagate, log entries, tokens seen."""
        pixels = self.pixels([rng.randrange(len(self.source)) for _ in range(self.recipe.batch)])
        loss, logs = self.criterion(self.model, pixels, step)
        return loss, logs, len(pixels) * (pixels.shape[-1] // self.model.factor) ** 2

    def sample(self, path: Path) -> dict:
        """Writes a grid: eight pictures above their reconstructions."""
        pixels = self.pixels(range(min(8, len(self.source))))
        with torch.no_grad():
            shown = [*pixels, *self.model.decode(self.model.encode(pixels))]
        save_image(grid([to_image(p) for p in shown], columns=len(pixels)), path.with_suffix(".png"))
        return {}

    def save(self, directory: Path) -> None:
        """Writes the codec."""
        self.model.save_pretrained(directory)


class TextStage:
    """Not in the paper, which loads Qwen-7B: pre-trains the small language model that stands in for it."""

    def __init__(self, args, preset: Preset):
        self.args, self.recipe, self.preset = args, args.recipe, preset
        if args.data == "world":
            self.document = lambda rng: corpus.document(rng, preset.things)
        else:
            captions = Folder(args.data)
            self.document = lambda rng: captions.caption(rng.randrange(len(captions)), rng) or ""
        rng = random.Random(f"{args.seed}/tokenizer")
        self.tokenizer = Tokenizer.train([self.document(rng) for _ in range(20_000)], preset.language.text_vocab)
        self.config = MARSConfig(**{**vars(preset.language), "text_vocab": len(self.tokenizer)})
        self.model = MARS(self.config).initialise(torch.Generator().manual_seed(args.seed)).to(args.device)
        self.trained, self.uniform = self.model, self.config.vocabulary.size

    def loss(self, step: int, rng: random.Random):
        """-> loss to back-propagate, log entries, tokens seen."""
        tokens = text_batch(self.document, self.tokenizer, self.recipe.batch, self.preset.row, rng).to(self.args.device)
        loss = self.model.loss(tokens, torch.ones_like(tokens, dtype=torch.bool))
        return loss, {"loss": loss.item()}, tokens.numel()

    def sample(self, path: Path) -> dict:
        """Asks questions about scenes that no training text told; writes them with the answers."""
        if self.args.data != "world":
            return {}
        share, lines = look_up(self.model, self.tokenizer, 60, self.args.seed + 1, self.preset.things)
        write_beside(path.with_suffix(".txt"), lambda p: p.write_text("\n".join(lines) + "\n"))
        return {"look_up": share}

    def save(self, directory: Path) -> None:
        """Writes the language model and its tokenizer."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


class Stage1:
    """Sec. 3.4, Stage I: text-to-image and captioning by next-token prediction; the language side is frozen."""

    def __init__(self, args, preset: Preset):
        self.args, self.recipe, self.preset = args, args.recipe, preset
        self.vqgan = VQGAN.from_pretrained(args.vqgan, args.device)
        self.tokenizer = load_tokenizer(args.language)
        side = self.vqgan.config.resolution
        self.source = open_source(args.data, preset.pictures, args.seed, preset.things)
        self.codes = encode_once(self.source, self.vqgan, side, args.out / "codes.npy")
        self.simple, self.all = self.source.simple(), range(len(self.source))
        self.model = MARS.from_language_model(
            MARS.from_pretrained(args.language), self.vqgan.config.num_embeddings,
            codebook=self.vqgan.quantize.embedding.weight if preset.codebook_start else None,
            generator=torch.Generator().manual_seed(args.seed)).to(args.device)
        self.model.freeze_language()
        self.trained, self.uniform = self.model, self.model.vocabulary.size
        self.painter = Painter(self.model, self.vqgan, self.tokenizer, side)

    def loss(self, step: int, rng: random.Random):
        """-> loss to back-propagate, log entries, tokens seen."""
        indices = self.simple if step < self.preset.curriculum * self.recipe.steps else self.all
        tokens, is_target = stage1_batch(self.source, self.codes, indices, self.tokenizer, self.model.vocabulary,
                                         self.recipe.batch, rng, self.preset.caption_share)
        loss = self.model.loss(tokens.to(self.args.device), is_target.to(self.args.device))
        return loss, {"loss": loss.item()}, tokens.numel()

    def sample(self, path: Path) -> dict:
        """Draws a grid of pictures; on the rendered world also counts how many show what their caption says."""
        rng = random.Random(self.args.seed + 1)
        if self.args.data == "world":
            scenes = [world.sample_scene(rng, "train", self.preset.things) for _ in range(64)]
            texts = [world.caption(scene, rng, world.LANGUAGES[i % 2], rng.choice(world.DETAILS))
                     for i, scene in enumerate(scenes)]
        else:
            texts = [self.source.caption(i, rng) for i in range(min(16, len(self.source)))]
        texts = [text for text in texts if text]
        if not texts:
            return {}
        images = self.painter.paint(texts, seed=self.args.seed)
        save_image(grid(images[:16]), path.with_suffix(".png"))
        write_beside(path.with_suffix(".txt"), lambda p: p.write_text("\n".join(texts[:16]) + "\n"))
        return accuracy(images, texts) if self.args.data == "world" else {}

    def save(self, directory: Path) -> None:
        """Writes all that `generate.py` needs: the model, the tokenizer and, in vqgan/, the codec."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        self.vqgan.save_pretrained(directory / "vqgan")


STAGES = {"vqgan": VQGANStage, "text": TextStage, "stage1": Stage1}


# ----------------------------------------------------------------------------- the loop

def learning_rate(step: int, recipe: Recipe) -> float:
    """Not in the paper beyond "warm-up 1%": a linear rise, then a cosine down to a tenth of the peak."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def make_optimizer(trained: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Sec. 4.1: AdamW over what is trainable, and nothing else; weight decay on matrices alone."""
    parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    decays = {name: p.ndim >= 2 and "quantize." not in name for name, p in parameters.items()}
    groups = [{"params": [p for name, p in parameters.items() if decays[name]], "weight_decay": recipe.weight_decay},
              {"params": [p for name, p in parameters.items() if not decays[name]], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))


def save_checkpoint(out: Path, step: int, trained: nn.Module, optimizer) -> None:
    """All that a run needs to go on, beside and renamed; the last two are kept."""
    state = {"step": step, "model": trained.state_dict(), "optimizer": optimizer.state_dict(),
             "rng": torch.get_rng_state()}
    write_beside(out / f"checkpoint-{step:06d}.pt", lambda p: torch.save(state, p))
    for old in sorted(out.glob("checkpoint-*.pt"))[:-2]:
        old.unlink()


def resume(out: Path, trained: nn.Module, optimizer, device) -> int:
    """Loads the newest whole checkpoint -> the step to go on with. Raises ValueError where there is none."""
    for path in sorted(out.glob("checkpoint-*.pt"), reverse=True):
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError):
            print(f"{path} is not whole, trying the one before", file=sys.stderr)
            continue
        trained.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        return state["step"]
    raise ValueError(f"{out}: no checkpoint to resume from")


def keep_lines_before(path: Path, step: int) -> None:
    """Drops the lines of a metrics file from `step` on: a resumed run writes them again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines(keepends=True)
                 if line.endswith("\n") and json.loads(line)["step"] < step]
        write_beside(path, lambda p: p.write_text("".join(lines)))


def train(args, preset: Preset) -> None:
    """One stage from its first step, or its newest checkpoint, to its last."""
    recipe, out = args.recipe, args.out
    if not args.resume and any(out.glob("checkpoint-*.pt")):
        raise ValueError(f"{out}: holds an earlier run; pass --resume to go on with it, or another --out")
    torch.manual_seed(args.seed)
    stage = STAGES[args.stage](args, preset)
    stage.trained.train()
    optimizer = make_optimizer(stage.trained, recipe)
    first = resume(out, stage.trained, optimizer, args.device) if args.resume else 0
    keep_lines_before(out / "metrics.jsonl", first)
    count = sum(p.numel() for p in stage.trained.parameters())
    trainable = sum(p.numel() for p in stage.trained.parameters() if p.requires_grad)
    print(f"{args.stage}: {count / 1e6:.2f}M parameters, {trainable / 1e6:.2f}M of them train; {recipe}")
    with (out / "metrics.jsonl").open("a", buffering=1) as metrics:
        bar = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc=args.stage, mininterval=1)
        for step in bar:
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            loss, logs, tokens = stage.loss(step, random.Random(f"{args.seed}/{args.stage}/{step}"))
            if not math.isfinite(logs["loss"]):
                raise ValueError(f"the loss is {logs['loss']} at step {step}; the last good checkpoint is in {out}")
            optimizer.zero_grad()
            loss.backward()
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
            if (step + 1) % args.save_every == 0:
                save_checkpoint(out, step + 1, stage.trained, optimizer)
    stage.save(out)
    print(f"{args.stage}: wrote {out}")


# ----------------------------------------------------------------------------- presets and the command line

def small(width: int, layers: int, heads: int) -> MARSConfig:
    """Not in the paper: a Qwen of toy sizes; its feed-forward width is Qwen-7B's 2.69 times the width."""
    return MARSConfig(width=width, heads=heads, kv_heads=heads, ffn_width=round(width * 2.6875 / 16) * 16,
                      layers=layers, context=512, text_vocab=1024)


CELLS = dict(hidden_channels=16, channel_mult=(1, 1, 1, 1, 2), num_res_blocks=1, attn_resolutions=(), z_channels=768,
             patches=True)        # a codec whose code sees its own 16 x 16 pixels, and no others

PRESETS = {
    "qwen": Preset(                      # the paper's Stage I: 200 million pairs once, 4,096 a step, 64 a GPU
        language=SIZES["qwen-7b"], codec=VQGANConfig(), codec_training=VQGANTraining(),
        recipes={"stage1": Recipe(48_000, 64, 1e-4)}, pictures=60_000, codebook_start=False),
    "tiny": Preset(
        language=small(160, 4, 5),
        codec=VQGANConfig(**CELLS, resolution=96, num_embeddings=2304, quantized_embed_dim=96),
        codec_training=VQGANTraining(gan=0.0, foreground=4.0, ema=0.9),
        recipes={"vqgan": Recipe(150, 64, 3e-5), "text": Recipe(3000, 16, 2.5e-3), "stage1": Recipe(18_000, 32, 2e-3)},
        pictures=60_000, caption_share=0.3, curriculum=0.15),
    "nano": Preset(
        language=small(128, 4, 4),
        codec=VQGANConfig(**CELLS, resolution=96, num_embeddings=2304, quantized_embed_dim=96),
        codec_training=VQGANTraining(gan=0.0, foreground=4.0, ema=0.9),
        recipes={"vqgan": Recipe(150, 64, 3e-5), "text": Recipe(1500, 16, 3e-3), "stage1": Recipe(5000, 32, 2e-3)},
        pictures=10_000, things=1, row=128, caption_share=0.15),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains one stage of MARS.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes and recipes, at the end of train.py")
    parser.add_argument("--data", default="world", help='"world", or a folder of images with metadata.jsonl')
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, checkpoints, metrics and samples")
    parser.add_argument("--vqgan", default=TINY, metavar="DIR", help="stage1: the codec")
    parser.add_argument("--language", default=TINY, metavar="DIR", help="stage1: the language model and its tokenizer")
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--batch", type=int, help="instead of the preset's")
    parser.add_argument("--lr", type=float, help="instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints")
    parser.add_argument("--sample-every", type=int, default=500, metavar="N", help="steps between sample grids")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    for name in ("steps", "batch", "save_every", "sample_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    return args


def run_stage(args, preset: Preset) -> None:
    """Fills in the stage's recipe, changed by the flags, and trains."""
    changed = {name: getattr(args, name) for name in ("steps", "batch", "lr") if getattr(args, name) is not None}
    if args.stage not in preset.recipes:
        raise ValueError(f"preset {args.preset!r} has no recipe for {args.stage}; its weights are published")
    args.recipe = Recipe(**{**vars(preset.recipes[args.stage]), **changed})
    check_device(args.device)
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
        if args.stage != "all":
            run_stage(args, preset)
            return
        for stage in STAGES:
            run_stage(argparse.Namespace(**{**vars(args), "stage": stage, "out": args.out / stage,
                                            "vqgan": args.out / "vqgan", "language": args.out / "text"}), preset)


if __name__ == "__main__":
    main()
