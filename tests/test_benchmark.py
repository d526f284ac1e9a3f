"""Claims about experiments/: the benchmark measures what it says, and a run's curve is the mean of its losses."""
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from config import parse
from conftest import make_mars
from experiments import benchmark, plot
from experiments.benchmark import BenchmarkConfig


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A tiny model in place of the weights."""
    model = make_mars(max_seq_len=160, text_vocab=1000)
    encode = type("Tokenizer", (), {"encode": lambda self, text: [5, 6]})()
    monkeypatch.setattr(benchmark, "load_stage", lambda directory, device="cpu": (model, None, encode))
    yield model
    torch.set_num_threads(1)


def test_runs_take_turns_after_one_to_warm_up_and_the_median_counts():
    order, ticks = [], iter([0, 0, 0, 1, 0, 4, 0, 2, 0, 5, 0, 9, 0, 6])       # a and b: warm-up, then three rounds
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    found = benchmark.take_turns(runs, 3, clock=lambda: next(ticks))
    assert order == list("ab" * 4) and found == {"a": 2, "b": 5}


def test_every_ratio_is_ours_over_a_named_baseline_measured_in_the_same_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "transformers_generate", lambda model: lambda batch: None)
    benchmark.main(["decode", "train", "--rounds", "1", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    rows = found["rows"]
    assert {"one image, as by default", "16 images at once", "training step, 8% text", "training step, 50% text",
            "operations a second, training"} <= {row["what"] for row in rows} and found["threads"] == 1
    assert all(row["ours"] > 0 and row["baseline"] and row["ratio"] == row["ours"] / row["theirs"] for row in rows)
    passes = {row["what"]: row["ours"] for row in rows if row["baseline"] == "one a token"}
    assert passes["forward passes, as by default"] == 64 > passes["forward passes, 16 tokens a pass"] >= 1
    table = capsys.readouterr().out.strip().splitlines()
    assert len(table) == 2 + len(rows) and table[2].startswith("| one image, as by default |")


def test_without_transformers_its_rows_are_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    rows = benchmark.decode(BenchmarkConfig(parts=(), rounds=1))
    assert rows and not any("transformers" in row["baseline"] for row in rows)


def test_the_loss_in_chunks_is_measured_in_a_process_of_its_own():
    class Pipe(list):
        send = list.append
    logits, pipe = benchmark.mars_module.LOGITS, Pipe()
    try:
        benchmark.peak_of_loss(4, 8, pipe)
    finally:
        benchmark.mars_module.LOGITS = logits
    assert len(pipe) == 1 and pipe[0] >= 0


def test_an_unknown_part_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["speed"])
    assert stop.value.code == 2
    assert "part 'speed', expected some of cold, loss, decode, train, data" in capsys.readouterr().err


def test_a_point_of_a_curve_is_the_mean_of_its_steps(tmp_path, capsys):
    lines = [json.dumps({"step": i, "loss": float(i)} | ({"psnr_train": 20.0} if i == 3 else {})) for i in range(5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo', encoding="utf-8")
    assert plot.curves(tmp_path, most=3) == {"loss": [(2, 0.5), (4, 2.5), (5, 4.0)], "psnr_train": [(4, 20.0)]}
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path / "nosuch")])
    assert stop.value.code == 2 and "nosuch" in capsys.readouterr().err


def test_curves_are_drawn_where_matplotlib_is(tmp_path, capsys, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 2.0}\n', encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path)])
    assert stop.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    plot.main([str(tmp_path), "--out", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_commands_of_the_page_are_accepted():
    page = (Path(__file__).parents[1] / "docs" / "benchmark.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m experiments\.(\w+) ?(.*)$", page, re.MULTILINE)
    assert {name for name, _ in commands} == {"benchmark", "plot"}
    for name, flags in commands:
        parse(BenchmarkConfig if name == "benchmark" else plot.PlotConfig, flags.split("   ")[0].split())
