"""data.py, dataset.py and images.py keep their promises: layout, other people's files, encoding (Sec. 3.1 to 3.5)."""
import dataclasses
import io
import json
import os
import tarfile
import threading
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from safetensors import safe_open
from safetensors.numpy import save_file

import data
from data import (EncodedImages, Filters, captioning, collate, deinterlace, encode, interlace, joint, open_dataset,
                  prompt, targets_of, text_to_image)
from dataset import Dataset, open_recipes
from distributed import Distributed
from images import (Resize, enlarge, grid, open_image, psnr, resize_and_crop, to_image, to_pixels,
                    undo_enlarge)
from mars import IGNORE
from pool import digest_of
from tokenizer import Vocabulary
from vqgan import VQGAN, VQGANConfig

VOCABULARY = Vocabulary(text=42, image=16)
IMG, END, MANY, MANY_END, UNCOND, PAD = (VOCABULARY.special(token) for token in (
    "<img>", "</img>", "<multi_images>", "</multi_images>", "<uncond>", "<pad>"))
TOKENS = np.array([[3, 1], [0, 2]])                               # ids 45 43 42 44


# ----------------------------------------------------------------------------- the layout of a sequence

def test_text_to_image_is_caption_then_image_and_its_targets_are_the_image():
    sequence = text_to_image([5, 6], TOKENS, VOCABULARY)
    assert sequence.tokens == [5, 6, IMG, 45, 43, 42, 44, END]
    assert sequence.is_target == [False] * 2 + [True] * 6


def test_the_cascade_gives_caption_size_and_small_image_and_asks_for_the_large_one():
    large = np.array([[7, 7, 8, 8]])
    sequence = text_to_image([5], large, VOCABULARY, size=[9], low=TOKENS)
    assert sequence.tokens == [5, 9, IMG, 45, 43, 42, 44, 49, 49, 50, 50, END]
    assert sequence.is_target == [False] * 7 + [True] * 5


@pytest.mark.parametrize("shape", [(2, 2), (2, 5), (3, 1)])
def test_a_token_of_the_large_image_is_always_as_far_behind_the_one_that_it_refines(shape):
    low = torch.arange(shape[0] * shape[1]).view(shape)
    large = low.repeat_interleave(3, 0).repeat_interleave(3, 1)                        # what each of its tokens refines
    assert interlace(large, low).flatten().tolist() == low.flatten().tolist() * 9


@pytest.mark.parametrize("shape", [(2, 4), (6, 12), (3, 6), (3, 4)])
def test_the_large_image_is_put_back_in_raster_order(shape):
    low, large = torch.zeros(2, 4), torch.arange(shape[0] * shape[1]).view(shape)
    written = torch.tensor(text_to_image([5], large, VOCABULARY, low=low).tokens[-large.numel() - 1:-1]) - 42
    assert torch.equal(deinterlace(written.view(shape), low), large)


def test_captioning_is_size_and_image_then_caption_and_its_targets_are_the_caption():
    sequence = captioning([5, 6], TOKENS, VOCABULARY, eos=1, size=[9])
    assert sequence.tokens == [9, IMG, 45, 43, 42, 44, END, 5, 6, 1]
    assert sequence.is_target == [False] * 7 + [True] * 3


def test_a_recipe_is_title_then_steps_then_one_block_with_an_image_for_each_step():
    sequence = joint([5], [6, 7], [TOKENS[:1], TOKENS[1:]], VOCABULARY, eos=1)
    assert sequence.tokens == [5, 6, 7, MANY, IMG, 45, 43, END, IMG, 42, 44, END, MANY_END, 1]
    assert sequence.is_target == [False] + [True] * 13


@pytest.mark.parametrize("size, low", [((), None), ([9], None), ([9], TOKENS[:1])])
@pytest.mark.parametrize("caption", [[5, 6], None])
def test_what_is_trained_on_starts_with_the_prompt_of_sampling(caption, size, low):
    start = prompt(caption, VOCABULARY, size, low)
    assert text_to_image(caption, TOKENS, VOCABULARY, size, low).tokens[:len(start)] == start
    assert caption or start[0] == UNCOND


