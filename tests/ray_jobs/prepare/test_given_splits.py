import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS
from ray_jobs.prepare.cell_text import TEXT, column_text
from ray_jobs.prepare.given_splits import describe_bad_word, read_split_keys, read_split_words


def splits_of(*cells: object) -> list[str | None]:
    splits = read_split_words(column_text(pa.chunked_array([pa.array(cells)])))
    return [SPLITS[i] if i >= 0 else None for i in splits]


@pytest.mark.parametrize(
    ("words", "split"),
    [
        (("train", "TRAIN", "Train ", "Training"), "train"),
        (("val", "validation", "Val"), "validation"),
        (("valid", "\tValid"), "validation"),
        (("VALIDATE", "dev", "eval"), "validation"),
        (("test", "Testing", "TST"), "test"),
        (("train_val", "unlabeled", "holdout", "UNASSIGNED"), None),
        (("", " ", None), None),
    ],
    ids=[
        "nhsx/covid-chest-imaging-database#21",
        "huggingface/datasets#4839",
        "roboflow-python#153",
        "chanzuckerberg/cellxgene-census#495",
        "radiate_sdk#30",
        "other words",
        "blank",
    ],
)
def test_a_split_may_be_spelled_in_several_ways(words, split):
    assert splits_of(*words) == [split] * len(words)


def test_numbers_are_not_guessed():
    """0, 1, 2 mean train, validation, test in ludwig#1823, and train, train, test elsewhere."""
    assert splits_of(0, 1, 2) == splits_of(0.0, None, 2.0) == [None] * 3
    assert describe_bad_word("2").startswith("'2', not one of train, training; validation,")
    assert describe_bad_word(None).startswith("empty, not one of train, training; validation,")


KEYS = pa.array(["1", "2", "3", None, "5"], TEXT)


def test_listed_keys_get_the_split_of_their_file_and_other_rows_are_train(tmp_path):
    (tmp_path / "test.txt").write_bytes(b"\xef\xbb\xbfid\r\n 1.0\r\n\r\n2.0\r\n9.0")
    (tmp_path / "val.txt").write_text("3\n3\n")
    files = {"test": f"{tmp_path}/test.txt", "validation": (tmp_path / "val.txt").as_uri()}
    splits, note = read_split_keys(files, KEYS, "id", "number")
    assert splits.tolist() == [2, 2, 1, 0, 0]
    assert note == (
        "from the files in prepare.split_keys; 1 key of test not in the table, such as '9'"
    )
    (tmp_path / "train.txt").write_text("5")
    splits, note = read_split_keys(
        {"train": f"{tmp_path}/train.txt", **files}, KEYS, "id", "number"
    )
    assert splits.tolist() == [2, 2, 1, 0, 0]
    assert note.endswith("; 1 row in no file, used for training")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"3\n2", "test.txt: the key '2' is also in prepare.split_keys.train=.*train.txt; remove"),
        (b"id\n", "test.txt is empty; write one key per line"),
        (b"8_cell_stage.tif", r"none of its 1 key, such as '8_cell_stage.tif', is in .* \['1'\]"),
        (b"1 ApplyEyeMakeup/v_g01.avi", "correct the file, or set prepare.key_column"),
        (b"\xff\xfe1\x00", "test.txt could not be read: .*give a UTF-8 text file"),
        (None, r"test.txt could not be read: .* give a UTF-8 text file"),
    ],
    ids=[
        "mr7495/COVID-CTset#2, one list within another",
        "only a header",
        "funalab/QCANet#10, file names",
        "v-iashin/VoxCeleb#1, two columns",
        "UTF-16",
        "missing file",
    ],
)
def test_a_file_of_keys_that_does_not_fit_raises_an_error(tmp_path, lines, message):
    (tmp_path / "train.txt").write_text("1\n2\n")
    if lines is not None:
        (tmp_path / "test.txt").write_bytes(lines)
    files = {split: f"{tmp_path}/{split}.txt" for split in ("train", "test")}
    with pytest.raises(JobError, match=message):
        read_split_keys(files, KEYS, "id", "number")
