"""Not in the paper: the loss curves of training runs, from what train.py wrote into their metrics.jsonl.

    python -m experiments.plot runs/text runs/stage1 --out curves.png          (pip install matplotlib)
    python -m experiments.plot runs/text runs/stage1 --json                    the points as text, without matplotlib
"""
import json
from dataclasses import dataclass
from pathlib import Path

from config import ends_in_one_line, parse, setting
from files import read_text


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draws the loss of training runs."""
    runs: tuple[Path, ...] = setting(help="--out of train.py, each", metavar="RUN", nargs="+")
    smooth: int = setting(100, "steps that a point is the mean of", least=1)
    json: bool = setting(False, "print {run: [[step, loss], ...]} instead")
    out: Path = setting(Path("curves.png"), "the image to write", aliases=("-o",))


def curve(run: Path, smooth: int) -> list[tuple[int, float]]:
    """(step, loss) of a run, a point for every `smooth` steps. Raises ValueError, one line, where there is no run."""
    rows = [json.loads(line) for line in read_text(run / "metrics.jsonl").splitlines()]
    parts = [rows[i:i + smooth] for i in range(0, len(rows), smooth)]
    return [(part[-1]["step"], sum(row["loss"] for row in part) / len(part)) for part in parts]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    with ends_in_one_line("plot.py"):
        c = parse(PlotConfig, arguments, program="plot.py")
        curves = {str(run): curve(run, c.smooth) for run in c.runs}
        if c.json:
            return print(json.dumps(curves))
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ValueError("matplotlib is missing: pip install matplotlib, or --json for text") from None
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        for name, points in curves.items():
            axes.plot(*zip(*points), label=name)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.legend()
        figure.savefig(c.out, dpi=110)
        print(f"wrote {c.out}")


if __name__ == "__main__":
    main()