def test_collate_pads_at_the_right_and_padding_is_no_target():
    rows = [text_to_image([5], TOKENS, VOCABULARY), captioning([5, 6], TOKENS, VOCABULARY, 1)]
    tokens, is_target = collate(rows, PAD)
    assert tokens[0].tolist() == [5, IMG, 45, 43, 42, 44, END, PAD, PAD]
    assert not is_target[tokens == PAD].any()


def test_targets_are_those_of_the_example_and_later_heads_stay_inside_images():
    sequence = text_to_image([5, 6], np.array([[3, 1]]), VOCABULARY)                    # a red <img> 45 43 </img>
    targets = targets_of(*collate([sequence], PAD), VOCABULARY, k=2)[0]                 # (T, 2)
    none = IGNORE
    assert targets[:, 0].tolist() == [none, IMG, 45, 43, END, none]
    assert targets[:, 1].tolist() == [none, none, 43, END, none, none]


def test_with_an_offset_later_heads_are_asked_at_every_kth_position_and_the_first_at_all():
    rows = collate([text_to_image([5], np.arange(9).reshape(3, 3), VOCABULARY)], PAD)
    every, some = (targets_of(*rows, VOCABULARY, 3, offset)[0] for offset in (None, 4))
    assert torch.equal(every[:, 0], some[:, 0])
    asked = (some[:, 1:] != IGNORE).any(dim=1).nonzero().flatten().tolist()
    assert asked == [1, 4, 7, 10][:len(asked)] and len(asked) >= 3
    assert torch.equal(every[asked], some[asked])


# ----------------------------------------------------------------------------- images

def test_every_mode_and_orientation_becomes_upright_rgb(tmp_path):
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    red.paste((0, 0, 255), (0, 0, 20, 20))                                              # its left half is blue
    exif = Image.Exif()
    exif[0x0112] = 6                                                                    # shown turned clockwise
    red.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = open_image(tmp_path / "turned.jpg")
    assert turned.size == (20, 40) and np.asarray(turned)[5, 10].argmax() == 2          # blue is at the top now
    for mode in ("L", "P", "1", "CMYK", "LA", "RGBA"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (9, 7)).save(path)
        assert open_image(path).mode == "RGB"
        if mode in ("LA", "RGBA"):
            assert np.asarray(open_image(path)).min() == 255                            # transparency on white


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.ppm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name):
    Image.fromarray(np.array([[0, 40_000, 65_535]], np.uint16)).save(tmp_path / name)
    assert np.asarray(open_image(tmp_path / name))[0, :, 0].tolist() == [0, 40_000 // 257, 255]


def eps(path):
    Image.new("RGB", (8, 8)).save(path, format="EPS")


def cut(path):
    Image.effect_noise((64, 64), 90).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:-800])


BAD_IMAGES = {
    "Ghostscript's format under another name": eps,
    "a program for another program": lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "float TIFF": lambda path: Image.fromarray(np.array([[0.5, 1.0]], np.float32)).save(path, format="TIFF"),
    "32-bit TIFF": lambda path: Image.fromarray(np.array([[7, 255]], np.int32)).save(path, format="TIFF"),
    "a FIFO": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_what_is_no_whole_raster_image_is_refused_in_one_line(tmp_path, case):
    BAD_IMAGES[case](tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: .*expected") as error:
        open_image(tmp_path / "a.png")
    assert "\n" not in str(error.value) and " at 0x" not in str(error.value)


def test_what_pillow_only_warns_of_is_opened_without_a_word(tmp_path, recwarn):
    cut_exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\xff\xff\xff\xff\0\0"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=cut_exif)
    assert open_image(tmp_path / "a.jpg").size == (8, 8) and not recwarn.list


def test_a_format_that_starts_another_program_is_never_opened(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: started.append(arguments))
    eps(tmp_path / "a.png")
    with pytest.raises(ValueError, match="not a whole image"):
        open_image(tmp_path / "a.png")
    assert not started


def test_resize_keeps_the_middle_and_pixels_come_back():
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste("black", (30, 0, 60, 30))
    assert np.asarray(resize_and_crop(wide, 16, 16)).max() < 40
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8))
    assert to_pixels(image).shape == (3, 8, 6)
    assert np.array_equal(to_image(to_pixels(image)), image) and psnr(image, image) == pytest.approx(58.9, abs=0.1)
    assert psnr(image, Image.new("RGB", image.size)) < 12
    assert grid([image] * 3, columns=2).size == (14, 18) and enlarge(image).size == (43 * 6, 43 * 8)


