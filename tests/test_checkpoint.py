"""Claims about files: written whole, read strictly, and checkpoints that survive kills, full disks and flipped bits."""
import argparse
import json
import os
import stat
import subprocess
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
import files
from checkpoint import (checkpoints, fingerprint, load_checkpoint, load_folder, load_pickled, load_tensors,
                        save_checkpoint, save_folder)
from config import check, setting
from files import atomic_write, lock, read_json, read_text, write_json, write_text

linux = pytest.mark.skipif(sys.platform != "linux", reason="FIFOs and devices of Linux")


@dataclass(frozen=True, kw_only=True)
class SmallConfig:
    """Settings of a model small enough for a test."""
    width: int = setting(least=1, most=64)
    scale: float = setting(1.0)

    def __post_init__(self):
        check(self)


class Small(nn.Module):
    """Two tensors."""

    def __init__(self, config: SmallConfig):
        super().__init__()
        self.config, self.layer = config, nn.Linear(config.width, 2)


def small() -> Small:
    torch.manual_seed(0)
    return Small(SmallConfig(width=3))


def refused(call, *arguments, names=()) -> str:
    """Calls and expects a ValueError of one line that says all of `names`."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and all(str(name) in str(error.value) for name in names), str(error.value)
    return str(error.value)


def run_python(program: str, *arguments, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], cwd=Path(__file__).parents[1],
                          capture_output=True, timeout=60, **more)


# ----------------------------------------------------------------------------- files that are written

def test_an_error_while_writing_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "old")

    def half(path):
        path.write_text("ne")
        raise OSError(28, "No space left on device")
    refused(atomic_write, tmp_path / "deep" / "a.txt", half, names=["a.txt: cannot be written", "No space left"])
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "deep" / "a.txt", lambda path: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.txt"]
    assert read_text(tmp_path / "deep" / "a.txt") == "old"


def test_temporary_files_are_in_the_same_folder_keep_the_suffix_and_cannot_be_guessed(tmp_path):
    seen = []
    for _ in range(2):
        atomic_write(tmp_path / "image.png", lambda path: (seen.append(path), path.write_bytes(b"x")))
    assert seen[0] != seen[1] and all(path.parent == tmp_path and path.suffix == ".png" for path in seen)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_are_as_readable_as_the_umask_allows(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_folder(tmp_path, small())
        save_checkpoint(tmp_path, 1, {})
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == dict.fromkeys(
        ["config.json", "model.safetensors", "checkpoint-000001.pt"], mode)


@pytest.mark.skipif(os.name == "nt", reason="links need a right on Windows")
def test_a_link_is_replaced_and_never_written_through(tmp_path):
    (tmp_path / "theirs.txt").write_text("theirs")
    for name in ("theirs.txt", "nowhere.txt"):
        (tmp_path / "mine.txt").symlink_to(tmp_path / name)
        write_text(tmp_path / "mine.txt", "mine")
        assert not (tmp_path / "mine.txt").is_symlink() and read_text(tmp_path / "mine.txt") == "mine"
        (tmp_path / "mine.txt").unlink()
    assert read_text(tmp_path / "theirs.txt") == "theirs" and not (tmp_path / "nowhere.txt").exists()


@linux
def test_a_fifo_and_stdout_are_written_straight(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_bytes()), daemon=True)
    reader.start()
    write_text(tmp_path / "fifo", "through")
    reader.join(10)
    assert read == [b"through"] and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")                   # as /dev/stdout is; that one stays out of it
    program = "import sys; from files import write_text; write_text(sys.argv[1], 'out')"
    for name in (tmp_path / "stdout", "/proc/self/fd/1"):
        assert run_python(program, name).stdout == b"out"
        with open(tmp_path / "log", "w") as log:
            subprocess.run([sys.executable, "-c", program, name], cwd=Path(__file__).parents[1], stdout=log, check=True)
        assert (tmp_path / "log").read_text() == "out" and (tmp_path / "stdout").is_symlink()
    assert all(files.is_stream(Path(name)) for name in ("/dev/stdout", "/dev/fd/1", "/dev/null", "/dev/full"))
    assert not files.is_stream(tmp_path / "log") and not files.is_stream(tmp_path / "new")


def test_a_path_that_cannot_be_written_is_named_in_one_line(tmp_path):
    write_text(tmp_path / "file", "")
    refused(write_text, tmp_path, "x", names=[tmp_path, "folder"])
    refused(write_text, tmp_path / "file" / "below", "x", names=["file/below: cannot be written"])
    refused(write_text, tmp_path / ("n" * 300), "x", names=["cannot be written"])


# ----------------------------------------------------------------------------- text and JSON that is read

def test_text_is_utf_8_whatever_the_systems_encoding(tmp_path):
    program = ("import sys; from files import read_text, write_text; text = chr(0x7ea2) + ' ' + chr(0xe9) + chr(10);"
               "write_text(sys.argv[1], text); assert read_text(sys.argv[1]) == text")
    result = run_python(program, tmp_path / "a.txt", env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0",
                                                                       "PYTHONCOERCECLOCALE": "0"})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.txt").read_bytes() == "红 é\n".encode()


def test_a_byte_order_mark_and_the_line_ends_of_other_systems_are_accepted(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree\u2028still three\n".encode())
    assert read_text(tmp_path / "a.txt") == "one\ntwo\nthree\u2028still three\n"


@pytest.mark.parametrize("content, message", [
    ("red".encode("utf-16"), "UTF-16"), ("red".encode("utf-16-be"), "UTF-16"), ("red".encode("utf-32"), "UTF-16"),
    ("one\ncafé".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8 but, it seems, Latin-1"),
    ("红色".encode("gb18030"), "line 1: byte 0xba is not UTF-8")])
def test_other_encodings_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    refused(read_text, tmp_path / "a.txt", names=["a.txt", message, "expected a text file in UTF-8"])


@linux
@pytest.mark.parametrize("read", [read_text, read_json, lambda path: load_tensors(path, small()),
                                  lambda path: load_pickled(path, small())])
def test_fifos_devices_folders_and_nothing_are_refused_before_they_are_opened(tmp_path, read):
    os.mkfifo(tmp_path / "fifo")
    for path, message in ((tmp_path / "fifo", "not a regular file"), (Path("/dev/zero"), "not a regular file"),
                          (tmp_path, "a folder"), (tmp_path / "none", "not found")):
        refused(read, path, names=[path, message, "expected a"])


@pytest.mark.parametrize("content", ["", "[1]", "null", "{", '{"a": 1', "[" * 100_000, '{"a": ' * 100_000,
                                     '{"a": ' + "1" * 5000 + "}"])
def test_what_is_no_json_object_is_refused_in_one_line(tmp_path, content):
    write_text(tmp_path / "a.json", content)
    refused(read_json, tmp_path / "a.json", names=["a.json: "])


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "a.json", {"red": "红", "list": [1, None, 2.5]})
    assert read_json(tmp_path / "a.json") == {"red": "红", "list": [1, None, 2.5]}
    assert "红" in read_text(tmp_path / "a.json")


# ----------------------------------------------------------------------------- weight folders

def change_tensors(path: Path, **changes) -> None:
    tensors = {name: changes.get(name.rpartition(".")[2], tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_a_saved_folder_is_the_same_model(tmp_path):
    save_folder(tmp_path, small())
    again = load_folder(tmp_path, Small, SmallConfig)
    assert again.config == SmallConfig(width=3) and not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), small().state_dict().values()))
    save_folder(tmp_path, small(), {name: 2 * tensor for name, tensor in small().state_dict().items()})
    assert torch.equal(load_folder(tmp_path, Small, SmallConfig).layer.bias, 2 * small().layer.bias)


@pytest.mark.parametrize("change, message", [
    ({"bias": None}, "layer.bias is no such tensor, expected (2,)"),
    ({"bias": torch.zeros(3)}, "layer.bias is (3,), expected (2,)"),
    ({"bias": torch.zeros(2, dtype=torch.int64)}, "layer.bias is torch.int64, expected float32"),
    ({"bias": torch.zeros(2, dtype=torch.bool)}, "layer.bias is torch.bool, expected float32"),
    ({"bias": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "layer.bias is torch.float8_e4m3fn, expected float32"),
    ({"weight": torch.tensor([[0.0, 1, 2], [0, float("nan"), 2]])}, "layer.weight holds NaN or infinity"),
    ({"weight": torch.full((2, 3), float("-inf"), dtype=torch.bfloat16)}, "layer.weight holds NaN or infinity")])
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    save_folder(tmp_path, small())
    change_tensors(tmp_path / "model.safetensors", **change)
    refused(load_folder, tmp_path, Small, SmallConfig, names=["model.safetensors: " + message])


def test_tensors_of_16_bits_and_of_mixed_types_are_taken_as_they_are(tmp_path):
    save_folder(tmp_path, small())
    change_tensors(tmp_path / "model.safetensors", weight=small().layer.weight.bfloat16())
    layer = load_folder(tmp_path, Small, SmallConfig).layer
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("size", [0, 4, 60, -1])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, size):
    save_folder(tmp_path, small())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(load_folder, tmp_path, Small, SmallConfig, names=["model.safetensors: not a whole safetensors file"])


@pytest.mark.parametrize("content, message", [
    ({"width": 3}, "field 'scale' is missing"),
    ({"width": 3, "scale": 1, "context": 512}, "field 'context' is unknown"),
    ({"width": "3", "scale": 1}, "width is '3', expected a whole number"),
    ({"width": True, "scale": 1}, "width is True, expected a whole number"),
    ({"width": 10 ** 7, "scale": 1}, "width is 10000000, expected 1 to 64"),
    ({"width": 3, "scale": float("nan")}, "scale is nan, expected a finite number")])
def test_a_config_of_other_fields_or_values_is_refused_in_one_line(tmp_path, content, message):
    save_folder(tmp_path, small())
    (tmp_path / "config.json").write_text(json.dumps(content))
    refused(load_folder, tmp_path, Small, SmallConfig, names=["config.json: " + message])


# ----------------------------------------------------------------------------- pickled tensors

class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ("ran",)


def lightning(state: dict) -> dict:
    """What Lightning 1.0 wrote with the tensors: classes as keys, numpy scalars, namespaces."""
    module = types.ModuleType("vanished_lightning")
    module.Callback = type("Callback", (), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    import numpy
    return {"epoch": 3, "global_step": 5, "state_dict": state | {"loss.logvar": torch.zeros(())},
            "callbacks": {module.Callback: {"best": numpy.float64(0.5), "evil": Evil()}}, "lr_schedulers": [],
            "optimizer_states": [torch.optim.Adam(nn.Linear(2, 2).parameters()).state_dict()],
            "hyper_parameters": argparse.Namespace(lr=1e-4, model=module.Callback())}


def test_lightnings_checkpoint_loads_though_its_classes_are_unknown_and_runs_nothing(tmp_path, capfd):
    torch.save(lightning(small().state_dict()), tmp_path / "last.ckpt")
    del sys.modules["vanished_lightning"]
    with torch.device("meta"):
        model = Small(SmallConfig(width=3))
    load_pickled(tmp_path / "last.ckpt", model, unused="loss.")
    assert torch.equal(model.layer.weight, small().layer.weight) and "ran" not in capfd.readouterr().out


def test_a_file_of_tensors_alone_loads_and_objects_among_them_are_refused(tmp_path, capfd):
    path, model = tmp_path / "pytorch_model.bin", Small(SmallConfig(width=3))
    torch.save(small().state_dict(), path)
    load_pickled(path, model)
    assert torch.equal(model.layer.weight, small().layer.weight)
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=False)              # before torch 1.6
    load_pickled(path, model)
    whole = path.read_bytes()
    odd = [{"layer.weight": tensor} for tensor in (torch.eye(3).to_sparse(), torch.zeros(3, device="meta"))]
    for content in ({**small().state_dict(), "evil": Evil()}, {"state_dict": None}, torch.zeros(3), [1], {1: 2},
                    Evil(), *odd):
        torch.save(content, path)
        refused(load_pickled, path, model, names=["pytorch_model.bin: not a whole file of tensors alone"])
    for content in (b"", b"text", whole[:len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        assert "\x1b" not in refused(load_pickled, path, model,
                                     names=["pytorch_model.bin: not a whole file of tensors alone"])
    torch.save({"layer.weight": torch.full((2, 3), float("nan")), "layer.bias": torch.zeros(2)}, path)
    refused(load_pickled, path, model, names=["layer.weight holds NaN"])
    assert "ran" not in capfd.readouterr().out


# ----------------------------------------------------------------------------- fingerprints

def test_a_fingerprint_survives_a_file_and_tells_names_shapes_and_numbers_apart(tmp_path):
    model = small()
    save_folder(tmp_path, model)
    assert fingerprint(load_folder(tmp_path, Small, SmallConfig)) == fingerprint(model) == fingerprint(
        dict(reversed(model.state_dict().items())))
    assert fingerprint(small().bfloat16()) == fingerprint(small().bfloat16().float())
    assert len(fingerprint(model)) == 64 and int(fingerprint(model), 16)
    x = torch.arange(6.0)
    assert len({fingerprint(t) for t in ({"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.view(2, 3).T}, {"a": x + 1},
                                         {}, {"a": x[:1], "b": x[1:]}, {"a": x[:0]})}) == 8


# ----------------------------------------------------------------------------- checkpoints

def state(step: int) -> dict:
    """A run's state: tensors of model and optimizer, and JSON."""
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    model.layer(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "run": {"seed": 0, "sizes": [[64, 64]], "data": None, "lr": 1e-3, "stage": "红"}}


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for out in (tmp_path / "a", tmp_path / "b"):
        save_checkpoint(out, 1, state(1))
    assert (tmp_path / "a" / "checkpoint-000001.pt").read_bytes() == \
        (tmp_path / "b" / "checkpoint-000001.pt").read_bytes()


