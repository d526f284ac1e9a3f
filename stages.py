"""What each stage of training is made of: its data, its model, what it shows (paper Sec. 3.3 and 3.4).

A stage gives the loop in train.py `trained` (a module), `backward` (a step's gradients), `sample` (something to look
at) and `save`. Shapes: B batch, T tokens.
"""
import dataclasses
import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import corpus
import world
from checkpoint import write_beside
from data import (Codes, Encoding, RecipePictures, World, collate, encode, fit, grid, joint, open_source, psnr,
                  save_image, stage1_rows, stage3_rows, text_rows, title_text, to_image, to_pixels)
from distributed import Spread, whole_state
from evaluate import accuracy, judge_recipe, look_up, recipe_accuracy
from generate import DETAIL, Painter, load_stage, save_recipe
from mars import MARS, MARSConfig, count_parameters, training_memory
from recipes import sample as sample_recipe
from recipes import text_of
from tokenizer import Tokenizer, load_tokenizer
from vqgan import VQGAN, VQGANConfig, VQGANLoss, VQGANTraining


SAMPLES = 64                      # pictures of the rendered world that a stage draws to look at, and to count
MARGIN = 2.0                      # of MARS._candidates, once codes without captions compete; ours


@dataclass(frozen=True)
class Recipe:
    """Sec. 4.1: how one stage is optimised."""
    steps: int
    batch: int                    # pictures, captions or rows of text a step, over all GPUs
    lr: float                     # peak learning rate: 1e-4 in the paper, more for small models
    weight_decay: float = 0.1     # of matrices; biases, norms and codebooks have none
    warmup: float = 0.01          # share of the steps over which the learning rate rises
    clip: float = 1.0             # largest norm of the gradient
    compete: float = 1 / 8        # last share of the steps in which codes without captions compete; ours


@dataclass(frozen=True)
class Preset:
    """Not in the paper: everything that a size of MARS needs to be trained from nothing on the rendered world."""
    language: MARSConfig | None   # the small language model; its text_vocab is the most that the tokenizer may learn
    codec: VQGANConfig
    codec_training: VQGANTraining
    recipes: dict[str, Recipe]    # by stage
    pictures: int                 # how many pictures of the rendered world there are
    things: int | None = None     # how many things a picture of the rendered world shows, None: one to three
    row: int = 192                # tokens in a row of pre-training text
    documents: int = 20_000       # texts that the tokenizer learns its tokens from
    caption_share: float = 0.5    # of pairs used for captioning; ours, the paper gives none
    frames: tuple = ((6, 6, 16),)        # codec and Stage I: rows, cols and pixels a cell
    aspects: tuple = 2 * ((6, 6, 16), (6, 8, 16), (6, 12, 16)) + ((6, 8, 16), (8, 6, 16), (12, 6, 16))    # Stage II:
    # wide ones, whose rows have another length than Stage I's, are harder and come more often than tall ones; rows of
    # 8 most of all: as often as rows of 12, they stayed 5 points behind the square
    large: tuple = ((6, 6, 32),)         # Stage III: the large pictures
    long_side: int = 192                 # Stage III: of the large pictures, in pixels
    ahead: int = 4                       # Stage III: K of Eq. 2
    curriculum: float = 0.0       # share of Stage I's steps that show pictures of one thing alone, before all; ours
    look_alike: bool = True       # visual rows start where the codebook puts them, and learn together; ours


# ----------------------------------------------------------------------------- the stages

