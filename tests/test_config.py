"""Claims about settings: every value is checked once, and every command ends in a result or in one line."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from config import Parser, add_flags, check, ends_in_one_line, from_json, parse, setting

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of every type, for tests.

    More of the docstring.
    """
    prompt: str = setting(help="a text without a default")
    out: Path = setting(Path("out"), "a path")
    steps: int = setting(3, "a whole number, 100% of them", least=1, most=2 ** 64)
    lr: float = setting(0.1, "a number", least=1e-6, most=1)
    size: int | None = setting(None, "a number or nothing", least=8)
    mode: str = setting("text", "one of two", choices=("text", "image"))
    levels: tuple[int, ...] = setting((1, 2), "several numbers", least=1, nargs="+")
    save_every: int = setting(5, "with a dash", aliases=("--every",))
    fast: bool = setting(False, "a switch")

    def __post_init__(self):
        check(self)


def refused(call, message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)


# ----------------------------------------------------------------------------- values

def test_whole_numbers_become_floats_lists_tuples_and_texts_paths():
    found = Settings(prompt="a", lr=1, levels=[3, 4], out="here")
    assert (found.lr, found.levels, found.out) == (1.0, (3, 4), Path("here")) and type(found.lr) is float


@pytest.mark.parametrize("values, message", [
    ({"steps": 2.0}, "steps is 2.0, expected a whole number"),
    ({"steps": "2"}, "steps is '2', expected a whole number"),
    ({"steps": True}, "steps is True, expected a whole number"),
    ({"steps": None}, "steps is None, expected a whole number"),
    ({"steps": 0}, "steps is 0, expected 1 to"),
    ({"steps": 2 ** 64 + 1}, "expected 1 to 18446744073709551616"),
    ({"lr": float("nan")}, "lr is nan, expected a finite number"),
    ({"lr": float("inf")}, "lr is inf, expected a finite number"),
    ({"lr": float("-inf")}, "lr is -inf, expected a finite number"),
    ({"lr": 10 ** 400}, "expected a finite number"),
    ({"lr": False}, "lr is False, expected a finite number"),
    ({"lr": 1e-40}, "lr is 1e-40, expected 1e-06 to 1"),
    ({"size": 7}, "size is 7, expected at least 8"),
    ({"size": "8"}, "size is '8', expected a whole number or null"),
    ({"mode": "sound"}, "mode is 'sound', expected one of text, image"),
    ({"mode": ["text"]}, "mode is ['text'], expected a text"),
    ({"levels": [1, "2"]}, "levels is [1, '2'], expected a list, each a whole number"),
    ({"levels": [1, 0]}, "levels is (1, 0), expected at least 1"),
    ({"levels": 3}, "levels is 3, expected a list"),
    ({"levels": None}, "levels is None, expected a list"),
    ({"fast": 1}, "fast is 1, expected true or false"),
    ({"out": 3}, "out is 3, expected a path"),
    ({"out": "a\0b"}, "expected a path")])
def test_a_value_of_another_type_or_out_of_bounds_is_refused_by_name(values, message):
    refused(lambda: Settings(prompt="a", **values), message)


def test_json_must_hold_every_field_and_no_other():
    content = json.loads(json.dumps(asdict(Settings(prompt="a")), default=str))
    assert from_json(Settings, content, "config.json") == Settings(prompt="a")
    refused(lambda: from_json(Settings, content | {"new": 3}, "a/config.json"), "a/config.json: field 'new' is unknown")
    refused(lambda: from_json(Settings, content | {"steps": -1}, "config.json"), "config.json: steps is -1, expected")
    content.pop("lr")
    refused(lambda: from_json(Settings, content, "config.json"), "config.json: field 'lr' is missing")


# ----------------------------------------------------------------------------- flags

def test_flags_are_made_from_the_fields():
    assert parse(Settings, ["a cat"]) == Settings(prompt="a cat")
    assert parse(Settings, "a --save-every 7 --levels 3 4 --fast --size 16 --out b".split()) == \
        Settings(prompt="a", save_every=7, levels=(3, 4), fast=True, size=16, out=Path("b"))
    assert parse(Settings, ["a", "--every", "2"]).save_every == 2


def test_a_switch_that_a_preset_sets_can_be_switched_off_and_help_says_so(capsys):
    parser = Parser("x.py")
    add_flags(parser, Settings, fast=True, steps=9)
    assert parser.parse_args(["a"]).fast and parser.parse_args(["a"]).steps == 9
    assert not parser.parse_args(["a", "--no-fast"]).fast and parser.parse_args(["a", "--no-fast", "--fast"]).fast
    printed = " ".join(parser.format_help().split())
    assert "one of two" in printed and "several numbers" in printed and "(default: 9)" in printed
    assert "--no-fast not --fast" in printed
    assert not parse(Settings, ["a", "--fast", "--no-fast"]).fast