@pytest.mark.parametrize("size, resize, expected", [
    ((300, 100), Resize(64), (64, 64)),                                                 # Stage I
    ((150, 100), Resize(64, 2.0), (64, 96)),                                            # Stage II
    ((100, 900), Resize(64, 2.0), (128, 64)),                                           # at most twice as long
    ((100, 100), Resize(64, 2.0, 128), (128, 128)),                                     # Stage III
    ((150, 100), Resize(64, 2.0, 128), (128, 192)),                                     # as many times as a square
    ((100, 200), Resize(64, 2.0, 256), (512, 256)),
])
def test_each_stage_has_its_sizes(size, resize, expected):
    assert resize.size(Image.new("RGB", size), 8) == expected


# ----------------------------------------------------------------------------- folders and tars

def png(colour="red", size=(8, 8)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def fill(folder: Path, files: dict) -> Path:
    """Writes files: bytes, or text in UTF-8."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def line(name="a.png", text="a cat", **facts) -> str:
    return json.dumps({"file_name": name, "text": text} | facts) + "\n"


def make_tar(path: Path, files: dict, mode="w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            content = content if isinstance(content, bytes) else content.encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def refused(folder: Path, message: str) -> None:
    """Opening `folder`, or reading its images, ends in one line that holds `message`."""
    with pytest.raises(ValueError) as error:
        dataset = Dataset(folder)
        [dataset.image(i) for i in range(len(dataset))]
    assert message in str(error.value) and "\n" not in str(error.value), error.value


def test_a_manifest_gives_images_captions_and_facts(tmp_path):
    text = "\ufeff" + line(text=["a cat", " ", "cafe\u0301 "], weight=2) + "\r\n"
    text += json.dumps({"file_name": "a.png", "text": "a\u2028b"}, ensure_ascii=False) + "\n" + line(text="")
    dataset = Dataset(fill(tmp_path, {"a.png": png(size=(8, 9)), "metadata.jsonl": text, "0.tar": "is not read"}))
    assert [dataset.captions(i) for i in range(3)] == [["a cat", "caf\u00e9"], ["a\u2028b"], []]
    assert dataset.facts(0) == {"weight": 2} and dataset.image(0).size == (8, 9) and dataset.name(2) == "a.png"


SIDE_FILES = {"0.left.JPG": png(size=(8, 8)), "0.right.png": png(size=(9, 8)), "0.txt": "two eyes\n", "1.png": png(),
              "1.TXT": "\ufeffone", "2.png": png(), "2.caption": "two",
              "3.png": png(), "3.json": '{"caption": "\u4e09"}',
              "v1.5.png": png(), "v1.5.txt": "five", "v1.6.png": png(), "v1.6.txt": "six", "w.png": png(),
              "._1.png": b"macOS", "._1.txt": b"\xff", ".1.png": b"hidden", "notes.md": "not read"}
SIDE_CAPTIONS = {"0.left.JPG": ["two eyes"], "0.right.png": ["two eyes"], "1.png": ["one"], "2.png": ["two"],
                 "3.png": ["\u4e09"], "v1.5.png": ["five"], "v1.6.png": ["six"], "w.png": []}


@pytest.mark.parametrize("kind", ["folder", "tar", "tar with a folder in it"])
def test_captions_are_found_in_side_files_and_in_tars(tmp_path, kind):
    if kind == "folder":
        fill(tmp_path, SIDE_FILES)
    else:
        start = "x/" if "with" in kind else ""
        make_tar(tmp_path / "0.tar", {start + name: content for name, content in SIDE_FILES.items()})
        (tmp_path / "._0.tar").write_bytes(b"macOS")
    dataset = Dataset(tmp_path)
    assert {Path(dataset.name(i)).name: dataset.captions(i) for i in range(len(dataset))} == SIDE_CAPTIONS
    assert [dataset.image(i).size for i in range(2)] == [(8, 8), (9, 8)]


@pytest.mark.parametrize("content, message", [
    ('{"file_name": "a.png", "text": "x"', "metadata.jsonl, line 2: not JSON"),
    ('["a.png", "x"]', "metadata.jsonl, line 2: expected a JSON object"),
    ('{"text": "x"}', 'metadata.jsonl, line 2: expected an object with "file_name" and "text"'),
    ('{"file_name": "a.png"}', 'line 2: "text" must be a string'),
    ('{"file_name": "a.png", "text": [1]}', 'line 2: "text" must be a string'),
    ('{"file_name": "a.png", "text": "\\ud800"}', "line 2: the text"),
    ('{"file_name": "a.png", "text": "x", "note": "\\ud800"}', "line 2: the text"),
    ("[" * 100_000, "line 2: not JSON"),
    (line("b.png"), "b.png: not found"),
    (line("../a.png"), "leaves the folder"),
    (line("x/../../a.png"), "leaves the folder"),
    (line("/etc/passwd"), "leaves the folder"),
    (line("link.png"), "leaves the folder"),
    (line("fifo.png"), "not a regular file"),
    (line("/dev/zero"), "leaves the folder"),
    (line("x"), "x: a folder"),
    (line("a" * 5000), "aaa' cannot be read ("),
    (line("a\0.png"), "a\\x00.png"),
    (line(weight=0), '"weight" is 0, expected a finite number above 0'),
    (line(clip_score=float("nan")), '"clip_score" is nan'),
    (line(aesthetic=10 ** 400), '"aesthetic" is 1000'),
    (line(weight=True), '"weight" is True'),
    (line(split=3), '"split" is 3'),
], ids=lambda value: value[:40])
def test_a_bad_line_of_a_manifest_is_named_by_file_and_number(tmp_path, content, message):
    folder = fill(tmp_path / "data", {"a.png": png(), "x/b.png": png(), "metadata.jsonl": line() + content})
    fill(tmp_path, {"a.png": png()})
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    os.mkfifo(folder / "fifo.png")
    with pytest.raises(ValueError) as error:
        Dataset(folder)
    assert message in str(error.value).replace("a\0.png", "a\\x00.png") and "\n" not in str(error.value)


def damaged(path):
    content = bytearray(make_tar(path, {"0.png": png(), "0.txt": "a", "1.png": png()}).read_bytes())
    content[1024] ^= 1                                            # in the second header
    path.write_bytes(content)


def linked(path):
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("0.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


TWO = {"0.png": png(), "0.txt": "a"}
BAD_TARS = {
    "damaged in the middle": damaged,
    "cut in a member": lambda path: path.write_bytes(make_tar(path, TWO).read_bytes()[:600]),
    "cut between members": lambda path: path.write_bytes(make_tar(path, TWO).read_bytes()[:1024]),
    "packed": lambda path: make_tar(path, TWO, "w:gz"),
    "two in a row": lambda path: path.write_bytes(make_tar(path, TWO).read_bytes() * 2),
    "no tar": lambda path: path.write_bytes(b"no tar" * 200),
    "empty": lambda path: path.write_bytes(b""),
    "a link in it": linked,
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_a_tar_that_is_damaged_packed_or_holds_links_is_refused(tmp_path, case):
    BAD_TARS[case](tmp_path / "0.tar")
    refused(tmp_path, "0.tar: not a whole, unpacked tar")


def test_a_packed_tar_is_not_passed_over(tmp_path):
    make_tar(tmp_path / "0.tar", TWO)
    make_tar(tmp_path / "1.tar.gz", TWO, "w:gz")
    refused(tmp_path, "1.tar.gz: not a whole, unpacked tar")


def test_of_two_members_of_one_name_the_later_counts_as_where_a_tar_is_unpacked(tmp_path):
    with tarfile.open(make_tar(tmp_path / "0.tar", TWO), "a") as tar:
        member = tarfile.TarInfo("0.png")
        member.size = len(png(size=(9, 9)))
        tar.addfile(member, io.BytesIO(png(size=(9, 9))))
    dataset = Dataset(tmp_path)
    assert [dataset.image(i).size for i in range(len(dataset))] == [(9, 9)] and dataset.captions(0) == ["a"]


BAD_FOLDERS = {
    "empty": (lambda f: None, "no image in it"),
    "an image that is a link": (lambda f: (f / "a.png").symlink_to("/etc/passwd"), "leaves the folder"),
    "a caption that is a link": (lambda f: (f / "a.txt").symlink_to("/etc/passwd"), "leaves the folder"),
    "an image that is a FIFO": (lambda f: os.mkfifo(f / "a.png"), "not a regular file"),
    "a manifest that is a FIFO": (lambda f: os.mkfifo(f / "metadata.jsonl"), "not a regular file"),
    "a manifest that is a link": (lambda f: (f / "metadata.jsonl").symlink_to("/etc/passwd"), "leaves the folder"),
    "a manifest that is a folder": (lambda f: (f / "metadata.jsonl").mkdir(), "metadata.jsonl: a folder"),
    "a tar that is a FIFO": (lambda f: os.mkfifo(f / "0.tar"), "not a regular file"),
    "links in a circle": (lambda f: (f / "a.png").symlink_to("a.png"), "a.png"),
    "a manifest in UTF-16": (lambda f: (f / "metadata.jsonl").write_text(line(), encoding="utf-16"), "UTF-16"),
    "a caption in Latin-1": (lambda f: fill(f, {"a.png": png(), "a.txt": b"caf\xe9"}), "a.txt, line 1: byte 0xe9"),
    "a name in Latin-1": (lambda f: fill(f, {"\udce9.png": png()}), "\udce9.png: the text '\\udce9.png' is not UTF-8"),
    "a caption in a list": (lambda f: fill(f, {"a.png": png(), "a.json": "[1]"}), "a.json: expected a JSON object"),
    "a caption cut": (lambda f: fill(f, {"a.png": png(), "a.json": '{"caption'}), "a.json: not JSON"),
    "a caption that is a number": (lambda f: fill(f, {"a.png": png(), "a.json": '{"text": 5}'}), '"text" must be'),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_with_anything_else_in_the_place_of_a_file_is_refused(tmp_path, case):
    make, message = BAD_FOLDERS[case]
    make(tmp_path)
    refused(tmp_path, message)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_compared_in_nfc_whatever_the_file_system_keeps(tmp_path, form):
    other = "NFD" if form == "NFC" else "NFC"
    name, other = (unicodedata.normalize(kind, "caf\u00e9/\u00fc.png") for kind in (form, other))
    dataset = Dataset(fill(tmp_path, {name: png(), "metadata.jsonl": line(other)}))
    assert dataset.image(0).size == (8, 8) and dataset.name(0) == unicodedata.normalize("NFC", name)


def test_recipes_are_read_strictly_and_their_images_in_nfc(tmp_path):
    good = {"title": "how to make a cake", "steps": ["1. egg", "2. cake"], "images": ["e\u0301.png", "b.png"],
            "split": "x"}
    recipe, = open_recipes(fill(tmp_path, {"recipes.jsonl": json.dumps(good) + "\n\n"}))
    assert recipe.text == "1. egg\n2. cake" and recipe.images[0] == "\u00e9.png" and recipe.facts == {"split": "x"}
    for change in ({"steps": ["1. egg"]}, {"title": {"en": "x"}}, {"images": "ab"}, {"steps": [], "images": []}):
        with pytest.raises(ValueError, match="recipes.jsonl, line 2: expected an object") as error:
            open_recipes(fill(tmp_path, {"recipes.jsonl": f"{json.dumps(good)}\n{json.dumps(good | change)}"}))
        assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------- encoded once

class Tokenizer(torch.nn.Module):
    """Stands in for the image tokenizer: a token is the mean red of 4 x 4 pixels; it counts its images."""
    factor = 4
    config = types.SimpleNamespace(num_embeddings=16, resolution=8)

    def __init__(self):
        super().__init__()
        self.weight, self.images = torch.nn.Parameter(torch.ones(1)), 0

    def encode(self, pixels):
        self.images += len(pixels)
        return (torch.nn.functional.avg_pool2d(pixels[:, :1], 4)[:, 0] * 15 * self.weight).round().long()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Ten images of different reds, the last without a caption; a shard holds four."""
    monkeypatch.setattr(data, "SHARD", 4)
    names = [f"{i}.png" for i in range(10)]
    files = {name: png((25 * i, 0, 0)) for i, name in enumerate(names)}
    text = "".join(line(name, f"number {i}" if i < 9 else "") for i, name in enumerate(names))
    return fill(tmp_path / "data", files | {"metadata.jsonl": text})


def encoded(folder: Path, vqgan=None, **more) -> tuple[EncodedImages, int]:
    """The folder encoded -> what came of it, and how many images the image tokenizer was given."""
    vqgan = vqgan or Tokenizer()
    before = vqgan.images
    images = encode(Dataset(folder), vqgan, Resize(8), folder.parent / "tokens", **more)
    return images, vqgan.images - before


def test_images_are_encoded_once_and_their_tokens_captions_and_names_come_back(folder, capsys):
    images, n = encoded(folder)
    assert n == len(images) == 10 and encoded(folder)[1] == 0
    assert [images[i].tolist() for i in range(10)] == [[[round(25 * i / 255 * 15)] * 2] * 2 for i in range(10)]
    assert images.captions(3) == ["number 3"] and images.name(9) == "9.png" and images[5].dtype == np.uint16
    assert "1 of 10 images without a caption" in capsys.readouterr().out
    assert json.loads((folder.parent / "tokens" / "encoded.json").read_text())["no_caption"] == ["9.png"]
    assert len(open_dataset(folder.parent / "tokens")) == 10
    with pytest.raises(ValueError, match="holds image tokens, not images"):
        images.image(0)


def change_caption(folder):
    manifest = folder / "metadata.jsonl"
    manifest.write_text(manifest.read_text().replace("number 5", "a\u2028five"), encoding="utf-8")


def sort_lines(folder):
    manifest = folder / "metadata.jsonl"
    manifest.write_text("".join(sorted(manifest.read_text().splitlines(True), reverse=True)))


def replace_image(folder):
    (folder / "5.png").write_bytes(png("white"))


def swap_images(folder):
    """Two images change places; each file has the size and the time of before, as where tars are unpacked."""
    contents = [(folder / name).read_bytes() for name in ("6.png", "5.png")]
    for name, content in zip(("5.png", "6.png"), contents):
        before = (folder / name).stat()
        (folder / name).write_bytes(content)
        os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert len(content) == before.st_size


def touch(folder):
    for path in folder.iterdir():
        os.utime(path, (1, 1))


def shorten(folder):
    manifest = folder / "metadata.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(True)[:6]))


def cut_shard(folder):
    path = folder.parent / "tokens" / "000000004.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("change, again", [(change_caption, 4), (sort_lines, 10), (replace_image, 4), (swap_images, 4),
                                           (touch, 0), (shorten, 2), (cut_shard, 4), (lambda folder: None, 0)])
