"""Creates Optuna studies from trials, for Optuna's charts and importances."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

Direction = Literal["minimize", "maximize"]


def make_study(trials: "Sequence[FrozenTrial]", direction: Direction) -> "Study":
    """Return a study in memory, without the log line that Optuna prints for a new study."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction=direction)
    finally:
        optuna.logging.set_verbosity(verbosity)
    study.add_trials(trials)
    return study
