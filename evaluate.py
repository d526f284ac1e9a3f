"""How often images and captions are correct (paper Sec. 4), on any folder of images with captions.

    python evaluate.py --weights weights/emoji --data data/emoji --prompts 1000
    python evaluate.py --weights runs/stage2 --pairs data/emoji/pairs      Stage II: several emoji in an image
    python evaluate.py --weights runs/stage2 --stage3 runs/stage3          Stage III: what --weights draws, enlarged
    python evaluate.py --weights runs/joint --recipes                      Sec. 4.6: text and images

Not in the paper, whose tables need CLIP, Inception and human eyes: here the nearest image of the data set decides, see
judge.py. Each task notes marks and values in found[task, split, language, what].
"""
import itertools
import math
import random
import re
import time
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

from config import ends_in_one_line, parse, setting    # first, for Ctrl-C

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import decode_each, encode_each
from dataset import Dataset, inside, open_recipes
from distributed import check_device
from files import read_text, write_json
from generate import Pipeline, in_batches
from images import psnr, resize_and_crop, to_pixels
from judge import Judge, choose, language_of, plain, questions, rows_of, split_of, table
from sampling import GREEDY, Sampling, generate_text

ATTRIBUTES = ("concept", "tone", "gender", "color")                   # facts of an image that its prompt asks for


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Sampling):
    """Counts how often images and captions are correct: those of Stage I, or of --pairs, --recipes or --stage3."""
    weights: Path = setting(Path("weights/emoji"), "what train.py wrote", metavar="DIR")
    data: Path = setting(Path("data/emoji"), "a folder of images with captions, to judge by", metavar="FOLDER")
    prompts: int = setting(1000, "at most, of each split and language", least=1)
    best_of: int = setting(1, "candidates of each image and caption, of which the best is kept", least=1, most=1024)
    pairs: Path | None = setting(None, "Stage II: a folder of images made of those of --data", metavar="FOLDER")
    recipes: bool = setting(False, "Sec. 4.6: recipes.jsonl of --data")
    stage3: Path | None = setting(None, "Stage III: the weights that enlarge", metavar="DIR")
    seed: int = setting(0, "of the choice of prompts, and of the first image", least=0, most=2**32)
    out: Path = setting(Path("report.json"), "JSON to write")
    device: str = setting("cpu", "cpu, cuda, cuda:1 ...")

    def __post_init__(self):
        super().__post_init__()
        if self.recipes and (self.guidance, self.best_of, self.k, self.unverified) != (1, 1, 0, False):
            raise ValueError("guidance, --best-of, --k and --unverified do nothing with --recipes")


def draw(pipeline: Pipeline, texts: list[str], c: EvaluateConfig, size: tuple[int, int]) -> list[Image.Image]:
    """An image of `size` for each prompt, with the seeds S, S + 1, ..."""
    return pipeline.text_to_image(texts, c, range(c.seed, c.seed + len(texts)), size=size, best_of=c.best_of)


# ----------------------------------------------------------------------------- the tasks

def drawing(found: dict, pipeline: Pipeline, judge: Judge, c: EvaluateConfig) -> None:
    """Sec. 3.4, Stage I: top-1 and top-5; of attributes, where the image asked for has one, that of the nearest."""
    asked = questions(judge.dataset, c.prompts, c.seed)
    indices = judge.nearest(draw(pipeline, [text for *_, text, _ in asked], c, pipeline.sizes[0]))
    correct = judge.correct(indices, [judge.images_of(text) for *_, text, _ in asked]).tolist()
    for (split, language, _, i), row, nearest in zip(asked, correct, indices[:, 0].tolist()):
        found["drawing", split, language, "top-1"].append(row[0])
        found["drawing", split, language, "top-5"].append(any(row))
        for name in ATTRIBUTES:
            if value := judge.dataset.facts(i).get(name):
                same = judge.dataset.facts(nearest).get(name) == value
                found["drawing", split, language, name].append(row[0] or same)


def reading(found: dict, pipeline: Pipeline, judge: Judge, c: EvaluateConfig) -> None:
    """Sec. 3.3, Tokenization, and Sec. 3.4, captioning, on up to `prompts` images of each split.

    PSNR in dB, and top-1, of reconstructions, which no drawn image can exceed; usage of the codebook; a caption is
    exact if it is any text of its image.
    """
    pools = defaultdict(list)
    for i in range(len(judge.dataset)):
        pools[split_of(judge.dataset.facts(i)),].append(i)
    chosen = choose(pools, c.prompts, c.seed)
    images = [resize_and_crop(judge.dataset.image(i), *pipeline.sizes[0]) for _, i in chosen]
    tokens = torch.stack(encode_each(pipeline.vqgan, [to_pixels(image) for image in images]))
    restored, texts = decode_each(pipeline.vqgan, tokens), pipeline.caption_images(images, c.best_of, c.seed)
    exact = judge.correct(torch.tensor([[i] for _, i in chosen]), [judge.images_of(text) for text in texts])
    same = judge.shows(restored, [[i] for _, i in chosen])
    for j, ((split,), _) in enumerate(chosen):
        found["captioning", split, "all", "exact"].append(bool(exact[j]))
        found["reconstruction", split, "all", "top-1"].append(same[j])
        found["reconstruction", split, "all", "PSNR"].append(psnr(restored[j], images[j]))
    usage = len(tokens.unique()) / pipeline.vqgan.config.num_embeddings
    found["reconstruction", "all", "all", "codebook usage"].append(usage)


