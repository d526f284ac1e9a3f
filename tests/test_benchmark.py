"""Claims about benchmark.py: it measures what it says, and the README shows what it measured."""
import json
from pathlib import Path

import pytest
import torch

import benchmark

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_each_part_measures_and_names_its_baseline(tmp_path, capsys):
    benchmark.main(["train", "decode", "--width", "32", "--heads", "2", "--layers", "1", "--rounds", "1",
                    "--out", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    names = {row["what"] for row in rows}
    assert {"training step, 0% text", "training step, 50% text", "training step, 100% text",
            "one picture of 64 tokens, batch 1", "one picture of 64 tokens, K = 16 a pass"} <= names
    assert all(row["ours"] > 0 and row["theirs"] > 0 and row["baseline"] for row in rows)
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["theirs"]) for row in rows)
    assert benchmark.show(rows[:1]).split()[-2] == "ratio" and "training step, 0% text" in capsys.readouterr().out


def test_runs_take_turns_after_one_to_warm_up():
    order = []
    found = benchmark.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, torch.device("cpu"), 2)
    assert order == list("ab" * 3) and set(found) == {"a", "b"} and all(seconds >= 0 for seconds in found.values())


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["speed"])
    assert stop.value.code == 2 and "part 'speed', expected some of loss, train, decode" in capsys.readouterr().err


def test_the_readme_shows_what_was_measured():
    found = json.loads((ROOT / "results" / "benchmark.json").read_text())
    assert benchmark.show(found["rows"]) in (ROOT / "README.md").read_text()
    ratio = {(row["what"], row["baseline"]): row["ratio"] for row in found["rows"]}
    assert all(ratio[f"training step, {text}% text", "dense, same width, all weights train"] <= 1 for text in (25, 50))
    assert ratio["loss, peak memory", "whole logits"] <= 0.15
