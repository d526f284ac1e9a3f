"""Claims about the paper's tables in the rendered world (Sec. 4), and about pictures for other tools."""
import json
from pathlib import Path

import numpy as np
import pytest

import tables
from test_train import PRESETS, small_preset

ROOT = Path(__file__).parent.parent


def test_the_frechet_distance_is_that_of_two_gaussians():
    generator = np.random.default_rng(0)
    a = generator.normal(size=(4000, 3)) * [1, 2, 3]
    assert tables.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert tables.frechet(a, a + [1, 0, 2]) == pytest.approx(5)                        # means apart: their square
    assert tables.frechet(a, 2 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(np.var(a, axis=0, ddof=1).sum())
    turned = a @ np.linalg.qr(generator.normal(size=(3, 3)))[0]                        # covariances do not commute
    C_a, C_b = np.cov(a.T), np.cov(turned.T)
    root = np.sqrt(np.linalg.eigvals(C_a @ C_b)).real.sum()
    expected = ((a.mean(0) - turned.mean(0)) ** 2).sum() + np.trace(C_a) + np.trace(C_b) - 2 * root
    assert tables.frechet(a, turned) == pytest.approx(expected)


def test_the_interval_over_seeds_is_students():
    found = tables.over_seeds([80.0, 82.0, 84.0])
    assert found["mean"] == 82 and found["high"] - 82 == pytest.approx(4.303 * 2 / 3 ** 0.5)
    assert tables.over_seeds([5.0]) == {"mean": 5, "seeds": [5.0]}                     # one says nothing of the next


@pytest.mark.slow
def test_a_table_trains_its_models_once_and_scores_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "test", small_preset())
    out = tmp_path / "table.json"
    common = ["--preset", "test", "--steps", "2", "--runs", str(tmp_path / "runs"), "--prompts", "20", "--out", str(out)]
    tables.main(["3", "--seeds", "3", "5", *common])
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert list(report["rows"]) == ["without visual experts", "with visual experts"] and report["steps"] == 2
    for row in report["rows"].values():
        assert all(len(cell["seeds"]) == 2 and cell["low"] <= cell["mean"] <= cell["high"] for cell in row.values())
        assert row["frechet"]["mean"] > 0
    assert printed.count("stage1: wrote") == 4 and "the paper's with visual experts: FID 8.24" in printed
    moved, frozen = (row["perplexity"]["seeds"] for row in report["rows"].values())
    assert frozen[0] != moved[0]                                               # without experts the language trains
    tables.main(["7", "--seeds", "3", *common])
    figure, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert printed.count("stage1: wrote") == 1                                 # Table 3's model was there
    first = [found["rows"]["with visual experts"]["all"]["seeds"][0] for found in (figure, report)]
    assert first[0] == first[1]
    assert list(figure["rows"]) == ["with visual experts", "one caption in twenty Chinese"]


def test_pictures_are_exported_by_caption_and_number_and_what_is_there_stays(tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a red circle\n\n一个蓝色方形\n")
    command = ["export", "--captions", str(tmp_path / "captions.txt"), "--out", str(tmp_path / "out"), "--each", "2"]
    tables.main(command)
    names = ["a red circle_000000.png", "a red circle_000001.png", "一个蓝色方形_000002.png", "一个蓝色方形_000003.png"]
    folder = tmp_path / "out" / "samples"
    assert sorted(path.name for path in folder.iterdir()) == names
    # as T2I-CompBench takes a name apart: the number to sort by, the caption to judge by
    assert [(int(n.split("_")[-1].split(".")[0]), n.split("_")[0]) for n in names][2] == (2, "一个蓝色方形")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    tables.main(command)
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "4 pictures in" in capsys.readouterr().out
    (folder / names[1]).unlink()
    tables.main(command)
    assert {path.name for path in folder.iterdir() if times.get(path) != path.stat().st_mtime_ns} == {names[1]}


@pytest.mark.parametrize("arguments, message", [
    (["export", "--out", "x"], "export needs --captions FILE and --out DIR"),
    (["2", "--seeds", "1", "2", "3", "4", "5", "6"], "--seeds: expected 1 to 5 different ones"),
    (["3", "--seeds", "1", "1"], "--seeds: expected 1 to 5 different ones"),
    (["2", "--prompts", "19"], "--prompts of at least 20"),
    (["4", "--weights", "nowhere"], "nowhere"),
])
def test_bad_input_gets_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tables.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error


def test_a_caption_that_cannot_be_a_file_name_is_refused(tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a red circle\na red_circle\n")
    with pytest.raises(SystemExit) as stop:
        tables.main(["export", "--captions", str(tmp_path / "captions.txt"), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "caption 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["table2", "table3", "table4", "figure7"])
def test_the_readme_shows_the_papers_tables(name):
    report = json.loads((ROOT / "results" / f"{name}.json").read_text())
    assert tables.show(report) in (ROOT / "README.md").read_text()
    assert len(report["seeds"]) >= 3 and all(len(cell["seeds"]) == len(report["seeds"])
                                             for row in report["rows"].values() for cell in row.values())
