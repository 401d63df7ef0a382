"""The HTTP server of ``serve``: routes, addresses, names of the host."""

from __future__ import annotations

import dataclasses
import gzip
import http.client
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvmtrace.errors import KvmtraceError, UsageError
from kvmtrace.events import Owner
from kvmtrace.model import Incident, IncidentStatus, Snapshot, VmIdentity
from kvmtrace.views.web.listening import parse_listen
from kvmtrace.views.web.server import Server
from tests.exporter_scenario import START, Scenario
from tests.unit import serving
from tests.unit.snapshots import vm
from tests.unit.web_client import Fake, ask


def test_metrics_parse(server: Server) -> None:
    response, body = ask(server, "/metrics")
    assert response.status == 200
    assert response.getheader("Content-Type", "").startswith("text/plain")
    names = {family.name for family in text_string_to_metric_families(body.decode())}
    assert "kvmtrace_memory_fault_exits" in names
    assert "process_cpu_seconds" in names
    assert b"_created" not in body.replace(b"process_", b"")


def test_metrics_in_openmetrics_and_gzip(server: Server) -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0", "Accept-Encoding": "gzip"}
    response, body = ask(server, "/metrics?name[]=x", **accept)
    assert response.getheader("Content-Type", "").startswith("application/openmetrics-text")
    assert response.getheader("Content-Encoding") == "gzip"
    plain = gzip.decompress(body)
    assert plain.endswith(b"# EOF\n")
    assert (
        b'kvmtrace_memory_fault_exits_total{cause="hwpoison",errno="EHWPOISON",vm="web"}' in plain
    )


@pytest.mark.parametrize("path", ["/metric", "/metrics/", "/events", "/favicon.ico", "/../x"])
def test_anything_else_is_not_found(server: Server, path: str) -> None:
    assert ask(server, path)[0].status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_only_get_and_head(server: Server, method: str) -> None:
    response, _ = ask(server, "/metrics", method)
    assert response.status == 405
    assert response.getheader("Allow") == "GET, HEAD"


@pytest.mark.parametrize("path", ["/", "/metrics", "/-/healthy"])
def test_head_is_get_without_the_body(server: Server, path: str) -> None:
    response, body = ask(server, path, "HEAD")
    assert response.status == 200
    assert int(response.getheader("Content-Length", "0")) > 0
    assert body == b""


def test_healthy(server: Server) -> None:
    response, body = ask(server, "/-/healthy")
    assert (response.status, body) == (200, b"kvmtrace is healthy\n")


def test_a_dead_source_over_http() -> None:
    def dead() -> Snapshot:
        raise KvmtraceError("the kernel <took> it away", "hint")

    server = serving.serve("127.0.0.1:0", Fake(dead))
    try:
        response, body = ask(server, "/-/healthy")
        assert response.status == 503
        assert body == b"not healthy: the kernel <took> it away\n"
        response, body = ask(server, "/metrics")
        assert response.status == 200
        assert b'kvmtrace_scrape_collector_success{collector="snapshot"} 0.0' in body
        assert b"kvmtrace_build_info{" in body
        response, body = ask(server, "/")
        assert response.status == 503
        assert b"&lt;took&gt;" in body
    finally:
        server.close()


def test_the_page_tells_the_story_and_escapes_it() -> None:
    evil = vm(7, "<script>alert(1)</script>", exits={("EFAULT", None): 1})
    story = Scenario().begin().happen().snapshot()
    both = dataclasses.replace(story, vms={**story.vms, 7: evil})
    server = serving.serve("127.0.0.1:0", Fake(lambda: both))
    try:
        response, body = ask(server, "/")
    finally:
        server.close()
    page = body.decode()
    assert response.getheader("Content-Type") == "text/html; charset=utf-8"
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    for word in (
        "host1",
        "6.18.0-test",
        "bpf works here",
        "looping",
        ">web</a>",
        "abc123-1",
    ):
        assert word in page
    assert page.index("looping") < page.index("latent")


def test_the_page_names_an_owner_that_is_gone() -> None:
    """Also one whose VM the model has forgotten, its incident not."""
    party = VmIdentity(9, 4009, "mail", gone_ts=START)
    story = Scenario().begin().snapshot()
    owners = (Owner(9, 0x77), Owner(10, 0x78))
    lost = Incident(
        "1f-1", IncidentStatus.CLOSED, 0x1F, "a", "b", START, owners, vm_identities={9: party}
    )
    server = serving.serve(
        "127.0.0.1:0", Fake(lambda: dataclasses.replace(story, incidents=(lost,)))
    )
    try:
        page = ask(server, "/")[1].decode()
    finally:
        server.close()
    assert "mail +1" in page


