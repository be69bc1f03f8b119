"""Does population-based training find a schedule that is known to be best, where chance does not?

Method: noisy steps on a quadratic, x ← x - rate × (x + noise), of which the best schedule is known:
with variance P of x and S of the noise, rate = P / (P + S), which falls like 1 / step (a Kalman
filter's gain). The mean loss P is followed exactly, so that nothing depends on luck but what the
search does. Both sides run under Ray Tune with the population, the steps and the space of each
other: `pbt` by the service's own scheduler (`ray_jobs.tune.search.scheduler`), from the same first
values as `random`, which keeps them.

    random   the best constant rate of the population
    pbt      the best end of the population
    best     the known schedule

All as the logarithm of the loss in the end; the share is how much of the way from random's end to
the best one PBT goes, the median over the seeds.

Run:   python -m benchmarks.pbt [--seeds 3]
Ends in one line of JSON.
"""

import argparse
import json
import math
import os
import random
import tempfile
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
from ray import tune

from ray_jobs.config.spec import RunSpec
from ray_jobs.tune.results.search_state import Objective
from ray_jobs.tune.search.scheduler import EPOCHS, make_scheduler

POPULATION, STEPS, NOISE, START = 8, 60, 1.0, 1.0
RATE = "train.learning_rate"
LOSS = "val/log_loss"


class Quadratic(tune.Trainable):
    """Follows the variance of x, one step after another."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin."""
        self.rate, self.variance, self.steps = config[RATE], START, 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin with another rate."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Take a step."""
        self.variance = after(self.variance, self.rate)
        self.steps += 1
        loss = math.log(self.variance)
        return {LOSS: loss, f"best/{LOSS}": loss, EPOCHS: self.steps, "done": self.steps == STEPS}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write x and the step."""
        Path(checkpoint_dir, "state.json").write_text(json.dumps([self.variance, self.steps]))

    def load_checkpoint(self, checkpoint: dict | str | None) -> None:
        """Go on from what was written."""
        text = Path(str(checkpoint), "state.json").read_text()
        self.variance, self.steps = json.loads(text)


def after(variance: float, rate: float) -> float:
    """Return the variance of x after a step."""
    return (1 - rate) ** 2 * variance + rate**2 * NOISE


def best_end() -> float:
    """Return the logarithm of the loss that the best schedule ends in."""
    variance = START
    for _ in range(STEPS):
        variance = after(variance, variance / (variance + NOISE))
    return math.log(variance)


def search(scheduler: str, seed: int, folder: str) -> float:
    """Return the best end of a population."""
    from ray.tune.search.basic_variant import BasicVariantGenerator

    spec = RunSpec.model_validate(
        {
            "model": {"image": {"kind": "tiny", "weights": None}},
            "train": {"epochs": STEPS},
            "tune": {
                "space": {RATE: {"loguniform": [1e-3, 1.0]}},
                "scheduler": scheduler,
                "perturbation_epochs": 4,
            },
        }
    )
    random.seed(seed)
    np.random.seed(seed)
    rates = np.exp(np.random.default_rng(seed).uniform(math.log(1e-3), 0, POPULATION))
    points = [{RATE: float(rate)} for rate in rates]
    analysis = tune.run(
        Quadratic,
        name=f"{scheduler}-{seed}",
        storage_path=folder,
        config=points[0],
        num_samples=POPULATION,
        search_alg=BasicVariantGenerator(points_to_evaluate=points),
        scheduler=make_scheduler(spec, STEPS, Objective(LOSS, "min")),
        resources_per_trial={"cpu": 0.25},
        reuse_actors=True,
        verbose=0,
    )
    return min(trial.last_result[LOSS] for trial in analysis.trials or ())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    from ray_jobs.cluster.connection import connected

    best, rows = best_end(), []
    # Room for the whole population, so that none is put aside for another.
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("os.cpu_count", return_value=1),
        connected("local", num_cpus=2),
    ):
        for seed in range(arguments.seeds):
            ends = {name: search(name, seed, folder) for name in ("fifo", "pbt")}
            share = (ends["fifo"] - ends["pbt"]) / (ends["fifo"] - best)
            rows.append({"random": ends["fifo"], "pbt": ends["pbt"], "share": share})
            print(f"seed {seed}: random {ends['fifo']:.3f}, pbt {ends['pbt']:.3f}, best {best:.3f}")
    shown = {name: round(median(row[name] for row in rows), 3) for name in rows[0]}
    print(json.dumps({**shown, "best": round(best, 3)}))


if __name__ == "__main__":
    main()
