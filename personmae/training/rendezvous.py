"""How the processes of one start find one another, and nobody else.

torchrun keeps its store of addresses while it restarts processes that died (`--max-restarts`), and PyTorch looks into it under the same names each
time (pytorch issue 135712): a new process would read the addresses of dead ones, and wait for them until it fails. The number of the restart does not
tell starts apart, as each machine counts its own. So the main process makes up a name for each start, and gives it to those that are really there.
"""

from __future__ import annotations

import datetime
import time
import uuid

import torch.distributed as dist

from personmae.configs import UserError

POLL_SECONDS = 0.02


def join_store(rank: int, world_size: int, limit: datetime.timedelta) -> dist.Store:
    """The store of the environment (MASTER_ADDR, MASTER_PORT), as a part of it that only the processes of this start use."""
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=limit))
    store.set_timeout(limit)
    return dist.PrefixStore(agree_on_name(store, rank, world_size, limit), store)


def agree_on_name(store: dist.Store, rank: int, world_size: int, limit: datetime.timedelta) -> str:
    """A name that all processes of this start share and none before had; every process has to call it.

    store: may hold what earlier starts have left. Raises UserError in the main process if the others do not come within `limit`.
    """
    if rank != 0:
        # The answer to a token made up now cannot be an old one.
        token = uuid.uuid4().hex
        store.set(f"personmae/hello/{rank}", token)
        name = store.get(f"personmae/welcome/{token}").decode()
        store.set(f"{name}/here/{rank}", "")
        return name
    name = f"personmae/start/{uuid.uuid4().hex}"
    missing = set(range(1, world_size))
    answered: set[str] = set()
    last_time = time.monotonic() + limit.total_seconds()
    while missing:
        for other in sorted(missing):
            # What stands there may be of a dead process: its answer is read by nobody, and its place is looked at again.
            if store.check([f"personmae/hello/{other}"]):
                token = store.get(f"personmae/hello/{other}").decode()
                if token not in answered:
                    store.set(f"personmae/welcome/{token}", name)
                    answered.add(token)
            if store.check([f"{name}/here/{other}"]):
                missing.discard(other)
        if missing and time.monotonic() > last_time:
            raise UserError(
                f"{len(missing)} of {world_size} processes did not come within {limit}, the first of them number {min(missing)}: "
                "look at that machine's output, and start the same command on all machines"
            )
        time.sleep(POLL_SECONDS if missing else 0)
    return name
