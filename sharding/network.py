"""What a process finds out about the network before it starts: free ports, addresses and interfaces, names that lead nowhere.

Imports no jax: the launching parent looks before it starts anything.
"""

import errno
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from sharding.errors import LaunchError

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
_ELSEWHERE = "192.0.2.1"  # of a network that is kept for documentation (RFC 5737): its route is the default route


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[ipv6]:port". Raises LaunchError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise LaunchError(f"the coordinator is {address!r}; give host:port, with a port from 1 to 65535")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(host: str) -> str:
    """The first address of a host name. Raises LaunchError."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise LaunchError(
            f"the host name {host!r} has no address here ({error.strerror or error}); write it into DNS or /etc/hosts, "
            "or give the address itself"
        ) from error


def is_loopback(address: str) -> bool:
    """Whether an address, as `resolve` gives it, is one that no other host can reach."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def source_address(address: str) -> str | None:
    """The own address from which packets to another one would come, None without a route. Sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def is_local(host: str) -> bool:
    """Whether a host name or address is this machine. Raises LaunchError for a name without an address."""
    address = resolve(host)
    return is_loopback(address) or source_address(address) == address


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface. Raises LaunchError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            known = ", ".join(other for _, other in socket.if_nameindex())
            raise LaunchError(
                f"the interface {name!r} has no IPv4 address here ({error.strerror}); there are {known}"
            ) from error
    return socket.inet_ntoa(found[20:24])


def interface_of(address: str) -> str | None:
    """The name of the interface that has an address, None where none has it."""
    if ":" in address:
        wanted = ipaddress.ip_address(address.partition("%")[0]).exploded.replace(":", "")
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
        return next((line.split()[-1] for line in lines if line.split()[0] == wanted), None)
    for _, name in socket.if_nameindex():
        try:
            if interface_address(name) == address:
                return name
        except LaunchError:
            continue
    return None


def own_address(coordinator: str, *, interface: str | None, one_host: bool) -> str:
    """The address under which the other processes of a run reach this one: that of `interface`, or where packets to the coordinator's
    address come from.

    A name of this host that leads to loopback, as Debian's /etc/hosts has it, is no trap here: the address of the default route is taken.
    Raises LaunchError where several hosts take part and there is only loopback.
    """
    if interface is not None:
        return interface_address(interface)
    address = source_address(coordinator)
    if address is None:
        raise LaunchError(f"there is no route to the coordinator at {coordinator}; check its address and the network")
    if one_host or not is_loopback(address):
        return address
    outside = source_address(_ELSEWHERE)
    if outside is None or is_loopback(outside):
        raise LaunchError(
            f"the coordinator's name leads to {coordinator} on this host, which no other host can reach, and there is no default route; "
            "give the interface that the hosts share (--interface or JAXINFER_INTERFACE), or correct the name in /etc/hosts"
        )
    return outside


def listen(port: int, backlog: int = 16) -> socket.socket:
    """A socket that listens on a port of every address; 0: on a free one. Raises LaunchError where the port is taken."""
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, backlog=backlog, dualstack_ipv6=dual
        )
    except OSError as error:
        reason = "it is taken" if error.errno == errno.EADDRINUSE else error.strerror
        raise LaunchError(
            f"the coordinator cannot listen on port {port} of {socket.gethostname()}: {reason}; give another one with --port "
            "(JAXINFER_COORDINATOR), or end what uses it"
        ) from error


def free_port() -> int:
    """A port that nobody listens on now."""
    with listen(0) as server:
        return int(server.getsockname()[1])
