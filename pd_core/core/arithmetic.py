"""torch's settings that move the last bits of a sum: changed for a while in a process that is somebody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Told = TypeVar("Told")


@contextmanager
def kept() -> Iterator[None]:
    """What the body sets of torch's threads, float32 precision and cuDNN is as before after it.

    torch has two ways to set the precision, an old one of the whole process and a new one of each operation; it refuses
    to tell the old one of a process that used the new.
    """
    import torch

    backends: Any = torch.backends
    cudnn = backends.cudnn
    threads, flags = torch.get_num_threads(), (cudnn.benchmark, cudnn.deterministic)
    precision, allow = _told(torch.get_float32_matmul_precision), _told(lambda: cudnn.allow_tf32)
    operations = (backends.cuda.matmul, backends.mkldnn.matmul, cudnn.conv, cudnn.rnn)
    before = [operation.fp32_precision for operation in operations]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.benchmark, cudnn.deterministic = flags
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        if allow is not None:
            cudnn.allow_tf32 = allow
        for operation, value in zip(operations, before, strict=True):
            operation.fp32_precision = value


def _told(ask: Callable[[], Told]) -> Told | None:
    try:
        return ask()
    except RuntimeError:
        return None
