"""Claims about notebooks/: whole as committed, and true when they run again.

As a program, `python tests/test_notebooks.py NOTEBOOK` runs one notebook and its solutions in a process of its own
and prints what every cell printed, as JSON.
"""
import ast
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES, MOST_SECONDS = 400_000, 180


def code_cells(path: Path) -> list[dict]:
    """The code cells of a notebook, their source as one string and what they printed under "printed"."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        cell["source"] = "".join(cell["source"])
        cell["printed"] = "".join("".join(output["text"]) for output in cell["outputs"]
                                  if output["output_type"] == "stream" and output["name"] == "stdout")
    return cells


def tagged(cells: list[dict], tag: str) -> list[dict]:
    """The cells with a tag: "exercise" holds a placeholder, "check" the cell that judges it."""
    return [cell for cell in cells if tag in cell["metadata"].get("tags", ())]


# ----------------------------------------------------------------------------- what runs in a process of its own

def run(path: Path) -> dict:
    """Runs all code cells in one namespace, then the solutions and the cells that check them."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.show = lambda: pyplot.close("all")
    os.chdir(FOLDER)
    sys.path[0] = str(FOLDER)                                    # as in Jupyter: the notebook's own folder
    cells, namespace, printed = code_cells(path), {"__name__": "__main__"}, []

    def execute(source: str, name: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(source, name, "exec"), namespace)
        return out.getvalue()
    for number, cell in enumerate(cells, 1):
        printed.append(execute(cell["source"], f"{path.name}, cell {number}"))
    seconds = time.process_time()
    solutions = FOLDER / "solutions" / f"{path.stem}.py"
    execute(solutions.read_text(), solutions.name)
    checked = [execute(cell["source"], f"{path.name}, check") for cell in tagged(cells, "check")]
    return {"printed": printed, "checked": checked, "seconds": seconds}


def alike(committed: str, now: str) -> bool:
    """Whether two printed lines say the same: `time:` always, `about:` but for its numbers, others with whole numbers
    equal and decimals within 2% (or 0.02), since processors differ in rounding."""
    if committed.startswith("time:"):
        return now.startswith("time:")
    number = re.compile(r"-?\d+(?:\.\d+)?")
    if number.sub("#", committed) != number.sub("#", now):
        return False
    pairs = zip(number.findall(committed), number.findall(now))
    return committed.startswith("about:") or all(
        abs(float(a) - float(b)) <= max(0.02, 0.02 * abs(float(a))) if "." in a and "." in b else a == b
        for a, b in pairs)


# ----------------------------------------------------------------------------- the tests

def test_lines_are_alike_only_where_they_say_the_same():
    assert alike("time: 3 s", "time: 90 s") and alike("about: loss 0.30", "about: loss 0.31")
    assert alike("PSNR 41.1 dB", "PSNR 41.2 dB") and not alike("PSNR 41.1 dB", "PSNR 44.1 dB")
    assert not alike("2304 codes", "2305 codes") and not alike("about: loss 1", "about: gain 1")


def test_there_are_notebooks_and_the_readme_lists_each():
    text = (FOLDER / "README.md").read_text()
    assert len(NOTEBOOKS) >= 4 and all(path.name in text for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_whole_with_outputs_and_two_exercises(path):
    cells = code_cells(path)
    assert path.stat().st_size < MOST_BYTES
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output["name"] == "stdout" for output in outputs if output["output_type"] == "stream")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    drawing = [cell for cell in cells if "plt.show()" in cell["source"] or "figures." in cell["source"]]
    assert len(pictures) >= 4 and len(drawing) >= 4
    for cell in cells:
        assert cell["outputs"] or "print(" not in cell["source"] or "def " in cell["source"], cell["source"]
    assert 'sys.path.insert(0, "..")' in cells[0]["source"] and "torch.manual_seed(" in cells[0]["source"]
    assert len(tagged(cells, "exercise")) == len(tagged(cells, "check")) == 2
    for number, (exercise, check) in enumerate(zip(tagged(cells, "exercise"), tagged(cells, "check")), 1):
        assert exercise["source"] == f"answer_{number} = None" and check["printed"] == f"exercise {number}: not yet\n"
    assert (FOLDER / "solutions" / f"{path.stem}.py").is_file()
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text()), "a machine's path"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_and_uses_only_names_that_exist(path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FOLDER))
    tree, modules = ast.parse("\n".join(cell["source"] for cell in code_cells(path))), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module), alias.name), f"{node.module}.{alias.name}"
                assert not alias.name.startswith("_"), f"{alias.name} is private"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if node.value.id not in ("sys", "torch"):
                assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"
    ours = [module for module in modules.values() if Path(getattr(module, "__file__", None) or "/").parent in (ROOT, FOLDER)]
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not [name for name in defined if any(hasattr(module, name) for module in ours)], "a redefined library function"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_again_what_is_committed_and_its_solutions_are_right(path):
    pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for cell, printed in zip(code_cells(path), found["printed"], strict=True):
        before, now = cell["printed"].splitlines(), printed.splitlines()
        assert len(before) == len(now) and all(map(alike, before, now)), f"committed: {before}\nnow: {now}"
    assert found["checked"] == ["exercise 1: right\n", "exercise 2: right\n"]
    assert found["seconds"] < MOST_SECONDS, "a notebook should take less than three minutes of one core"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(run(Path(sys.argv[1]).resolve())))
