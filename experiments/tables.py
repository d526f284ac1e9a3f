"""The paper's tables 2, 3 and 4 and Figure 7 on emoji: trains and judges what each row needs, by the other commands.

    python -m experiments.tables 3 --data data/nano                 with and without visual experts, three budgets
    python -m experiments.tables 7 --data data/nano                 Chinese in 50%, 5% and 0% of the captions
    python -m experiments.tables 2 --data data/nano --weights runs/nano/stage2      what is right, by attribute
    python -m experiments.tables 4 --data data/nano --weights runs/nano             Stage I, II and III

Tables 3 and 7 train; what is done already is not done again. Counts of all seeds are added up before their 95%
interval is taken; of what is no count, such as perplexity, the mean, the least and the most are given.
"""
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path

from config import check, ends_in_one_line, parse, setting
from dataset import Dataset
from files import read_json, write_json, write_text
from judge import interval, language_of

BUDGETS = (0.25, 0.5, 1.0)                         # of --steps: a curve, not a point
CHINESE = (0.5, 0.05, 0.0)                         # fraction of the captions; the paper's models saw almost none

# What a table shows, for `wide`: what its lines are told apart by, and the rows that a column takes; | means "or".
SEEN = {"English": dict(task="drawing", split="seen", language="en", what="top-1"),
        "Chinese": dict(task="drawing", split="seen", language="zh", what="top-1")}
ONLY_IN_TEXT = {"Chinese withheld": dict(task="drawing", split="zh withheld", language="zh", what="top-1"),
                "other names": dict(task="drawing", split="alias", what="top-1")}
LANGUAGE = {"perplexity": dict(what="perplexity"), "into Chinese": dict(what="translation", language="zh"),
            "into English": dict(what="translation", language="en")}
BY_STAGE = {name: row | dict(task="drawing|several, all sizes|x128, K = 16 verified", split="seen|held-out pair",
                             what="top-1|all") for name, row in SEEN.items()}
ENLARGED = {"PSNR, dB": dict(stage="III", what="PSNR"), "English": dict(stage="III", what="top-1", language="en"),
            "Chinese": dict(stage="III", what="top-1", language="zh"),
            "forward passes": dict(stage="III", what="passes"), "seconds": dict(stage="III", what="seconds")}
SHOWN = {"2": (("task", "split", "what"), {"English": dict(language="en"), "Chinese": dict(language="zh")}),
         "3": (("visual_experts", "steps"), SEEN | ONLY_IN_TEXT | LANGUAGE),
         "4": (("stage", "split"), BY_STAGE),
         "7": (("chinese",), SEEN),
         "Eq. 2": (("task",), ENLARGED)}            # of Table 4's rows


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Makes one of the paper's tables."""
    table: str = setting(help="2, 3, 4 or 7", choices=("2", "3", "4", "7"))
    data: Path = setting(Path("data/emoji"), "what openmoji.py wrote", metavar="FOLDER")
    preset: str = setting("nano", "of train.py", choices=("nano", "emoji"))
    steps: int = setting(4000, "of Stage I, at the largest budget", least=4)
    seeds: int = setting(3, "runs of each row", least=1)
    prompts: int = setting(500, "of each split and language", least=1)
    weights: Path = setting(Path("runs"), "Table 2: a run of Stage II; Table 4: the folder of all runs", metavar="DIR")
    runs: Path = setting(Path("runs/tables"), "where tables 3 and 7 train", metavar="DIR")
    out: Path | None = setting(None, "JSON to write (default: results/table3.json ...)", metavar="FILE")

    def __post_init__(self):
        check(self)


def run(program: str, *flags) -> None:
    """Runs one of the project's commands. Ends as it ends where that is not well."""
    ended = subprocess.run([sys.executable, program, *map(str, flags)]).returncode
    if ended:
        raise ValueError(f"{program} {' '.join(map(str, flags))} ended with exit code {ended}")


def evaluate(c: TablesConfig, weights: Path, name: str, *flags) -> list[dict]:
    """The rows of evaluate.py's report, which is kept under `name`."""
    out = c.runs / name
    run("evaluate.py", "--weights", weights, "--data", c.data, "--prompts", c.prompts, "--out", out, *flags)
    return read_json(out)["rows"]


def stage1(c: TablesConfig, name: str, seed: int, *flags, data: Path | None = None) -> list[dict]:
    """Trains Stage I on a text model of this seed, and judges it; what is done already is not done again."""
    common, name = ["--preset", c.preset, "--seed", seed, "--resume"], f"{name}-{seed}"
    run("train.py", "text", *common, "--data", c.data, "--out", c.runs / f"text-{seed}")
    run("train.py", "stage1", *common, "--data", data or c.data, "--out", c.runs / name, "--language",
        c.runs / f"text-{seed}", *flags)
    report = c.runs / f"{name}.json"
    return read_json(report)["rows"] if report.is_file() else evaluate(c, c.runs / name, report.name)


