import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.labels import find_classes
from tests.ray_jobs.prepare.sources.samples import column, spec


@pytest.mark.parametrize(
    ("cells", "positive_label", "classes"),
    [
        ((0.0, 1.0, None), None, ("0", "1")),
        (("0", "1", ""), None, ("0", "1")),
        (("0.0", "1.0"), None, ("0", "1")),
        (("True", "FALSE", "true"), None, ("false", "true")),
        (("0", "1", "NA", "n/a", "#N/A", "NaN", "-nan", "<NA>", "NULL"), None, ("0", "1")),
        (("none", "mild"), "mild", ("none", "mild")),
        (("yes", "no"), "yes", ("no", "yes")),
        ((1, 2), "2", ("1", "2")),
        ((0, 1), "1.0", ("0", "1")),
        ((True, False), "False", ("true", "false")),
    ],
)
def test_labels_may_be_0_and_1_booleans_or_two_strings(cells, positive_label, classes):
    assert find_classes(column(*cells), spec(positive_label=positive_label)) == classes


@pytest.mark.parametrize(
    ("cells", "positive_label", "message"),
    [
        ((1, 1, 1), None, "holds only one class .'1' 3 times"),
        ((None, float("nan")), None, "is empty"),
        (("yes", "no"), None, r"set which of them counts as 1, such as --prepare.positive_label"),
        ((1, 2), None, "holds '1' 1 time, '2' 1 time; set which of them counts as 1"),
        (("yes", "no"), "yess", "'yess' does not occur .* did you mean 'yes'.*it holds: "),
        (("a", "b", "c"), None, "holds 3 values .* set prepare.positive_label"),
        (("a", "b", "c"), "a", "holds 3 values .* raise prepare.max_bad_fraction=0.01"),
        ((0, 1, 2), None, "holds 3 values .* correct the values other than '0' and '1'"),
    ],
)
def test_ambiguous_classes_raise_an_error_with_the_values(cells, positive_label, message):
    with pytest.raises(JobError, match=message):
        find_classes(column(*cells), spec(positive_label=positive_label))
