"""Shared memory, in which worker processes hand over their batches: is there any, and enough?"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from mgd_pipeline.durable import private_name

SHARED = Path("/dev/shm")
"""Where Linux has it. Containers often have 64 MB there, and some sandboxes nothing that can be written."""
_REMEDY = "take --num-workers 0, which needs none, or give the container more, such as `docker run --shm-size 8g`"


def free_shared_memory() -> int | None:
    """Bytes; None where this system has no such folder."""
    with suppress(OSError):
        facts = os.statvfs(SHARED)
        return facts.f_bavail * facts.f_frsize
    return None


def shared_memory_shortage(needed: int = 0) -> str | None:
    """Why workers cannot hand over batches of `needed` bytes in all, with the remedy; None where they can."""
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
