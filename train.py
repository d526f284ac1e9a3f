"""One loop for every stage (paper Sec. 3.4 and 4.1).

    python train.py vqgan  --preset tiny --out runs/vqgan
    python train.py text   --preset tiny --out runs/text
    python train.py stage1 --preset tiny --out runs/stage1 --vqgan runs/vqgan --language runs/text
    python train.py all    --preset nano --out runs/nano      (the three in a row)
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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import corpus
import world
from checkpoint import one_line_errors, write_beside
from data import (Sequence, World, collate, encode, fit, grid, open_source, save_image, stage1_rows, text_rows,
                  to_image, to_pixels)
from distributed import Ranks, Spread, load_whole_state, start, stop, whole_state
from evaluate import accuracy, look_up
from generate import TINY, Painter, check_device
from mars import MARS, MARSConfig, count_parameters
from mars import PRESETS as SIZES
from tokenizer import Tokenizer, load_tokenizer
from vqgan import VQGAN, VQGANConfig, VQGANLoss, VQGANTraining


@dataclass(frozen=True)
class Recipe:
    """Sec. 4.1: how one stage is optimised."""
    steps: int
    batch: int                    # pictures, captions or rows of text a step, over all GPUs
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
    documents: int = 20_000       # texts that the tokenizer learns its tokens from
    caption_share: float = 0.5    # of pairs used for captioning; ours, the paper gives none
    curriculum: float = 0.0       # share of Stage I's steps that show pictures of one thing alone, before all; ours
    codebook_start: bool = True   # visual rows start where the codebook puts them, see mars.look_alike


# ----------------------------------------------------------------------------- the stages

class VQGANStage:
    """Sec. 3.3, Tokenization: trains the codec on pictures alone, in one process."""

    def __init__(self, args, preset: Preset):
        if args.ranks.count > 1 or args.shard:
            raise ValueError("the codec trains in one process: start this stage with python, without --shard")
        self.args, self.recipe = args, args.recipe
        self.source = open_source(args.data, preset.pictures, args.seed, preset.things)
        self.model = VQGAN(preset.codec).to(args.ranks.device)
        if preset.codec.patches and not args.resume:
            n = min(20_000, len(self.source))
            self.model.initialise(self.pixels(range(i, min(i + 100, n))) for i in range(0, n, 100))
        self.criterion = VQGANLoss(preset.codec, preset.codec_training).to(args.ranks.device)
        self.trained = nn.ModuleDict({"vqgan": self.model, "criterion": self.criterion})
        self.uniform = None

    def pixels(self, indices):
        """(B, 3, H, W) in [0, 1]."""
        side = self.model.config.resolution
        images = [fit(self.source.image(i), side, side) for i in indices]
        return torch.stack([to_pixels(image) for image in images]).to(self.args.ranks.device)

    def backward(self, step: int, rng: random.Random):
        """Adds the gradients of a step -> log entries, tokens seen, a function that names the pictures."""
        indices = [rng.randrange(len(self.source)) for _ in range(self.recipe.batch)]
        pixels = self.pixels(indices)
        loss, logs = self.criterion(self.model, pixels, step)
        loss.backward()
        tokens = len(pixels) * (pixels.shape[-1] // self.model.factor) ** 2
        return logs, tokens, lambda: [self.source.title(i) for i in indices]

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


class NextToken:
    """Eq. 1 over a step's rows, spread over ranks and, with --micro-batch, over several passes of each.

    A stage says what the rows are, how some of them become tokens, and what they are called.
    """

    def spread(self) -> None:
        """Puts the model on its ranks."""
        args = self.args
        if not args.shard:                                       # else block by block, see Spread
            self.model.to(args.ranks.device)
            for parameter in self.model.parameters():            # what trains does so in float32
                if parameter.requires_grad or args.precision == "fp32":
                    parameter.data = parameter.data.float()
        self.loss = Spread(self.model, args.ranks, args.shard, args.precision == "bf16")
        self.trained, self.uniform = self.model, self.model.vocabulary.size
        self.model.checkpoint_activations = args.checkpoint_activations

    def backward(self, step: int, rng: random.Random):
        """Adds the gradients of a step -> log entries, tokens seen, a function that names what was in it."""
        ranks = self.args.ranks
        rows = self.rows(step, rng)
        mine = ranks.share(rows)
        size = self.args.micro_batch or len(mine)
        parts = [self.tensors(mine[i:i + size]) for i in range(0, len(mine), size)]
        targets = [int(is_target[:, 1:].sum()) for _, is_target in parts]
        total, loss = ranks.sum(sum(targets)), 0.0
        for i, (tokens, is_target) in enumerate(parts):
            with self.loss.gradients_meet(now=i == len(parts) - 1):
                part = self.loss(tokens.to(ranks.device), is_target.to(ranks.device)) * (targets[i] / total)
                (part * ranks.count).backward()                  # ranks average: times their number, that is a sum
            loss += part.item()
        tokens = ranks.sum(sum(tokens.numel() for tokens, _ in parts))
        return {"loss": ranks.sum(loss)}, tokens, lambda: self.names(rows)

    def state(self) -> dict:
        """The whole model's tensors, gathered from all ranks."""
        return whole_state(self.model)["model"]


