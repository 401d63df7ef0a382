"""The file of ``--web.config.file``: TLS, client certificates, basic auth, headers, a rate limit.

Its format is that of Prometheus' exporters (github.com/prometheus/exporter-toolkit,
docs/web-configuration.md), and ``promtool check web-config`` checks it, too. What is not in the
format is an error, as there: a misspelt option must not leave a port open.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from kvmtrace.errors import UsageError

CLIENT_AUTH = ("NoClientCert", "RequestClientCert", "VerifyClientCertIfGiven")
VERIFIED = "RequireAndVerifyClientCert"
_UNVERIFIED = ("RequireAnyClientCert", "RequireClientCert")
VERSIONS = ("TLS10", "TLS11", "TLS12", "TLS13")
CURVES = {
    "CurveP256": "prime256v1",
    "CurveP384": "secp384r1",
    "CurveP521": "secp521r1",
    "X25519": "X25519",
}
"""Go's names, and those of OpenSSL."""
# Those that any Go of the last years offers (tls.CipherSuites); of TLS 1.3 they cannot be chosen.
CIPHERS: dict[str, str | None] = {
    "TLS_AES_128_GCM_SHA256": None,
    "TLS_AES_256_GCM_SHA384": None,
    "TLS_CHACHA20_POLY1305_SHA256": None,
}
for _key in ("ECDHE-ECDSA", "ECDHE-RSA", "RSA"):
    for _go, _openssl in (
        ("AES_128_CBC_SHA", "AES128-SHA"),
        ("AES_256_CBC_SHA", "AES256-SHA"),
        ("AES_128_GCM_SHA256", "AES128-GCM-SHA256"),
        ("AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
        ("CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"),
    ):
        if _key != "RSA":
            CIPHERS[f"TLS_{_key.replace('-', '_')}_WITH_{_go}"] = f"{_key}-{_openssl}"
        elif not _go.startswith("CHACHA"):
            CIPHERS[f"TLS_RSA_WITH_{_go}"] = _openssl

# Headers that may be set, and to what; (): to anything.
_HEADERS: dict[str, tuple[str, ...]] = {
    "Strict-Transport-Security": (),
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": (),
    "Content-Security-Policy": (),
}
_BCRYPT = re.compile(r"\$2[a-z]?\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}", re.ASCII)
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+", re.ASCII)
_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)", re.ASCII)
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class TlsSettings:
    """``tls_server_config``. Texts are PEM; paths are absolute, or relative to where we are."""

    cert: str = ""
    key: str = ""
    cert_file: str = ""
    key_file: str = ""
    client_ca: str = ""
    client_ca_file: str = ""
    client_auth_type: str = "NoClientCert"
    client_allowed_sans: tuple[str, ...] | None = None
    min_version: str = "TLS12"
    max_version: str = "TLS13"
    cipher_suites: tuple[str, ...] = ()
    curve_preferences: tuple[str, ...] = ()
    prefer_server_cipher_suites: bool = True

    def files(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.cert_file, self.key_file, self.client_ca_file)))


@dataclass(frozen=True)
class WebConfig:
    """``tls``: None: plain HTTP. ``rate``: (seconds between two requests, burst)."""

    tls: TlsSettings | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    users: Mapping[str, str] = field(default_factory=dict)
    rate: tuple[float, int] | None = None