class VQGANStage:
    """Sec. 3.3, Tokenization: trains the codec on pictures alone."""
    inputs = ()

    def __init__(self, args, preset: Preset):
        if args.shard:
            raise ValueError("the codec is small enough for every GPU: start this stage without --shard")
        self.args, self.recipe, self.preset = args, args.recipe, preset
        self.source = open_source(args.data, preset.pictures, args.seed, things=preset.things, frames=preset.frames)
        self.model = VQGAN(preset.codec).to(args.ranks.device)
        if preset.codec.patches and not args.resume:
            n = min(20_000, len(self.source))
            self.model.initialise(self.pixels(range(i, min(i + 100, n))) for i in range(0, n, 100))
        self.criterion = VQGANLoss(preset.codec, preset.codec_training).to(args.ranks.device)
        self.trained = nn.ModuleDict({"vqgan": self.model, "criterion": self.criterion})
        self.uniform = None

    def pixels(self, indices):
        """(B, 3, H, W) in [0, 1]: renders as they are, other pictures as squares of the codec's resolution."""
        rows, cols, cell = self.preset.frames[0]
        size = (rows * cell, cols * cell) if self.args.data == "world" else (self.model.config.resolution,) * 2
        images = [fit(self.source.image(i), *size) for i in indices]
        return torch.stack([to_pixels(image) for image in images]).to(self.args.ranks.device)

    def backward(self, step: int, rng: random.Random):
        """Adds the gradients of a step -> log entries, tokens seen, a function that names the pictures."""
        indices = [rng.randrange(len(self.source)) for _ in range(self.recipe.batch)]
        ranks = self.args.ranks
        pixels = self.pixels(ranks.share(indices))
        loss, logs = self.criterion(self.model, pixels, step)
        loss.backward()
        ranks.average(p.grad for p in self.trained.parameters() if p.grad is not None)
        tokens = len(indices) * pixels.shape[-2] * pixels.shape[-1] // self.model.factor ** 2
        logs = {name: ranks.sum(value) / ranks.count for name, value in logs.items()}
        return logs, tokens, lambda: [self.source.title(i) for i in indices]

    def sample(self, path: Path) -> dict:
        """Writes a grid: eight pictures above their reconstructions."""
        pixels = self.pixels(range(min(8, len(self.source))))
        with torch.no_grad():
            shown = [*pixels, *self.model.decode(self.model.encode(pixels))]
        if self.args.ranks.is_first:
            save_image(grid([to_image(p) for p in shown], columns=len(pixels)), path.with_suffix(".png"))
        return {}

    def save(self, directory: Path) -> None:
        """Writes the codec."""
        if self.args.ranks.is_first:
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
        return self.model.folded(whole_state(self.model)["model"])