def test_what_changed_is_encoded_again_and_nothing_else(folder, change, again):
    encoded(folder)
    change(folder)
    images, n = encoded(folder)
    fresh, _ = encode(Dataset(folder), Tokenizer(), Resize(8), folder.parent / "fresh"), None
    assert n == again and images.records == fresh.records
    assert all(np.array_equal(images[i], fresh[i]) for i in range(len(fresh)))


def test_another_image_tokenizer_size_or_filter_encodes_all_again_or_is_refused(folder):
    images, vqgan = encoded(folder)[0], Tokenizer()
    with torch.no_grad():
        vqgan.weight.mul_(0.5)
    with pytest.raises(ValueError, match="encoded by another image tokenizer"):
        encode(images, vqgan, Resize(8), folder)
    with pytest.raises(ValueError, match="or at other sizes"):
        encode(images, Tokenizer(), Resize(16), folder)
    assert encode(images, Tokenizer(), Resize(8), folder) is images
    assert encoded(folder, vqgan)[1] == 10
    with pytest.raises(ValueError, match="holds the images themselves"):
        encode(Dataset(folder), vqgan, Resize(8), folder)


def test_an_encoding_that_was_killed_goes_on_where_it_was(folder, monkeypatch):
    image = Dataset.image
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "image", lambda self, i: image(self, i) if i < 9 else os.kill(os.getpid(), 2))
        with pytest.raises(KeyboardInterrupt):
            encoded(folder)
    with pytest.raises(ValueError, match="encoded.json: not found"):
        EncodedImages(folder.parent / "tokens")
    images, n = encoded(folder)
    assert (len(images), n) == (10, 2)


