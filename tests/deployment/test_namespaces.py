"""The network of benchmarks/federation/namespaces.py: own addresses, a door's certificate for one, a cable pulled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedsb.deployment.federation import create_federation
from fedsb.deployment.join_file import read_join_file

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "federation"))
from namespaces import Network, why_not

DOOR = """
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1], sys.argv[2])
door = context.wrap_socket(socket.create_server(("0.0.0.0", 9443)), server_side=True)
print("open", flush=True)
while True:
    print(door.accept()[1][0], flush=True)
"""
KNOCK = """
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[2])
with socket.create_connection((sys.argv[1], 9443), 1.0) as plain:
    context.wrap_socket(plain, server_hostname=sys.argv[1])
"""
LISTEN = "import socket; door = socket.create_server(('127.0.0.1', 9000)); print(flush=True); input()"
REACH = "import socket; socket.create_connection(({host!r}, 9000), 1.0)"


def test_sites_reach_the_door_from_their_own_addresses_and_nothing_else(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(f"this machine does not allow network namespaces: {reason}")
    with Network(["co", "a", "b"]) as net:
        joins = {path.stem: path for path in create_federation(tmp_path, ["a", "b"], [net.address["co"]])}
        assert read_join_file(joins["a"]).address == "10.77.0.1:9443"
        assert net.routes("a") == ["10.77.0.0/24 dev eth0 proto kernel scope link src 10.77.0.2"]
        keys = [str(tmp_path / "server.pem"), str(tmp_path / "server.key")]
        door = net.inside("co", sys.executable, "-c", DOOR, *keys)
        local = net.inside("co", sys.executable, "-c", LISTEN)
        pipe = subprocess.PIPE
        with (
            subprocess.Popen(door, stdout=pipe, text=True) as opened,
            subprocess.Popen(local, stdin=pipe, stdout=pipe) as inner,
        ):
            assert opened.stdout and inner.stdout
            assert opened.stdout.readline() == "open\n" and inner.stdout.readline()

            def knocks(site: str) -> bool:
                command = net.inside(site, sys.executable, "-c", KNOCK, net.address["co"], str(tmp_path / "ca.pem"))
                return subprocess.run(command, capture_output=True).returncode == 0

            def reaches(site: str, host: str) -> bool:
                command = net.inside(site, sys.executable, "-c", REACH.format(host=host))
                return subprocess.run(command, capture_output=True).returncode == 0

            assert knocks("a") and opened.stdout.readline() == "10.77.0.2\n"
            assert knocks("b") and opened.stdout.readline() == "10.77.0.3\n"
            assert reaches("co", "127.0.0.1")  # what the coordinator has on its loopback
            assert not reaches("a", "127.0.0.1") and not reaches("a", net.address["co"])
            net.cut("a")
            assert not knocks("a") and knocks("b")
            net.mend("a")
            assert knocks("a")
            opened.terminate()