class TextStage(NextToken):
    """Not in the paper, which loads Qwen-7B: pre-trains the small language model that stands in for it."""

    def __init__(self, args, preset: Preset):
        self.args, self.recipe, self.preset = args, args.recipe, preset
        source = open_source(args.data, preset.pictures, args.seed, preset.things)
        if isinstance(source, World):
            self.document = lambda rng: corpus.document(rng, preset.things)
        else:
            self.document = lambda rng: source.caption(rng.randrange(len(source)), rng) or ""
        rng = random.Random(f"{args.seed}/tokenizer")
        self.tokenizer = Tokenizer.train([self.document(rng) for _ in range(preset.documents)], preset.language.text_vocab)
        self.config = dataclasses.replace(preset.language, text_vocab=len(self.tokenizer))
        self.model = MARS(self.config).initialise(torch.Generator().manual_seed(args.seed))
        self.spread()

    def rows(self, step: int, rng: random.Random) -> list[list[int]]:
        """Rows of token ids."""
        return text_rows(self.document, self.tokenizer, self.recipe.batch, self.preset.row, rng)

    def tensors(self, rows):
        """-> tokens (B, T), is_target (B, T)."""
        tokens = torch.tensor(rows)
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    def names(self, rows) -> list[str]:
        """The beginning of each row."""
        return [repr(self.tokenizer.decode(row)[:60]) for row in rows]

    def sample(self, path: Path) -> dict:
        """Asks questions about scenes that no training text told; writes them with the answers."""
        if self.args.data != "world":
            return {}
        share, lines = look_up(self.model, self.tokenizer, 60, self.args.seed + 1, self.preset.things)
        if self.args.ranks.is_first:
            write_beside(path.with_suffix(".txt"), lambda p: p.write_text("\n".join(lines) + "\n"))
        return {"look_up": share}

    def save(self, directory: Path) -> None:
        """Writes the language model and its tokenizer."""
        state = self.state()
        if self.args.ranks.is_first:
            self.model.save_pretrained(directory, state)
            self.tokenizer.save_pretrained(directory)


