"""Commands that kvmtrace prints, typed into a shell against what the VMMs' documents accept.

No package of Debian's has Cloud Hypervisor or Firecracker. What answers here takes exactly the
requests of cloud-hypervisor's vmm/src/api/openapi/cloud-hypervisor.yaml (2026-08: a PUT without a
body, which http_endpoint.rs would refuse) and of firecracker's swagger/firecracker.yaml (2026-08: a
PUT with an InstanceActionInfo as JSON). The lab types the other commands: see docs/runbook.md.
"""

from __future__ import annotations

import json
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from kvmtrace.judgement import commands
from kvmtrace.model import VmIdentity

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")


class _Server(socketserver.ThreadingUnixStreamServer):
    """``answers``: the statuses of all answers."""

    def __init__(self, path: Path) -> None:
        self.answers: list[int] = []
        super().__init__(str(path), _Api)


class _Api(BaseHTTPRequestHandler):
    """Both APIs; each has its own paths."""

    server: _Server
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/v1/vm.power-button":
            status = 500 if body or "Content-Length" in self.headers else 204
        elif self.path == "/actions":
            is_json = self.headers.get("Content-Type") == "application/json"
            known = is_json and json.loads(body) == {"action_type": "SendCtrlAltDel"}
            status = 204 if known else 400
        else:
            status = 404
        self.server.answers.append(status)
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def _serving(path: Path) -> Iterator[list[int]]:
    """Serve the APIs on a socket; yield the statuses of the answers."""
    with _Server(path) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.answers
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("vmm", ["cloud-hypervisor", "firecracker"])
def test_an_api_takes_the_request_to_shut_down(vmm: str, tmp_path: Path) -> None:
    socket = tmp_path / "web 1's.sock"
    (command,) = commands.shut_down(
        VmIdentity(1, 900, "web-1", None, vmm, api_socket=str(socket))
    ).lines
    with _serving(socket) as answers:
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60
        )
    assert (done.returncode, answers) == (0, [204]), done.stderr


def test_a_unit_is_started_once_its_vmm_has_ended(tmp_path: Path) -> None:
    """`systemctl start` does nothing while the unit still runs."""
    guest = subprocess.Popen(["sleep", "600"])
    identity = VmIdentity(
        1,
        guest.pid,
        "web-1",
        None,
        "cloud-hypervisor",
        unit="vm@web-1.service",
        api_socket=str(tmp_path / "sock"),
    )
    try:
        _, start = commands.shut_down(identity).lines
        assert start.endswith(" && systemctl start vm@web-1.service")
        wait = start.removesuffix(" && systemctl start vm@web-1.service")
        waiting = subprocess.Popen(["sh", "-c", f"{wait} && echo gone"], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.2)
        guest.kill()
        guest.wait()
        assert waiting.communicate(timeout=60)[0] == b"gone\n"
    finally:
        guest.kill()
        guest.wait()
