"""Folders of images with captions, and recipes (paper Sec. 3.5 and 4.6); read strictly, for others may have made them.

    metadata.jsonl with cat.jpg, dog.png ...          one line an image, {"file_name": "cat.jpg", "text": "a cat"}
    0000.tar, 0001.tar ...                            WebDataset: 0.jpg, 0.txt, 1.jpg, 1.txt ... in each
    cat.jpg, cat.txt, dog.png, dog.json ...           what `tar -xf` makes of those

What is missing, malformed or outside the folder raises ValueError, one line with file and line number.
"""
import functools
import hashlib
import json
import tarfile
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple

from PIL import Image

from files import check_regular, decode_json, decode_text, first_line, read_text
from images import open_image
from tokenizer import normalize

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
TEXTS = ("txt", "caption", "json")
TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")        # those that are packed are refused


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


def make_record(name: str, captions, facts: dict, where) -> dict:
    """Sec. 3.5: what is known of one image: name and captions in Unicode's NFC, and facts. captions: a text or a list.

        "cat.jpg", ["a cat ", ""], {"weight": 2}  ->  {"name": "cat.jpg", "captions": ["a cat"], "facts": {"weight": 2}}

    where: what errors start with.
    """
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise ValueError(f'{where}: "text" must be a string or a list of strings')
    for key in ("clip_score", "aesthetic", "weight"):
        value, above = facts.get(key, 1.0), " above 0" if key == "weight" else ""
        if type(value) not in (int, float) or not abs(value) < 1e30 or (above and value <= 0):
            raise ValueError(f'{where}: "{key}" is {value!r}, expected a finite number{above}')
    if not isinstance(facts.get("split", ""), str):
        raise ValueError(f'{where}: "split" is {facts["split"]!r}, expected a text, such as "train"')
    try:
        captions = [normalize(text).strip() for text in captions if text.strip()]
        normalize(json.dumps(facts, ensure_ascii=False))
        return {"name": normalize(name), "captions": captions, "facts": facts}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


