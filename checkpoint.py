"""Not in the paper: weight folders (config.json and model.safetensors) and the checkpoints of training runs.

    save_folder(out, model)              model = load_folder(out, MARS, MARSConfig)
    save_checkpoint(out, 500, state)     state = load_checkpoint(out)        None: there is none yet
"""
import dataclasses
import hashlib
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import from_json
from files import atomic_write, check_regular, first_line, read_json, write_json

OURS = re.compile(r"checkpoint-([0-9]+)\.pt")            # the names of checkpoints; all others are left alone


# ----------------------------------------------------------------------------- weight folders

def save_folder(directory: str | Path, model: nn.Module, state: dict[str, Tensor] | None = None) -> None:
    """Not in the paper: writes `model.config` as config.json, and the model's tensors, or those of `state`, as
    model.safetensors. Raises ValueError, one line, where that fails."""
    state = model.state_dict() if state is None else state
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    atomic_write(Path(directory) / "model.safetensors", lambda path: save_file(tensors, path))
    write_json(Path(directory) / "config.json", dataclasses.asdict(model.config))


def load_folder(directory: str | Path, kind, config_kind, device="cpu") -> nn.Module:
    """Not in the paper: what `save_folder` wrote -> kind(config), in evaluation mode. Raises ValueError, one line,
    where config.json has other fields than `config_kind`, or the tensors do not fit."""
    path = Path(directory) / "config.json"
    with torch.device("meta"):
        model = kind(from_json(config_kind, read_json(path), path))
    load_tensors(Path(directory) / "model.safetensors", model, device)
    return model.eval()


def check_shapes(path: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Not in the paper: raises ValueError, one line, for a tensor that is missing, unexpected or of another shape."""
    for name in sorted(wanted.keys() | found.keys()):
        have, want = found.get(name, "no such tensor"), wanted.get(name, "no such tensor")
        if have != want:
            raise ValueError(f"{path}: {name} is {have}, expected {want}")


def fill(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Not in the paper: makes `tensors`, read from `path`, those of `model`. Raises ValueError, one line, where they
    do not fit."""
    check_shapes(path, *({name: tuple(tensor.shape) for name, tensor in each.items()}
                         for each in (model.state_dict(), tensors)))
    for name, tensor in tensors.items():
        check_numbers(path, name, tensor)
    model.load_state_dict(tensors, strict=True, assign=True)


def check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    """Not in the paper: raises ValueError, one line, for a tensor that is not finite or no float of 16 bits or more."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise ValueError(f"{path}: {name} is {tensor.dtype}, expected float32, bfloat16 or float16")
    if not tensor.isfinite().all():
        raise ValueError(f"{path}: {name} holds NaN or infinity, expected finite weights")


def open_tensors(path: str | Path, device="cpu"):
    """Not in the paper: a safetensors file, memory-mapped. Raises ValueError, one line, where it is missing or cut."""
    try:
        return safe_open(check_regular(path, "a safetensors file"), "pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({first_line(error)})") from None


def load_tensors(path: Path, model: nn.Module, device="cpu") -> None:
    """Not in the paper: fills `model`, built on the meta device, from one safetensors file: each tensor, no other.
    Raises ValueError, one line, for a bad file and for a tensor that does not fit."""
    with open_tensors(path, device) as file:
        fill(path, model, {name: file.get_tensor(name) for name in file.keys()})


class Ignored:
    """Not in the paper: stands for each class and function that a pickle names, and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def load_pickled(path: Path, model: nn.Module, device="cpu", unused: str | None = None) -> None:
    """Not in the paper: `load_tensors` from a `.bin` or `.ckpt`, which is only ever read as tensors, never run.

    A checkpoint of Lightning also holds callbacks and hyper-parameters, objects of any class: an `Ignored` stands for
    each. Tensors may be in a dictionary "state_dict". unused: prefix of tensors to leave out, such as "loss.".
    """
    check_regular(path, "a file of tensors")
    try:
        is_zip = zipfile.is_zipfile(path)                # torch 1.6 and newer
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        with torch.serialization.safe_globals([(Ignored, name) for name in names]):
            found = torch.load(path, map_location=device, weights_only=True)
        found = found.get("state_dict", found)
        tensors = {name: tensor for name, tensor in found.items() if not (unused and name.startswith(unused))}
        other = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    except Exception as error:                           # each layer of a pickle has errors of its own
        raise ValueError(f"{path}: not a whole file of tensors alone ({reason(error)})") from None
    if other:
        raise ValueError(f"{path}: not a whole file of tensors alone ({other[0]} is none)")
    fill(path, model, tensors)


def reason(error: Exception) -> str:
    """Not in the paper: why torch could not read a file, in one line. Its own advice is to read it as code."""
    return type(error).__name__ if isinstance(error, pickle.UnpicklingError) else first_line(error)


def fingerprint(tensors: nn.Module | dict[str, Tensor]) -> str:
    """Not in the paper: sha256 of names, shapes and numbers, in hexadecimal. It ties a model to its image tokenizer.

    The numbers count as float32, so that neither the device nor a larger type makes a difference.
    """
    tensors, found = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors, hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return found.hexdigest()


# ----------------------------------------------------------------------------- checkpoints of training runs

def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """Not in the paper: (step, path) of each checkpoint in a folder, in order."""
    found = [(OURS.fullmatch(path.name), path) for path in Path(out).glob("checkpoint-*.pt") if path.is_file()]
    return sorted((int(match[1]), path) for match, path in found if match)


def save_checkpoint(out: str | Path, step: int, state: dict, keep: int = 2) -> None:
    """Not in the paper: writes `checkpoint-000500.pt`; the newest `keep` stay.

    state: {"step", "model", "optimizer", "run"}, tensors and JSON alone. Checkpoints of later steps are of a branch
    that was given up, and go. Raises ValueError, one line, on a full disk; the last checkpoint is then still whole.
    """
    out = Path(out)
    for left in out.glob(".tmp-checkpoint-*"):           # of a run that was killed while it wrote
        left.unlink()

    def write(path: Path) -> None:
        with path.open("wb") as file:                    # given a path, torch would write its name into the file
            torch.save(state, file)
    atomic_write(out / f"checkpoint-{step:06d}.pt", write)
    earlier = [path for number, path in checkpoints(out) if number <= step]
    for _, path in checkpoints(out):
        if path not in earlier[-keep:]:
            path.unlink()


def load_checkpoint(out: str | Path) -> dict | None:
    """Not in the paper: the newest whole checkpoint of a folder; None where there is none at all.

    A damaged one is named on stderr, and the one before is taken; each part of the file has a checksum. Tensors are
    memory-mapped. Raises ValueError, one line, where all are damaged.
    """
    found = checkpoints(Path(out))
    for _, path in reversed(found):
        try:
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():            # torch itself does not compare checksums
                    raise ValueError(f"the checksum of {damaged} is wrong")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
            if isinstance(state, dict) and state.keys() >= {"step", "model", "optimizer", "run"}:
                return state
            raise ValueError("not the checkpoint of a run")
        except Exception as error:                       # flipped bits meet zipfile, zlib, pickle, torch or the system
            print(f"{path}: damaged ({reason(error)}); going on from the checkpoint before", file=sys.stderr)
    if found:
        raise ValueError(f"{out}: no checkpoint is whole; delete them to start from step 0")
    return None
