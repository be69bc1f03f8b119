"""Generates the models of requests and answers from the manifest of a run.

FastAPI validates requests with them and describes them in /docs and /openapi.json.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from ray_jobs.predict.trained_run import TrainedRun

MAX_ROWS = 1024
"""Maximum number of rows in a request."""

_Number = float | int | bool | str | None
_Word = str | int | float | bool | None
_Image = str | None


class Prediction(BaseModel):
    """The answer for one row."""

    key: str = Field(description="Key of the row; by default, its position in the request.")
    label: str | None = Field(description="Predicted class; null if the row has an error.")
    probability: float | None = Field(description="Calibrated probability of the positive class.")
    error: str | None = Field(description="Why the row cannot be used.")


class Answer(BaseModel):
    """The answers for all rows of a request, in order."""

    predictions: list[Prediction]
    positive_label: str = Field(description="Class that the probabilities refer to.")
    threshold: float = Field(description="Lowest probability of a predicted positive.")
    model: str = Field(description="Name of the run.")
    version: str = Field(description="Start of the SHA-256 hash of the model file.")


class Maps(BaseModel):
    """What the model looks at in the images of a row."""

    maps: dict[str, str] = Field(
        description="A JPEG of each image under its map, as a data URI. Maps are from Grad-CAM for "
        "backbones with convolutions, and from integrated gradients for transformers."
    )


def request_model(run: TrainedRun) -> type[BaseModel]:
    """Return the model of a request: `rows`, each with the columns that the run's model takes.

    Numbers, words and texts are required, but may be null. Images are base64 or data URIs; they may
    be missing only if rows without an image were trained.
    """
    manifest = run.decoder.manifest
    columns: list[tuple[str, Any, Any, str]] = [
        *((name, _Number, ..., "A number.") for name in manifest.numeric_columns),
        *((v.column, _Word, ..., _known_words(v.words)) for v in manifest.vocabularies),
        *((name, str | None, ..., "Free text.") for name in manifest.text_columns),
    ]
    if run.takes_images:
        text = "An image file in base64, or as a data URI."
        required = not manifest.image.has_nulls
        columns += [
            (name, str, ..., text) if required else (name, _Image, None, text)
            for name in image_fields(run)
        ]
    taken = {name for name, *_ in columns}
    if manifest.prepare.key_column not in taken:
        text = "Name of the row in the answer."
        columns.append((manifest.prepare.key_column, _Word, None, text))
    # Columns can have names that are not Python identifiers, so these are aliases.
    fields: dict[str, Any] = {
        f"column_{i}": (Annotated[kind, Field(alias=name, description=text)], default)
        for i, (name, kind, default, text) in enumerate(columns)
    }
    row = create_model("Row", __config__=ConfigDict(extra="forbid"), **fields)
    rows: Any = (
        Annotated[list[row], Field(min_length=1, max_length=MAX_ROWS)],  # type: ignore[valid-type]
        ...,
    )
    return create_model("Request", __config__=ConfigDict(extra="forbid"), rows=rows)


def input_names(run: TrainedRun) -> tuple[str, ...]:
    """Return the names of all columns and images of a request."""
    manifest = run.decoder.manifest
    words = (vocabulary.column for vocabulary in manifest.vocabularies)
    columns = (*manifest.numeric_columns, *words, *manifest.text_columns, *image_fields(run))
    return (*columns, manifest.prepare.key_column)


def image_fields(run: TrainedRun) -> tuple[str, ...]:
    """Return the names of a row's images in requests, in order."""
    if not run.takes_images:
        return ()
    return run.manifest.image.names or ("image",)


def _known_words(words: tuple[str, ...]) -> str:
    shown = ", ".join(words[:20])
    return f"A word, such as {shown}." if words else "A word."
