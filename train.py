"""One loop for every stage (paper Sec. 3.4 and 4.1); each stage is one function, in the paper's order.

    python train.py vqgan  --data data/emoji --out runs/vqgan
    python train.py text   --data data/emoji --out runs/text
    python train.py stage1 --data data/emoji --out runs/stage1 --vqgan runs/vqgan --language runs/text
    python train.py stage2 --data data/emoji/pairs data/emoji --out runs/stage2 --init runs/stage1
    python train.py stage3 --data data/emoji --out runs/stage3 --init runs/stage2
    python train.py joint  --data data/emoji --out runs/joint  --init runs/stage1     (Sec. 4.6: text and images)
    python train.py all    --preset nano --data data/nano --out runs/nano --until stage1      (several in a row)
    torchrun --nproc_per_node=8 train.py stage1 ...                                   (see distributed.py)

Shapes: B batch, T tokens, K tokens predicted at each position.
"""
import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from config import Parser, add_flags, build, check, ends_in_one_line, setting    # first, for Ctrl-C

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from checkpoint import fingerprint
from data import (EncodedImages, Sequence, captioning, collate, joint, open_dataset, size_text, targets_of,
                  text_to_image, title_text)
from dataset import inside
from distributed import Distributed, bad_input_is_final, cleanup, init, parallelize, sync_gradients
from files import lock, read_text, write_text
from generate import Pipeline, load_stage, write_page
from images import Resize, grid, psnr, resize_and_crop, save_image, to_image, to_pixels
from mars import IGNORE, MARS, MARSConfig
from pool import (Pool, digest_of, encode_all, image_of, images_of, in_training, recipes_of, sizes_of,
                  write_samples)
from run import Output, claim, not_finite, open_metrics, resume, save, stop_signals
from tokenizer import TextTokenizer, load_tokenizer
from vqgan import VQGAN, VQGANConfig
from vqgan_loss import VQGANLoss, VQGANLossConfig


# ----------------------------------------------------------------------------- the settings of each stage

