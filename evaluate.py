"""How often the pictures are right, and the captions (paper Sec. 4, in a world small enough to count in).

    python evaluate.py --weights weights/tiny --prompts 300 --out report.json

Not in the paper, whose tables need CLIP, Inception and human eyes: here a checker decides from pixels alone.
"""
import argparse
import dataclasses
import math
import random
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import corpus
import world
from checker import KEYS, check
from checkpoint import one_line_errors, write_json
from data import psnr, text_rows
from distributed import ready_device
from generate import CAPTIONS, DETAIL, ENLARGED, TINY, Painter, Sampling, write_text
from mars import MARS, cross_entropy_in_chunks
from recipes import agrees, claims, parse_steps
from recipes import sample as sample_recipe
from tokenizer import Tokenizer

CELL = 16              # pixels a cell of the rendered world, in all stages but the third
SPLITS = {"seen pairs": "train", "unseen combinations": "held_out_combination", "held-out pairs": "held_out_pair"}


def interval(right: int, n: int) -> tuple[float, float]:
    """Not in the paper: Wilson's 95% interval of a share, right of n."""
    z, p = 1.96, right / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def counted(what: dict, marks: list[bool]) -> dict:
    """One row of the report: `what` it is about, the share of right marks, and its 95% interval."""
    right, n = sum(marks), len(marks)
    low, high = interval(right, n)
    return {**what, "right": right, "n": n, "share": right / n, "low": low, "high": high}


def by_language(task: str, split: str, found: list[tuple[str, dict]], keys) -> list[dict]:
    """(language, {key: marks}) of each prompt -> rows of each language, and of both together."""
    rows = []
    for language in (*world.LANGUAGES, "both"):
        for key in keys:
            marks = [mark for spoken, row in found if language in (spoken, "both") for mark in row.get(key, ())]
            if marks:
                rows.append(counted({"task": task, "split": split, "language": language, "what": key}, marks))
    return rows


