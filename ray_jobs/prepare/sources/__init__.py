"""Where rows come from: one module a kind, each turning a `PrepareSpec` into a `Source`."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ray_jobs.config.spec import PrepareSpec

if TYPE_CHECKING:
    from ray_jobs.prepare.sources.refs import Source

SOURCES = {
    "folder": "ray_jobs.prepare.sources.loose_files:open_source",
    "parquet": "ray_jobs.prepare.sources.parquet_files:open_source",
    "webdataset": "ray_jobs.prepare.sources.webdataset:open_source",
    "tfrecord": "ray_jobs.prepare.sources.tfrecord:open_source",
    "imagefolder": "ray_jobs.prepare.sources.huggingface_imagefolder:open_source",
}


def open_source(
    spec: PrepareSpec, categorical: Sequence[str] = (), labelled: bool = True
) -> "Source":
    """Return the records and images that a specification names.

    Args:
        spec: what is where.
        categorical: columns of words.
        labelled: whether there must be a label.

    Raises:
        JobError: if the source as a whole cannot be used, or a column is missing.
    """
    from ray_jobs.prepare.table import require_columns

    kind = spec.source
    if kind == "auto":
        kind = _resolve("ray_jobs.prepare.sources.detect:detect_kind")(spec)
    source = _resolve(SOURCES[kind])(spec, categorical, labelled)
    require_columns(source.table, spec, categorical, labelled=labelled)
    return source


def _resolve(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)