def test_a_checkpoint_comes_back_and_the_newest_two_are_kept(tmp_path):
    assert load_checkpoint(tmp_path) is None and load_checkpoint(tmp_path / "none") is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state(step))
    assert [path.name for _, path in checkpoints(tmp_path)] == ["checkpoint-000002.pt", "checkpoint-000003.pt"]
    assert equal(load_checkpoint(tmp_path), state(3))
    save_checkpoint(tmp_path, 4, state(4))
    assert [step for step, _ in checkpoints(tmp_path)] == [3, 4]


def test_numbers_in_names_compare_as_numbers_and_only_our_names_count(tmp_path):
    save_checkpoint(tmp_path, 999_999, state(999_999))
    save_checkpoint(tmp_path, 1_000_000, state(1_000_000))
    others = ["checkpoint-old.pt", "checkpoint-12.pt.bak", "my-checkpoint-9999999.pt", "checkpoint--1.pt"]
    for name in others:
        (tmp_path / name).write_text("not ours")
    (tmp_path / "checkpoint-9999999.pt").mkdir()
    assert load_checkpoint(tmp_path)["step"] == 1_000_000
    save_checkpoint(tmp_path, 1_000_001, state(1_000_001))
    assert [step for step, _ in checkpoints(tmp_path)] == [1_000_000, 1_000_001]
    assert all((tmp_path / name).exists() for name in others)


