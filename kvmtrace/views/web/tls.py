"""A TLS context by the settings of a web configuration."""

from __future__ import annotations

import contextlib
import os
import ssl
import warnings
from collections.abc import Iterator

from kvmtrace.views.web.web_config import CIPHERS, CURVES, VERIFIED, TlsSettings

_VERSIONS = {
    "TLS10": ssl.TLSVersion.TLSv1,
    "TLS11": ssl.TLSVersion.TLSv1_1,
    "TLS12": ssl.TLSVersion.TLSv1_2,
    "TLS13": ssl.TLSVersion.TLSv1_3,
}


def tls_context(settings: TlsSettings) -> ssl.SSLContext:
    """Make a server's context. Raises ValueError with what is wrong, for a person.

    Of several curves, OpenSSL chooses by its own order: Python takes a single one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TLS 1.0 has to be asked for by name
        context.minimum_version = _VERSIONS[settings.min_version]
        context.maximum_version = _VERSIONS[settings.max_version]
    if settings.prefer_server_cipher_suites:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    else:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    if ciphers := [name for one in settings.cipher_suites if (name := CIPHERS[one])]:
        context.set_ciphers(":".join(ciphers))
    if len(settings.curve_preferences) == 1:
        context.set_ecdh_curve(CURVES[settings.curve_preferences[0]])
    context.set_alpn_protocols(["http/1.1"])
    with (
        _as_file("cert_file", settings.cert_file, settings.cert) as certificate,
        _as_file("key_file", settings.key_file, settings.key) as key,
    ):
        try:
            # A key with a passphrase would be asked for on the terminal.
            context.load_cert_chain(certificate, key, password=lambda: b"")
        except (OSError, ValueError) as error:
            names = " and ".join(filter(None, (settings.cert_file, settings.key_file))) or "cert"
            why = getattr(error, "reason", None) or "no certificate and its key in PEM"
            raise ValueError(f"{names}: {str(why).replace('_', ' ').lower()}") from None
    _ask_clients(context, settings)
    return context


def _ask_clients(context: ssl.SSLContext, settings: TlsSettings) -> None:
    """Have clients show certificates, as far as the settings require it."""
    if settings.client_auth_type == VERIFIED:
        context.verify_mode = ssl.CERT_REQUIRED
    elif settings.client_auth_type == "VerifyClientCertIfGiven":
        context.verify_mode = ssl.CERT_OPTIONAL
    else:
        return
    if not (settings.client_ca or settings.client_ca_file):
        context.load_default_certs(ssl.Purpose.CLIENT_AUTH)
        return
    with _as_file("client_ca_file", settings.client_ca_file, settings.client_ca) as authorities:
        try:
            context.load_verify_locations(authorities)
        except (OSError, ValueError):
            raise ValueError(f"{settings.client_ca_file or 'client_ca'}: no certificates") from None


@contextlib.contextmanager
def _as_file(name: str, path: str, text: str) -> Iterator[str]:
    """A file that can be read: ``path``, or one in memory with ``text``, as OpenSSL takes files."""
    if path:
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ValueError(f"{name} {path}: {error.strerror}") from None
        yield path
        return
    descriptor = os.memfd_create(f"kvmtrace-{name}", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
