"""Registry of fusions; each turns the features of both branches into joint features (B, F).

Entries have the same format as in `mm_model.branches`.
"""

from mm_model.branches import Builder

FUSIONS: dict[str, Builder] = {
    "skip_concat": "mm_model.fusion.skip_concat:build",
    "gated": "mm_model.fusion.gated:build",
}
