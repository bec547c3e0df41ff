"""The run lock: one holder at a time, on a disk and on S3; the dead do not block, and those that were overtaken
stop.
"""

import concurrent.futures
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from pd_core.core import files, locks
from pd_core.core.errors import RunError, UserError
from pd_core.curate import releases


@pytest.fixture(params=["disk", "s3"])
def folder(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path / "lock")
    return f"s3://{request.getfixturevalue('s3_environment').make_bucket()}/out/lock"


def test_a_second_run_is_told_who_holds_the_lock_and_takes_it_when_that_is_over(folder):
    with locks.hold(folder, 60) as first:
        with pytest.raises(UserError, match=r"process \d+ on .* since 20.*lease ends 20"):
            locks.acquire(folder, 60)
        first.check()
    with locks.hold(folder, 60) as second:
        assert second.token == first.token + 1


def test_numbers_go_on_where_the_folder_was_lost(tmp_path):
    assert locks.acquire(str(tmp_path), 0.01, above=40).token == 41
    time.sleep(0.05)
    assert locks.acquire(str(tmp_path), 0.01, above=7).token == 42


def test_of_many_that_try_at_once_one_gets_it(folder):
    def attempt(_: int) -> bool:
        try:
            locks.acquire(folder, 60)
        except UserError:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1


def test_a_lease_that_ran_out_is_taken_over_and_its_holder_stops(folder):
    dead = locks.acquire(folder, 0.2)
    time.sleep(0.3)
    with locks.hold(folder, 60) as live:
        assert live.token == dead.token + 1
        dead.renew()  # it wakes up
        with pytest.raises(RunError, match="taken over by process"):
            dead.check()
        dead.release()
        with pytest.raises(UserError, match="another run holds the lock"):  # not released by the one that lost it
            locks.acquire(folder, 60)


def test_a_lease_that_could_not_be_renewed_is_not_relied_on(tmp_path):
    lease = locks.acquire(str(tmp_path), 1.0)
    lease.check()
    time.sleep(1.1)
    with pytest.raises(RunError, match="could not be renewed in time"):
        lease.check()


def test_a_held_lease_is_renewed(tmp_path):
    with locks.hold(str(tmp_path), 1.2) as lease:
        time.sleep(1.8)
        lease.check()
        with pytest.raises(UserError, match="another run holds"):
            locks.acquire(str(tmp_path), 1.2)


