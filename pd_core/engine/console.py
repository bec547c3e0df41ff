"""What a person reads in the terminal while a run goes on."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pd_core.core.errors import printable, shown

if TYPE_CHECKING:
    from tqdm import tqdm


@contextlib.contextmanager
def progress(stage: str, total: int, unit: str, done: int = 0) -> Iterator[tqdm[Any]]:
    """A progress bar on standard error; on a non-terminal one line per 10 s."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        initial=done,
        desc=printable(stage),
        unit=f" {unit}",
        mininterval=0.2 if terminal else 10.0,
        ascii=None if terminal else True,
        dynamic_ncols=terminal,
        file=sys.stderr,
    ) as bar:
        yield bar


def silence_ray_data() -> None:
    """Keep its plans and tracebacks from the user: what ends an execution reaches `persist`, which tells it in one
    line.
    """
    import ray.data  # noqa: F401 - it sets another level

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def say(line: str) -> None:
    """One line to the user, or several of a table or of settings, on standard output, at once."""
    print(shown(line), flush=True)
