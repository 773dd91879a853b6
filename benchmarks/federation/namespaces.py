"""A network on one machine, without root: each party has its own network namespace and address.

    with Network(["coordinator", "a", "b"]) as net:
        subprocess.run(net.inside("a", "ip", "route"))      # as if typed on a's machine
        net.cut("a")                                        # a's cable, at the switch
        net.mend("a")

Every party has one card, eth0, on one switch (a bridge in a separate namespace), its own loopback, and no route except
to that switch. Only the network is separate: files and users are the machine's. A namespace is kept by a process that
ends with this one, however this one ends, and nothing is left over.

    python namespaces.py HOST ...       which TCP ports of these hosts take a connection, as JSON
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PREFIX = "10.77.0"
PORTS = 65535


class NoNetworkError(Exception):
    """This machine does not let this user make one; why."""


class Network:
    def __init__(self, parties: Sequence[str]) -> None:
        self.address = {party: f"{PREFIX}.{i}" for i, party in enumerate(parties, 1)}
        self._port = {party: f"port{i}" for i, party in enumerate(parties, 1)}  # of the switch
        self._holders: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Network:
        try:
            self._hold("switch", ["unshare", "--map-root-user", "--net"])
            self._do("switch", "ip link add switch type bridge")
            self._do("switch", "ip link set switch up")
            for party, address in self.address.items():
                self._hold(party, [*self.inside("switch"), "unshare", "--net"])
                port, pid = self._port[party], self._holders[party].pid
                self._do("switch", f"ip link add {port} type veth peer name eth0 netns {pid}")
                self._do("switch", f"ip link set {port} master switch up")
                self._do(party, "ip link set eth0 addrgenmode none")  # no second address, of IPv6
                self._do(party, f"ip address add {address}/24 dev eth0")
                self._do(party, "ip link set eth0 up")
                self._do(party, "ip link set lo up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for holder in reversed(self._holders.values()):
            holder.kill()
            holder.communicate()

    def inside(self, party: str, *command: str) -> list[str]:
        """Returns the command that runs in the party's namespace. Its process keeps its id."""
        pid = str(self._holders[party].pid)
        return ["nsenter", "--target", pid, "--user", "--net", "--preserve-credentials", *command]

    def cut(self, party: str) -> None:
        self._do("switch", f"ip link set {self._port[party]} down")

    def mend(self, party: str) -> None:
        self._do("switch", f"ip link set {self._port[party]} up")

    def slow(self, party: str, rate: str) -> None:
        """Limits the rate at which the party sends and receives, such as "8mbit"."""
        for where, card in ((party, "eth0"), ("switch", self._port[party])):
            self._do(where, f"tc qdisc add dev {card} root tbf rate {rate} burst 32k latency 400ms")

    # --- what can be seen ---

    def routes(self, party: str) -> list[str]:
        return [line.strip() for line in self._do(party, "ip route").splitlines()]

    def listening(self, party: str) -> list[str]:
        """Returns the local addresses that accept TCP connections."""
        return sorted(line.split()[3] for line in self._do(party, "ss -Htln").splitlines())

    def connections(self, party: str) -> list[tuple[str, str]]:
        """Returns pairs (local address, remote address), each with its port."""
        lines = self._do(party, "ss -Htn state established").splitlines()
        return [(line.split()[2], line.split()[3]) for line in lines]

    def card_bytes(self, party: str) -> dict[str, int]:
        """Returns the bytes that went through the party's card so far, frames of every kind."""
        (card,) = json.loads(self._do(party, "ip -s -j link show eth0"))
        return {"out": card["stats64"]["tx"]["bytes"], "in": card["stats64"]["rx"]["bytes"]}

    def reaches(self, party: str, *others: str) -> dict[str, list[int]]:
        """Returns the ports of the other parties that accept a connection from this one, of all ports."""
        hosts = [self.address.get(other, other) for other in others]
        scan = self.inside(party, sys.executable, str(Path(__file__).resolve()), *hosts)
        found: dict[str, list[int]] = json.loads(subprocess.run(scan, stdout=subprocess.PIPE, check=True).stdout)
        return {other: found[host] for other, host in zip(others, hosts, strict=True)}

    # --- inner parts ---

    def _hold(self, name: str, how: list[str]) -> None:
        """Starts a process that keeps a namespace by waiting for an input that never comes."""
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        try:
            holder = subprocess.Popen([*how, "sh", "-c", "echo; exec cat"], text=True, **pipes)
        except OSError as error:
            raise NoNetworkError(str(error)) from error
        assert holder.stdout and holder.stderr
        if not holder.stdout.readline():
            raise NoNetworkError(f"`{' '.join(how[-3:])}`: {holder.communicate()[1].strip()}")
        self._holders[name] = holder

    def _do(self, party: str, command: str) -> str:
        try:
            done = subprocess.run(self.inside(party, *command.split()), capture_output=True, text=True)
        except OSError as error:
            raise NoNetworkError(str(error)) from error
        if done.returncode:
            raise NoNetworkError(f"`{command}`: {done.stderr.strip()}")
        return done.stdout


def why_not() -> str | None:
    """Returns why this machine does not allow such a network, found by making one, or None if it does."""
    try:
        with Network(["one", "other"]) as net:
            net.connections("one")
            net.card_bytes("one")
    except NoNetworkError as error:
        return str(error)
    return None


def open_ports(host: str) -> list[int]:
    found = []
    for port in range(1, PORTS + 1):
        with socket.socket() as probe:
            probe.settimeout(2.0)
            with suppress(OSError):
                probe.connect((host, port))
                if probe.getsockname() != probe.getpeername():  # its own port, by chance
                    found.append(port)
    return found


if __name__ == "__main__":
    print(json.dumps({host: open_ports(host) for host in sys.argv[1:]}))