def pooled(reports: list[list[dict]], **label) -> list[dict]:
    """The rows of several seeds' reports, added up; label: what is said of each."""
    same = defaultdict(list)
    for row in (row for report in reports for row in report):
        same[tuple(row[name] for name in ("task", "split", "language", "what"))].append(row)
    rows = []
    for name, found in same.items():
        row = label | dict(zip(("task", "split", "language", "what"), name)) | {"seeds": len(found)}
        if "correct" in found[0]:
            correct, n = (sum(each[what] for each in found) for what in ("correct", "n"))
            low, high = interval(correct, n)
            row |= {"correct": correct, "n": n, "accuracy": correct / n, "low": low, "high": high}
        else:
            values = [each["value"] for each in found]
            row |= {"value": sum(values) / len(values), "low": min(values), "high": max(values)}
        rows.append(row)
    return rows


def with_chinese(c: TablesConfig, fraction: float) -> Path:
    """A copy of --data of whose captions `fraction` are Chinese."""
    out = c.runs / f"data-zh{100 * fraction:.0f}"
    if not (out / "metadata.jsonl").is_file():
        shutil.copytree(c.data, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("metadata.jsonl", "pairs"))
        lines, dataset = [], Dataset(c.data)
        for i in range(len(dataset)):
            zh, en = ([text for text in dataset.captions(i) if language_of(text) == language]
                      for language in ("zh", "en"))
            n = round(400 * fraction) if zh else 0
            texts = [*islice(cycle(zh), n), *islice(cycle(en), 400 - n)]
            lines.append({"file_name": dataset.name(i), "text": texts, **dataset.facts(i)})
        write_text(out / "metadata.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return out


def wide(rows: list[dict], labels: tuple[str, ...], columns: dict[str, dict[str, str]]) -> list[list[str]]:
    """A table to read: a head, then a line for each value of `labels`, with "57.7% (54.6 to 60.7)" in each column."""
    lines = {}
    for row in rows:
        for name, wanted in columns.items():
            if all(row[key] in value.split("|") for key, value in wanted.items()):
                scale, unit, form = (100, "%", ".1f") if "accuracy" in row else (1, "", ".4g")
                value = row.get("accuracy", row.get("value")) * scale
                spread = f" ({scale * row['low']:{form}} to {scale * row['high']:{form}})" if "low" in row else ""
                lines.setdefault(tuple(str(row[label]) for label in labels), {})[name] = f"{value:{form}}{unit}{spread}"
    used = [name for name in columns if any(name in cells for cells in lines.values())]
    return [[*labels, *used], *([*label, *(cells.get(name, "") for name in used)] for label, cells in lines.items())]


# ----------------------------------------------------------------------------- one function a table

def table2(c: TablesConfig) -> list[dict]:
    """T2I-CompBench's kinds: color, skin tone, gender, the object itself ("concept"); of several objects their
    position ("relation"), whether all are there ("objects"), and all of it."""
    single = evaluate(c, c.weights, "table2-single.json")
    several = evaluate(c, c.weights, "table2-several.json", "--pairs", c.data / "pairs")
    return [row for row in single + several if row["task"].startswith(("drawing", "several"))]


def table3(c: TablesConfig) -> list[dict]:
    """With and without visual experts: what is drawn, and what is left of the language."""
    rows = []
    for (experts, flags), budget in product((("with", ()), ("without", ("--no-visual-experts",))), BUDGETS):
        steps = round(c.steps * budget)
        reports = [stage1(c, f"{experts}-{steps}", seed, "--steps", steps, *flags) for seed in range(c.seeds)]
        rows += pooled(reports, visual_experts=experts, steps=steps)
    return rows


def table4(c: TablesConfig) -> list[dict]:
    """Stage I, II and III: single objects by each, several by Stage II, and what is enlarged by Stage III."""
    first, second, third = (c.weights / stage for stage in ("stage1", "stage2", "stage3"))
    reports = {"I": evaluate(c, first, "table4-I.json"), "II": evaluate(c, second, "table4-II.json"),
               "II, several": evaluate(c, second, "table4-pairs.json", "--pairs", c.data / "pairs"),
               "III": evaluate(c, second, "table4-III.json", "--stage3", third)}
    return [{"stage": stage} | row for stage, rows in reports.items() for row in rows]


def figure7(c: TablesConfig) -> list[dict]:
    """Chinese prompts, by how many of the captions were Chinese."""
    rows = []
    for fraction in CHINESE:
        data, name = with_chinese(c, fraction), f"zh{100 * fraction:.0f}"
        reports = [stage1(c, name, seed, "--steps", c.steps, data=data) for seed in range(c.seeds)]
        rows += pooled(reports, chinese=fraction)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    with ends_in_one_line("tables.py"):
        c = parse(TablesConfig, arguments, program="tables.py")
        c.runs.mkdir(parents=True, exist_ok=True)
        rows = {"2": table2, "3": table3, "4": table4, "7": figure7}[c.table](c)
        out = c.out or Path("results") / f"table{c.table}.json"
        write_json(out, {"command": f"python -m experiments.tables {c.table}", "preset": c.preset, "rows": rows})
        print(*(" | ".join(line) for line in wide(rows, *SHOWN[c.table])), f"wrote {out}", sep="\n")


if __name__ == "__main__":
    main()
