"""infra/monitoring: what alarms and panels ask for exists, and its labels too; PromQL by Prometheus' own grammar.

Where promtool is installed (it comes with Prometheus), it checks the files, and plays the alarms of rules_test.yaml.
"""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest
import yaml

from pd_core.engine import telemetry

FOLDER = Path(__file__).resolve().parents[2] / "infra" / "monitoring"
README = (FOLDER / "README.md").read_text()
DASHBOARDS = sorted((FOLDER / "dashboards").glob("*.json"))


def load(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


ALARMS = [rule for group in load("rules.yaml")["groups"] for rule in group["rules"]]
CRONJOB = load("../kubernetes/schedule/cronjob.yaml")["metadata"]
OURS = {counter.exported: {"workflow", *counter.tags} for counter in telemetry.COUNTERS}
RAYS_OWN: dict[str, set[str]] = {  # of Ray 2.60; tests/engine/test_telemetry.py finds them in the scrape of a real head
    "ray_node_disk_utilization_percentage": {"ip"},
    "ray_node_mem_used": {"ip"},
    "ray_node_mem_total": {"ip"},
    "ray_cluster_active_nodes": set(),
    "ray_unintentional_worker_failures_total": set(),
}
KNOWN = {  # metrics with their labels
    **OURS,
    **RAYS_OWN,
    # of Prometheus, and of kube-state-metrics
    "up": {"job", "instance"},
    "kube_cronjob_created": {"namespace", "cronjob"},
    "kube_cronjob_spec_suspend": {"namespace", "cronjob"},
    "kube_cronjob_status_last_successful_time": {"namespace", "cronjob"},
}
VALUES = {  # of labels that have a closed list
    "outcome": {*telemetry.OUTCOMES, "released", "nothing_new", "held_back"},
    "namespace": {CRONJOB["namespace"]},
    "cronjob": {CRONJOB["name"]},
    "resource": {"cpu", "gpu"},
    "device": {"cpu", "gpu"},
    "stage": {
        *("features", "index", "neighbors", "densities", "scoring", "pilot", "samples", "export", "perturbed"),
        *("metrics", "curve", "weights", "training", "release"),
    },
}
# What Grafana puts in the place of its variables: its own, and a number or a pattern for those of the dashboard.
VARIABLES = {"$__rate_interval": "1m", "$__range": "6h", "$workflow": ".*", "$cpu_hour": "0.04", "$gpu_hour": "1.00"}


def panels(dashboard: dict) -> Iterator[dict]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def expressions() -> dict[str, str]:
    """Every PromQL expression by where it stands, those of dashboards as Grafana sends them."""
    found = {rule["alert"]: rule["expr"] for rule in ALARMS}
    for path in DASHBOARDS:
        for panel in panels(json.loads(path.read_text())):
            for target in panel.get("targets", []):
                text = re.sub(r"\$\w+", lambda name: VARIABLES[name[0]], target["expr"])
                found[f"{path.name}: {panel['title']} {panel['id']}{target['refId']}"] = text
    return found


EXPRESSIONS = expressions()


def nodes(expression: str, kind: type) -> list:
    """What of an expression is of a kind."""
    found: list = []

    def visit(node: object) -> bool:
        if isinstance(node, kind):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    return nodes(expression, promql_parser.VectorSelector)


def problems(expression: str) -> list[str]:
    """What of an expression no series will ever have."""
    found = []
    anywhere: set[str] = set()
    for selector in selectors(expression):
        labels = KNOWN.get(selector.name or "")
        if labels is None:
            found.append(f"no metric {selector.name}")
            continue
        anywhere |= labels
        for matcher in selector.matchers.matchers:
            if matcher.name not in labels:
                found.append(f"{selector.name} has no label {matcher.name}")
            values = VALUES.get(matcher.name)
            if values and not set(matcher.value.split("|")) <= values:
                found.append(f"{matcher.name} is never {matcher.value}")
    sums = nodes(expression, promql_parser.AggregateExpr)
    grouped = {label for one in sums if one.modifier is not None for label in one.modifier.labels}
    return found + [f"no metric has label {label}" for label in grouped - anywhere]


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_metric_and_label_that_is_asked_for_exists(where: str) -> None:
    expression = EXPRESSIONS[where]
    assert selectors(expression)
    assert problems(expression) == []
    # at one instant of the past a series may be absent, since its scrape failed: what it counted would look new
    assert re.findall(r"[^]\s]\s+offset\b", expression) == []


def test_no_counter_of_ours_is_forgotten() -> None:
    """A metric that nobody looks at is not worth its series."""
    assert OURS.keys() <= {selector.name for text in EXPRESSIONS.values() for selector in selectors(text)}


def test_an_accepted_image_costs_what_generating_and_scoring_held_and_no_self_join():
    found = [expression for where, expression in EXPRESSIONS.items() if "Cost per thousand accepted" in where]
    assert len(found) == 2
    for expression in found:
        stages = {
            matcher.value
            for selector in selectors(expression)
            if selector.name == telemetry.HELD_S.exported
            for matcher in selector.matchers.matchers
            if matcher.name == "stage"
        }
        assert stages == {"pilot|samples|scoring"}


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("rate(ray_pd_core_imagess_total[1m])", "no metric ray_pd_core_imagess_total"),
        ("ray_pd_core_images", "no metric ray_pd_core_images"),
        ('ray_pd_core_images_total{reason="empty"}', "ray_pd_core_images_total has no label reason"),
        ('sum(max_over_time(ray_pd_core_runs_total{outcome=~"done|lost"}[1h]))', "outcome is never done|lost"),
        ('kube_cronjob_created{cronjob="curate"}', "cronjob is never curate"),
        ("sum by (reason) (ray_pd_core_images_total) / 2", "no metric has label reason"),
    ],
)
def test_a_planted_fault_is_found(expression, problem):
    assert problems(expression) == [problem]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_a_dashboard_is_whole(path):
    dashboard = json.loads(path.read_text())
    every = list(panels(dashboard))
    numbers = [panel["id"] for panel in every]
    assert len(numbers) == len(set(numbers)) and all(panel["title"] for panel in every)
    assert dashboard["uid"] and "id" not in dashboard
    variables = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource": "datasource", "workflow": "query", "cpu_hour": "textbox", "gpu_hour": "textbox"}
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in every:
        x, y, w, h = (panel["gridPos"][name] for name in "xywh")
        assert x >= 0 and x + w <= 24 and y >= 0 and h > 0
        if panel["type"] != "row":
            assert panel["datasource"] == source and panel["targets"]
            assert all(target["datasource"] == source for target in panel["targets"])
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    text = path.read_text()
    assert set(re.findall(r"\$\{?(\w+)", text)) == {*variables, "__rate_interval", "__range", "__all"}
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in every]
    assert len(places) == len(set(places))


