"""A run lock with a lease: one run at a time writes an output, and a run that died does not block the next for ever.

The lock is a folder of numbered files. Whoever creates the next number, which only one process can, holds the lock until it
says that it is done or its lease runs out unrenewed. Only the holder writes its own file. A holder that was held up so long that
another took over finds a higher number than its own and stops. The number grows with every holder: a fencing token.

Expiry compares clocks of two machines: they may differ by less than the lease less the time between two renewals.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from pd_core import storage
from pd_core.errors import RunError, UserError

RENEWALS = 3  # of a lease before it runs out
KEPT = 8  # files of earlier holders that stay to be read
_NAME = re.compile(r"(\d{8,})\.json")


@dataclass(frozen=True)
class Holder:
    """Who holds the lock: a name for people, and times in seconds since 1970."""

    owner: str
    since: float
    expires: float
    done: bool = False

    def describe(self) -> str:
        """For a message."""
        since = datetime.datetime.fromtimestamp(self.since, datetime.UTC).isoformat(timespec="seconds")
        return f"{self.owner} since {since}"


class Lease:
    """A lock that is held; `check` before everything that must not be done twice.

    Attributes:
        token: number of this holder; grows with every one.
    """

    def __init__(self, uri: str, token: int, holder: Holder, lease_s: float) -> None:
        self.uri, self.token, self.holder, self.lease_s = uri, token, holder, lease_s
        self._lost: str | None = None

    def check(self) -> None:
        """Raises RunError: another run has taken over, or the lease ran out unrenewed."""
        if self._lost is None and time.time() > self.holder.expires:
            self._lost = "its lease ran out, since it could not be renewed in time"
        if self._lost is not None:
            raise RunError(f"{self.uri}: this run has lost the lock: {self._lost}; what is done is kept, run it again")

    def renew(self) -> None:
        """Move the end of the lease; see whether it is still ours."""
        held = _newest(self.uri)
        if held is not None and held[0] > self.token:
            self._lost = f"taken over by {held[1].describe()}"
            return
        renewed = Holder(self.holder.owner, self.holder.since, time.time() + self.lease_s)
        storage.write_bytes(_file(self.uri, self.token), _bytes(renewed))
        self.holder = renewed

    def release(self) -> None:
        """Say that the run is over; a lock that another has taken over is left alone."""
        if self._lost is None:
            done = Holder(self.holder.owner, self.holder.since, self.holder.expires, done=True)
            storage.write_bytes(_file(self.uri, self.token), _bytes(done))


@contextlib.contextmanager
def hold(uri: str, lease_s: float) -> Iterator[Lease]:
    """Hold the lock of a folder for the body; a thread renews it.

    Raises:
        UserError: a live run holds it; who, and since when.
    """
    lease = acquire(uri, lease_s)
    over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, over), daemon=True, name="lease")
    renewing.start()
    try:
        yield lease
    finally:
        over.set()
        renewing.join()
        lease.release()


def acquire(uri: str, lease_s: float) -> Lease:
    """Take the lock, from nobody, from a run that is done, or from one whose lease has run out.

    Raises:
        UserError: a live run holds it, or took it at the same moment.
    """
    with storage.explained(uri):
        newest = _newest(uri)
        if newest is not None and not newest[1].done and newest[1].expires > time.time():
            raise _held(uri, newest[1])
        token = 1 if newest is None else newest[0] + 1
        now = time.time()
        holder = Holder(f"process {os.getpid()} on {socket.gethostname()}", now, now + lease_s)
        created = storage.create(_file(uri, token), _bytes(holder))
        newest = _newest(uri)
        assert newest is not None, "whoever has created it"
        if not created or newest[0] > token:  # the latter: this number was long over when it was created, and cleared
            raise _held(uri, newest[1])
        for name in sorted(filter(_NAME.fullmatch, storage.sizes(uri)))[:-KEPT]:
            storage.delete_file(storage.join(uri, name))
    return Lease(uri, token, holder, lease_s)


def _held(uri: str, holder: Holder) -> UserError:
    until = datetime.datetime.fromtimestamp(holder.expires, datetime.UTC).isoformat(timespec="seconds")
    return UserError(
        f"{uri}: another run holds the lock: {holder.describe()}, its lease ends {until} unless it is renewed; "
        "wait for it to end, or for its lease if it died"
    )


def _renew(lease: Lease, over: threading.Event) -> None:
    while not over.wait(lease.lease_s / RENEWALS):
        # a store that does not answer now may do so at the next renewal; `check` knows when it is too late
        with contextlib.suppress(Exception):
            lease.renew()


def _newest(uri: str) -> tuple[int, Holder] | None:
    """Number and holder of the last file, None where there is none."""
    numbers = [int(found[1]) for name in storage.sizes(uri) if (found := _NAME.fullmatch(name))]
    if not numbers:
        return None
    return max(numbers), Holder(**json.loads(storage.read_bytes(_file(uri, max(numbers)))))


def _file(uri: str, token: int) -> str:
    return storage.join(uri, f"{token:08d}.json")


def _bytes(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()
