"""Binding the listening sockets before anything starts, and naming whoever holds a port."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from neaptide.errors import ProcessError

BACKLOG = 4096


def bind(host: str, port: int, shared: bool = False) -> socket.socket:
    """A listening TCP socket, inheritable. `shared`: several may bind the port (one a gateway process).

    ProcessError E304 names the process that holds the port where /proc tells.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as e:
        sock.close()
        raise _refused(host, port, e) from None
    sock.setblocking(False)
    sock.set_inheritable(True)
    return sock


def address(sock: socket.socket) -> str:
    """host:port as a URL has it."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _refused(host: str, port: int, error: OSError) -> ProcessError:
    if error.errno == errno.EADDRINUSE:
        holder = holder_of(port)
        by = f" by {holder}" if holder else ""
        fix = "stop it, or pass --port P (or set listen: in neaptide.yaml)"
        return ProcessError(f"port {port} is in use{by}", why=f"{host}:{port} could not be bound", fix=fix, code="E304")
    if error.errno == errno.EACCES:
        return ProcessError(f"port {port} needs privileges", fix="choose a port above 1023", code="E304")
    return ProcessError(f"{host}:{port} cannot be bound: {error.strerror}", fix="correct listen:", code="E304")


def holder_of(port: int) -> str:
    """ "python3 (pid 4312)" for the listener on `port`; "" when /proc does not tell."""
    inodes = _listening_inodes(port)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") in inodes:
                        return f"{Path(f'/proc/{pid}/comm').read_text().strip()} (pid {pid})"
    return ""


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                field = line.split()
                if field[3] == "0A" and int(field[1].rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{field[9]}]")
    return found
