"""Reads the table, finds the images, and makes the writer of the shards."""

from collections.abc import Sequence
from dataclasses import dataclass

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Column, Manifest
from ray_jobs.prepare.columns import find_columns
from ray_jobs.prepare.labels import Classes, find_classes
from ray_jobs.prepare.pixel_range import find_pixel_range
from ray_jobs.prepare.row_validation import CheckedRows, read_rows
from ray_jobs.prepare.shards.shard_plan import Earlier, read_earlier
from ray_jobs.prepare.shards.shard_writer import ShardWriter
from ray_jobs.prepare.sources import open_source
from ray_jobs.prepare.sources.source import ImageReader
from ray_jobs.storage.folder import Folder


@dataclass(frozen=True)
class Inputs:
    """What `prepare` has understood from the table and the names of the images."""

    spec: RunSpec
    """The settings, with those that were found."""
    rows: CheckedRows
    classes: Classes
    columns: tuple[Column, ...]
    numeric_columns: tuple[str, ...]
    text_columns: tuple[str, ...]
    readers: tuple[ImageReader, ...]
    """One reader per image name."""
    notes: tuple[str, ...]
    earlier: Earlier | None
    """The result of an earlier prepare in the same folder."""


def read_inputs(spec: RunSpec) -> Inputs:
    """Read the table, find the images, and decide what the columns and rows are.

    Raises:
        JobError: If the table or the images do not match the spec.
    """
    earlier = read_earlier(Folder(spec.prepare.output))
    if earlier:
        options = _keep_rules(spec.prepare, earlier.manifest)
        spec = spec.model_copy(update={"prepare": options})
    data = spec.data
    source = open_source(spec.prepare, data.categorical, data.text)
    options = spec.prepare.model_copy(update=dict(source.settings))
    label = source.table.column(options.label_column)
    classes = find_classes(label, options)
    labels = classes.codes_of(label)
    columns = find_columns(source.table, options, data.categorical, labels, data.text)
    numbers, words, found_texts = (
        tuple(column.name for column in columns if column.role == role)
        for role in ("number", "category", "text")
    )
    numeric_columns = numbers if options.numeric_columns is None else options.numeric_columns
    categorical = tuple(dict.fromkeys((*data.categorical, *words)))
    texts = tuple(dict.fromkeys((*data.text, *found_texts)))
    if options.missing_image == "keep" and not (numeric_columns or categorical or texts):
        raise JobError(
            "prepare.missing_image=keep predicts rows without an image from other columns, but "
            "there are none; name some in prepare.numeric_columns, data.categorical or data.text, "
            "or set prepare.missing_image=quarantine"
        )
    options = options.model_copy(update=_stored_rules(columns, options))
    has_images = any(refs.has_image.any() for refs in source.images.values())
    if options.missing_image == "keep" and not has_images:
        raise no_images(options)
    return Inputs(
        spec=spec.model_copy(update={"prepare": options}),
        rows=read_rows(source, options, numeric_columns, classes, (*categorical, *texts)),
        classes=classes,
        columns=columns,
        numeric_columns=numeric_columns,
        text_columns=texts,
        readers=tuple(source.readers[name] for name in options.image_columns or ("",)),
        notes=(*source.notes, classes.note),
        earlier=earlier,
    )


def make_writer(inputs: Inputs) -> tuple[ShardWriter, tuple[str, ...]]:
    """Return the writer of the shards, and all notes for the summary."""
    options, rows = inputs.spec.prepare, inputs.rows
    pixel_range, note = find_pixel_range(rows, inputs.readers, options, inputs.earlier)
    writer = ShardWriter(
        readers=inputs.readers,
        output=Folder(options.output),
        numeric_columns=inputs.numeric_columns,
        categorical=tuple(rows.categories),
        spec=options,
        pixel_range=pixel_range,
        seed=inputs.spec.run.seed,
    )
    return writer, (*inputs.notes, *([note] if note else ()))


def no_images(options: PrepareSpec) -> JobError:
    """Return the error for data in which no row has an image."""
    return JobError(
        f"no row has an image in prepare.images={options.images!r}; correct it, "
        "prepare.image_pattern or prepare.image_column (prepare.missing_image=keep keeps rows "
        "without one)"
    )


def _keep_rules(options: PrepareSpec, earlier: Manifest) -> PrepareSpec:
    """Return the options with the rules that the rows of an earlier prepare were read by."""
    known = earlier.prepare
    number_rules = dict(options.number_rules)
    for name, rule in options.number_rules.items():
        if (earlier_rule := known.number_rules.get(name, "")).startswith(f"{rule}:"):
            number_rules[name] = earlier_rule
    text_rules = known.text_rules | options.text_rules
    return options.model_copy(update={"number_rules": number_rules, "text_rules": text_rules})


def _stored_rules(columns: Sequence[Column], options: PrepareSpec) -> dict[str, dict[str, str]]:
    """Return the rules that later runs and `predict` read the columns by."""
    used = [column for column in columns if column.rule and column.role != "left_out"]
    numbers = {column.name: column.rule for column in used if column.role == "number"}
    texts = {column.name: column.rule for column in used if column.role != "number"}
    return {"number_rules": options.number_rules | numbers, "text_rules": texts}
