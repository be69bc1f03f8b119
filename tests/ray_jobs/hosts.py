"""Virtual hosts on this machine: network namespaces that are connected by a switch.

Each has its own address and a cable that can be pulled. They share the disk, like hosts that mount
the same NFS. A machine is a host that also has its own home, processes and /tmp/ray, and accepts
ssh connections. Needs root, iproute2 and, for machines, sshd.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_NETWORK = "10.203.77"
_ENDS_S = 20.0


@dataclass(frozen=True)
class Host:
    """A virtual host; its name and its switch are network namespaces."""

    name: str
    address: str
    switch: str

    def command(self, *words: str) -> list[str]:
        """Return a command that runs the words on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def pull_cable(self) -> None:
        _ip("-n", self.switch, "link", "set", self.name, "down")

    def plug_cable(self) -> None:
        _ip("-n", self.switch, "link", "set", self.name, "up")

    def processes(self) -> list[int]:
        listed = ["ip", "netns", "pids", self.name]
        return [int(pid) for pid in subprocess.check_output(listed, text=True).split()]


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Create hosts for the block, or skip the test if this machine does not allow it."""
    if obstacle := _obstacle():
        pytest.skip(obstacle)
    # Interface names have at most 15 characters.
    stem = f"mm{os.getpid() % 100_000}"
    switch = f"{stem}s"
    made = [Host(f"{stem}h{n}", f"{_NETWORK}.{n + 1}", switch) for n in range(count)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in made:
            _ip("netns", "add", host.name)
            veth = ("type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("-n", switch, "link", "add", host.name, *veth)
            _ip("-n", switch, "link", "set", host.name, "master", "bridge", "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
            # Leads nowhere, but lets programs find their own address.
            _ip("-n", host.name, "route", "add", "default", "dev", "eth0")
        yield made
    finally:
        for host in made:
            end_processes(host)
        for name in (*(host.name for host in made), switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextmanager
def started(command: Sequence[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command during the block."""
    with open(log, "ab") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Machine:
    """A host with a folder for its own home of root and its own /tmp/ray."""

    host: Host
    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def command(self, *words: str) -> list[str]:
        """Return a command that runs the words with this machine's files."""
        for name in ("home", "ray"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        passwd = self.folder / "passwd"
        passwd.write_text(f"root:x:0:0:root:{self.home}:/bin/bash\nsshd:x:1:1::/:/bin/false\n")
        Path("/tmp/ray").mkdir(exist_ok=True)
        script = f"mount --bind {self.folder}/ray /tmp/ray && mount --bind {passwd} /etc/passwd"
        inside = ("unshare", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh", *words)
        return self.host.command("env", f"HOME={self.home}", *inside)

    def others(self) -> list[str]:
        """Return the processes on this machine other than its initial ones."""
        found = []
        for pid in self.host.processes():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found.append(b" ".join(words).decode().strip())
        return [words for words in found if words and not re.search(r"\bsshd\b|^unshare ", words)]


@contextmanager
def ssh_server(machine: Machine, public_key: Path) -> Iterator[None]:
    """Accept ssh connections with a key; their processes end with the block."""
    if not (sshd := shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")):
        pytest.skip("needs sshd")
    host_key, config = machine.folder / "host_key", machine.folder / "sshd_config"
    machine.folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key)], check=True)
    config.write_text(
        f"ListenAddress {machine.host.address}\nHostKey {host_key}\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {public_key}\nStrictModes no\nPermitRootLogin yes\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    server = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sshd, "-D", "-e", "-f")
    log = machine.folder / "sshd.log"
    with started(machine.command(*server, str(config)), log) as process:
        wait_until(lambda: "listening on" in log.read_text(), 20, "sshd starts")
        yield
        assert process.poll() is None


def ray_node(host: Host, *options: str, head: Host | None = None) -> list[str]:
    """Return the command that starts a Ray node on a host: a head, or a node that joins one."""
    joins = ["--head", "--port=6379"] if head is None else [f"--address={head.address}:6379"]
    return host.command(
        *(f"{Path(sys.executable).parent}/ray", "start", "--block", *joins),
        f"--node-ip-address={host.address}",
        "--object-store-memory=200000000",
        *options,
    )


def nodes_of(address: str, prefix: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return Ray's descriptions of the alive nodes, with words in front of the command."""
    # In another process, since this one may be connected to its own Ray.
    code = (
        "import json, sys, ray\n"
        f"ray.init({address!r}, logging_level='ERROR', log_to_driver=False)\n"
        "print('\\n|', json.dumps([node for node in ray.nodes() if node['Alive']]))"
    )
    words = [*prefix, sys.executable, "-c", code]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # Ray may also print messages about lost nodes.
    (answer,) = [line[1:] for line in result.stdout.splitlines() if line.startswith("|")]
    return json.loads(answer)


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.1)


def end_processes(host: Host) -> None:
    """End all processes of a host, first with SIGTERM."""
    with suppress(subprocess.CalledProcessError):
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + _ENDS_S
            for pid in host.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            while host.processes() and time.monotonic() < deadline:
                time.sleep(0.1)


def _obstacle() -> str | None:
    if not shutil.which("ip"):
        return "needs iproute2"
    probe = f"mm{os.getpid() % 100_000}p"
    added = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    if added.returncode:
        return f"needs permission to create network namespaces: {added.stderr.strip()}"
    return None


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