def test_alarms_say_how_bad_they_are_and_the_readme_what_to_do():
    names = [rule["alert"] for rule in ALARMS]
    assert len(names) == len(set(names)) >= 10
    for rule in ALARMS:
        assert rule["labels"]["severity"] in {"warning", "critical"} and rule["annotations"]["summary"]
    assert re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE) == [*OURS, *names]


def test_every_alarm_is_played_to_ringing_and_to_silence():
    tests = load("rules_test.yaml")["tests"]
    played = [(case["alertname"], bool(case["exp_alerts"])) for test in tests for case in test["alert_rule_test"]]
    for ringing in (True, False):
        assert {name for name, rang in played if rang is ringing} == {rule["alert"] for rule in ALARMS}
    for text in (
        series["series"] for test in tests for series in test["input_series"]
    ):  # labels as they are: an alarm on a series that never comes proves nothing
        (selector,) = selectors(text)
        own = {m.name for m in selector.matchers.matchers} - {"WorkerId", "Component"}
        assert own == KNOWN[selector.name or ""], text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "command", ["check config prometheus.yaml", "check rules rules.yaml", "test rules rules_test.yaml"]
)
def test_promtool_agrees(command):
    done = subprocess.run(["promtool", *command.split()], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_of_the_composition_name_each_other():
    services = load("compose.yaml")["services"]
    nodes = services.pop("nodes")
    mounts = dict(mount.split(":")[:2] for service in services.values() for mount in service["volumes"])
    for source in (name for name in mounts if name.startswith("./")):
        assert (FOLDER / source).exists(), source
    (config,) = [word.partition("=")[2] for word in services["prometheus"]["command"] if "config.file" in word]
    prometheus = load("prometheus.yaml")
    assert config in mounts.values()
    assert {f"/etc/prometheus/{name}" for name in prometheus["rule_files"]} <= set(mounts.values())
    (discovery,) = prometheus["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert Path(discovery).is_relative_to(mounts["nodes"])
    assert Path(discovery).name in nodes["entrypoint"][-1] and [m for m in mounts if m.startswith("/")] == []
    (source,) = load("provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = load("provisioning/dashboards/pd-core.yaml")["providers"]
    assert mounts["./dashboards"] == provider["options"]["path"]


def test_prometheus_is_handed_the_list_of_nodes_and_nothing_else_of_ray_s_folder(tmp_path):
    """The composition's command for real, on a folder as Ray 2.60 lays it out: a link leads into the newest session."""
    service = load("compose.yaml")["services"]["nodes"]
    source, target = (mount.split(":") for mount in service["volumes"])
    assert source == ["/tmp/ray", "/tmp/ray", "ro"] and service["network_mode"] == "none" and "ports" not in service
    ray, handed = tmp_path / "ray", tmp_path / "handed"
    for folder in (ray / "session_1", ray / "session_2", handed):
        folder.mkdir(parents=True)
    (ray / "session_1" / "raylet.out").write_text("a log")
    link = ray / "prom_metrics_service_discovery.json"
    command = [word.replace(source[1], str(ray)).replace(target[1], str(handed)) for word in service["entrypoint"]]
    running = subprocess.Popen([command[0], command[1], command[2].replace("sleep 5", "sleep 0.05")])
    try:
        for session in ("session_1", "session_2"):  # the head was started anew
            (ray / session / link.name).write_text(session)
            link.unlink(missing_ok=True)
            link.symlink_to(ray / session / link.name)
            deadline = time.monotonic() + 20
            while not ((handed / link.name).exists() and (handed / link.name).read_text() == session):
                assert time.monotonic() < deadline
                time.sleep(0.02)
    finally:
        running.kill()
        running.wait()
    assert {path.name for path in handed.iterdir()} <= {link.name, "new"}


def test_the_pod_monitor_finds_the_pods():
    monitor = load("podmonitor.yaml")
    cluster = load("../kubernetes/cluster/raycluster.yaml")
    (label,) = monitor["spec"]["selector"]["matchLabels"].items()
    assert label == ("ray.io/cluster", cluster["metadata"]["name"])  # KubeRay puts it on every pod
    assert monitor["metadata"]["namespace"] == cluster["metadata"]["namespace"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for group in groups:
        ports = [port for container in group["template"]["spec"]["containers"] for port in container["ports"]]
        assert [port["containerPort"] for port in ports if port["name"] == endpoint["port"]] == [8080]
    jobs = {f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}"}  # the operator's name for the job
    jobs |= {config["job_name"] for config in load("prometheus.yaml")["scrape_configs"]}
    for up in (rule["expr"] for rule in ALARMS if "up{" in rule["expr"]):
        (selector,) = selectors(up)
        assert {value for m in selector.matchers.matchers for value in m.value.split("|")} == jobs


def test_the_rules_fit_into_a_prometheus_rule():
    """By the command that the README gives, with `cat` in the place of kubectl."""
    (command,) = re.findall(r"^(\{ printf .* \| )kubectl apply -f -$", README, re.MULTILINE)
    done = subprocess.run(
        ["sh", "-c", f"{command} cat"], cwd=FOLDER.parents[1], capture_output=True, text=True, check=True
    )
    made = yaml.safe_load(done.stdout)
    assert (made["kind"], made["metadata"]["namespace"]) == ("PrometheusRule", "pd-core")
    assert made["spec"] == load("rules.yaml")
