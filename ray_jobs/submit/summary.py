"""Print a JSON file that lies where the cluster can reach it, and perhaps only the cluster.

Reads: the file.  Writes: one line with its content, which `fetch` finds in the job's log.
Run:   python -m ray_jobs.submit.summary FOLDER NAME, as a job
"""

import json
import sys
from typing import Any

from ray_jobs.storage.folder import Folder

_MARK = "content: "


def shown_in(log: str) -> Any:
    """Return the value that a job's log shows; None if it shows none."""
    for line in reversed(log.splitlines()):
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    return None


def main() -> None:
    """Run as a job."""
    folder, name = sys.argv[1:]
    print(_MARK + json.dumps(Folder(folder).read_json(name)))


if __name__ == "__main__":
    main()