def test_help_says_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Settings, ["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "Settings of every type, for tests." in printed
    assert "--save-every" in printed and "100% of them (default: 3)" in " ".join(printed.split())


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required: prompt"),
    (["a", "--step", "3"], "unrecognized arguments: --step 3"),
    (["a", "--save_every", "3"], "unrecognized arguments: --save_every 3"),
    (["a", "b"], "unrecognized arguments: b"),
    (["a", "--steps", "x"], "argument --steps: invalid int value: 'x'"),
    (["a", "--steps", "0"], "--steps is 0, expected 1 to"),
    (["a", "--steps", "1e3"], "argument --steps: invalid int value"),
    (["a", "--lr", "nan"], "--lr is nan, expected a finite number"),
    (["a", "--lr", "1e-40"], "--lr is 1e-40, expected 1e-06 to 1"),
    (["a", "--save-every", str(2.5)], "argument --save-every/--every: invalid int value: '2.5'"),
    (["a", "--levels", "1", "0"], "--levels is (1, 0), expected at least 1"),
    (["a", "--mode", "sound"], "argument --mode: invalid choice: 'sound'")])
def test_a_bad_flag_ends_in_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Settings, arguments)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and message in printed
    assert printed.count("\n") == 1 and printed.endswith(" (--help shows all flags)\n")


def test_subcommands_have_no_abbreviated_flags_and_one_line_errors_either(capsys):
    parser = Parser("x.py")
    sub = parser.add_subparsers(dest="stage", required=True).add_parser("one")
    add_flags(sub, Settings)
    for arguments, message in ((["one", "a", "--st", "3"], "unrecognized arguments: --st 3"),
                               (["two"], "invalid choice"), ([], "the following arguments are required: stage")):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        printed = capsys.readouterr().err
        assert end.value.code == 2 and message in printed and printed.count("\n") == 1


# ----------------------------------------------------------------------------- how a command ends

@pytest.mark.parametrize("error, code, line", [
    (ValueError("a.txt: not UTF-8"), 2, "x.py: a.txt: not UTF-8\n"),
    (ValueError("two\nlines"), 2, "x.py: two lines\n"),
    (FileNotFoundError(2, "No such file or directory", "a"), 2, "x.py: [Errno 2] No such file or directory: 'a'\n"),
    (KeyError("width"), 2, "x.py: KeyError: 'width' (not foreseen; --debug shows where)\n"),
    (RecursionError(), 2, "x.py: RecursionError: RecursionError (not foreseen; --debug shows where)\n"),
    (MemoryError(), 2, "x.py: MemoryError: MemoryError (not foreseen; --debug shows where)\n"),
    (ValueError("caf\udce9"), 2, "x.py: caf\\udce9\n"),
    (KeyboardInterrupt(), 130, "\nx.py: interrupted\n"),
    (SystemExit(3), 3, "")])
def test_an_error_ends_in_one_line(error, code, line, monkeypatch, tmp_path):
    with (tmp_path / "err").open("w", encoding="utf-8", errors="backslashreplace") as err, \
            pytest.raises(SystemExit) as end:
        monkeypatch.setattr(sys, "stderr", err)
        with ends_in_one_line("x.py"):
            raise error
    assert end.value.code == code and (tmp_path / "err").read_text(encoding="utf-8") == line


def test_debug_shows_the_traceback_before_the_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--debug"])
    with pytest.raises(SystemExit), ends_in_one_line("x.py"):
        raise KeyError("width")
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback") and printed.splitlines()[-1].startswith("x.py: KeyError: 'width'")


def command(body: str) -> list[str]:
    """A small command of this project."""
    return [sys.executable, "-c", "import sys, time; from config import ends_in_one_line\n"
            f"with ends_in_one_line('x.py'):\n    {body}"]


@pytest.mark.skipif(os.name == "nt", reason="signals and pipes of Unix")
def test_ctrl_c_ends_in_one_line_and_exit_code_130():
    process = subprocess.Popen(command("print('go', flush=True); time.sleep(60)"), cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"go\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == b"\nx.py: interrupted\n" and process.returncode == 130


@pytest.mark.skipif(os.name == "nt", reason="signals and pipes of Unix")
@pytest.mark.parametrize("name", ["train.py", "data.py"])
def test_ctrl_c_while_torch_is_imported_ends_in_one_line_too(name, tmp_path):
    (tmp_path / "torch.py").write_text("import time; print('go', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, name], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == b"go\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == f"\n{name}: interrupted\n".encode() and process.returncode == 130


@pytest.mark.skipif(os.name == "nt", reason="signals and pipes of Unix")
@pytest.mark.parametrize("body", ["[print('line') for _ in range(10 ** 6)]", "print('a few words')"])
def test_a_reader_that_goes_away_is_no_error(body):
    process = subprocess.Popen(command(body), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(30) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_stdout_ends_in_one_line_and_exit_code_2():
    with open("/dev/full", "w") as full:
        result = subprocess.run(command("print('a few words')"), cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 2 and result.stderr.startswith(b"x.py: [Errno 28]")
    assert result.stderr.count(b"\n") == 1


def test_a_command_prints_chinese_where_the_system_has_no_chinese_characters():
    program = "from config import ends_in_one_line\nwith ends_in_one_line('x'): print('red 红苹果')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"})
    assert done.stdout.decode("cp1252").strip() == "red ???"
