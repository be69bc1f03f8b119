"""Records finished shards, so that an interrupted `prepare` resumes when it is started again.

A task that has written a shard stores the shard's facts under the fingerprint of its input.
Resuming needs no other state of the interrupted job, and shards whose input has changed are
rewritten.
"""

from concurrent.futures import ThreadPoolExecutor

from pyarrow import fs
from pydantic import ValidationError

from ray_jobs.config.prepare_spec import Split
from ray_jobs.prepare.row_validation import Rows
from ray_jobs.prepare.shard_writer import ShardFacts, ShardWriter
from ray_jobs.storage.atomic_write import PARTIAL
from ray_jobs.storage.folder import Folder

FOLDER = "_progress"
_NUM_THREADS = 16


def entry_name(writer: ShardWriter, split: Split, index: int, rows: Rows) -> str:
    """Return the name of a shard's entry, from its position and the fingerprint of its input."""
    return f"{split}-{index:05d}-{writer.fingerprint(split, rows)}"


def write_and_record(writer: ShardWriter, split: Split, index: int, rows: Rows) -> ShardFacts | str:
    """Write and record a shard; return its facts, or the error if the folder cannot be written."""
    try:
        facts = writer.write(split, index, rows)
        name = f"{FOLDER}/{entry_name(writer, split, index, rows)}.json"
        writer.output.write_text(name, facts.model_dump_json())
    except OSError as error:
        return str(error)
    return facts


def read_finished(output: Folder) -> dict[str, ShardFacts]:
    """Return the facts of the recorded shards that are complete, by entry name."""

    def read_entry(name: str) -> tuple[str, ShardFacts] | None:
        try:
            facts = ShardFacts.model_validate_json(output.read_bytes(name))
        except ValidationError:
            return None
        if facts.shard and not is_complete(output, facts.shard.path, facts.shard.num_bytes):
            return None
        return name.removeprefix(f"{FOLDER}/").removesuffix(".json"), facts

    names = [name for name in output.names(FOLDER) if name.endswith(".json")]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return dict(entry for entry in threads.map(read_entry, names) if entry)


def is_complete(output: Folder, path: str, num_bytes: int) -> bool:
    """Return whether a file exists and has this size."""
    info = output.filesystem.get_file_info(output.locate(path))
    return info.type == fs.FileType.File and info.size == num_bytes


def clear(output: Folder) -> None:
    """Delete all entries, and the partial files of killed writers."""
    output.delete(FOLDER)
    for name in list(output.names()):
        if name.endswith(PARTIAL):
            output.delete(name)
