"""Folders of images with captions, and recipes (paper Sec. 3.5 and 4.6); read strictly, for others may have made them.

    metadata.jsonl with cat.jpg, dog.png ...          one line an image, {"file_name": "cat.jpg", "text": "a cat"}
    0000.tar, 0001.tar ...                            WebDataset: 0.jpg, 0.txt, 1.jpg, 1.txt ... in each
    cat.jpg, cat.txt, dog.png, dog.json ...           what `tar -xf` makes of those
"""
import functools
import json
import tarfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from PIL import Image

from files import check_regular, first_line, read_text
from images import open_image
from tokenizer import normalize

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
TEXTS = ("txt", "caption", "json")


class Captioned:
    """Sec. 3.5: images that have captions. `Dataset` has the images themselves, `data.EncodedImages` their tokens."""
    records: list[dict]           # {"name", "captions", "facts"} of each image, see `make_record`

    def __len__(self) -> int:
        return len(self.records)

    def name(self, i: int) -> str:
        """What image i is called: its file, in the folder or the tar."""
        return self.records[i]["name"]

    def captions(self, i: int) -> list[str]:
        """All captions of image i; none: it is trained on without one."""
        return self.records[i]["captions"]

    def facts(self, i: int) -> dict:
        """What else is known of image i: "split" (all but "train" is kept from training), "weight" (how often it is
        drawn, 1 by default), "clip_score" and "aesthetic" for `data.Filters`, and what an evaluation wants to know."""
        return self.records[i]["facts"]


def make_record(name: str, texts, facts: dict, where: str) -> dict:
    """Sec. 3.5: what is known of one image: name and captions in Unicode's NFC, and facts. texts: a string, or a list.

        "cat.jpg", ["a cat ", ""], {"weight": 2}  ->  {"name": "cat.jpg", "captions": ["a cat"], "facts": {"weight": 2}}

    Raises ValueError, one line that starts with `where`, for values of another kind.
    """
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{where}: "text" must be a string or a list of strings')
    for key in ("clip_score", "aesthetic", "weight"):
        value = facts.get(key, 1.0)
        if type(value) not in (int, float) or not abs(value) < 1e30 or (key == "weight" and value <= 0):
            raise ValueError(f'{where}: "{key}" is {value!r}, expected a finite number'
                             + (" above 0" if key == "weight" else ""))
    if not isinstance(facts.get("split", ""), str):
        raise ValueError(f'{where}: "split" is {facts["split"]!r}, expected a text, such as "train"')
    try:
        captions = [normalize(text).strip() for text in texts if text.strip()]
        return {"name": normalize(name), "captions": captions, "facts": facts}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


class Dataset(Captioned):
    """Sec. 3.5: a folder of images with captions, in the first of the three forms above that it holds.

    "text" may also be a list to draw from, or "" for an image without a caption. Raises ValueError, one line with file
    and line number, for what is damaged or leaves the folder.
    """

    def __init__(self, directory: str | Path):
        self.directory, self.records, self.places = Path(directory), [], []   # place: (path, offset, size) of the bytes
        if not self.directory.is_dir():
            raise ValueError(f"{directory}: no such folder; expected one with images and metadata.jsonl")
        names = sorted(path.name for path in self.directory.iterdir() if not path.name.startswith("._"))    # of macOS
        tars = [name for name in names if name.endswith(".tar")]
        if "metadata.jsonl" in names:
            for where, facts in json_lines(self._path("metadata.jsonl")):
                name, texts = facts.pop("file_name", None), facts.pop("text", None)
                if not isinstance(name, str):
                    raise ValueError(f'{where}: expected an object with "file_name" and "text"')
                self.places.append((inside(self.directory, name, where), 0, -1))
                self.records.append(make_record(name, texts, facts, where))
        elif tars:
            for name in tars:
                self._pair(list(read_tar(self._path(name))))
        else:
            self._pair([(name, (self._path(name), 0, -1)) for name in names if suffix(name) in IMAGES + TEXTS])
        if not self.records:
            raise ValueError(f"{directory}: no image in it; expected metadata.jsonl with a line an image, "
                             '{"file_name": "cat.jpg", "text": "a cat"}, or tars, or images and text files')

    def _path(self, name: str) -> Path:
        """A file of the folder itself."""
        return inside(self.directory, name, str(self.directory))

    def _pair(self, members: list[tuple[str, tuple]]) -> None:
        """WebDataset's convention. The captions of 0.left.jpg stand in 0.left.txt, or else in 0.txt."""
        texts = {}
        for name, place in members:
            if suffix(name) in TEXTS:
                texts.setdefault(normalize(name.rpartition(".")[0]), {})[suffix(name)] = (name, place)
        for name, place in members:
            if suffix(name) in IMAGES:
                folder, slash, base = normalize(name).rpartition("/")
                stems = [folder + slash + base.rpartition(".")[0], folder + slash + base.partition(".")[0]]
                found = next((texts[stem] for stem in stems if stem in texts), {})
                found = {kind: read_caption(*member) for kind, member in found.items()}
                facts, where = found.get("json", {}), f"{place[0]}, {name}"
                caption = found.get("txt") or found.get("caption") or facts.get("caption") or facts.get("text") or ""
                self.places.append(place)
                self.records.append(make_record(name, caption, facts, where))

    def image(self, i: int) -> Image.Image:
        """Image i, RGB. Raises ValueError, one line, where the file is broken."""
        place = self.places[i]
        return open_image(place[0] if place[2] < 0 else f"{place[0]}, {self.name(i)}", read_bytes(place))

    def stamp(self, i: int) -> list:
        """Changes when image i, its captions or its facts change; its pixels count by size and time of their file."""
        path, offset, _ = self.places[i]
        stat = path.stat()
        return [self.records[i], offset, stat.st_size, stat.st_mtime_ns]