class TextStage(NextToken):
    """Not in the paper, which loads Qwen-7B: pre-trains the small language model that stands in for it."""
    inputs = ()

    def __init__(self, args, preset: Preset):
        self.args, self.recipe, self.preset = args, args.recipe, preset
        source = open_source(args.data, preset.pictures, args.seed, things=preset.things)
        if isinstance(source, World):
            self.document = lambda rng: corpus.document(rng, preset.things)
        else:
            self.document = lambda rng: source.caption(rng.randrange(len(source)), rng) or ""
        rng = random.Random(f"{args.seed}/tokenizer")
        texts = [self.document(rng) for _ in range(preset.documents)]
        self.tokenizer = Tokenizer.train(texts, preset.language.text_vocab)
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
    inputs = ("vqgan", "language")     # flags that name the folders a run begins with
    trains_language = False

    def __init__(self, args, preset: Preset):
        self.args, self.recipe, self.preset = args, args.recipe, preset
        self.start()
        if args.ranks.device.type == "cuda":
            memory = torch.cuda.get_device_properties(args.ranks.device).total_memory
            forecast = check_memory(self.model.config, args.ranks.count, memory, args.shard, self.trains_language)
            if args.ranks.is_first:
                print(forecast)
        self.dtype = self.model.text_embedding.weight.dtype
        self.read()
        missing = self.uncaptioned()
        self.model.uncaptioned = missing if missing.any() else None
        if preset.look_alike:
            self.model.share_rows(self.vqgan.quantize.embedding.weight)
        if not self.trains_language:
            self.model.freeze_language()
        self.spread()
        self.painter = Painter(self.model, self.vqgan, self.tokenizer, self.vqgan.config.resolution)

    def start(self) -> None:
        """Loads codec, tokenizer and language model, and grows the visual side."""
        args = self.args
        self.vqgan = VQGAN.from_pretrained(args.vqgan or args.language, args.ranks.device)
        self.tokenizer = load_tokenizer(args.language)
        self.model = MARS.from_language_model(
            MARS.from_pretrained(args.language), self.vqgan.config.num_embeddings,
            visual_experts=not args.without_experts, route_output=args.route_output, ahead=args.ahead or 1,
            codebook=self.vqgan.quantize.embedding.weight if self.preset.look_alike else None,
            generator=torch.Generator().manual_seed(args.seed))

    def read(self) -> None:
        """Opens the pictures, and encodes them once."""
        args, preset = self.args, self.preset
        self.source = self.open(preset.frames)
        self.codes = encode(self.source, self.vqgan, Encoding(self.vqgan.config.resolution, skip_bad=args.skip_bad),
                            args.out / "codes", args.ranks)
        whole = set(self.codes.whole)
        self.all, self.simple = self.codes.whole, [i for i in self.source.simple() if i in whole]

    def backward(self, step: int, rng: random.Random):
        """As `NextToken.backward`; the stage's last steps part what earlier ones let look like each other."""
        self.model.margin = MARGIN if step >= (1 - self.recipe.compete) * self.recipe.steps else -math.inf
        return super().backward(step, rng)

    def uncaptioned(self) -> torch.Tensor:
        """(codes,) bool: those that pictures without a caption show, and no others."""
        shown = torch.zeros(2, self.vqgan.config.num_embeddings, dtype=torch.bool)
        for i in self.codes.whole:
            captioned = self.source.caption(i, random.Random(0)) is not None
            shown[int(captioned), self.codes[i].astype("int64").ravel()] = True
        return shown[0] & ~shown[1]

    def open(self, frames, **settings):
        """The source; settings are the rendered world's."""
        return open_source(self.args.data, self.preset.pictures, self.args.seed, things=self.preset.things,
                           frames=frames, languages=("en",) * self.args.english + ("zh",), **settings)

    def rows(self, step: int, rng: random.Random):
        """Pictures, each with what it is used for."""
        share = self.preset.caption_share if self.args.caption_share is None else self.args.caption_share
        return stage1_rows(self.source, self.indices(step, rng), self.recipe.batch, rng, share)

    def indices(self, step: int, rng: random.Random) -> list[int]:
        """The pictures that a step draws from."""
        return self.simple if step < self.preset.curriculum * self.recipe.steps else self.all

    def tensors(self, rows):
        """-> tokens (B, T), is_target (B, T)."""
        vocabulary = self.model.vocabulary
        return collate([row.sequence(self.codes[row.index], self.tokenizer, vocabulary, self.size_ids(row))
                        for row in rows], vocabulary.special("<pad>"))

    def size_ids(self, row) -> list[int]:
        """What the sequence says of the picture's size: nothing yet."""
        return []

    def names(self, rows) -> list[str]:
        """Of the pictures."""
        return [self.source.title(row.index) for row in rows]

    def sample(self, path: Path) -> dict:
        """Draws a grid of pictures; on the rendered world also counts how many show what their caption says."""
        rng, ranks, drawn_world = random.Random(self.args.seed + 1), self.args.ranks, self.args.data == "world"
        if drawn_world:
            scenes = [world.sample_scene(rng, "train", self.preset.things) for _ in range(SAMPLES)]
            texts = [world.caption(scene, rng, world.LANGUAGES[i % 2], rng.choice(world.DETAILS))
                     for i, scene in enumerate(scenes)]
        else:
            texts = [self.source.caption(i, rng) for i in range(min(16, len(self.source)))]
        texts = [text for text in texts if text]
        if not texts:
            return {}
        texts += (texts * ranks.count)[:-len(texts) % ranks.count]                   # as many for each rank
        found, shown = {}, []
        for size in self.painter.sizes[:5]:
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
                images = ranks.together(self.painter.paint(ranks.share(texts), seed=self.args.seed, size=size))
            shown += images[:16]
            marks = accuracy(images, texts) if drawn_world else {}
            found |= {f"all {size[0]}x{size[1]}": marks["all"]} if found else marks
        if ranks.is_first:
            save_image(grid(shown), path.with_suffix(".png"))
            write_beside(path.with_suffix(".txt"), lambda p: p.write_text("\n".join(texts[:16]) + "\n"))
        return found

    def save(self, directory: Path) -> None:
        """Writes all that `generate.py` needs: the model, the tokenizer and, in vqgan/, the codec."""
        state, dtype = self.state(), torch.bfloat16 if self.args.save_bf16 else self.dtype
        if self.args.ranks.is_first:
            self.model.save_pretrained(directory, {name: tensor.to(dtype) for name, tensor in state.items()})
            self.tokenizer.save_pretrained(directory)
            self.vqgan.save_pretrained(directory / "vqgan", torch.bfloat16 if self.args.save_bf16 else torch.float32)


