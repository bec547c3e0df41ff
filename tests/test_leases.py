"""The run lock: one holder at a time, on a disk and on S3; the dead do not block, and those that were overtaken stop."""

import concurrent.futures
import multiprocessing
import signal
import threading
import time

import pytest

from pd_core import leases, storage
from pd_core.errors import RunError, UserError


@pytest.fixture(params=["disk", "s3"])
def folder(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path / "lock")
    return f"s3://{request.getfixturevalue('s3_environment').make_bucket()}/out/lock"


def test_a_second_run_is_told_who_holds_the_lock_and_takes_it_when_that_is_over(folder):
    with leases.hold(folder, 60) as first:
        with pytest.raises(UserError, match=r"process \d+ on .* since 20.*lease ends 20"):
            leases.acquire(folder, 60)
        first.check()
    with leases.hold(folder, 60) as second:
        assert second.token == first.token + 1


def test_numbers_go_on_where_the_folder_was_lost(folder):
    assert leases.acquire(folder, 0.01, above=40).token == 41
    time.sleep(0.05)
    assert leases.acquire(folder, 0.01, above=7).token == 42


def test_of_many_that_try_at_once_one_gets_it(folder):
    def attempt(_: int) -> bool:
        try:
            leases.acquire(folder, 60)
        except UserError:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1


def test_a_lease_that_ran_out_is_taken_over_and_its_holder_stops(folder):
    dead = leases.acquire(folder, 0.2)
    time.sleep(0.3)
    with leases.hold(folder, 60) as live:
        assert live.token == dead.token + 1
        dead.renew()  # it wakes up
        with pytest.raises(RunError, match="taken over by process"):
            dead.check()
        dead.release()
        with pytest.raises(UserError, match="another run holds the lock"):  # not released by the one that lost it
            leases.acquire(folder, 60)


def test_a_lease_that_could_not_be_renewed_is_not_relied_on(folder):
    lease = leases.acquire(folder, 2.0)
    lease.check()
    time.sleep(2.1)
    with pytest.raises(RunError, match="could not be renewed in time"):
        lease.check()


def test_a_held_lease_is_renewed(folder):
    with leases.hold(folder, 1.5) as lease:
        time.sleep(2.5)
        lease.check()
        with pytest.raises(UserError, match="another run holds"):
            leases.acquire(folder, 1.5)


def _die_holding(folder: str) -> None:
    import os
    import signal

    leases.acquire(folder, 1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_holder_blocks_no_longer_than_its_lease(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_die_holding, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == -9
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            assert leases.acquire(str(tmp_path), 1.0).token == 2
            return
        except UserError:
            time.sleep(0.1)
    pytest.fail("never taken over")


def test_files_of_earlier_holders_are_cleared(tmp_path):
    for _ in range(leases.KEPT + 5):
        with leases.hold(str(tmp_path), 60):
            pass
    assert len(storage.sizes(str(tmp_path))) == leases.KEPT


def test_a_renewal_that_is_written_after_another_took_over_is_no_renewal(tmp_path, monkeypatch):
    slow = leases.acquire(str(tmp_path), 2.0)
    write = storage.write_bytes

    def after_a_pause(uri: str, data: bytes) -> None:
        monkeypatch.setattr(storage, "write_bytes", write)
        time.sleep(0.7)  # the lease ends meanwhile; the one that is being written would not have ended yet
        leases.acquire(str(tmp_path), 60)
        write(uri, data)

    time.sleep(1.5)
    monkeypatch.setattr(storage, "write_bytes", after_a_pause)
    slow.renew()
    with pytest.raises(RunError, match="taken over by process"):
        slow.check()


@pytest.fixture(params=[signal.SIG_IGN, signal.default_int_handler], ids=["in the background", "in a terminal"])
def _heed_of_ctrl_c(request):
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heed_of_ctrl_c")
def test_a_run_that_loses_its_lock_is_interrupted_and_says_so(tmp_path):
    with pytest.raises(RunError, match="taken over by process"), leases.hold(str(tmp_path), 0.6):  # noqa: PT012
        storage.create(str(tmp_path / "00000002.json"), (tmp_path / "00000001.json").read_bytes())
        threading.Event().wait(30)  # and nobody but the lock wakes it


def test_an_error_of_the_body_is_not_hidden_by_one_of_the_release(tmp_path, monkeypatch, capsys):
    def gone(uri: str, data: bytes) -> None:
        raise PermissionError("ExpiredToken")

    with pytest.raises(UserError, match="the credentials have expired"), leases.hold(str(tmp_path), 60):  # noqa: PT012
        monkeypatch.setattr(storage, "write_bytes", gone)
        raise UserError("the credentials have expired")
    assert "the lock could not be given back (ExpiredToken)" in capsys.readouterr().err


def test_a_holder_whose_answer_was_lost_has_the_lock(tmp_path, monkeypatch):
    create = storage.create

    def lost(uri: str, data: bytes) -> bool:
        create(uri, data)
        return False  # what the client says when it asks again

    monkeypatch.setattr(storage, "create", lost)
    assert leases.acquire(str(tmp_path), 60).token == 1
