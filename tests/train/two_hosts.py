"""Two hosts on one machine: network namespaces with names, addresses and processes of their own, cabled to a switch.

    with two_hosts() as (first, second):       # `NoHosts` where this machine cannot
        started = first.start(["python", ...], log)
        second.unplug()                        # packets vanish; nobody is told

What runs in a namespace reaches the other host and nothing else. Processes and namespaces are always gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CARD = "eth0"
# A host knows itself by name, as one with an /etc/hosts does: torchrun asks. The name and the file are this command's alone.
AS_HOST = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


class NoHosts(Exception):
    """This machine lets us make no network namespaces; says why."""


@dataclass(frozen=True)
class Host:
    """A namespace. `port` is its end of the cable at the switch."""

    name: str
    address: str
    namespace: str
    switch: str
    port: str
    known_hosts: Path

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Starts a program on the host, output in `log`."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount"]
        with log.open("wb") as stream:
            return subprocess.Popen(
                [*inside, "sh", "-c", AS_HOST, self.name, str(self.known_hosts), *command],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """SIGKILL to every process of the host, until there is none."""
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def unplug(self) -> None:
        """From now on the switch drops what the host sends and what is meant for it. Both hosts' cards stay up."""
        _ip("-n", self.switch, "link", "set", self.port, "nomaster")

    def plug_in(self) -> None:
        _ip("-n", self.switch, "link", "set", self.port, "master", "switch")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Args: folder: for the hosts' own /etc/hosts. Raises `NoHosts`."""
    if missing := [tool for tool in ("ip", "unshare", "mount", "hostname") if shutil.which(tool) is None]:
        raise NoHosts(f"needs {', '.join(missing)}")
    prefix, known = f"unisd{os.getpid()}", folder / "hosts"
    switch = f"{prefix}-switch"
    hosts = [
        Host(f"host-{one}", f"10.77.0.{number}", f"{prefix}-{one}", switch, f"port-{one}", known)
        for number, one in enumerate("ab", start=1)
    ]
    known.write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts))
    with contextlib.ExitStack() as stack:
        try:
            _add_namespace(stack, switch)
            _ip("-n", switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", switch, "link", "set", "switch", "up")
            for host in hosts:
                _add_namespace(stack, host.namespace)
                stack.callback(host.kill)
                _cable(host)
        except subprocess.CalledProcessError as error:
            raise NoHosts(f"no network namespaces here: {error.stderr.strip()}") from error
        yield hosts[0], hosts[1]


def _add_namespace(stack: contextlib.ExitStack, name: str) -> None:
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)


def _cable(host: Host) -> None:
    _ip("-n", host.switch, "link", "add", host.port, "type", "veth", "peer", "name", CARD, "netns", host.namespace)
    host.plug_in()
    _ip("-n", host.switch, "link", "set", host.port, "up")
    _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", CARD)
    for card in ("lo", CARD):
        _ip("-n", host.namespace, "link", "set", card, "up")
