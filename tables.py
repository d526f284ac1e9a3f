"""The paper's tables and Fig. 7 once more, in the rendered world (paper Sec. 4).

    python tables.py 2                                  Table 2: what is drawn right, attribute by attribute
    python tables.py 3 --runs runs/table3               Table 3: with and without visual experts; trains six models
    python tables.py 4 --stage1 runs/stage1             Table 4: Stages I, II and III
    python tables.py 7 --runs runs/table3               Fig. 7: Chinese, and Chinese held low; trains three or six
    python tables.py export --captions FILE --out DIR   pictures for clean-fid and T2I-CompBench

Not in the paper: the checker in place of its trained judges, a Fréchet distance on our codec's latents in place of
FID, and three seeds, with 95% intervals of their mean.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import train
import world
from checker import KEYS, check
from checkpoint import one_line_errors, write_json
from data import save_image, to_pixels
from distributed import ready_device
from evaluate import CELL, perplexity, questions
from generate import ENLARGED, TINY, Painter, Sampling
from vqgan import VQGAN

T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}           # Student's t for the mean of so many seeds
PAPER = {
    "2": {"MARS": {"color": 69.13, "shape": 54.31, "texture": 71.23, "spatial": 19.24, "non-spatial": 32.10,
                   "complex": 40.49}},
    "3": {"without visual experts": {"FID": 10.13, "CLIPScore": 30.14},
          "with visual experts": {"FID": 8.24, "CLIPScore": 31.03}},
    "4": {"Stage I": {"FID": 8.24, "CLIPScore": 31.03}, "Stage II": {"FID": 7.02, "CLIPScore": 32.21},
          "Stage III": {"FID": 6.92, "CLIPScore": 32.33}},
    "7": {},
}


# ----------------------------------------------------------------------------- measures

@torch.no_grad()
def features(vqgan: VQGAN, images: list[Image.Image]) -> np.ndarray:
    """What the Fréchet distance compares: the codec's latents before quantisation, mean over a picture's cells.
    -> (N, d) float64."""
    found = [vqgan.latents(torch.stack([to_pixels(image) for image in images[i:i + 64]])).mean(dim=(2, 3))
             for i in range(0, len(images), 64)]
    return torch.cat(found).double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance between the Gaussians of two sets of features (N, d): |m_a - m_b|^2 + tr(C_a + C_b -
    2 (C_a C_b)^1/2). FID is this of Inception's features; ours are our codec's, so it is never called so."""
    C_a, C_b = np.cov(a.T), np.cov(b.T)                                                # (d, d)
    values, vectors = np.linalg.eigh(C_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ C_b @ root).clip(0)).sum()               # of a symmetric likeness
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(C_a) + np.trace(C_b) - 2 * cross)


