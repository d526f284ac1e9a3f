"""Claims about the tokenizer, the sequence layout and the two sources of pictures (paper Sec. 3.3, 3.4)."""
import io
import json
import random
import re
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (Folder, World, captioning, collate, fit, open_picture, prompt, stage1_rows, text_to_image, to_image,
                  to_pixels)
from tokenizer import Tokenizer, Vocabulary

VOCABULARY = Vocabulary(text=42, codes=16)
IMG, END, UNCOND, PAD = (VOCABULARY.special(t) for t in ("<img>", "</img>", "<uncond>", "<pad>"))
CODES = np.array([[3, 1], [0, 2]])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red circle above a blue square", "蓝色方形上方的红色圆形", "the circle is red"] * 20, 400)


# ----------------------------------------------------------------------------- the tokenizer

@pytest.mark.parametrize("text", ["a red circle", "红色圆形", "zebra, naïve  café! 12\n", "猫 and 🐈", "<|endoftext|> <img>"])
def test_every_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_chinese_character_is_one_token(tokenizer):
    pieces = [tokenizer.pieces.id_to_piece(i) for i in tokenizer.encode("红色圆形")]
    assert pieces == ["▁", "红", "色", "圆", "形"]


def test_text_is_never_read_as_a_control_token(tokenizer):
    for text in ("<|endoftext|>", "<unk>", "<img>", "</img>", "<uncond>"):
        ids = tokenizer.encode(text)
        assert tokenizer.eos not in ids and max(ids) < len(tokenizer)


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    again = Tokenizer.train(["a red circle above a blue square", "蓝色方形上方的红色圆形", "the circle is red"] * 20, 400)
    assert again.model == tokenizer.model


# ----------------------------------------------------------------------------- the layout

def test_text_to_image_is_caption_then_picture_with_targets_from_img_on():
    sequence = text_to_image([5, 6], CODES, VOCABULARY)
    assert sequence.tokens == [5, 6, IMG, 45, 43, 42, 44, END]
    assert sequence.is_target == [False, False] + [True] * 6


def test_captioning_is_picture_then_caption_with_the_caption_as_target():
    sequence = captioning([5, 6], CODES, VOCABULARY, eos=1)
    assert sequence.tokens == [IMG, 45, 43, 42, 44, END, 5, 6, 1]
    assert sequence.is_target == [False] * 6 + [True] * 3


def test_training_and_sampling_share_the_prompt():
    for caption in ([5, 6], None):
        start = prompt(caption, VOCABULARY)
        assert text_to_image(caption, CODES, VOCABULARY).tokens[:len(start)] == start
    assert prompt(None, VOCABULARY) == [UNCOND, IMG]


def test_collate_pads_at_the_right_and_padding_is_no_target():
    tokens, is_target = collate([text_to_image([5], CODES, VOCABULARY), captioning([5, 6], CODES, VOCABULARY, 1)], PAD)
    assert tokens[0].tolist() == [5, IMG, 45, 43, 42, 44, END, PAD, PAD]
    assert not is_target[tokens == PAD].any()


def test_one_caption_in_ten_is_dropped_and_the_share_of_captioning_is_as_asked(tokenizer):
    source = World(50, seed=0)
    source.caption = lambda i, rng, to_write: "a red circle"
    rows = stage1_rows(source, range(50), 2000, random.Random(0), caption_share=0.3)
    assert abs(np.mean([row.is_captioning for row in rows]) - 0.3) < 0.04
    assert abs(np.mean([row.text is None for row in rows]) - 0.07) < 0.03
    vocabulary = Vocabulary(len(tokenizer), 16)
    for row in rows[:50]:
        first = row.sequence(np.zeros((2, 2), np.uint16), tokenizer, vocabulary).tokens[0]
        expected = vocabulary.special("<img>") if row.is_captioning else vocabulary.special("<uncond>")
        assert (first == expected) == (row.is_captioning or row.text is None)


def test_captions_to_write_are_told_in_reading_order_and_captions_to_draw_from_either_end():
    """Of two things, the first in reading order is above the other or left of it."""
    source, rng = World(600, seed=0), random.Random(0)
    pairs = [i for i in range(600) if source.scene(i)[1] and len(source.scene(i)[0].things) == 2]
    told = {to_write: [source.caption(i, rng, to_write) for i in pairs] for to_write in (False, True)}
    back = {key: np.mean([bool(re.search("right of|below|右|下", text)) for text in texts]) for key, texts in told.items()}
    assert back[True] == 0 and 0.4 < back[False] < 0.6


