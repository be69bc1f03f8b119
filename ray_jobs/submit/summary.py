"""Prints a JSON file that only the cluster may be able to read; runs there as a job.

Output: one line with the content, which `fetch` finds in the job's log.
Run:    python -m ray_jobs.submit.summary FOLDER NAME
"""

import json
import sys
from typing import Any

from ray_jobs.storage.folder import Folder

_MARK = "content: "


def parse_log(log: str) -> Any:
    """Return the value that a job's log contains; None if there is none."""
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
