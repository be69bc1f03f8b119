"""What an interrupted `prepare` had finished, so that it goes on there when it is started again.

Each shard's facts are written when the shard is, under the fingerprint of what it was made from. So
nothing has to be known of how the job before ended, and what has changed since is done anew.
Imports neither Ray nor TensorFlow.
"""

from concurrent.futures import ThreadPoolExecutor

from pyarrow import fs
from pydantic import ValidationError

from ray_jobs.prepare.shard_writer import ShardFacts, ShardRows, ShardWriter
from ray_jobs.storage.folder import Folder

FOLDER = "_progress"
_AT_ONCE = 16


def name_of(writer: ShardWriter, rows: ShardRows) -> str:
    """Return what a shard's facts are noted under: its place, and all that it is made from."""
    return f"{rows.split}-{rows.index:05d}-{writer.fingerprint(rows)}"


def write_noted(writer: ShardWriter, rows: ShardRows) -> ShardFacts | str:
    """Write a shard, note its facts and return them, or why the folder cannot be written."""
    try:
        facts = writer.write(rows)
        name = f"{FOLDER}/{name_of(writer, rows)}.json"
        writer.output.write_text(name, facts.model_dump_json())
    except OSError as error:
        return str(error)
    return facts


def read_finished(output: Folder) -> dict[str, ShardFacts]:
    """Return the facts of the shards that are there, whole, by the name that they have here."""

    def read(name: str) -> tuple[str, ShardFacts] | None:
        try:
            facts = ShardFacts.model_validate_json(output.read_bytes(name))
        except ValidationError:
            return None
        if facts.shard and not is_whole(output, facts.shard.path, facts.shard.num_bytes):
            return None
        return name.removeprefix(f"{FOLDER}/").removesuffix(".json"), facts

    names = [name for name in output.names(FOLDER) if name.endswith(".json")]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return dict(found for found in threads.map(read, names) if found)


def is_whole(output: Folder, path: str, num_bytes: int) -> bool:
    """Whether a file is there with this many bytes."""
    info = output.filesystem.get_file_info(output.locate(path))
    return info.type == fs.FileType.File and info.size == num_bytes


def clear(output: Folder) -> None:
    """Forget what was finished, and remove what killed writers left half written."""
    output.delete(FOLDER)
    for name in list(output.names()):
        if name.endswith(".partial"):
            output.delete(name)