def test_a_bad_image_ends_the_encoding_or_is_left_out_and_listed(folder, capsys):
    (folder / "5.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="5.png: not a whole image"):
        encoded(folder)
    images, n = encoded(folder, skip_bad=True)
    assert n == 5 and 5 not in images.valid and len(images.valid) == 9           # the first shard was there
    assert "1 of 10 images left out" in capsys.readouterr().out
    (name, why), = json.loads((folder.parent / "tokens" / "encoded.json").read_text())["skipped"]
    assert name == "5.png" and "not a whole image" in why
    assert encoded(folder, skip_bad=True)[1] == 0
    with pytest.raises(ValueError, match="5.png: not a whole image"):
        encoded(folder)


def test_a_shard_of_which_every_image_is_bad_is_left_out_whole(folder):
    for i in range(4, 8):
        (folder / f"{i}.png").write_bytes(b"no image")
    images, n = encoded(folder, skip_bad=True)
    assert images.valid == [0, 1, 2, 3, 8, 9] and images[5].size == 0 and digest_of([images])


@pytest.mark.parametrize("filters, kept", [
    (Filters(min_side=9), ["wide"]), (Filters(max_ratio=2), ["good", "bad"]),
    (Filters(min_clip_score=0.3), ["good", "wide"]), (Filters(min_aesthetic=5), ["good", "bad"])])
def test_filters_leave_out_what_is_small_long_or_scored_low_and_keep_the_unknown(tmp_path, filters, kept):
    lines = line("good.png", clip_score=0.4, aesthetic=6) + line("bad.png", clip_score=0.2)
    fill(tmp_path / "data", {"good.png": png(), "bad.png": png(), "wide.png": png(size=(30, 10)),
                             "metadata.jsonl": lines + line("wide.png", aesthetic=4)})
    images, _ = encoded(tmp_path / "data", filters=filters)
    assert [Path(images.name(i)).stem for i in images.valid] == kept


@pytest.mark.parametrize("score", [float("nan"), float("inf"), True])
def test_a_filter_that_is_no_number_is_refused(score):
    with pytest.raises(ValueError, match="min_clip_score is .*, expected a finite number"):
        Filters(min_clip_score=score)


def tamper(change):
    """A way to break the second shard: change its tensors and header."""
    def apply(tokens: Path):
        path = tokens / "000000004.safetensors"
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            header = json.loads(file.metadata()["header"])
        change(arrays, header)
        save_file(arrays, path, metadata={"header": json.dumps(header)})
    return apply


def label(**values):
    """A way to break encoded.json."""
    return lambda tokens: (tokens / "encoded.json").write_text(json.dumps(values))


def swap(tokens):
    (tokens / "000000004.safetensors").write_bytes((tokens / "000000000.safetensors").read_bytes())


BAD_SHARDS = {
    "token out of range": (tamper(lambda a, h: a["tokens"].fill(16)), "4.png has tokens from 16 to 16"),
    "negative token": (tamper(lambda a, h: a.update(tokens=a["tokens"].astype(np.int32) - 99)), "expected 0 to 15"),
    "float tokens": (tamper(lambda a, h: a.update(tokens=a["tokens"].astype(np.float32))), "shapes do not fit"),
    "too few tokens": (tamper(lambda a, h: a.update(tokens=a["tokens"][1:].copy())), "shapes do not fit its tokens"),
    "negative shape": (tamper(lambda a, h: a.update(shapes=-a["shapes"])), "shapes do not fit its tokens"),
    "no records": (tamper(lambda a, h: h.update(records=7)), "not a whole shard"),
    "record without a name": (tamper(lambda a, h: h.update(records=[{"captions": []}] * 4)), "not a whole shard"),
    "score of a record": (tamper(lambda a, h: h["records"][0].update(facts={"weight": float("nan")})), "weight"),
    "of another run": (tamper(lambda a, h: h.update(stamp="0" * 64)), "a shard of another run"),
    "another shard": (swap, "a shard of another run"),
    "cut": (lambda t: (t / "000000004.safetensors").write_bytes(b"12345"), "not a whole shard"),
    "missing": (lambda t: (t / "000000004.safetensors").unlink(), "000000004.safetensors: not found"),
    "FIFO": (lambda t: [make(t / "000000004.safetensors") for make in (os.unlink, os.mkfifo)], "not a regular"),
    "label of nonsense": (label(made_by=[], stamps=3), "encoded.json: not what `data.py encode` writes"),
    "label without V": (label(made_by={"V": "16"}, stamps=[]), "encoded.json: not what `data.py encode` writes"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_a_damaged_shard_and_one_of_another_run_are_refused_in_one_line(folder, case):
    breaks, message = BAD_SHARDS[case]
    encoded(folder)
    breaks(folder.parent / "tokens")
    with pytest.raises(ValueError) as error:
        images = EncodedImages(folder.parent / "tokens")
        [images[i] for i in images.valid]
    assert message in str(error.value) and "\n" not in str(error.value)


@dataclasses.dataclass(frozen=True)
class Threads(Distributed):
    """Two processes, imitated by threads; `seen` notes how many images each has encoded whenever they meet."""
    vqgan: Tokenizer = None
    meeting: threading.Barrier = None
    parts: list = None
    seen: list = None

    def barrier(self):
        self.seen.append(self.vqgan.images)
        self.meeting.wait(20)

    def exchange(self, value):
        self.parts[self.rank] = value
        self.barrier()
        found = list(self.parts)
        self.barrier()
        return found

    def all_reduce_sum(self, number):
        return sum(self.exchange(number))

    def all_gather(self, rows):
        parts = self.exchange(rows)
        return [parts[i % 2][i // 2] for i in range(sum(map(len, parts)))]


def test_two_processes_write_the_bytes_of_one_and_neither_is_far_ahead_of_the_other(folder, monkeypatch):
    monkeypatch.setattr(data, "AT_ONCE", 1)
    one, _ = encoded(folder)
    meeting, parts, vqgans, seen = threading.Barrier(2), [None, None], [Tokenizer(), Tokenizer()], [[], []]
    ranks = [Threads(rank, 2, torch.device("cpu"), vqgans[rank], meeting, parts, seen[rank]) for rank in (0, 1)]
    threads = [threading.Thread(target=encode, args=(Dataset(folder), vqgans[rank], Resize(8), folder.parent / "both",
                                                     ranks[rank])) for rank in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [vqgan.images for vqgan in vqgans] == [5, 5] and all(abs(a - b) <= 1 for a, b in zip(*seen, strict=True))
    assert all(after - before <= 1 for own in seen for before, after in zip(own, own[1:]))
    for path in sorted((folder.parent / "tokens").iterdir()):
        assert path.read_bytes() == (folder.parent / "both" / path.name).read_bytes()


# ----------------------------------------------------------------------------- the command

def test_the_command_encodes_a_folder_and_shows_what_was_encoded(tmp_path, capsys):
    torch.manual_seed(0)
    weights, other = tmp_path / "weights", tmp_path / "other"
    for path in (weights, other):                                 # two that differ in their random weights
        VQGAN(VQGANConfig(resolution=8, hidden_channels=8, norm_groups=4, channel_mult=(1, 1), num_res_blocks=1,
                          attn_resolutions=(), z_channels=4, num_embeddings=8,
                          quantized_embed_dim=4)).save_pretrained(path)
    fill(tmp_path / "data", {"a.png": png(), "a.txt": "a cat", "b.png": png(size=(16, 8)), "c.png": b"no image"})
    flags, out = ["--data", tmp_path / "data", "--weights", weights, "--max-aspect", "2"], tmp_path / "tokens"

    def command(*arguments):
        data.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    def fails(message, *arguments):
        with pytest.raises(SystemExit) as stop:
            command(*arguments)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and message in error, error

    fails("c.png: not a whole image", "encode", *flags, "--out", out)
    said = command("encode", *flags, "--out", out, "--skip-bad")
    assert "2 images; tokens: 1 of 4 x 4, 1 of 4 x 8" in said and "1 of 3 images left out" in said
    said = command("inspect", out, "--weights", weights, "-o", tmp_path / "grid.png")
    assert "a.png: a cat" in said and "b.png: (no caption)" in said and Image.open(tmp_path / "grid.png").height >= 256
    fails("encoded by another image tokenizer", "inspect", out, "--weights", other)
    fails("encoded.json: not found", "inspect", tmp_path)
    fails("nowhere: no such folder", "encode", "--data", tmp_path / "nowhere", *flags[2:], "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    fails("--max-ratio is 0.5, expected at least 1", "encode", *flags, "--max-ratio", "0.5")
    with data.lock(out):
        fails("another run is at work here", "encode", *flags, "--out", out)


def test_an_image_enlarged_for_the_eye_is_read_back_pixel_for_pixel():
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8))
    assert undo_enlarge(enlarge(small)).tobytes() == small.tobytes()
    assert undo_enlarge(small) is small
