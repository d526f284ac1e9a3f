"""Not in the paper: weight folders (config.json and model.safetensors) and the checkpoints of training runs.

    save_folder(out, model)              model = load_folder(out, MARS, MARSConfig)
    save_checkpoint(out, 500, state)     state = load_checkpoint(out)        None: there is none yet

A file that is damaged, and tensors that do not fit, raise ValueError, one line.
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


# ----------------------------------------------------------------------------- weight folders

def save_folder(directory: str | Path, model: nn.Module, state: dict[str, Tensor] | None = None) -> None:
    """Writes `model.config` as config.json, and the model's tensors, or those of `state`, as model.safetensors."""
    state = model.state_dict() if state is None else state
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    atomic_write(Path(directory) / "model.safetensors", lambda path: save_file(tensors, path))
    write_json(Path(directory) / "config.json", dataclasses.asdict(model.config))


def load_folder(directory: str | Path, kind, config_kind, device="cpu") -> nn.Module:
    """What `save_folder` wrote -> kind(config), in evaluation mode. config_kind: the settings dataclass."""
    path = Path(directory) / "config.json"
    with torch.device("meta"):
        model = kind(from_json(config_kind, read_json(path), path))
    load_tensors(Path(directory) / "model.safetensors", model, device)
    return model.eval()


def check_shapes(path: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Refuses a tensor that is missing, unexpected or of another shape."""
    for name in sorted(wanted.keys() | found.keys()):
        have, want = found.get(name, "no such tensor"), wanted.get(name, "no such tensor")
        if have != want:
            raise ValueError(f"{path}: {name} is {have}, expected {want}")


def check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    """Refuses a tensor that is not finite or no float of 16 bits or more."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise ValueError(f"{path}: {name} is {tensor.dtype}, expected float32, bfloat16 or float16")
    if not tensor.isfinite().all():
        raise ValueError(f"{path}: {name} holds NaN or infinity, expected finite weights")


def fill(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Makes `tensors`, read from `path`, those of `model`: each of its tensors, and no other."""
    shapes = lambda tensors: {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(path, shapes(model.state_dict()), shapes(tensors))
    for name, tensor in tensors.items():
        check_numbers(path, name, tensor)
    model.load_state_dict(tensors, assign=True)


def open_tensors(path: str | Path, device="cpu"):
    """A safetensors file, memory-mapped."""
    try:
        return safe_open(check_regular(path, "a safetensors file"), "pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({first_line(error)})") from None


def load_tensors(path: Path, model: nn.Module, device="cpu") -> None:
    """Fills `model`, built on the meta device, from one safetensors file."""
    with open_tensors(path, device) as file:
        fill(path, model, {name: file.get_tensor(name) for name in file.keys()})


class Ignored:
    """Stands for each class and function that a pickle names, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __init__


def load_pickled(path: Path, model: nn.Module, device="cpu", unused: str | None = None) -> None:
    """`load_tensors` from a `.bin` or `.ckpt`, which is only ever read as tensors, never run.

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
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
                raise ValueError(f"{name} is no dense tensor")
    except Exception as error:                           # each layer of a pickle has errors of its own
        raise ValueError(f"{path}: not a whole file of tensors alone ({reason(error)})") from None
    fill(path, model, tensors)


def reason(error: Exception) -> str:
    """Why torch could not read a file, in one line. Its own advice is to read it as code."""
    return type(error).__name__ if isinstance(error, pickle.UnpicklingError) else first_line(error)


def fingerprint(tensors: nn.Module | dict[str, Tensor]) -> str:
    """sha256 of names, shapes and numbers, in hexadecimal. It ties a model to its image tokenizer. The numbers count as
    float32, so that neither the device nor a larger type makes a difference."""
    tensors, found = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors, hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return found.hexdigest()


# ----------------------------------------------------------------------------- checkpoints of training runs

def checkpoints(out: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of each checkpoint in a folder, in order; files of other names do not count."""
    found = [(re.fullmatch(r"checkpoint-([0-9]+)\.pt", path.name), path) for path in Path(out).glob("*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_file())


def save_checkpoint(out: str | Path, step: int, state: dict) -> None:
    """Writes `checkpoint-000500.pt`; it and the one before stay, also where the disk is full. Later ones are of a
    branch that was given up, and go. state: {"step", "model", "optimizer", "run"}, tensors and JSON alone."""
    for left in Path(out).glob(".tmp-checkpoint-*"):     # of a run that was killed while it wrote
        left.unlink()

    def write(path: Path) -> None:
        with path.open("wb") as file:                    # given a path, torch would write its name into the file
            torch.save(state, file)
    atomic_write(Path(out) / f"checkpoint-{step:06d}.pt", write)
    found = checkpoints(out)
    kept = [path for number, path in found if number <= step][-2:]
    for _, path in found:
        if path not in kept:
            path.unlink()


def load_checkpoint(out: str | Path) -> dict | None:
    """The newest whole checkpoint of a folder; None where there is none at all. A damaged one is named on stderr, and
    the one before is taken; each part of the file has a checksum. Tensors are memory-mapped."""
    found = checkpoints(out)
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
