"""WebDataset tars: members that share a name up to its first dot are one sample; its image members are the images.

Only the headers and the small text members are read for the listing. Text members become metadata: a field per
extension seen in the first tar (its first PEEK_MEMBERS members), and `other_members`, a JSON object of those seen
later.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa

from pd_core.core.errors import UserError, printable
from pd_core.images.decode import BadImage, Reason
from pd_core.images.sources import names, stores, tars
from pd_core.images.sources.base import Source, containers, listing_table
from pd_core.images.sources.stores import Span

OTHER = "other_members"
BROKEN_SIZE = -1  # and less: the listing's `size` of the row for what lies behind a break, less the images before it
PEEK_MEMBERS = 1000
MAX_NAME_CHARACTERS = 4096  # longer ones are of no file system
MAX_TEXT_BYTES = 64 << 10
MAX_SAMPLE_TEXTS = 1000
MAX_SAMPLE_BYTES = 256 << 10  # of the texts of one sample
MAX_HELD_BYTES = 512 << 20  # of the texts of a tar, with their headers
MAX_REPEATS = 64  # times that the texts of a tar are repeated on the average, where samples have many images
SCANS = 8  # tars scanned at the same time on S3
TABLE_ROWS = 4096  # each with as much as MAX_SAMPLE_BYTES

_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")


@dataclass
class Tar:
    """What one tar holds.

    Attributes:
        images: (member name, first byte, bytes), in file order.
        texts: text members of each sample by extension.
        broken_at: byte from which the tar cannot be read; None if it is whole.
        held, given: bytes of texts that are kept, and that rows of the listing got so far.
    """

    images: list[tuple[str, int, int]] = field(default_factory=list)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    broken_at: int | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    held: int = 0
    given: int = 0

    def keep(self, sample: str, extension: str, text: str) -> bool:
        """Keep a text, unless the sample or the tar has too many already."""
        texts = self.texts.get(sample, {})
        cost = len(text) + tars.BLOCK_BYTES
        in_sample = sum(map(len, texts.values())) + len(text)
        if len(texts) >= MAX_SAMPLE_TEXTS or in_sample > MAX_SAMPLE_BYTES or self.held + cost > MAX_HELD_BYTES:
            return False
        self.held += cost
        self.texts.setdefault(sample, {})[extension] = text
        return True

    def give(self, sample: str) -> dict[str, str]:
        """The texts of a sample for the row of one image, unless rows before it got too many."""
        texts = self.texts.get(sample, {})
        self.given += sum(map(len, texts.values()))
        if self.given <= MAX_REPEATS * self.held:
            return texts
        names.leave_out(self.skipped, "(texts of images beyond the limit, in a tar)")
        return {}


def scan(file: BinaryIO, shown: str, max_members: int | None = None) -> Tar:
    """The members of a tar, up to its end, its first break or `max_members`.

    Raises:
        UserError: the tar is compressed.
        OSError: the file cannot be read.
    """
    if file.read(6).startswith(_PACKED):
        raise UserError(f"{shown}: a compressed tar cannot be read at random; unpack it to a plain .tar")
    tar = Tar()
    stop = 0
    try:
        for member in itertools.islice(tars.members(file), max_members):
            _add(member, file, tar)
            stop = member.stop
    except tars.Broken:
        tar.broken_at = stop
    return tar


def _sample(name: str) -> tuple[str, str]:
    """Name of the sample that a member belongs to, and its extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _add(member: tars.Member, file: BinaryIO, tar: Tar) -> None:
    if member.is_folder:
        return
    sample, extension = _sample(member.name)
    if not member.is_file:
        names.leave_out(tar.skipped, "(link or special file in a tar)")
    elif len(member.name) > MAX_NAME_CHARACTERS:
        names.leave_out(tar.skipped, f"(name of more than {MAX_NAME_CHARACTERS} characters in a tar)")
    elif member.name.rpartition("/")[2].startswith("."):
        names.leave_out(tar.skipped, stores.HIDDEN)
    elif f".{extension.rpartition('.')[2]}" in names.IMAGE_SUFFIXES:
        tar.images.append((member.name, member.start, member.size))
    elif (text := _text(member, file)) is None:
        names.leave_out(tar.skipped, f".{extension} (in a tar)")
    elif not tar.keep(sample, extension, text):
        names.leave_out(tar.skipped, "(text beyond the limits of a sample or a tar)")


def _text(member: tars.Member, file: BinaryIO) -> str | None:
    if member.size > MAX_TEXT_BYTES:
        return None
    file.seek(member.start)
    try:
        return file.read(member.size).decode("utf-8")
    except UnicodeDecodeError:
        return None