class Stage2(Stage1):
    """Sec. 3.4, Stage II: goes on from Stage I with pictures that keep their aspect ratio and fine captions that name
    the size. One caption in four of the rendered world stays coarse (ours), or short prompts would be forgotten."""

    inputs = ("init",)

    def start(self) -> None:
        """Loads all that Stage I, or an earlier Stage II, wrote."""
        self.model, self.vqgan, self.tokenizer = load_stage(self.args.init)
        self.vqgan.to(self.args.ranks.device)
        if self.model.config.long_side:
            raise ValueError(f"{self.args.init}: of Stage III, which only upscales; expected --init of Stage I or II")

    def read(self) -> None:
        """Opens the pictures, encodes them once, and sorts them into buckets of one size."""
        args, preset = self.args, self.preset
        self.source = self.open(preset.aspects)
        how = Encoding(self.vqgan.config.resolution, keep_aspect=True, skip_bad=args.skip_bad)
        self.low = self.codes = encode(self.source, self.vqgan, how, args.out / "codes", args.ranks)
        self.sort(self.codes)

    def open(self, frames, **settings):
        """The source, with mostly fine captions."""
        return super().open(frames, details=("fine", "fine", "fine", "coarse"), **settings)

    def sort(self, codes: Codes, **changes) -> None:
        """Puts pictures of one size together, and notes the sizes, squares first, in the model's config."""
        self.buckets, factor = codes.buckets(codes.whole), self.vqgan.factor
        square_first = sorted(self.buckets, key=lambda size: (size[0] != size[1], size))
        self.model.config = dataclasses.replace(
            self.model.config, sizes=tuple((h * factor, w * factor) for h, w in square_first), **changes)

    def indices(self, step: int, rng: random.Random) -> list[int]:
        """Pictures of one size; the more there are of a size, the more often it has its turn."""
        sizes = list(self.buckets)
        size, = rng.choices(sizes, [len(self.buckets[size]) for size in sizes])
        return self.buckets[size]

    def size_ids(self, row) -> list[int]:
        """The resolution in the caption; in Stage III the large picture's, by way of the small one's."""
        h, w = self.low[row.index].shape
        return self.painter.size_ids(h * self.vqgan.factor, w * self.vqgan.factor)


