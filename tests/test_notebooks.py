"""Claims about notebooks/: whole as committed, and true when they run again.

As a program, `python tests/test_notebooks.py NOTEBOOK` runs one notebook and its solutions in a process of its own and
prints what every cell printed, as JSON.
"""
import ast
import base64
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
from PIL import Image

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES, MOST_SECONDS = 3_000_000, 600              # of all notebooks
MOST_PROCESSOR_SECONDS = 180                           # of one notebook


def code_cells(path: Path) -> list[dict]:
    """The code cells of a notebook: their source as one string, and what they printed under "printed"."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        cell["source"] = "".join(cell["source"])
        cell["printed"] = "".join("".join(output["text"]) for output in cell["outputs"]
                                  if output["output_type"] == "stream" and output["name"] == "stdout")
    return cells


def tagged(cells: list[dict], tag: str) -> list[dict]:
    """The cells with a tag: "exercise" holds a placeholder, "check" judges it."""
    return [cell for cell in cells if tag in cell["metadata"].get("tags", ())]


# ----------------------------------------------------------------------------- what runs in a process of its own

def run(path: Path) -> dict:
    """Runs all code cells in one namespace, then the solutions and the cells that check them."""
    import matplotlib
    matplotlib.use("Agg")
    os.chdir(FOLDER)
    sys.path[:0] = [str(FOLDER), str(ROOT)]
    import figures
    figures.display = lambda image: None
    cells, namespace, printed = code_cells(path), {"__name__": "__main__"}, []

    def execute(source: str, name: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(source, name, "exec"), namespace)
        return out.getvalue()
    for number, cell in enumerate(cells, 1):
        printed.append(execute(cell["source"], f"{path.name}, cell {number}"))
    seconds = time.process_time()
    solutions = FOLDER / "solutions" / f"{path.stem}.py"
    execute(solutions.read_text(encoding="utf-8"), solutions.name)
    checked = [execute(cell["source"], f"{path.name}, check") for cell in tagged(cells, "check")]
    return {"printed": printed, "checked": checked, "seconds": seconds}


def alike(committed: str, now: str) -> bool:
    """Whether two printed lines say the same: `time:` always, `about:` up to its first number or colon, a line with an
    arrow up to it; others with whole numbers equal and decimals within 2% (or 0.02), as processors differ."""
    for fixed in ("time:", "about: [^:0-9]*", ".* -> "):
        if match := re.match(fixed, committed):
            return now.startswith(match[0])
    number = re.compile(r"-?\d+(?:\.\d+)?")
    if number.sub("#", committed) != number.sub("#", now):
        return False
    pairs = zip(number.findall(committed), number.findall(now))
    return all(abs(float(a) - float(b)) <= max(0.02, 0.02 * abs(float(a))) if "." in a and "." in b else a == b
               for a, b in pairs)


# ----------------------------------------------------------------------------- the tests

def test_lines_are_alike_only_where_they_say_the_same():
    assert alike("time: 3 s", "time: 90 s") and alike("about: loss 0.30", "about: loss 0.31")
    assert alike("PSNR 41.1 dB", "PSNR 41.2 dB") and not alike("PSNR 41.1 dB", "PSNR 44.1 dB")
    assert not alike("4096 entries", "4095 entries") and not alike("about: loss 1", "about: gain 1")


def test_there_are_five_notebooks_and_the_readme_names_each():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 5 and all(path.name in text for path in NOTEBOOKS)
    assert sum(path.stat().st_size for path in NOTEBOOKS) < MOST_BYTES
    assert "CC BY-SA" in text and (FOLDER / "emoji24.png").stat().st_size < 150_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_all_outputs_and_with_exercises(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output["name"] == "stdout" for output in outputs if output["output_type"] == "stream")
    for cell in cells:
        assert cell["outputs"] or not re.search(r"^(print|figures\.show)", cell["source"], re.M), cell["source"]
    numbers = range(1, len(tagged(cells, "exercise")) + 1)
    assert len(numbers) >= 3 and len(tagged(cells, "check")) == len(numbers)
    for number, exercise, check in zip(numbers, tagged(cells, "exercise"), tagged(cells, "check")):
        assert exercise["source"] == f"answer_{number} = None" and check["printed"] == f"exercise {number}: not yet\n"
    assert (FOLDER / "solutions" / f"{path.stem}.py").is_file()
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text(encoding="utf-8")), "a machine's path"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_are_at_least_700_pixels_wide_and_have_140_dots_an_inch(path):
    found = [output["data"]["image/png"] for cell in code_cells(path) for output in cell["outputs"]
             if "image/png" in output.get("data", {})]
    assert len(found) >= 4
    for content in found:
        with Image.open(io.BytesIO(base64.b64decode("".join(content)))) as image:
            assert image.width >= 700 and min(image.info["dpi"]) > 139.9


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_names_that_exist_and_defines_none_of_the_librarys(path, monkeypatch):
    for package in ("matplotlib", "IPython"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "figures", raising=False)                 # docs/ has a module of this name too
    tree, modules = ast.parse("\n".join(cell["source"] for cell in code_cells(path))), {}
    sources = []                                       # the modules that names are imported from
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = importlib.import_module(node.module)
                assert hasattr(module, alias.name) and not alias.name.startswith("_"), f"{node.module}.{alias.name}"
                sources.append(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"
    ours = [module for module in [*modules.values(), *sources]
            if Path(getattr(module, "__file__", None) or "/").parent in (ROOT, FOLDER)]
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert not [name for name in defined if any(hasattr(module, name) for module in ours)], "a redefined function"


@pytest.mark.slow
def test_notebooks_print_again_what_is_committed_and_their_solutions_are_right():
    for package in ("matplotlib", "IPython"):
        pytest.importorskip(package)
    started = time.perf_counter()
    for path in NOTEBOOKS:
        done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, encoding="utf-8",
                              timeout=3600, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout)
        for cell, printed in zip(code_cells(path), found["printed"], strict=True):
            before, now = cell["printed"].splitlines(), printed.splitlines()
            assert len(before) == len(now) and all(map(alike, before, now)), f"committed: {before}\nnow: {now}"
        assert found["checked"] == [f"exercise {i}: right\n" for i in range(1, len(found["checked"]) + 1)]
        assert found["seconds"] < MOST_PROCESSOR_SECONDS, f"{path.name} takes {found['seconds']:.0f} s of one core"
    assert time.perf_counter() - started < MOST_SECONDS


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(run(Path(sys.argv[1]).resolve())))
