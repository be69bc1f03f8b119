import re
from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from tests.ray_jobs.inspect.samples import (
    SPLITS,
    jpeg,
    kinds,
    look,
    photo,
    psi,
    rows,
    stored,
    text_of,
    write,
)
from tests.ray_jobs.tiny import COLUMNS


def test_figures_of_numbers_are_those_of_numpy(harmless, tmp_path):
    report = look(harmless, output=str(tmp_path))
    assert [facts.column for facts in report.numeric] == list(COLUMNS)
    for facts in report.numeric:
        for split, found in facts.splits.items():
            value = stored(harmless, split)[facts.column].to_numpy().astype(np.float64)
            there = value[~np.isnan(value)]
            assert found.num_rows == len(value)
            assert found.missing == np.isnan(value).sum()
            assert sum(found.histogram) == len(there)
            expected = [there.mean(), there.std(), there.min(), np.median(there), there.max()]
            figures = [found.mean, found.std, found.min, found.median, found.max]
            np.testing.assert_allclose(figures, expected, rtol=1e-12)


def test_bins_are_the_same_in_all_splits_and_the_outermost_take_what_is_beyond(harmless, tmp_path):
    facts = look(harmless, output=str(tmp_path)).numeric[0]
    for split, found in facts.splits.items():
        value = stored(harmless, split)["alpha"].drop_null().to_numpy().astype(np.float64)
        clipped = np.clip(value, facts.edges[0], facts.edges[-1])
        expected, _ = np.histogram(clipped, np.array(facts.edges))
        # np.histogram puts a value on the last edge into the last bin, as we do.
        assert found.histogram == tuple(expected)


def test_few_whole_numbers_have_a_bin_each(tmp_path):
    values = [1, 2, 2, 5, 5, 5, float("nan"), 1]
    folder = write(tmp_path, {split: rows(split, 8, rooms=values) for split in SPLITS})
    (facts,) = look(folder).numeric
    assert facts.edges == (0.5, 1.5, 2.5, 3.5, 4.5, 5.5)
    assert facts.splits["test"].histogram == (2, 2, 0, 0, 3)
    assert facts.splits["test"].missing == 1


def test_bins_reach_to_where_another_split_lies_and_no_further_than_trainings_own_width(tmp_path):
    train = np.arange(0, 1000, 10) + 0.5
    data = {split: rows(split, 100, x=train + shift) for split, shift in
            (("train", 0.0), ("validation", -200.0), ("test", 90_000.0))}  # fmt: skip
    (facts,) = look(write(tmp_path, data)).numeric
    low, high = np.quantile(train, [0.005, 0.995])
    expected = [np.quantile(train - 200, 0.01), high + (high - low)]
    np.testing.assert_allclose([facts.edges[0], facts.edges[-1]], expected)
    assert facts.splits["test"].histogram[-1] == 100


def test_of_an_empty_bin_the_share_counts_as_one_in_ten_thousand(tmp_path):
    data = {s: rows(s, 100, x=np.arange(100.0)) for s in SPLITS}
    data["test"]["x"] = np.full(100, 5.0)
    drift = look(write(tmp_path, data)).numeric[0].drift["test"]
    expected = psi([0.1] * 10, [1.0] + [1e-4] * 9)
    assert drift.psi == pytest.approx(expected, rel=1e-9)


def test_drift_of_numbers_is_that_of_scipy_and_of_the_definition(harmless, tmp_path):
    report = look(harmless, output=str(tmp_path))
    train = stored(harmless, "train")["alpha"].drop_null().to_numpy().astype(np.float64)
    cuts = [-np.inf, *(np.quantile(train, i / 10) for i in range(1, 10)), np.inf]
    for split in ("validation", "test"):
        other = stored(harmless, split)["alpha"].drop_null().to_numpy().astype(np.float64)
        shares = [
            [
                max(sum(low < v <= high for v in values) / len(values), 1e-4)
                for low, high in pairwise(cuts)
            ]
            for values in (train, other)
        ]
        found, expected = report.numeric[0].drift[split], stats.ks_2samp(train, other)
        assert found.psi == pytest.approx(psi(*shares), rel=1e-9)
        assert found.ks == pytest.approx(expected.statistic)
        assert found.p_value == pytest.approx(expected.pvalue, abs=0.02)


