"""Certificates for tests of TLS, made by openssl: an authority, a server and a client."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Certificates:
    """``ca.pem``; ``server.pem``, ``client.pem`` and ``other.pem``, each with its ``.key``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        _openssl(directory, "req", "-x509", "-subj", "/CN=test authority", *_new("ca"))
        for name, names in (
            ("server", "DNS:localhost,IP:127.0.0.1"),
            ("client", "DNS:prometheus.example,email:oncall@example.org"),
        ):
            self.sign(name, names)
        # Nobody knows its authority.
        _openssl(directory, "req", "-x509", "-subj", "/CN=other", *_new("other"))

    def sign(self, name: str, names: str) -> None:
        """Make a certificate of the authority, for these names."""
        options = ("-subj", f"/CN={name}", "-addext", f"subjectAltName={names}")
        authority = ("-CA", "ca.pem", "-CAkey", "ca.key")
        _openssl(self.directory, "req", "-x509", *authority, *options, *_new(name))

    def path(self, name: str) -> str:
        """The path of a file."""
        return str(self.directory / name)


def _new(name: str) -> tuple[str, ...]:
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    return (*curve, "-days", "2", "-keyout", f"{name}.key", "-out", f"{name}.pem")


def _openssl(directory: Path, *arguments: str) -> None:
    done = subprocess.run(
        ["openssl", *arguments], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
