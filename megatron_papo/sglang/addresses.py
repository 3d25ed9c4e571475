"""Addresses that servers listen on: this machine's own, or one of a node that other nodes reach."""

import ipaddress
import socket
from typing import Annotated

import psutil
from pydantic import BaseModel, ConfigDict, Field

from megatron_papo.errors import UserError
from megatron_papo.reading import shown


class NodeReport(BaseModel):
    """What a node says of itself, before servers are started on it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    node: Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Its name."""
    machine: str
    """The same for nodes that are one machine."""
    resolved: str | None
    """The address that its name has on it."""
    interfaces: dict[str, str]
    """Its network interfaces that are up, with their addresses."""


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of each network interface of this machine that is up."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found: dict[str, str] = {}
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if name in up and address.family == socket.AF_INET:
                found.setdefault(name, address.address)
    return found


def resolved(name: str) -> str | None:
    """Return the IPv4 address of a name; None if it has none here."""
    try:
        return socket.gethostbyname(name)
    except (OSError, UnicodeError):
        return None


def own_address(host: str) -> str:
    """Return the address that server.host, an address or a network interface, is on this machine.

    Raises UserError where it is neither.
    """
    there = interfaces()
    address = there.get(host) or resolved(host)
    if address is None:
        raise UserError(
            f"server.host {shown(host)}: neither an address nor a network interface of this machine"
            f" ({', '.join(there)}): --set server.host=127.0.0.1"
        )
    return address


def address_for_others(report: NodeReport, host: str, is_one_machine: bool) -> str:
    """Return the address of a node that the servers of several nodes listen on.

    That is the one of the interface that server.host names; where it is left at loopback, the one that the node's name
    has, or that of its only interface where the name has a loopback address (127.0.1.1, as Debian sets it up).

    Args:
        report: Of the node.
        host: server.host.
        is_one_machine: All nodes are the machine of the stage: then loopback does.

    Raises UserError if there is none, or if it is not clear which.
    """
    outside = {name: address for name, address in report.interfaces.items() if not is_loopback(address)}
    if host in report.interfaces:
        return report.interfaces[host]
    if not is_loopback(host):
        raise UserError(
            f"server.host {shown(host)}: node {shown(report.node)} has no such network interface"
            f" ({shown(', '.join(report.interfaces))}): name one that each node has, or leave it at 127.0.0.1 for the"
            " address of each node's name"
        )
    if report.resolved is not None and (is_one_machine or not is_loopback(report.resolved)):
        return report.resolved
    if is_one_machine:
        return host
    if len(outside) == 1:
        return next(iter(outside.values()))
    raise UserError(
        f"node {shown(report.node)}: its name has {'no address' if report.resolved is None else report.resolved} there,"
        f" which other nodes do not reach: --set server.host= one of {shown(', '.join(outside) or 'its interfaces')}"
    )


def is_loopback(address: str) -> bool:
    """Return whether an address, or the name localhost, is of the machine itself only."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
