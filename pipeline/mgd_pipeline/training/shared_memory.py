"""Whether there is enough shared memory, in which worker processes hand over their batches."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from mgd_pipeline.durable import private_name

SHARED = Path("/dev/shm")
"""Its place on Linux. Containers often have 64 MB of it, and some sandboxes allow no writing."""
_REMEDY = "take --num-workers 0, which needs none, or give the container more, such as `docker run --shm-size 8g`"


def free_shared_memory() -> int | None:
    """Bytes; None if this system has no such folder."""
    with suppress(OSError):
        facts = os.statvfs(SHARED)
        return facts.f_bavail * facts.f_frsize
    return None


def shared_memory_shortage(needed: int = 0) -> str | None:
    """Why workers cannot hand over batches of `needed` bytes together, with the remedy; None if they can."""
    if not sys.platform.startswith("linux"):
        return None
    probe = SHARED / private_name("mgd-test")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        return f"{SHARED}: {error.strerror}, so worker processes have no shared memory; {_REMEDY}"
    with suppress(OSError):
        probe.unlink()
    free = free_shared_memory()
    if free is not None and free < max(needed, 1):
        return f"{SHARED}: {free / 1e6:,.1f} MB are free, and the batches under way need {needed / 1e6:,.1f} MB; {_REMEDY}"
    return None


def no_room() -> str:
    """What is free after a failure, and the remedy."""
    free = free_shared_memory()
    left = "" if free is None else f"{free / 1e6:,.1f} MB are free in /dev/shm; "
    return (
        f"{left}take --num-workers 0 or fewer of them, or give the container more, such as `docker run --shm-size 8g`. The same "
        "command goes on from the last checkpoint"
    )
