"""A run lock with a lease: one run at a time writes an output, and a run that died does not block the next for ever.

The lock is a folder of numbered files. Whoever creates the next number, which only one process can, holds the lock
until it says that it is done or its lease runs out unrenewed. Only the holder writes its own file. A holder that was
held up so long that another took over finds a higher number than its own and stops. The number grows with every
holder: a fencing token.

Expiry compares clocks of two machines: they may differ by less than the lease less the time between two renewals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, StrictBool

from pd_core.core import files, trust
from pd_core.core.errors import RunError, UserError, one_line, printable, shown
from pd_core.core.settings.base import MAX_LEASE_S

RENEWALS = 3  # of a lease before it runs out
KEPT = 8  # files of earlier holders that stay to be read
MAX_HOLDER_BYTES = 64 << 10
MAX_DIGITS = 12
MAX_TOKEN = 10**MAX_DIGITS - 1  # numbers of holders are below
_LOST = signal.SIGUSR1  # not SIGINT, which a shell has its background jobs ignore
_NAME = re.compile(r"([0-9]{8}|[1-9][0-9]{8,})\.json")
_REMOVE = "if no other run writes this output, delete that file, then run again"
_Time = Annotated[float, Field(strict=True, ge=0, le=253_402_300_799)]  # to 9999-12-31, the last that has a date


@dataclass(frozen=True)
class Holder:
    """Who holds the lock: a name for people, times in seconds since 1970, and a nonce that no other attempt has."""

    owner: str
    since: _Time
    expires: _Time
    nonce: str
    done: StrictBool

    def describe(self) -> str:
        """For a message."""
        return f"{printable(one_line(self.owner))} since {_date(self.since)}"


def _date(time_s: float) -> str:
    return datetime.datetime.fromtimestamp(time_s, datetime.UTC).isoformat(timespec="seconds")


class Lease:
    """A lock that is held; `check` before everything that must not be done twice.

    Attributes:
        token: number of this holder; grows with every one.
        failure: why the last renewal failed, if one did.
    """

    def __init__(self, uri: str, token: int, holder: Holder, lease_s: float) -> None:
        self.uri, self.token, self.holder, self.lease_s = uri, token, holder, lease_s
        self._lost: str | None = None
        self.failure = ""

    def check(self) -> None:
        """Raises RunError: another run has taken over, or the lease ran out unrenewed."""
        if self._lost is None and time.time() > self.holder.expires:
            why = f" ({self.failure})" if self.failure else ""
            self._lost = f"its lease ran out, since it could not be renewed in time{why}"
        if self._lost is not None:
            raise RunError(f"{self.uri}: this run has lost the lock: {self._lost}; what is done is kept, run it again")

    def renew(self) -> None:
        """Move the end of the lease, unless it is over or another has taken over: looked at before and after the
        write, which may take any time; the new lease counts from before it.
        """
        renewed = dataclasses.replace(self.holder, expires=time.time() + self.lease_s)
        if self._overtaken() or time.time() > self.holder.expires:
            return
        files.write_bytes(_file(self.uri, self.token), _bytes(renewed))
        if not self._overtaken():
            self.holder = renewed

    def confirm(self) -> None:
        """`check` that asks the store: before what cannot be taken back."""
        self.renew()
        self.check()

    def _overtaken(self) -> bool:
        held = _newest(self.uri)
        if held is not None and held[0] > self.token:
            self._lost = f"taken over by {held[1].describe()}"
        return self._lost is not None

    def release(self) -> None:
        """Say that the run is over; a lock that another has taken over is left alone."""
        if self._lost is None:
            files.write_bytes(_file(self.uri, self.token), _bytes(dataclasses.replace(self.holder, done=True)))


@contextlib.contextmanager
def hold(uri: str, lease_s: float, above: int = 0) -> Iterator[Lease]:
    """Hold the lock of a folder for the body; a thread renews it, and interrupts the body where it is lost. For the
    main thread.

    Args:
        uri: the folder. lease_s: seconds. above: the number of the holder is to be greater, also where the folder was
            lost.

    Raises:
        UserError: a live run holds it; who, and since when.
        RunError: the lock was lost.
    """
    lease = acquire(uri, lease_s, above)
    before = signal.signal(_LOST, signal.default_int_handler)
    over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, over), daemon=True, name="lease")
    renewing.start()
    try:
        yield lease
    except KeyboardInterrupt:
        lease.check()  # says so where the loss of the lock was the reason
        raise
    finally:
        over.set()
        renewing.join()
        try:
            lease.release()
        except Exception as error:  # whatever the store says now, what ended the body matters more
            told = f"{uri}: the lock could not be given back ({one_line(error)}); it ends with its lease"
            print(shown(told), file=sys.stderr)
        signal.signal(_LOST, before)


def acquire(uri: str, lease_s: float, above: int = 0) -> Lease:
    """Take the lock, from nobody, from a run that is done, or from one whose lease has run out; arguments as of `hold`.

    Raises:
        UserError: a live run holds it, or took it at the same moment.
    """
    with files.explained(uri):
        newest = _newest(uri)
        if newest is not None and not newest[1].done and newest[1].expires > time.time():
            raise _held(uri, *newest)
        token = max(above, 0 if newest is None else newest[0]) + 1
        now = time.time()
        holder = Holder(
            f"process {os.getpid()} on {socket.gethostname()}", now, now + lease_s, uuid.uuid4().hex, done=False
        )
        files.create(_file(uri, token), _bytes(holder))
        # Whether it was us is seen in the file: a store's client that repeats a request whose answer was lost is
        # refused by its own first. And the number may be one that was long over when we created it, and cleared.
        newest = _newest(uri)
        if newest is None or newest[0] < token:
            raise UserError(f"{_file(uri, token)}: is in the way of the lock, and no file; {_REMOVE}")
        if newest[0] > token or newest[1].nonce != holder.nonce:
            raise _held(uri, *newest)
        for name in sorted(filter(_NAME.fullmatch, files.sizes(uri)))[:-KEPT]:
            files.delete_file(files.join(uri, name))
    return Lease(uri, token, holder, lease_s)


def _held(uri: str, token: int, holder: Holder) -> UserError:
    until = _date(holder.expires)
    if holder.expires > time.time() + 2 * MAX_LEASE_S:  # twice: clocks differ
        return UserError(
            f"{_file(uri, token)}: a lock of {holder.describe()} whose lease ends {until}, later than any lease can: "
            f"its clock was wrong, or no run has written it; {_REMOVE}"
        )
    return UserError(
        f"{uri}: another run holds the lock: {holder.describe()}, its lease ends {until} unless it is renewed; "
        "wait for it to end, or for its lease if it died"
    )


def _renew(lease: Lease, over: threading.Event) -> None:
    while not over.wait(lease.lease_s / RENEWALS):
        try:
            lease.renew()
            lease.failure = ""
        except (
            Exception
        ) as error:  # a store that does not answer now may do so at the next; `check` knows when it is too late
            lease.failure = one_line(error)
        try:
            lease.check()
        except RunError:
            # a real signal, which wakes the main thread out of whatever it waits for
            signal.pthread_kill(threading.main_thread().ident, _LOST)  # type: ignore[arg-type]
            return


def _newest(uri: str) -> tuple[int, Holder] | None:
    """Number and holder of the last file, None where there is none.

    Raises:
        UserError: it is no file that a run has written, so that nobody knows whether one holds the lock.
    """
    there = files.sizes(uri)
    name = max(filter(_NAME.fullmatch, there), key=lambda name: (len(name), name), default=None)
    if name is None:
        return None
    where, digits = files.join(uri, name), name.partition(".")[0]
    if int(digits[: MAX_DIGITS + 1]) >= MAX_TOKEN:
        raise UserError(f"{where}: the number of no run; {_REMOVE}")
    if there[name] > MAX_HOLDER_BYTES:
        raise UserError(f"{where}: {there[name]} bytes, which is no lock of pd_core; {_REMOVE}")
    data = files.read_bytes(where)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no lock of pd_core ({one_line(error)}); {_REMOVE}") from None
    return int(digits), trust.checked(Holder, values, where, advice=f"it is no lock of pd_core; {_REMOVE}")


def _file(uri: str, token: int) -> str:
    return files.join(uri, f"{token:08d}.json")


def _bytes(holder: Holder) -> bytes:
    return json.dumps(dataclasses.asdict(holder)).encode()