def test_only_shifted_columns_drift(tmp_path):
    rng = np.random.default_rng(0)
    folder = write(
        tmp_path,
        {
            split: rows(
                split, n, same=rng.normal(size=n), moved=rng.normal(size=n) + (split == "test"),
                gone=np.where(rng.random(n) < (0.5 if split == "test" else 0.1), np.nan, 1),
            )
            for split, n in (("train", 300), ("validation", 150), ("test", 150))
        },
    )  # fmt: skip
    report = look(folder)
    assert {"drift", "missing_drift"} <= set(kinds(report))
    assert re.fullmatch(r"Distribution in test differs from train: moved \(PSI \d\.\d\d\)\.",
                        text_of(report, "drift"))  # fmt: skip
    assert text_of(report, "missing_drift") == (
        "Fraction of missing values in test differs from train: gone."
    )
    gone = report.numeric[2].drift["test"]
    missing = [facts.missing for facts in report.numeric[2].splits.values()]
    table = [[missing[0], 300 - missing[0]], [missing[2], 150 - missing[2]]]
    assert gone.missing_p_value == pytest.approx(stats.chi2_contingency(table).pvalue)


def test_columns_without_values_and_with_one_value_have_no_figures_that_are_none(tmp_path):
    empty, same = [float("nan")] * 20, [7.5] * 20
    folder = write(tmp_path, {s: rows(s, 20, empty=empty, same=same) for s in SPLITS})
    report = look(folder)
    nothing, constant = report.numeric
    assert nothing.splits["train"].mean is None
    assert (nothing.drift["test"].psi, nothing.leak.auc, nothing.leak.suspect) == (
        None,
        None,
        False,
    )
    assert (constant.splits["train"].std, constant.drift["test"].psi) == (0, 0)
    assert sum(constant.splits["train"].histogram) == 20
    assert text_of(report, "mostly_missing") == "Mostly missing in train: empty (100%)."
    assert text_of(report, "constant") == "Constant in train: same."


def test_a_columns_auc_is_that_of_its_ranks(harmless, tmp_path):
    report = look(harmless, output=str(tmp_path))
    rows_ = pa.concat_tables(stored(harmless, split) for split in SPLITS)
    label = rows_["label"].to_numpy()
    for facts in report.numeric:
        value = rows_[facts.column].to_numpy()
        there = ~np.isnan(value)
        pairs = stats.mannwhitneyu(value[there & (label == 1)], value[there & (label == 0)])
        area = pairs.statistic / (there & (label == 1)).sum() / (there & (label == 0)).sum()
        assert facts.leak.auc == pytest.approx(area, rel=1e-12)
        gap = np.mean(~there[label == 1]) - np.mean(~there[label == 0])
        assert facts.leak.missing_auc == pytest.approx(0.5 + gap / 2, rel=1e-12)
        assert not facts.leak.suspect


def test_a_column_that_predicts_the_label_on_its_own_is_suspect_in_either_direction(tmp_path):
    rng = np.random.default_rng(0)

    def columns(count: int) -> dict[str, Any]:
        label = np.arange(count) % 2
        return {
            "price": 100 - 50 * label + rng.random(count),
            "paid_on": np.where(label, rng.random(count), np.nan),
            "fair": rng.normal(size=count) + label,
        }

    folder = write(tmp_path, {split: rows(split, 40, **columns(40)) for split in SPLITS})
    report = look(folder)
    leaks = [finding.text for finding in report.findings if finding.kind == "leak"]
    assert len(leaks) == 2
    assert leaks[0].startswith("price alone predicts the label: its values reach an AUC of 0.0000.")
    assert leaks[1].startswith(
        "paid_on alone predicts the label: its missing values reach an AUC of 0.0000."
    )
    assert report.findings[0].severity == "warning"