def questions(split: str, n: int, seed: int, things: int | None = None,
              size: tuple[int, int] = (96, 96)) -> list[tuple[world.Scene, str, str]]:
    """n scenes of a split with a caption and its language, by turns English and Chinese, coarse and fine.

    size: (H, W) in pixels; with that of the pictures themselves the scenes fit.
    """
    rng = random.Random(f"{seed}/{split}")
    asked = []
    for i in range(n):
        scene = world.sample_scene(rng, split, things, size[0] // CELL, size[1] // CELL)
        language = world.LANGUAGES[i % 2]
        asked.append((scene, world.caption(scene, rng, language, world.DETAILS[i // 2 % 2]), language))
    return asked


def accuracy(images, texts: list[str]) -> dict[str, float]:
    """Share of pictures that show what their captions say, by attribute, where captions speak of it."""
    found = [check(image, world.parse(text)) for image, text in zip(images, texts)]
    said = {key: [row[key] for row in found if row[key] is not None] for key in KEYS}
    return {key: sum(marks) / len(marks) for key, marks in said.items() if marks}


def drawing(painter: Painter, n: int, seed: int, sampling: Sampling, things: int | None, best_of: int = 1,
            size: tuple[int, int] | None = None, splits=tuple(SPLITS)) -> list[dict]:
    """Draws n prompts of each split and checks the pictures -> rows by split, language and attribute."""
    rows, task = [], "drawing" if best_of == 1 else f"best of {best_of}"
    task += f" {size[0]}x{size[1]}" if size else ""
    for name in splits:
        if name == "unseen combinations" and things == 1:
            continue
        asked = questions(SPLITS[name], n, seed, things, size or painter.sizes[0])
        images = []
        for start in tqdm(range(0, n, 50), desc=f"{task}, {name}", unit="batch"):
            texts = [text for _, text, _ in asked[start:start + 50]]
            images += painter.paint(texts, sampling, seed + start, best_of=best_of, size=size)
        found = [(language, check(image, world.parse(text))) for image, (_, text, language) in zip(images, asked)]
        found = [(language, {key: [mark] for key, mark in row.items() if mark is not None}) for language, row in found]
        rows += by_language(task, name, found, KEYS)
    return rows


def is_exact(caption: str, scene: world.Scene) -> bool:
    """Whether a caption is true of a scene throughout and names all of it; False where it says nothing that can be
    read."""
    try:
        return world.holds(world.parse(caption), world.claim_of(scene))
    except ValueError:
        return False


def reading(painter: Painter, n: int, seed: int, things: int | None, best_of: int = 1) -> list[dict]:
    """Captions n renders of unseen scenes of seen pairs -> the row of exact ones: true throughout, naming all."""
    scenes = [scene for scene, _, _ in questions("train", n, seed + 1, things, painter.sizes[0])]
    task = "captioning" if best_of == 1 else f"captioning, best of {best_of}"
    texts = painter.describe([world.render(scene) for scene in scenes], best_of=best_of)
    marks = [is_exact(text, scene) for text, scene in zip(texts, scenes)]
    return [counted({"task": task, "split": "seen pairs", "language": "both", "what": "exact"}, marks)]


def restoring(painter: Painter, n: int, seed: int, things: int | None) -> list[dict]:
    """Passes n renders of unseen scenes through the codec -> rows by attribute that is still right."""
    rng = random.Random(f"{seed}/codec")
    height, width = painter.sizes[0]
    scenes = [world.sample_scene(rng, "any", things, height // CELL, width // CELL) for _ in range(n)]
    restored = painter.restore([world.render(scene) for scene in scenes])
    found = [check(image, world.claim_of(scene)) for image, scene in zip(restored, scenes)]
    return [counted({"task": "codec", "split": "all pairs", "language": "-", "what": key}, marks)
            for key in KEYS if (marks := [row[key] for row in found if row[key] is not None])]


def cascading(painter: Painter, upscaler: Painter, n: int, seed: int, sampling: Sampling,
              things: int | None = None) -> list[dict]:
    """Sec. 3.4, Stage III: n renders of unseen scenes made larger, and so are the model's own pictures, in several ways
    -> a row for each: PSNR in dB against the large render, beside bicubic scaling of the small one; shares that the
    checker passes; forward passes after the prompt's, and seconds, for a picture made alone."""
    scale, rows = upscaler.model.config.long_side // max(painter.sizes[0]), []
    asked = questions("train", n, seed, things, painter.sizes[0])
    texts = [text for _, text, _ in asked]
    small, large = ([world.render(scene, cell) for scene, _, _ in asked] for cell in (CELL, CELL * scale))
    drawn = painter.paint(texts, sampling, seed)
    said = [world.parse(text) for text in texts]
    right = lambda images, cell: sum(check(image, claim, cell)["all"] for image, claim in zip(images, said)) / n
    plain = [image.resize(true.size, Image.Resampling.BICUBIC) for image, true in zip(small, large)]
    same = {"psnr_bicubic": psnr(plain, large), "psnr_codec": psnr(upscaler.restore(large), large),
            "drawn_right": right(drawn, CELL)}
    K = upscaler.model.config.ahead
    several = sorted({k for k in (1, 4, 16) if k <= K} | {K})
    for heads, verify, best_of in [(1, False, ENLARGED), *((k, False, 1) for k in several), (K, True, 1)]:
        enlarge = partial(upscaler.upscale, sampling=dataclasses.replace(DETAIL, heads=heads), seed=seed,
                          verify=verify, best_of=best_of)
        ours, again, calls = enlarge(small, texts), enlarge(drawn, texts), []
        counter = upscaler.model.norm.register_forward_hook(lambda *_: calls.append(1))          # once in each pass
        started, alone = time.perf_counter(), min(n, 10)
        for image, text in zip(small[:alone], texts):
            enlarge([image], [text])
        counter.remove()
        rows.append({"heads": heads, "verify": verify, "best_of": best_of, **same, "psnr": psnr(ours, large),
                     "right": right(ours, CELL * scale), "drawn_upscaled_right": right(again, CELL * scale),
                     "passes": len(calls) / alone - best_of, "seconds": (time.perf_counter() - started) / alone})
    return rows


def show_cascade(rows: list[dict]) -> str:
    """The rows of `cascading` as a table."""
    head = ("Stage III", "PSNR", "bicubic", "codec", "right", "drawn", "larger", "passes", "s each")
    lines = [f"{head[0]:16}" + "".join(f"{name:>9}" for name in head[1:])]
    for row in rows:
        name = f"K = {row['heads']}" + ", verified" * row["verify"]
        name += f", best of {row['best_of']}" if row["best_of"] > 1 else ""
        decibels = [f"{row[key]:9.1f}" for key in ("psnr", "psnr_bicubic", "psnr_codec")]
        shares = [f"{100 * row[key]:9.1f}" for key in ("right", "drawn_right", "drawn_upscaled_right")]
        lines.append("".join((f"{name:16}", *decibels, *shares, f"{row['passes']:9.1f}", f"{row['seconds']:9.3f}")))
    return "\n".join(lines)


RECIPE_KEYS = ("steps", "number", "picture", "title", "all")


def judge_recipe(title: str, text: str, images) -> dict[str, list[bool]]:
    """Sec. 4.6, where the paper shows examples: marks of one recipe. Raises ValueError for a title that is unreadable.

    steps: the text is a list of steps that can be drawn; number: as many pictures as steps; picture: each shows what
    all steps up to its own say; title: the steps lead to what it asks for; all: all of these.
    """
    try:
        steps = parse_steps(text)
        told = claims(steps)
    except ValueError:                                           # then nothing says what the pictures have to show
        return {key: [False] * (max(1, len(images)) if key == "picture" else 1) for key in RECIPE_KEYS}
    pictures = [k < len(images) and check(images[k], claim)["all"] for k, claim in enumerate(told)]
    number, asked = len(images) == len(steps), agrees(title, steps)
    return {"steps": [True], "number": [number], "picture": pictures, "title": [asked],
            "all": [number and asked and all(pictures)]}


def recipe_accuracy(judged: list[dict[str, list[bool]]]) -> dict[str, float]:
    """Shares of what `judge_recipe` marks, over all recipes; of pictures, over all pictures."""
    marks = {key: [mark for row in judged for mark in row[key]] for key in RECIPE_KEYS}
    return {key: sum(found) / len(found) for key, found in marks.items()}


def recipes_report(painter: Painter, n: int, seed: int, sampling: Sampling) -> list[dict]:
    """Sec. 4.6: has n recipes of each split written and drawn -> rows by split, language and RECIPE_KEYS."""
    rows = []
    for name, split in SPLITS.items():
        rng = random.Random(f"{seed}/recipes/{split}")
        asked = [sample_recipe(rng, split, world.LANGUAGES[i % 2]) for i in range(n)]
        pages = painter.draw_recipes([recipe.title for recipe in asked], sampling, seed)
        judged = [(recipe.language, judge_recipe(recipe.title, *page)) for recipe, page in zip(asked, pages)]
        rows += by_language("recipes", name, judged, RECIPE_KEYS)
    return rows


@torch.no_grad()
def perplexity(model: MARS, tokenizer: Tokenizer, rows: int, seed: int, things: int | None) -> float:
    """Sec. 3.2's claim that language stays: exp of the mean loss a token on `rows` unseen rows of text, by the text
    head's own softmax, as the language model has it."""
    rng = random.Random(f"{seed}/perplexity")
    tokens = torch.tensor(text_rows(lambda r: corpus.document(r, things), tokenizer, rows, 192, rng))
    tokens = tokens.to(model.norm.weight.device)
    hidden = model.hidden(tokens)[:, :-1].flatten(0, 1)
    return math.exp(cross_entropy_in_chunks(hidden, tokens[:, 1:].flatten(), model.text_logits, 4096).item())


def look_up(model: MARS, tokenizer: Tokenizer, n: int, seed: int, things: int | None = None) -> tuple[float, list[str]]:
    """Asks a language model n questions about captions -> share answered word for word, and a line for each.

    Perplexity hides failure: a model that guesses every colour may still read fluently.
    """
    rng = random.Random(f"{seed}/look-up")
    lines, asked, kinds = [], [], {}
    for _ in range(n):
        scene = world.sample_scene(rng, "any", things)
        text = world.caption(scene, rng, rng.choice(world.LANGUAGES), "fine")
        asked.append(corpus.ask(scene, rng, rng.choice(world.LANGUAGES)))
        lines.append(f"{text} {asked[-1].text}")
    for i, ids in enumerate(write_text(model, [tokenizer.encode(line) for line in lines], tokenizer.eos, 48)):
        kind, answer, said = asked[i].kind, asked[i].answer, tokenizer.decode(ids).strip()
        right = said == answer or said.startswith(answer + " ")          # the text may go on with a new question
        kinds.setdefault(kind, []).append(right)
        lines[i] += f" {'right' if right else 'WRONG'}: {said} (expected {answer})"
    lines.append(", ".join(f"{kind} {sum(marks)}/{len(marks)}" for kind, marks in sorted(kinds.items())))
    return sum(map(sum, kinds.values())) / n, lines


def show(rows: list[dict], head=(*KEYS, "exact")) -> str:
    """The rows as a table: one line a split and language, one column an attribute, shares in per cent."""
    lines = [f"{'':38}" + "".join(f"{key:>12}" for key in head)]
    groups = dict.fromkeys((row["task"], row["split"], row["language"]) for row in rows)
    for task, split, language in groups:
        cells = {row["what"]: row for row in rows
                 if (row["task"], row["split"], row["language"]) == (task, split, language)}
        lines.append(f"{task + ', ' + split + ', ' + language:38}" + "".join(
            f"{100 * cells[key]['share']:12.1f}" if key in cells else f"{'':12}" for key in head))
        whole = cells.get("all") or cells.get("exact")
        lines[-1] += f"   {100 * whole['low']:.1f} to {100 * whole['high']:.1f} of {whole['n']}"
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Counts how often pictures and captions are right.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weights", default=TINY, type=Path, metavar="DIR")
    parser.add_argument("--prompts", default=300, type=int, metavar="N", help="of each split (cascade: 100 at most)")
    parser.add_argument("--things", type=int, choices=(1, 2, 3), help="things a scene; without it one to three")
    parser.add_argument("--cfg", type=float, default=Sampling.cfg, metavar="S", help="guidance scale")
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, metavar="T")
    parser.add_argument("--best-of", type=int, default=1, metavar="N", help="also with the best of N drawn a prompt")
    parser.add_argument("--recipes", type=int, metavar="N", help="of weights of train.py joint: N of each split alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="report.json", type=Path, help="JSON to write")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    for name in ("prompts", "best_of", "recipes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    return args


def main(arguments: list[str] | None = None) -> None:
    """The command: one clear line and exit code 2 for bad input."""
    args = parse_arguments(arguments)
    with one_line_errors("evaluate.py"):
        painter = Painter.from_pretrained(args.weights, ready_device(args.device))
        cascade = args.weights / "stage3"
        upscaler = Painter.from_pretrained(cascade, args.device) if (cascade / "config.json").is_file() else None
        sampling = Sampling(cfg=args.cfg, temperature=args.temperature)
        if args.recipes:
            sampling = Sampling(cfg=1.0, temperature=args.temperature)
            rows = recipes_report(painter, args.recipes, args.seed, sampling)
            print(show(rows, RECIPE_KEYS))
            write_json(args.out, {"weights": args.weights.name, "seed": args.seed, "sampling": vars(sampling),
                                  "rows": rows})
            print(f"wrote {args.out}")
            return
        rows = drawing(painter, args.prompts, args.seed, sampling, args.things)
        if args.best_of > 1:
            rows += drawing(painter, args.prompts, args.seed, sampling, args.things, args.best_of)
        for size in painter.sizes[1:]:
            rows += drawing(painter, args.prompts, args.seed, sampling, args.things, size=size, splits=["seen pairs"])
        for best_of in (1, CAPTIONS):                                # the likeliest words; and as generate.py captions
            rows += reading(painter, args.prompts, args.seed, args.things, best_of)
        rows += restoring(painter, 500, args.seed, args.things)
        share, _ = look_up(painter.model, painter.tokenizer, 200, args.seed, args.things)
        report = {"weights": args.weights.name, "seed": args.seed, "sampling": vars(sampling), "rows": rows,
                  "text_perplexity": perplexity(painter.model, painter.tokenizer, 64, args.seed, args.things),
                  "text_look_up": share}
        print(show(rows))
        if upscaler:
            report["cascade"] = cascading(painter, upscaler, min(args.prompts, 100), args.seed, sampling, args.things)
            print(show_cascade(report["cascade"]))
        print(f"text: perplexity {report['text_perplexity']:.3f}, questions answered {100 * share:.1f}%")
        write_json(args.out, report)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
