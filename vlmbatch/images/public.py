"""Which network addresses are public: the guard against a manifest that names hosts inside.

The check stands where sockets are made, on the very address that will be connected to. So it holds
for names, however their DNS answers change, for addresses in any spelling (``0x7f.1``), and for
each redirect.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

_NOT_PUBLIC = tuple(
    IPv4Network(network)
    for network in (
        # IANA's special-purpose registry, multicast (224/4) and reserved (240/4)
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's host agent; the other clouds' are link-local or above
    )
)
_GLOBAL_6 = IPv6Network("2000::/3")  # all that IANA has given out for global unicast
_NOT_PUBLIC_6 = tuple(
    IPv6Network(network)
    # Teredo (2001::/32) and other protocols, documentation, 6to4
    for network in ("2001::/23", "2001:db8::/32", "3fff::/20", "2002::/16")
)
_NAT64 = IPv6Network("64:ff9b::/96")  # IPv4 as seen from a network that has only IPv6

REFUSED = "is not a public address"


class NotPublic(OSError):
    """Somebody wanted to connect to an address inside."""

    def __init__(self, address: str) -> None:
        super().__init__(errno.EACCES, f"{address} {REFUSED}")


def is_public(address: str) -> bool:
    """Whether a numeric address belongs to the public internet; anything else does not."""
    try:
        ip = ip_address(address.partition("%")[0])  # a zone says that it is link-local
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            return ip in _GLOBAL_6 and not any(ip in network for network in _NOT_PUBLIC_6)
    return not any(ip in network for network in _NOT_PUBLIC)


def public_socket(info: Sequence[Any]) -> socket.socket:
    """A socket for one answer of getaddrinfo; NotPublic for an address inside. For aiohttp."""
    family, kind, protocol, _, address = info
    if family not in (socket.AF_INET, socket.AF_INET6) or not is_public(str(address[0])):
        raise NotPublic(str(address[0]))
    return socket.socket(family, kind, protocol)
