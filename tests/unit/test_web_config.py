"""--web.config.file: what exporters take works, what they refuse is refused, and who gets in."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import bcrypt
import pytest

from kvmtrace.errors import UsageError
from kvmtrace.views.web import basic_auth, security
from kvmtrace.views.web.listening import listening_at
from kvmtrace.views.web.pages import Pages
from kvmtrace.views.web.security import Security
from kvmtrace.views.web.server import Server, no_drops, tcp_listener
from kvmtrace.views.web.web_config import read_web_config
from tests import prometheus
from tests.exporter_scenario import Scenario
from tests.unit.certificates import Certificates
from tests.unit.command_line import invoke
from tests.unit.waiting import until

HASH = "$2b$04$3hb1A1k1R1tivsAucEk9Z.CYQBPd4IWASKnGL6SiHnhIEoEYzZqce"  # "the right one"
HTPASSWD = HASH.replace("$2b$", "$2y$")  # as htpasswd -B writes it


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def web(certificates: Certificates, tmp_path: Path) -> Path:
    """A directory with certificates, for a file that names them without a directory."""
    for path in certificates.directory.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / "web.yml"


Secured = Callable[[str], Server]


@pytest.fixture
def secured(web: Path) -> Iterator[Secured]:
    """Start a server with a text as its configuration."""
    with contextlib.ExitStack() as ending:

        def start(text: str) -> Server:
            web.write_text(text)
            dropped = no_drops()
            pages = Pages(Scenario().begin().happen(), dropped)
            guard = Security(str(web), said.append)
            listening = listening_at("127.0.0.1:0")
            server = Server([tcp_listener(listening, pages.routes(), (), guard)], dropped)
            ending.callback(server.close)
            return server

        yield start


said: list[str] = []


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    said.clear()


def trusting(web: Path, certificate: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(web.parent / "ca.pem"))
    if certificate is not None:
        context.load_cert_chain(
            web.parent / f"{certificate}.pem", web.parent / f"{certificate}.key"
        )
    return context


def ask(
    server: Server,
    context: ssl.SSLContext | None = None,
    login: str | None = None,
    path: str = "/metrics",
) -> tuple[int, dict[str, str]]:
    """(status, headers); an SSLError or OSError without a connection."""
    request = urllib.request.Request(server.url + path)
    if login is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=20, context=context) as answer:
            assert answer.read()
            return answer.status, dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers)


DOCS = Path(__file__).parents[2] / "docs/service.md"
TLS = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n"
USERS = f"basic_auth_users:\n  prometheus: {HTPASSWD}\n"
VERIFIED = f"{TLS}  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n"

# The sample of exporter-toolkit's documentation, with its comments left out and its files ours.
SAMPLE = f"""
tls_server_config:
  cert_file: "server.pem"
  key_file: "server.key"
  client_auth_type: "NoClientCert"
  min_version: "TLS12"
  max_version: "TLS13"
  cipher_suites:
    - TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
    - TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384
  prefer_server_cipher_suites: true
  curve_preferences:
    - CurveP256
http_server_config:
  http2: true
  headers:
    X-Frame-Options: deny
    X-Content-Type-Options: nosniff
    Strict-Transport-Security: max-age=31536000
    X-XSS-Protection: ""
basic_auth_users:
  alice: {HTPASSWD}
  bob: {HASH}