class Stage3(Stage2):
    """Sec. 3.4, Stage III: the cascade. From a caption and a small picture to the large one, K codes at a time (Eq. 2),
    with weights of its own that start as Stage II's."""

    inputs = ("init", "vqgan")

    def start(self) -> None:
        """Loads Stage II, or an earlier Stage III; another codec, where --vqgan names one, brings rows of its own."""
        args, preset = self.args, self.preset
        earlier, vqgan, self.tokenizer = load_stage(args.init)
        own = VQGAN.from_pretrained(args.vqgan) if args.vqgan else vqgan
        codebook, old = own.quantize.embedding.weight, vqgan.quantize.embedding.weight
        self.vqgan = own.to(args.ranks.device)
        self.model = MARS.from_earlier_stage(
            earlier, ahead=args.ahead or preset.ahead, codebook=None if torch.equal(codebook, old) else codebook,
            generator=torch.Generator().manual_seed(args.seed))

    def read(self) -> None:
        """Opens the pictures, and encodes each twice: large, and small."""
        args, preset = self.args, self.preset
        if (Path(args.data) / "codes.json").is_file():
            raise ValueError(f"--data {args.data}: holds codes; stage3 needs pictures, and encodes each twice")
        self.source = self.open(preset.large)
        small = Encoding(self.vqgan.config.resolution, keep_aspect=True, skip_bad=args.skip_bad)
        large = dataclasses.replace(small, long_side=preset.long_side)
        self.low = encode(self.source, self.vqgan, small, args.out / "codes-low", args.ranks)
        self.codes = encode(self.source, self.vqgan, large, args.out / "codes", args.ranks)
        self.sort(self.low, long_side=preset.long_side)

    def rows(self, step: int, rng: random.Random):
        """Pictures of one size, each with a small copy that has a few wrong codes."""
        self.model.phase = rng.randrange(self.model.config.ahead)
        return stage3_rows(self.source, self.low, self.indices(step, rng), self.recipe.batch, rng, self.args.corruption,
                           self.vqgan.config.num_embeddings)

    def sample(self, path: Path) -> dict:
        """Makes up to sixteen training pictures larger -> how near they come to what they should be, beside bicubic
        scaling, by one code a pass and by K; writes eight: bicubic, ours, as they should be."""
        ranks = self.args.ranks
        captioned = (i for i in self.codes.whole if self.source.caption(i, random.Random(0)))
        some = list(itertools.islice(captioned, 16 * ranks.count))
        some = some[:len(some) // ranks.count * ranks.count]                         # as many for each rank
        if not some:
            return {}
        how = Encoding(self.vqgan.config.resolution, keep_aspect=True)
        small = [how.prepare(self.source.image(i), self.vqgan.factor) for i in some]
        how = dataclasses.replace(how, long_side=self.preset.long_side)
        large = [how.prepare(self.source.image(i), self.vqgan.factor) for i in some]
        texts = [self.source.caption(i, random.Random(0)) for i in some]
        heads = sorted({1, self.model.config.ahead})
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            ours = {k: ranks.together(self.painter.upscale(ranks.share(small), ranks.share(texts),
                                                           dataclasses.replace(DETAIL, heads=k))) for k in heads}
        plain = [image.resize(true.size, Image.Resampling.BICUBIC) for image, true in zip(small, large)]
        if ranks.is_first:
            columns = min(8, len(some))
            shown = [*plain[:columns], *(image for images in ours.values() for image in images[:columns])]
            save_image(grid([*shown, *large[:columns]], columns), path.with_suffix(".png"))
        return {f"psnr_{k}": psnr(images, large) for k, images in ours.items()} | {"psnr_bicubic": psnr(plain, large)}


class Joint(Stage2):
    """Sec. 4.6: text and images in one output, on recipes; goes on from Stage I or II and trains the language too.

    It has to: the steps come before every picture, so by causality no visual weight can change a single text logit
    there, and with the language side frozen the model would go on writing the text it was pre-trained on.
    """
    trains_language = True

    def read(self) -> None:
        """Makes recipes, one for six of the preset's pictures (tiny: 10,000, as in the paper), and encodes theirs."""
        args = self.args
        if args.data != "world":
            raise ValueError(f'--data is {args.data!r}, but recipes are written of the rendered world alone: "world"')
        self.source = RecipePictures(max(1, self.preset.pictures // 6), args.seed)
        how = Encoding(self.vqgan.config.resolution)
        self.codes = encode(self.source, self.vqgan, how, args.out / "codes", args.ranks)

    def uncaptioned(self) -> torch.Tensor:
        """(codes,) bool: those that no recipe shows, so that what Stage II learned of them stays."""
        missing = torch.ones(self.vqgan.config.num_embeddings, dtype=torch.bool)
        for i in self.codes.whole:
            missing[self.codes[i].astype("int64").ravel()] = False
        return missing

    def rows(self, step: int, rng: random.Random) -> list[int]:
        """Recipes, by number."""
        return [rng.randrange(len(self.source.recipes)) for _ in range(self.recipe.batch)]

    def tensors(self, rows):
        """-> tokens (B, T), is_target (B, T)."""
        vocabulary, encode_text, sequences = self.model.vocabulary, self.tokenizer.encode, []
        for j in rows:
            recipe, pictures = self.source.recipes[j], [self.codes[i] for i in self.source.of(j)]
            sequences.append(joint(encode_text(title_text(recipe.title)), encode_text(text_of(recipe)), pictures,
                                   vocabulary, self.tokenizer.eos))
        return collate(sequences, vocabulary.special("<pad>"))

    def names(self, rows) -> list[str]:
        """The titles."""
        return [self.source.recipes[j].title for j in rows]

    def sample(self, path: Path) -> dict:
        """Draws recipes of new titles, writes the first four as pages, and says how often they are right."""
        rng, ranks = random.Random(self.args.seed + 1), self.args.ranks
        count = 32 + -32 % ranks.count                                               # as many for each rank
        titles = [sample_recipe(rng, language=world.LANGUAGES[i % 2]).title for i in range(count)]
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            drawn = ranks.together(self.painter.draw_recipes(ranks.share(titles), seed=self.args.seed))
        if ranks.is_first:
            for k, (title, (text, images)) in enumerate(zip(titles[:4], drawn), 1):
                save_recipe(path / f"{k}.md", title, text, images)
        return recipe_accuracy([judge_recipe(title, *page) for title, page in zip(titles, drawn)])


STAGES = {"vqgan": VQGANStage, "text": TextStage, "stage1": Stage1, "stage2": Stage2, "stage3": Stage3, "joint": Joint}


def check_memory(config: MARSConfig, gpus: int, memory: int, shard: bool, trains_language: bool = False) -> str:
    """The forecast for one GPU, before activations. Raises ValueError, one line, where it is more than its `memory`."""
    frozen, trained = count_parameters(config)
    if trains_language or not config.visual_experts:
        frozen, trained = 0, frozen + trained
    ddp, sharded = training_memory(frozen, trained, gpus)
    need, way = (sharded, "--shard") if shard else (ddp, "DDP")
    line = f"forecast: {way} on {gpus} GPUs of {memory / 1e9:.0f} GB takes {need / 1e9:.1f} GB of each"
    if need > memory and not shard and sharded < memory:
        raise ValueError(f"{line}; pass --shard, which takes {sharded / 1e9:.1f} GB")
    if need > memory:
        raise ValueError(f"{line}; expected at least {-(-need * gpus // memory):.0f} GPUs with --shard")
    return line
