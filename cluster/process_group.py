"""The process group of torch.distributed that the members of a worker group form."""

import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from prefixquant.cluster.errors import RanksError
from prefixquant.cluster.worker_group import Membership


@contextmanager
def process_group(
    member: Membership,
    device: torch.device,
    environment: Mapping[str, str] | None = None,
    *,
    timeout_s: float | None = None,
) -> Iterator[str]:
    """Join the process group of a worker group, over NCCL on GPUs and gloo on CPUs, and leave it at the end.

    It may be joined again after that. Gives the name of the backend.

    Args:
        member: this process's place in the group.
        device: where it computes: the first GPU it can see (each rank is given one), or the CPU.
        environment: variables that are set meanwhile, beside torch's own.
        timeout_s: how long a collective may wait for the other ranks, outside of CUDA graphs; None: torch's default.
            Over NCCL it ends the process, with rank and collective in its log.
    Raises:
        RanksError: another GPU than the first.
    """
    if device.type == "cuda" and (device.index or 0) != 0:
        raise RanksError(f"rank {member.rank} trains on cuda:0, the one GPU it should see, not on {device}")
    variables = {
        "RANK": str(member.rank),
        "WORLD_SIZE": str(member.size),
        "LOCAL_RANK": "0",  # an index into the GPUs that this process sees
        "MASTER_ADDR": member.master_addr,
        "MASTER_PORT": str(member.master_port),
        **(environment or {}),
    }
    if _is_loopback(member.master_addr):  # all ranks are here, so nobody else need reach their sockets
        variables |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _loopback_interface())
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(0)
        torch.distributed.init_process_group(
            backend,
            store=_meeting(member),
            rank=member.rank,
            world_size=member.size,
            timeout=None if timeout_s is None else timedelta(seconds=timeout_s),
        )
        try:
            yield backend
        except BaseException:
            if backend == "gloo":  # tells the others at once; NCCL would wait for them here
                _leave()
            raise
        _leave()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _leave() -> None:
    if torch.distributed.is_initialized():  # whoever joined may have left it already
        torch.distributed.destroy_process_group()


def _meeting(member: Membership) -> Any:
    """Return the store through which the ranks meet; each time that they join, they do so in a corner of its own."""
    store, joins = _store(member)
    return PrefixStore(f"join {next(joins)}", store)


@cache
def _store(member: Membership) -> tuple[Any, Iterator[int]]:
    # Kept as long as the process: a rank that joins again before rank 0 has left would meet the store of before.
    if member.rank != 0:
        return TCPStore(member.master_addr, member.master_port, member.size, False), count()
    # Left to itself it would listen on every address of the machine. The store closes the socket it is given.
    handle = socket.create_server((member.master_addr, member.master_port)).detach()
    return TCPStore(member.master_addr, member.master_port, member.size, True, master_listen_fd=handle), count()


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _loopback_interface() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