def language(found: dict, pipeline: Pipeline, judge: Judge, c: EvaluateConfig) -> None:
    """Sec. 3.2, language is kept: perplexity on lines of text.txt by the text head alone, and names translated."""
    model, tokenizer, rng, nats, n = pipeline.model, pipeline.tokenizer, random.Random(f"{c.seed}/text"), 0.0, 0
    lines = [line for line in read_text(inside(c.data, "text.txt", c.data)).split("\n") if line.strip()]
    for line in tqdm(rng.sample(lines, min(c.prompts, len(lines))), desc="perplexity"):
        ids = torch.tensor([[*tokenizer.encode(line), tokenizer.eos][:model.config.max_seq_len]], device=c.device)
        logits = model.text_logits(model.hidden(ids[:, :-1]))[0].float()                 # (T, V_t)
        nats, n = nats + F.cross_entropy(logits, ids[0, 1:], reduction="sum").item(), n + len(logits)
    found["language", "text.txt", "all", "perplexity"].append(math.exp(nats / max(1, n)))
    names = [judge.dataset.facts(i).get("names", {}) for i in range(len(judge.dataset))]
    names = rng.sample(names, min(c.prompts, len(names)))
    for known, other, wording in (("en", "zh", "{} in Chinese is"), ("zh", "en", "{}的英文是")):
        pairs = [(own[known][0], own[other]) for own in names if own.get(known) and own.get(other)]
        prompts = [tokenizer.encode(wording.format(name)) for name, _ in pairs]
        answers = in_batches(lambda prompts: generate_text(model, prompts, tokenizer, 48, GREEDY, range(len(prompts))),
                             prompts)
        for (_, right), (ids, _) in zip(pairs, answers):
            found["language", "names", other, "translation"].append(plain(tokenizer.decode(ids)) in map(plain, right))


def several(found: dict, pipeline: Pipeline, judge: Judge, c: EvaluateConfig) -> None:
    """Sec. 3.4, Stage II: images of several of the data set's; the fact "cells" names them, in order.

    all: each is in its place; cell: one is; objects: all are there; relation: all are in place, where all are there.
    """
    dataset, by_size = Dataset(c.pairs), defaultdict(list)
    at = {Path(judge.dataset.name(i)).stem: i for i in range(len(judge.dataset))}
    for *question, i in questions(dataset, c.prompts, c.seed):
        (width, height), cells = dataset.image(i).size, dataset.facts(i).get("cells", [])
        if not set(cells) <= at.keys() or len(cells) * min(width, height) != max(width, height):
            raise ValueError(f'{c.pairs}, {dataset.name(i)}: "cells" is {cells}, expected names of images of {c.data}, '
                             "one for each square")
        size = next((size for size in pipeline.sizes if size[0] * width == size[1] * height), None)
        by_size[size].append((*question, [[at[cell]] for cell in cells]))
    if left_out := by_size.pop(None, []):
        print(f"left out: {len(left_out)} images of a shape that these weights do not draw")
    for size, asked in sorted(by_size.items()):
        for (split, lang, _, wanted), image in zip(asked, draw(pipeline, [row[2] for row in asked], c, size)):
            side, n = min(size), len(wanted)
            nearest = judge.nearest([image.crop((x, y, x + side, y + side)) for y in range(0, size[0], side)
                                     for x in range(0, size[1], side)])[:, 0]            # (n,), by cell
            correct = judge.correct(nearest.expand(n, n), wanted)                        # (n, n): wanted, cell
            placed = correct.diagonal().tolist()
            there = any(all(correct[range(n), order]) for order in itertools.permutations(range(n)))
            for what, marks in {"all": [all(placed)], "cell": placed, "objects": [there],
                                "relation": [all(placed)] * there}.items():
                found[f"several, {size[0]}x{size[1]}", split, lang, what] += marks
    for (_, *name), marks in list(found.items()):
        found[("several, all sizes", *name)] += marks


