"""The text tokenizers, and the joint vocabulary of text and images (paper Sec. 3.3, Tokenization).

Shapes: V_t text vocabulary, V_v visual vocabulary (image tokens, special tokens, padding rows).
"""
import base64
import contextlib
import io
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

import sentencepiece

from files import atomic_write, check_regular, first_line, read_json, read_text

SPECIAL_TOKENS = ("<img>", "</img>", "<multi_images>", "</multi_images>", "<uncond>", "<pad>")


@dataclass(frozen=True)
class Vocabulary:
    """Sec. 3.3: text ids first, then the VQ-GAN's image tokens, then six special tokens, padded to a multiple of 8.

    For Qwen-7B and 8,192 entries: 151,936 + 8,192 + 6 + 2 of padding = 160,136, the paper's number.
    """
    text: int                     # V_t, size of the language model's vocabulary
    image: int                    # entries of the VQ-GAN's codebook; 0: no images, a language model alone

    @property
    def visual(self) -> int:
        """V_v: image tokens, special tokens and padding rows; 0 for a language model alone."""
        rows = self.image + len(SPECIAL_TOKENS)
        return rows + -(self.text + rows) % 8 if self.image else 0

    @property
    def size(self) -> int:
        """V_t + V_v."""
        return self.text + self.visual

    def special(self, token: str) -> int:
        """Id of one of SPECIAL_TOKENS."""
        return self.text + self.image + SPECIAL_TOKENS.index(token)


def normalize(text: str) -> str:
    """Not in the paper: text in Unicode's NFC, as Qwen reads it. Raises ValueError, one line, for bytes that were not
    UTF-8, which Python keeps as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text {ascii(text[:60])} is not UTF-8 at character {error.start + 1}, "
                         "expected whole Unicode characters") from None
    return unicodedata.normalize("NFC", text)


class TextTokenizer:
    """Not in the paper: a small sentencepiece model for language models of one's own, in place of Qwen's tokenizer.

    Pieces with byte fallback: every text has ids, and comes back in NFC and in lower case, as three spellings of a word
    are much for a small model. A Chinese character is always a token of its own, or words would fuse with neighbours.
    """
    FILE = "tokenizer.model"

    def __init__(self, model: bytes):
        """model: the content of a tokenizer.model."""
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)

    def __len__(self) -> int:
        """V_t."""
        return self.pieces.vocab_size()

    @property
    def eos(self) -> int:
        """Id of the token that ends a text. No prompt can contain it: text is never read as a control token."""
        return self.pieces.eos_id()

    def encode(self, text: str) -> list[int]:
        """Text -> ids in [0, V_t). Raises ValueError for lone surrogates."""
        return self.pieces.encode(normalize(text).lower())

    def decode(self, ids: list[int]) -> str:
        """Ids in [0, V_t) -> text; control tokens leave no trace."""
        return self.pieces.decode(list(ids))

    @classmethod
    def train(cls, texts: Iterable[str], size: int = 1024) -> "TextTokenizer":
        """Byte-pair encoding, as Qwen's: learns at most `size` pieces, or as many as the characters of `texts` need;
        the same texts give the same bytes. Raises ValueError, one line, where there is nothing to learn from."""
        texts = [normalize(text).lower() for text in texts]
        characters = set().union(*texts)
        chinese = sorted(c for c in characters if unicodedata.name(c, "").startswith("CJK UNIFIED IDEOGRAPH"))
        size = max(size, 256 + 3 + len(characters))            # bytes; unknown, end of text, space; characters
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=size,
                hard_vocab_limit=False, byte_fallback=True, split_digits=True, user_defined_symbols=chinese,
                normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
                unk_id=0, eos_id=1, bos_id=-1, pad_id=-1, eos_piece="<|endoftext|>", num_threads=1,
                max_sentence_length=2 ** 20, minloglevel=2)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"no text tokenizer can be learned from {len(texts)} texts of {len(characters)} different "
                             f"characters ({first_line(error)})") from None
        return cls(model.getvalue())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "TextTokenizer":
        """Reads `tokenizer.model`. Raises ValueError, one line, where it is missing or broken."""
        path = check_regular(Path(directory) / cls.FILE, "a sentencepiece model")
        content = path.read_bytes()
        with contextlib.suppress(RuntimeError):
            if content and cls(content).eos >= 0:
                return cls(content)
        raise ValueError(f"{path}: not a whole sentencepiece model with a token that ends a text")

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `tokenizer.model`."""
        atomic_write(Path(directory) / self.FILE, lambda path: path.write_bytes(self.model))


