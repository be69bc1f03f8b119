"""Turns texts into token ids, in the same way in training, `predict` and serving.

Imports neither Keras nor TensorFlow.

Shapes: B rows, C text columns, L tokens per text.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")
_NUM_BUCKETS = 1 << 14
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class HashedNgrams:
    """Hashes each word and each pair of consecutive words; needs no vocabulary.

    Id 0 is padding. Different n-grams may have the same id.
    """

    num_tokens: int = _NUM_BUCKETS + 1
    """Number of ids."""

    def encode(self, text: str, length: int) -> tuple[list[int], bool]:
        """Return at most `length` ids, and whether the text has more."""
        words = _words(text)
        # Pairs follow their first word, so cutting removes the end of the text.
        pairs = [f"{first} {second}" for first, second in pairwise(words)]
        ngrams = [ngram for both in zip(words, pairs, strict=False) for ngram in both]
        ngrams += words[-1:]
        ids = [1 + zlib.crc32(ngram.encode()) % (self.num_tokens - 1) for ngram in ngrams[:length]]
        return ids, len(ngrams) > length

    def to_tree(self) -> dict[str, Any]:
        """Return what `TextReader.from_json` restores it from."""
        return {"hashed": self.num_tokens}


@dataclass(frozen=True)
class Subwords:
    """A tokenizer of Hugging Face's library `tokenizers`, which needs the extra `hub`.

    It is written in Rust, runs without TensorFlow, and reads the files of every family of text
    backbones; KerasHub's own tokenizers need tensorflow-text inside `tf.data`.
    """

    content: str
    """Its JSON file."""

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizers: Any = import_tokenizers()
        tokenizer = tokenizers.Tokenizer.from_str(self.content)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @property
    def num_tokens(self) -> int:
        """Number of ids."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, length: int) -> tuple[list[int], bool]:
        """Return at most `length` ids, and whether the text has more.

        Special tokens, such as the one that ends each text, are kept.
        """
        encoding = self._tokenizer.encode(text)
        is_cut = len(encoding.ids) > length
        if is_cut:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            encoding.truncate(max(length - self._tokenizer.num_special_tokens_to_add(False), 0))
            encoding = self._tokenizer.post_process(encoding)
        return encoding.ids[:length], is_cut

    def to_tree(self) -> dict[str, Any]:
        """Return what `TextReader.from_json` restores it from."""
        return json.loads(self.content)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the file alone."""
        return {"content": self.content}


Tokenizer = HashedNgrams | Subwords


def import_tokenizers() -> Any:
    """Return the module `tokenizers`.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "this kind of text branch needs the extra `hub`; install it with "
            '`pip install "multimodal-ray[hub]"`, or set model.text.kind to hashed'
        ) from error
    return tokenizers


def fit_words(
    texts: Iterable[str | None], *, min_count: int = 2, max_words: int = 8000
) -> tuple[str, ...]:
    """Return the frequent words and all characters of some texts, as subwords of BERT's kind.

    Words that are not frequent consist of the subwords of their characters, of which those inside
    a word start with `##`.
    """
    counts = Counter(word for text in texts if text for word in _words(text))
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:max_words]
    characters = sorted({character for word in counts for character in word})
    words = (word for word, count in frequent if count >= min_count)
    return tuple(dict.fromkeys((*characters, *(f"##{c}" for c in characters), *words)))


def wordpiece_tokenizer(words: Sequence[str]) -> Subwords:
    """Return a tokenizer of BERT's kind that uses the words of `fit_words`."""
    return _wordpiece((*_SPECIAL, *words), lowercase=True, strip_accents=False)


def read_tokenizer(folder: Path) -> Subwords:
    """Return the tokenizer in a folder with the weights of a text backbone.

    Reads KerasHub's layout and that of Hugging Face.

    Raises:
        OSError: If the folder has no tokenizer that is supported.
    """
    settings: dict[str, Any] = {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            content = (folder / name).read_text()
            tree = json.loads(content)
            if "model" in tree:
                return Subwords(content)
            settings |= tree.get("config", tree)
    for files in (folder / "assets" / "tokenizer", folder):
        for name in ("vocabulary.txt", "vocab.txt"):
            if (files / name).exists():
                # Not `splitlines`, which also splits at characters that can be words.
                words = (files / name).read_text(encoding="utf-8").rstrip("\n").split("\n")
                lowercase = settings.get("lowercase", settings.get("do_lower_case", True))
                strip_accents = settings.get("strip_accents")
                return _wordpiece(
                    words, lowercase, lowercase if strip_accents is None else strip_accents
                )
        for name in ("vocabulary.json", "vocab.json"):
            if (files / name).exists() and (files / "merges.txt").exists():
                return _byte_pairs(str(files / name), str(files / "merges.txt"))
    raise OSError(f"{folder} has no tokenizer.json, vocabulary or merges of a tokenizer")


def _wordpiece(words: Sequence[str], lowercase: bool, strip_accents: bool) -> Subwords:
    tokenizers: Any = import_tokenizers()
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    ends = [(word, vocabulary[word]) for word in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = tokenizers.processors.BertProcessing(*ends)
    return Subwords(tokenizer.to_str())


def _byte_pairs(vocabulary: str, merges: str) -> Subwords:
    """Return RoBERTa's tokenizer."""
    tokenizers: Any = import_tokenizers()
    model = tokenizers.models.BPE.from_file(vocabulary, merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends = [(word, tokenizer.token_to_id(word)) for word in ("</s>", "<s>")]
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(
        *ends, add_prefix_space=False
    )
    return Subwords(tokenizer.to_str())


@dataclass(frozen=True)
class TextReader:
    """Turns the texts of rows into the inputs `text` and `text_mask` of a model."""

    columns: tuple[str, ...]
    """Names of the text columns."""
    tokenizer: Tokenizer
    length: int
    """Maximum number of tokens per text."""

    @property
    def shape(self) -> tuple[int, int]:
        """Text columns and tokens per text."""
        return len(self.columns), self.length

    def to_json(self) -> str:
        """Return the content of the tokenizer.json of a run."""
        tree = {"columns": self.columns, "length": self.length}
        return json.dumps({**tree, "tokenizer": self.tokenizer.to_tree()})

    @classmethod
    def from_json(cls, content: str) -> "TextReader":
        """Return the reader that `to_json` described.

        Raises:
            ValueError: If the content is damaged, or `tokenizers` is needed and not installed.
        """
        try:
            tree = json.loads(content)
            columns, length, own = tuple(tree["columns"]), int(tree["length"]), tree["tokenizer"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{error} is missing") from error
        is_hashed = "hashed" in own
        tokenizer = HashedNgrams(own["hashed"]) if is_hashed else Subwords(json.dumps(own))
        return cls(columns, tokenizer, length)

    def __call__(
        self, texts: Sequence[Sequence[str | float | None]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids and masks (B, C, L), and how many texts of each row are cut (B, 1).

        Args:
            texts: For each column, the texts of the rows; None and NaN mean missing.
        """
        num_rows = len(texts[0])
        ids_BCL = np.zeros((num_rows, *self.shape), np.int32)
        mask_BCL = np.zeros(ids_BCL.shape, np.float32)
        cut_B1 = np.zeros((num_rows, 1), np.float32)
        for column, of_column in enumerate(texts):
            for row, text in enumerate(of_column):
                if isinstance(text, str):
                    ids, is_cut = self.tokenizer.encode(text, self.length)
                    ids_BCL[row, column, : len(ids)] = ids
                    mask_BCL[row, column, : len(ids)] = 1
                    cut_B1[row] += is_cut
        return ids_BCL, mask_BCL, cut_B1


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
