"""TLS in this process, for where no proxy does it."""

from __future__ import annotations

import ssl
from pathlib import Path

from sse_server.errors import ConfigurationError


class Certificate:
    """A certificate and its key, in a context that new connections are made with."""

    def __init__(self, cert: Path, key: Path) -> None:
        """
        Args:
            cert: PEM, the server's certificate first and then those that it is signed by.
            key: PEM, without a passphrase.

        Raises:
            ConfigurationError: They cannot be used.
        """
        self._cert = cert
        self._key = key
        self.context = self._load(_context())

    def reload(self) -> None:
        """Read the files again. Open connections stay as they are.

        Raises:
            ConfigurationError: They cannot be used; new connections still get the old ones.
        """
        # Tried on a context of its own first: a key that does not fit would be found out only after
        # the new certificate is in place.
        self._load(_context())
        self._load(self.context)

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        for name, path in (("SSE_TLS_CERT", self._cert), ("SSE_TLS_KEY", self._key)):
            try:
                path.read_bytes()
            except OSError as exc:
                raise ConfigurationError(f"{name}: {path} cannot be read: {exc.strerror}.") from exc
        try:
            # An empty password: OpenSSL would ask for one on the terminal, and wait.
            context.load_cert_chain(self._cert, self._key, password="")
        except ssl.SSLError as exc:
            raise ConfigurationError(
                f"SSE_TLS_CERT and SSE_TLS_KEY: {self._cert} and {self._key} are no certificate "
                f"with its key, in PEM and without a passphrase ({exc.reason or 'unreadable'})."
            ) from exc
        return context


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context