def test_a_held_out_pair_is_trained_on_without_its_caption(tokenizer):
    source = World(400, seed=0)
    hidden = [i for i in range(400) if not source.scene(i)[1]]
    assert 8 <= len(hidden) <= 28                                # one in twenty-five
    assert all(source.caption(i, random.Random(0)) is None for i in hidden)


# ----------------------------------------------------------------------------- pictures of any kind

def test_every_mode_and_orientation_becomes_upright_rgb(tmp_path):
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    red.paste((0, 0, 255), (0, 0, 20, 20))                                         # left half blue
    exif = Image.Exif()
    exif[0x0112] = 6                                                               # shown turned clockwise
    red.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert open_picture(tmp_path / "turned.jpg").size == (20, 40)
    assert np.asarray(open_picture(tmp_path / "turned.jpg"))[5, 10].argmax() == 2  # blue is at the top now
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert np.asarray(open_picture(tmp_path / "clear.png")).min() == 255           # transparent on white
    for mode in ("L", "P", "1", "CMYK", "LA"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (9, 7)).save(path)
        assert open_picture(path).mode == "RGB"
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "16.png")
    assert np.asarray(open_picture(tmp_path / "16.png"))[0, 0, 0] == 40_000 >> 8


def test_fit_crops_the_middle_and_pixels_come_back():
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste("black", (30, 0, 60, 30))
    assert np.asarray(fit(wide, 16, 16)).max() < 40
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8))
    assert to_pixels(image).shape == (3, 8, 6)
    assert np.array_equal(np.asarray(to_image(to_pixels(image))), np.asarray(image))


# ----------------------------------------------------------------------------- a folder, and what can be wrong with it

def folder(path, *lines):
    Image.new("RGB", (8, 8)).save(path / "a.png")
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_a_folder_gives_pictures_and_captions(tmp_path):
    source = Folder(folder(tmp_path, json.dumps({"file_name": "a.png", "text": ["one", "two"]}), "",
                           json.dumps({"file_name": "a.png", "text": ""})))
    assert len(source) == 2 and source.image(0).size == (8, 8)
    assert source.caption(0, random.Random(0)) in ("one", "two") and source.caption(1, random.Random(0)) is None


@pytest.mark.parametrize("line, message", [
    ('{"file_name": "a.png", "text": "x"', "metadata.jsonl, line 2: not JSON"),
    ('["a.png", "x"]', 'metadata.jsonl, line 2: expected an object with "file_name" and "text"'),
    ('{"text": "x"}', 'metadata.jsonl, line 2: expected an object with "file_name" and "text"'),
    ('{"file_name": "a.png"}', 'metadata.jsonl, line 2: "text" must be a string'),
    ('{"file_name": "a.png", "text": [1]}', 'metadata.jsonl, line 2: "text" must be a string'),
    ('{"file_name": "b.png", "text": "x"}', "b.png: no such image"),
])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    with pytest.raises(ValueError) as error:
        Folder(folder(tmp_path, '{"file_name": "a.png", "text": "x"}', line))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_manifest_an_empty_one_and_a_broken_image_are_named(tmp_path):
    with pytest.raises(ValueError, match="metadata.jsonl: no such file"):
        Folder(tmp_path)
    with pytest.raises(ValueError, match="no picture is listed"):
        Folder(folder(tmp_path, ""))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="a.png: not a whole image file"):
        open_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="none.png: no such image"):
        open_picture(tmp_path / "none.png")


# ----------------------------------------------------------------------------- encoded once

class CountingCodec(torch.nn.Module):
    """Stands in for the codec: code = mean of a 4 x 4 patch's red, counted calls."""
    factor = 4
    config = types.SimpleNamespace(num_embeddings=16)

    def __init__(self):
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.ones(1)), 0

    def encode(self, pixels):
        self.calls += 1
        return (torch.nn.functional.avg_pool2d(pixels[:, :1], 4)[:, 0] * 15 * self.weight).round().long()


@pytest.fixture
def shards_of_four(monkeypatch):
    monkeypatch.setattr(data, "SHARD", 4)


