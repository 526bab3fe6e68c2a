"""Certificates for one test run, made with the openssl command: a CA, and servers' certificates that it has signed."""

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


def _openssl(*arguments: str, folder: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA in a folder; ``ca_file`` is what a client has to trust."""

    folder: Path

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.pem"

    @classmethod
    def make(cls, folder: Path) -> "Authority":
        folder.mkdir(parents=True, exist_ok=True)
        _openssl(
            *_KEY,
            "-keyout",
            "ca.key",
            "-out",
            "ca.pem",
            "-days",
            "2",
            "-subj",
            "/CN=test CA",
            *_CA_EXTENSIONS,
            folder=folder,
        )
        return cls(folder)

    def server(self, *names: str) -> ssl.SSLContext:
        """A server's context with a certificate for these names, such as ``IP:127.0.0.1`` or ``DNS:localhost``."""
        extensions = f"subjectAltName={','.join(names)}\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
        (self.folder / "names").write_text(extensions)
        _openssl(*_KEY[:-1], "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=test server", folder=self.folder)
        signed = ("-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2", "-set_serial", "2")
        _openssl("x509", *signed, "-extfile", "names", "-out", "server.pem", folder=self.folder)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.folder / "server.pem", self.folder / "server.key")
        return context


# Python verifies strictly from 3.13 on: a CA has to say that it may sign (RFC 5280 section 4.2.1.3).
_CA_EXTENSIONS = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
_KEY = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-x509")