# ----------------------------------------------------------------------------- the files of a folder

def suffix(name: str) -> str:
    """Not in the paper: "0.left.JPG" -> "jpg"; "" for what macOS leaves for each file, `._0.jpg`."""
    base = name.rpartition("/")[2]
    return "" if base.startswith("._") else base.rpartition(".")[2].lower()


def inside(directory: Path, name: str, where: str) -> Path:
    """Not in the paper: the regular file `name` inside a folder, whatever Unicode form its name has on disk.

    Raises ValueError, one line, for a path that leaves the folder, by "..", an absolute path or a link, and for what is
    no regular file, such as a FIFO, which could be waited for without end.
    """
    path = Path(directory)
    try:
        for part in Path(name).parts:
            child = path / part
            if not child.exists() and path.is_dir():
                child = _names(path, path.stat().st_mtime_ns).get(unicodedata.normalize("NFC", part), child)
            path = child
        leaves = not path.resolve().is_relative_to(directory.resolve())
        kind = "" if path.is_file() else "not a regular file" if path.exists() else "no such file"
    except (OSError, ValueError, RuntimeError) as error:           # a name too long, with a NUL, or links in a circle
        raise ValueError(f"{where}: {name[:80]!r} is no name of a file ({error})") from None
    if leaves:
        raise ValueError(f"{where}: {name!r} leaves the folder {directory}")
    if kind:
        raise ValueError(f"{where}: {path}: {kind}")
    return path


@functools.lru_cache(maxsize=64)
def _names(folder: Path, changed: int) -> dict[str, Path]:
    """The files of a folder by their names in NFC. changed: when, so that a folder that changes is read again."""
    return {unicodedata.normalize("NFC", path.name): path for path in folder.iterdir()}


def read_tar(tar: Path) -> Iterator[tuple[str, tuple]]:
    """Not in the paper: (name, place) of each image and text in a tar. Raises ValueError, one line, for a tar that is
    cut, damaged or packed, and for links in it."""
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                if suffix(member.name) in IMAGES + TEXTS and not member.isdir():
                    if not member.isreg() or member.issparse():
                        raise tarfile.TarError(f"{member.name} is a link or no regular file")
                    yield member.name, (tar, member.offset_data, member.size)
        rest = read_bytes((tar, file.offset, 2 ** 20))       # tarfile takes a damaged header for the end
        if not rest or any(rest):
            raise tarfile.TarError("it is cut or damaged")
    except Exception as error:                               # a damaged header may end in any error
        raise ValueError(f"{tar}: not a whole, unpacked tar of images and captions ({first_line(error)})") from None


def read_bytes(place: tuple) -> bytes:
    """Not in the paper: what stands at a place (path, offset, size); size -1: to the end of the file."""
    path, offset, size = place
    with check_regular(path).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def read_caption(name: str, place: tuple) -> str | dict:
    """Not in the paper: a text file, or a JSON object, of a folder or a tar. Raises ValueError, one line."""
    is_json = suffix(name) == "json"
    try:
        text = read_bytes(place).decode("utf-8-sig")
        content = json.loads(text) if is_json else text
    except UnicodeDecodeError:
        raise ValueError(f"{place[0]}, {name}: not UTF-8, expected a text in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place[0]}, {name}: not JSON ({error})") from None
    if is_json and not isinstance(content, dict):
        raise ValueError(f"{place[0]}, {name}: expected a JSON object with a caption")
    return content


def json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Not in the paper: ("FILE, line 1", object) of each line of a JSON lines file. Raises ValueError, one line."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(content, dict):
                raise ValueError(f"{where}: expected a JSON object, found {type(content).__name__}")
            yield where, content


# ----------------------------------------------------------------------------- recipes

@dataclass(frozen=True)
class Recipe:
    """Sec. 4.6, Fig. 9: a title, a step of text for each image, and the names of the images in their dataset."""
    title: str
    steps: list[str]
    images: list[str]
    facts: dict                   # the rest of its line, "split" as in a dataset

    @property
    def text(self) -> str:
        """The steps as the model writes them, a line each."""
        return "\n".join(self.steps)


def open_recipes(directory: str | Path) -> list[Recipe]:
    """Sec. 4.6: `recipes.jsonl` of a dataset, {"title": "how to make a cake", "steps": ["1. ..."], "images": ["0.png"]}
    a line. Raises ValueError, one line with file and line number, for any other."""
    recipes = []
    for where, facts in json_lines(inside(Path(directory), "recipes.jsonl", str(directory))):
        title, steps, images = (facts.pop(name, None) for name in ("title", "steps", "images"))
        lists = isinstance(steps, list) and isinstance(images, list) and len(steps) == len(images) > 0
        if not lists or not all(isinstance(text, str) for text in [title, *steps, *images]):
            raise ValueError(f'{where}: expected an object with "title", and as many "steps" as "images", all texts')
        facts = make_record(title, [], facts, where)["facts"]
        recipes.append(Recipe(title, steps, [normalize(name) for name in images], facts))
    return recipes
