"""Light imports and the list of verbs. Layers are contracts of import-linter in pyproject.toml."""

import pkgutil
import subprocess
import sys
from pathlib import Path

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


def test_help_loads_nothing_heavy():
    code = f"""
import contextlib, runpy
for verb in {VERBS!r}:
    sys.argv = ["x", "--help"]
    print("# verb", verb)
    with contextlib.suppress(SystemExit):
        runpy.run_module(f"ray_jobs.{{verb}}", run_name="__main__", alter_sys=True)
    print("# heavy", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    output, loaded = run(code)
    texts = output.split("# verb ")[1:]
    for verb, text in zip(VERBS, texts, strict=True):
        assert text.startswith(f"{verb}\nusage: python -m ray_jobs.{verb}")
        assert text.endswith("# heavy\n"), f"{verb} loads{text.rpartition('# heavy')[2]}"
    assert loaded == set()