@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Sec. 4.1: what all stages have in common."""
    data: tuple[Path, ...] = setting((Path("data/emoji"),), "folders of images with captions", nargs="+")
    out: Path = setting(Path("runs/out"), "folder for weights, checkpoints, metrics and samples")
    steps: int = setting(1000, "", least=1, most=10**9)
    batch: int = setting(16, "examples a step, over all processes", least=1, most=10**6)
    lr: float = setting(1e-3, "peak learning rate; 1e-4 in the paper, more for small models", least=1e-8, most=1)
    weight_decay: float = setting(0.1, "of matrices; biases, norms and codebooks have none", least=0, most=1)
    warmup: float = setting(0.01, "fraction of the steps over which the learning rate rises", least=0, most=1)
    clip: float = setting(1.0, "largest norm of the gradient", least=1e-6)
    seed: int = setting(0, "", least=0, most=2**32)
    save_every: int = setting(500, "steps between checkpoints", least=1)
    sample_every: int = setting(500, "steps between samples to look at", least=1)
    resume: bool = setting(False, "go on from the newest checkpoint in --out; start where there is none")
    skip_bad: bool = setting(False, "leave out images that cannot be read and captions that are too long; list them")
    device: str = setting("cpu", "cuda: with torchrun, each process takes a GPU of its own")
    precision: str = setting("", "default: bf16 on a GPU, fp32 on a CPU", choices=("", "bf16", "fp32"))

    def __post_init__(self):
        check(self)
        if not self.precision:
            object.__setattr__(self, "precision", "bf16" if self.device.startswith("cuda") else "fp32")


@dataclass(frozen=True, kw_only=True)
class VQGANStage(TrainConfig, VQGANLossConfig, VQGANConfig):
    """Sec. 3.3, Tokenization: trains the image tokenizer on images alone."""
    init: Path | None = setting(None, "an image tokenizer to go on from; its architecture counts")
    crops: float = setting(0.0, "fraction of images cropped at full size, not shrunk: what Stage III enlarges to; ours",
                           least=0, most=1)

    def __post_init__(self):
        TrainConfig.__post_init__(self)
        VQGANConfig.__post_init__(self)
        if self.gan and self.resolution < 24:
            raise ValueError(f"resolution is {self.resolution}, expected at least 24, which the GAN needs")


@dataclass(frozen=True, kw_only=True)
class TokenStage(TrainConfig):
    """What the stages that predict tokens have in common."""
    micro_batch: int = setting(0, "examples in one pass of one process; 0: all", least=0)
    recompute: bool = setting(False, "compute blocks again in the backward pass instead of keeping their activations")
    shard: bool = setting(False, "under torchrun: shard all over the GPUs, as ZeRO-3 does; draws no samples")
    save_bf16: bool = setting(False, "write weights half as large; default: as the language side is kept")


@dataclass(frozen=True, kw_only=True)
class TextStage(TokenStage):
    """Not in the paper, which loads Qwen-7B: pre-trains the small language model that stands in for it."""
    width: int = setting(160, "D", least=8)
    layers: int = setting(4, "L", least=1)
    heads: int = setting(5, "H", least=1)
    text_vocab: int = setting(4000, "most tokens that the tokenizer learns", least=300)
    max_seq_len: int = setting(1024, "longest sequence in tokens", least=16)
    text_seq_len: int = setting(64, "tokens that a text is cut to", least=2)


@dataclass(frozen=True, kw_only=True)
class PairStage(TokenStage):
    """What Stages I and II have in common."""
    captioning_ratio: float = setting(0.5, "fraction of pairs used for captioning; ours", least=0, most=1)
    caption_drop: float = setting(0.1, "fraction of captions dropped for guidance; ours", least=0, most=1)
    prompts: Path | None = setting(None, "a text file of prompts to sample, a line each; default: captions of the data")


@dataclass(frozen=True, kw_only=True)
class Stage1(PairStage):
    """Sec. 3.4, Stage I: text-to-image and captioning by next-token prediction; the language side is frozen."""
    vqgan: Path = setting(Path("weights/emoji/vqgan"), "the image tokenizer")
    language: Path = setting(Path("weights/emoji"), "the language model and its tokenizer: ours, or a published Qwen")
    noise: float = setting(0.0, "noise on visual rows at the start, see MARS.grow; ours", least=0, most=10)
    k: int = setting(1, "K of Eq. 2", least=1, most=64)
    no_visual_experts: bool = setting(False, "Table 3: without visual experts; all weights train")
    route_output: bool = setting(False, "Eq. 3: a W_O of its own for the visual side")


@dataclass(frozen=True, kw_only=True)
class Stage2(PairStage):
    """Sec. 3.4, Stage II: goes on from Stage I with free aspect ratio and fine captions that name the size."""
    init: Path = setting(Path("weights/emoji"), "Stage I, or an earlier run of this stage")
    max_aspect: float = setting(2.0, "longest side, in shortest sides; images beyond are cropped", least=1, most=16)


@dataclass(frozen=True, kw_only=True)
class Stage3(TokenStage):
    """Sec. 3.4, Stage III: the cascade, from a caption and a small image to the large one, K tokens at a time."""
    init: Path = setting(Path("weights/emoji"), "Stage I or II, or an earlier run of this stage")
    k: int = setting(16, "K of Eq. 2", least=1, most=64)
    max_aspect: float = setting(2.0, "longest side, in shortest sides; images beyond are cropped", least=1, most=16)
    long_side: int = setting(128, "side of an enlarged square, in pixels; the paper's is 1024", least=2)
    corruption: float = setting(0.05, "fraction of wrong tokens in the small image; ours", least=0, most=1)
    caption_drop: float = setting(0.1, "fraction of captions dropped for guidance; ours", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class Joint(TokenStage):
    """Sec. 4.6: text and images in one output, on recipes (`recipes.jsonl` of --data); the language side trains too."""
    init: Path = setting(Path("weights/emoji"), "Stage I or II")


@dataclass(frozen=True, kw_only=True)
class All(TrainConfig):
    """The stages of a preset in a row."""
    until: str = setting("joint", "the last of them", choices=("vqgan", "text", "stage1", "stage2", "stage3", "joint"))


# ----------------------------------------------------------------------------- the loop (Sec. 4.1)

Example = tuple[str, Sequence | Tensor]              # a training example: its name, and what it holds


@dataclass
class Stage:
    """Sec. 3.4: what the loop needs of a stage; one function makes each, further down."""
    module: nn.Module                                # a batch's tensors -> the mean loss over what they ask for
    batch: Callable[[random.Random], list[Example]]  # the examples of one step, over all processes
    tensors: Callable[[list[Example], random.Random], tuple[Tensor, ...]]   # what `module` takes, the targets last
    sample: Callable[[Path], dict[str, float]]       # writes something to look at -> metrics
    save: Callable[[Path, dict[str, Tensor]], None]  # writes weights to use, given those of `module`
    made_of: dict[str, str]                          # fingerprints of data and inputs
    uniform: int = 0                                 # V: an untrained model's first loss is about ln V
    stays_frozen: bool = True                        # no step changes what has no gradient: checkpoints leave it out


def learning_rate(step: int, config: TrainConfig) -> float:
    """Not in the paper beyond "warm-up 1%": a linear rise, then a cosine down to a tenth of the peak."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Sec. 4.1: AdamW over what is trainable, and nothing else; weight decay on matrices, not on codebooks."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    decays = {name for name, p in trained.items() if p.ndim >= 2 and "quantize." not in name}
    groups = [{"params": [p for name, p in trained.items() if name in decays], "weight_decay": config.weight_decay},
              {"params": [p for name, p in trained.items() if name not in decays], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def train(stage: Stage, config: TrainConfig, ranks: Distributed) -> None:
    """Sec. 4.1: trains one stage, from its first step or its newest checkpoint to its last."""
    shard, micro_batch, recompute = (getattr(config, name, 0) for name in ("shard", "micro_batch", "recompute"))
    bf16, device, more = config.precision == "bf16", ranks.device, {"recompute": True} if recompute else {}
    model = parallelize(stage.module.train(), ranks, shard, bf16)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16 and not shard)
    slow = bf16 and device.type == "cpu"           # the backward pass of fused attention, in bfloat16
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, config)
    first = resume(config, stage, model, optimizer, ranks)

    with stop_signals() as signals, open_metrics(config.out / "metrics.jsonl", first, ranks) as metrics, \
            tqdm(range(first, config.steps), initial=first, total=config.steps, desc=type(config).__name__.lower(),
                 mininterval=1, disable=not ranks.is_main) as bar:
        for step in bar:
            started, lr, rng = time.perf_counter(), learning_rate(step, config), random.Random(f"{config.seed}/{step}")
            torch.manual_seed(rng.getrandbits(63))                 # the step alone decides on data and dropout
            for group in optimizer.param_groups:
                group["lr"] = lr

            # the gradient of one batch, in as many parts as the memory asks for; the same sum on any number of ranks
            batch = stage.batch(rng)
            mine, phase = ranks.shard(batch), rng.getrandbits(31)
            size = micro_batch or len(mine)
            parts = [stage.tensors(mine[i:i + size], random.Random(phase)) for i in range(0, len(mine), size)]
            counts = [int((part[-1] != IGNORE).sum()) for part in parts]
            total, loss = ranks.all_reduce_sum(sum(counts)), 0.0
            for i, part in enumerate(parts):
                sync_gradients(model, now=i == len(parts) - 1)
                with autocast, sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext():
                    part_loss = model(*(x.to(device) for x in part), **more) * (counts[i] / total)
                    (part_loss * ranks.world_size).backward()      # DDP divides by it
                loss += part_loss.item()
            loss, norm = ranks.all_reduce_sum(loss), float(nn.utils.clip_grad_norm_(trained, config.clip))
            for what, value in {"loss": loss, "norm of the gradient": norm}.items():
                if not math.isfinite(value):
                    raise not_finite(what, value, step, batch, config.out)
            optimizer.step()
            optimizer.zero_grad()
            if step == 0 and stage.uniform and ranks.is_main:
                bar.write(f"first loss {loss:.3f}; ln V = ln {stage.uniform} = {math.log(stage.uniform):.3f}")

            # what to look at, and what to go on from
            log = {"loss": loss, **getattr(stage.module, "logs", {}), "lr": lr, "grad_norm": norm,
                   "tokens": total, "seconds": round(time.perf_counter() - started, 4)}
            stopping, last = ranks.all_reduce_sum(len(signals)) > 0, step + 1 == config.steps
            if last or (step + 1) % config.sample_every == 0:
                model.eval()
                with torch.no_grad(), autocast:
                    log |= stage.sample(config.out / "samples" / f"{step + 1:06d}")
                model.train()
                bar.write(f"step {step + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in log.items()))
            metrics.write(json.dumps({"step": step} | log) + "\n")
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if stopping or last or (step + 1) % config.save_every == 0:
                save(config, stage, step + 1, model, optimizer, ranks)
            if stopping:
                bar.close()
                print(f"stopped after step {step + 1} and saved; --resume goes on", file=sys.stderr)
                sys.exit(128 + max(signals, default=signal.SIGTERM))


# ----------------------------------------------------------------------------- Sec. 3.3: the image tokenizer

def vqgan_stage(c: VQGANStage, ranks: Distributed) -> Stage:
    """Sec. 3.3, Tokenization: trains the image tokenizer on images alone."""
    datasets = [open_dataset(path) for path in c.data]
    pool = images_of(c, datasets, ranks)
    torch.manual_seed(c.seed)
    only = lambda kind: kind(**{f.name: getattr(c, f.name) for f in fields(kind)})
    vqgan = VQGAN.from_pretrained(c.init) if c.init else VQGAN(only(VQGANConfig))
    vqgan = vqgan.to(ranks.device, memory_format=torch.channels_last)
    module = VQGANLoss(vqgan, only(VQGANLossConfig)).to(ranks.device)
    if c.ema:
        vqgan.quantize.requires_grad_(False)                       # averages move it, not a gradient
    side = vqgan.config.resolution

    def pixels(dataset, i: int, rng: random.Random | None = None) -> Tensor:
        image = dataset.image(i)
        if rng and min(image.size) > side and rng.random() < c.crops:
            left, top = (rng.randrange(length - side + 1) for length in image.size)
            return to_pixels(image.crop((left, top, left + side, top + side)))
        return to_pixels(resize_and_crop(image, side, side))                            # (3, side, side)

    def batch(rng: random.Random) -> list[Example]:
        chosen = [rng.choice(pool["train"]) for _ in range(c.batch)]
        return [(dataset.name(i), pixels(dataset, i, rng)) for dataset, i in chosen]

    def tensors(examples: list[Example], rng: random.Random) -> tuple[Tensor]:
        return (torch.stack([image for _, image in examples]).contiguous(memory_format=torch.channels_last),)

    @torch.autocast(ranks.device.type, enabled=False)
    def sample(path: Path) -> dict[str, float]:
        """Writes eight images above their reconstructions -> PSNR of up to 64 images of each split."""
        if not ranks.is_main:
            return {}
        found = {}
        for name, items in pool.items():
            chosen = [pixels(*item) for item in random.Random(c.seed).sample(items, min(64, len(items)))]
            if chosen:
                restored = [vqgan.decode(vqgan.encode(x[None].to(ranks.device)))[0] for x in chosen]
                images = [[to_image(x) for x in part] for part in (chosen, restored)]
                found[f"psnr_{name}"] = sum(map(psnr, *images)) / len(chosen)
        save_image(grid(images[0][:8] + images[1][:8], min(8, len(images[0]))), path.with_suffix(".png"))
        return found

    stamps = [dataset.stamp(i) for dataset in datasets for i in range(len(dataset))]
    made_of = {"data_content": digest_of(datasets), "image_content": digest_of([], json.dumps(stamps))}
    return Stage(module, batch, tensors, sample, lambda out, state: vqgan.save_pretrained(out), made_of,
                 stays_frozen=False)


# ----------------------------------------------------------------------------- the stages that predict tokens

def check_memory(model: MARS, gpus: int, memory: int, shard: bool) -> None:
    """Raises ValueError, one line, where weights, gradients and AdamW's moments alone take more than `memory` bytes of
    each GPU: 16 a parameter that trains; 2 a frozen one, in bfloat16, and 4 where it is sharded."""
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad == way) for way in (True, False))
    need = (16 * trained + 4 * frozen) / gpus if shard else 16 * trained + 2 * frozen
    if need > memory:
        raise ValueError(f"training takes {need / 1e9:.1f} GB of each GPU, which has {memory / 1e9:.1f}; expected "
                         "--shard on more GPUs, see `python mars.py --plan`")


