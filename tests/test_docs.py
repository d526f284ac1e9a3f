"""README.md and docs/: commands parse, links resolve, numbers and figures are those of their sources."""
import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import config

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in figures.pages()}
every_page = pytest.mark.parametrize("page", PAGES)
REPORT = ROOT / "weights" / "emoji" / "report.json"

# program -> what parses its arguments
PARSERS = {"train.py": lambda words: importlib.import_module("train").read_flags(words),
           "generate.py": lambda words: parse("generate", "GenerateConfig", words),
           "evaluate.py": lambda words: parse("evaluate", "EvaluateConfig", words),
           "openmoji.py": lambda words: parse("openmoji", "OpenMoji", words),
           "mars.py": lambda words: parse("scale", "Plan", words),
           "data.py": lambda words: parse("data", f"{words[0].title()}Config", words[1:]),
           "docs/figures.py": lambda words: figures.make_parser().parse_args(words)}
OTHERS = ("pip install ", "hf download ", "python -m pytest", "python -m experiments.", "cd ", "jupyter ", "mkdir ",
          "tar ")


def parse(module: str, kind: str, words: list[str]):
    """The settings dataclass of a program, from its arguments; SystemExit where they do not fit."""
    return config.parse(getattr(importlib.import_module(module), kind), words, program=module)


def commands(text: str) -> list[str]:
    """Every command of a page's bash blocks, and what else stands in backticks and begins with python."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:python|torchrun) [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [line for line in [*lines, *inline] if line and not line.startswith("#")]


def check_command(command: str) -> None:
    """Parses one command. Raises SystemExit or AssertionError where a program would refuse it."""
    for line in command.split(" && "):
        if line.startswith(OTHERS):
            continue
        words = shlex.split(line, comments=True)
        assert words[0] in ("python", "torchrun"), line
        program = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[program]).is_file(), line
        name = words[program]
        if name in PARSERS:
            PARSERS[name](words[program + 1:])


@every_page
def test_every_command_is_one_that_its_program_accepts(page):
    for command in commands(PAGES[page]):
        if "..." not in command and "--help" not in command:
            check_command(command)


@pytest.mark.parametrize("command", ["python generate.py --no-such-flag", "python train.py stage1 --preset huge",
                                     "python no_such_file.py", "make all", "python data.py encode --steps 3"])
def test_a_command_that_its_program_refuses_is_noticed(command, capsys):
    with pytest.raises((SystemExit, AssertionError)):
        check_command(command)


# what Python does on a Windows machine with cp1252: text files, stdout, no module `resource`
SITE = """
import builtins, io, locale, sys
plain = io.open
def opened(file, mode="r", buffering=-1, encoding=None, *more, **others):
    encoding = "cp1252" if "b" not in mode and encoding in (None, "locale") else encoding
    return plain(file, mode, buffering, encoding, *more, **others)
