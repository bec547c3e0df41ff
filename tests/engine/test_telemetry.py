"""Metrics of our own, scraped from the exporter of a real head node and held to what the artifacts say."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pd_core.core import artifacts, errors
from pd_core.engine import session, telemetry
from tests import tiny, tiny_generators
from tests.build.test_update import write
from tests.curate import test_workflow as test_curate
from tests.finetune import test_workflow as test_finetune
from tests.infra import test_monitoring
from tests.infra.test_monitoring import RAYS_OWN
from tests.perturb import test_workflow as test_perturb
from tests.ray_head import Head, free_ports, running_head

Labels = dict[str, str]
T = TypeVar("T")
OF_RAY = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}
VALUES = {
    "workflow": {"build_index", "generate", "perturb", "finetune", "curate", "retried"},
    "stage": {*test_monitoring.VALUES["stage"], "merging", "anything"},
    "resource": {"cpu"},
    "device": {"cpu"},
    "outcome": test_monitoring.VALUES["outcome"],
}
RETRIED = """
from pd_core.core.errors import RunError
from pd_core.engine import session, tasks
tasks.ROUND_DELAYS_S = (0.0, 0.0, 0.0)
rounds = iter((RunError("first"), RunError("second"), None))
def execute():
    if (error := next(rounds)) is not None:
        raise error
with session.session("", "retried"):
    tasks.persist("anything", execute, lambda: 0)
"""


DIES = """
import os, ray
from pd_core.engine import session
with session.session(""):
    try:
        ray.get(ray.remote(num_cpus=0.1, max_retries=0)(lambda: os._exit(1)).remote())
    except ray.exceptions.WorkerCrashedError:
        pass
"""


class Scraped:
    """What the exporter answered."""

    def __init__(self, head: Head):
        text = urllib.request.urlopen(f"{head.metrics}/metrics", timeout=10).read().decode()
        # the parser puts Ray's counters, which declare their types with the suffix, under names without it
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    @property
    def names(self) -> set[str]:
        return {sample.name for sample in self.samples}

    def of(self, counter: telemetry.Counter, **labels: str) -> list[tuple[Labels, float]]:
        """Labels and value of every series of the counter that has these labels."""
        return [
            (sample.labels, sample.value)
            for sample in self.samples
            if sample.name == counter.exported and labels.items() <= sample.labels.items()
        ]

    def sum(self, counter: telemetry.Counter, **labels: str) -> float | None:
        """As PromQL's sum(): None where there is no series, which is not the same as 0. Without the billionths of
        beginnings.
        """
        found = self.of(counter, **labels)
        return round(sum(value for _, value in found), 6) if found else None


def eventually(ask: Callable[[], T], holds: Callable[[T], bool], timeout_s: float = 60) -> T:
    """The first answer for which it holds, or the last one."""
    deadline = time.monotonic() + timeout_s
    while not holds(found := ask()) and time.monotonic() < deadline:
        time.sleep(1)
    return found


def wait_until(head: Head, holds: Callable[[Scraped], bool]) -> Scraped:
    """The first scrape for which it holds, or the last one."""
    return eventually(lambda: Scraped(head), holds)


def run(head: Head, *argv: str, workflow: str) -> tuple[int, str]:
    process = tiny.start(*argv, workflow=workflow, **head.environment, RAY_ADDRESS=head.address)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def run_script(head: Head, script: str) -> None:
    environment = {**os.environ, **head.environment, "RAY_ADDRESS": head.address, "PYTHONPATH": str(tiny.ROOT)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


@pytest.fixture(scope="module")
def head(tmp_path_factory, monkeypatch_module):
    # processes that the system kills lose what they counted since they last told it: every 3 s here, every 10 s by
    # default
    with running_head(
        tmp_path_factory.mktemp("head"), "--num-cpus=4", RAY_metrics_report_interval_ms="3000"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def monkeypatch_module():
    """Drivers inherit this process's environment, where a cluster of its own may have turned metrics off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(telemetry.SWITCH, raising=False)
        yield patch


