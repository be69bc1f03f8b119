"""Measures how close population-based training comes to a schedule that is known to be optimal.

Method: noisy steps on a quadratic, x ← x - rate × (x + noise). With variance P of x and S of the
noise, the optimal schedule is rate = P / (P + S), which falls like 1 / step (the gain of a Kalman
filter). The mean loss P is computed exactly, so only the search is random. Both sides run under Ray
Tune with the same population, steps, space and initial rates: `pbt` changes the rates with the
service's scheduler (`ray_jobs.tune.search.scheduler`), and `random` keeps them.

    random   the best constant rate of the population
    pbt      the best result of the population
    best     the optimal schedule

These values are logarithms of the final loss. `share` is the fraction of the gap between `random`
and `best` that `pbt` closes. Results are medians over the seeds.

Run:   python -m benchmarks.pbt [--seeds 3]
The last line of the output is JSON.
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
from ray_jobs.tune.search.scheduler import EPOCHS, make_scheduler

POPULATION, STEPS, NOISE, START = 8, 60, 1.0, 1.0
RATE = "train.learning_rate"
LOSS = "val/log_loss"


class Quadratic(tune.Trainable):
    """Computes the variance of x step by step."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start a trial."""
        self.rate, self.variance, self.steps = config[RATE], START, 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start a trial with another rate."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Take a step."""
        self.variance = next_variance(self.variance, self.rate)
        self.steps += 1
        loss = math.log(self.variance)
        return {LOSS: loss, f"best/{LOSS}": loss, EPOCHS: self.steps, "done": self.steps == STEPS}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the variance and the step."""
        Path(checkpoint_dir, "state.json").write_text(json.dumps([self.variance, self.steps]))

    def load_checkpoint(self, checkpoint: dict | str | None) -> None:
        """Read the variance and the step."""
        text = Path(str(checkpoint), "state.json").read_text()
        self.variance, self.steps = json.loads(text)


def next_variance(variance: float, rate: float) -> float:
    """Return the variance of x after a step."""
    return (1 - rate) ** 2 * variance + rate**2 * NOISE


def best_loss() -> float:
    """Return the logarithm of the final loss of the optimal schedule."""
    variance = START
    for _ in range(STEPS):
        variance = next_variance(variance, variance / (variance + NOISE))
    return math.log(variance)


def search(scheduler: str, seed: int, folder: str) -> float:
    """Return the logarithm of the best final loss of a population."""
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
        scheduler=make_scheduler(spec, STEPS, LOSS),
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

    best, rows = best_loss(), []
    # Enough CPUs for the whole population, so that no trial is paused for another.
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("ray_jobs.cluster.connection.available_cpus", return_value=3),
        connected("local", num_cpus=2),
    ):
        for seed in range(arguments.seeds):
            losses = {name: search(name, seed, folder) for name in ("fifo", "pbt")}
            constant, pbt = losses["fifo"], losses["pbt"]
            share = (constant - pbt) / (constant - best)
            rows.append({"random": constant, "pbt": pbt, "share": share})
            print(f"seed {seed}: random {constant:.3f}, pbt {pbt:.3f}, best {best:.3f}")
    shown = {name: round(median(row[name] for row in rows), 3) for name in rows[0]}
    print(json.dumps({**shown, "best": round(best, 3)}))


if __name__ == "__main__":
    main()
