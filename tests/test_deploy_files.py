"""The files in deploy/ are read by their tools, and the command line parses every command in them and in the docs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from fedsb.cli.app import app

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
CLI: Any = typer.main.get_command(app)
PLACEHOLDER = re.compile(r"\bFILE\b|\bNAME\b|\.\.\.")


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    pod = document.get("spec", {}).get("template", {}).get("spec", {})
    return [*pod.get("initContainers", []), *pod.get("containers", [])]


def kubernetes() -> list[dict[str, Any]]:
    return [
        doc for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")) for doc in yaml.safe_load_all(path.read_text())
    ]


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


def commands() -> Iterator[tuple[str, list[str]]]:
    """(where, arguments of fedsb), all of them."""
    for name, service in compose()["services"].items():
        yield f"compose {name}", service["command"]
        if "healthcheck" in service:
            yield f"compose {name} health", _line(service["healthcheck"]["test"][1].partition(">")[0])
    for document in kubernetes():
        for container in containers(document):
            if "args" in container:
                yield f"kubernetes {container['name']}", container["args"]
            if "livenessProbe" in container:
                yield f"kubernetes {container['name']} probe", container["livenessProbe"]["exec"]["command"][1:]
    for unit in sorted((DEPLOY / "systemd").glob("*.service")):
        (start,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.M)
        yield unit.name, shlex.split(start)[1:]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *DEPLOY.rglob("*.yaml"), ROOT / "Dockerfile"]
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        if page.suffix == ".md":
            text = "\n".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S))
        for line in re.findall(r"^(?:#\s*)?(?:    )?\s*(?:\$ )?(fedsb [a-z].*)$", text, re.M):
            if not PLACEHOLDER.search(line):
                yield page.name, _line(line)


def _line(text: str) -> list[str]:
    """A shell's line without its comment, its redirection and what runs after it."""
    words = shlex.split(text, comments=True)
    end = next((i for i, word in enumerate(words) if word[0] in ">&|;"), len(words))
    return words[1:end]


@pytest.mark.parametrize(("where", "arguments"), list(commands()))
def test_every_command_parses(where: str, arguments: list[str]) -> None:
    command, name = CLI, "fedsb"
    while hasattr(command, "commands"):  # a group of commands
        name, *arguments = arguments
        assert name in command.commands, where
        command = command.commands[name]
    command.make_context(name, arguments)


def test_there_are_commands_of_every_kind() -> None:
    found = {where.split()[0] for where, _ in commands()}
    assert {"compose", "kubernetes", "fedsb-coordinator.service", "README.md", "deploy.md"} <= found


def test_kubernetes_containers_are_tight() -> None:
    documents = kubernetes()
    assert {doc["kind"] for doc in documents} >= {
        "Job",
        "Deployment",
        "Service",
        "PersistentVolumeClaim",
        "NetworkPolicy",
    }
    for document in documents:
        for container in containers(document):
            tight = container["securityContext"]
            assert tight["readOnlyRootFilesystem"] and not tight["allowPrivilegeEscalation"]
            assert tight["capabilities"] == {"drop": ["ALL"]}
            named = {volume["name"] for volume in document["spec"]["template"]["spec"]["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= named
        if pod := document.get("spec", {}).get("template", {}).get("spec"):
            assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    (policy,) = (doc for doc in documents if doc["kind"] == "NetworkPolicy")
    assert policy["spec"]["ingress"] == []  # a site is dialled by nobody


def test_a_site_opens_no_port() -> None:
    assert "ports" not in compose()["services"]["site-a"]
    assert not any(
        container.get("ports") for doc in kubernetes() if doc["kind"] == "Deployment" for container in containers(doc)
    )


def test_the_image_takes_no_secret_and_is_no_root() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^USER (.*)$", text, re.M) == ["10001:10001"]
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.M) for name in line.split()}
    assert "*" in ignored and copied == let_in  # nothing else of this folder is even sent to the builder


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_units_are_read_by_systemd(tmp_path: Path) -> None:
    units = []
    for unit in sorted((DEPLOY / "systemd").glob("*.service")):
        path = tmp_path / unit.name
        path.write_text(unit.read_text().replace("/opt/fedsb/bin/fedsb", sys.executable))  # verify wants it to be there
        units.append(str(path))
    found = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")