builtins.open = io.open = opened
locale.getpreferredencoding = lambda do_setlocale=True: "cp1252"
sys.modules["resource"] = None
"""

# runs commands one after the other, in one process, as torch takes a second to import
RUNNER = """
import json, os, runpy, sys
root, *lines = json.load(sys.stdin)
sys.path.insert(0, root)
for program, *arguments in lines:
    sys.stdout.reconfigure(errors="strict")
    sys.argv = [os.path.join(root, program), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{program} {ascii(arguments)}: {end.code}")
    print()
    print("done:", ascii([program, *arguments]))
"""


def test_commands_run_where_the_encoding_is_cp1252_and_the_module_resource_is_missing(tmp_path):
    shown = [shlex.split(line)[1:] for line in commands(PAGES["README.md"]) if line.startswith("python generate.py")]
    shown = [words for words in shown if "--weights" not in words]
    stages = [["train.py", stage, "--help"] for stage in (*importlib.import_module("train").STAGES, "all")]
    encoders = [["data.py", command, "--help"] for command in ("encode", "inspect")]
    more = [["generate.py", "红 apple", "--film", "苹果.gif"], ["docs/figures.py", "--help"], ["train.py", "--help"]]
    others = [[f"{name}.py", "--help"] for name in ("generate", "evaluate", "openmoji", "mars", "data")]
    lines = [*shown, *more, *others, *stages, *encoders]
    assert len(shown) >= 3 and ["generate.py", "--caption", "out.png"] in shown
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", RUNNER], input=json.dumps([str(ROOT), *lines]).encode(), cwd=tmp_path,
                          env=environment, capture_output=True)
    printed, errors = done.stdout.decode("cp1252"), done.stderr.decode("cp1252")
    assert done.returncode == 0 and "Traceback" not in errors, printed + errors
    assert [line for line in printed.splitlines() if line.startswith("done:")] == [f"done: {ascii(x)}" for x in lines]
    assert (tmp_path / "out.png").is_file() and (tmp_path / "苹果.gif").is_file()


def test_the_code_is_in_the_language_of_the_oldest_python_that_the_readme_names():
    oldest = re.search(r"Python 3\.(\d+) to 3\.\d+;", PAGES["README.md"])[1]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[dent]*/*.py")]:
        ast.parse(path.read_text(encoding="utf-8"), path.name, feature_version=(3, int(oldest)))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_every_link_leads_to_a_file_and_to_a_heading_that_it_has(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), f"{page}: {target}"
            assert ROOT in [file.resolve(), *file.resolve().parents], f"{page}: {target} leaves the repository"
            if anchor and file.suffix == ".md":
                assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


@every_page
def test_numbers_are_those_of_the_json_and_line_links_those_of_the_code(page):
    """Where this fails: `python docs/figures.py update`."""
    text = PAGES[page]
    assert figures.update(text, (ROOT / page).parent) == text
    for name, target in re.findall(r"\[`(\w[\w.]*)`\]\(([^)]+)\)", text):
        assert re.fullmatch(r"[\w./]+\.py#L\d+", target) or name.endswith((".py", ".md")), f"{name}: {target}"
    assert not REPORT.is_file() or "TODO" not in text


def test_a_number_that_changed_and_a_line_that_moved_are_written_anew(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text("import os\n\n\nclass A:\n    def f(self):\n        pass\n", encoding="utf-8")
    rows = [{"task": "drawing", "split": "seen", "language": "en", "what": "top-1", "accuracy": 0.9713, "n": 9},
            {"task": "reconstruction", "split": "seen", "language": "all", "what": "PSNR", "value": 25.714, "n": 9}]
    monkeypatch.setattr(figures, "content", lambda name: {"rows": rows})
    text = "<!--= drawing, seen, en, top-1 -->1%<!--/--> <!--= reconstruction, seen, all, PSNR -->2<!--/--> " \
           "[`A.f`](a.py#L9)"
    assert figures.update(text, tmp_path) == (
        "<!--= drawing, seen, en, top-1 -->97.1%<!--/--> <!--= reconstruction, seen, all, PSNR -->25.71<!--/--> "
        "[`A.f`](a.py#L5)")
    assert "TODO(no, such, row, x)" in figures.update("<!--= no, such, row, x -->1<!--/-->", tmp_path)
    with pytest.raises(ValueError, match="has no B"):
        figures.update("[`B`](a.py#L1)", tmp_path)


def test_drawn_sequences_are_what_the_script_draws():
    """Where this fails: `python docs/figures.py drawings`."""
    assert (ROOT / "docs" / "layouts.svg").read_text(encoding="utf-8") == figures.layouts()


def test_the_readme_fits_on_a_few_screens_and_starts_with_a_run():
    assert len(PAGES["README.md"].splitlines()) <= 180
    assert commands(PAGES["README.md"])[:3] == ["pip install -r requirements.txt", 'python generate.py "red apple"',
                                                "python -m pytest"]


def test_the_map_of_the_paper_names_a_test_for_every_line():
    tests = set().union(*(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
                          for path in (ROOT / "tests").glob("test_*.py")))
    named = re.findall(r"`(test_\w+)`", PAGES["docs/paper.md"])
    assert len(named) > 30 and set(named) <= tests, set(named) - tests


@every_page
def test_the_words_are_the_fields_and_nothing_names_a_machine(page):
    prose = re.sub(r'"[^"]*"|“[^”]*”', "", re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S))
    words = "codecs?|things?|pictures?|shares?|twins?|painter|together|beside|renamed"
    assert not re.findall(rf"\b({words})\b", prose, re.IGNORECASE)
    assert not re.findall(r"/work\b|/tmp\b|/root\b|/home/|pypi\.org|pythonhosted|localhost", PAGES[page])
    long = [line for line in PAGES[page].splitlines() if len(line) > 120]
    assert [line for line in long if "|" not in line and not line.startswith(("python", "torchrun"))] == []


def test_requirements_are_pinned_and_few():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [re.fullmatch(r"([a-z]+)==[\d.]+( *#.*)?", line)[1] for line in lines]
    assert names == ["torch", "numpy", "pillow", "tqdm", "sentencepiece", "safetensors", "pytest"]


def test_the_script_ends_in_one_line_where_it_is_asked_for_nonsense():
    done = subprocess.run([sys.executable, "docs/figures.py", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice" in done.stderr
