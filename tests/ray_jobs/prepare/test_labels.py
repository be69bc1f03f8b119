import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.labels import MISSING, OTHER, UNLABELLED, find_classes
from tests.ray_jobs.prepare.sources.samples import column, spec


@pytest.mark.parametrize(
    ("cells", "positive", "classes"),
    [
        ((0.0, 1.0, None), (), ("0", "1")),
        (("0", "1", ""), (), ("0", "1")),
        (("0.0", "01.0"), (), ("0.0", "01.0")),
        (("True", "FALSE", "true"), (), ("FALSE", "True")),
        (("0", "1", "NA", "n/a", "#N/A", "NaN", "-nan", "<NA>", "NULL"), (), ("0", "1")),
        (("none", "mild"), ("mild",), ("none", "mild")),
        (("Yes", "no ", "YES", "yes", "YES"), (), ("no", "YES")),
        ((1, 2), ("2",), ("1", "2")),
        ((0, 1), ("1.0",), ("0", "1.0")),
        ((True, False), ("False",), ("true", "False")),
        (("mel", "nv", "bcc", "nv"), ("mel",), ("not mel", "mel")),
        (("mel", "nv", "bcc", "df"), ("mel", "bcc"), ("not mel or bcc", "mel or bcc")),
    ],
)
def test_the_classes_are_found_in_any_spelling(cells, positive, classes):
    found = find_classes(column(*cells), spec(positive_label=positive))
    assert (found.negative, found.positive) == classes
    codes = [found.code(None if cell is None else str(cell).lower()) for cell in cells]
    assert {0, 1} <= set(codes) <= {0, 1, MISSING}


def test_marks_in_unlabelled_are_of_no_class():
    cells = ("-1", "0", "1", "unknown", "Unknown", "", "0")
    found = find_classes(column(*cells), spec(unlabelled=("", "-1.0", "unknown")))
    codes = [found.code(cell) for cell in (None, *cells[:5], "2")]
    assert codes == [UNLABELLED, UNLABELLED, 0, 1, UNLABELLED, UNLABELLED, OTHER]


def test_other_labels_are_negative_only_beside_a_positive_label():
    cells = ("mel", "nv", "bcc", "nv")
    found = find_classes(column(*cells), spec(positive_label=("mel",)))
    assert [found.code(cell) for cell in cells] == [1, 0, 0, 0]
    assert found.note == "label label: positive 'mel'; negative 'nv', 'bcc'"
    strict = spec(positive_label=("mel",), other_labels="quarantine", max_bad_fraction=0.5)
    found = find_classes(column(*cells), strict)
    assert [found.code(cell) for cell in cells] == [1, 0, OTHER, 0]


@pytest.mark.parametrize(
    ("cells", "settings", "message"),
    [
        ((1, 1, 1), {}, "holds only one class .'1' 3 times"),
        (("a", "b"), {"positive_label": ("a", "b")}, "holds only one class"),
        ((None, float("nan")), {}, "is empty"),
        ((1, 2), {}, "holds '1' 1 time, '2' 1 time; set which of them are positive"),
        # The rarest label is proposed, since the positive class is rarely the largest.
        (("ok", "ok", "sick", "well", "well"), {}, r"--prepare\.positive_label sick$"),
        (("a, b", "c", "c"), {}, r"--prepare\.positive_label '\[\"a, b\"\]'$"),
        (("yes", "no"), {"positive_label": ("yess",)}, "'yess' does not occur .* mean 'yes'"),
        (
            (0, 1, 2),
            {},
            r"Of '2', add those .* --prepare\.other_labels negative .* --prepare\.unlabelled$",
        ),
        (
            ("a", "b", "c"),
            {"positive_label": ("a",), "other_labels": "quarantine"},
            "holds 3 values .* a binary classifier needs two",
        ),
    ],
)
def test_ambiguous_classes_raise_an_error_with_the_values_and_a_flag(cells, settings, message):
    with pytest.raises(JobError, match=message):
        find_classes(column(*cells), spec(**settings))