def test_idle_clients_do_not_hold_up_a_scrape(server: Server) -> None:
    idle = [socket.create_connection(server.address) for _ in range(20)]
    idle[0].sendall(b"GET /metrics HTT")
    try:
        assert ask(server, "/metrics")[0].status == 200
        # They are still connected: nobody was thrown out to make room.
        for one in idle:
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.recv(1)
    finally:
        for one in idle:
            one.close()


def test_port_in_use_is_one_line_with_a_hint(server: Server) -> None:
    listen = f"127.0.0.1:{server.address[1]}"
    with pytest.raises(KvmtraceError, match=rf"^cannot listen on {listen}: port in use$") as error:
        serving.serve(listen, Scenario())
    assert "--listen" in error.value.hint
    assert error.value.exit_status == 1


def test_close_frees_the_port_and_may_be_called_twice() -> None:
    server = serving.serve("127.0.0.1:0", Scenario())
    server.close()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.address)


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(KvmtraceError, match="not an address of this host"):
        serving.serve("192.0.2.1:0", Scenario())


OTHERS = ("evil.example", "evil.example:9750", "localhost.evil.example", "127.0.0.1.evil.example")
OURS = ("localhost", "LOCALHOST:9750", "localhost.", "a.localhost:1", "127.0.0.1:80", "[::1]:9750")


@pytest.mark.parametrize("path", ["/metrics", "/-/healthy", "/", "/nothing"])
@pytest.mark.parametrize("host", OTHERS)
def test_on_loopback_it_is_not_asked_for_by_other_names(
    server: Server, host: str, path: str
) -> None:
    """A page whose own name resolves to 127.0.0.1 may read what it asks for (DNS rebinding)."""
    response, body = ask(server, path, Host=host)
    assert response.status == 421
    assert b"--allow-host" in body


@pytest.mark.parametrize("host", [*OURS, socket.gethostname()])
def test_on_loopback_it_is_asked_for_by_its_own_names(server: Server, host: str) -> None:
    assert ask(server, "/metrics", Host=host)[0].status == 200


def test_two_hosts_are_refused(server: Server) -> None:
    with socket.create_connection(server.address, timeout=20) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\n\r\n")
        assert client.makefile("rb").readline().split()[1] == b"400"


def test_names_given_are_its_own() -> None:
    server = serving.serve("localhost:0", Scenario(), names=("Metrics.example",))
    try:
        for host, status in (("metrics.example:443", 200), ("other.example", 421)):
            assert ask(server, "/-/healthy", Host=host)[0].status == status
    finally:
        server.close()


def test_who_listens_for_others_is_asked_for_by_any_name() -> None:
    server = serving.serve(":0", Scenario())
    try:
        with socket.create_connection(("127.0.0.1", server.address[1]), timeout=20) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: kvm-host.example\r\n\r\n")
            assert client.makefile("rb").readline().split()[1] == b"200"
    finally:
        server.close()


def test_no_answer_says_what_serves_it(server: Server) -> None:
    for path in ("/metrics", "/", "/nothing"):
        assert ask(server, path)[0].getheader("Server") is None


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize(("listen", "host"), [("[::1]:0", "::1"), (":0", "127.0.0.1")])
def test_ipv6_and_every_address(listen: str, host: str) -> None:
    server = serving.serve(listen, Scenario())
    try:
        connection = http.client.HTTPConnection(host, server.address[1], timeout=20)
        connection.request("GET", "/-/healthy")
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        server.close()


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:9750", ("127.0.0.1", 9750)),
        ("9750", ("127.0.0.1", 9750)),
        ("localhost:0", ("localhost", 0)),
        (":9750", ("", 9750)),
        ("[::1]:9750", ("::1", 9750)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
    ],
)
def test_listen(listen: str, expected: tuple[str, int]) -> None:
    assert parse_listen(listen) == expected


@pytest.mark.parametrize(
    "listen",
    " |٩٧٥٠|-1|65536|host|host:|host:http|host:65536|host:-1|host:+1|host:٩٧٥٠|host:1:2|a b:1|"
    "u@h:1|::1:9750|[::1]|[]:1|[host]:1|http://host:1".split("|"),
)
def test_listen_on_nonsense(listen: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_listen(listen)
    assert "\n" not in error.value.message
    assert "127.0.0.1:9750" in error.value.hint
