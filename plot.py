"""Draws what `metrics.jsonl` holds: the loss, and whatever else was measured along the way.

    pip install matplotlib
    python plot.py runs/stage1 --out curves.png

Not in the paper. The only file that needs matplotlib, which nothing else does.
"""
import argparse
import json
from pathlib import Path

from checkpoint import one_line_errors

EVERY_STEP = ("step", "loss", "lr", "tokens_per_s")                # the rest is measured now and then


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file. Raises ValueError, one line, where it is missing or malformed."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the metrics.jsonl of a training run")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def curves(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Metrics -> {name: [(step, value)]}: the loss, averaged over 50 steps, and each thing measured."""
    smooth = 50
    losses = [row["loss"] for row in rows]
    found = {"loss": [(rows[min(i + smooth, len(rows)) - 1]["step"], sum(part) / len(part))
                      for i in range(0, len(rows), smooth) if (part := losses[i:i + smooth])]}
    for name in dict.fromkeys(key for row in rows for key in row if key not in EVERY_STEP):
        found[name] = [(row["step"], row[name]) for row in rows if name in row]
    return found


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draws the curves of a training run.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", type=Path, help="the --out of train.py")
    parser.add_argument("--out", type=Path, default="curves.png")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command: one clear line and exit code 2 for bad input."""
    args = parse_arguments(arguments)
    with one_line_errors("plot.py"):
        found = curves(read_metrics(args.run / "metrics.jsonl"))
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ValueError("matplotlib is missing: pip install matplotlib") from None
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(*zip(*found.pop("loss")))
        left.set(title="loss", xlabel="step", yscale="log")
        for name, points in found.items():
            right.plot(*zip(*points), label=name, linewidth=2.5 if name == "all" else 1)
        right.set(title="measured along the way", xlabel="step")
        if found:
            right.legend(fontsize="small")
        figure.savefig(args.out, dpi=110, format="png")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