def over_seeds(values: list[float]) -> dict:
    """Mean of one value a seed, and Student's 95% interval of it, where there is more than one."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return {"mean": mean, "seeds": values}
    spread = T_95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "seeds": values}


def score(painter: Painter, judge: VQGAN, n: int, seed: int, things: int | None = None,
          upscaler: Painter | None = None) -> dict[str, float]:
    """Draws n prompts of seen pairs -> shares in per cent that are right, by attribute and language, and the Fréchet
    distance to renders of the same scenes. upscaler: Stage III, whose pictures are made small again for the distance
    alone (Table 1's caption)."""
    asked = questions("train", n, seed, things, painter.sizes[0])
    texts, cell = [text for _, text, _ in asked], CELL
    images = small = painter.paint(texts, Sampling(), seed)
    if upscaler:
        images = upscaler.upscale(images, texts, seed=seed, best_of=ENLARGED)
        cell = CELL * images[0].width // small[0].width
        small = [image.resize(before.size, Image.Resampling.BOX) for image, before in zip(images, small)]
    found = [check(image, world.parse(text), cell) for image, text in zip(images, texts)]
    share = lambda marks: 100 * sum(marks) / len(marks)
    shares = {key: share(marks) for key in KEYS if (marks := [row[key] for row in found if row[key] is not None])}
    for language in world.LANGUAGES:
        shares[language] = share([row["all"] for row, (_, _, spoken) in zip(found, asked) if spoken == language])
    true = [world.render(scene, CELL) for scene, _, _ in asked]
    return shares | {"frechet": frechet(features(judge, small), features(judge, true))}


# ----------------------------------------------------------------------------- the tables

def train_stage1(args, name: str, seed: int, *flags) -> Path:
    """Trains one Stage I, unless it is there; all of a preset share its codec and its language model."""
    runs, steps = args.runs / args.preset, str(args.steps)

    def once(out: Path, *command) -> Path:
        if not (out / "config.json").is_file():
            there = ["--resume"] if any(out.glob("checkpoint-*.pt")) else []
            train.main([*command, "--preset", args.preset, "--device", args.device, "--out", str(out), *there])
        return out
    vqgan, text = (once(runs / stage, stage) for stage in ("vqgan", "text"))
    return once(runs / f"{name.replace(' ', '-')}-{steps}x{args.batch}-{seed}", "stage1", "--vqgan", str(vqgan),
                "--language", str(text), "--steps", steps, "--batch", str(args.batch), "--seed", str(seed),
                "--sample-every", steps, *flags)


def trained(args, variants: dict[str, tuple[str, ...]]) -> dict[str, list[dict]]:
    """Trains each variant of Stage I, given as flags of train.py, with each seed -> its scores, one a seed."""
    things, judge = train.PRESETS[args.preset].things, VQGAN.from_pretrained(TINY)
    rows = {name: [] for name in variants}
    for seed in args.seeds:
        for name, flags in variants.items():
            painter = Painter.from_pretrained(train_stage1(args, name, seed, *flags), args.device)
            rows[name].append(score(painter, judge, args.prompts, seed, things) | {
                "perplexity": perplexity(painter.model, painter.tokenizer, 64, seed, things)})
    return rows


def table_2(args) -> dict[str, list[dict]]:
    """Table 2: relation stands for its spatial column, count for non-spatial, all for complex; en and zh are `all` of
    the English and of the Chinese prompts, for Fig. 7."""
    painter, judge = Painter.from_pretrained(args.weights, args.device), VQGAN.from_pretrained(TINY)
    return {"MARS": [score(painter, judge, args.prompts, seed) for seed in args.seeds]}


def table_3(args) -> dict[str, list[dict]]:
    """Table 3: the visual experts, and what it does to the language model to train without them."""
    return trained(args, {"without visual experts": ("--without-experts",), "with visual experts": ()})


def table_4(args) -> dict[str, list[dict]]:
    """Table 4: the same prompts drawn after each stage that there are weights of. Its seeds are of the prompts and the
    drawing: there is one model of each stage."""
    judge, two, stages = VQGAN.from_pretrained(TINY), Painter.from_pretrained(args.weights, args.device), {}
    if args.stage1:
        stages["Stage I"] = Painter.from_pretrained(args.stage1, args.device), None
    stages["Stage II"] = two, None
    if (args.weights / "stage3" / "config.json").is_file():
        stages["Stage III"] = two, Painter.from_pretrained(args.weights / "stage3", args.device)
    return {name: [score(painter, judge, args.prompts, seed, upscaler=upscaler) for seed in args.seeds]
            for name, (painter, upscaler) in stages.items()}


def figure_7(args) -> dict[str, list[dict]]:
    """Fig. 7 and Sec. 4.4: drawing from Chinese, with one caption in two Chinese, and with one in twenty."""
    return trained(args, {"with visual experts": (), "one caption in twenty Chinese": ("--english", "19")})


TABLES = {"2": (table_2, ("colour", "shape", "texture", "relation", "count", "all", "en", "zh", "frechet")),
          "3": (table_3, ("all", "colour", "shape", "texture", "frechet", "perplexity")),
          "4": (table_4, ("all", "colour", "shape", "relation", "frechet")),
          "7": (figure_7, ("en", "zh", "all"))}


def show(report: dict) -> str:
    """A report as a table, a line a measure: mean and 95% interval over seeds; below it what the paper's table says."""
    lines = [f"{'':12}" + "".join(f"{name:>32}" for name in report["rows"])]
    for key in report["columns"]:
        digits, cells = 3 if key in ("frechet", "perplexity") else 1, []
        for row in report["rows"].values():
            mean, *ends = (f"{row[key][end]:.{digits}f}" for end in ("mean", "low", "high") if end in row[key])
            cells.append(mean + (" ({} to {})".format(*ends) if ends else ""))
        lines.append(f"{key:12}" + "".join(f"{cell:>32}" for cell in cells))
    for name, row in PAPER[report["table"]].items():
        lines.append(f"the paper's {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))
    return "\n".join(lines)


# ----------------------------------------------------------------------------- for the tools that people trust

def export(painter: Painter, captions: list[str], out: Path, each: int, seed: int) -> int:
    """Writes `each` pictures a caption as T2I-CompBench's scripts read them, `samples/CAPTION_000000.png`, counted
    through; clean-fid takes any folder, so `samples` too. Files that are there stay. -> how many there are.

    Raises ValueError, one line, for a caption that such a file name cannot hold, or where there is none.
    """
    if not captions:
        raise ValueError("no captions, expected one a line")
    for line, caption in enumerate(captions, 1):
        if "_" in caption or "/" in caption or len(caption.encode()) > 240:
            raise ValueError(f"caption {line}: {caption[:60]!r} cannot be a file name that T2I-CompBench splits at its "
                             "last '_'; expected no '_', no '/', and at most 240 bytes")
    names = [(caption, out / "samples" / f"{caption}_{i * each + k:06d}.png")
             for i, caption in enumerate(captions) for k in range(each)]
    for start in tqdm(range(0, len(names), 64), desc="drawing", unit="batch"):
        some = names[start:start + 64]
        if not all(path.is_file() for _, path in some):
            images = painter.paint([caption for caption, _ in some], Sampling(), seed + start)
            for image, (_, path) in zip(images, some):
                if not path.is_file():
                    save_image(image, path)
    return len(names)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The paper's tables and Fig. 7, in the rendered world.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=[*TABLES, "export"], help="a table, Fig. 7, or pictures for other tools")
    parser.add_argument("--weights", type=Path, default=TINY, metavar="DIR", help="2, 4, export: Stage II's weights")
    parser.add_argument("--stage1", type=Path, metavar="DIR", help="4: Stage I's weights, which do not ship")
    parser.add_argument("--runs", type=Path, default=Path("runs/table3"), help="3, 7: where to train; goes on there")
    parser.add_argument("--preset", choices=train.PRESETS, default="nano", help="3, 7: of what to train")
    parser.add_argument("--steps", type=int, default=1200, help="3, 7: of each Stage I")
    parser.add_argument("--batch", type=int, default=16, help="3, 7: pictures a step")
    parser.add_argument("--prompts", type=int, default=300, metavar="N", help="drawn with each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--captions", type=Path, metavar="FILE", help="export: one caption a line")
    parser.add_argument("--each", type=int, default=1, metavar="N", help="export: pictures a caption")
    parser.add_argument("--out", type=Path, help="file or folder to write; default: results/table2.json and so on")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    if args.what == "export" and not (args.captions and args.out):
        parser.error("export needs --captions FILE and --out DIR")
    if len(set(args.seeds)) != len(args.seeds) or len(args.seeds) not in (1, *T_95):
        parser.error(f"--seeds: expected 1 to {max(T_95)} different ones")
    if args.prompts < 20 or min(args.steps, args.batch, args.each) < 1:
        parser.error("expected --prompts of at least 20, and --steps, --batch and --each of at least 1")
    return args


def main(arguments: list[str] | None = None) -> None:
    """The command: one clear line and exit code 2 for bad input."""
    args = parse_arguments(arguments)
    with one_line_errors("tables.py"):
        device = ready_device(args.device)
        if args.what == "export":
            captions = [line.strip() for line in args.captions.read_text().splitlines() if line.strip()]
            count = export(Painter.from_pretrained(args.weights, device), captions, args.out, args.each, args.seeds[0])
            print(f"{count} pictures in {args.out / 'samples'}")
            return
        make, columns = TABLES[args.what]
        rows = make(args)
        report = {"table": args.what, "columns": columns, "prompts": args.prompts, "seeds": args.seeds,
                  "rows": {name: {key: over_seeds([one[key] for one in found]) for key in columns}
                           for name, found in rows.items()}}
        if args.what in "37":
            report |= {"preset": args.preset, "steps": args.steps, "batch": args.batch}
        out = args.out or Path("results") / f"{'figure' if args.what == '7' else 'table'}{args.what}.json"
        write_json(out, report)
        print(show(report))
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
