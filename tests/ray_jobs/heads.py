"""A real Ray head on loopback with token authentication, for submitting jobs."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

TOKEN = "0123456789abcdef" * 4


@contextmanager
def running_head(log: Path) -> Iterator[dict[str, str]]:
    """Start a head for the block and yield the environment of its clients."""
    gcs, dashboard, agent = free_ports(3)
    binaries = Path(sys.executable).parent
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # The paths of Ray's sockets, which are in this folder, must be short.
    folder = tempfile.mkdtemp(prefix="ray-")
    with open(log, "w") as written:
        process = subprocess.Popen(
            [
                *("ray", "start", "--head", "--block", "--num-cpus", "4"),
                *("--node-ip-address", "127.0.0.1", "--port", gcs),
                *("--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard),
                # Without a free port the agent would run no jobs.
                *("--dashboard-agent-listen-port", agent),
                *("--temp-dir", folder),
            ],
            env=environment, stdout=written, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            # The server lists jobs before an agent can run them.
            ready = ["ray", "job", "submit", "--", "true"]
            while subprocess.run(ready, env=environment, capture_output=True).returncode != 0:
                assert process.poll() is None, log.read_text()
            yield environment
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]