"""


# -- the format

RIGHT = {
    "": "",
    "tls_server_config:\n": "",
    "tls_server_config: {}\nhttp_server_config: {}\nbasic_auth_users: {}\n": "",
    TLS: "",
    SAMPLE: "",
    USERS: "",
    VERIFIED: "",
    f"{TLS}  client_auth_type: RequestClientCert\n": "",
    f"{TLS}  client_auth_type: VerifyClientCertIfGiven\n": "",
    f"{TLS}  min_version: TLS13\n": "",
    f"{TLS}  prefer_server_cipher_suites: false\n  curve_preferences: [X25519, CurveP384]\n": "",
    f"{TLS}  cipher_suites: [TLS_AES_128_GCM_SHA256]\n": "",
    "http_server_config:\n  http2: false\n": "",
}
WRONG = {
    "foo: 1\n": "unknown field 'foo'",
    "[]\n": "the file: not a mapping",
    f"{USERS}{USERS}": "line 3: 'basic_auth_users' stands there twice",
    "a: b: c\n": "line 1: mapping values are not allowed",
    "tls_server_config:\n  cert_file: server.pem\n": "missing key_file",
    "tls_server_config:\n  key_file: server.key\n": "missing cert_file",
    "tls_server_config: [a]\n": "tls_server_config: not a mapping",
    f"{TLS}  certfile: x\n": "unknown field 'certfile'",
    f"{TLS}  min_version: SSL3\n": "unknown TLS version: 'SSL3'",
    f"{TLS}  cipher_suites: [FOO]\n": "unknown cipher: 'FOO'",
    f"{TLS}  cipher_suites: FOO\n": "cipher_suites: not a list",
    f"{TLS}  curve_preferences: [Foo]\n": "unknown curve: 'Foo'",
    f"{TLS}  client_auth_type: Bogus\n": "unknown client_auth_type: 'Bogus'",
    f"{TLS}  client_ca_file: ca.pem\n": "client_ca_file has no effect",
    f"{TLS}  client_auth_type: [a]\n": "client_auth_type: not a text",
    TLS.replace("server.pem", "none.pem"): "none.pem: No such file or directory",
    TLS.replace("server.pem", "server.key"): "server.key: no ",
    TLS.replace("server.key", "client.key"): "key values mismatch",
    "http_server_config:\n  headers:\n    X-Foo: deny\n": "the header 'X-Foo' cannot be set",
    "http_server_config:\n  headers:\n    X-Frame-Options: x\n": "'x' is not deny or sameorigin",
    "http_server_config:\n  http2: maybe\n": "http2: neither true nor false",
    "basic_auth_users:\n  alice: secret\n": "the password of 'alice' is no bcrypt hash",
    "basic_auth_users: [a]\n": "basic_auth_users: not a mapping",
}
# promtool of Debian's Prometheus does not know, or does not refuse, what is here.
OURS = {
    f"{TLS}  client_auth_type: RequireAnyClientCert\n": "proves nothing",
    f"{TLS}  client_allowed_sans: [a]\n": "client_allowed_sans needs client_auth_type",
    f"{VERIFIED}".replace("ca.pem", "ca.key"): "ca.key: no certificates",
    f"{VERIFIED}".replace("ca.pem", "none.pem"): "none.pem: No such file",
    'http_server_config:\n  headers:\n    X-XSS-Protection: "a\\r\\nb"\n': "not printable",
    "rate_limit: {interval: soon, burst: 2}\n": "interval 'soon' is no duration",
    "rate_limit: {interval: 1s, burst: -2}\n": "burst -2 is no number",
    "rate_limit: {interval: 1s, rate: 2}\n": "unknown field 'rate'",
    "[" * 2_000: "nested too deeply",
    "\0": "not YAML",
}


@pytest.mark.parametrize(("text", "why"), [*RIGHT.items(), *WRONG.items(), *OURS.items()])
def test_a_file_is_taken_or_one_line_says_why(web: Path, text: str, why: str) -> None:
    web.write_text(text)
    if not why:
        Security(str(web), said.append)
        return
    with pytest.raises(UsageError) as error:
        Security(str(web), said.append)
    assert error.value.message.startswith(f"{web}: ")
    assert why in error.value.message
    assert "\n" not in error.value.message
    assert error.value.exit_status == 2


@pytest.mark.skipif(
    shutil.which("promtool") is None and os.environ.get("CI") != "true",
    reason="no promtool here (apt install prometheus)",
)
def test_promtool_agrees(web: Path) -> None:
    paths = []
    for number, text in enumerate((*RIGHT, *WRONG)):
        path = web.with_name(f"{number}.yml")
        path.write_text(text)
        paths.append(str(path))
    done = subprocess.run(
        ["promtool", "check", "web-config", *paths], capture_output=True, text=True, check=False
    )
    lines = (done.stdout + done.stderr).splitlines()
    taken = {path for path in paths if f"{path} SUCCESS" in lines}
    assert taken == set(paths[: len(RIGHT)])


def test_serve_ends_with_one_line(web: Path) -> None:
    web.write_text("tls_server_config: {cert_file: none.pem, key_file: server.key}")
    for path, why in ((str(web), "none.pem: No such file"), (f"{web}x", "No such file")):
        result = invoke("serve", "--listen", "127.0.0.1:0", "--web.config.file", path)
        assert result.exit_code == 2
        first, hint = result.stderr.splitlines()
        assert why in first
        assert hint == f"hint: `promtool check web-config {path}` checks it, too"


def test_what_the_docs_show(web: Path) -> None:
    shown = re.search(r"^```yaml\n(tls_.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    assert shown
    shutil.copy(web.parent / "ca.pem", web.parent / "clients.pem")
    web.write_text(shown[1].replace("$2y$10$…", HTPASSWD))
    config = Security(str(web), said.append)
    assert config.context is not None
    assert config.context.verify_mode == ssl.CERT_REQUIRED


def test_pem_in_the_file(web: Path) -> None:
    pem = {name: (web.parent / name).read_text() for name in ("server.pem", "server.key", "ca.pem")}
    lines = {
        field: text.replace("\n", "\n    ")
        for field, text in zip(("cert", "key", "client_ca"), pem.values(), strict=True)
    }
    web.write_text(
        "tls_server_config:\n  client_auth_type: RequireAndVerifyClientCert\n"
        + "".join(f"  {field}: |\n    {text}\n" for field, text in lines.items())
    )
    assert Security(str(web), said.append).context is not None


def test_paths_are_relative_to_the_file(web: Path) -> None:
    web.write_text(TLS)
    tls = read_web_config(str(web)).tls
    assert tls is not None
    assert tls.cert_file == str(web.parent / "server.pem")


# -- TLS


def test_tls(secured: Secured, web: Path) -> None:
    server = secured(SAMPLE)
    assert server.url.startswith("https://127.0.0.1:")
    status, headers = ask(server, trusting(web), "alice:the right one")
    assert (status, headers["X-Frame-Options"]) == (200, "deny")
    assert "max-age" in headers["Strict-Transport-Security"]
    assert "X-XSS-Protection" not in headers
    # Neither in plain HTTP nor for one who trusts others.
    with socket.create_connection(server.address, timeout=20) as plain:
        plain.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"HTTP" not in plain.recv(100)
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(server, ssl.create_default_context())


def test_versions(secured: Secured, web: Path) -> None:
    server = secured(f"{TLS}  min_version: TLS13\n")
    old = trusting(web)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(urllib.error.URLError):
        ask(server, old)
    assert ask(server, trusting(web))[0] == 200


def test_ciphers_are_those_named(secured: Secured, web: Path) -> None:
    cipher = "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"
    server = secured(f"{TLS}  max_version: TLS12\n  cipher_suites: [{cipher}]\n")
    with (
        socket.create_connection(server.address, timeout=20) as plain,
        trusting(web).wrap_socket(plain, server_hostname="localhost") as client,
    ):
        assert client.cipher() == ("ECDHE-ECDSA-CHACHA20-POLY1305", "TLSv1.2", 256)


@pytest.mark.parametrize(
    ("extra", "certificate", "enters"),
    [
        ("", "client", True),
        ("", None, False),
        ("", "other", False),
        ("  client_allowed_sans: [x, prometheus.example]\n", "client", True),
        ("  client_allowed_sans: [oncall@example.org]\n", "client", True),
        ("  client_allowed_sans: [example]\n", "client", False),
    ],
)
def test_client_certificates(
    secured: Secured, web: Path, extra: str, certificate: str | None, enters: bool
) -> None:
    server = secured(VERIFIED + extra)
    if enters:
        assert ask(server, trusting(web, certificate))[0] == 200
    else:
        with pytest.raises(OSError, match=r"."):
            ask(server, trusting(web, certificate))
    assert ask(server, trusting(web, "client"))[0] == 200 if not extra else True


def test_a_certificate_if_given(secured: Secured, web: Path) -> None:
    server = secured(VERIFIED.replace("RequireAndVerifyClientCert", "VerifyClientCertIfGiven"))
    assert ask(server, trusting(web))[0] == 200
    with pytest.raises(OSError, match=r"."):
        ask(server, trusting(web, "other"))


# -- basic auth


@pytest.mark.parametrize("path", ["/", "/metrics", "/-/healthy", "/-/ready", "/no", "/incident/1"])
def test_nothing_without_the_password(secured: Secured, path: str) -> None:
    status, headers = ask(secured(USERS), None, None, path)
    assert (status, headers["WWW-Authenticate"]) == (401, "Basic")


@pytest.mark.parametrize(
    ("login", "status"),
    [
        ("prometheus:the right one", 200),
        ("prometheus:the wrong one", 401),
        ("prometheus:", 401),
        ("prometheus", 401),
        (":the right one", 401),
        ("nobody:the right one", 401),
        (f"prometheus:{HTPASSWD}", 401),
        ("prometheus:the right one\0", 401),
        ("prometheus:" + "x" * 200, 401),
    ],
)
def test_passwords(secured: Secured, login: str, status: int) -> None:
    server = secured(USERS)
    for _ in range(2):  # also once it is known
        assert ask(server, None, login)[0] == status


def test_of_a_long_password_bcrypt_takes_the_beginning(secured: Secured) -> None:
    hashed = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode()
    server = secured(f"basic_auth_users:\n  a: {hashed}\n")
    assert ask(server, None, "a:" + "x" * 80)[0] == 200
    assert ask(server, None, "a:" + "x" * 71)[0] == 401


@pytest.mark.parametrize("sent", ["Basic ???", "Basic", "Bearer x", "Basic é", "Basic Og=="])
def test_what_is_no_login(secured: Secured, sent: str) -> None:
    server = secured(USERS)
    with socket.create_connection(server.address, timeout=20) as client:
        request = f"GET / HTTP/1.0\r\nAuthorization: {sent}\r\n\r\n"
        client.sendall(request.encode("utf-8"))
        assert client.recv(100).split()[1] == b"401"


def test_guesses_hold_up_nobody_who_was_right(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparisons are made one at a time; the next ones wait, and further ones are refused."""
    server = secured(USERS)
    assert ask(server, None, "prometheus:the right one")[0] == 200
    monkeypatch.setattr(basic_auth, "MAX_WAITING", 2)
    at_once, most, go = 0, 0, threading.Event()

    def slow(password: bytes, stored: bytes) -> bool:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        go.wait(20)
        at_once -= 1
        return False

    monkeypatch.setattr(bcrypt, "checkpw", slow)
    statuses: list[int] = []
    guessing = [
        threading.Thread(target=lambda n=n: statuses.append(ask(server, None, f"a:{n}")[0]))
        for n in range(4)
    ]
    for thread in guessing:
        thread.start()
    until(lambda: statuses == [503, 503])
    assert ask(server, None, "prometheus:the right one")[0] == 200
    go.set()
    for thread in guessing:
        thread.join()
    assert sorted(statuses) == [401, 401, 503, 503]
    assert most == 1