class Stage1(NextToken):
    """Sec. 3.4, Stage I: text-to-image and captioning by next-token prediction; the language side is frozen."""

    def __init__(self, args, preset: Preset):
        self.args, self.recipe, self.preset = args, args.recipe, preset
        ranks = args.ranks
        self.vqgan = VQGAN.from_pretrained(args.vqgan, ranks.device)
        self.tokenizer = load_tokenizer(args.language)
        language = MARS.from_pretrained(args.language)
        self.dtype = language.text_embedding.weight.dtype
        if ranks.device.type == "cuda":
            memory = torch.cuda.get_device_properties(ranks.device).total_memory
            config = dataclasses.replace(language.config, codes=self.vqgan.config.num_embeddings)
            forecast = check_memory(config, ranks.count, memory, args.shard)
            if ranks.is_first:
                print(forecast)
        side = self.vqgan.config.resolution
        self.source = open_source(args.data, preset.pictures, args.seed, preset.things)
        self.codes = encode(self.source, self.vqgan, side, args.out / "codes", ranks, args.skip_bad)
        whole = set(self.codes.whole)
        self.all, self.simple = self.codes.whole, [i for i in self.source.simple() if i in whole]
        self.model = MARS.from_language_model(
            language, self.vqgan.config.num_embeddings, visual_experts=not args.without_experts,
            route_output=args.route_output, ahead=args.ahead,
            codebook=self.vqgan.quantize.embedding.weight if preset.codebook_start else None,
            generator=torch.Generator().manual_seed(args.seed))
        self.model.freeze_language()
        self.spread()
        self.painter = Painter(self.model, self.vqgan, self.tokenizer, side)

    def rows(self, step: int, rng: random.Random):
        """Pictures, each with what it is used for."""
        indices = self.simple if step < self.preset.curriculum * self.recipe.steps else self.all
        share = self.preset.caption_share if self.args.caption_share is None else self.args.caption_share
        return stage1_rows(self.source, indices, self.recipe.batch, rng, share)

    def tensors(self, rows):
        """-> tokens (B, T), is_target (B, T)."""
        vocabulary = self.model.vocabulary
        return collate([row.sequence(self.codes[row.index], self.tokenizer, vocabulary) for row in rows],
                       vocabulary.special("<pad>"))

    def names(self, rows) -> list[str]:
        """Of the pictures."""
        return [self.source.title(row.index) for row in rows]

    def sample(self, path: Path) -> dict:
        """Draws a grid of pictures; on the rendered world also counts how many show what their caption says."""
        rng, ranks, drawn_world = random.Random(self.args.seed + 1), self.args.ranks, self.args.data == "world"
        if drawn_world:
            scenes = [world.sample_scene(rng, "train", self.preset.things) for _ in range(64)]
            texts = [world.caption(scene, rng, world.LANGUAGES[i % 2], rng.choice(world.DETAILS))
                     for i, scene in enumerate(scenes)]
        else:
            texts = [self.source.caption(i, rng) for i in range(min(16, len(self.source)))]
        texts = [text for text in texts if text]
        if not texts:
            return {}
        texts += (texts * ranks.count)[:-len(texts) % ranks.count]                   # as many for each rank
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            images = ranks.together(self.painter.paint(ranks.share(texts), seed=self.args.seed))
        if ranks.is_first:
            save_image(grid(images[:16]), path.with_suffix(".png"))
            write_beside(path.with_suffix(".txt"), lambda p: p.write_text("\n".join(texts[:16]) + "\n"))
        return accuracy(images, texts) if drawn_world else {}

    def save(self, directory: Path) -> None:
        """Writes all that `generate.py` needs: the model, the tokenizer and, in vqgan/, the codec."""
        state = self.state()
        if self.args.ranks.is_first:
            self.model.save_pretrained(directory, {name: tensor.to(self.dtype) for name, tensor in state.items()})
            self.tokenizer.save_pretrained(directory)
            self.vqgan.save_pretrained(directory / "vqgan")


STAGES = {"vqgan": VQGANStage, "text": TextStage, "stage1": Stage1}


def check_memory(config: MARSConfig, gpus: int, memory: int, shard: bool) -> str:
    """The forecast for one GPU, before activations. Raises ValueError, one line, where it is more than its `memory`.

    Sharded, all weights are float32 and every GPU holds its part of them, of the gradients and of AdamW's moments.
    """
    frozen, trained = count_parameters(config)
    ddp, sharded = 2 * frozen + 16 * trained, (4 * frozen + 16 * trained) / gpus
    need, way = (sharded, "--shard") if shard else (ddp, "DDP")
    line = f"forecast: {way} on {gpus} GPUs of {memory / 1e9:.0f} GB takes {need / 1e9:.1f} GB of each"
    if need > memory and not shard and sharded < memory:
        raise ValueError(f"{line}; pass --shard, which takes {sharded / 1e9:.1f} GB")
    if need > memory:
        raise ValueError(f"{line}; expected at least {-(-need * gpus // memory):.0f} GPUs with --shard")
    return line


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


