"""Registry of fusions; each turns the features of all branches into joint features (B, F).

Entries have the same format as in `mm_model.branches`:
`my_fusion(branches, hide, spec, blocks) -> (B, F)`. `branches` are the features of two or more
branches by name; `hide` applies modality dropout to a list with one tensor (B, …) per branch.
"""

from collections.abc import Callable
from typing import Any

from mm_model.branches import Builder

Hide = Callable[[list[Any]], list[Any]]

FUSIONS: dict[str, Builder] = {
    "skip_concat": "mm_model.fusion.skip_concat:build",
    "gated": "mm_model.fusion.gated:build",
    "cross_attention": "mm_model.fusion.cross_attention:build",
}

TOKEN_FUSIONS = ("cross_attention",)
"""Fusions that use the tokens of the branches; precomputed features of images then contain them."""