def test_a_rate_limit(secured: Secured) -> None:
    server = secured("rate_limit: {interval: 1h, burst: 3}\n")
    assert [ask(server)[0] for _ in range(5)] == [200, 200, 200, 429, 429]


@pytest.mark.skipif(
    bool(prometheus.missing("prometheus")) and not prometheus.required(),
    reason=str(prometheus.missing("prometheus")),
)
def test_prometheus_scrapes_with_certificate_and_password(secured: Secured, web: Path) -> None:
    server = secured(VERIFIED + USERS)
    options: dict[str, object] = {
        "scheme": "https",
        "tls_config": {
            "ca_file": str(web.parent / "ca.pem"),
            "cert_file": str(web.parent / "client.pem"),
            "key_file": str(web.parent / "client.key"),
        },
        "basic_auth": {"username": "prometheus", "password": "the right one"},
    }
    with prometheus.Prometheus(server.url.removeprefix("https://"), options=options) as scraper:
        scraper.wait_for_scrapes(1)
        assert scraper.value("kvmtrace_build_info") == 1


# -- files that change


def test_new_certificates_and_users_need_no_restart(
    secured: Secured, web: Path, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "_LOOK_SECONDS", 0)
    server = secured(TLS + USERS)
    assert ask(server, trusting(web), "prometheus:the right one")[0] == 200
    certificates.sign("server2", "DNS:localhost,IP:127.0.0.1")
    for kind in ("pem", "key"):
        shutil.copy(certificates.path(f"server2.{kind}"), web.parent / f"server.{kind}")
    new = ssl.create_default_context(cafile=str(web.parent / "ca.pem"))
    with (
        socket.create_connection(server.address, timeout=20) as plain,
        new.wrap_socket(plain, server_hostname="localhost") as client,
    ):
        assert (("commonName", "server2"),) in (client.getpeercert() or {})["subject"]
    hashed = bcrypt.hashpw(b"new", bcrypt.gensalt(4)).decode()
    web.write_text(f"{TLS}basic_auth_users: {{prometheus: {hashed}}}\n")
    assert ask(server, trusting(web), "prometheus:the right one")[0] == 401
    assert ask(server, trusting(web), "prometheus:new")[0] == 200
    assert said == []


@pytest.mark.parametrize("changed", ["", "foo: 1", TLS, USERS, TLS.replace("pem", "no") + USERS])
def test_a_file_that_became_wrong_changes_nothing(
    secured: Secured, web: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setattr(security, "_LOOK_SECONDS", 0)
    server = secured(TLS + USERS)
    web.write_text(changed)
    for _ in range(2):
        assert ask(server, trusting(web))[0] == 401
        assert ask(server, trusting(web), "prometheus:the right one")[0] == 200
    (line,) = said
    assert line.startswith(f"kvmtrace: {web}: ")