def save_checkpoint(out: Path, step: int, trained: nn.Module, optimizer, ranks: Ranks) -> None:
    """All that a run needs to go on, beside and renamed; the last two are kept. Raises ValueError on a full disk.

    The data of step n are drawn from the seed and n alone, so the step is the data's position.
    """
    state = {"step": step, "ranks": ranks.count, "rng": torch.get_rng_state(), **whole_state(trained, optimizer)}
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


def resume(out: Path, trained: nn.Module, optimizer, ranks: Ranks) -> int:
    """Loads the newest whole checkpoint -> the step to go on with. Raises ValueError where there is none."""
    for path in sorted(out.glob("checkpoint-*.pt"), reverse=True):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError):
            print(f"{path} is not whole, trying the one before", file=sys.stderr)
            continue
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
    first = resume(out, stage.trained, optimizer, ranks) if args.resume else 0
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
                save_checkpoint(out, step + 1, stage.trained, optimizer, ranks)
            if stopping:
                bar.close()
                print(f"stopped after step {step + 1} and saved; --resume goes on", file=sys.stderr)
                sys.exit(128 + max(signals, default=signal.SIGTERM))
    stage.save(out)
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
    "qwen": Preset(                      # the paper's Stage I: 200 million pairs once, 4,096 a step
        language=SIZES["qwen-7b"], codec=VQGANConfig(), codec_training=VQGANTraining(),
        recipes={"stage1": Recipe(48_000, 4096, 1e-4)}, pictures=60_000, codebook_start=False),
    "tiny": Preset(
        language=small(160, 4, 5),
        codec=VQGANConfig(**CELLS, resolution=96, num_embeddings=2304, quantized_embed_dim=96),
        codec_training=VQGANTraining(gan=0.0, foreground=4.0, ema=0.9),
        recipes={"vqgan": Recipe(150, 64, 3e-5), "text": Recipe(3000, 16, 2.5e-3), "stage1": Recipe(14_000, 32, 2e-3)},
        pictures=60_000, caption_share=0.3, curriculum=0.15),
    "nano": Preset(
        language=small(128, 4, 4),
        codec=VQGANConfig(**CELLS, resolution=96, num_embeddings=2304, quantized_embed_dim=96),
        codec_training=VQGANTraining(gan=0.0, foreground=4.0, ema=0.9),
        recipes={"vqgan": Recipe(150, 64, 3e-5), "text": Recipe(1200, 16, 3e-3), "stage1": Recipe(3500, 32, 2e-3)},
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
    parser.add_argument("--ahead", type=int, default=1, metavar="K", help="Eq. 2: codes predicted a forward pass")
    parser.add_argument("--without-experts", action="store_true", help="Table 3: no visual experts, and all trains")
    parser.add_argument("--route-output", action="store_true", help="Eq. 3: a W_O of its own for the visual side")
    parser.add_argument("--caption-share", type=float, help="of pairs used for captioning; default: the preset's")
    parser.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be read, and list them")
    parser.add_argument("--device", default="cpu", help="cuda: with torchrun, each process takes a GPU of its own")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on the CPU")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="rows in one pass of one process; default: all")
    parser.add_argument("--checkpoint-activations", action="store_true", help="compute blocks twice, store them once")
    parser.add_argument("--shard", action="store_true", help="under torchrun: shard all over the GPUs, as ZeRO-3 does")
    args = parser.parse_args(arguments)
    args.precision = args.precision or ("bf16" if args.device.startswith("cuda") else "fp32")
    for name in ("steps", "batch", "micro_batch", "ahead", "save_every", "sample_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    return args


def run_stage(args, preset: Preset) -> None:
    """Fills in the stage's recipe, changed by the flags, and trains."""
    changed = {name: getattr(args, name) for name in ("steps", "batch", "lr") if getattr(args, name) is not None}
    if args.stage not in preset.recipes:
        raise ValueError(f"preset {args.preset!r} has no recipe for {args.stage}; its weights are published")
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
        check_device(args.device)
        args.ranks = start(args.device)
        if args.stage != "all":
            run_stage(args, preset)
        else:
            for stage in STAGES:
                run_stage(argparse.Namespace(**{**vars(args), "stage": stage, "out": args.out / stage,
                                                "vqgan": args.out / "vqgan", "language": args.out / "text"}), preset)
        stop()


if __name__ == "__main__":
    main()
