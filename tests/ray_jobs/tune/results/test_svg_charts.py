import pytest

from ray_jobs.tune.results import svg_charts as charts
from ray_jobs.tune.results.svg_charts import Scale, padded


def test_a_scale_clips_values_that_are_out_of_range():
    assert [Scale(2, 6).at(v) for v in (2, 3, 6, 1e9, -1e9)] == [0, 0.25, 1, 1.2, -0.2]
    assert Scale(2, 6, flipped=True).at(3) == 0.75
    assert Scale(1e-4, 1e-2, log=True).at(1e-3) == pytest.approx(0.5)
    assert -0.2 <= Scale(1e-4, 1e-2, log=True).at(-1) < 0
    assert Scale(3, 3).at(3) == 0.5


@pytest.mark.parametrize(
    ("scale", "labels"),
    [
        (Scale(0.713, 0.962), ["0.75", "0.80", "0.85", "0.90", "0.95"]),
        (Scale(-1, 1), ["-1.0", "-0.5", "0", "0.5", "1.0"]),
        (Scale(1e-5, 1e-1, log=True), ["1e-5", "0.0001", "0.001", "0.01", "0.1"]),
        (Scale(20, 700, log=True), ["20", "50", "100", "200", "500"]),
        (Scale(15, 7000, log=True), ["30", "100", "300", "1000", "3000"]),
        (Scale(0, 3e6), ["0", "1e6", "2e6", "3e6"]),
        (Scale(5, 5), ["5"]),
    ],
)
def test_ticks_are_round_numbers_within_the_scale(scale, labels):
    found = scale.ticks()
    assert [label for _, label in found] == labels
    assert all(float(label) == pytest.approx(value) for value, label in found)
    assert all(-1e-9 <= scale.at(value) <= 1 + 1e-9 for value, _ in found)


def test_ticks_of_counts_are_whole():
    assert [label for _, label in Scale(1, 3).ticks(6, whole=True)] == ["1", "2", "3"]
    assert [label for _, label in Scale(0.5, 1.5).ticks(6, whole=True)] == ["1"]


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e290])
def test_a_range_of_one_value_is_padded(value):
    assert padded(value, value).at(value) == pytest.approx(0.5)


def test_a_gap_breaks_a_line_and_a_single_point_is_a_dot():
    drawn = charts.path([(0, 1), (0.5, 2), None, (1, 3)], "some")
    assert "d='M0.00 1.0L50.00 2.0M100.00 3.0L100.00 3.0'" in drawn
    assert charts.path([None, None], "some") == ""
