"""Which address of this node others can reach: for Redis to listen on."""

from __future__ import annotations

import fcntl
import socket
import struct

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915


class NoAddress(ValueError):
    """An interface or host name has no IPv4 address; the message says which setting to fix."""


def interface_address(name: str) -> str:
    """The IPv4 address of network interface `name`. Raises NoAddress naming the interfaces there are."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
        except OSError as error:
            names = ", ".join(known for _, known in socket.if_nameindex())
            raise NoAddress(
                f"network interface {name!r} has no IPv4 address on {socket.gethostname()} (it has {names}); "
                "fix the site's network interface"
            ) from error
    return socket.inet_ntoa(answer[20:24])


def host_address(host: str) -> str:
    """The IPv4 address of `host` (a name or an address). Raises NoAddress."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror as error:
        raise NoAddress(f"host name {host!r} does not resolve on {socket.gethostname()}: {error}") from error


def can_bind(address: str) -> bool:
    """Whether `address` belongs to this node."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def route_address(other: str) -> str:
    """This node's address on the route to address `other`. Raises NoAddress."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other, 9))  # UDP: nothing is sent
        except OSError as error:
            raise NoAddress(f"{socket.gethostname()} has no route to {other}: {error}") from error
        return str(probe.getsockname()[0])
