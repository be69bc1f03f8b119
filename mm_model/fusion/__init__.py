"""The fusions by name: each turns the branches' features into one joint `(B, F)`.

As in `mm_model.branches`, an entry is a builder or where to import it from.
"""

from mm_model.branches import Builder

FUSIONS: dict[str, Builder] = {
    "skip_concat": "mm_model.fusion.skip_concat:build",
    "gated": "mm_model.fusion.gated:build",
}
