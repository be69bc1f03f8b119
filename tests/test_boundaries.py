"""Who may import whom, and how quickly help answers."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ray_jobs.__main__ import VERBS

HEAVY = ("tensorflow", "keras", "ray", "mlflow", "optuna")
MODULES = (
    "mm_model",
    "mm_model.spec",
    "mm_model.statistics",
    "ray_jobs.config.spec",
    "ray_jobs.config.command_line",
    "ray_jobs.data.batch",
    "ray_jobs.data.manifest",
    "ray_jobs.data.sampler",
    "ray_jobs.train.metrics",
    "ray_jobs.train.telemetry.history",
    "ray_jobs.train.telemetry.system_metrics",
    "ray_jobs.train.telemetry.profiler",
    "ray_jobs.config.tune_spec",
    "ray_jobs.tune.search.space",
    "ray_jobs.tune.results.search_state",
    "ray_jobs.tune.results.tune_page",
    "ray_jobs.submit.submit_spec",
    "ray_jobs.plan.plan_spec",
    "ray_jobs.cluster.node_inventory",
    "ray_jobs.checks.local",
    "ray_jobs.checks.versions",
    "ray_jobs.checks.storage_access",
    "ray_jobs.checks.resources",
)


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
    assert heavy_ones(["ray_jobs.config.command_line", "optuna"]) == ["optuna"]


def test_importing_a_job_does_nothing_heavy():
    assert heavy_ones([f"ray_jobs.{verb}.job" for verb in VERBS]) == []


def test_the_model_imports_no_ray():
    modules = ("model", "fit_helpers", "calibration", "losses", "mixup", "freezing")
    assert "ray" not in run("\n".join(f"import mm_model.{name}" for name in modules))[1]


def test_the_installed_script_lists_the_verbs_and_names_the_nearest_one():
    script = str(Path(sys.executable).with_name("ray-jobs"))
    listed = subprocess.run([script], capture_output=True, text=True, check=True).stdout
    assert all(f"  {verb} " in listed for verb in VERBS)
    wrong = subprocess.run([script, "trian"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "unknown verb 'trian'; did you mean 'train'?" in wrong.stderr
    for command in ([script, "train", "--help"], [sys.executable, "-m", "ray_jobs", "train", "-h"]):
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert text.startswith("usage: python -m ray_jobs.train [SPEC.yaml]")


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_every_flag_without_loading_anything_heavy(verb):
    as_main = f"runpy.run_module('ray_jobs.{verb}', run_name='__main__', alter_sys=True)"
    said, loaded = run(f"import sys, runpy; sys.argv = ['x', '--help']; {as_main}")
    assert loaded == set()
    assert said.startswith(f"usage: python -m ray_jobs.{verb}")
