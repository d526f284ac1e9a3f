"""The tables of the paper: which commands each row runs, and how seeds are added up."""
import json

import pytest
from PIL import Image

from dataset import Dataset
from experiments import tables
from judge import language_of


def report(correct: int, perplexity: float) -> list[dict]:
    """What evaluate.py writes."""
    name = {"task": "drawing", "split": "seen", "language": "en", "what": "top-1"}
    return [name | {"correct": correct, "n": 10, "accuracy": correct / 10, "low": 0, "high": 1},
            {"task": "language", "split": "text.txt", "language": "all", "what": "perplexity", "value": perplexity}]


@pytest.fixture
def folder(tmp_path):
    """Two images, one of them without Chinese."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(data / f"{name}.png")
    lines = [{"file_name": "a.png", "text": ["cat", "a cat", "猫"], "concept": "cat"},
             {"file_name": "b.png", "text": ["dog"], "concept": "dog"}]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return data


@pytest.fixture
def commands(monkeypatch):
    """The commands that a table runs; evaluate.py writes a report of 9 in 10."""
    ran = []

    def run(program, *flags):
        flags = [str(flag) for flag in flags]
        ran.append([program, *flags])
        if program == "evaluate.py":
            with open(flags[flags.index("--out") + 1], "w", encoding="utf-8") as file:
                json.dump({"rows": report(9, 3.0)}, file)
    monkeypatch.setattr(tables, "run", lambda program, *flags: run(program, *flags))
    return ran


def test_counts_of_seeds_are_added_up_and_values_get_their_range():
    accuracy, perplexity = tables.pooled([report(0, 3.0), report(10, 5.0)], steps=7)
    assert (accuracy["correct"], accuracy["n"], accuracy["seeds"], accuracy["steps"]) == (10, 20, 2, 7)
    assert 0.29 < accuracy["low"] < accuracy["accuracy"] == 0.5 < accuracy["high"] < 0.71
    assert (perplexity["value"], perplexity["low"], perplexity["high"]) == (4.0, 3.0, 5.0)


def test_a_table_to_read_has_a_line_for_each_row_of_the_papers_and_a_column_for_each_measure():
    rows = [row for steps, correct in ((7, 5), (8, 10)) for row in
            tables.pooled([report(correct, 3.0)], visual_experts="with", steps=steps)]
    assert tables.wide(rows, *tables.SHOWN["3"]) == [
        ["visual_experts", "steps", "English", "perplexity"],
        ["with", "7", "50.0% (23.7 to 76.3)", "3 (3 to 3)"], ["with", "8", "100.0% (72.2 to 100.0)", "3 (3 to 3)"]]


def test_no_interval_leaves_0_to_100_percent():
    (row, _), (none, _) = tables.pooled([report(10, 1)] * 3), tables.pooled([report(0, 1)] * 3)
    assert row["high"] == 1.0 and none["low"] == 0.0 and row["low"] < 1 and none["high"] > 0


@pytest.mark.parametrize("fraction", [0.5, 0.05, 0.0])
def test_the_copy_of_the_data_has_the_fraction_of_chinese_captions(folder, tmp_path, fraction):
    c = tables.TablesConfig(table="7", data=folder, runs=tmp_path / "runs")
    copy = Dataset(tables.with_chinese(c, fraction))
    languages = [language_of(text) for text in copy.captions(0)]
    assert languages.count("zh") / len(languages) == pytest.approx(fraction)
    assert {*map(language_of, copy.captions(1))} == {"en"} and copy.facts(0)["concept"] == "cat"
    assert copy.image(0).tobytes() == Dataset(folder).image(0).tobytes()


def test_table_3_trains_each_row_at_three_budgets_from_one_text_model_a_seed(folder, tmp_path, commands):
    tables.main(["3", "--data", str(folder), "--runs", str(tmp_path / "runs"), "--seeds", "2", "--steps", "8",
                 "--out", str(tmp_path / "table3.json")])
    stages = [command for command in commands if command[:2] == ["train.py", "stage1"]]
    assert [command[command.index("--steps") + 1] for command in stages] == ["2", "2", "4", "4", "8", "8"] * 2
    assert sum("--no-visual-experts" in command for command in stages) == 6
    assert len({command[command.index("--language") + 1] for command in stages}) == 2
    rows = json.loads((tmp_path / "table3.json").read_text(encoding="utf-8"))["rows"]
    assert {(row["visual_experts"], row["steps"], row["seeds"]) for row in rows} == {
        (experts, steps, 2) for experts in ("with", "without") for steps in (2, 4, 8)}


def test_what_is_trained_and_judged_already_is_not_done_again_but_given_weights_are(folder, tmp_path, commands):
    for table, first, again in (("7", 18, 12), ("4", 4, 4)):             # text and Stage I resume, and end at once
        command = [table, "--data", str(folder), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json")]
        for count in (first, again):
            commands.clear()
            tables.main([*command, "--seeds", "2"])
            assert len(commands) == count


def test_settings_of_a_table_are_checked(capsys):
    with pytest.raises(SystemExit) as end:
        tables.main(["3", "--seeds", "0"])
    assert end.value.code == 2 and "--seeds is 0, expected at least 1" in capsys.readouterr().err


def test_a_command_that_fails_ends_the_table_in_one_line(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        tables.main(["2", "--data", str(folder), "--runs", str(tmp_path), "--weights", str(tmp_path / "none")])
    assert end.value.code == 2 and "evaluate.py" in capsys.readouterr().err
