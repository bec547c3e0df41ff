"""Sizes of the stages' processes: a table over clusters of 0 to 64 CPUs, and which of them are taken to grow."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pd_core.core import artifacts, errors
from pd_core.core.errors import EXIT_INTERRUPTED, RunError, UserError
from pd_core.engine import resources, runs, session, tasks
from pd_core.engine.resources import FEED_CPUS, Cluster
from pd_core.index import search
from tests.ray_head import autoscaling_head, running_head


def joined(cpus: float, gpus: float = 0.0, node_cpus: float | None = None) -> Cluster:
    """One whose nodes were started by hand."""
    return Cluster(cpus, gpus, local=False, address="", node_cpus=cpus if node_cpus is None else node_cpus)


def scaling(cpus: float, gpus: float = 0.0, node_cpus: float | None = None) -> Cluster:
    """One that an autoscaler adds nodes to."""
    return replace(joined(cpus, gpus, node_cpus), elastic=True)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(resources, "cores", lambda: 2)


LOCAL = Cluster(4.0, 0.0, local=True, address="", node_cpus=4.0)
FIXED = [LOCAL, *(joined(cpus) for cpus in (1.0, 2.0, 4.0, 8.0)), joined(64.0, node_cpus=16.0)]


@pytest.mark.parametrize("now", FIXED, ids=str)
@pytest.mark.parametrize("actors", [None, 1, 3, 12])
@pytest.mark.parametrize("cpus", [1, 2, 16])
def test_actors_leave_a_cpu_to_the_tasks_that_feed_them(now, actors, cpus):
    fewest, most, claim, gpus = resources.actor_pool(now, actors, cpus, None)
    assert 1 <= fewest <= most == (actors or most) and gpus == 0
    assert most * claim + FEED_CPUS <= now.cpus
    count, threads, claim, _ = resources.search_actors(now, actors, cpus, shards=100)
    assert count * claim <= now.cpus - FEED_CPUS and threads >= cpus and count == (actors or count)


@pytest.mark.parametrize("now", [scaling(0.0), scaling(8.0), scaling(64.0, node_cpus=16.0)], ids=str)
def test_an_elastic_cluster_is_asked_for_more_than_it_has(now):
    fewest, most, claim, _ = resources.actor_pool(now, None, 2, None)
    assert (fewest, most, claim) == (1, resources.AUTOSCALED_ACTORS, 2.0)
    # actors asked for are grown to, one by one: twelve at once on twelve CPUs would leave none to decode
    assert resources.actor_pool(now, 12, 1, None)[:3] == (1, 12, 1.0)


@pytest.mark.parametrize(
    ("now", "gpus", "expected"),
    [
        (scaling(64.0, 4.0), None, (1, 64, 1.0, 1.0)),
        (scaling(64.0, 4.0), 0.5, (1, 64, 1.0, 0.5)),
        (scaling(0.0, 0.0), 1.0, (1, 64, 1.0, 1.0)),  # GPUs that scale from zero, as the user says
        (scaling(64.0, 4.0), 0.0, (1, 64, 1.0, 0.0)),  # the user wants none
        (joined(64.0, 4.0), None, (1, 4, 1.0, 1.0)),
        (Cluster(32.0, 2.0, True, "", 32.0), None, (1, 2, 1.0, 1.0)),
    ],
    ids=str,
)
def test_gpus_are_used_where_there_are_any_or_the_user_says_so(now, gpus, expected):
    assert resources.actor_pool(now, None, 1, gpus) == expected


@pytest.mark.parametrize("now", [*FIXED, scaling(64.0, 4.0)], ids=str)
@pytest.mark.parametrize("actors", [None, 8])
def test_no_more_actors_than_there_is_work(now, actors):
    for work in (1, 5, 1000):
        fewest, most, _, _ = resources.actor_pool(now, actors, 1, None, work)
        assert 1 <= fewest <= most <= work


@pytest.mark.parametrize("gpus", [0.5, 1.0])
def test_gpus_that_nobody_will_add_are_refused(gpus):
    with pytest.raises(UserError, match=r"actor_gpus .*: this machine has 0 GPUs"):
        resources.actor_pool(LOCAL, None, 1, gpus)
    assert resources.actor_pool(LOCAL, None, 1, 0.0)[3] == 0


def test_gpus_that_scaled_away_since_a_run_began_are_asked_for_again(capsys):
    away = scaling(8.0)
    assert resources.gpus_to_ask(away, None, "cuda") == 1.0
    assert capsys.readouterr().out == ""
    assert resources.gpus_to_ask(away, None, None) is None
    assert "no GPU is up" in capsys.readouterr().out
    for now, asked in ((away, 0.0), (away, 0.25), (scaling(8.0, 2.0), None), (LOCAL, None)):
        assert resources.gpus_to_ask(now, asked, "cuda") == asked
    assert capsys.readouterr().out == ""


def test_patience_begins_anew_with_every_execution_that_made_something(monkeypatch):
    monkeypatch.setattr(tasks, "ROUND_DELAYS_S", (0.0, 0.0, 0.0))
    done, rounds = [0], [0]

    def execute():
        rounds[0] += 1
        done[0] += rounds[0] <= 10  # ten nodes die, each after a part; then nothing more comes
        raise RunError(f"node {rounds[0]} died")

    with pytest.raises(RunError, match="node 12 died"):
        tasks.persist("samples", execute, lambda: done[0])
    assert rounds == [12]


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_store_said_in_a_task_is_told_without_its_wrapping(monkeypatch, capsys):
    monkeypatch.setattr(tasks, "ROUND_DELAYS_S", (0.0, 0.0))

    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError) as failure:
        tasks.persist("samples", lambda: tasks.get(tasks.task(full).remote()), lambda: 0)
    told = "OSError: [Errno 28] No space left on device"
    assert (
        str(failure.value) == f"samples: repeated failures ({told}); what is done is kept, run the same command again"
    )
    assert f"samples: {told}; trying what is missing again in 0 s" in capsys.readouterr().out


def test_no_actor_claims_more_than_the_largest_node_has():
    now = joined(16.0, node_cpus=4.0)
    assert resources.actor_pool(now, None, 8, None)[2] == 4.0
    assert resources.search_actors(now, 2, 8, shards=4) == (2, 8, 4.0, 0)
    assert resources.search_actors(joined(64.0, node_cpus=16.0), None, 1, shards=5) == (
        5,
        9,
        1.0,
        0,
    )  # 5 x 9 fit no 4 x 16


@pytest.mark.parametrize(
    ("now", "actors", "shards", "expected"),
    [
        (LOCAL, None, 1, (1, 2, 1.0)),  # one shard: one process with both cores
        (LOCAL, None, 9, (2, 1, 1.0)),
        (LOCAL, 1, 9, (1, 2, 1.0)),
        (joined(64.0, node_cpus=16.0), None, 1, (1, 16, 1.0)),
        (joined(64.0, node_cpus=16.0), None, 100, (48, 1, 1.0)),
        (scaling(0.0), None, 3, (1, 1, 1.0)),
    ],
    ids=str,
)
def test_search_processes_use_the_cores_that_shards_leave_idle(now, actors, shards, expected):
    assert resources.search_actors(now, actors, 1, shards)[:3] == expected


def test_tasks_that_ask_actors_run_beside_them_whatever_these_claimed():
    for now in (*FIXED, scaling(8.0), scaling(64.0, node_cpus=16.0)):
        for actors in (None, 1, 12, 64):
            count, _, claim, _ = resources.search_actors(now, actors, 1, shards=100)
            assert count * claim + resources.io_cpus(now, count * claim) <= max(now.cpus, count * claim)


@pytest.mark.parametrize("now", [*FIXED, scaling(0.0), scaling(8.0), scaling(64.0, 4.0, node_cpus=16.0)], ids=str)
@pytest.mark.parametrize("shards", [1, 100])
def test_a_generator_finds_room_beside_the_search_it_needs(now, shards):
    """CPUs of both and of the tasks between them fit, all GPUs are the generator's, and what is elastic stays so."""
    count, _, claim, gpus = resources.search_actors(now, None, 1, shards, search.BESIDE_SHARE)
    beside = replace(now, held_cpus=count * claim)
    _, most, each, per_gpu = resources.actor_pool(beside, None, 1, None)
    assert gpus == 0 and per_gpu == (1.0 if now.gpus else 0.0)
    assert beside.elastic == now.elastic
    if now.elastic:
        assert most >= resources.AUTOSCALED_ACTORS
        return
    assert count * claim + most * each + resources.io_cpus(now, count * claim) <= now.cpus


