"""Which network interface gloo takes between hosts, and whether ranks reach each other over it.

gloo takes the one that the host's own name leads to, which is the loopback on many hosts, and then
waits for minutes. The one that leads to the rendezvous store reaches every host at least.
"""

import fcntl
import os
import socket
import struct
from contextlib import closing, suppress

from shardkit.errors import RanksError
from shardkit.runtime.distributed.diagnosis import list_errors
from shardkit.runtime.distributed.liveness import Link
from shardkit.runtime.distributed.rank_environment import count_local_ranks, read_store_address

INTERFACE = "GLOO_SOCKET_IFNAME"  # gloo's own: the interface, or several
REACH = 5.0  # seconds to connect to another rank
SIOCGIFADDR = 0x8915  # netdevice(7)
NAME_BYTES = 16  # of an interface, in a request of 40
ADVICE = f"set {INTERFACE} on each host to the interface that leads to the other hosts"


def agree_on_network(link: Link) -> str:
    """The interface that gloo should take on this host; "" leaves that to gloo.

    Ranks of one host, by torchrun's variables, need none.

    Raises:
        RanksError: On every rank, if one cannot reach another; or a rank was lost meanwhile.
    """
    if count_local_ranks() == link.size:
        return ""
    limit = link.timeouts.join
    routes = link.all_exchange(find_route(read_store_address()[0]), limit)
    name, address = _choose_interface(routes[link.rank], list(routes.values()))
    with closing(_listen(address, len(routes))) as server:
        port = server.getsockname()[1] if server.fileno() >= 0 else 0
        places = link.all_exchange(f"{address} {port}", limit)
        errors = link.all_exchange(_try_all(link.rank, places, name), limit)
        # Until every rank has tried, the server stays.
    if fault := list_errors(errors):
        raise RanksError(f"{fault}; {ADVICE}")
    return name


def find_route(host: str) -> str:
    """This host's IPv4 address on the way to another; "" if there is none."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, 1))  # sends nothing
        return str(sock.getsockname()[0])
    return ""


def _choose_interface(route: str, routes: list[str]) -> tuple[str, str]:
    """An interface and its address: the one asked for, or else the one that leads to the store.

    On the store's own host its name may lead to the loopback; then it is the way to another host.
    """
    if asked := os.environ.get(INTERFACE, "").split(",")[0]:
        return asked, _read_address(asked)
    if route.startswith("127."):
        others = [each for each in routes if each and not each.startswith("127.")]
        route = find_route(others[0]) if others else route
    names = [name for _, name in socket.if_nameindex() if _read_address(name) == route]
    return (names[0], route) if names and route else ("", "")


def _read_address(interface: str) -> str:
    """The IPv4 address of an interface; "" if it has none."""
    request = struct.pack(f"{NAME_BYTES}s24x", interface.encode()[: NAME_BYTES - 1])
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock.fileno(), SIOCGIFADDR, request)
        return socket.inet_ntoa(answer[NAME_BYTES + 4 : NAME_BYTES + 8])
    return ""


def _listen(address: str, ranks: int) -> socket.socket:
    """A socket that so many may connect to; it is closed if there is no address."""
    if address:
        with suppress(OSError):
            return socket.create_server((address, 0), backlog=ranks)
    server = socket.socket()
    server.close()
    return server


def _try_all(rank: int, places: dict[int, str], name: str) -> str:
    """Why another rank cannot be reached; "" if all can, or have no address known to them."""
    for other, place in places.items():
        address, _, port = place.partition(" ")
        if other == rank or not address:
            continue
        try:
            with socket.create_connection((address, int(port)), timeout=REACH):
                pass
        except OSError as error:
            own = f" over {name}" if name else ""
            return f"cannot reach rank {other} at {address}{own}: {error.strerror or error}"
    return ""
