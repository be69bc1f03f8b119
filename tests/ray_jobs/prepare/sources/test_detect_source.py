import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.sources.detect_source import detect_kind, open_source
from tests.ray_jobs.prepare.sources.samples import spec, touch


@pytest.mark.parametrize(
    ("names", "with_table", "kind"),
    [
        (["a.jpg", "b.PNG", "README.md"], True, "folder"),
        (["deep/er/a.jpg"], True, "folder"),
        (["cat/a.jpg", "dog/b.jpg"], False, "imagefolder"),
        (["a.jpg", "metadata.csv"], False, "imagefolder"),
        (["a.jpg", "metadata.csv"], True, "folder"),
        (["metadata.parquet", "train/a.jpg"], False, "imagefolder"),
        (["a.jpg", "t.parquet"], True, "folder"),
        (["data/train-00000.parquet", "README.md"], False, "parquet"),
        (["t.parquet", "more.parquet"], True, "parquet"),
        (["0.tar", "1.tar"], True, "webdataset"),
        (["0.tar.gz"], True, "webdataset"),
        (["a.tfrecord-00000-of-00002", "_SUCCESS", ".crc"], False, "tfrecord"),
        (["train.TFRecords", "a.txt"], False, "tfrecord"),
        (["a.tfrec"], False, "tfrecord"),
    ],
)
def test_file_names_determine_the_kind(tmp_path, names, with_table, kind):
    images = str(touch(tmp_path, *names))
    table = f"{images}/t.parquet" if with_table else ""
    assert detect_kind(spec(images=images, table=table)) == kind


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("*.tar", "webdataset"),
        ("s-{000..009}.tar", "webdataset"),
        ("**/*.jpg", "folder"),
        ("*.{jpg,png}", "folder"),
        ("*", "parquet"),
        ("x.parquet", "parquet"),
    ],
)
def test_a_glob_or_file_determines_the_kind_by_its_ending_or_its_files(tmp_path, pattern, kind):
    images = touch(tmp_path, "x.parquet")
    assert detect_kind(spec(images=f"{images}/{pattern}", table="t.csv")) == kind


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.tar", "b.parquet"], r"holds .*tar files \(a.tar\).*set prepare.source to one of "),
        (["a.jpg", "b.tfrecord"], "image files.*TFRecord files"),
        (["notes.txt"], "no images, Parquet, tar or TFRecord files .found notes.txt"),
        ([], "no images, Parquet, tar or TFRecord files .found nothing"),
    ],
)
def test_an_ambiguous_or_unknown_kind_raises_an_error(tmp_path, names, message):
    with pytest.raises(JobError, match=message):
        detect_kind(spec(images=str(touch(tmp_path, *names))))


@pytest.mark.parametrize(
    ("images", "message"), [("", "prepare.images is not set"), ("/no/such", "there is no /no/such")]
)
def test_missing_images_raise_an_error(images, message):
    with pytest.raises(JobError, match=message):
        open_source(spec(images=images))


def test_a_table_without_rows_raises_an_error_unless_its_rows_are_to_be_predicted(tmp_path):
    touch(tmp_path, "photos/a.jpg")
    (tmp_path / "table.csv").write_text("key,label\n")
    options = spec(images=str(tmp_path / "photos"), table=str(tmp_path / "table.csv"))
    with pytest.raises(JobError, match=r"the table .*table\.csv has no rows"):
        open_source(options)
    assert open_source(options, labelled=False).table.num_rows == 0