class _Wrong(Exception):
    """What is wrong with the file."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # a library without types
    """YAML in which no key stands twice, as Go reads it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Wrong(f"line {key.start_mark.line + 1}: a name is expected")
            if key.value in seen:
                line = key.start_mark.line + 1
                raise _Wrong(f"line {line}: {key.value!r} stands there twice")
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def read_web_config(path: str) -> WebConfig:
    """Read the file. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES)
        given = yaml.load(text, _Loader)
        return _config(_mapping(given, "the file"), os.path.dirname(path))
    except OSError as error:
        raise config_error(path, error.strerror or str(error)) from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = "" if where is None else f"line {where.line + 1}: "
        why = getattr(error, "problem", None) or "not YAML"
        raise config_error(path, f"{line}{why}") from None
    except RecursionError:
        raise config_error(path, "nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a date that is none, for instance
        raise config_error(path, f"not YAML: {error}".splitlines()[0]) from None
    except _Wrong as error:
        raise config_error(path, str(error)) from None


def config_error(path: str, why: str) -> UsageError:
    """The error of a file that is wrong."""
    return UsageError(f"{path}: {why}", f"`promtool check web-config {path}` checks it, too")


def _config(given: Mapping[str, Any], directory: str) -> WebConfig:
    _only(given, "tls_server_config", "http_server_config", "basic_auth_users", "rate_limit")
    http = _mapping(given.get("http_server_config"), "http_server_config")
    _only(http, "http2", "headers")
    _bool(http, "http2")
    return WebConfig(
        _tls(_mapping(given.get("tls_server_config"), "tls_server_config"), directory),
        _headers(_texts(http.get("headers"), "headers")),
        _users(_texts(given.get("basic_auth_users"), "basic_auth_users")),
        _rate(_mapping(given.get("rate_limit"), "rate_limit")),
    )


def _tls(given: Mapping[str, Any], directory: str) -> TlsSettings | None:
    _only(given, *TlsSettings.__dataclass_fields__)
    texts = {
        name: _text(given[name], name)
        for name, one in TlsSettings.__dataclass_fields__.items()
        if one.type == "str" and given.get(name) is not None
    }
    for name in ("cert_file", "key_file", "client_ca_file"):
        if texts.get(name):
            texts[name] = os.path.join(directory, texts[name])
    tls = TlsSettings(
        **texts,
        client_allowed_sans=_list(given, "client_allowed_sans"),
        cipher_suites=_list(given, "cipher_suites") or (),
        curve_preferences=_list(given, "curve_preferences") or (),
        prefer_server_cipher_suites=_bool(given, "prefer_server_cipher_suites"),
    )
    _check_tls(tls)
    if not any((tls.cert, tls.key, *tls.files(), tls.client_ca, texts.get("client_auth_type"))):
        return None
    if not (tls.cert or tls.cert_file):
        raise _Wrong("missing cert_file")
    if not (tls.key or tls.key_file):
        raise _Wrong("missing key_file")
    return tls


def _check_tls(tls: TlsSettings) -> None:
    for version in (tls.min_version, tls.max_version):
        if version not in VERSIONS:
            raise _Wrong(f"unknown TLS version: {version!r} (known: {', '.join(VERSIONS)})")
    for cipher in tls.cipher_suites:
        if cipher not in CIPHERS:
            raise _Wrong(f"unknown cipher: {cipher!r}")
    for curve in tls.curve_preferences:
        if curve not in CURVES:
            raise _Wrong(f"unknown curve: {curve!r} (known: {', '.join(CURVES)})")
    kind = tls.client_auth_type
    if kind in _UNVERIFIED:
        # Python's TLS cannot ask for a certificate without verifying it.
        raise _Wrong(f"client_auth_type {kind} proves nothing and is not offered: use {VERIFIED}")
    if kind not in ("", *CLIENT_AUTH, VERIFIED):
        raise _Wrong(f"unknown client_auth_type: {kind!r}")
    if (tls.client_ca or tls.client_ca_file) and kind in ("", "NoClientCert"):
        raise _Wrong(f"client_ca_file has no effect without client_auth_type: {VERIFIED}")
    if tls.client_allowed_sans is not None and kind != VERIFIED:
        raise _Wrong(f"client_allowed_sans needs client_auth_type: {VERIFIED}")


def _headers(given: dict[str, str]) -> dict[str, str]:
    for name, value in given.items():
        if name not in _HEADERS:
            raise _Wrong(f"the header {name!r} cannot be set (possible: {', '.join(_HEADERS)})")
        if not (value.isascii() and value.isprintable()):
            raise _Wrong(f"{name}: not printable ASCII")
        if value and _HEADERS[name] and value not in _HEADERS[name]:
            raise _Wrong(f"{name}: {value!r} is not {' or '.join(_HEADERS[name])}")
    return given


def _users(given: dict[str, str]) -> dict[str, str]:
    for user, password in given.items():
        # The password is not quoted: it may be one that was to be hashed.
        if not _BCRYPT.fullmatch(password):
            raise _Wrong(f"basic_auth_users: the password of {user!r} is no bcrypt hash")
    return given


def _rate(given: Mapping[str, Any]) -> tuple[float, int] | None:
    _only(given, "interval", "burst")
    interval, burst = given.get("interval", 0), given.get("burst", 0)
    if isinstance(burst, bool) or not isinstance(burst, int) or burst < 0:
        raise _Wrong(f"rate_limit: burst {burst!r} is no number of requests")
    if isinstance(interval, str) and _DURATION.fullmatch(interval):
        seconds = sum(float(part) * _UNITS[unit] for part, unit in _PART.findall(interval))
        return (seconds, burst) if seconds else None
    if interval in (0, "0"):
        return None
    raise _Wrong(f"rate_limit: interval {interval!r} is no duration (1s, 100ms)")


# -- types


def _only(given: Mapping[str, Any], *names: str) -> None:
    for name in given:
        if name not in names:
            raise _Wrong(f"unknown field {name!r} (known: {', '.join(names)})")


def _mapping(given: object, name: str) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise _Wrong(f"{name}: not a mapping")
    return given


def _texts(given: object, name: str) -> dict[str, str]:
    return {_text(key, name): _text(text, name) for key, text in _mapping(given, name).items()}


def _text(given: object, name: str) -> str:
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise _Wrong(f"{name}: not a text")
    return str(given)


def _list(given: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    found = given.get(name)
    if found is None:
        return None
    if not isinstance(found, list):
        raise _Wrong(f"{name}: not a list")
    return tuple(_text(one, name) for one in found)


def _bool(given: Mapping[str, Any], name: str) -> bool:
    found = given.get(name, True)
    if not isinstance(found, bool):
        raise _Wrong(f"{name}: neither true nor false")
    return found