# What Ray's monitor writes: in a cluster that scales the types of its nodes, else a type for each node, after its id.
WORKERS = {"autoscaler_report": {"active_nodes": {"ray.head.default": 1, "cpu": 1}, "pending_launches": {}}}
EMPTY = {"autoscaler_report": {"active_nodes": {"head": 1}, "pending_launches": {}}}
BY_HAND = {"autoscaler_report": {"active_nodes": {f"node_{'0f' * 28}": 1, f"node_{'a1' * 28}": 1}}}
NOT_YET: dict[str, Any] = {"load_metrics_report": {}}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (WORKERS, True),
        (EMPTY, True),
        ({"autoscaler_report": {"active_nodes": {}, "pending_launches": {"node_gpu": 1}}}, True),
        (BY_HAND, False),
        (NOT_YET, None),
        ({"autoscaler_report": {"active_nodes": {}}}, None),
    ],
)
def test_whether_a_cluster_scales_is_what_its_monitor_says(status, expected):
    assert resources.scales(status) is expected


def ray_of(monkeypatch, nodes, status):
    """A cluster that Ray would tell of: resources of its nodes, the head first, and what its monitor wrote."""
    heads = [{"node:__internal_head__": 1.0}] + [{}] * (len(nodes) - 1)
    alive = [{"Alive": True, "Resources": {**node, **head}} for node, head in zip(nodes, heads, strict=True)]
    monkeypatch.setattr("ray.nodes", lambda: alive)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": sum(node.get("CPU", 0.0) for node in nodes)})
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address=""))
    written = None if status is None else json.dumps(status).encode()
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", lambda key: written)
    return resources.describe(local=False)


