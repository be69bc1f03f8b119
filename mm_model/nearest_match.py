"""Error messages that suggest the nearest accepted name."""

from collections.abc import Sequence
from difflib import get_close_matches


def did_you_mean(value: str, accepted: Sequence[str]) -> str:
    """Return `; did you mean 'x'?` with the nearest accepted name, or an empty string."""
    near = [name for name in accepted if name.lower() == value.lower()]
    near = near or get_close_matches(value, accepted, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def require_one_of(value: str, accepted: Sequence[str], what: str) -> str:
    """Return `value` if it is accepted.

    Raises:
        ValueError: If it is not; the message contains the nearest match and all accepted values.
    """
    if value not in accepted:
        raise ValueError(
            f"unknown {what} {value!r}{did_you_mean(value, accepted)} (accepted: "
            f"{', '.join(accepted)})"
        )
    return value