def place(model: MARS, c: TokenStage, ranks: Distributed) -> MARS:
    """Puts the model on its device: what trains in float32; what is frozen as it was read, such as Qwen in bfloat16."""
    if ranks.device.type == "cuda":
        check_memory(model, ranks.world_size, torch.cuda.get_device_properties(ranks.device).total_memory, c.shard)
    for p in model.parameters():
        if p.requires_grad or c.precision == "fp32":
            p.data = p.data.float()
    return model if c.shard else model.to(ranks.device)


def next_token_stage(c: TokenStage, model: MARS, tokenizer, vqgan: VQGAN | None,
                     example: Callable[[random.Random], Example], sample, *, offset: bool = False,
                     names: list[str] = (), **made_of) -> Stage:
    """Eq. 1 and 2 over a step's sequences. offset: heads 2 to K are asked at every K-th position, as in sampling;
    names: what generate.py says that the weights know."""
    vocabulary, k, kept = model.vocabulary, model.config.k, model.text_embedding.weight.dtype
    if len(tokenizer) > vocabulary.text:
        raise ValueError(f"the text tokenizer has {len(tokenizer)} tokens, the language model only {vocabulary.text}")

    def batch(rng: random.Random) -> list[Example]:
        return [example(rng) for _ in range(c.batch)]

    def tensors(examples: list[Example], rng: random.Random) -> tuple[Tensor, Tensor]:
        tokens, is_target = collate([sequence for _, sequence in examples], vocabulary.special("<pad>"))
        return tokens, targets_of(tokens, is_target, vocabulary, k, rng.randrange(k) if offset else None)

    def save(out: Path, state: dict[str, Tensor]) -> None:
        """Writes all that `generate.py` needs: the model, the text tokenizer and, in vqgan/, the image tokenizer."""
        dtype = torch.bfloat16 if c.save_bf16 else kept
        model.save_pretrained(out, {name: tensor.to(dtype) for name, tensor in state.items()})
        tokenizer.save_pretrained(out)
        if vqgan:
            vqgan.save_pretrained(out / "vqgan")
        if names:
            write_text(out / "names.txt", "\n".join(names) + "\n")
    text = tokenizer.model if isinstance(tokenizer, TextTokenizer) else repr(sorted(tokenizer.files.items())).encode()
    made_of |= {"text_tokenizer": hashlib.sha256(text).hexdigest()}
    return Stage(model, batch, tensors, sample, save, made_of, vocabulary.size)