def _die_holding(folder: str) -> None:
    import os
    import signal

    locks.acquire(folder, 1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_holder_blocks_no_longer_than_its_lease(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_die_holding, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == -9
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            assert locks.acquire(str(tmp_path), 1.0).token == 2
            return
        except UserError:
            time.sleep(0.1)
    pytest.fail("never taken over")


def test_files_of_earlier_holders_are_cleared(tmp_path):
    for _ in range(locks.KEPT + 5):
        with locks.hold(str(tmp_path), 60):
            pass
    assert len(files.sizes(str(tmp_path))) == locks.KEPT


def test_a_renewal_that_is_written_after_another_took_over_is_no_renewal(tmp_path, monkeypatch):
    slow = locks.acquire(str(tmp_path), 2.0)
    write = files.write_bytes

    def after_a_pause(uri: str, data: bytes) -> None:
        monkeypatch.setattr(files, "write_bytes", write)
        time.sleep(0.7)  # the lease ends meanwhile; the one that is being written would not have ended yet
        locks.acquire(str(tmp_path), 60)
        write(uri, data)

    time.sleep(1.5)
    monkeypatch.setattr(files, "write_bytes", after_a_pause)
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
    with pytest.raises(RunError, match="taken over by process"), locks.hold(str(tmp_path), 0.6):  # noqa: PT012
        files.create(str(tmp_path / "00000002.json"), (tmp_path / "00000001.json").read_bytes())
        threading.Event().wait(30)  # and nobody but the lock wakes it


def test_an_error_of_the_body_is_not_hidden_by_one_of_the_release(tmp_path, monkeypatch, capsys):
    def gone(uri: str, data: bytes) -> None:
        raise PermissionError("ExpiredToken")

    with pytest.raises(UserError, match="the credentials have expired"), locks.hold(str(tmp_path), 60):  # noqa: PT012
        monkeypatch.setattr(files, "write_bytes", gone)
        raise UserError("the credentials have expired")
    assert "the lock could not be given back (ExpiredToken)" in capsys.readouterr().err


def test_a_holder_whose_answer_was_lost_has_the_lock(tmp_path, monkeypatch):
    create = files.create

    def lost(uri: str, data: bytes) -> bool:
        create(uri, data)
        return False  # what the client says when it asks again

    monkeypatch.setattr(files, "create", lost)
    assert locks.acquire(str(tmp_path), 60).token == 1


# ---- locks that no run has written -----------------------------------------------------------------------------------

HOLDER = {"owner": "process 1 on host", "since": 1e9, "expires": 1e9, "nonce": "0", "done": False}
YEAR_4821 = 8.998e10

NO_LOCKS = {
    "not JSON": b"{",
    "nothing": b"",
    "not UTF-8": b"\xff",
    "a list": b"[1]",
    "a number": b"7",
    "nested": b"[" * 60_000,
    "another field": json.dumps({**HOLDER, "more": 1}).encode(),
    "a field too few": json.dumps({"owner": "x"}).encode(),
    "a number of 5,000 digits": json.dumps(HOLDER).replace("1000000000.0", "9" * 5000, 1).encode(),
    "gigabytes": b" " * 70_000,
    **{
        f"{field} {value!r}": json.dumps({**HOLDER, field: value}).encode()
        for field, value in [
            ("owner", ["x"]),
            ("nonce", 1),
            ("done", "no"),
            *[
                (f, v)
                for f in ("since", "expires")
                for v in ("tomorrow", float("nan"), float("inf"), -1e308, 1e308, None)
            ],
            ("expires", True),
        ]
    },
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("content", NO_LOCKS)
def test_a_file_that_no_run_has_written_is_named_with_what_to_do(tmp_path, content):
    (tmp_path / "00000007.json").write_bytes(NO_LOCKS[content])
    with pytest.raises(UserError, match=r"/00000007\.json: .*delete that file, then run again") as caught:
        locks.acquire(str(tmp_path), 60)
    assert "\n" not in str(caught.value)
    (tmp_path / "00000007.json").unlink()
    assert locks.acquire(str(tmp_path), 60).token == 1


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["9" * 12, "9" * 200, "1" + "0" * 240])
def test_a_number_that_no_run_has_is_refused(tmp_path, name):
    (tmp_path / f"{name}.json").write_text(json.dumps(HOLDER))
    with pytest.raises(UserError, match=r"the number of no run; .*delete that file"):
        locks.acquire(str(tmp_path), 60)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_file_is_told_and_not_opened(tmp_path, kind):
    place = tmp_path / "00000001.json"
    {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: os.symlink("/dev/zero", path)}[kind](place)
    with pytest.raises(UserError, match=r"/00000001\.json: is in the way of the lock.*delete that file"):
        locks.acquire(str(tmp_path), 60)


def test_a_lease_that_ends_in_the_year_4821_is_told_as_such(tmp_path):
    owner = "process 1 on \x1b[2J\u202ehost\nerror: nothing is wrong" + "x" * 5000
    (tmp_path / "00000003.json").write_text(json.dumps({**HOLDER, "owner": owner, "expires": YEAR_4821}))
    with pytest.raises(
        UserError, match=r"00000003\.json: a lock of process 1 on .* ends 4821-.*delete that file"
    ) as caught:
        locks.acquire(str(tmp_path), 60)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_lock_that_is_over_is_taken_whatever_its_times(tmp_path):
    (tmp_path / "00000003.json").write_text(json.dumps({**HOLDER, "expires": YEAR_4821, "done": True}))
    (tmp_path / "00000004.json").write_text(json.dumps({**HOLDER, "since": 0, "expires": 0}))
    assert locks.acquire(str(tmp_path), 60).token == 5


def test_a_run_whose_lock_is_spoilt_says_why_it_stops(tmp_path):
    with (  # noqa: PT012
        pytest.raises(RunError, match=r"could not be renewed in time \(.*00000002\.json: no lock of pd_core"),
        locks.hold(str(tmp_path), 1.2),
    ):
        (tmp_path / "00000002.json").write_text("{")
        threading.Event().wait(30)


@pytest.mark.parametrize("token", ['"many"', "1e999", "-1", "1.5", "true", "null", "9" * 300])
def test_the_number_of_a_lock_in_latest_json_is_one(tmp_path, token):
    (tmp_path / "latest.json").write_text(f'{{"release": "x", "lock_token": {token}}}')
    with pytest.raises(UserError, match=r"latest\.json: `lock_token` is no number of a lock"):
        releases.lock_token(str(tmp_path))
    (tmp_path / "latest.json").write_text('{"release": "x", "lock_token": 41}')
    assert releases.lock_token(str(tmp_path)) == 41
