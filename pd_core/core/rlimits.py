"""Limits of this process (setrlimit); without pyarrow, since the process that decodes images has them too."""

from __future__ import annotations

import resource
from pathlib import Path


def data_bytes() -> int:
    """Memory of this process that counts for RLIMIT_DATA."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) << 10


def set_soft(what: int, soft: int) -> None:
    """Set the soft limit of a resource such as `resource.RLIMIT_DATA`, to at most the hard one."""
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY and (soft == resource.RLIM_INFINITY or soft > hard):
        soft = hard
    resource.setrlimit(what, (soft, hard))