def text_stage(c: TextStage, ranks: Distributed) -> Stage:
    """Not in the paper: pre-trains a small language model on `text.txt` of the data, or else on its captions."""
    texts = []
    for path in c.data:
        if (path / "text.txt").exists():
            lines = read_text(inside(path, "text.txt", path)).split("\n")
            texts += [line for line in lines if line.strip()]
        else:
            dataset = open_dataset(path)
            texts += [caption for i in range(len(dataset)) if in_training(dataset.facts(i))
                      for caption in dataset.captions(i)]
    if not texts:
        raise ValueError(f"{c.data[0]}: no text in it; expected captions, or text.txt with a document a line")
    if c.text_seq_len > c.max_seq_len:
        raise ValueError(f"text_seq_len is {c.text_seq_len}, expected at most max_seq_len, {c.max_seq_len}")
    tokenizer = TextTokenizer.train(texts, c.text_vocab)
    ffn_width = round(c.width * 2.6875 / 16) * 16                  # Qwen-7B's is 2.69 times its width
    config = MARSConfig(width=c.width, heads=c.heads, kv_heads=c.heads, head_width=c.width // c.heads,
                        ffn_width=ffn_width, layers=c.layers, max_seq_len=c.max_seq_len, text_vocab=len(tokenizer))
    model = place(MARS(config).initialise(torch.Generator().manual_seed(c.seed)), c, ranks)

    def example(rng: random.Random) -> Example:
        text = rng.choice(texts)
        ids = [*tokenizer.encode(text), tokenizer.eos][:c.text_seq_len]
        return repr(text[:60]), Sequence(ids, [True] * len(ids))
    return next_token_stage(c, model, tokenizer, None, example, lambda path: {},
                            data_content=digest_of([], *texts))