class Place(NamedTuple):
    """Not in the paper: where the bytes of an image or a text are: a file, or a part of a tar."""
    path: Path
    name: str                     # in the folder, or in the tar
    offset: int = 0
    size: int = -1                # -1: to the end of the file

    def __str__(self) -> str:
        return str(self.path) if self.size < 0 else f"{self.path}, {self.name}"

    def read(self) -> bytes:
        """The bytes."""
        with check_regular(self.path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Dataset(Captioned):
    """Sec. 3.5: a folder of images with captions, in the first of the three forms above that it holds. "text" may also
    be a list to draw from, or "" for an image without a caption."""

    def __init__(self, directory: str | Path):
        self.directory, self.records, self.places = Path(directory), [], []
        if not self.directory.is_dir():
            raise ValueError(f"{directory}: no such folder; expected one with images and metadata.jsonl")
        names = sorted(path.name for path in self.directory.iterdir())
        if "metadata.jsonl" in names:
            for where, facts in json_lines(self.directory, "metadata.jsonl"):
                name, texts = facts.pop("file_name", None), facts.pop("text", None)
                if not isinstance(name, str):
                    raise ValueError(f'{where}: expected an object with "file_name" and "text"')
                self.places.append(Place(inside(self.directory, name, where), name))
                self.records.append(make_record(name, texts, facts, where))
        elif tars := [name for name in names if suffix(name) and name.lower().endswith(TARS)]:
            for name in tars:
                self._pair(list(read_tar(inside(self.directory, name, directory))))
        else:
            self._pair([Place(inside(self.directory, name, directory), name) for name in names
                        if suffix(name) in IMAGES + TEXTS])
        if not self.records:
            raise ValueError(f"{directory}: no image in it; expected metadata.jsonl with a line an image, "
                             '{"file_name": "cat.jpg", "text": "a cat"}, or tars, or images and text files')

    def _pair(self, places: list[Place]) -> None:
        """WebDataset's convention. The captions of 0.left.jpg stand in 0.left.txt, or else in 0.txt. Of two members of
        a tar with one name the later counts, as where it is unpacked."""
        places, texts = {place.name: place for place in places}.values(), defaultdict(dict)
        for place in places:
            if suffix(place.name) in TEXTS:
                texts[nfc(place.name).rpartition(".")[0]][suffix(place.name)] = place
        for place in places:
            if suffix(place.name) in IMAGES:
                folder, slash, base = nfc(place.name).rpartition("/")
                stems = [folder + slash + base.rpartition(".")[0], folder + slash + base.partition(".")[0]]
                own = next((texts[stem] for stem in stems if stem in texts), {})
                found = {kind: decode_text(text.read(), text) for kind, text in own.items()}
                facts = decode_json(found["json"], own["json"]) if "json" in found else {}
                caption = found.get("txt") or found.get("caption") or facts.get("caption") or facts.get("text") or ""
                self.places.append(place)
                self.records.append(make_record(place.name, caption, facts, place))

    def image(self, i: int) -> Image.Image:
        """Image i, RGB."""
        return open_image(self.places[i], self.places[i].read())

    def stamp(self, i: int) -> list:
        """Changes when image i, its captions or its facts change. Its bytes count: tars unpack with the same times."""
        return [self.records[i], hashlib.sha256(self.places[i].read()).hexdigest()]


# ----------------------------------------------------------------------------- the files of a folder

def suffix(name: str) -> str:
    """Not in the paper: "0.left.JPG" -> "jpg"; "" for hidden files, such as macOS leaves for each other, `._0.jpg`."""
    base = name.rpartition("/")[2]
    return "" if base.startswith(".") else base.rpartition(".")[2].lower()


def nfc(name: str) -> str:
    """Not in the paper: a name as it is compared, also one that is not UTF-8."""
    return unicodedata.normalize("NFC", name)


def inside(directory: Path, name: str, where) -> Path:
    """Not in the paper: the regular file `name` of a folder, whatever Unicode form its name has on disk. It may not
    leave the folder, by "..", an absolute path or a link. where: what errors start with."""
    path = directory
    try:
        for part in Path(name).parts:
            child = path / part
            if not child.exists() and path.is_dir():
                child = _names(path, path.stat().st_mtime_ns).get(nfc(part), child)
            path = child
        if not path.resolve().is_relative_to(directory.resolve()):
            raise ValueError(f"it leaves the folder {directory}")
        return check_regular(path)
    except (OSError, ValueError, RuntimeError) as error:           # a name too long, with a NUL, or links in a circle
        raise ValueError(f"{where}: {name[:80]!r} cannot be read ({error})") from None


@functools.lru_cache(maxsize=64)
def _names(folder: Path, changed: int) -> dict[str, Path]:
    """The files of a folder by their names in NFC. changed: when, so that a folder that changes is read again."""
    return {nfc(path.name): path for path in folder.iterdir()}


def read_tar(tar: Path) -> Iterator[Place]:
    """Not in the paper: each image and text in a tar, which may not be packed, and may not hold links."""
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                if suffix(member.name) in IMAGES + TEXTS and not member.isdir():
                    if not member.isreg() or member.issparse():
                        raise tarfile.TarError(f"{member.name} is a link or no regular file")
                    yield Place(tar, member.name, member.offset_data, member.size)
        rest = Place(tar, "", file.offset, 2 ** 20).read()       # tarfile takes a damaged header for the end
        if not rest or any(rest):
            raise tarfile.TarError("it is cut or damaged")
    except Exception as error:                                   # a damaged header may end in any error
        raise ValueError(f"{tar}: not a whole, unpacked tar of images and captions ({first_line(error)})") from None


def json_lines(directory: Path, name: str) -> Iterator[tuple[str, dict]]:
    """Not in the paper: ("FILE, line 1", object) of each line of a JSON lines file in a folder."""
    path = inside(directory, name, directory)
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, decode_json(line, where)


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
    """Sec. 4.6: `recipes.jsonl` of a dataset, a line each: {"title": "how to make a cake", "steps": ["1. egg"],
    "images": ["egg.png"]}."""
    recipes = []
    for where, facts in json_lines(Path(directory), "recipes.jsonl"):
        title, steps, images = (facts.pop(name, None) for name in ("title", "steps", "images"))
        lists = isinstance(steps, list) and isinstance(images, list) and len(steps) == len(images) > 0
        if not lists or not all(isinstance(text, str) for text in [title, *steps, *images]):
            raise ValueError(f'{where}: expected an object with "title", and as many "steps" as "images", all texts')
        facts = make_record(title, [], facts, where)["facts"]
        recipes.append(Recipe(title, steps, [normalize(name) for name in images], facts))
    return recipes
