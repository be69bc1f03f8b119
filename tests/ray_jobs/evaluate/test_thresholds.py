import numpy as np
import pytest
from sklearn import metrics

from ray_jobs.evaluate.thresholds import choose_thresholds, threshold_curves
from ray_jobs.train.metrics import ThresholdCounts


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 80)
    return label, np.round(0.6 * rng.random(80) + 0.4 * label, 2), rng.random(80) + 0.5


def test_metrics_at_each_threshold_are_those_of_scikit_learn(rows):
    label, probability, weight = rows
    counts = ThresholdCounts.of(label, probability, weight)
    assert len(counts.threshold_T) == len(set(probability)) + 1
    for index, threshold in enumerate(counts.threshold_T):
        predicted, found = probability >= threshold, counts.at(index)
        by = {"sample_weight": weight}
        if predicted.any():
            assert found["precision"] == pytest.approx(
                metrics.precision_score(label, predicted, **by)
            )
        else:
            assert found["precision"] is None
        assert found["recall"] == pytest.approx(metrics.recall_score(label, predicted, **by))
        assert found["f1"] == pytest.approx(metrics.f1_score(label, predicted, **by))
        specificity = metrics.recall_score(label, predicted, pos_label=0, **by)
        assert found["specificity"] == pytest.approx(specificity)


def test_the_threshold_of_least_cost_is_that_of_a_search_over_all_rows(rows):
    label, probability, weight = rows

    def cost(threshold: float) -> float:
        predicted = probability >= threshold
        return weight @ (10 * (label & ~predicted) + 1 * (predicted & (label == 0)))

    chosen = choose_thresholds(ThresholdCounts.of(label, probability, weight), 10, 1)
    candidates = np.linspace(0, 1, 1001)
    assert cost(chosen["cost"] or 0) == pytest.approx(min(cost(t) for t in candidates))
    # Errors that cost the other way around need another threshold.
    other = choose_thresholds(ThresholdCounts.of(label, probability, weight), 1, 10)
    assert (other["cost"] or 0) > (chosen["cost"] or 0)


def test_a_threshold_for_a_recall_has_the_highest_precision_and_the_reverse(rows):
    label, probability, _ = rows
    chosen = choose_thresholds(ThresholdCounts.of(label, probability))
    precision, recall, _ = metrics.precision_recall_curve(label, probability)
    predicted = probability >= (chosen["recall_0.9"] or 0)
    assert metrics.recall_score(label, predicted) >= 0.9
    assert metrics.precision_score(label, predicted) == pytest.approx(max(precision[recall >= 0.9]))
    predicted = probability >= (chosen["precision_0.8"] or 0)
    assert metrics.recall_score(label, predicted) == pytest.approx(max(recall[precision >= 0.8]))
    impossible = choose_thresholds(ThresholdCounts.of(np.array([1, 0]), np.array([0.1, 0.9])))
    assert impossible["precision_0.9"] is None


def test_the_decision_curve_is_that_of_a_loop(rows):
    label, probability, _ = rows
    curves = threshold_curves(label, probability, None, 2, 1)
    for index in range(0, 201, 20):
        threshold, found = curves["threshold"][index] or 0.0, curves["net_benefit"][index]
        if threshold == 1:
            assert found is None
            continue
        benefits = [
            1.0 if y else -threshold / (1 - threshold)
            for y, p in zip(label, probability, strict=True)
            if p >= threshold
        ]
        assert found == pytest.approx(sum(benefits) / 80)
        of_all = label.mean() - (1 - label.mean()) * threshold / (1 - threshold)
        assert curves["net_benefit_of_all"][index] == pytest.approx(of_all)