class QwenTokenizer:
    """Sec. 3.3: Qwen's byte-level BPE, behind the same interface, read by the optional package `tiktoken`.

    Reads `qwen.tiktoken` (Qwen), `vocab.json` with `merges.txt`, or `tokenizer.json` (Qwen2 and Qwen3): the same ids.
    A prompt that contains "<|endoftext|>" is text.
    """
    PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
    FILES = (["qwen.tiktoken"], ["vocab.json", "merges.txt"], ["tokenizer.json"])

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int], files: dict[str, bytes]):
        """ranks: token -> id, in the order of the merges; special: control token -> id; files: what they were read
        from, for `save_pretrained`."""
        try:
            import tiktoken
        except ImportError:
            raise ValueError("Qwen's tokenizer needs the package tiktoken: pip install tiktoken") from None
        self.files, self.text_ids, self.eos = files, frozenset(ranks.values()), special["<|endoftext|>"]
        self.bpe = tiktoken.Encoding("qwen", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def __len__(self) -> int:
        """How many ids there are; V_t of the model may be larger, padded."""
        return self.bpe.n_vocab

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Raises ValueError for lone surrogates."""
        return self.bpe.encode_ordinary(normalize(text))

    def decode(self, ids: list[int]) -> str:
        """Ids -> text; bytes that are no whole character yet become U+FFFD, all other ids leave no trace."""
        return self.bpe.decode([i for i in ids if i in self.text_ids], errors="replace")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "QwenTokenizer":
        """Reads a folder's ranks. Raises ValueError, one line, where they are missing or malformed."""
        directory = Path(directory)
        names = next((names for names in cls.FILES if all((directory / name).is_file() for name in names)), None)
        if not names:
            raise ValueError(f"{directory}: no tokenizer found, expected tokenizer.model, qwen.tiktoken, vocab.json "
                             "with merges.txt, or tokenizer.json")
        path = directory / names[0]
        ranks, special = (_read_ranks if path.suffix == ".tiktoken" else _read_vocabulary)(path)
        ids = [*ranks.values(), *special.values()]
        if not all(type(i) is int and 0 <= i < 2 ** 24 for i in ids) or len(set(ids)) < len(ids):
            raise ValueError(f"{path}: expected ids that are whole numbers, each once")
        if not {bytes([i]) for i in range(256)} <= ranks.keys() or cls.SPECIAL[0] not in special:
            raise ValueError(f"{path}: expected each of the 256 bytes among the tokens, and {cls.SPECIAL[0]}")
        return cls(ranks, special, {name: (directory / name).read_bytes() for name in names})

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the files that the ranks came from."""
        for name, content in self.files.items():
            atomic_write(Path(directory) / name, lambda path: path.write_bytes(content))


def _read_ranks(path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """`qwen.tiktoken`: a line a token, its bytes in base64 and its rank -> ranks, control tokens."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}, line {number}: expected a token in base64 and its rank") from None
    first = max(ranks.values(), default=-1) + 1
    return ranks, {token: i for i, token in enumerate(QwenTokenizer.SPECIAL, first)}


def _read_vocabulary(path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """`vocab.json` with `merges.txt`, or `tokenizer.json` -> ranks, control tokens.

    They write each byte as a printable character. Ids are ranks where merges are in the order of what they make.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    content, pattern = read_json(path), json.dumps(QwenTokenizer.PATTERN)
    try:
        if path.name == "tokenizer.json":
            splits = json.dumps(content.get("pre_tokenizer"))
            if "Regex" in splits and pattern not in splits:
                raise ValueError(f"{path}: pre_tokenizer splits text by another pattern than Qwen's, {pattern}")
            ids, merges = content["model"]["vocab"], content["model"]["merges"]        # "a b" or ["a", "b"]
            special = {token["content"]: token["id"] for token in content["added_tokens"]}
        else:
            ids, first = content, max(content.values(), default=-1) + 1
            special = {token: i for i, token in enumerate(QwenTokenizer.SPECIAL[:3], first)}
            merges = [merge for merge in read_text(path.with_name("merges.txt")).split("\n")
                      if merge and not merge.startswith("#version")]
        made = [ids["".join(merge).replace(" ", "")] for merge in merges]
        if made != sorted(made):
            raise ValueError(f"{path}: expected merges in the order of the ids of what they make, as in Qwen's")
        return {bytes(byte_of[c] for c in token): i for token, i in ids.items() if token not in special}, special
    except (KeyError, AttributeError, TypeError):
        raise ValueError(f"{path}: expected a byte-level vocabulary: tokens, their ids and merges") from None


def load_tokenizer(directory: str | Path) -> TextTokenizer | QwenTokenizer:
    """Not in the paper: the tokenizer that a weights folder holds. Raises ValueError, one line, where there is none."""
    is_own = (Path(directory) / TextTokenizer.FILE).exists()
    return (TextTokenizer if is_own else QwenTokenizer).from_pretrained(directory)
