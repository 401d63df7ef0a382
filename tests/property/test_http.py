"""Damaged requests to the exporter: each is answered or dropped, and the next is answered."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import re
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from kvmtrace.errors import UsageError
from kvmtrace.session.session import Session
from kvmtrace.views.web import pages
from kvmtrace.views.web import server as server_module
from kvmtrace.views.web.listening import parse_listen
from kvmtrace.views.web.server import Server
from kvmtrace.views.web.web_config import read_web_config
from tests.property import examples
from tests.property.damage import TOKENS, damaged
from tests.property.test_recordings import unfit
from tests.unit import serving
from tests.unit.fake import STORY, FakeSource

SECONDS = 120.0
"""Nothing here is slow on purpose: only a machine that has no time for us is."""

HEALTHY = b"GET /-/healthy?x=1 HTTP/1.1\nHost: localhost\n\n"
REQUESTS = [
    b"GET /metrics HTTP/1.1\r\nHost: localhost:9750\r\nUser-Agent: Prometheus/3.5\r\nAccept: "
    b"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;"
    b"version=0.0.4;q=0.3,*/*;q=0.2\r\nAccept-Encoding: gzip\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost:9750\r\nAccept: text/html\r\n\r\n",
    b"GET /incident/103275-1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /incident/<b>\xff%0a\xc2\x85 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"HEAD /-/healthy HTTP/1.0\r\n\r\n",
    HEALTHY,
    b"GET /metrics HTTP/1.0\r\nAccept-Encoding: gzip;q=0, identity\r\n\r\n",
    b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
]
WORDS = (
    *(
        b"\r\n",
        b"\n\n",
        b"\r\n\r\n",
        b"\r\n ",
        b"GET ",
        b"HTTP/9.9",
        b"%0d%0aX-Evil:%201",
        b"http://x/",
    ),
    *(b"X-Evil: 1\r\n", b"Accept: application/openmetrics-text; version=x\r\n", b"Host: \x00\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"a" * 9000, b"Accept: " + b",;" * 2000 + b"\r\n"),
)
HEAD = re.compile(
    rb"HTTP/1\.1 (?P<status>\d{3}) [A-Za-z ]+\r\n"
    rb"(?P<fields>(?:[A-Za-z-]+: [ -~]*\r\n)+)\r\n(?P<body>.*)",
    re.DOTALL,
)
FIELDS = {
    *("Content-Type", "Content-Length", "Connection", "X-Content-Type-Options"),
    *("Content-Security-Policy", "Content-Encoding", "Allow"),
}
STATUS = {200, 400, 404, 405, 421, 431}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    session = Session(FakeSource(STORY))
    session.pump(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "HEAD_SECONDS", SECONDS)
        patch.setattr(server_module, "ANSWER_SECONDS", SECONDS)
        patch.setattr(pages, "STALE_SECONDS", 1e9)  # nobody reads it any more
        running = serving.serve("127.0.0.1:0", session)
        yield running
        running.close()
    session.close()


def ask(server: Server, request: bytes) -> bytes:
    """The whole answer; b"" if the connection was closed."""
    with socket.create_connection(server.address, timeout=SECONDS) as client:
        try:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server has closed the connection
        answer = b""
        try:
            while more := client.recv(1 << 16):
                answer += more
        except ConnectionError:
            pass
        return answer


def check(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Parse an answer, which must be complete: (status, headers, body)."""
    head = HEAD.fullmatch(answer)
    assert head is not None, answer[:300]
    lines = head["fields"].decode("ascii").splitlines()
    fields = dict(line.split(": ", 1) for line in lines)
    assert len(fields) == len(lines)
    assert set(fields) <= FIELDS
    assert int(head["status"]) in STATUS
    assert len(head["body"]) in (0, int(fields["Content-Length"]))
    return int(head["status"]), fields, head["body"]


@given(request_=damaged(REQUESTS, (*TOKENS, *WORDS)))
@examples(150)
def test_a_request_is_answered_or_dropped(server: Server, request_: bytes) -> None:
    noise = io.StringIO()
    with contextlib.redirect_stderr(noise):
        answer = ask(server, request_)
        again = ask(server, HEALTHY)
    assert noise.getvalue() == ""
    head = request_.lstrip(b"\r\n")
    if answer:
        status, fields, body = check(answer)
        if fields.get("Content-Encoding"):
            body = gzip.decompress(body)
        text = body.decode()
        assert not unfit(text)
        if body and status == 200 and "openmetrics" in fields["Content-Type"]:
            assert list(openmetrics_families(text))  # type: ignore[no-untyped-call]
        elif body and status == 200 and "version=0.0.4" in fields["Content-Type"]:
            assert list(text_string_to_metric_families(text))
    else:
        # What never ends its head is dropped; whatever does has an answer.
        assert b"\r\n\r\n" not in head[:4096]
    status, _, body = check(again)
    assert (status, body) == (200, b"kvmtrace is healthy\n")


@given(
    text=damaged(
        [
            b"tls_server_config:\n  cert_file: a\n  key_file: b\n  curve_preferences: [X25519]"
            b"\n  client_auth_type: RequireAndVerifyClientCert\n  client_allowed_sans: [a]\n",
            b"http_server_config:\n  http2: true\n  headers:\n    X-Frame-Options: deny\n",
            b"basic_auth_users:\n  a: $2y$10$"
            + b"a" * 53
            + b"\nrate_limit: {interval: 1s, burst: 2}",
        ],
        (b"&a ", b"*a", b"!!python/object:os.system", b"? ", b": ", b"- ", b"|\n", b"\t", b"<<: "),
    )
)
@examples(100)
def test_a_web_configuration_is_taken_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "web.yml"
    path.write_bytes(text)
    message = ""
    try:
        read_web_config(str(path))
    except UsageError as error:
        message = error.message
    assert "\n" not in message
    assert not unfit(message)


@given(listen=st.text(max_size=30) | damaged([b"[::1]:9750", b"127.0.0.1:0", b":1"]).map(str))
@examples(100)
def test_where_to_listen_is_understood_or_refused(listen: str) -> None:
    try:
        host, port = parse_listen(listen)
    except UsageError:
        return
    assert 0 <= port < 65536
    assert not set(host) & set("[]/ @")


def test_an_answer_is_read_by_a_client(server: Server) -> None:
    """``check`` accepts what a real client does."""

    class Sent(io.BytesIO):
        def makefile(self, _mode: str) -> Sent:
            return self

    answer = ask(server, REQUESTS[0])
    response = http.client.HTTPResponse(Sent(answer))  # type: ignore[arg-type]
    response.begin()
    status, fields, body = check(answer)
    assert (response.status, response.read()) == (status, body)
    assert b"kvmtrace_build_info" in gzip.decompress(body)
    assert fields["Content-Encoding"] == "gzip"