def test_so_few_rows_that_chance_sorts_them_are_no_suspicion(tmp_path):
    value = [0.0, 1.0] * 4 + [float("nan")] * 32
    folder = write(tmp_path, {"train": rows("train", 40, rare=value)})
    report = look(folder)
    assert report.numeric[0].leak.auc == 1
    assert "leak" not in kinds(report)


def words(split: str, count: int, tells: bool = False) -> list[str | None]:
    rng = np.random.default_rng(len(split))
    names = rng.choice(["brick", "wood", "stone", "glass"], count, p=[0.4, 0.3, 0.2, 0.1])
    found: list[str | None] = [f"{'yes' if i % 2 else 'no'}" if tells else str(name)
                               for i, name in enumerate(names)]  # fmt: skip
    found[3], found[4] = None, f"only here: {split}"
    return found


def test_figures_of_words_are_those_of_a_count_by_hand(tmp_path):
    sizes = {"train": 120, "validation": 60, "test": 50}
    data = {split: rows(split, n, wall=words(split, n)) for split, n in sizes.items()}
    report = look(write(tmp_path, data, categorical=("wall",)))
    (facts,) = report.categorical
    texts = {split: data[split]["wall"] for split in SPLITS}
    assert facts.num_words == 4
    assert list(facts.splits["train"].top) == ["brick", "wood", "stone", "glass"]
    for split, found in facts.splits.items():
        assert (found.num_rows, found.missing, found.unknown) == (sizes[split], 1, 1)
        assert found.top == {word: texts[split].count(word) for word in found.top}
    tops = [list(facts.splits[s].top.values()) for s in ("train", "test")]
    shares = [[max(n / (sum(top) + 1), 1e-4) for n in (*top, 0, 1)] for top in tops]
    assert facts.drift["test"].psi == pytest.approx(psi(*shares))
    counts = [[*top, 1] for top in tops]
    assert facts.drift["test"].p_value == pytest.approx(stats.chi2_contingency(counts).pvalue)
    assert facts.drift["test"].ks is None
    assert not facts.drift["test"].values_drifted


def test_the_auc_of_words_is_the_training_share_of_positives_measured_on_other_splits(tmp_path):
    sizes = {"train": 120, "validation": 60, "test": 50}
    data = {split: rows(split, n, wall=words(split, n)) for split, n in sizes.items()}
    (facts,) = look(write(tmp_path, data, categorical=("wall",))).categorical
    known = set(facts.splits["train"].top)
    by_word = defaultdict(list)
    for word, label in zip(data["train"]["wall"], data["train"]["label"], strict=True):
        by_word[word if word in known or word is None else "other"].append(label)
    scores: dict[int, list[float]] = {0: [], 1: []}
    for split in ("validation", "test"):
        for word, label in zip(data[split]["wall"], data[split]["label"], strict=True):
            mine = by_word[word if word in known or word is None else "other"]
            scores[label].append(float(np.mean(mine)))
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[1] for b in scores[0]]
    assert facts.leak.auc == pytest.approx(np.mean(pairs))


def test_categories_that_encode_the_label_are_suspect(tmp_path):
    data = {s: rows(s, 400, why=words(s, 400, tells=True)) for s in SPLITS}
    data["validation"]["image"] = data["test"]["image"] = data["train"]["image"] = [
        jpeg(photo(0))
    ] * 400
    report = look(write(tmp_path, data, categorical=("why",)))
    assert text_of(report, "leak").startswith(
        "why alone predicts the label: its values reach an AUC"
    )


def test_categories_with_other_frequencies_drift(tmp_path):
    data = {s: rows(s, 80, wall=["brick", "brick", "wood", "stone"] * 20) for s in SPLITS}
    data["test"]["wall"] = ["brick", "straw", "straw", "stone"] * 20
    report = look(write(tmp_path, data, categorical=("wall",)))
    assert text_of(report, "drift").startswith(
        "Distribution in test differs from train: wall (PSI "
    )
    assert report.categorical[0].splits["test"].unknown == 40
