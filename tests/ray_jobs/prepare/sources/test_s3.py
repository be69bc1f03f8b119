"""Tests every kind of source with an S3 server on this machine."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.prepare.sources import huggingface_imagefolder, parquet_files, tfrecord, webdataset
from ray_jobs.prepare.sources.detect_source import detect_kind
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.prepare.sources.samples import columns, jpeg, read_all, spec, write_tar

moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")

KEYS = [f"{i:03d}" for i in range(6)]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """An empty bucket; its endpoint is in the environment, as for a self-hosted S3."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    folder = Folder("s3://pictures?region=us-east-1&allow_bucket_creation=true")
    folder.filesystem.create_dir("pictures")
    for name in list(folder.names()):
        folder.delete(name)
    return Folder("s3://pictures/data")


def test_an_s3_folder_behaves_like_a_local_folder(bucket):
    for name in ("b.txt", "a/2 ö%20.txt", "a/1.txt"):
        bucket.write_text(name, name)
    assert not bucket.is_local
    assert list(bucket.names()) == ["a/1.txt", "a/2 ö%20.txt", "b.txt"]
    assert list((bucket / "a").names()) == ["1.txt", "2 ö%20.txt"]
    assert [bucket.exists(n) for n in ("a", "b.txt", "c")] == [True, True, False]
    assert pickle.loads(pickle.dumps(bucket)).read_bytes("b.txt") == b"b.txt"
    bucket.delete("a")
    assert list(bucket.names()) == ["b.txt"]
    with pytest.raises(FileNotFoundError):
        bucket.read_bytes("a/1.txt")


def upload_table(bucket: Folder, tmp_path: Path) -> str:
    pq.write_table(pa.table({"key": KEYS[::-1], "x": range(6)}), tmp_path / "t.parquet")
    bucket.upload(tmp_path / "t.parquet", "t.parquet")
    return f"{bucket.uri}/t.parquet"


@pytest.mark.parametrize("files", ["shards", "shards/{00..01}.tar", "shards/*.tar"])
def test_webdataset(bucket, tmp_path, files):
    for shard in range(2):
        members = {f"{KEYS[i]}.jpg": jpeg(i) for i in range(3 * shard, 3 * shard + 3)}
        write_tar(tmp_path / f"shards/{shard:02d}.tar", members)
    bucket.upload(tmp_path / "shards", "shards")
    options = spec(images=f"{bucket.uri}/{files}", table=upload_table(bucket, tmp_path))
    assert detect_kind(options) == "webdataset"
    source = webdataset.open_source(options)
    assert read_all(source) == [jpeg(i) for i in reversed(range(6))]


def test_parquet(bucket, tmp_path):
    table = pa.table({"key": KEYS, "image": [jpeg(i) for i in range(6)], "x": range(6)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    bucket.upload(tmp_path / "a.parquet", "images/a.parquet")
    options = spec(images=f"{bucket.uri}/images")
    assert detect_kind(options) == "parquet"
    source = parquet_files.open_source(options)
    assert columns(source.table) == {"key": KEYS, "x": list(range(6))}
    assert read_all(source) == [jpeg(i) for i in range(6)]
    assert read_all(source, rows=[5, 1]) == [jpeg(5), jpeg(1)]


def test_tfrecord(bucket, tmp_path):
    tf = pytest.importorskip("tensorflow")

    def as_feature(content: bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[content]))

    with tf.io.TFRecordWriter(str(tmp_path / "a.tfrecord")) as writer:
        for i, key in enumerate(KEYS):
            feature = {"key": as_feature(key.encode()), "image": as_feature(jpeg(i))}
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString())
    bucket.upload(tmp_path / "a.tfrecord", "a.tfrecord")
    options = spec(images=bucket.uri)
    assert detect_kind(options) == "tfrecord"
    source = tfrecord.open_source(options)
    assert columns(source.table) == {"key": KEYS}
    assert read_all(source) == [jpeg(i) for i in range(6)]


def test_imagefolder(bucket):
    for i, key in enumerate(KEYS):
        bucket.write_bytes(f"train/{key}.jpg", jpeg(i))
    lines = ["file_name,label", *(f"{key}.jpg,{i % 2}" for i, key in enumerate(KEYS))]
    bucket.write_text("train/metadata.csv", "\n".join(lines))
    options = spec(images=bucket.uri)
    assert detect_kind(options) == "imagefolder"
    source = huggingface_imagefolder.open_source(options)
    assert columns(source.table)["split"] == ["train"] * 6
    assert read_all(source) == [jpeg(i) for i in range(6)]
