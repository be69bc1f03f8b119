"""Who may import whom, and how quickly help answers."""

import subprocess
import sys

import pytest

VERBS = ("prepare", "train", "tune", "evaluate", "predict", "inspect", "demo", "doctor", "submit")
HEAVY = ("tensorflow", "keras", "ray", "mlflow", "optuna")


def loaded_by(code: str) -> set[str]:
    probe = f"{code}\nimport sys; print('|', *[m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    return set(result.stdout.rpartition("|")[2].split())


@pytest.mark.parametrize(
    "module",
    ["mm_model", "mm_model.spec", "mm_model.statistics", "ray_jobs.spec", "ray_jobs.cli",
     "ray_jobs.batch", "ray_jobs.manifest", "ray_jobs.order", "ray_jobs.metrics",
     "ray_jobs.tracking", "ray_jobs.resources", "ray_jobs.profile", "ray_jobs.tuning.spec",
     "ray_jobs.tuning.space", "ray_jobs.tuning.result", "ray_jobs.tuning.page",
     "ray_jobs.submission.spec", "ray_jobs.nodes", "ray_jobs.checks.here",
     "ray_jobs.checks.nodes", "ray_jobs.checks.reach", "ray_jobs.checks.fit"],
)  # fmt: skip
def test_light_modules_import_nothing_heavy(module):
    assert loaded_by(f"import {module}") == set()


def test_the_model_imports_no_ray():
    modules = ("model", "fit", "calibrate", "losses", "mix", "stages")
    assert "ray" not in loaded_by("\n".join(f"import mm_model.{name}" for name in modules))


@pytest.mark.parametrize("verb", VERBS)
def test_importing_a_job_does_nothing_heavy(verb):
    assert loaded_by(f"import ray_jobs.{verb}") == set()


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_every_flag_without_loading_anything_heavy(verb):
    run = f"runpy.run_module('ray_jobs.{verb}', run_name='__main__')"
    assert loaded_by(f"import sys, runpy; sys.argv = ['x', '--help']; {run}") == set()
    result = subprocess.run(
        [sys.executable, "-m", f"ray_jobs.{verb}", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: python -m ray_jobs.{verb}")
