"""Not in the paper: files that are written whole or not at all, and text and JSON that are read strictly.

    atomic_write(path, lambda temporary: image.save(temporary))
    with lock(out): ...                                  one run a folder

What cannot be written or read raises ValueError, one line that names the file.
"""
import contextlib
import json
import os
import secrets
from pathlib import Path


def is_stream(path: Path) -> bool:
    """Whether `path` is a FIFO, a device or /dev/stdout, whose place no file can take."""
    target = path.parent / os.readlink(path) if path.is_symlink() else path
    in_proc = any(Path("/proc") in place.parent.resolve().parents for place in (path, target))     # /dev/stdout
    return in_proc or (path.exists() and not path.is_file() and not path.is_dir())


def atomic_write(path: str | Path, write) -> None:
    """Calls write(temporary path), then gives the file its name: a reader sees the old or the new.

    The temporary file is in the same folder, has a name that nobody can guess, and keeps the suffix. A link is
    replaced, never written through; a FIFO or a device is written straight. Parents are made. Nothing is left behind.
    """
    path = Path(path)
    temporary = path.parent / f".tmp-{path.stem[:40]}-{secrets.token_hex(8)}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "this is a folder, expected a file")
        if is_stream(path):
            return write(path)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)                            # safetensors makes files that their owner alone can read
        os.replace(temporary, path)
    except (ValueError, BrokenPipeError):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)      # torch, too, has words for a full disk
        raise ValueError(f"{path}: cannot be written ({reason})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def first_line(error: Exception) -> str:
    """The message of an error, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_regular(path: str | Path, expected: str = "a file") -> Path:
    """`path` again, unless it is missing, a folder, a FIFO or a device: to open one of those might never end."""
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "not a regular file" if path.exists() else "not found"
        raise ValueError(f"{path}: {found}, expected {expected}")
    return path


def decode_text(content: bytes, where) -> str:
    """Bytes in UTF-8 -> text without a byte order mark, its lines ended by "\\n". where: what errors start with."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise ValueError(f"{where}: not UTF-8 but UTF-16, or no text at all; expected a text file in UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{where}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8 but, it seems, Latin-1 "
                         "or its like; expected a text file in UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode_json(text: str, where) -> dict:
    """One JSON object. where: what errors start with."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(content).__name__}")
    return content


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, whatever the system's encoding."""
    return decode_text(check_regular(path, "a text file in UTF-8").read_bytes(), path)


def read_json(path: str | Path) -> dict:
    """A JSON file that holds one object."""
    return decode_json(read_text(path), path)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 with "\\n" at the ends of lines, on every system."""
    atomic_write(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def write_json(path: str | Path, content) -> None:
    """Writes `content` as readable JSON."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def lock(folder: str | Path):
    """Holds `folder` for one run, and refuses a second one. The operating system keeps the lock, so that it ends with
    its process, however that ends. The file stays."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "ab") as file:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder}: another run is at work here, expected a folder of its own") from None
        except OSError:
            pass                                         # a file system without locks
        yield
