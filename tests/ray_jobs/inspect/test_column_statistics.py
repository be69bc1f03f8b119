import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from tests.ray_jobs.inspect.samples import SPLITS, kinds, look, psi, rows, stored, text_of, write
from tests.ray_jobs.tiny import COLUMNS


def values_of(folder: Path, split: str, column: str) -> np.ndarray:
    return stored(folder, split)[column].to_numpy().astype(np.float64)


def test_figures_and_bins_of_numbers_are_those_of_numpy(harmless, harmless_report):
    assert [facts.column for facts in harmless_report.numeric] == list(COLUMNS)
    for facts in harmless_report.numeric:
        for split, found in facts.splits.items():
            value = values_of(harmless, split, facts.column)
            there = value[~np.isnan(value)]
            assert found.num_rows == len(value)
            assert found.missing == np.isnan(value).sum()
            expected = [there.mean(), there.std(), there.min(), np.median(there), there.max()]
            figures = [found.mean, found.std, found.min, found.median, found.max]
            np.testing.assert_allclose(figures, expected, rtol=1e-12)
            # The bins are the same in all splits; the outermost take what is beyond. np.histogram
            # puts a value on the last edge into the last bin, as we do.
            clipped = np.clip(there, facts.edges[0], facts.edges[-1])
            assert found.histogram == tuple(np.histogram(clipped, np.array(facts.edges))[0])


def test_columns_with_few_shifted_equal_or_no_values(tmp_path):
    nan = float("nan")
    start = np.arange(0, 1000, 10) + 0.5
    shifts = {"train": 0.0, "validation": -200.0, "test": 90_000.0}
    columns = {"rooms": [1, 2, 2, 5, 5, 5, nan, 1, 1, 1] * 10, "none": [nan] * 100}
    data = {
        split: rows(split, 100, wide=start + shift, even=np.arange(100.0), same=[7.5] * 100)
        | columns
        for split, shift in shifts.items()
    }
    data["test"]["even"] = np.full(100, 5.0)
    report = look(write(tmp_path, data))
    facts = {facts.column: facts for facts in report.numeric}
    # Few whole numbers have a bin each.
    assert facts["rooms"].edges == (0.5, 1.5, 2.5, 3.5, 4.5, 5.5)
    assert facts["rooms"].splits["test"].histogram == (40, 20, 0, 0, 30)
    assert facts["rooms"].splits["test"].missing == 10
    # Bins reach to where another split lies, and no further than the width of the training split.
    low, high = np.quantile(start, [0.005, 0.995])
    edges = facts["wide"].edges
    expected = [np.quantile(start - 200, 0.01), high + (high - low)]
    np.testing.assert_allclose([edges[0], edges[-1]], expected)
    assert facts["wide"].splits["test"].histogram[-1] == 100
    # The share of an empty bin counts as one in ten thousand.
    found = facts["even"].drift["test"].psi
    assert found == pytest.approx(psi([0.1] * 10, [1.0] + [1e-4] * 9), rel=1e-9)
    nothing, constant = facts["none"], facts["same"]
    assert nothing.splits["train"].mean is None
    assert nothing.drift["test"].psi is None
    assert nothing.leak.auc is None
    assert not nothing.leak.suspect
    assert (constant.splits["train"].std, constant.drift["test"].psi) == (0, 0)
    assert sum(constant.splits["train"].histogram) == 100
    assert text_of(report, "mostly_missing") == "Mostly missing in train: none (100%)."
    assert text_of(report, "constant") == "Constant in train: same."


def test_drift_of_numbers_is_that_of_scipy_and_of_the_definition(harmless, harmless_report):
    values = {split: values_of(harmless, split, "alpha") for split in SPLITS}
    values = {split: value[~np.isnan(value)] for split, value in values.items()}
    train = values["train"]
    cuts = [-np.inf, *(np.quantile(train, i / 10) for i in range(1, 10)), np.inf]

    def shares(value: np.ndarray) -> list[float]:
        counts = [np.sum((low < value) & (value <= high)) for low, high in pairwise(cuts)]
        return [max(count / len(value), 1e-4) for count in counts]

    for split in ("validation", "test"):
        found = harmless_report.numeric[0].drift[split]
        expected = stats.ks_2samp(train, values[split])
        assert found.psi == pytest.approx(psi(shares(train), shares(values[split])), rel=1e-9)
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


def test_a_columns_auc_is_that_of_its_ranks(harmless, harmless_report):
    rows_ = pa.concat_tables(stored(harmless, split) for split in SPLITS)
    label = rows_["label"].to_numpy()
    for facts in harmless_report.numeric:
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

    def columns(split: str) -> dict[str, Any]:
        label, in_train = np.arange(40) % 2, split == "train"
        return {
            "price": 100 - 50 * label + rng.random(40),
            "paid_on": np.where(label, rng.random(40), np.nan),
            "fair": rng.normal(size=40) + label,
            # So few rows that chance may sort them.
            "rare": np.where((np.arange(40) < 8) & in_train, label, np.nan),
        }

    report = look(write(tmp_path, {s: rows(s, 40, **columns(s)) for s in SPLITS}))
    assert report.numeric[3].leak.auc == 1
    leaks = [finding.text for finding in report.findings if finding.code == "leak"]
    assert len(leaks) == 2
    assert leaks[0].startswith("price alone predicts the label: its values reach an AUC of 0.0000.")
    assert leaks[1].startswith(
        "paid_on alone predicts the label: its missing values reach an AUC of 0.0000."
    )
    assert report.findings[0].severity == "warning"


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
    known = ["brick", "wood", "stone", "glass"]
    assert facts.num_words == 4
    assert list(facts.splits["train"].top) == known
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
    # The AUC is that of the training share of positives of a word, on the other splits.
    pairs = {
        split: [
            (word if word is None or word in known else "other", label)
            for word, label in zip(texts[split], data[split]["label"], strict=True)
        ]
        for split in SPLITS
    }

    def share(word: str | None) -> np.floating:
        return np.mean([label for other, label in pairs["train"] if other == word])

    word, label = zip(*pairs["validation"], *pairs["test"], strict=True)
    assert facts.leak.auc == pytest.approx(roc_auc_score(label, [share(w) for w in word]))


def test_categories_that_encode_the_label_or_have_other_frequencies_are_findings(tmp_path):
    data = {s: rows(s, 400, why=words(s, 400, tells=True)) for s in SPLITS}
    for split in SPLITS:
        data[split]["image"] = data["train"]["image"]
        data[split]["wall"] = ["brick", "brick", "wood", "stone"] * 100
    data["test"]["wall"] = ["brick", "straw", "straw", "stone"] * 100
    report = look(write(tmp_path, data, categorical=("why", "wall")))
    leaks, drifts = (
        [finding.text for finding in report.findings if finding.code == kind]
        for kind in ("leak", "drift")
    )
    assert [text.partition(":")[0] for text in leaks] == ["why alone predicts the label"]
    assert drifts[0].startswith("Distribution in test differs from train: wall (PSI ")
    assert report.categorical[1].splits["test"].unknown == 200
