"""README and guides are correct: their commands parse and run, and so does their code."""

import re
import runpy
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml

from ray_jobs.config import command_line
from ray_jobs.submit import job
from ray_jobs.tune.search.space import SearchSpec
from tests.ray_jobs.tiny import write_prepared

ROOT = Path(__file__).parent.parent
HOUSES = ROOT.parent / "shared" / "data" / "houses"
README = (ROOT / "README.md").read_text()
TEXTS = [README, *(path.read_text() for path in sorted(ROOT.glob("docs/*.md")))]


def blocks(language: str, *texts: str) -> list[str]:
    found = [re.findall(rf"```{language}\n(.*?)```", t, flags=re.DOTALL) for t in texts or TEXTS]
    return [block for of_text in found for block in of_text]


def commands(*texts: str) -> list[str]:
    lines = [line for block in blocks("sh", *texts) for line in block.splitlines()]
    return list(dict.fromkeys(" ".join(line.partition("#")[0].split()) for line in lines))


def job_commands(*texts: str) -> list[str]:
    return [command for command in commands(*texts) if "-m ray_jobs." in command]


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, **options)


@pytest.mark.parametrize("command", job_commands())
def test_every_job_command_is_accepted_by_its_job(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("SHARED/", "/shared/"))
    at = next(i for i, word in enumerate(words) if word.startswith("ray_jobs."))
    verb, arguments = words[at].removeprefix("ray_jobs."), words[at + 1 :]
    if verb == "submit":
        job.parse(arguments)
        return
    given = []
    monkeypatch.setattr(command_line, "main", lambda spec, *_, **__: given.append(spec))
    runpy.run_module(f"ray_jobs.{verb}", run_name="__main__")
    command_line.parse(given[0], arguments)


def test_the_plan_command_prints_a_plan(monkeypatch, capsys):
    (command,) = [command for command in job_commands() if "ray_jobs.plan" in command]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", shlex.split(command)[2:])
    runpy.run_module("ray_jobs.plan", run_name="__main__")
    assert "8 × a10g: 8 × AWS g5.xlarge" in capsys.readouterr().out


def dry_runs() -> list[tuple[str, str]]:
    """Return each command that is shown with its output, and the output."""
    shown = [block for t in TEXTS for block in re.findall(r"```\n\$ (.*?)```", t, re.DOTALL)]
    return [(block.partition("\n")[0], block.partition("\n")[2]) for block in shown]


@pytest.mark.skipif(not HOUSES.exists(), reason="the datasets are missing")
@pytest.mark.parametrize(("command", "output"), dry_runs(), ids=["ham10000", "houses"])
def test_a_dry_run_prints_what_the_guide_shows(command, output, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", shlex.split(command)[2:])
    with suppress(SystemExit):
        runpy.run_module("ray_jobs.prepare", run_name="__main__")
    shown = capsys.readouterr()
    assert shown.out + shown.err == output


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", README, flags=re.M))
    targets = {name for pair in targets for name in pair if name}
    assert {"demo", "test", "check"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def test_the_tree_names_only_existing_files():
    tree = README.partition("## The project")[2].split("```")[1]
    names = set(re.findall(r"[\w/]+\.(?:py|yaml|md)\b|\b\w+/(?=\s)", tree))
    assert {"spec.py", "mm_model/", "houses.yaml"} <= names
    existing = {path.name for path in ROOT.glob("*")}
    for package in ("mm_model", "ray_jobs"):
        existing |= {path.name for path in (ROOT / package).rglob("*")}
    missing = {n for n in names if n.rstrip("/") not in existing and not (ROOT / n).exists()}
    assert missing == set()


@pytest.mark.parametrize("example", blocks("yaml"))
def test_a_yaml_example_is_a_valid_spec(example):
    spec = command_line.validate_spec(SearchSpec, yaml.safe_load(example))
    assert spec != SearchSpec()


def test_links_lead_to_existing_files():
    for name in ("README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))):
        targets = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / name).read_text())
        assert [t for t in targets if not (ROOT / name).parent.joinpath(t).exists()] == [], name


def test_the_python_example_runs():
    rng = np.random.default_rng(0)
    arrays = {
        "X_image": rng.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8),
        "X_numeric": rng.normal(size=(16, 3)),
        "y": np.arange(16) % 4 == 0,
        "X_image_val": rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8),
        "X_numeric_val": rng.normal(size=(8, 3)),
        "y_val": np.arange(8) % 4 == 0,
    }
    first, second = blocks("python", (ROOT / "docs/python.md").read_text())
    exec(first.replace("epochs=50", "epochs=2, verbose=0"), arrays)
    assert arrays["probability"].shape == (8, 1)
    assert np.isfinite(arrays["probability"]).all()
    arrays["notes"] = ["no crack", None] * 8
    exec(second, arrays)
    assert np.asarray(arrays["model"](arrays["inputs"])).shape == (16, 1)