def test_flipped_bits_anywhere_are_noticed_and_the_checkpoint_before_is_taken(tmp_path, capsys):
    save_checkpoint(tmp_path, 1, state(1))
    save_checkpoint(tmp_path, 2, state(2))
    path = tmp_path / "checkpoint-000002.pt"
    whole, noticed = path.read_bytes(), 0
    for place in range(0, len(whole), 23):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        found = load_checkpoint(tmp_path)
        line = capsys.readouterr().err
        assert equal(found, state(found["step"])) and (found["step"] == 1) == bool(line)
        if line:
            assert line.startswith(f"{path}: damaged (") and line.endswith("going on from the checkpoint before\n")
            assert line.count("\n") == 1
        noticed += found["step"] == 1
    assert noticed > len(whole) / 23 * 0.6                          # the rest is padding and headers without meaning


def test_where_no_checkpoint_is_whole_the_run_does_not_start_again_by_itself(tmp_path):
    for step, content in ((1, b""), (2, b"half a file")):
        (tmp_path / f"checkpoint-{step:06d}.pt").write_bytes(content)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "checkpoint-000003.pt")
    refused(load_checkpoint, tmp_path, names=[tmp_path, "no checkpoint is whole"])


def test_checkpoints_after_the_one_that_a_run_went_on_from_are_dropped_at_its_next(tmp_path):
    save_checkpoint(tmp_path, 1, state(1))
    (tmp_path / "checkpoint-000005.pt").write_bytes(b"damaged")
    save_checkpoint(tmp_path, 3, state(3))
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 3] and load_checkpoint(tmp_path)["step"] == 3


