"""Files: weight folders (`config.json` beside `model.safetensors`), written whole or not at all, read strictly.

Not in the paper. The one file that every other may import, so that the codec and the model read and write alike.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


@contextlib.contextmanager
def one_line_errors(program: str):
    """Bad input, a ValueError or an OSError, ends in one clear line and exit code 2, never in a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)


def write_beside(path: Path, write) -> None:
    """Calls write(temporary path), then renames it to `path`: a reader sees the old file or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content) -> None:
    """Writes `content` as readable JSON, beside and renamed."""
    write_beside(path, lambda p: p.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n"))


def read_json(path: Path) -> dict:
    """Reads one JSON object. Raises ValueError, one line, where the file is missing or malformed."""
    if not path.is_file():
        raise ValueError(f"{path}: not found, expected a JSON file")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_config(path: Path, kind):
    """Reads the dataclass `kind` from a JSON file; every field must be there and none beside.

    Raises ValueError, one line, naming the field that is missing, unknown or of another type.
    """
    content = read_json(path)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in fields.keys() - content.keys():
        raise ValueError(f"{path}: field {name!r} is missing")
    for name in content.keys() - fields.keys():
        raise ValueError(f"{path}: unknown field {name!r}")
    for name, value in content.items():
        expected = fields[name].type
        if isinstance(expected, type) and not isinstance(value, (int, float) if expected is float else expected):
            raise ValueError(f"{path}: field {name!r} is {value!r}, expected {expected.__name__}")
    try:
        return kind(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save_folder(directory: str | Path, model: nn.Module, state: dict | None = None) -> None:
    """Writes `model.config` and the model's tensors, or those of `state`, as `config.json` and `model.safetensors`."""
    directory = Path(directory)
    state = model.state_dict() if state is None else state
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_beside(directory / "model.safetensors", lambda p: save_file(tensors, p))
    write_json(directory / "config.json", dataclasses.asdict(model.config))


def check_shapes(path: Path, wanted: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Raises ValueError, one line, for the first tensor that is missing, unexpected or of another shape."""
    for name in sorted(wanted.keys() | found.keys()):
        have, want = found.get(name, "no such tensor"), wanted.get(name, "no such tensor")
        if have != want:
            raise ValueError(f"{path}: {name} is {have}, expected {want}")


def load_tensors(path: Path, model: nn.Module, device="cpu") -> None:
    """Fills `model`, built on the meta device, from one safetensors file: each tensor once, each of its shape.

    Raises ValueError, one line, for a file that is missing or truncated, and for a tensor that does not fit. Shapes
    are checked before the first byte is copied.
    """
    if not path.is_file():
        raise ValueError(f"{path}: not found, expected a safetensors file")
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            check_shapes(path, wanted, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})
            model.load_state_dict({name: file.get_tensor(name) for name in wanted}, strict=True, assign=True)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def load_pickled(path: Path, model: nn.Module, device="cpu", unused: str | None = None) -> None:
    """The same from a `.bin` or `.ckpt`, which is only ever read as tensors, never run as code.

    unused: prefix of tensors to leave out, such as "loss." of a training checkpoint; a dictionary of tensors under
    "state_dict" is looked for first. Raises ValueError, one line, as above and for a pickle that holds more.
    """
    try:
        tensors = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a whole file of tensors alone ({reason})") from None
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else {}
    tensors = {name: tensor for name, tensor in tensors.items() if not (unused and name.startswith(unused))}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(path, wanted, {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()})
    model.load_state_dict(tensors, strict=True, assign=True)


def codec_folder(directory: str | Path) -> Path:
    """Where a stage's folder has its codec: in `vqgan` inside it or, shared, beside it."""
    own, shared = Path(directory) / "vqgan", Path(directory).parent / "vqgan"
    return shared if shared.is_dir() and not own.is_dir() else own


def fingerprint(directory: str | Path) -> str:
    """Tells weight folders apart at little cost: a hash of each safetensors file's length, first and last megabyte.

    The folder's own and its codec's: a later stage may well write its weights into another folder inside.
    """
    found = hashlib.sha256()
    for path in [path for folder in (Path(directory), codec_folder(directory))
                 for path in sorted(folder.glob("*.safetensors"))]:
        size = path.stat().st_size
        with path.open("rb") as file:
            found.update(f"{size}".encode() + file.read(2 ** 20))
            file.seek(max(0, size - 2 ** 20))
            found.update(file.read())
    return found.hexdigest()


def load_folder(directory: str | Path, kind, config_kind, device="cpu"):
    """Reads what `save_folder` wrote -> the model, in evaluation mode. Raises ValueError, one line, see above."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: not found, expected a folder with config.json and model.safetensors")
    with torch.device("meta"):
        model = kind(read_config(directory / "config.json", config_kind))
    load_tensors(directory / "model.safetensors", model, device)
    return model.eval()
