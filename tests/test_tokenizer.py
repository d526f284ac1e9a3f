"""Claims about the tokenizers and the joint vocabulary (paper Sec. 3.3, Tokenization)."""
import base64
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest

from files import read_json, write_json, write_text
from tokenizer import SPECIAL_TOKENS, QwenTokenizer, TextTokenizer, Vocabulary, load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
TEXTS = ["a red circle above a blue square", "蓝色方形上方的红色圆形", "the circle is red"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS, 400)


def refused(call, *arguments, names=()) -> None:
    """Calls and expects a ValueError of one line that says all of `names`."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and all(str(name) in str(error.value) for name in names), str(error.value)


# ----------------------------------------------------------------------------- the joint vocabulary

def test_vocabulary_of_qwen_7b_has_the_papers_160136_rows():
    vocabulary = Vocabulary(151_936, 8192)
    assert (vocabulary.size, vocabulary.visual) == (160_136, 8200)
    assert [vocabulary.special(token) for token in SPECIAL_TOKENS] == list(range(160_128, 160_134))


@pytest.mark.parametrize("text", range(40, 48))
def test_vocabulary_is_padded_to_a_multiple_of_eight_by_less_than_eight(text):
    vocabulary = Vocabulary(text, 16)
    assert vocabulary.size % 8 == 0 and 0 <= vocabulary.size - text - 16 - len(SPECIAL_TOKENS) < 8


def test_a_language_model_alone_has_no_visual_rows():
    assert (Vocabulary(42, 0).visual, Vocabulary(42, 0).size) == (0, 42)


# ----------------------------------------------------------------------------- the small tokenizer

@pytest.mark.parametrize("text", ["a red circle", "红色圆形", "zebra, naïve  café! 12\n", "猫 and 🐈",
                                  "a\0b\u2028", "<|endoftext|> <img>", "한국어 ひらがな", "", "The RED Äpfel"])
def test_every_text_comes_back_in_lower_case(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text.lower()
    assert tokenizer.encode(text) == tokenizer.encode(text.lower()) == tokenizer.encode(text.upper().lower())


def test_a_chinese_character_is_always_a_token_of_its_own():
    tokenizer = TextTokenizer.train(["红色苹果", "红色汽车", "a red apple", "a red car"] * 200, 1000)
    assert [tokenizer.pieces.id_to_piece(i) for i in tokenizer.encode("红色汽车")] == ["▁", *"红色汽车"]
    assert len(tokenizer.encode("a red car")) < 9


def test_composed_and_decomposed_characters_have_the_same_ids(tokenizer):
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")


def test_text_is_never_read_as_a_control_token(tokenizer):
    for text in ("<|endoftext|>", "<unk>", "<img>", "</img>", "<uncond>"):
        ids = tokenizer.encode(text)
        assert tokenizer.eos not in ids and max(ids) < len(tokenizer)


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    assert TextTokenizer.train(TEXTS, 400).model == tokenizer.model


@pytest.mark.parametrize("first, count", [(0x4E00, 6000), (0x3400, 1500), (0xAC00, 5000), (0x3041, 180), (0x20000, 800),
                                          (0x1F300, 400)], ids="Chinese rare Korean Japanese rarer emoji".split())
def test_the_size_grows_to_what_the_characters_need(first, count):
    characters = [c for c in map(chr, range(first, first + count)) if unicodedata.name(c, "")]
    texts = ["".join(characters[i:i + 20]) for i in range(0, len(characters), 20)] + ["a red apple"]
    tokenizer = TextTokenizer.train(texts, 400)
    assert len(tokenizer) >= 256 + len(characters)
    for character in random.Random(0).sample(characters, 50):
        assert len(tokenizer.encode(character)) <= 2                # "▁" and the character, not its bytes
    assert tokenizer.decode(tokenizer.encode(texts[3])) == texts[3]


@pytest.mark.parametrize("texts", [["a"], ["a"] * 3, ["中"], [" "], ["x" * 5000], ["a b", ""], ["a\0b"]])
def test_a_tiny_text_and_a_long_one_are_enough_to_learn_from(texts):
    tokenizer = TextTokenizer.train(texts, 10)
    assert tokenizer.decode(tokenizer.encode("any 字 at all")) == "any 字 at all"


def test_a_document_of_many_kilobytes_is_learned_from_too():
    tokenizer = TextTokenizer.train(["circle square triangle " * 1000, "z"], 400)
    assert not any(tokenizer.pieces.is_byte(i) for i in tokenizer.encode("circle"))


@pytest.mark.parametrize("texts", [[], [""], ["\n"], iter(())])
def test_nothing_to_learn_from_is_refused_in_one_line(texts):
    refused(TextTokenizer.train, texts, names=["no text tokenizer can be learned from"])


def test_a_prompt_that_was_not_utf_8_is_refused_in_one_line(tokenizer):
    prompt = os.fsdecode(b"caf\xe9") if os.name != "nt" else "caf\udce9"
    refused(tokenizer.encode, prompt, names=[r"the text 'caf\udce9' is not UTF-8 at character 4"])
    refused(TextTokenizer.train, ["good", "\ud800"], names=["is not UTF-8 at character 1"])


def test_it_is_saved_and_loaded_and_a_broken_file_is_refused(tokenizer, tmp_path):
    refused(load_tokenizer, tmp_path, names=[tmp_path, "no tokenizer found, expected tokenizer.model"])
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("a red circle") == tokenizer.encode("a red circle")
    for content in (b"", b"text", tokenizer.model[:1000], b"\0" * 9):
        (tmp_path / "tokenizer.model").write_bytes(content)
        refused(load_tokenizer, tmp_path, names=["tokenizer.model: not a whole sentencepiece model"])
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.model").mkdir()
    refused(load_tokenizer, tmp_path, names=["tokenizer.model: a folder, expected a sentencepiece model"])


# ----------------------------------------------------------------------------- Qwen's tokenizer

def qwen_folders():
    """The real ranks where they are at hand, and everywhere a trimmed file: those that occur in the golden texts."""
    real = Path(os.environ.get("QWEN_DIR", "."))
    skip = pytest.mark.skip("set QWEN_DIR to a folder with qwen.tiktoken")
    return [GOLDEN / "qwen-7b-trimmed", real if (real / "qwen.tiktoken").is_file() else pytest.param(real, marks=skip)]


@pytest.mark.parametrize("folder", qwen_folders(), ids=["trimmed", "real"])
def test_real_ranks_give_the_published_ids(folder):
    pytest.importorskip("tiktoken")
    tokenizer = QwenTokenizer.from_pretrained(folder)
    for case in json.loads((GOLDEN / "qwen_tokenizer.json").read_text(encoding="utf-8")):
        text = unicodedata.normalize("NFC", case["text"])
        assert tokenizer.bpe.encode(text, allowed_special="all") == case["ids"], text
        if "<|" not in text:
            assert tokenizer.encode(case["text"]) == case["ids"] and tokenizer.decode(case["ids"]) == text
    assert tokenizer.eos == 151_643 and len(tokenizer) == 151_851


def letters() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {i: chr(i) if i in printable else chr(next(others)) for i in range(256)}


@pytest.fixture
def small(tmp_path) -> Path:
    """All 256 bytes and a few merges, in the three kinds of files."""
    pytest.importorskip("tiktoken")
    pairs = [(b"r", b"e"), (b"re", b"d"), (b"\xe7", b"\xba"), (b"\xe7\xba", b"\xa2"), (b"\xe8", b"\x89"),
             (b"\xe8\x89", b"\xb2"), ("红".encode(), "色".encode())]
    ranks = [bytes([i]) for i in range(256)] + [a + b for a, b in pairs]
    letter = letters()
    write = lambda token: "".join(letter[byte] for byte in token)
    lines = (base64.b64encode(token) + b" %d" % i for i, token in enumerate(ranks))
    for name in ("one", "two", "three", "four"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    vocabulary = {write(token): i for i, token in enumerate(ranks)}
    merges = [(write(a), write(b)) for a, b in pairs]
    write_json(tmp_path / "two" / "vocab.json", vocabulary)
    write_text(tmp_path / "two" / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    added = [{"id": 263 + i, "content": token, "special": True} for i, token in enumerate(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|box_start|>"))]
    splits = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": QwenTokenizer.PATTERN}}]}
    fast = {"version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"}, "pre_tokenizer": splits}
    for folder, pairs in (("three", merges), ("four", [f"{a} {b}" for a, b in merges])):
        write_json(tmp_path / folder / "tokenizer.json",
                   fast | {"model": {"type": "BPE", "vocab": vocabulary, "merges": pairs}})
    return tmp_path


ALL = ("one", "two", "three", "four")


def test_all_file_formats_give_the_same_ids_and_every_text_comes_back(small):
    for name in ALL:
        tokenizer = load_tokenizer(small / name)
        assert tokenizer.encode("red") == [257] and tokenizer.encode("红色") == [262] and tokenizer.eos == 263
        for text in ("red 红色", "naïve 🐈\n", "", "<|endoftext|>"):
            ids = tokenizer.encode(text)
            assert ids == load_tokenizer(small / "one").encode(text) and tokenizer.decode(ids) == text
        assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")                        # NFC
        refused(tokenizer.encode, "\udcff", names=["is not UTF-8 at character 1"])


def test_saved_again_they_are_the_same_files(small):
    for name in ALL:
        load_tokenizer(small / name).save_pretrained(small / "copy" / name)
        assert {path.name: path.read_bytes() for path in (small / "copy" / name).iterdir()} == \
            {path.name: path.read_bytes() for path in (small / name).iterdir()}


def test_the_length_is_that_of_the_ids_that_the_files_list(small):
    """Embeddings that were resized to a tokenizer's length must be long enough for it."""
    assert [len(load_tokenizer(small / name)) for name in ALL] == [263 + 208, 263 + 3, 263 + 4, 263 + 4]