@pytest.mark.skipif(os.name == "nt", reason="Windows limits no file's size")
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so_in_one_line(tmp_path):
    """A limit of 100 kB a file, in a process of its own, stands for the disk."""
    save_checkpoint(tmp_path, 1, state(1))
    program = ("import resource, signal, sys, torch; from checkpoint import *; from config import ends_in_one_line\n"
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
               "with ends_in_one_line('train.py'): save_checkpoint(sys.argv[1], 2, {'model': torch.zeros(10**6)})")
    result = run_python(program, tmp_path)
    assert result.returncode == 2 and result.stderr.count(b"\n") == 1, result.stderr
    assert b"checkpoint-000002.pt: cannot be written" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001.pt"]
    assert load_checkpoint(tmp_path)["step"] == 1


def test_a_kill_while_writing_leaves_the_last_checkpoint_and_its_rest_is_cleared(tmp_path):
    save_checkpoint(tmp_path, 1, state(1))
    program = ("import os, sys, torch; from checkpoint import *\n"
               "torch.save = lambda state, file: (file.write(b'half'), os._exit(9))\n"
               "save_checkpoint(sys.argv[1], 2, {})")
    assert run_python(program, tmp_path).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2 and load_checkpoint(tmp_path)["step"] == 1
    save_checkpoint(tmp_path, 2, state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000001.pt", "checkpoint-000002.pt"]


# ----------------------------------------------------------------------------- one run a folder

def test_a_second_run_in_a_folder_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    program = ("import sys, time; from files import lock\n"
               "with lock(sys.argv[1]): print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "out")], stdout=subprocess.PIPE,
                             cwd=Path(__file__).parents[1])
    try:
        assert other.stdout.readline().strip() == b"held"
        refused(lock(tmp_path / "out").__enter__, names=[tmp_path / "out", "another run is at work"])
    finally:
        other.kill()
        other.communicate()
    for _ in range(2):                                             # once more after it ended by itself
        with lock(tmp_path / "out"):
            refused(lock(tmp_path / "out").__enter__, names=["another run is at work"])


def test_the_lock_works_by_the_calls_of_windows_too(tmp_path, monkeypatch):
    taken = set()

    def locking(file, mode, count):
        if os.fstat(file).st_ino in taken:
            raise PermissionError(13, "Permission denied")
        taken.add(os.fstat(file).st_ino)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(files, "os", types.SimpleNamespace(**{**vars(os), "name": "nt"}))
    with lock(tmp_path):
        refused(lock(tmp_path).__enter__, names=["another run is at work"])


def test_the_modules_that_only_unix_has_are_imported_nowhere_at_the_top():
    program = ("import sys\nfor name in ('fcntl', 'resource', 'pwd', 'termios'): sys.modules[name] = None\n"
               "import checkpoint, config, files, mars, qwen, tokenizer")
    result = run_python(program)
    assert result.returncode == 0, result.stderr
    assert checkpoint.atomic_write is files.atomic_write