@pytest.mark.slow
@pytest.mark.skipif(not HOUSES.exists(), reason="the houses dataset is missing")
def test_the_commands_run_the_whole_pipeline_on_the_houses_dataset(tmp_path):
    # Forty trials take too long for a test, so this search has two short ones.
    fewer = ["--tune.budget.trials", "2", "--train.epochs", "2"]
    six = [command for command in job_commands(README) if "OUT/" in command]
    assert len(six) == 6
    for command in six:
        for name in ("NAME", "SEARCH"):
            command = command.replace(name, name.lower())
        words = shlex.split(command.replace("OUT/", f"{tmp_path}/"))
        result = run([sys.executable, *words[1:], *(fewer if "ray_jobs.tune" in words else [])])
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
    assert (tmp_path / "prepared" / "inspect.html").exists()
    assert (tmp_path / "eval" / "metrics.json").exists()
    assert (tmp_path / "eval" / "calibration.png").exists()
    assert list((tmp_path / "predictions").glob("part-*.parquet"))
    assert (tmp_path / "runs" / "search" / "tune.html").exists()


@pytest.mark.slow
def test_in_the_demo_the_fusion_beats_both_single_branches(tmp_path):
    result = run([sys.executable, "-m", "ray_jobs.demo", "--output", str(tmp_path / "demo")])
    assert result.returncode == 0, result.stderr
    auc = {
        name: float(value)
        for name, value in re.findall(
            r"│ (image only|numeric only|fusion) +│ +([\d.]+)", result.stdout
        )
    }
    assert auc["fusion"] > max(auc["image only"], auc["numeric only"])


@pytest.mark.slow
def test_the_submit_commands_work_on_a_running_head(head, tmp_path):
    write_prepared(tmp_path / "prepared", {"train": 101, "validation": 37, "test": 5})
    submits = [line for line in commands() if re.search(r"\bsubmit\b", line)]
    trainings = [line for line in submits if re.search(r"[. ]train\b", line)]
    assert (len(submits), len(trainings)) == (4, 2)
    for number, line in enumerate(submits):
        words = shlex.split(line.replace("SHARED/", f"{tmp_path}/").replace("NAME", f"run{number}"))
        words += ["--train.epochs", "2"] if line in trainings else []
        result = run(words, env=head)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Traceback" not in result.stdout + result.stderr
        if line in trainings:
            assert (tmp_path / "runs" / f"run{number}" / "summary.json").exists()
            failing = run([*words, "--run.name", "x", "--data.prepared", "/nowhere"], env=head)
            assert failing.returncode != 0
            assert "no manifest.json" in failing.stdout


@pytest.mark.slow
def test_the_quickstart_runs():
    result = run([sys.executable, "docs/quickstart.py"])
    assert result.returncode == 0, result.stderr
    probabilities = [float(p) for p in re.findall(r"\[(0\.\d+) *\]", result.stdout)]
    assert len(probabilities) == 3
