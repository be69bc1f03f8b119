import json

import pytest
import yaml

from ray_jobs.config.command_line import parse
from ray_jobs.config.errors import JobError
from ray_jobs.plan.job import plan
from ray_jobs.plan.plan_spec import TABLE, PlanSpec, read_machines
from tests.ray_jobs.config.usage import usage_error
from tests.ray_jobs.tiny import write_prepared

SMALL = [
    "--model.image.kind", "tiny", "--model.image.weights", "none", "--data.image_size", "32",
    "--data.prepared", "nowhere", "--train.epochs", "2",
]  # fmt: skip


def planned(*arguments: str):
    return plan(parse(PlanSpec, [*SMALL, *arguments]))


def test_the_job_prints_the_plan_and_writes_it_as_json(tmp_path, capsys):
    output = tmp_path / "plan.json"
    planned(
        *("--gpu", "a10g", "--workers", "8", "--train.global_batch_size", "64"),
        *("--output", str(output)),
    )
    shown, found = capsys.readouterr().out, json.loads(output.read_text())
    assert "8 × a10g: 8 × AWS g5.xlarge, 8 rows per step on each, float32" in shown
    assert f"${found['usd']['on_demand']:.2f} on demand" in shown
    assert f"{found['stages'][0]['rows_per_s']:,.0f} rows/s" in shown
    assert (found["num_machines"], found["fits"], found["remedies"]) == (8, True, [])
    assert [other["num_workers"] for other in found["other_workers"]] == [1, 2, 4, 8, 16, 32]


def test_rows_come_from_the_manifest_and_workers_from_the_run(tmp_path):
    run = ("--gpu", "T4", "--rows", "500", "--train.num_workers", "2,4")
    found = planned(*run)
    assert (found.num_rows, found.num_workers) == (500, 4)
    write_prepared(tmp_path, {"train": 101, "validation": 37, "test": 5})
    found = planned(*run, "--workers", "8", "--data.prepared", str(tmp_path))
    assert (found.num_rows, found.num_workers) == (101, 8)
    assert found.stages[0].steps == 2 * 101 // 32


def test_a_run_that_does_not_fit_suggests_settings_that_do():
    given = ["--gpu", "t4", "--train.global_batch_size", "32768", "--rows", "40000"]
    given += ["--data.image_size", "64", "--model.batch_norm", "local"]
    message = r"needs .* GiB of memory for 32768 rows per step, but t4"
    with pytest.raises(JobError, match=message) as no:
        planned(*given)
    lines = str(no.value).splitlines()[1:]
    assert len(lines) == 3
    for line in lines:
        changes = line.split("(")[0].split()
        kept = [w for w in zip(given[::2], given[1::2], strict=True) if w[0] not in changes]
        assert planned(*[word for pair in kept for word in pair], *changes).fits


def test_machines_and_prices_come_from_a_table_that_users_can_edit(tmp_path):
    table = read_machines(str(TABLE))
    assert {"t4", "a10g", "l4", "v100", "a100-40", "a100-80", "h100", "cpu"} == set(table)
    for machine in table.values():
        assert machine.usd_per_hour["on_demand"] > machine.usd_per_hour["spot"] > 0
    machines = yaml.safe_load(TABLE.read_text())
    mine = {"usd_per_hour": {"on_demand": 0.526 * 2, "spot": 0}}
    machines |= {"mine": machines["t4"] | mine, "small": machines["t4"] | {"memory_gib": 1.0}}
    own = ("--machines", str(tmp_path / "mine.yaml"), "--gpu")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(machines))
    theirs, ours = planned("--gpu", "t4").usd, planned(*own, "mine").usd
    assert ours == {"on_demand": pytest.approx(2 * theirs["on_demand"]), "spot": 0}
    with pytest.raises(JobError, match="not even one row fits: choose another --gpu or a smaller"):
        planned(*own, "small")


def test_a_wrong_command_is_refused_before_a_model_is_built(tmp_path, capsys):
    def error(*arguments: str) -> str:
        return usage_error(capsys, parse, PlanSpec, [*SMALL, *arguments])

    assert "--gpu TEXT" in error()
    assert "unknown gpu 'a100'; did you mean" in error("--gpu", "a100")
    message = "global_batch_size=32 cannot be divided equally among num_workers=5"
    assert message in error("--gpu", "t4", "--workers", "5")
    table = tmp_path / "mine.yaml"
    assert "could not read" in error("--gpu", "t4", "--machines", str(table))
    table.write_text("t4: {instance: x, cpus: 4, memory: 3}\n")
    message = "unknown setting 'memory'; did you mean"
    assert message in error("--gpu", "t4", "--machines", str(table))
    table.write_text("")
    assert "contains no machines" in error("--gpu", "t4", "--machines", str(table))
