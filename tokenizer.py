"""The text tokenizer, and the vocabulary that text and pictures share (paper Sec. 3.3, Tokenization).

Shapes: V_t text vocabulary, V_v visual vocabulary (codes, special tokens, padding rows).
"""
import base64
import io
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

import sentencepiece

from checkpoint import write_beside

SPECIAL_TOKENS = ("<img>", "</img>", "<multi_images>", "</multi_images>", "<uncond>", "<pad>")


@dataclass(frozen=True)
class Vocabulary:
    """Sec. 3.3: text ids first, then the VQ-GAN's codes, then six special tokens, padded to a multiple of 8.

    For Qwen-7B and 8,192 codes: 151,936 + 8,192 + 6 + 2 of padding = 160,136, the paper's number.
    """
    text: int                     # V_t, size of the language model's vocabulary
    codes: int                    # size of the VQ-GAN's codebook; 0: no pictures, a language model alone

    @property
    def visual(self) -> int:
        """V_v: codes, special tokens and padding rows; 0 for a language model alone."""
        if not self.codes:
            return 0
        rows = self.codes + len(SPECIAL_TOKENS)
        return rows + -(self.text + rows) % 8

    @property
    def size(self) -> int:
        """V_t + V_v."""
        return self.text + self.visual

    def special(self, token: str) -> int:
        """Id of one of SPECIAL_TOKENS. Raises ValueError for another name."""
        return self.text + self.codes + SPECIAL_TOKENS.index(token)


class Tokenizer:
    """Not in the paper: a small bilingual sentencepiece model, which stands in for Qwen's tokenizer.

    Unigram pieces with byte fallback, so that every text has ids and comes back unchanged (in Unicode's NFC);
    a Chinese character is always a token of its own, or attributes would fuse with their neighbours.
    """
    FILE = "tokenizer.model"

    def __init__(self, model: bytes):
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
        """Text -> ids in [0, V_t)."""
        return self.pieces.encode(unicodedata.normalize("NFC", text))

    def decode(self, ids: list[int]) -> str:
        """Ids in [0, V_t) -> text; control tokens leave no trace."""
        return self.pieces.decode(list(ids))

    @classmethod
    def train(cls, texts: Iterable[str], size: int = 1024) -> "Tokenizer":
        """Learns at most `size` pieces from `texts`; the same texts give the same bytes."""
        texts = [unicodedata.normalize("NFC", text) for text in texts]
        chinese = sorted({c for text in texts for c in text if "\u4e00" <= c <= "\u9fff"})
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="unigram", vocab_size=size,
            hard_vocab_limit=False, byte_fallback=True, split_digits=True, user_defined_symbols=chinese,
            normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
            unk_id=0, eos_id=1, bos_id=-1, pad_id=-1, eos_piece="<|endoftext|>", num_threads=1,
            minloglevel=2)
        return cls(model.getvalue())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """Reads `tokenizer.model`. Raises ValueError, one line, where it is missing or broken."""
        path = Path(directory) / cls.FILE
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected a sentencepiece model")
        try:
            return cls(path.read_bytes())
        except RuntimeError:
            raise ValueError(f"{path}: not a sentencepiece model (truncated?)") from None

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `tokenizer.model`, beside and renamed."""
        write_beside(Path(directory) / self.FILE, lambda path: path.write_bytes(self.model))


class QwenTokenizer:
    """Sec. 3.3: Qwen's byte-level BPE, behind the same interface, read by the optional package `tiktoken`.

    Reads `qwen.tiktoken` (Qwen) or `vocab.json` with `merges.txt` (Qwen2, Qwen2.5): the same ids. Special tokens are
    recognised only with `special=True`: a prompt that contains "<|endoftext|>" is text.
    """
    FILE = "qwen.tiktoken"
    PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

    def __init__(self, ranks: dict[bytes, int], files: dict[str, bytes]):
        """ranks: token -> id; files: what they were read from, for `save_pretrained`."""
        self.files = files
        try:
            import tiktoken
        except ImportError:
            raise ValueError("Qwen's tokenizer needs the package tiktoken: pip install tiktoken") from None
        special = {token: max(ranks.values()) + 1 + i for i, token in enumerate(self.SPECIAL)}
        self.bpe = tiktoken.Encoding("qwen", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def __len__(self) -> int:
        """How many ids there are; V_t of the model may be larger, padded."""
        return self.bpe.n_vocab

    @property
    def eos(self) -> int:
        """Id of `<|endoftext|>`."""
        return self.bpe.encode_single_token("<|endoftext|>")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Text -> ids. special: read `<|endoftext|>` and its like as control tokens, not as text."""
        text = unicodedata.normalize("NFC", text)
        return self.bpe.encode(text, allowed_special="all") if special else self.bpe.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """Ids -> text; bytes that are no whole character yet become U+FFFD, special tokens leave no trace."""
        return self.bpe.decode([i for i in ids if i < self.eos], errors="replace")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "QwenTokenizer":
        """Reads a folder's ranks. Raises ValueError, one line, where they are missing or malformed."""
        directory = Path(directory)
        if (directory / cls.FILE).is_file():
            ranks, names = _read_ranks(directory / cls.FILE), [cls.FILE]
        else:
            ranks, names = _read_vocabulary(directory), ["vocab.json", "merges.txt"]
        return cls(ranks, {name: (directory / name).read_bytes() for name in names})

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the files that the ranks came from, beside and renamed."""
        for name, content in self.files.items():
            write_beside(Path(directory) / name, lambda path: path.write_bytes(content))


def _read_ranks(path: Path) -> dict[bytes, int]:
    """`qwen.tiktoken`: a line a token, its bytes in base64 and its rank."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}, line {number}: expected a token in base64 and its rank") from None
    return ranks


def _read_vocabulary(directory: Path) -> dict[bytes, int]:
    """`vocab.json` of the Qwen2 family, whose ids are ranks too: it writes each byte as a printable character."""
    path = directory / "vocab.json"
    for needed in (path, directory / "merges.txt"):
        if not needed.is_file():
            raise ValueError(f"{needed}: not found; expected {QwenTokenizer.FILE}, or vocab.json with merges.txt")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    try:
        ranks = json.loads(path.read_text(encoding="utf-8"))
        return {bytes(byte_of[letter] for letter in token): rank for token, rank in ranks.items()}
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path}: not a byte-level vocabulary, expected tokens and their ids") from None


def load_tokenizer(directory: str | Path) -> Tokenizer | QwenTokenizer:
    """The tokenizer that a weights folder holds. Raises ValueError, one line, where there is none."""
    qwen = any((Path(directory) / name).is_file() for name in (QwenTokenizer.FILE, "vocab.json"))
    return (QwenTokenizer if qwen else Tokenizer).from_pretrained(directory)