def recipes(found: dict, pipeline: Pipeline, judge: Judge, c: EvaluateConfig) -> None:
    """Sec. 4.6: titles of recipes.jsonl, up to `prompts` of each split and language.

    parsed: numbered steps, each a text of some image; steps: they are the recipe's; image: one is what its step says;
    all: the steps are the recipe's, and every step has its image.
    """
    pools = defaultdict(list)
    for recipe in open_recipes(c.data):
        pools[split_of(recipe.facts), language_of(recipe.title)].append(recipe)
    if not pools:
        raise ValueError(f"{c.data}: no recipe in its recipes.jsonl, expected some to write")
    asked = choose(pools, c.prompts, c.seed)
    pages = pipeline.interleaved([recipe.title for _, recipe in asked], c, range(c.seed, c.seed + len(asked)))
    for ((split, lang), recipe), (text, images) in zip(asked, pages):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        numbered = [re.fullmatch(rf"{i}\. (.+)", line) for i, line in enumerate(lines, 1)]
        meant, n = [judge.images_of(match[1]) if match else [] for match in numbered], min(len(lines), len(images))
        shown = judge.shows(images[:n], meant[:n]) if n else []
        shown += [False] * (max(len(lines), len(images), 1) - n)                         # a step or an image too few
        steps = list(map(plain, lines)) == list(map(plain, recipe.steps))
        for what, marks in {"all": [steps and all(shown)], "parsed": [bool(lines) and all(meant)], "steps": [steps],
                            "image": shown}.items():
            found["recipes", split, lang, what] += marks


def enlarging(found: dict, pipeline: Pipeline, judge: Judge, c: EvaluateConfig) -> None:
    """Sec. 3.4, Stage III, and Eq. 2: K tokens a forward pass, with and without verification, and bicubic scaling.

    Top-1 of drawn images, before and after. PSNR in dB of enlarged images of the data set, which were made small and
    went through the image tokenizer, as drawn ones have; forward passes and seconds of each, one at a time. The row
    "image tokenizer" is the true large image after the image tokenizer alone.
    """
    upscaler, size, passes = Pipeline.from_pretrained(c.stage3, c.device), pipeline.sizes[0], []
    K, side = upscaler.model.config.k, upscaler.model.config.long_side
    if not side:
        raise ValueError(f"{c.stage3}: weights of another stage, expected those of train.py stage3")
    asked = [question for question in questions(judge.dataset, c.prompts, c.seed) if question[0] == "seen"]
    if not asked:
        raise ValueError(f"{c.data}: every image is held out, expected some of the split \"train\" to enlarge")
    texts, images = [row[2] for row in asked], [judge.dataset.image(row[3]) for row in asked]
    drawn, wanted = draw(pipeline, texts, c, size), [judge.images_of(text) for text in texts]
    small = pipeline.reconstruct([resize_and_crop(image, *size) for image in images])
    true = [resize_and_crop(image, side, side) for image in images]

    def note(way: str, what: str, values) -> None:
        for (split, lang, *_), value in zip(asked, values):
            found[f"x{side}, {way}", split, lang if what == "top-1" else "all", what].append(value)
    note("before", "top-1", judge.shows(drawn, wanted))
    note("bicubic", "PSNR", [psnr(image.resize((side, side), Image.Resampling.BICUBIC), truth)
                             for image, truth in zip(small, true)])
    note("image tokenizer", "PSNR", map(psnr, upscaler.reconstruct(true), true))
    ways = {f"K = {k}": Sampling(temperature=0.0, k=k, unverified=k > 1) for k in sorted({1, 4, K}) if k <= K}
    for way, sampling in (ways | {f"K = {K} verified": Sampling(temperature=0.0, k=K)}).items():
        note(way, "top-1", judge.shows(upscaler.super_resolve(drawn, texts, sampling), wanted))
        for (split, _, text, _), image, truth in zip(tqdm(asked, desc=way), small, true):
            passes.clear()
            started = time.perf_counter()
            larger, = upscaler.super_resolve([image], [text], sampling, on_tokens=passes.append)
            seconds = time.perf_counter() - started
            for what, value in {"PSNR": psnr(larger, truth), "passes": len(passes), "seconds": seconds}.items():
                found[f"x{side}, {way}", split, "all", what].append(value)


def main(arguments: list[str] | None = None) -> None:
    """The command: prints a table and writes the report."""
    with ends_in_one_line("evaluate.py"), torch.inference_mode():
        c, found = parse(EvaluateConfig, arguments), defaultdict(list)
        pipeline, judge = Pipeline.from_pretrained(c.weights, check_device(c.device)), Judge(Dataset(c.data))
        tasks = [several] * bool(c.pairs) + [recipes] * c.recipes + [enlarging] * bool(c.stage3)
        for task in tasks or [drawing, reading] + [language] * (c.data / "text.txt").is_file():
            task(found, pipeline, judge, c)
        names, rows = [field.name for field in fields(Sampling)] + ["best_of"], rows_of(found)
        print(table(rows))
        write_json(c.out, {"weights": c.weights.resolve().name, "data": c.data.resolve().name, "seed": c.seed,
                           "sampling": {name: getattr(c, name) for name in names}, "rows": rows})
        print(f"wrote {c.out}")


if __name__ == "__main__":
    main()
