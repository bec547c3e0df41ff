"""An earlier output of build_index, the base, and what a new one, its update, takes over from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pd_core.core import artifacts as core_artifacts
from pd_core.core import files
from pd_core.images.listing import Listing

ADDED = "added"  # folder of the new images' own listing, features and quarantine


@dataclass(frozen=True)
class Base:
    """A finished output of build_index: its place, the commit record of each stage, and the settings of its run."""

    uri: str
    artifacts: dict[str, core_artifacts.Artifact]
    settings: dict[str, Any]

    def folder(self, stage: str) -> str:
        """Directory of a stage."""
        return files.join(self.uri, stage)

    def continued(self, stage: core_artifacts.Stage, **more: Any) -> core_artifacts.Stage:
        """The stage as one that is made from the base's stage of the same kind, too; more: of its identity."""
        own = {"base": self.artifacts[stage.kind].fingerprint, **more}
        return replace(stage, identity=stage.identity | own)


@dataclass(frozen=True)
class Origin:
    """Parts that hold the rows of a part of the whole listing, by number: of the base, and of the new images.

    whole: it is exactly the base's part of the same number.
    """

    old: tuple[int, ...]
    new: tuple[int, ...]
    whole: bool


@dataclass(frozen=True)
class Update:
    """A base, and what the source has now against it.

    Attributes:
        listed: the whole listing: images of the base that are unchanged, in its order, then the new ones.
        fresh: listing of the new ones, or None.
        kept: images of each part of the base's listing that stay.
        removed: sample ids of the base that are gone, changed, or read again; ascending int64.
        indexed_removed: how many of them are in the base's index: an image that could not be read is not.
        folder: of what is made of the new images alone.
        added: commit record of their features; None before these are made, and where there are no new images.
    """

    base: Base
    listed: Listing
    fresh: Listing | None
    kept: tuple[int, ...]
    removed: np.ndarray
    indexed_removed: int
    folder: str
    added: core_artifacts.Artifact | None = None

    @property
    def added_rows(self) -> int:
        """New images that have features."""
        return 0 if self.added is None else self.added.rows

    @property
    def added_parts(self) -> list[str]:
        """The parts of their features that have rows, as URIs."""
        parts = () if self.added is None else self.added.parts
        return [files.join(self.folder, "features", part.name) for part in parts if part.rows]

    @property
    def moved(self) -> int:
        """Rows that have come into the index or gone from it; an image whose content is another is both."""
        return self.indexed_removed + self.added_rows

    def origins(self) -> dict[str, Origin]:
        """Of each part of the whole listing, by its name, in order."""
        ends = np.cumsum(self.kept)
        total = int(ends[-1]) if len(ends) else 0
        part_rows, found = self.listed.part_rows, {}
        base_rows = [part.rows for part in self.base.artifacts["listing"].parts]
        for number in range(self.listed.parts):
            start = number * part_rows
            stop = start + self.listed.rows_of(number)
            first, last = np.searchsorted(ends, [start, min(stop, total) - 1], side="right").tolist()
            old = [p for p in range(first, last + 1) if self.kept[p]] if start < total else []
            new = range((max(start, total) - total) // part_rows, -(-(stop - total) // part_rows))
            # no row is gone: the base's parts are full but for the last, and a part that lost a row is not
            whole = old == [number] and stop <= total and self.kept[number] == stop - start == base_rows[number]
            found[core_artifacts.part_name(number)] = Origin(tuple(old), tuple(new), whole)
        return found
