"""Not in the paper: the curves of training runs, a panel each, from the metrics.jsonl that train.py wrote.

    python -m experiments.plot runs/text runs/stage1 --out curves.png          (pip install matplotlib)
"""
import json
from dataclasses import dataclass
from pathlib import Path

from config import ends_in_one_line, parse, setting
from files import read_text

VALUES = ("loss", "held_out_loss", "psnr_train", "psnr_held_out")


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draws the curves of training runs."""
    runs: tuple[Path, ...] = setting(help="--out of train.py, each", metavar="RUN", nargs="+")
    out: Path = setting(Path("curves.png"), "the image to write", aliases=("-o",))


def curves(run: Path, most: int = 60) -> dict[str, list[tuple[int, float]]]:
    """Each of VALUES that a run noted -> (steps done, mean of the last steps), at most so many points. Raises
    ValueError, one line, where there is no run."""
    found, lines = {}, read_text(run / "metrics.jsonl").split("\n")
    rows = [json.loads(line) for line in lines if line.endswith("}")]            # a run may be writing the last one
    for name in VALUES:
        points = [(row["step"] + 1, row[name]) for row in rows if name in row]
        size = -(-len(points) // most) or 1
        parts = [points[i:i + size] for i in range(0, len(points), size)]
        found[name] = [(part[-1][0], round(sum(value for _, value in part) / len(part), 4)) for part in parts]
    return {name: points for name, points in found.items() if points}


def draw(runs: dict[str, dict]):
    """A matplotlib figure of the curves of each run: PSNR where there is one, else the loss."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is missing: pip install matplotlib") from None
    columns, rows = min(4, len(runs)), -(-len(runs) // 4)
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows), layout="constrained")
    for place, (name, run) in enumerate(runs.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        trained, held_out = VALUES[2:] if VALUES[2] in run else VALUES[:2]
        axes.plot(*zip(*run[trained]), color="#0072b2", label="training")
        axes.plot(*zip(*run.get(held_out, [(0, float("nan"))])), "--", color="#d55e00", label="held out")
        axes.set(title=name, xlabel="step", ylabel="PSNR in dB" if trained == VALUES[2] else "loss")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    with ends_in_one_line("plot.py"):
        c = parse(PlotConfig, arguments, program="plot.py")
        draw({str(run): curves(run) for run in c.runs}).savefig(c.out, dpi=110)
        print(f"wrote {c.out}")


if __name__ == "__main__":
    main()