@pytest.mark.parametrize(
    ("nodes", "status", "expected"),
    [
        ([{}], EMPTY, True),
        ([{}, {"CPU": 8.0}], WORKERS, True),
        ([{"CPU": 8.0}], EMPTY, True),  # the head computes too
        ([{"CPU": 8.0}], BY_HAND, False),
        ([{}, {"CPU": 64.0}], BY_HAND, False),
        ([{}, {"CPU": 8.0}], None, True),  # the second autoscaler says nothing
        ([{}], NOT_YET, True),
        ([{"CPU": 4.0}, {"CPU": 4.0}], None, True),
        ([{"CPU": 8.0}], None, False),
        ([{"CPU": 64.0}], None, False),
    ],
)
def test_a_cluster_is_elastic_where_ray_says_so_or_where_it_looks_so(monkeypatch, nodes, status, expected):
    """Eight CPUs may be one worker of twenty: how many are up says nothing."""
    assert ray_of(monkeypatch, nodes, status).elastic is expected


@pytest.mark.parametrize("status", [WORKERS, None, NOT_YET])
def test_a_cluster_that_scales_does_so_still_when_its_first_worker_is_up(monkeypatch, status):
    before = ray_of(monkeypatch, [{}], EMPTY)
    ray_of(monkeypatch, [{}, {"CPU": 8.0}], status)
    now = resources.refreshed(before)
    assert (before.cpus, now.cpus) == (0.0, 8.0)
    for seen in (before, now):
        assert resources.actor_pool(seen, None, 1, 1.0)[:2] == (1, resources.AUTOSCALED_ACTORS)
    ray_of(monkeypatch, [{"CPU": 8.0}], status)  # a head that computes and is alone again
    assert resources.refreshed(before).elastic