def open_metadata(source: Source) -> pa.StructType:
    """The metadata type, from the first tar that has images.

    Raises:
        UserError: no tar has images, a tar is compressed or cannot be opened, or no sample has the label's member.
    """
    store = source.store()
    entries = containers(source, Counter())
    broken = ""
    for entry in entries:
        tar = _scan_entry(store, entry.name, PEEK_MEMBERS)
        if tar.images:
            break
        if tar.broken_at is not None and not broken:
            broken = f" ({printable(entry.name)} is broken at byte {tar.broken_at})"
    else:
        shown = printable(source.settings.source or "")
        raise UserError(f"{shown}: no image members in {len(entries)} tars{broken}; check data.source")
    extensions = {extension for texts in tar.texts.values() for extension in texts}
    label = _label_extension(source)
    if label is not None and label not in extensions:
        raise UserError(
            f"data.labels: {printable(entry.name)} has no text member {label!r}; {names.nearest(label, extensions)}"
        )
    fields = sorted(names.escape(e) for e in extensions - {label, OTHER, ""})
    return pa.struct([pa.field(name, pa.string()) for name in [*fields, OTHER]])


def _label_extension(source: Source) -> str | None:
    form, _, extension = source.settings.labels.partition(":")
    return extension.lstrip(".").lower() if form == "member" else None


def _scan_entry(store: stores.Store, name: str, max_members: int | None = None) -> Tar:
    with stores.explained(store, name), store.open(name, time.sleep) as file:
        return scan(file, printable(f"{store.uri}/{name}"), max_members)


# ---- listing ---------------------------------------------------------------------------------------------------------


def tables(source: Source, skipped: Counter[str]) -> Iterator[pa.Table]:
    """Tables of the listing, by tar and place in it; `offset` and `size` are the image's byte range.

    A tar that breaks off gives one more row at the byte where it does, with size BROKEN_SIZE less its images before
    that.
    """
    store = source.store()
    states = {entry.name: entry.state for entry in containers(source, skipped)}
    workers = SCANS if isinstance(store, stores.S3) else 1
    for name, tar in _ahead(lambda name: _scan_entry(store, name), list(states), workers):
        for start in range(0, len(tar.images), TABLE_ROWS):
            yield _table(source, name, states[name], tar, start)
        for heading, count in tar.skipped.items():
            names.leave_out(skipped, heading, count)
        if tar.broken_at is not None:
            metadata = pa.nulls(1, source.metadata_type)
            key = f"{name}#{tar.broken_at}"
            size = BROKEN_SIZE - len(tar.images)
            yield listing_table(source, [key], [name], [tar.broken_at], [size], [states[name]], [None], metadata)


def _ahead(work: Callable[[str], Tar], items: list[str], workers: int) -> Iterator[tuple[str, Tar]]:
    """`work` of each item, in order, with at most `workers` of them under way or waiting."""
    waiting: deque[tuple[str, Future[Tar]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            if len(waiting) == workers:
                name, future = waiting.popleft()
                yield name, future.result()
            waiting.append((item, pool.submit(work, item)))
        while waiting:
            name, future = waiting.popleft()
            yield name, future.result()


def _table(source: Source, name: str, state: int, tar: Tar, start: int) -> pa.Table:
    images = tar.images[start : start + TABLE_ROWS]
    label = _label_extension(source)
    texts = [tar.give(_sample(member)[0]) for member, _, _ in images]
    return listing_table(
        source,
        [f"{name}#{names.escape(member)}" for member, _, _ in images],
        [name] * len(images),
        [offset for _, offset, _ in images],
        [size for _, _, size in images],
        [state] * len(images),
        [text[label].strip() if label in text else None for text in texts],
        _metadata(source, texts, label),
    )


def _metadata(source: Source, texts: list[dict[str, str]], label: str | None) -> pa.Array:
    assert source.metadata_type is not None
    fields = [f.name for f in source.metadata_type if f.name != OTHER]
    rows = []
    for text in texts:
        escaped = {names.escape(extension): value for extension, value in text.items() if extension != label}
        row = {name: escaped.pop(name, None) for name in fields}
        row[OTHER] = json.dumps(escaped, sort_keys=True, ensure_ascii=False) if escaped else None
        rows.append(row)
    return pa.array(rows, source.metadata_type)


def span(name: str, offset: int, size: int) -> Span | BadImage:
    """Where to read a row of the listing."""
    if size <= BROKEN_SIZE:
        before = f", images before that: {BROKEN_SIZE - size:,}" if size < BROKEN_SIZE else ""
        at = f"the tar ends in the middle, or is corrupt, at byte {offset}{before}"
        return BadImage(Reason.UNREADABLE, f"{at}; all behind it counts as one bad image")
    return Span(name, offset, size)
