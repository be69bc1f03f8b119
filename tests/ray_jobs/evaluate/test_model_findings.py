import re
from pathlib import Path

import numpy as np
import pytest

from ray_jobs.checks.finding import Finding
from ray_jobs.evaluate.analysis import BASELINE, HEAD, OtherModel, analyse
from ray_jobs.evaluate.evaluated_rows import DISTANCE_COLUMN, EvaluatedRows
from ray_jobs.evaluate.model_findings import model_findings
from ray_jobs.explain.explanation import Explanation
from tests.ray_jobs.evaluate.simulated import simulate, with_bad_cohort

GOOD = simulate()
RANDOM = np.random.default_rng(1).random(2000)


def findings(
    rows: EvaluatedRows,
    others: list[OtherModel] | None = None,
    blend: dict | None = None,
    explanation: Explanation | None = None,
    shared_groups: int = 0,
    is_held_out: bool = True,
    gap: dict[str, float] | None = None,
) -> dict[str, Finding]:
    metrics = analyse(rows, 0.5, others or [], None)
    metrics |= {"shared_groups": shared_groups, "is_held_out": is_held_out, "drift": []}
    metrics |= {"num_unfamiliar": rows.num_unfamiliar, "training_gap": gap}
    metrics["explanation"] = (explanation or Explanation()).figures(())
    return {f.code: f for f in model_findings(metrics, blend or {}, ("healthy", "ill"))}


def test_a_good_model_has_no_findings():
    others = [OtherModel(BASELINE, "simple", RANDOM, 0.5), OtherModel(HEAD, "image", RANDOM, 0.5)]
    assert findings(GOOD, others, {"image": 0.4, "numeric": 0.6}) == {}


@pytest.mark.parametrize(
    ("rows", "others", "blend", "code", "severity", "text"),
    [
        (
            simulate(label_N=np.zeros(2000, np.int8)),
            [],
            {},
            "class_absent",
            "warning",
            "None of the 2,000 rows is 'ill'",
        ),
        (simulate(60), [], {}, "few_rows", "note", r"Only \d+ rows of 60 are 'ill'"),
        (
            simulate(probability_N=np.clip(RANDOM, 0.01, 0.99)),
            [OtherModel(BASELINE, "gradient boosting", GOOD.probability_N, 0.5)],
            {},
            "worse_than_baseline",
            "warning",
            r"worse than 1 of 1 baseline: gradient boosting, ROC AUC -0\.\d+ \(-0",
        ),
        (
            simulate(probability_N=np.clip(RANDOM, 0.01, 0.99)),
            [OtherModel(HEAD, "numeric", GOOD.probability_N, 0.5)],
            {},
            "worse_than_head",
            "warning",
            r"worse than 1 of 1 head: numeric, ROC AUC -0\.\d+",
        ),
        (
            simulate(probability_N=np.where(GOOD.probability_N > 0.5, 0.99, 0.01)),
            [],
            {},
            "miscalibrated",
            "warning",
            r"The calibration error is 0\.\d+; if the probabilities were right",
        ),
        (
            with_bad_cohort(GOOD),
            [],
            {},
            "weak_slice",
            "note",
            "in 2 of 11 slices, most in age = ",
        ),
        (GOOD, [], {"image": 0.0, "numeric": 1.0}, "head_without_vote", "note", r"1 of 2 heads \("),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_each_fault_is_found(rows, others, blend, code, severity, text):
    found = findings(rows, others, blend)[code]
    assert found.severity == severity
    assert re.search(text, found.text)


def test_rows_that_were_used_in_training_and_few_groups_are_found():
    assert set(findings(GOOD, is_held_out=False)) == {"not_held_out"}
    groups = simulate(group_N=np.arange(2000) % 12)
    assert findings(groups)["few_groups"].text.startswith("The rows are of only 12 groups")


@pytest.mark.parametrize(("fraction", "is_found"), [(0.01, False), (0.03, False), (0.06, True)])
def test_unfamiliar_rows_are_found(fraction, is_found):
    distance = np.where(np.arange(2000) < 2000 * fraction, 1.5, 0.8)
    found = findings(simulate(numbers={DISTANCE_COLUMN: distance}))
    assert ("unfamiliar_rows" in found) == is_found


def test_a_gap_between_training_and_validation_is_found():
    small = {"training": 0.3, "validation": 0.4, "low": 0.05, "high": 0.15}
    uncertain = {"training": 0.1, "validation": 0.4, "low": -0.05, "high": 0.65}
    large = {"training": 0.1, "validation": 0.4, "low": 0.25, "high": 0.35}
    assert findings(GOOD, gap=small) == findings(GOOD, gap=uncertain) == {}
    text = findings(GOOD, gap=large)["overfitted"].text
    assert text.startswith("The log loss is 0.100 on training rows, but 0.400 on validation rows")


def test_leaks_are_found():
    groups = simulate(group_N=np.arange(2000) // 2)
    found = findings(groups, shared_groups=3)["group_straddles_splits"]
    assert found.text.startswith("3 groups of 1,000 have rows among the training rows")
    perfect = simulate(probability_N=np.clip(GOOD.label_N, 0.01, 0.99))
    others = [OtherModel(BASELINE, "gradient boosting", perfect.probability_N, 0.5)]
    found = findings(perfect, others)["leak_suspect"]
    assert "gradient boosting reaches a ROC AUC of 1.0000" in found.text


def test_faults_of_what_the_model_looks_at_are_found():
    def importance(*increases: float, is_image: bool = False) -> list[dict]:
        return [
            {"columns": [f"c{i}"], "is_image": is_image and i == 0, "log_loss": x, "low": x - 0.001}
            for i, x in enumerate(increases)
        ]

    even = Explanation(importance=importance(0.2, 0.1, 0.0), map_similarity=0.1)
    assert findings(GOOD, explanation=even) == {}
    alone = Explanation(importance=importance(0.3, 0.01, -0.002), map_similarity=0.8)
    found = findings(GOOD, explanation=alone)
    assert set(found) == {"one_column_decides", "maps_ignore_training"}
    assert "Permuting c0 increases the log loss by 0.300" in found["one_column_decides"].text
    image = Explanation(importance=importance(0.3, 0.01, is_image=True))
    assert findings(GOOD, explanation=image) == {}
    noise = Explanation(importance=importance(0.0005, 0.0))
    assert findings(GOOD, explanation=noise) == {}


def test_every_code_is_explained_in_the_documentation_and_no_other():
    rows = re.findall(r"^\| (`.+?) \|", Path("docs/findings.md").read_text(), re.M)
    documented = [code for row in rows for code in re.findall(r"`(\w+)`", row)]
    assert len(documented) == len(set(documented))
    call = re.compile(
        r"\b(?:ok|note|warning|error|skipped|from_message|run_on_nodes|run_on_each|kind|Finding)"
        r'\(\s*"(\w+)",'
    )
    variable = re.compile(r'\bcode(?:, \w+)? = "(\w+)"')
    used = {
        code
        for path in Path("ray_jobs").rglob("*.py")
        if "finding" in path.read_text()
        for code in (*call.findall(path.read_text()), *variable.findall(path.read_text()))
    }
    # These codes are not written as literals.
    used |= {"rows", "worse_than_baseline", "worse_than_head"}
    used |= {f"{kind}_image" for kind in ("unreadable", "black", "white", "flat")}
    assert set(documented) == used
