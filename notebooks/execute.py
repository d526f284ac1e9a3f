"""Runs the notebooks from a clean state and keeps their outputs, in place; needs `pip install jupyter matplotlib`.

    python notebooks/execute.py                     all of them
    python notebooks/execute.py 03_training         one
"""
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(path: Path) -> nbformat.NotebookNode:
    """A notebook, run from its first cell to its last in a process of its own -> the notebook with new outputs. Raises
    nbclient's CellExecutionError, which shows the cell, where one fails."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}},
                   record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":         # warnings and progress bars are of no use to a reader
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            started = time.perf_counter()
            nbformat.write(execute(path), path)
            seconds, size = time.perf_counter() - started, path.stat().st_size / 1000
            print(f"{path.name}: {seconds:.0f} s, {size:.0f} KB", flush=True)