def stage1(c: Stage1, ranks: Distributed) -> Stage:
    """Sec. 3.4, Stage I: a MARS grown out of a language model; square images of one size."""
    vqgan, tokenizer = VQGAN.from_pretrained(c.vqgan, ranks.device), load_tokenizer(c.language)
    language = MARS.from_pretrained(c.language)
    if language.config.image_vocab:
        language = MARS.grow(language, image_vocab=0, k=1, image_tokenizer="", sizes=(), long_side=0)
    model = MARS.grow(language, image_vocab=vqgan.config.num_embeddings, image_tokenizer=fingerprint(vqgan), k=c.k,
                      visual_experts=not c.no_visual_experts, route_output=c.route_output, noise=c.noise,
                      generator=torch.Generator().manual_seed(c.seed))
    encoded = encode_all(c, vqgan, Resize(vqgan.config.resolution), "tokens", ranks)
    return pair_stage(c, ranks, model, vqgan, tokenizer, encoded, language_content=fingerprint(language),
                      vqgan_content=fingerprint(vqgan))


def stage2(c: Stage2, ranks: Distributed) -> Stage:
    """Sec. 3.4, Stage II: images keep their aspect ratio, captions name the size in pixels."""
    earlier, vqgan, tokenizer = load_stage(c.init, ranks.device)
    if earlier.config.long_side:
        raise ValueError(f"{c.init}: weights of stage3, expected those of stage1 or stage2")
    encoded = encode_all(c, vqgan, Resize(vqgan.config.resolution, c.max_aspect), "tokens", ranks)
    model = MARS.grow(earlier, sizes=sizes_of(encoded, vqgan))
    return pair_stage(c, ranks, model, vqgan, tokenizer, encoded, init_content=fingerprint(earlier))