def test_control_tokens_are_never_read_and_half_a_character_decodes(small):
    for name in ALL:
        tokenizer = load_tokenizer(small / name)
        for text in ("<|endoftext|>", "<|im_start|>", "<img>"):
            assert max(tokenizer.encode(text)) < tokenizer.eos
        assert tokenizer.decode([*tokenizer.encode("红"), tokenizer.eos, 9999]) == "红"
        assert tokenizer.decode(tokenizer.encode("红色")[:1] + [228]) == "红色\ufffd"


def vocabulary(**change):
    def apply(folder):
        content = read_json(folder / "two" / "vocab.json") | change
        write_json(folder / "two" / "vocab.json", {key: value for key, value in content.items() if value != "gone"})
        return folder / "two"
    return apply


def fast(change):
    def apply(folder):
        content = read_json(folder / "three" / "tokenizer.json")
        change(content)
        write_json(folder / "three" / "tokenizer.json", content)
        return folder / "three"
    return apply


def write(name, content):
    def apply(folder):
        (folder / name).write_bytes(content)
        return (folder / name).parent
    return apply


BAD = {
    "not base64": (write("one/qwen.tiktoken", b"IQ== 0\nnot a line"), "qwen.tiktoken, line 2: expected a token in"),
    "not UTF-8": (write("one/qwen.tiktoken", b"IQ== 0\n\xff\xfe 1"), "qwen.tiktoken, line 2: expected a token in"),
    "empty ranks": (write("one/qwen.tiktoken", b""), "qwen.tiktoken: expected each of the 256 bytes"),
    "few ranks": (write("one/qwen.tiktoken", b"IQ== 0"), "qwen.tiktoken: expected each of the 256 bytes"),
    "rank twice": (write("one/qwen.tiktoken", b"IQ== 0\nIg== 0"), "qwen.tiktoken: expected ids that are whole numbers"),
    "empty vocabulary": (write("two/vocab.json", b"{}"), "vocab.json: expected a byte-level vocabulary"),
    "no object": (write("two/vocab.json", b"[]"), "vocab.json: expected a JSON object"),
    "null rank": (vocabulary(red=None), "vocab.json: expected a byte-level vocabulary"),
    "rank of text": (vocabulary(red="1"), "vocab.json: expected a byte-level vocabulary"),
    "rank true": (vocabulary(red=True), "vocab.json: expected"),
    "negative rank": (vocabulary(d=-1), "vocab.json: expected ids that are whole numbers"),
    "huge rank": (vocabulary(d=2 ** 40), "vocab.json: expected ids that are whole numbers"),
    "no byte": (vocabulary(d="gone"), "vocab.json: expected each of the 256 bytes"),
    "no byte-level letters": (vocabulary(中=300), "vocab.json: expected a byte-level vocabulary"),
    "merges without product": (write("two/merges.txt", b"x y\n"), "vocab.json: expected a byte-level vocabulary"),
    "merges in another order": (write("two/merges.txt", b"re d\nr e\n"), "vocab.json: expected merges in the order"),
    "merges in UTF-16": (write("two/merges.txt", "r e".encode("utf-16")), "merges.txt: not UTF-8 but UTF-16"),
    "no model": (fast(lambda content: content.pop("model")), "tokenizer.json: expected a byte-level vocabulary"),
    "unigram": (fast(lambda content: content.update(model={"type": "Unigram", "vocab": [["a", -1.0]]})),
                "tokenizer.json: expected a byte-level vocabulary"),
    "another pattern": (fast(lambda content: content.update(pre_tokenizer={"pattern": {"Regex": r"\w+"}})),
                        "tokenizer.json: pre_tokenizer splits text by another pattern than Qwen's"),
    "no end of text": (fast(lambda content: content.update(added_tokens=[])), "tokenizer.json: expected each of"),
    "added token without id": (fast(lambda content: content.update(added_tokens=[{"content": "<|endoftext|>"}])),
                               "tokenizer.json: expected a byte-level vocabulary"),
    "merges missing": (lambda folder: (folder / "two" / "merges.txt").unlink() or folder / "two",
                       "no tokenizer found, expected tokenizer.model, qwen.tiktoken, vocab.json with merges.txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tokenizer_files_are_refused_in_one_line(small, case):
    change, message = BAD[case]
    refused(load_tokenizer, change(small), names=[message, small])
