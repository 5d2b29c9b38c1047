"""Every error that the pipeline raises on purpose.

MGDError                  one clear line: the thing, the value, the remedy
├── ParamsError           params.yaml or the command line (exit code 2, nothing started)
├── DataError             an image, mask, id list or manifest that cannot be used
├── WeightsError          weights that are missing or do not fit
├── NonFiniteError        NaN or infinity where numbers are stored or minimised
├── LoaderError           a process that decodes images died or hangs
├── ClusterError          workers that cannot be reached, do not fit, or die
├── MemoryShortage        a device with too little memory
├── OutputError           a place that results cannot be written to, or a disk without room for them (nothing started)
├── AccessError           a file that is there and may not be read, or a disk that does not answer (7)
├── Stopped               a signal asked a training to end; its state is saved (exit code 75: try again)
└── CacheError            a teacher cache that must not be read: damaged (exit code 3)
    ├── CacheIncomplete   it is not there, not finished, or lacks an image (4)
    ├── ProvenanceMismatch  it was made by another teacher, data set or version (5)
    └── StaleTarget       it was made from another version of the same image (6)
"""

import shlex


class MGDError(Exception):
    """Base of all errors that name a problem a user can mend; `exit_code` is the command line's."""

    exit_code = 1


class ParamsError(MGDError, ValueError):
    exit_code = 2


class DataError(MGDError, ValueError):
    pass


class WeightsError(MGDError):
    pass


class NonFiniteError(MGDError, ArithmeticError):
    pass


class LoaderError(MGDError):
    pass


class ClusterError(MGDError):
    pass


class MemoryShortage(MGDError):
    pass


class OutputError(MGDError):
    pass


class AccessError(MGDError):
    exit_code = 7


class Stopped(MGDError):
    exit_code = 75


class CacheError(MGDError):
    exit_code = 3


class CacheIncomplete(CacheError):
    exit_code = 4


class ProvenanceMismatch(CacheError):
    exit_code = 5


class StaleTarget(CacheError):
    exit_code = 6


def shell_command(*words: object) -> str:
    """A command for a message, as a shell takes it, whatever stands in paths and names."""
    return shlex.join(map(str, words))