def pair_stage(c: PairStage, ranks: Distributed, model: MARS, vqgan: VQGAN, tokenizer, encoded: list[EncodedImages],
               **made_of) -> Stage:
    """Sec. 3.4, Stages I and II: text-to-image and captioning by next-token prediction; the language side is frozen."""
    model, vocabulary = place(model.freeze_language(), c, ranks), model.vocabulary
    longest = max(h * w for images in encoded for h, w in images.shapes)
    pool = Pool(c, ranks, encoded, tokenizer, model.config.max_seq_len, longest)
    prompts = pool.read_prompts(c.prompts, tokenizer) if c.prompts else []

    def make(images: EncodedImages, i: int, rng: random.Random, captioning_ratio: float, drop: float) -> Example:
        caption, tokens = pool.caption(images, i, rng), images[i]
        size = tokenizer.encode(size_text(*(n * vqgan.factor for n in tokens.shape))) if model.config.sizes else []
        if caption and rng.random() < captioning_ratio:
            content = captioning(tokenizer.encode(caption), tokens, vocabulary, tokenizer.eos, size)
        else:
            dropped = caption is None or rng.random() < drop
            content = text_to_image(None if dropped else tokenizer.encode(caption), tokens, vocabulary, size)
        return images.name(i), content

    def example(rng: random.Random) -> Example:
        return make(*pool.draw(rng), rng, c.captioning_ratio, c.caption_drop)

    def sample(path: Path) -> dict[str, float]:
        """Writes images of sixteen captions below their originals, or of --prompts -> the loss on held-out images."""
        if ranks.is_main and not c.shard:
            write_samples(Pipeline(model, vqgan, tokenizer), pool, path, c.seed, prompts)
        rng = random.Random(c.seed)
        held_out = [make(*rng.choice(pool.held_out), rng, 0, 0) for _ in range(64)] if pool.held_out else []
        if not held_out:
            return {}
        inputs = stage.tensors(held_out, rng)
        return {"held_out_loss": float(model(*(x.to(ranks.device) for x in inputs)))}
    stage = next_token_stage(c, model, tokenizer, vqgan, example, sample, names=pool.names(), **made_of,
                             data_content=digest_of(encoded))
    return stage


