"""Can processes meet: on loopback, on the interface between the nodes, at MASTER_PORT?"""
from __future__ import annotations

import fcntl
import os
import socket
import struct

from dpo_dist.config.schema import RunConfig
from dpo_dist.launcher.doctor.finding import Finding, together

SIOCGIFADDR = 0x8915                # Linux: the IPv4 address of an interface


def ports(config: RunConfig) -> Finding:
    several = node_count(config) > 1
    findings = [_talk("127.0.0.1", "loopback")]
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if chosen:
        findings.append(_interface(chosen))
    elif several:
        findings.append(_own_name())
    if several or "MASTER_PORT" in os.environ:
        findings.append(_master())
    return together(findings)


def node_count(config: RunConfig) -> int:
    """Nodes of the run: of the config, or of the environment that launch/node.sh reads."""
    value = os.environ.get("NNODES", "")
    return max(config.cluster.nodes, int(value) if value.isdigit() else 1)


def _talk(address: str, name: str) -> Finding:
    """A connection from this machine to itself at a free port of this address."""
    try:
        with socket.create_server((address, 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
            return Finding(f"{name} ({address}) talks")
    except OSError as error:
        return Finding(f"{name} ({address}) does not talk: {error}",
                       f"bring {name} up, and let the firewall allow connections on it")


def _interface(name: str) -> Finding:
    there = [name for _, name in socket.if_nameindex()]
    if name not in there:
        return Finding(f"GLOO_SOCKET_IFNAME={name} is no interface of this machine",
                       f"set it to one of: {', '.join(there)}")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            packed = fcntl.ioctl(s, SIOCGIFADDR, struct.pack("256s", name.encode()))
    except OSError:
        return Finding(f"GLOO_SOCKET_IFNAME={name} has no IPv4 address",
                       f"choose another of: {', '.join(there)}, or give it one")
    return _talk(socket.inet_ntoa(packed[20:24]), name)


def _own_name() -> Finding:
    """Without GLOO_SOCKET_IFNAME gloo listens at the address of the machine's own name. Other nodes must be able to
    reach it."""
    name = socket.gethostname()
    remedy = "set GLOO_SOCKET_IFNAME (on GPUs NCCL_SOCKET_IFNAME too) to the interface between the nodes"
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return Finding(f"this machine's name {name} has no address", remedy)
    if address.startswith("127."):
        return Finding(f"this machine's name {name} is {address}, where no other node reaches it", remedy)
    return _talk(address, name)


def _master() -> Finding:
    """Node 0 must be able to listen at MASTER_PORT; the others must know who MASTER_ADDR is."""
    host, value = os.environ.get("MASTER_ADDR") or "127.0.0.1", os.environ.get("MASTER_PORT") or "29500"
    if not value.isdigit() or not 0 < int(value) < 65536:
        return Finding(f"MASTER_PORT={value} is no port", "set MASTER_PORT to the same number between 1024 and 65535 "
                                                          "on all nodes")
    port = int(value)
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        return Finding(f"MASTER_ADDR={host} has no address: {error}",
                       "set MASTER_ADDR to node 0's name or address, as this node knows it")
    if os.environ.get("NODE_RANK", "0") not in ("", "0"):
        return Finding(f"MASTER_ADDR={host} is {address}")
    try:
        with socket.create_server((address, port)):
            return Finding(f"port {port} is free on {address}")
    except OSError as error:
        return Finding(f"MASTER_PORT={port} cannot be had on {host} ({address}): {error.strerror}",
                       "set MASTER_PORT to a free port on all nodes, and MASTER_ADDR to an address of node 0")
