"""Light imports and the list of verbs. Layers are contracts of import-linter in pyproject.toml."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ray_jobs
from ray_jobs.__main__ import VERBS

HEAVY = ("tensorflow", "keras", "ray", "mlflow", "optuna")
PACKAGES = [
    name for _, name, is_pkg in pkgutil.walk_packages(ray_jobs.__path__, "ray_jobs.") if is_pkg
]
JOBS = [f"ray_jobs.{verb}.job" for verb in VERBS]
OTHERS = ["mm_model", "ray_jobs.train.metrics", "ray_jobs.tune.results.tune_page"]
"""Light modules that no job imports at once."""


def run(code: str) -> tuple[str, set[str]]:
    """Run code in a subprocess; return its output and the heavy modules that it loaded."""
    report = f"lambda: print('|', *[m for m in {HEAVY!r} if m in sys.modules])"
    probe = f"import atexit, sys; atexit.register({report})\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    output, _, loaded = result.stdout.rpartition("|")
    return output, set(loaded.split())


def first_heavy(modules: list[str]) -> list[str]:
    """Return the first of the modules that loads something heavy; one process imports them all."""
    code = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
    if any(name in sys.modules for name in {HEAVY!r}):
        print(module)
        break
"""
    return run(code)[0].split()


def test_importing_packages_jobs_and_light_modules_loads_nothing_heavy():
    assert first_heavy([*PACKAGES, *JOBS, *OTHERS]) == []
    assert first_heavy(["ray_jobs.config.command_line", "optuna"]) == ["optuna"]


def test_the_installed_script_lists_the_verbs_and_suggests_the_nearest_one():
    script = str(Path(sys.executable).with_name("ray-jobs"))
    listed = subprocess.run([script], capture_output=True, text=True, check=True).stdout
    assert all(f"  {verb} " in listed for verb in VERBS)
    wrong = subprocess.run([script, "trian"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "unknown verb 'trian'; did you mean 'train'?" in wrong.stderr
    for command in ([script, "train", "--help"], [sys.executable, "-m", "ray_jobs", "train", "-h"]):
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert text.startswith("usage: python -m ray_jobs.train ")


@pytest.mark.parametrize("verb", VERBS)
def test_help_loads_nothing_heavy(verb):
    as_main = f"runpy.run_module('ray_jobs.{verb}', run_name='__main__', alter_sys=True)"
    output, loaded = run(f"import sys, runpy; sys.argv = ['x', '--help']; {as_main}")
    assert loaded == set()
    assert output.startswith(f"usage: python -m ray_jobs.{verb}")