def stage3(c: Stage3, ranks: Distributed) -> Stage:
    """Sec. 3.4, Stage III: weights of its own that start as Stage II's, or I's; caption, small image, large image."""
    earlier, vqgan, tokenizer = load_stage(c.init, ranks.device)
    side, tokens = vqgan.config.resolution, (c.long_side // vqgan.factor) ** 2
    if c.long_side < side or tokens > earlier.config.max_seq_len:
        raise ValueError(f"long_side is {c.long_side}, expected at least {side}, and images of less than max_seq_len, "
                         f"{earlier.config.max_seq_len}, tokens; they have {tokens} or more")
    small = encode_all(c, vqgan, Resize(side, c.max_aspect), "tokens-small", ranks)
    large = encode_all(c, vqgan, Resize(side, c.max_aspect, c.long_side), "tokens-large", ranks)
    model = MARS.grow(earlier, k=c.k, sizes=sizes_of(small, vqgan), long_side=c.long_side,
                      generator=torch.Generator().manual_seed(c.seed))
    model, vocabulary = place(model.freeze_language(), c, ranks), model.vocabulary
    longest = max(math.prod(a) + math.prod(b) for each in zip(small, large) for a, b in zip(*(e.shapes for e in each)))
    pool = Pool(c, ranks, small, tokenizer, model.config.max_seq_len, longest)

    def example(rng: random.Random) -> Example:
        images, i = pool.draw(rng)
        tokens, low = large[small.index(images)][i], images[i].copy()
        for position in range(low.size):
            if rng.random() < c.corruption:
                low.flat[position] = rng.randrange(vqgan.config.num_embeddings)
        caption = pool.caption(images, i, rng)
        dropped = caption is None or rng.random() < c.caption_drop
        size = tokenizer.encode(size_text(*(n * vqgan.factor for n in tokens.shape)))
        caption = None if dropped else tokenizer.encode(caption)
        return images.name(i), text_to_image(caption, tokens, vocabulary, size, low)

    def sample(path: Path) -> dict[str, float]:
        """Enlarges eight training images -> PSNR of ours and of bicubic scaling; writes bicubic, ours, originals."""
        chosen = pool.some(8, c.seed)
        if not ranks.is_main or c.shard or not chosen:
            return {}
        low = [image_of(vqgan, images, i) for images, i, _ in chosen]
        truth = [image_of(vqgan, large[small.index(images)], i) for images, i, _ in chosen]
        ours = Pipeline(model, vqgan, tokenizer).super_resolve(low, [text for *_, text in chosen])
        plain = [image.resize(true.size, Image.Resampling.BICUBIC) for image, true in zip(low, truth)]
        save_image(grid([*plain, *ours, *truth], columns=len(chosen)), path.with_suffix(".png"))
        mean = lambda images: sum(map(psnr, images, truth)) / len(truth)
        return {"psnr": mean(ours), "psnr_bicubic": mean(plain)}
    return next_token_stage(c, model, tokenizer, vqgan, example, sample, offset=True, names=pool.names(),
                            data_content=digest_of(small + large), init_content=fingerprint(earlier))


def joint_stage(c: Joint, ranks: Distributed) -> Stage:
    """Sec. 4.6: goes on from Stage I or II, on recipes. The language side trains too, for it has to: the steps come
    before every image, so by causality no visual weight can change what is written there."""
    earlier, vqgan, tokenizer = load_stage(c.init, ranks.device)
    if earlier.config.long_side:
        raise ValueError(f"{c.init}: weights of stage3, expected those of stage1 or stage2")
    before = fingerprint(earlier)
    encoded = encode_all(c, vqgan, Resize(vqgan.config.resolution), "tokens", ranks)
    model = place(earlier.requires_grad_(True), c, ranks)
    sequence = lambda recipe, images: joint(tokenizer.encode(title_text(recipe.title)), tokenizer.encode(recipe.text),
                                            images, model.vocabulary, tokenizer.eos)
    examples = recipes_of(c, encoded, sequence, model.config.max_seq_len, ranks)

    def sample(path: Path) -> dict[str, float]:
        """Writes four recipes as pages."""
        if ranks.is_main and not c.shard:
            titles = [random.Random(f"{c.seed}/{j}").choice(examples)[0] for j in range(4)]
            for j, page in enumerate(Pipeline(model, vqgan, tokenizer).interleaved(titles)):
                write_page(path / f"{j}.md", titles[j], *page)
        return {}
    contents = [f"Example(name={name!r}, content={content!r})" for name, content in examples]
    return next_token_stage(c, model, tokenizer, vqgan, lambda rng: rng.choice(examples), sample,
                            init_content=before, data_content=digest_of(encoded, *contents))


# ----------------------------------------------------------------------------- presets and the command line

STAGES = {"vqgan": (VQGANStage, vqgan_stage), "text": (TextStage, text_stage), "stage1": (Stage1, stage1),
          "stage2": (Stage2, stage2), "stage3": (Stage3, stage3), "joint": (Joint, joint_stage)}

SMALL_VQGAN = dict(resolution=64, hidden_channels=64, channel_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(),
                   no_attn_mid_block=True, z_channels=64, num_embeddings=4096, quantized_embed_dim=16, norm_groups=8,
                   stem=2, local_encoder=True, weight_decay=0.01, precision="bf16", warm_up=250, ema=0.99,
                   restart_every=100, crops=0.3, disc_channels=32)
SMALL = dict(precision="bf16", save_bf16=True)                    # a CPU multiplies in bfloat16 three times as fast

PRESETS = {
    "emoji": {
        "vqgan": SMALL_VQGAN | dict(steps=11_000, batch=8, lr=1.5e-3, gan=0.1, gan_start=8_500),
        "text": SMALL | dict(steps=4000, batch=64, lr=2e-3, width=192, layers=4, heads=6),
        "stage1": SMALL | dict(steps=33_000, batch=16, lr=2e-3, captioning_ratio=0.15, noise=0.5),
        "stage2": SMALL | dict(steps=15_000, batch=8, lr=1e-3, captioning_ratio=0.15, max_aspect=3.0),
        "stage3": SMALL | dict(steps=3400, batch=4, lr=2e-3, corruption=0.15),
        "joint": SMALL | dict(steps=1200, batch=8, lr=1e-3)},
    "nano": {
        "text": SMALL | dict(steps=1000, batch=64, lr=3e-3, width=128, layers=4, heads=4),
        "stage1": SMALL | dict(steps=8000, batch=8, lr=2e-3, captioning_ratio=0.15, noise=0.5),
        "stage2": SMALL | dict(steps=12_000, batch=8, lr=1e-3, captioning_ratio=0.15, max_aspect=3.0),
        "stage3": SMALL | dict(steps=8000, batch=4, lr=2e-3, corruption=0.15)},
    "qwen": {      # the paper's: 200 million pairs once, 50 million twice, 4,096 a step; 10 million triplets once
        "vqgan": dict(steps=500_000, batch=64, lr=1e-4),
        "stage1": dict(steps=48_000, batch=4096, lr=1e-4),
        "stage2": dict(steps=24_000, batch=4096, lr=1e-4),
        "stage3": dict(steps=6_500, batch=1536, lr=1e-4, long_side=1024, max_aspect=1.75, k=4)},
}


def read_flags(arguments: list[str]) -> tuple[str, TrainConfig, str]:
    """The command line -> the stage's name, its settings, and the preset's name."""
    first = Parser("train.py", add_help=False)
    first.add_argument("--preset", default="emoji")
    preset = first.parse_known_args(arguments)[0].preset
    parser = Parser("train.py", description="Trains one stage of MARS, or all of a preset in a row.")
    stages = parser.add_subparsers(dest="stage", required=True)
    kinds = {name: kind for name, (kind, _) in STAGES.items()} | {"all": All}
    for name, kind in kinds.items():
        sub = stages.add_parser(name, help=kind.__doc__.splitlines()[0])
        sub.add_argument("--preset", choices=PRESETS, default="emoji", help="settings of each stage, see PRESETS")
        add_flags(sub, kind, **PRESETS.get(preset, {}).get(name, {}))
    values = parser.parse_args(arguments)
    if values.stage not in {"all", *PRESETS[preset]}:
        parser.error(f"preset {preset!r} has no stage {values.stage}, expected one of {', '.join(PRESETS[preset])}")
    return values.stage, build(kinds[values.stage], values, stages.choices[values.stage]), preset


def run_all(arguments: list[str], config: All, preset: str, ranks: Distributed) -> None:
    """The stages of a preset in a row, each in its folder of --out and from those before it; what the preset lacks
    comes from the stage's defaults."""
    pairs = [path / "pairs" for path in config.data if (path / "pairs").is_dir()]
    inputs = {"stage1": {"vqgan": "vqgan", "language": "text"}, "stage2": {"init": "stage1"},
              "stage3": {"init": "stage2"}, "joint": {"init": "stage1"}}
    own = Parser("train.py", add_help=False)
    own.add_argument("--until")
    arguments = own.parse_known_args(arguments[1:])[1]
    for name in filter(PRESETS[preset].get, list(STAGES)[:list(STAGES).index(config.until) + 1]):
        more = ["--out", config.out / name, "--data", *(pairs if name == "stage2" else ()), *config.data]
        for flag, source in inputs.get(name, {}).items():
            more += [f"--{flag}", config.out / source] if source in PRESETS[preset] else []
        run_stage(*read_flags([name, *arguments, *map(str, more)])[:2], ranks)


def run_stage(name: str, config: TrainConfig, ranks: Distributed) -> None:
    """Trains one stage. Raises ValueError, one line, for settings that do not fit."""
    if config.batch % ranks.world_size:
        raise ValueError(f"a batch of {config.batch} does not divide over {ranks.world_size} processes")
    if getattr(config, "shard", False) and "RANK" not in os.environ:
        raise ValueError("--shard spreads a model over processes: start it with torchrun --nproc_per_node=N train.py")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:                        # torchrun --max-restarts
        config = replace(config, resume=True)
    with lock(config.out) if ranks.is_main else contextlib.nullcontext():
        if ranks.is_main:
            claim(config)
        ranks.barrier()
        train(STAGES[name][1](config, ranks), config, ranks)
        ranks.barrier()
    if ranks.is_main:
        print(f"{name}: wrote {config.out}")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)), \
            bad_input_is_final(), ends_in_one_line("train.py"):
        name, config, preset = read_flags(arguments)
        ranks = init(config.device)
        if name == "all":
            run_all(arguments, config, preset, ranks)
        else:
            run_stage(name, config, ranks)
        cleanup()


if __name__ == "__main__":
    main()
