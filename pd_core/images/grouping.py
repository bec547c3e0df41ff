"""Items in groups of bounded bytes: files that go to the decoder together, requests that are under way together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def grouped(items: Iterable[T], size_of: Callable[[T], int], most_bytes: int, most_items: int) -> Iterator[list[T]]:
    """Consecutive items in lists of at most `most_items` and `most_bytes` together; a larger item goes alone."""
    group: list[T] = []
    held = 0
    for item in items:
        size = size_of(item)
        if group and (held + size > most_bytes or len(group) == most_items):
            yield group
            group, held = [], 0
        group.append(item)
        held += size
    if group:
        yield group
