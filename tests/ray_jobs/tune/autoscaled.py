"""Runs a search on a cluster whose autoscaler adds nodes and removes them again.

A program of its own, because Ray reads the client's authentication when it is imported. Prints the
number of nodes before, at most and after, and the final states of the trials.
"""

import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any


def main(folder: Path, address: str) -> dict[str, Any]:
    import ray

    from tests.ray_jobs.tune.searches import prepare_in, run_search, spec_in

    prepare_in(folder)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)

    def nodes() -> int:
        return sum(node["Alive"] and "CPU" in node["Resources"] for node in ray.nodes())

    before, most, done = nodes(), 0, threading.Event()

    def watch_nodes() -> None:
        nonlocal most
        while not done.wait(0.5):
            most = max(most, nodes())

    watch = threading.Thread(target=watch_nodes)
    watch.start()
    search = run_search(spec_in(folder, run__address=address))
    done.set()
    watch.join()
    deadline = time.monotonic() + 120
    while nodes() and time.monotonic() < deadline:
        time.sleep(1)
    after = nodes()
    ray.shutdown()
    states = [row.state for row in search.trials]
    return {"before": before, "most": most, "after": after, "states": states}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