def test_what_a_cluster_looks_like_is_forgotten_once_ray_tells(monkeypatch):
    before = ray_of(monkeypatch, [{}, {"CPU": 8.0}], None)
    ray_of(monkeypatch, [{}, {"CPU": 8.0}], BY_HAND)
    assert before.elastic and not resources.refreshed(before).elastic


def test_a_cluster_of_our_own_is_not_elastic(ray_cluster):
    assert not ray_cluster.elastic and not resources.refreshed(ray_cluster).elastic


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("grows", [True, False])
def test_ray_itself_tells_who_scales(tmp_path, grows):
    """A head of each kind; the first seconds, in which its monitor has not looked yet, are left to looks."""
    options = {"cpu": {"CPU": 8, "max": 2}}
    head = autoscaling_head(tmp_path, options) if grows else running_head(tmp_path, "--num-cpus=2")
    code = (
        "import time; from pd_core.engine import resources, session; session.connect()\n"
        "while (told := resources._scales()) is None: time.sleep(0.5)\n"
        'print(f"told: {told}, {resources.describe(local=False).elastic}", flush=True)'
    )
    with head as up:
        found = subprocess.run(
            [sys.executable, "-c", code],
            env={**up.environment, "RAY_ADDRESS": up.address},
            capture_output=True,
            text=True,
            timeout=90,
        )
    assert f"told: {grows}, {grows}" in found.stdout, found.stderr


def test_a_search_that_has_the_cluster_to_itself_uses_its_gpus():
    assert resources.search_actors(joined(64.0, 4.0, node_cpus=16.0), None, 1, shards=4)[3] == 1
    assert resources.search_actors(joined(64.0, 4.0, node_cpus=16.0), None, 1, shards=5)[3] == 0


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "[::1]:9"])
def test_an_address_where_nobody_listens_is_told(monkeypatch, address):
    monkeypatch.setattr(session, "LISTENS_S", 0.1)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(RunError, match="no Ray cluster answers there"):
        session.connect()


def test_a_job_refuses_an_output_that_would_go_with_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(session.JOB_VARIABLE, json.dumps({"runtime_env": {"working_dir": "gcs://a.zip"}}))
    with pytest.raises(UserError, match="--output runs/lost: would lie in this job's temporary copy"):
        runs.checked_output("runs/lost", "build_index")
    assert runs.checked_output(f"{tmp_path}/kept", "build_index") == f"{tmp_path}/kept"


RUN = """
import sys, time
import ray
from pd_core.core import errors, locks
from pd_core.engine import session, tasks

def program():
    with locks.hold(sys.argv[1], 900), session.session("/nowhere"):
        print("it is up", flush=True)
        tasks.get(tasks.task(time.sleep).remote(60))

raise SystemExit(errors.exit_code(program))
"""


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path):
    # Ray's start puts handlers in place that abort (exit 134, and a stack) or exit without a word: no lock was given
    # back
    command = [sys.executable, "-c", RUN, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        while "it is up" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in child.name() for child in family)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == EXIT_INTERRUPTED
    assert said.splitlines()[-1].startswith("interrupted: ") and "SIGTERM" not in said
    assert not psutil.wait_procs(family, timeout=30)[1]
    (holder,) = (json.loads(file.read_text()) for file in (tmp_path / "lock").iterdir())
    assert holder["done"]


def test_ray_s_own_exit_by_sigterm_is_an_interruption(capsys):
    assert errors.exit_code(lambda: sys.exit(signal.SIGTERM)) == EXIT_INTERRUPTED  # its handler while it starts
    assert capsys.readouterr().err.startswith("interrupted: ")
    with pytest.raises(SystemExit, match="2"):
        errors.exit_code(lambda: sys.exit(2))