def test_pictures_are_encoded_once_and_again_only_for_another_codec(tmp_path, shards_of_four):
    source, codec = World(10, seed=0), CountingCodec()
    first = data.encode(source, codec, data.Encoding(96), tmp_path, batch=4)
    assert len(first) == 10 and first[0].shape == (24, 24) and codec.calls == 3
    for i in range(10):
        assert np.array_equal(first[i], codec.encode(to_pixels(source.image(i))[None])[0])
        assert first.captions(i) == source.captions(i)
    calls, before = codec.calls, first[7].copy()
    data.encode(source, codec, data.Encoding(96), tmp_path, batch=4)
    assert codec.calls == calls
    with torch.no_grad():
        codec.weight.mul_(0.5)
    again = data.encode(source, codec, data.Encoding(96), tmp_path, batch=4)
    assert codec.calls == calls + 3 and not np.array_equal(again[7], before)


def test_an_encoding_that_was_killed_goes_on_where_it_was(tmp_path, shards_of_four, monkeypatch):
    source, codec = World(10, seed=0), CountingCodec()
    image = source.image
    monkeypatch.setattr(source, "image", lambda i: image(i) if i < 9 else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        data.encode(source, codec, data.Encoding(96), tmp_path, batch=4)
    with pytest.raises(ValueError, match="codes.json: not found"):
        data.Codes(tmp_path)
    monkeypatch.setattr(source, "image", image)
    assert codec.calls == 2
    assert len(data.encode(source, codec, data.Encoding(96), tmp_path, batch=4)) == 10 and codec.calls == 3


def test_ranks_take_turns_at_the_shards(tmp_path, shards_of_four):
    shares = [data.Ranks(rank, 2).share(list(range(0, 10, data.SHARD))) for rank in (0, 1)]
    assert shares == [[0, 8], [4]]


def test_a_bad_picture_stops_the_encoding_or_is_left_out_and_listed(tmp_path, capsys):
    lines = [json.dumps({"file_name": f"{name}.png", "text": name}) for name in "abc"]
    where = folder(tmp_path, *lines)
    for name in "abc":
        Image.new("RGB", (96, 96), "red").save(where / f"{name}.png")
    (where / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="b.png: not a whole image file"):
        data.encode(Folder(where), CountingCodec(), data.Encoding(96), tmp_path / "codes")
    codes = data.encode(Folder(where), CountingCodec(), data.Encoding(96, skip_bad=True), tmp_path / "codes")
    assert codes.whole == [0, 2] and "1 of 3 pictures left out, cannot be read" in capsys.readouterr().out
    assert json.loads((tmp_path / "codes" / "codes.json").read_text())["left_out"][0][0] == 1


def test_tars_are_read_as_the_folder_they_were_made_of(tmp_path):
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for i, (name, text) in enumerate([("a.jpg", None), ("a.txt", "a cat"), ("b.png", None),
                                          ("b.json", '{"caption": "一只狗"}'), ("c.png", None)]):
            content = io.BytesIO()
            if text is None:
                Image.new("RGB", (8 + i, 8), "blue").save(content, "PNG")
            else:
                content.write(text.encode())
            member = tarfile.TarInfo(name)
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)
    source = data.open_source(str(tmp_path), 0, 0)
    assert [source.caption(i, random.Random(0)) for i in range(3)] == ["a cat", "一只狗", None]
    assert [source.image(i).size for i in range(3)] == [(8, 8), (10, 8), (12, 8)]
    (tmp_path / "shard-0.tar").write_bytes(b"no tar" * 100)
    with pytest.raises(ValueError, match="shard-0.tar: not a whole tar"):
        data.open_source(str(tmp_path), 0, 0)


def test_what_was_encoded_can_be_looked_at(tmp_path, capsys):
    data.main(["encode", "--data", "world", "--pictures", "20", "--out", str(tmp_path / "codes")])
    data.main(["inspect", str(tmp_path / "codes"), "--num", "6", "-o", str(tmp_path / "grid.png")])
    printed = capsys.readouterr().out
    assert printed.count("scene ") == 6 and Image.open(tmp_path / "grid.png").size == (6 * 98 - 2, 96)
    with pytest.raises(SystemExit) as stop:
        data.main(["inspect", str(tmp_path)])
    assert stop.value.code == 2 and "codes.json: not found" in capsys.readouterr().err
