"""Makes the reader of a run's texts, which turns them into token ids."""

from functools import lru_cache

from mm_model.backbones import HUB_TEXTS
from mm_model.backbones.tokenizer import (
    HashedNgrams,
    TextReader,
    Tokenizer,
    wordpiece_tokenizer,
)
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest
from ray_jobs.storage.folder import Folder

TOKENIZER = "tokenizer.json"
"""File of a run folder with the reader of the texts, if the model takes texts."""


def text_reader(spec: RunSpec, manifest: Manifest) -> TextReader | None:
    """Return the reader of the texts that a run's model uses, or None if it uses none.

    With pretrained weights, it comes from the run folder once the run has begun, so that the run
    does not depend on files that may change or disappear.

    Raises:
        ValueError: If the tokenizer needs a package that is not installed.
        OSError: If the tokenizer of pretrained weights cannot be read.
    """
    text = spec.model.text
    if text.kind == "none" or not manifest.text_columns:
        return None
    run = Folder(spec.run.storage_path) / str(spec.run.name)
    if text.weights is not None and run.exists(TOKENIZER):
        return TextReader.from_json(run.read_bytes(TOKENIZER).decode())
    tokenizer = _make_tokenizer(text.kind, text.weights, manifest.text_words)
    return TextReader(manifest.text_columns, tokenizer, spec.data.text_length)


@lru_cache(maxsize=4)
def _make_tokenizer(kind: str, weights: str | None, words: tuple[str, ...]) -> Tokenizer:
    if kind not in HUB_TEXTS:
        return HashedNgrams()
    if weights is None:
        return wordpiece_tokenizer(words)
    from mm_model.backbones.hub import hub_tokenizer

    return hub_tokenizer(weights)
