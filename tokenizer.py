"""The text tokenizer, and the vocabulary that text and pictures share (paper Sec. 3.3, Tokenization).

Shapes: V_t text vocabulary, V_v visual vocabulary (codes, special tokens, padding rows).
"""
import io
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

import sentencepiece

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
        path = Path(directory) / self.FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_bytes(self.model)
        os.replace(path.with_suffix(".tmp"), path)
