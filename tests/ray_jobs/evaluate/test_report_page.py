import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.checks.column_drift import number_drift
from ray_jobs.config.inference_spec import EvaluateSpec
from ray_jobs.data.manifest import Manifest
from ray_jobs.evaluate.analysis import BASELINE, OtherModel, analyse, worst_rows
from ray_jobs.evaluate.evaluated_rows import EvaluatedRows
from ray_jobs.evaluate.report_page import html
from ray_jobs.explain.explanation import Explanation
from tests.ray_jobs.evaluate.simulated import simulate
from tests.ray_jobs.tiny import write_prepared


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("page")
    return folder, write_prepared(folder, {"train": 20, "validation": 20, "test": 100})


def page_of(
    prepared: tuple[Path, Manifest], rows: EvaluatedRows, explanation: Explanation | None = None
) -> str:
    folder, manifest = prepared
    others = [OtherModel(BASELINE, "simple <model>", np.full(len(rows.label_N), 0.4), 0.5)]
    metrics: dict[str, Any] = analyse(rows, 0.5, others, rows)
    drift = number_drift(np.arange(50.0), np.arange(50.0) + 20)
    metrics |= {
        "drift": [{"name": "age", **drift.model_dump()}],
        "baselines_skipped": None,
        "explanation_skipped": None,
    }
    spec = EvaluateSpec(run="runs/<b>", data=str(folder), output="out")
    page = html(
        metrics, (), rows, worst_rows(rows, 0.5), explanation or Explanation(), manifest, spec
    )
    # The script of plotly contains such words.
    return re.sub(r"<script>.*?</script>", "", page, flags=re.S)


def test_the_page_shows_figures_and_images_and_escapes_texts(prepared):
    rows = simulate(100, keys=[f"<i>{i}" for i in range(100)])
    importance = [
        {"columns": ["<age>"], "is_image": False, "log_loss": 0.2, "low": 0.1, "high": 0.3}
    ]
    explanation = Explanation(
        num_rows=100,
        importance=importance,
        maps={row: np.ones((1, 3, 3), np.float32) for row in range(100)},
        map_similarity=0.12,
        contributions={row: {"<age>": 0.5} for row in range(100)},
    )
    page = page_of(prepared, rows, explanation)
    for shown in ("runs/<b>", "<i>7", "<age>", "simple <model>"):
        assert escape(shown) in page
        assert shown not in page
    assert page.count("data:image/jpeg") >= 24
    assert "rank correlation with" in page
    assert "Are these rows like the training rows?" in page
    assert 'aria-label="Decision curve"' in page


@pytest.mark.parametrize(
    "rows",
    [
        simulate(100, label_N=np.zeros(100, np.int8)),
        simulate(100, label_N=np.ones(100, np.int8)),
        simulate(1, label_N=np.ones(1, np.int8)),
        simulate(100, group_N=np.arange(100) // 40),
        simulate(100, group_N=np.zeros(100, int)),
        simulate(100, numbers={"empty": np.full(100, np.nan)}, words={}),
        simulate(100, probability_N=np.full(100, 0.5)),
        simulate(100, weight_N=np.linspace(0.1, 3, 100)),
    ],
    ids=[
        "only negative", "only positive", "one row", "three groups", "one group", "empty column",
        "constant probability", "weights",
    ],
)  # fmt: skip
def test_unusual_rows_have_a_page(prepared, rows):
    assert "What does it look at?" in page_of(prepared, rows)
