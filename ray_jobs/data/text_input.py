"""Makes the reader of a run's texts, which turns them into token ids."""

from mm_model.backbones import HUB_TEXTS
from mm_model.backbones.tokenizer import (
    HashedNgrams,
    TextReader,
    Tokenizer,
    wordpiece_tokenizer,
)
from mm_model.spec import TextSpec
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest


def text_reader(spec: RunSpec, manifest: Manifest) -> TextReader | None:
    """Return the reader of the texts that a run's model uses, or None if it uses none.

    Raises:
        ValueError: If the tokenizer needs a package that is not installed.
        OSError: If the tokenizer of pretrained weights cannot be read.
    """
    if spec.model.text.kind == "none" or not manifest.text_columns:
        return None
    tokenizer = _make_tokenizer(spec.model.text, manifest)
    return TextReader(manifest.text_columns, tokenizer, spec.data.text_length)


def _make_tokenizer(spec: TextSpec, manifest: Manifest) -> Tokenizer:
    if spec.kind not in HUB_TEXTS:
        return HashedNgrams()
    if spec.weights is None:
        return wordpiece_tokenizer(manifest.text_words)
    from mm_model.backbones.hub import hub_tokenizer

    return hub_tokenizer(spec.weights)
