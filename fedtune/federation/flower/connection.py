"""How a SuperLink is reached: by address or by name, encrypted unless it is on this machine; and what is said when it is not."""

from __future__ import annotations

import contextlib
import io
import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path

import click
import httpx
import typer

from fedtune.config.schema import FederationConfig
from fedtune.errors import MissingError, UsageError
from fedtune.federation.flower.compat import (
    FLOWER_CONFIG_FILE,
    ControlHttpClient,
    FlowerError,
    SuperLinkConnection,
    get_flwr_home,
    init_http_client_from_connection,
    read_superlink_connection,
)
from fedtune.federation.flower.credentials import check_ca


@contextlib.contextmanager
def connected(config: FederationConfig) -> Iterator[ControlHttpClient]:
    """Talk to the SuperLink; an error on the way becomes a sentence."""
    connection = connection_of(config)
    where = connection.address
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it says which SuperLink it uses
            client = init_http_client_from_connection(connection)
    except (click.ClickException, typer.Exit) as error:
        raise UsageError(f"The SuperLink {where} cannot be used: {getattr(error, 'message', error)}") from None
    try:
        with client:
            yield client
    except httpx.HTTPStatusError as error:
        known = FlowerError.from_json(error.response.text)
        said = known.message if known else f"HTTP status {error.response.status_code}"
        raise MissingError(
            f"The SuperLink {where} refuses: {said}", hint="If it asks for an account: flwr login"
        ) from None
    except httpx.TransportError as error:
        raise _unreachable(connection, error) from None


def _unreachable(connection: SuperLinkConnection, error: httpx.TransportError) -> MissingError:
    where, text = connection.address, str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        ca = connection.root_certificates
        who = (
            f"the certificates in {ca} do not vouch for" if ca else "no authority that this machine trusts vouches for"
        )
        return MissingError(
            f"The SuperLink {where} is not who it says, or its certificate is signed by another: {who} it.",
            hint="Ask its owner for the certificate that signed it: --superlink-ca FILE",
        )
    if "SSL" in text or isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
        ours, theirs = ("without", "with") if connection.insecure else ("with", "without")
        return MissingError(
            f"The SuperLink {where} does not answer {ours} encryption.",
            hint=f"It may be one {theirs}: see its flags, and --superlink-ca FILE.",
        )
    return MissingError(
        f"No SuperLink answers at {where} ({type(error).__name__}).", hint="Check the address, and that it runs."
    )


def connection_of(config: FederationConfig) -> SuperLinkConnection:
    """Return how the SuperLink is to be reached: as `federation.superlink…` says, or as the user's Flower config does.

    Talk is encrypted unless the SuperLink is on this machine, or `federation.superlink_insecure` says otherwise.

    Raises:
        UsageError: the address is none, or settings contradict each other.
        MissingError: there is no such connection or certificate file.
    """
    named, ca = config.superlink, config.superlink_ca
    if named is None:
        raise UsageError("federation.superlink is not set.", hint="Name the SuperLink: --superlink HOST:PORT")
    if ca is not None and config.superlink_insecure:
        raise UsageError("federation.superlink_ca and federation.superlink_insecure contradict each other.")
    if ca is not None:
        check_ca(Path(ca).expanduser())
    if ":" not in named:
        if ca is not None or config.superlink_insecure:
            raise UsageError(
                f"The connection {named} says itself how it is encrypted.", hint="Give an address instead: HOST:PORT"
            )
        return _from_flower_config(named)
    host = _host(named)
    insecure = config.superlink_insecure or (ca is None and _is_loopback(host))
    certificates = None if ca is None else str(Path(ca).expanduser().resolve())
    return SuperLinkConnection(name="fedtune", address=named, root_certificates=certificates, insecure=insecure)


def _from_flower_config(name: str) -> SuperLinkConnection:
    file = get_flwr_home() / FLOWER_CONFIG_FILE
    if not file.is_file():
        raise MissingError(
            f"There is no connection {name!r}: {file} does not exist.", hint="Give an address instead: HOST:PORT"
        )
    try:
        connection = read_superlink_connection(name)
    except click.ClickException as error:
        raise MissingError(f"The connection {name!r} cannot be used: {error.message}") from None
    if not re.fullmatch(r"\S+:[0-9]+", connection.address or ""):
        raise UsageError(
            f"The connection {name!r} is no SuperLink with an address of its own.",
            hint="For Flower's simulation on this machine: --engine ray",
        )
    return connection


def _host(address: str) -> str:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or "/" in address or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UsageError(
            f"{address!r} is no address of a SuperLink.", hint="Give host and port, as in --superlink link.example:8000"
        )
    return host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