def test_a_handler_of_sigterm_outlives_the_start_and_the_end_of_ray():
    code = """
import os
import signal
from pd_core.core import artifacts, errors
from pd_core.engine import session

def program():
    ours = signal.getsignal(signal.SIGTERM)
    with session.session("/nowhere"):
        assert signal.getsignal(signal.SIGTERM) is ours
    assert signal.getsignal(signal.SIGTERM) is ours
    signal.raise_signal(signal.SIGTERM)

raise SystemExit(errors.exit_code(program))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_INTERRUPTED, done.stderr


TWO_RAYS = """
import os, psutil
from pd_core.engine import session

for _ in range(2):
    with session.session("/nowhere") as now:
        family = psutil.Process().children(recursive=True)
        told = {process.environ().get("RAY_AUTH_TOKEN") for process in family} - {None}
        print("token", *told, now.address, flush=True)
        input()
print("after", os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_MODE"))
"""
ASK = "import sys; from ray._raylet import GcsClient; GcsClient(sys.argv[1]).internal_kv_keys(b'', None, 10.0)"


def asked(address: str, token: str | None) -> int:
    """Exit code of a client of a cluster."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    if token is not None:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    return subprocess.run([sys.executable, "-c", ASK, address], env=environment, capture_output=True).returncode


@pytest.mark.slow
def test_each_ray_of_our_own_asks_for_a_token_that_is_kept_nowhere(tmp_path):
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "RAY_AUTH_TOKEN": "of another cluster",
        "RAY_AUTH_MODE": "disabled",
    }
    command = [sys.executable, "-c", TWO_RAYS]
    pipe = subprocess.PIPE
    tokens = []
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(2):
            while not (line := process.stdout.readline()).startswith("token "):
                assert line
            _, token, address = line.split()
            assert asked(address, token) == 0
            assert asked(address, None) != 0 and asked(address, "0" * 64) != 0
            assert asked(address, "of another cluster") != 0
            tokens.append(token)
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.stdout.readlines()[-1] == "after of another cluster disabled\n"
    assert process.returncode == 0 and len(set(tokens)) == 2
    assert not list(tmp_path.rglob("*token*"))


def test_no_package_tells_its_makers_about_a_run_and_the_library_alone_sets_nothing(ray_cluster):
    def seen() -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in session.TELEMETRY_OFF}

    assert tasks.get(tasks.task(seen).remote()) == seen() == session.TELEMETRY_OFF
    code = (
        "import os; before = dict(os.environ); import pd_core; pd_core.open; from pd_core.engine import runs, "
        "tracking; "
        "assert dict(os.environ) == before"
    )
    environment = {name: value for name, value in os.environ.items() if name not in session.TELEMETRY_OFF}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_what_is_missing_is_made_and_nothing_else(ray_cluster, tmp_path):
    def write(stage, names):
        for name in names:
            stage.write_part(name, name.encode(), 1)
        return len(names)

    stage = artifacts.Stage(f"{tmp_path}/x", "listing", 1, {})
    made: list[int] = []
    stage.begin(False)
    stage.write_part("b", b"kept", 5)
    submit = lambda names: tasks.task(write).remote(stage, [name for name in names if name != "lost"])  # noqa: E731
    parts = tasks.make_missing(stage, [["a", "b"], ["c"]], submit, heard=made.append)
    assert [(part.name, part.rows) for part in parts] == [("a", 1), ("b", 5), ("c", 1)]
    assert sorted(made) == [1, 1]
    assert tasks.make_missing(stage, [["c"], ["a"]], submit, heard=made.append)[0].name == "c"
    assert len(made) == 2
    with pytest.raises(RunError, match="1 of 3 shards are missing \\(lost\\); run the same command again"):
        tasks.make_missing(stage, [["a"], ["lost", "d"]], submit, unit="shards")
