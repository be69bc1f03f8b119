"""Who may import whom, and how quickly help answers."""

import subprocess
import sys
from collections.abc import Sequence

import pytest

VERBS = ("prepare", "train", "tune", "evaluate", "predict", "inspect", "demo", "doctor", "plan",
         "submit")  # fmt: skip
HEAVY = ("tensorflow", "keras", "ray", "mlflow", "optuna")
MODULES = (
    "mm_model", "mm_model.spec", "mm_model.statistics", "ray_jobs.spec", "ray_jobs.cli",
    "ray_jobs.batch", "ray_jobs.manifest", "ray_jobs.order", "ray_jobs.metrics",
    "ray_jobs.tracking", "ray_jobs.resources", "ray_jobs.profile", "ray_jobs.tuning.spec",
    "ray_jobs.tuning.space", "ray_jobs.tuning.result", "ray_jobs.tuning.page",
    "ray_jobs.submission.spec", "ray_jobs.planning.spec", "ray_jobs.nodes", "ray_jobs.checks.here",
    "ray_jobs.checks.nodes", "ray_jobs.checks.reach", "ray_jobs.checks.fit",
)  # fmt: skip


def run(code: str) -> tuple[str, set[str]]:
    """Run some code; return what it prints, and what it loads that is heavy."""
    probe = f"{code}\nimport sys; print('|', *[m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    said, _, loaded = result.stdout.rpartition("|")
    return said, set(loaded.split())


def heavy_ones(modules: Sequence[str]) -> list[str]:
    """Return those of some modules that load something heavy; one process imports all of them."""
    code = f"""
import importlib, sys
for module in {list(modules)!r}:
    importlib.import_module(module)
    if any(name in sys.modules for name in {HEAVY!r}):
        print(module)
        break
"""
    return run(code)[0].split()


def test_light_modules_import_nothing_heavy():
    assert heavy_ones(MODULES) == []
    assert heavy_ones(["ray_jobs.cli", "optuna"]) == ["optuna"]


def test_importing_a_job_does_nothing_heavy():
    assert heavy_ones([f"ray_jobs.{verb}" for verb in VERBS]) == []


def test_the_model_imports_no_ray():
    modules = ("model", "fit", "calibrate", "losses", "mix", "stages")
    assert "ray" not in run("\n".join(f"import mm_model.{name}" for name in modules))[1]


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_every_flag_without_loading_anything_heavy(verb):
    as_main = f"runpy.run_module('ray_jobs.{verb}', run_name='__main__', alter_sys=True)"
    said, loaded = run(f"import sys, runpy; sys.argv = ['x', '--help']; {as_main}")
    assert loaded == set()
    assert said.startswith(f"usage: python -m ray_jobs.{verb}")
