"""Whether a node's key, its certificate and the SuperLink's address are what they are taken for, before anything starts."""

from __future__ import annotations

import contextlib
import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedtune.errors import MissingError, UsageError
from fedtune.federation.flower.compat import parse_address

_MAKE_KEY = "Make a pair: ssh-keygen -t ecdsa -b 384 -N '' -f node-key"
_ANSWER_S = 5.0


def check_key(path: Path) -> None:
    """Check that `path` is a private key that a SuperNode can show: OpenSSH's format, elliptic curve, no passphrase.

    Raises:
        MissingError: there is no such file.
        UsageError: it cannot be read, or is something else; says what.
    """
    content = _read(path, "key")
    if content.startswith((b"ssh-", b"ecdsa-", b"sk-")):
        raise UsageError(
            f"{path} is a public key; a node needs the private one.",
            hint=f"Give the public key to the coordinator, and the node: --key {path.with_suffix('')}",
        )
    try:
        key = load_ssh_private_key(content, None)
    except TypeError:
        raise UsageError(f"The key {path} has a passphrase, and nobody is there to type it.", hint=_MAKE_KEY) from None
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"{path} is no private key in OpenSSH's format.", hint=_MAKE_KEY) from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise UsageError(f"The key {path} is not one on an elliptic curve, which Flower asks for.", hint=_MAKE_KEY)


def check_ca(path: Path) -> None:
    """Check that `path` holds certificates, in PEM, that are valid today.

    Raises:
        MissingError: there is no such file.
        UsageError: it cannot be read, holds none, or one has expired or is not valid yet.
    """
    ask = "Ask the coordinator for the certificate that signed the SuperLink's."
    try:
        certificates = x509.load_pem_x509_certificates(_read(path, "certificate"))
    except ValueError:
        raise UsageError(f"{path} holds no certificate in PEM.", hint=ask) from None
    now = datetime.now(UTC)
    for certificate in certificates:
        if certificate.not_valid_after_utc < now:
            raise UsageError(f"The certificate {path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}.", hint=ask)
        if certificate.not_valid_before_utc > now:
            raise UsageError(
                f"The certificate {path} is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC.",
                hint="Check this machine's clock.",
            )


def check_superlink(address: str, ca: Path | None, *, insecure: bool) -> bool:
    """Return whether a SuperLink answers at `address`; one that does not may still be started.

    Raises:
        UsageError: the address is none, the SuperLink's certificate is not signed by `ca`, or one side speaks TLS and the
            other does not.
    """
    parsed = parse_address(address)
    if parsed is None:
        raise UsageError(f"{address!r} is no address of a SuperLink.", hint="Give host and port: --superlink HOST:8000")
    host, port, _ = parsed
    signed = str(ca) if ca else "a certificate authority of this system"
    try:
        with socket.create_connection((host, port), _ANSWER_S) as connection:
            if not insecure:
                context = ssl.create_default_context(cafile=str(ca) if ca else None)
                context.wrap_socket(connection, server_hostname=host).close()
                return True
        with contextlib.suppress(httpx.TimeoutException):
            httpx.get(f"http://{address}/", timeout=_ANSWER_S, trust_env=False)
    except ssl.SSLCertVerificationError as error:
        raise UsageError(
            f"The SuperLink at {address} is not the one that {signed} vouches for: {error.verify_message}.",
            hint="Ask the coordinator for the certificate that signed the SuperLink's, and give it: --ca FILE",
        ) from None
    except ssl.SSLError:
        raise UsageError(
            f"The SuperLink at {address} does not speak TLS.", hint="Ask the coordinator to use TLS."
        ) from None
    except (httpx.RemoteProtocolError, httpx.ReadError):
        raise UsageError(
            f"The SuperLink at {address} speaks TLS.", hint="Give --ca FILE instead of --insecure."
        ) from None
    except (OSError, httpx.HTTPError):
        return False
    return True


def _read(path: Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise MissingError(f"There is no {kind} file {path}.") from None
    except OSError as error:
        raise UsageError(f"The {kind} file {path} cannot be read: {error.strerror}.") from None
