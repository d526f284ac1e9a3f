"""Not in the paper: files that are written whole or not at all, and text and JSON that are read strictly.

    atomic_write(path, lambda temporary: image.save(temporary))
    with lock(out): ...                                  one run a folder
"""
import contextlib
import json
import os
import tempfile
from pathlib import Path


def is_stream(path: Path) -> bool:
    """Not in the paper: whether `path` is a FIFO, a device or /dev/stdout, whose place no file can take."""
    target = path.parent / os.readlink(path) if path.is_symlink() else path
    in_proc = any(Path("/proc") in place.parent.resolve().parents for place in (path, target))     # /dev/stdout
    return in_proc or (path.exists() and not path.is_file() and not path.is_dir())


def atomic_write(path: str | Path, write) -> None:
    """Not in the paper: calls write(temporary path), then gives the file its name: a reader sees the old or the new.

    The temporary file is in the same folder, has a name that nobody can guess, and keeps the suffix. A link is
    replaced, never written through; a FIFO or a device is written straight. Parents are made. Raises ValueError, one
    line, where the file cannot be written; nothing is left behind.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "this is a folder, expected a file")
        if is_stream(path):
            return write(path)
        handle, name = tempfile.mkstemp(path.suffix, f".tmp-{path.stem[:40]}-", path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)                  # mkstemp's files are readable by their owner alone
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        if isinstance(error, (ValueError, BrokenPipeError)) or not isinstance(error, Exception):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)      # torch, too, has words for a full disk
        raise ValueError(f"{path}: cannot be written ({reason})") from error


def first_line(error: Exception) -> str:
    """Not in the paper: the message of an error, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_regular(path: str | Path, expected: str = "a file") -> Path:
    """Not in the paper: `path` again. Raises ValueError, one line, where it is missing, a folder, a FIFO or a device:
    opening one of those might never end."""
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "not a regular file" if path.exists() else "not found"
        raise ValueError(f"{path}: {found}, expected {expected}")
    return path


def read_text(path: str | Path) -> str:
    """Not in the paper: a text file in UTF-8, whatever the system's encoding. A byte order mark is dropped, and lines
    end in "\\n". Raises ValueError, one line, for another encoding and for what is not a regular file."""
    path = check_regular(path, "a text file in UTF-8")
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise ValueError(f"{path}: not UTF-8 but UTF-16, or no text at all; expected a text file in UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8 but, it seems, Latin-1 "
                         "or its like; expected a text file in UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_text(path: str | Path, text: str) -> None:
    """Not in the paper: writes UTF-8 with "\\n" at the ends of lines, on every system."""
    atomic_write(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def read_json(path: str | Path) -> dict:
    """Not in the paper: one JSON object. Raises ValueError, one line, where the file is missing or malformed."""
    text = read_text(check_regular(path, "a JSON file"))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: str | Path, content) -> None:
    """Not in the paper: writes `content` as readable JSON."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def lock(folder: str | Path):
    """Not in the paper: holds `folder` for one run. Raises ValueError, one line, where another run holds it.

    The operating system keeps the lock, so that it ends with its process, however that ends. The file stays.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = os.open(Path(folder) / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder}: another run is at work here, expected a folder of its own") from None
        except OSError:
            pass                                         # a file system without locks
        yield
    finally:
        os.close(file)
