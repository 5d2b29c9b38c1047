"""Whether this machine can compile a network (--compile)."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import torch

from mgd_pipeline.errors import OutputError, ParamsError
from mgd_stages.run.machine import nearest

_NO_PLACE = re.compile("[^\n]*(No space left|quota exceeded|Permission denied|Read-only file system|cannot create)[^\n]*")
"""What compilers and torch say of a folder that they cannot write to."""


def check_compiler(device: torch.device) -> None:
    """Compiles one line, so that a machine without a compiler is named before a training begins.

    Raises ParamsError; OutputError if the compiler cannot write its files.
    """
    zeros = torch.zeros(8, device=device)  # not below: a device that fails here has no lack of compilers
    try:
        torch.compile(torch.exp)(zeros)
    except OSError as error:
        raise OutputError(f"--compile: {error.filename}: {error.strerror}; {_compiles_into()}") from None
    except RuntimeError as error:  # torch's own wear private names
        if (no_place := _NO_PLACE.search(str(error))) is not None:
            said = " ".join(no_place[0].split())
            raise OutputError(f"--compile: the compiler cannot write: {said}; {_compiles_into()}") from None
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ParamsError(f"--compile: no compiler for {device}: {reason}; install one, or leave --compile out") from None


def _compiles_into() -> str:
    """Where compilers write, how much room is there, and how to change the place."""
    temporary = Path(os.environ.get("TMPDIR", tempfile.gettempdir()))
    kept = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir()))
    free = [
        f"{place} ({name}) has {shutil.disk_usage(nearest(place)).free / 1e6:,.1f} MB free"
        for name, place in (("TMPDIR", temporary), ("TORCHINDUCTOR_CACHE_DIR", kept))
    ]
    return f"{', '.join(free)}; make room there, or name other folders by TMPDIR and TORCHINDUCTOR_CACHE_DIR"