@pytest.fixture(scope="module")
def prometheus(head, tmp_path_factory):
    """The address of a real Prometheus with our configuration and alarms, where one is installed; else None."""
    if (program := shutil.which("prometheus")) is None:
        yield None
        return
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((test_monitoring.FOLDER / "prometheus.yaml").read_text())
    # the file that lists nodes is one for the machine, where other heads may run
    config["scrape_configs"] = [
        {"job_name": "ray", "static_configs": [{"targets": [head.metrics.removeprefix("http://")]}]}
    ]
    config["global"]["scrape_interval"] = (
        "1s"  # a set of some seconds may begin and end between two scrapes of 15 s: no increase
    )
    config["rule_files"] = [str(test_monitoring.FOLDER / "rules.yaml")]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    options = [f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [program, *options, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        process.wait(timeout=30)


def answer(prometheus: str, path: str, **parameters: str) -> Any:
    url = f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    return json.loads(urllib.request.urlopen(url, timeout=30).read())["data"]


@pytest.fixture(scope="module")
def built_there(head, prometheus, inputs, tmp_path_factory):
    """An index, built on the head's cluster."""
    output = tmp_path_factory.mktemp("there") / "index"
    done, text = run(head, *tiny.arguments(*inputs, output, "--no-tracking.enabled"), workflow="build_index.py")
    assert done == 0, text
    return output


def committed(uri) -> artifacts.Artifact:
    artifact = artifacts.load_artifact(str(uri))
    assert artifact is not None
    return artifact


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_counters_of_build_index_are_what_it_committed(head, built_there):
    stages = {name: committed(built_there / name) for name in ("features", "quarantine", "neighbors", "densities")}
    ours = {"workflow": "build_index"}
    scraped = wait_until(head, lambda s: s.sum(telemetry.RUNS, **ours, outcome="done") == 1)
    features, bad = stages["features"], stages["quarantine"]
    assert scraped.sum(telemetry.IMAGES, **ours, stage="features") == features.rows + bad.rows == len(tiny.files())
    reasons = {labels["reason"]: round(value, 6) for labels, value in scraped.of(telemetry.QUARANTINED, **ours)}
    assert {reason: value for reason, value in reasons.items() if value} == bad.totals["reasons"]
    assert scraped.sum(telemetry.SEARCHED, **ours) == features.rows
    for name in ("features", "neighbors", "densities"):
        assert scraped.sum(telemetry.PARTS, **ours, stage=name) == len(stages[name].parts), name
    assert scraped.sum(telemetry.RETRIES, **ours) == 0
    assert [scraped.sum(telemetry.RUNS, **ours, outcome=outcome) for outcome in telemetry.OUTCOMES] == [1, 0, 0]


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_seconds_are_held_by_the_actors_of_a_stage_and_never_more_than_there_were(head, built_there):
    scraped = wait_until(head, lambda s: s.sum(telemetry.RUNS, workflow="build_index", outcome="done") == 1)
    stages = ("features", "neighbors")
    ours = {"workflow": "build_index", "resource": "cpu"}
    held = {stage: scraped.sum(telemetry.HELD_S, **ours, stage=stage) or 0.0 for stage in stages}
    assert all(held.values()), held
    assert (
        scraped.sum(telemetry.HELD_S, **ours, stage="scoring") is None
    )  # its self-join makes no accepted image dearer
    elapsed_s = json.loads((built_there / "run.json").read_text())["elapsed_s"]
    assert sum(held.values()) <= 4 * elapsed_s
    busy = scraped.sum(telemetry.BUSY_S, workflow="build_index", stage="features", device="cpu")
    assert busy is not None and 0 < busy < 4 * elapsed_s


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_counters_of_generate_are_what_it_made(head, built_there, tmp_path):
    settings = {
        "index": built_there,
        "generator.kind": "python",
        "generator.path": "tests.toy_generator:make",
        "n": 40,
        "weighting.threshold": "p60",
        "weighting.weight": 10,
        "chunk": 16,
        "pilot": 64,
        "output": tmp_path / "out",
    }
    argv = [f"--{name}={value}" for name, value in settings.items()]
    done, text = run(head, *argv, "--no-tracking.enabled", workflow="generate.py")
    assert done == 0, text
    ours = {"workflow": "generate"}
    scraped = wait_until(head, lambda s: s.sum(telemetry.RUNS, **ours, outcome="done") == 1)
    assert scraped.sum(telemetry.CANDIDATES, **ours, stage="pilot") == 64
    assert scraped.sum(telemetry.ACCEPTED, **ours, stage="pilot") == 64
    samples = committed(tmp_path / "out" / "samples")
    # All candidates of the parts that were made: the last of them is then cut to the n-th row.
    made = len(samples.parts) * samples.identity["chunks_per_part"] * 16
    assert scraped.sum(telemetry.CANDIDATES, **ours, stage="samples") == made >= samples.totals["candidates"]
    accepted = scraped.sum(telemetry.ACCEPTED, **ours, stage="samples")
    assert accepted is not None and samples.rows <= accepted <= samples.rows + made - samples.totals["candidates"]
    assert scraped.sum(telemetry.PARTS, **ours, stage="samples") == len(samples.parts)
    assert scraped.sum(telemetry.FAILED_PARTS, **ours, stage="samples") == 0
    held = {stage: scraped.sum(telemetry.HELD_S, **ours, stage=stage) for stage in ("pilot", "samples", "scoring")}
    assert all(held.values()), held
    assert scraped.sum(telemetry.HELD_S, **ours, stage="neighbors") is None


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_images_that_are_perturbed_are_counted(head, built_there, tmp_path):
    module = tmp_path / "smooth.pt"
    torch.jit.script(test_perturb.Smooth()).save(module)
    argv = test_perturb.arguments(built_there, tmp_path / "out", test_perturb.scripted(module))
    done, text = run(head, *argv, workflow="perturb.py")
    assert done == 0, text
    ours = {"workflow": "perturb", "stage": "perturbed"}
    scraped = wait_until(head, lambda s: s.sum(telemetry.RUNS, workflow="perturb", outcome="done") == 1)
    perturbed = committed(tmp_path / "out" / "perturbed")
    assert scraped.sum(telemetry.IMAGES, **ours) == perturbed.rows
    assert scraped.sum(telemetry.PARTS, **ours) == len(perturbed.parts)
    assert scraped.sum(telemetry.HELD_S, **ours)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_steps_of_a_training_are_counted(head, built_there, tmp_path):
    generator = tiny_generators.save_ddpm(tmp_path / "ddpm")
    done, text = run(head, *test_finetune.arguments(built_there, generator, tmp_path / "out"), workflow="finetune.py")
    assert done == 0, text
    ours = {"workflow": "finetune", "stage": "training"}
    scraped = wait_until(head, lambda s: s.sum(telemetry.RUNS, workflow="finetune", outcome="done") == 1)
    assert scraped.sum(telemetry.STEPS, **ours) == test_finetune.STEPS
    assert scraped.sum(telemetry.HELD_S, **ours, resource="cpu") and scraped.sum(telemetry.BUSY_S, **ours, device="cpu")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_curate_comes_to_is_counted_and_all_it_consists_of_as_its_own(head, inputs, tmp_path):
    source = write(tmp_path / "images", list(tiny.files().items()))
    file = test_curate.settings_file(source, inputs[1], tmp_path / "out", recipes=[test_curate.TYPICAL])
    codes = [run(head, "--config", file, workflow="curate.py") for _ in range(2)]
    assert [code for code, _ in codes] == [errors.EXIT_DONE, errors.EXIT_NOTHING_NEW], codes
    ours = {"workflow": "curate"}
    scraped = wait_until(head, lambda s: s.sum(telemetry.RUNS, **ours, outcome="done") == 2)
    outcomes = ("released", "nothing_new", "held_back")
    assert [scraped.sum(telemetry.RELEASES, outcome=outcome) for outcome in outcomes] == [1, 1, 0]
    # of the source, and of the 40 samples that are measured
    assert scraped.sum(telemetry.IMAGES, **ours, stage="features") == len(tiny.files()) + 40
    accepted = scraped.sum(telemetry.ACCEPTED, **ours, stage="samples")
    assert accepted is not None and accepted >= 40


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_ends_and_retries_are_counted(head, built_there, inputs):
    before = Scraped(head).sum(telemetry.IMAGES, workflow="build_index")
    argv = tiny.arguments(*inputs, built_there, "--no-tracking.enabled", "--features.batch_size=16")
    done, text = run(head, *argv, workflow="build_index.py")
    assert done == 2, text
    run_script(head, RETRIED)
    scraped = wait_until(head, lambda s: s.sum(telemetry.RUNS, workflow="retried", outcome="done") == 1)
    assert scraped.sum(telemetry.RUNS, workflow="build_index", outcome="refused") == 1
    assert scraped.sum(telemetry.RUNS, workflow="build_index", outcome="failed") == 0
    assert scraped.sum(telemetry.IMAGES, workflow="build_index") == before
    assert scraped.sum(telemetry.RETRIES, workflow="retried", stage="anything") == 2


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_tags_have_few_values_and_what_rules_ask_of_ray_is_there(head, built_there):
    scraped = wait_until(head, lambda s: s.sum(telemetry.RUNS, workflow="build_index", outcome="done") == 1)
    found = [(counter, labels) for counter in telemetry.COUNTERS for labels, _ in scraped.of(counter)]
    assert len({counter.name for counter, _ in found}) >= 9
    for counter, labels in found:
        own = {k: v for k, v in labels.items() if k not in OF_RAY and not k.startswith("otel_")}
        assert set(own) == {"workflow", *counter.tags}
        assert all(v in VALUES.get(k, {v}) for k, v in own.items()), own
    run_script(head, DIES)
    (died,) = (name for name in RAYS_OWN if name.endswith("worker_failures_total"))
    scraped = wait_until(head, lambda s: died in s.names)
    assert scraped.names >= set(RAYS_OWN), set(RAYS_OWN) - scraped.names
    for name, wanted in RAYS_OWN.items():
        assert all(wanted <= set(s.labels) for s in scraped.samples if s.name == name), name


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_prometheus_answers_every_panel_and_alarms_ring_for_what_happened(prometheus, built_there):
    """After the tests before this one, whose runs it has seen."""
    if prometheus is None:
        pytest.skip("prometheus is not installed")
    for where, expression in test_monitoring.expressions().items():
        if "json" in where and "GPUs" not in where:  # nothing held a GPU; an alarm that does not ring has no value
            query = functools.partial(answer, prometheus, "query", query=expression)
            assert eventually(query, lambda found: bool(found["result"]))["result"], where  # a rate takes two scrapes
    ended = ("PdCoreRunEndedInError", "build_index")
    ringing = lambda: {  # noqa: E731
        (alarm["labels"]["alertname"], alarm["labels"].get("workflow"))
        for alarm in answer(prometheus, "alerts")["alerts"]
    }
    assert ended in eventually(ringing, lambda found: ended in found, timeout_s=120)


def test_a_cluster_of_our_own_counts_nothing(ray_cluster):
    with telemetry.running("build_index"):
        assert not telemetry.exported()
        for counter in telemetry.COUNTERS:
            counter.add(1, **dict.fromkeys(counter.tags, "x"))
    assert not telemetry._opened


def test_runs_of_which_a_run_consists_count_as_it(ray_cluster):
    with session.session("", "curate") as now, session.shared(now), session.session("", "build_index"):
        assert telemetry.workflow() == "curate"
    assert telemetry.workflow() == ""


def test_names_are_those_of_prometheus():
    names = [counter.name for counter in telemetry.COUNTERS]
    assert len(names) == len(set(names)) == 13
    for counter in telemetry.COUNTERS:
        assert counter.name.startswith("pd_core_") and not counter.name.endswith("_total")
        assert counter.description and counter.exported == f"ray_{counter.name}_total"
