"""The files in infra/: schemas of their kinds, unknown keys refused, and what must hold beyond schemas (no root, no secret, no open door).

Nothing is started. KubeRay's resource definitions are not part of this project: where they are absent, its kinds are checked in
all but their schema.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pd_core.core import artifacts, errors
from pd_core.core.settings import load as settings_load
from pd_core.core.settings.base import WorkflowSettings
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.core.settings.load import WORKFLOWS
from pd_core.curate import releases

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
DOCUMENT = (ROOT / "docs" / "operations.md").read_text()
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)

KUBERNETES = "1.33"  # oldest version that the manifests are written for
KUBERAY_GROUP = "ray.io/"
CRDS_VARIABLE = "KUBERAY_CRDS"  # not PD_CORE_...: that would be a setting
CRDS = Path(os.environ.get(CRDS_VARIABLE, ROOT.parent / "shared" / "data" / "kuberay-crds"))
BUCKET = "s3://my-bucket/"
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, as it is for kubectl; PyYAML keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.value != "<<"]
        if len(keys) != len(set(keys)):
            raise yaml.constructor.ConstructorError(None, None, f"a key stands twice: {keys}", node.start_mark)
        return super().construct_mapping(node, deep)


def load(path: Path) -> list[Any]:
    return [document for document in yaml.load_all(path.read_text(), StrictLoader) if document is not None]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


FILES = sorted(path for path in INFRA.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
YAML_FILES = [path for path in FILES if path.suffix in (".yaml", ".yml")]
COMPOSE = [path for path in YAML_FILES if path.name == "compose.yaml"]
LAUNCHERS = [path for path in YAML_FILES if path.parent.name == "launcher"]
IMAGES = [path for path in FILES if path.name == "Dockerfile"]
POLICIES = [path for path in FILES if path.parent.name == "policies"]
TRUST = [path for path in FILES if path.parent.name == "trust"]
SCRIPTS = [path for path in FILES if path.suffix == ".sh"]
PROGRAMS = [path for path in FILES if path.suffix == ".py"]
PINS = [path for path in FILES if path.suffix == ".txt"]
MONITORING = [path for path in FILES if path.is_relative_to(INFRA / "monitoring")]  # has tests of its own


@dataclass(frozen=True)
class Manifest:
    """One Kubernetes object of a file."""

    path: Path
    values: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.values["kind"]

    @property
    def name(self) -> str:
        return self.values["metadata"].get("name") or self.values["metadata"]["generateName"]

    @property
    def kuberay(self) -> bool:
        return self.values["apiVersion"].startswith(KUBERAY_GROUP)


MANIFESTS = [
    Manifest(path, document)
    for path in YAML_FILES
    if path not in MONITORING
    for document in load(path)
    if isinstance(document, dict) and {"apiVersion", "kind"} <= document.keys()
]
each_manifest = pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=[f"{named(m.path)}:{m.kind}/{m.name}" for m in MANIFESTS]
)


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=[named(path) for path in paths])


# ---- every file is of a kind that is checked ---------------------------------------------------------------------------


def test_every_file_is_checked_by_some_test() -> None:
    checked = {
        *COMPOSE,
        *LAUNCHERS,
        *IMAGES,
        *POLICIES,
        *TRUST,
        *SCRIPTS,
        *PROGRAMS,
        *PINS,
        *MONITORING,
        *(m.path for m in MANIFESTS),
    }
    rest = {named(path) for path in FILES if path not in checked}
    assert rest == {
        "infra/README.md",
        "infra/mlflow/basic_auth.ini",
    }  # the second: test_users_database_holds_no_password


def test_the_readme_names_every_file() -> None:
    text = (INFRA / "README.md").read_text()
    missing = [
        named(p) for p in FILES if p not in MONITORING and p.name not in text and f"{p.parent.name}/`" not in text
    ]
    assert missing == ["infra/README.md"]


# ---- schemas -------------------------------------------------------------------------------------------------------------


def kubernetes_problem(values: Mapping[str, Any]) -> str | None:
    """What Kubernetes' own schema, with unknown keys refused, says against an object; None where it says nothing."""
    try:
        kubernetes_validate.validate(dict(values), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(str(part) for part in error.path)}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return error.message
    return None


def pod_template_problem(template: Mapping[str, Any]) -> str | None:
    """The same for a pod template."""
    wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
    return kubernetes_problem(wrapped)


def closed(schema: Any) -> Any:
    """A structural schema in which keys that it does not name are errors; the API server would drop them silently."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        keeps = schema.get("x-kubernetes-preserve-unknown-fields", False)
        result.setdefault("additionalProperties", bool(keeps))
    return result


@cache
def kuberay_validator(kind: str, version: str) -> jsonschema.Draft202012Validator:
    (definition,) = load(CRDS / f"ray.io_{kind.lower()}s.yaml")
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == version]
    return jsonschema.Draft202012Validator(closed(schema))


def kuberay_problems(values: Mapping[str, Any]) -> list[str]:
    """What KubeRay's resource definition, with unknown keys refused, says against an object."""
    validator = kuberay_validator(values["kind"], values["apiVersion"].removeprefix(KUBERAY_GROUP))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(values)]


def cluster_spec(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The Ray cluster that an object of KubeRay describes, if it does."""
    spec = values["spec"].get("jobTemplate", values["spec"])
    return spec if values["kind"] == "RayCluster" else spec.get("rayClusterSpec")


def pod_templates(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every pod template of an object, KubeRay's sidecar of the autoscaler as a container of a pod of its own."""
    spec = values.get("spec", {})
    if values["apiVersion"].startswith(KUBERAY_GROUP):
        cluster = cluster_spec(values)
        if cluster is None:
            return
        yield cluster["headGroupSpec"]["template"]
        for group in cluster.get("workerGroupSpecs", []):
            yield group["template"]
        options = cluster.get("autoscalerOptions", {})
        keys = ("env", "envFrom", "image", "resources", "securityContext", "volumeMounts")
        container = {"name": "autoscaler", **{key: options[key] for key in keys if key in options}}
        pod = cluster["headGroupSpec"]["template"]["spec"].get("securityContext", {})
        yield {"spec": {"containers": [container], "securityContext": pod}}
    elif values["kind"] == "CronJob":
        yield spec["jobTemplate"]["spec"]["template"]
    elif "template" in spec:
        yield spec["template"]


@each_manifest
def test_kubernetes_schema(manifest: Manifest) -> None:
    values = manifest.values
    if manifest.kuberay:  # its metadata, which the resource definitions leave open, and its pods
        values = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest.values["metadata"]}
    assert kubernetes_problem(values) is None
    assert [problem for t in pod_templates(manifest.values) if (problem := pod_template_problem(t))] == []


@pytest.mark.skipif(
    not (CRDS / "ray.io_rayclusters.yaml").exists(),
    reason=f"no resource definitions of KubeRay: set {CRDS_VARIABLE} to the folder helm-chart/kuberay-operator/crds of a "
    "KubeRay release (github.com/ray-project/kuberay); all else of these manifests is checked without them",
)
class TestKubeRaySchema:
    @pytest.mark.parametrize(
        "manifest", [m for m in MANIFESTS if m.kuberay], ids=[m.name for m in MANIFESTS if m.kuberay]
    )
    def test_it_holds(self, manifest: Manifest) -> None:
        assert kuberay_problems(manifest.values) == []

    @pytest.mark.parametrize(
        ("kind", "path", "value", "said"),
        [
            ("RayCluster", "spec.enableInTreeAutoscalling", True, "'enableInTreeAutoscalling' was unexpected"),
            ("RayCluster", "spec.workerGroupSpecs.0.minReplica", 0, "'minReplica' was unexpected"),
            ("RayCluster", "spec.workerGroupSpecs.0.minReplicas", "0", "'0' is not of type 'integer'"),
            ("RayCluster", "spec.headGroupSpec.template.spec.containers.0.imagePolicy", "x", "'imagePolicy' was unexp"),
            ("RayCluster", "spec.autoscalerOptions.upscalingMode", "Eager", "'Eager' is not one of"),
            ("RayCluster", "spec.authOptions.tokenSecret", "x", "'tokenSecret' was unexpected"),
            ("RayJob", "spec.entryPoint", "x", "'entryPoint' was unexpected"),
            ("RayCronJob", "spec.concurrencyPolicy", "Forbid", "'concurrencyPolicy' was unexpected"),
            ("RayCronJob", "spec.jobTemplate.spec", {}, "'spec' was unexpected"),
        ],
    )
    def test_a_planted_fault_is_found(self, kind: str, path: str, value: Any, said: str) -> None:
        problems = kuberay_problems(planted(kind, path, value))
        assert len(problems) == 1 and said in problems[0], problems


def planted(kind: str, path: str, value: Any) -> dict[str, Any]:
    """A copy of the first object of this kind, with a value set at a dotted path."""
    values = json.loads(json.dumps(next(m.values for m in MANIFESTS if m.kind == kind)))
    *parents, last = path.split(".")
    place: Any = values
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return values


@pytest.mark.parametrize(
    ("kind", "path", "value", "said"),
    [
        ("CronJob", "spec.jobTemplate.spec.template.spec.restartPolicyy", "Never", "restartPolicyy"),
        ("CronJob", "spec.concurrencyPolicies", "Forbid", "concurrencyPolicies"),
        ("NetworkPolicy", "spec.podSelectors", {}, "podSelectors"),
        ("Deployment", "spec.replicas", "one", "'one' is not of type"),
        ("ServiceAccount", "automountToken", False, "automountToken"),
    ],
)
def test_a_planted_fault_in_a_kind_of_kubernetes_is_found(kind: str, path: str, value: Any, said: str) -> None:
    assert said in str(kubernetes_problem(planted(kind, path, value)))


def test_a_planted_fault_in_a_pod_of_ray_is_found() -> None:
    path = "spec.workerGroupSpecs.1.template.spec.containers.0.resources.limit"
    problems = [pod_template_problem(t) for t in pod_templates(planted("RayCluster", path, {}))]
    assert [p for p in problems if p] and "limit" in str(problems[2])
    problems = [
        pod_template_problem(t) for t in pod_templates(planted("RayCluster", "spec.autoscalerOptions.env", [1]))
    ]
    assert [p is None for p in problems] == [True, True, True, False]


# ---- what a manifest refers to -------------------------------------------------------------------------------------------


def containers(values: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(pod spec, container) of every container."""
    for template in pod_templates(values):
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
            yield template["spec"], container


def test_all_lies_in_the_namespace() -> None:
    (namespace,) = [m for m in MANIFESTS if m.kind == "Namespace"]
    assert namespace.values["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {m.values["metadata"].get("namespace") for m in MANIFESTS if m.kind != "Namespace"} == {namespace.name}


@each_manifest
def test_secrets_come_by_reference_and_the_documents_make_them(manifest: Manifest) -> None:
    wanted: list[tuple[str, str]] = []
    for _, container in containers(manifest.values):
        for variable in container.get("env", []):
            assert "valueFrom" in variable or not SECRET_NAME.search(variable["name"]), (
                f"{variable['name']} has a value"
            )
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                wanted.append((reference["name"], reference["key"]))
    if manifest.kuberay and (cluster := cluster_spec(manifest.values)):
        wanted.append((cluster["authOptions"]["secretName"], "auth_token"))  # the key that KubeRay looks for
    for name, key in wanted:
        command = re.search(rf"create secret generic {name} ((?:.*\\\n)*.*)", DOCUMENT)
        assert command and f"--from-literal={key}=" in command[1], f"docs/operations.md makes no {key} in Secret {name}"


def test_ray_and_mlflow_have_keys_of_their_own() -> None:
    """The prefixes of bucket.json and mlflow-bucket.json are apart; one Secret for both would join them."""
    takers: dict[str, set[str]] = {}
    for manifest in MANIFESTS:
        for _, container in containers(manifest.values):
            for source in container.get("envFrom", []):
                assert source["secretRef"]["optional"] is True
                takers.setdefault(source["secretRef"]["name"], set()).add(container["name"])
    assert takers == {"pd-core-s3": {"ray-head", "ray-worker"}, "pd-core-mlflow-s3": {"mlflow"}}
    assert all(f"`{name}`" in DOCUMENT or f"generic {name}`" in DOCUMENT for name in takers)


@each_manifest
def test_accounts_and_configuration_exist(manifest: Manifest) -> None:
    accounts = {m.name for m in MANIFESTS if m.kind == "ServiceAccount"}
    maps = {m.name for m in MANIFESTS if m.kind == "ConfigMap"}
    services = {m.name for m in MANIFESTS if m.kind == "Service"}
    services |= {f"{m.name}-head-svc" for m in MANIFESTS if m.kind == "RayCluster"}  # named so by KubeRay
    for template in pod_templates(manifest.values):
        assert template["spec"].get("serviceAccountName") in {None, *accounts}
        used = {v["configMap"]["name"] for v in template["spec"].get("volumes", []) if "configMap" in v}
        assert used <= maps
    called = re.findall(r"([\w-]+)\.pd-core\.svc", json.dumps(manifest.values))
    assert set(called) <= services
    selector = manifest.values.get("spec", {}).get("clusterSelector")
    assert selector in (None, {"ray.io/cluster": next(m.name for m in MANIFESTS if m.kind == "RayCluster")})


# ---- policies: who runs, who may come in ---------------------------------------------------------------------------------


def root_problems(values: Mapping[str, Any]) -> list[str]:
    """Containers that may be root, or gain rights, or would be refused in the namespace."""
    problems = []
    for pod, container in containers(values):
        outer, inner = pod.get("securityContext", {}), container.get("securityContext", {})
        both = {**outer, **inner}
        holds = {
            "runAsNonRoot": both.get("runAsNonRoot") is True,
            "runAsUser": both.get("runAsUser", 0) > 0,
            "allowPrivilegeEscalation": inner.get("allowPrivilegeEscalation") is False,
            "capabilities": inner.get("capabilities") == {"drop": ["ALL"]},
            "seccompProfile": both.get("seccompProfile") == {"type": "RuntimeDefault"},
            "host": not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")),
            "hostPort": not any("hostPort" in port for port in container.get("ports", [])),
            "hostPath": not any("hostPath" in volume for volume in pod.get("volumes", [])),
        }
        problems += [f"{container['name']}: {name}" for name, held in holds.items() if not held]
    return problems


def door_problems(values: Mapping[str, Any]) -> list[str]:
    """What would let the outside in."""
    problems = []
    if values["kind"] in ("Ingress", "Gateway", "HTTPRoute", "Route"):
        problems.append(f"kind {values['kind']}")
    if values["kind"] == "Service" and values["spec"].get("type", "ClusterIP") != "ClusterIP":
        problems.append(f"Service of type {values['spec']['type']}")
    if values["apiVersion"].startswith(KUBERAY_GROUP) and (cluster := cluster_spec(values)):
        head = cluster["headGroupSpec"]
        # KubeRay's default for the dashboard is 0.0.0.0: it needs the token
        if cluster.get("authOptions", {}).get("mode") != "token" or not cluster["authOptions"].get("secretName"):
            problems.append("no token authentication")
        if head.get("serviceType") != "ClusterIP" or "headService" in head:
            problems.append("head service")
        if head.get("enableIngress"):
            problems.append("ingress")
        disabled = [v for _, c in containers(values) for v in c.get("env", []) if v["name"] == "RAY_AUTH_MODE"]
        if any(variable.get("value") != "token" for variable in disabled):
            problems.append("RAY_AUTH_MODE")
    return problems


@each_manifest
def test_no_container_is_root(manifest: Manifest) -> None:
    assert root_problems(manifest.values) == []


@each_manifest
def test_no_door_is_open(manifest: Manifest) -> None:
    assert door_problems(manifest.values) == []


@pytest.mark.parametrize(
    ("check", "kind", "path", "value"),
    [
        (root_problems, "Deployment", "spec.template.spec.securityContext", {}),
        (root_problems, "RayCluster", "spec.workerGroupSpecs.1.template.spec.securityContext.runAsUser", 0),
        (root_problems, "RayCluster", "spec.autoscalerOptions.securityContext", {}),
        (root_problems, "CronJob", "spec.jobTemplate.spec.template.spec.hostNetwork", True),
        (door_problems, "Service", "spec.type", "LoadBalancer"),
        (door_problems, "Service", "spec.type", "NodePort"),
        (door_problems, "RayCluster", "spec.authOptions", {"mode": "disabled"}),
        (door_problems, "RayCluster", "spec.headGroupSpec.serviceType", "LoadBalancer"),
        (door_problems, "RayCluster", "spec.headGroupSpec.enableIngress", True),
    ],
)
def test_a_planted_hole_is_found(
    check: Callable[[Mapping[str, Any]], list[str]], kind: str, path: str, value: Any
) -> None:
    assert check(planted(kind, path, value)) != []


def test_only_the_namespace_and_the_operator_reach_the_dashboard() -> None:
    heads = [
        m.values["spec"]
        for m in MANIFESTS
        if m.kind == "NetworkPolicy"
        and m.values["spec"]["podSelector"].get("matchLabels", {}).get("ray.io/node-type") == "head"
    ]
    assert len(heads) == 1 and heads[0]["policyTypes"] == ["Ingress"]
    for rule in heads[0]["ingress"]:
        if any(port["port"] == 8265 for port in rule.get("ports", [{"port": 8265}])):
            assert rule["from"]
            for peer in rule["from"]:
                operator = peer.get("podSelector", {}).get("matchLabels") == {
                    "app.kubernetes.io/name": "kuberay-operator"
                }
                assert "ipBlock" not in peer and ("namespaceSelector" not in peer or operator)


# ---- policies: the Ray cluster -------------------------------------------------------------------------------------------

CLUSTERS = [cluster for m in MANIFESTS if m.kuberay and (cluster := cluster_spec(m.values))]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_groups_scale_from_zero_and_cpu_and_gpu_are_apart(cluster: dict[str, Any]) -> None:
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    gpus = {}
    for name, group in groups.items():
        assert (group["minReplicas"], group["replicas"]) == (0, 0) and group["maxReplicas"] > 0
        pod = group["template"]["spec"]
        assert pod["nodeSelector"] and pod["tolerations"], "spot"
        assert pod["restartPolicy"] == "Never"  # autoscaler v2 asks for it
        resources = pod["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        gpus[name] = int(resources["limits"].get("nvidia.com/gpu", 0))
        assert pod["containers"][0]["image"].endswith("-gpu" if gpus[name] else "-cpu")
    assert sorted(bool(count) for count in gpus.values()) == [False, True]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_what_is_spilled_does_not_fill_the_node(cluster: dict[str, Any]) -> None:
    """A pod that fills its node's disk is evicted: temporary files lie on a volume with a size, and the rest is asked for."""
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert "ephemeral-storage" in container["resources"]["requests"]
        if (
            group is not cluster["headGroupSpec"]
        ):  # to the head KubeRay gives an emptyDir there, beside the autoscaler's
            (mount,) = container["volumeMounts"]
            assert Path("/tmp/ray").is_relative_to(mount["mountPath"])
            (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
            claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
            assert re.fullmatch(r"\d+Gi", claim["resources"]["requests"]["storage"])
            assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]  # may write to it


def admits(pod: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether the scheduler may put a pod onto a node with these labels; NotIn holds for a label that is absent."""
    if not pod.get("nodeSelector", {}).items() <= labels.items():
        return False
    affinity = pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    if affinity is None:
        return True
    for term in affinity["nodeSelectorTerms"]:  # one of them, all of its expressions
        assert term.keys() == {"matchExpressions"} and {e["operator"] for e in term["matchExpressions"]} == {"NotIn"}
        if all(labels.get(e["key"]) not in e["values"] for e in term["matchExpressions"]):
            return True
    return False


def test_only_workers_run_on_spot_nodes() -> None:
    spot = [
        {"karpenter.sh/capacity-type": "spot"},
        {"eks.amazonaws.com/capacityType": "SPOT"},
        {"cloud.google.com/gke-spot": "true"},
    ]
    steady = [{}, {"karpenter.sh/capacity-type": "on-demand"}, {"eks.amazonaws.com/capacityType": "ON_DEMAND"}]
    pods = [(pod, container["name"]) for m in MANIFESTS for pod, container in containers(m.values)]
    found = {name: [admits(pod, node) for node in (*spot, *steady)] for pod, name in pods if name != "autoscaler"}
    stays = [False] * 3 + [True] * 3
    goes = [True] + [False] * 5  # as the files stand: onto Karpenter's spot nodes alone
    assert found == {
        "ray-head": stays, "mlflow": stays, "postgres": stays, "submit": stays, "ray-worker": goes,
    }  # fmt: skip


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_cluster_runs_the_pinned_ray(cluster: dict[str, Any]) -> None:
    assert cluster["rayVersion"] == CONSTRAINTS["ray"]


def test_nights_do_not_overlap_and_only_one_schedule_is_on() -> None:
    (cron,) = [m.values["spec"] for m in MANIFESTS if m.kind == "CronJob"]
    assert cron["concurrencyPolicy"] == "Forbid" and cron["jobTemplate"]["spec"]["backoffLimit"] == 0
    (alpha,) = [m.values["spec"] for m in MANIFESTS if m.kind == "RayCronJob"]
    assert alpha["suspend"] is True


# ---- regions -------------------------------------------------------------------------------------------------------------


def regions() -> Iterator[tuple[str, str, str]]:
    """(file, variable, value) of every variable by which a file gives a region to a process."""
    for path in [*YAML_FILES, ROOT / "docs" / "operations.md"]:
        text = re.sub(r"\$\{\w+:-(\S+)\}", r"\1", path.read_text())  # compose: where the shell has none
        for name, value in re.findall(r"\b(AWS_\w*REGION)(?:, value: |: |=)([\w-]+)", text):
            yield named(path), name, value


def test_botocore_reads_the_region_that_the_files_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import botocore.session

    found = list(regions())
    assert len(found) == 7
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for file, name, value in found:
        for known in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(known, raising=False)
        monkeypatch.setenv(name, value)
        for service in ("s3", "ec2"):
            made = botocore.session.Session().create_client(service, aws_access_key_id="x", aws_secret_access_key="x")
            assert made.meta.region_name == value, file


def test_a_job_that_is_stopped_has_time_to_give_its_lock_back() -> None:
    """By a variable of the head that Ray reads; its default is shorter than a store that is slow."""
    import inspect

    from ray.dashboard.modules.job import job_supervisor

    name = "RAY_JOB_STOP_WAIT_TIME_S"
    assert f'"{name}"' in inspect.getsource(job_supervisor)
    given = [f"--env={name}=60" in load(path)[0]["docker"]["run_options"] for path in LAUNCHERS]
    for cluster in CLUSTERS:
        (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        given.append({"name": name, "value": "60"} in head["env"])
    assert given == [True] * (len(LAUNCHERS) + 1)


# ---- entrypoints ---------------------------------------------------------------------------------------------------------


def entrypoints() -> Iterator[tuple[Manifest, list[str]]]:
    """Every command that Ray is given to run."""
    for manifest in MANIFESTS:
        spec = manifest.values.get("spec", {})
        if manifest.kind in ("RayJob", "RayCronJob"):
            yield manifest, shlex.split(spec.get("jobTemplate", spec)["entrypoint"])
        elif manifest.kind == "CronJob":
            for _, container in containers(manifest.values):
                command = [*container["command"], *container["args"]]
                assert command[:3] == ["ray", "job", "submit"]
                yield manifest, command[command.index("--") + 1 :]


ENTRYPOINTS = list(entrypoints())
SCHEDULED = ["sh", "/opt/pd_core/infra/container/scheduled.sh"]


def settings_class(workflow: str) -> type[WorkflowSettings]:
    name = "".join(word.capitalize() for word in workflow.split("_")) + "Settings"
    return next(one for one in WORKFLOWS if one.__name__ == name)


def resolved(command: list[str], maps: Mapping[str, str]) -> tuple[str, WorkflowSettings]:
    """Workflow and settings of an entrypoint, parsed by the workflow's own parser; `maps`: where mounted files lie here."""
    if command[:2] == SCHEDULED:
        workflow = "curate"
    else:
        assert command[0] == "python" and command[1].startswith("/opt/pd_core/workflows/")
        workflow = Path(command[1]).stem
    if not (ROOT / "workflows" / f"{workflow}.py").exists():
        pytest.skip(f"there is no workflows/{workflow}.py")
    return workflow, settings_load.load(settings_class(workflow), [maps.get(a, a) for a in command[2:]], prog=workflow)


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of the ConfigMaps, by the paths that the pods see them at."""
    folder = tmp_path_factory.mktemp("mounted")
    places = {}
    for manifest in MANIFESTS:
        if manifest.kind == "ConfigMap":
            for name, text in manifest.values["data"].items():
                (folder / name).write_text(text)
                places[f"/etc/pd_core/{name}"] = str(folder / name)
    return places


def scheduled_settings() -> list[dict[str, Any]]:
    """Of every ConfigMap, what curate.py is set to."""
    return [yaml.safe_load(text) for m in MANIFESTS if m.kind == "ConfigMap" for text in m.values["data"].values()]


def uris(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, URI) of every setting that names something in a bucket."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", uri) for inner, uri in uris(value))
        else:
            texts = value if isinstance(value, list | tuple) else [value]
            yield from ((name, text) for text in texts if isinstance(text, str) and "://" in text)


@pytest.mark.parametrize(
    ("manifest", "command"), ENTRYPOINTS, ids=[f"{m.kind}-{m.name}{i}" for i, (m, _) in enumerate(ENTRYPOINTS)]
)
def test_entrypoints_are_understood_by_their_workflow(
    manifest: Manifest, command: list[str], mounted: dict[str, str]
) -> None:
    _, settings = resolved(command, mounted)
    assert str(settings.output).startswith(BUCKET), "a local output would go with the pod"
    for name, uri in uris(settings.model_dump()):
        if name != "tracking.uri":
            assert allowed("s3:GetObject", uri), f"{name}: infra/policies/bucket.json lets nobody read {uri}"
    assert allowed("s3:PutObject", f"{settings.output}/x") and allowed("s3:DeleteObject", f"{settings.output}/x")


def test_there_is_a_job_for_every_workflow() -> None:
    run = {"curate" if c[:2] == SCHEDULED else Path(c[1]).stem for m, c in ENTRYPOINTS if m.kind == "RayJob"}
    assert run >= {path.stem for path in (ROOT / "workflows").glob("*.py")}


def gpus(settings: Mapping[str, Any], above: str = "") -> dict[str, float | None]:
    """Every setting that says how many GPUs an actor or worker has, by its dotted name."""
    found: dict[str, float | None] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= gpus(value, f"{above}{name}.")
        elif re.fullmatch(r"(actor|worker)_gpus", name):
            found[above + name] = value
    return found


def test_jobs_that_run_a_model_ask_for_a_gpu(mounted: dict[str, str]) -> None:
    """The GPU group is empty at the start: a stage that asks for none would run on CPUs for ever."""
    for manifest, command in ENTRYPOINTS:
        workflow, settings = resolved(command, mounted)
        asked = gpus(settings.model_dump())
        assert asked and set(asked.values()) == {1}, (manifest.name, asked)
        assert len(asked) == {"curate": 3, "tradeoff": 2}.get(workflow, 1), (manifest.name, asked)


@pytest.mark.parametrize("option", ["--generator.stepz 5", "--n ten", "--output"])
def test_a_mistyped_option_is_found(option: str, mounted: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    command = next(c for m, c in ENTRYPOINTS if m.name == "pd-core-generate-")
    with pytest.raises((SystemExit, errors.UserError)) as caught:
        resolved([*command, *option.split()], mounted)
    said = f"{capsys.readouterr().err} {caught.value}"
    assert option.split()[0].lstrip("-").split(".")[-1] in said


def test_environment_variables_of_ours_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name for path in FILES for name in re.findall(r"\bPD_CORE_[A-Z0-9_]+", path.read_text())}
    for name in found:
        monkeypatch.setenv(name, "1")
    settings_load.load(BuildIndexSettings, [], prog="test")  # refuses unknown ones
    monkeypatch.setenv("PD_CORE_DENSITY__KK", "1")
    with pytest.raises(errors.UserError, match="PD_CORE_DENSITY__KK"):
        settings_load.load(BuildIndexSettings, [], prog="test")


# ---- bucket policies -----------------------------------------------------------------------------------------------------


def allowed(action: str, uri: str, policy: str = "bucket.json") -> bool:
    """Whether a policy lets its holder do this to an object; what one statement denies, no other allows."""
    statements = json.loads((INFRA / "policies" / policy).read_text())["Statement"]
    arn = uri.replace("s3://", "arn:aws:s3:::")
    effects = set()
    for statement in statements:
        # a folder that is read, such as a saved pipeline, is read object by object
        if any(fnmatchcase(action, a) for a in texts(statement["Action"])) and any(
            fnmatchcase(arn, r) or fnmatchcase(f"{arn}/x", r) for r in texts(statement["Resource"])
        ):
            effects.add(statement["Effect"])
    return effects == {"Allow"}


def texts(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def policy_problems(statement: Mapping[str, Any]) -> list[str]:
    """Actions of a statement that reach further than they need to."""
    resources, found = texts(statement["Resource"]), []
    conditions = {key: texts(v) for one in statement.get("Condition", {}).values() for key, v in one.items()}
    tagged = conditions.get("ec2:ResourceTag/ray-cluster-name") == ["pd-core"]
    named_all = not any(re.search(r"(^|:)\*", resource) for resource in resources)
    for action in texts(statement["Action"]):
        if action == "s3:ListBucket":
            narrow = bool(conditions.get("s3:prefix")) and all("/" not in resource for resource in resources)
        elif action.startswith("s3:"):
            narrow = all(re.fullmatch(r"arn:aws:s3:::[\w-]+/[\w/-]+/\*", resource) for resource in resources)
        elif action.startswith("ec2:Describe"):  # takes neither resource nor tag
            narrow = True
        elif action == "ec2:RunInstances":
            of_instances = {"aws:RequestTag/ray-cluster-name", "ec2:InstanceType", "ec2:InstanceProfile"}
            instances = any(":instance/" in resource for resource in resources)
            free = {"network-interface", "volume", "spot-instances-request", "instance"}  # have no name before
            narrow = named_all and (not instances or of_instances <= conditions.keys())
            narrow &= all(not r.endswith("/*") or r.split(":")[-1].split("/")[0] in free for r in resources)
        elif action == "ec2:CreateTags":  # who may tag everything may end everything that a tag lets him end
            narrow = named_all and (tagged or conditions.get("ec2:CreateAction") == ["RunInstances"])
        elif action == "ec2:TerminateInstances":
            narrow = named_all and tagged
        else:
            assert action == "iam:PassRole", action
            narrow = named_all and conditions.get("iam:PassedToService") == ["ec2.amazonaws.com"]
        found += [] if narrow else [action]
    return found


@each(POLICIES)
def test_policies_are_narrow(path: Path) -> None:
    policy = json.loads(path.read_text())
    assert policy.keys() == {"Version", "Statement"} and policy["Version"] == "2012-10-17"
    for statement in policy["Statement"]:
        assert statement.keys() <= {"Sid", "Effect", "Action", "Resource", "Condition"}
        assert statement["Effect"] == "Deny" or policy_problems(statement) == []


ANY_INSTANCE = "arn:aws:ec2:us-east-1:111122223333:instance/*"


@pytest.mark.parametrize(
    ("action", "resource", "condition"),
    [
        ("s3:ListBucket", "arn:aws:s3:::my-bucket", {}),
        ("s3:GetObject", "arn:aws:s3:::my-bucket/*", {}),
        ("ec2:CreateTags", "*", {}),
        ("ec2:CreateTags", ANY_INSTANCE, {}),
        ("ec2:RunInstances", "*", {}),
        ("ec2:RunInstances", ANY_INSTANCE, {"StringEquals": {"aws:RequestTag/ray-cluster-name": "pd-core"}}),
        ("ec2:RunInstances", "arn:aws:ec2:us-east-1:111122223333:subnet/*", {}),
        ("ec2:TerminateInstances", ANY_INSTANCE, {}),
        ("iam:PassRole", "arn:aws:iam::111122223333:role/pd-core-worker", {}),
    ],
)
def test_a_policy_that_is_too_wide_is_found(action: str, resource: str, condition: dict[str, Any]) -> None:
    assert policy_problems({"Action": action, "Resource": resource, "Condition": condition}) == [action]


def test_the_launcher_s_head_may_start_the_workers_of_its_file_and_no_others() -> None:
    (values,) = load(INFRA / "launcher" / "aws.yaml")
    statements = json.loads((INFRA / "policies" / "launcher-head.json").read_text())["Statement"]
    own, around = [s for s in statements if s["Action"] == "ec2:RunInstances"]
    workers = [one["node_config"] for name, one in values["available_node_types"].items() if name != "head"]
    equal = own["Condition"]["StringEquals"]
    assert equal["aws:RequestTag/ray-cluster-name"] == values["cluster_name"]
    assert sorted(equal["ec2:InstanceType"]) == sorted(node["InstanceType"] for node in workers)
    profile = own["Condition"]["ArnEquals"]["ec2:InstanceProfile"].rpartition("/")[2]
    for node in workers:
        assert node["InstanceMarketOptions"]["MarketType"] == equal["ec2:InstanceMarketType"]
        assert node["MetadataOptions"]["HttpTokens"] == equal["ec2:MetadataHttpTokens"]
        assert node["IamInstanceProfile"]["Name"] == profile
        wanted = {f"image/{node['ImageId']}", *(f"subnet/{n}" for n in node["SubnetIds"])}
        wanted |= {f"security-group/{n}" for n in node["SecurityGroupIds"]}
        assert wanted == {r.split(":")[-1] for r in around["Resource"] if not r.endswith("*")}
    arns = [r for s in statements for r in texts(s["Resource"]) if r.startswith("arn:aws:ec2:")]
    assert {arn.split(":")[3] for arn in arns} == {values["provider"]["region"]}


def test_the_bucket_policy_gives_what_is_needed_and_no_more() -> None:
    assert allowed("s3:GetObject", f"{BUCKET}images/a.png") and allowed("s3:PutObject", f"{BUCKET}pd/a")
    for uri in ("images/a.png", "models/a", "mlflow/a", "a"):
        assert not allowed("s3:PutObject", BUCKET + uri) and not allowed("s3:DeleteObject", BUCKET + uri)
    assert not allowed("s3:GetObject", f"{BUCKET}mlflow/a") and not allowed(
        "s3:GetObject", f"{BUCKET}pd/a", "mlflow-bucket.json"
    )


def test_of_a_release_no_more_may_be_deleted_than_curate_deletes(tmp_path: Path) -> None:
    """A release as `releasing` lays it out is damaged and mended: what goes meanwhile may go, all else may not."""
    (output,) = {str(settings["output"]) for settings in scheduled_settings()}
    release = artifacts.Stage(str(tmp_path / "releases" / "2026-11-29-0123456789ab"), "release", 1, {"sets": 1})
    names = ("typical/part-00000000.parquet", releases.METRICS, releases.RECORD, releases.CARD)

    def make() -> tuple[list[artifacts.Part], dict[str, Any]]:
        done = release.finished_parts()
        return [done.get(name) or release.write_part(name, name.encode(), 0) for name in names], {}

    release.complete(make, overwrite=False)
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "releases" / "2026-11-29-0123456789ab" / names[0]).unlink()
    assert release.begin(overwrite=False) is None
    gone = there - {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    deleted = {name for name in gone if not name.endswith(names[0])}
    for name in there:
        for action in ("s3:DeleteObject", "s3:DeleteObjectVersion"):
            assert allowed(action, f"{output}/{name}") == (name in deleted and action == "s3:DeleteObject"), name
        assert allowed("s3:PutObject", f"{output}/{name}") and allowed("s3:GetObject", f"{output}/{name}")
    for other in (
        f"{releases.LATEST}",
        "index/20261129T010203Z-0123456789ab/features/part-00000000.parquet",
        "lock/1.json",
    ):
        assert allowed("s3:DeleteObject", f"{output}/{other}")


def test_the_document_shows_the_policy_as_it_is() -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)
    assert json.loads(shown) == json.loads((INFRA / "policies" / "bucket.json").read_text())


# ---- the cluster launcher ------------------------------------------------------------------------------------------------


@each(LAUNCHERS)
def test_launcher_files_pass_ray_s_own_validation(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (values,) = load(path)
    validate_config(prepare_config(values))
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config({**values, "max_worker": 1}))


@each(LAUNCHERS)
def test_launcher_files_scale_from_zero_on_spot_and_hold_no_key(path: Path) -> None:
    (values,) = load(path)
    assert values["provider"]["use_internal_ips"] is True
    assert values["auth"].keys() == {"ssh_user"}
    types = values["available_node_types"]
    assert types[values["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {name: one for name, one in types.items() if name != values["head_node_type"]}
    assert sorted(bool(one["resources"].get("GPU")) for one in workers.values()) == [False, True]
    for one in workers.values():
        assert one["min_workers"] == 0 and one["max_workers"] > 0
        assert "spot" in json.dumps(one["node_config"]).lower()
        assert ("docker" in one) == bool(one["resources"].get("GPU"))
    assert "--env=RAY_AUTH_MODE=token" in values["docker"]["run_options"]
    assert (
        "/home/ray/.ray/auth_token" in values["file_mounts"]
    )  # where Ray looks for it, in the home of the image's user
    (start,) = [line for line in values["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start


@each(LAUNCHERS)
def test_the_launcher_s_head_shows_its_list_of_nodes_to_prometheus(path: Path) -> None:
    (values,) = load(path)
    (discovery,) = re.findall(r"files: \[(/tmp/ray)/", (INFRA / "monitoring" / "prometheus.yaml").read_text())
    assert f"--volume={discovery}:{discovery}" in values["docker"]["run_options"]
    (user,) = re.findall(r"^USER (\d+):", (INFRA / "container" / "Dockerfile").read_text(), re.MULTILINE)
    (made,) = [line for line in values["initialization_commands"] if line.startswith("sudo install")]
    assert shlex.split(made) == ["sudo", "install", "-d", "-o", user, "-g", user, discovery]


def test_aws_accepts_the_nodes() -> None:
    """botocore's own description of RunInstances."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = (
        botocore.session.Session().get_service_model("ec2", "2016-11-15").operation_model("RunInstances").input_shape
    )
    (values,) = load(INFRA / "launcher" / "aws.yaml")
    for one in values["available_node_types"].values():
        node = {**one["node_config"], "MinCount": 1, "MaxCount": 1}
        node["SubnetId"] = node.pop("SubnetIds")[0]  # Ray takes one after the other
        assert ParamValidator().validate(node, shape).generate_report() == ""
        node["IamInstanceProfil"] = {}
        assert "IamInstanceProfil" in ParamValidator().validate(node, shape).generate_report()
    assert values["available_node_types"]["cpu"]["node_config"]["IamInstanceProfile"].keys() == {"Name"}


@pytest.mark.parametrize("fails", [None, "pd-core-s3-key-id", "pd-core-s3-secret"])
def test_an_instance_on_google_cloud_without_its_key_does_not_start(tmp_path: Path, fails: str | None) -> None:
    (values,) = load(INFRA / "launcher" / "gcp.yaml")
    (command,) = [line for line in values["initialization_commands"] if "gcloud" in line]
    (file,) = [o.partition("=")[2] for o in values["docker"]["run_options"] if o.startswith("--env-file=")]
    assert command.count(file) == 1
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/sh\ncase "$*" in *--secret={fails}) exit 1;; esac\nprintf %s "value of $5"\n')
    gcloud.chmod(0o755)
    ran = subprocess.run(  # as Ray does: in parentheses, at the end of what it puts before
        ["bash", "-c", f"true; export A=1 && ({command.replace(file, str(tmp_path / 'env'))})"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=False,
    )
    assert (ran.returncode == 0) == (tmp_path / "env").exists() == (fails is None)
    if fails is None:
        lines = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
        assert lines["AWS_ACCESS_KEY_ID"] == "value of --secret=pd-core-s3-key-id"
        assert lines["AWS_SECRET_ACCESS_KEY"] == "value of --secret=pd-core-s3-secret"
        assert lines["AWS_ENDPOINT_URL"].startswith("https://") and len(lines) == 3
        assert (tmp_path / "env").stat().st_mode & 0o077 == 0


def test_the_account_that_ray_makes_on_google_cloud_is_named() -> None:
    from importlib.util import find_spec

    package = find_spec("ray")
    assert package is not None and package.origin is not None
    source = (Path(package.origin).parent / "autoscaler/_private/gcp/config.py").read_text()
    (roles,) = re.findall(r"^DEFAULT_SERVICE_ACCOUNT_ROLES = \[(.*?)\]", source, re.DOTALL | re.MULTILINE)
    (version,) = re.findall(r'^VERSION = "(\w+)"', source, re.MULTILINE)
    assert 'DEFAULT_SERVICE_ACCOUNT_ID = RAY + "-sa-" + VERSION' in source
    text = (INFRA / "launcher" / "gcp.yaml").read_text()
    for name in (f"ray-autoscaler-sa-{version}", *re.findall(r'"(roles/[\w.]+)"', roles)):
        assert name in text, name
    assert f"ray-autoscaler-sa-{version}" in DOCUMENT
    (values,) = load(INFRA / "launcher" / "gcp.yaml")
    for one in values["available_node_types"].values():
        assert one["node_config"]["serviceAccounts"][0]["email"].startswith("pd-core-")


def test_nodes_on_aws_name_their_image() -> None:
    """Ray's default is too old for the CUDA of the pinned torch."""
    (values,) = load(INFRA / "launcher" / "aws.yaml")
    for name, one in values["available_node_types"].items():
        assert re.fullmatch(r"ami-[0-9a-f]{17}", one["node_config"].get("ImageId", "")), name
        (disk,) = one["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 256  # the image of the instance and both of ours
    assert CONSTRAINTS["cuda-toolkit"].startswith("13."), "the comment on the driver is for CUDA 13"


# ---- images --------------------------------------------------------------------------------------------------------------


def image_references() -> Iterator[tuple[str, str]]:
    """(file, image) of every image that a file names."""

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if key in ("image", "worker_image", "head_image") and isinstance(inner, str):
                    yield inner
                else:
                    yield from walk(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner)

    for path in YAML_FILES:
        yield from ((named(path), image) for document in load(path) for image in walk(document))
    for path in IMAGES:
        text = path.read_text()
        for image in re.findall(r"^FROM\s+(.+)$", text, re.MULTILINE):
            for name, value in re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE):
                image = image.replace(f"${{{name}}}", value)
            yield named(path), image


# Known once they are built and pushed; the tag is that of this project, in a registry that is yours.
OURS = re.compile(r"(registry\.example\.com/)?pd-core(-mlflow)?:\d+\.\d+\.\d+[\w-]*")
# A tag that says what it is, and the digest that decides: as it is, to be written by command 2, or asked for.
BY_DIGEST = re.compile(
    r"[\w./-]+:v?\d+\.\d+[\w.-]*"
    r"@(sha256:[0-9a-f]{64}|sha256:digest-of-postgres|\$\{\w+_DIGEST:\?(.*infra/README\.md.*)\})"
)


def pinned(image: str) -> bool:
    return bool(OURS.fullmatch(image) or BY_DIGEST.fullmatch(image))


def test_every_image_is_named_by_digest_or_is_ours() -> None:
    found = list(image_references())
    assert len(found) > 10
    assert [(file, image) for file, image in found if not pinned(image)] == []


@pytest.mark.parametrize(
    "image",
    [
        "postgres:17.6-bookworm",
        "postgres@sha256:0123",
        "python:3.11.14-slim-bookworm@${PYTHON_DIGEST}",
        "python:3.11.14-slim-bookworm@${PYTHON_DIGEST:-sha256:}",
        "registry.example.com/other:1.0.0",
    ],
)
def test_an_image_by_tag_alone_is_found(image: str) -> None:
    assert not pinned(image)


def test_the_readme_finds_the_digest_of_each_image_of_others() -> None:
    text = (INFRA / "README.md").read_text()
    found = dict(re.findall(r'(\w+_DIGEST)="\$\(digest (\S+)\)"', text))
    wanted = {image.partition("@")[0] for _, image in image_references() if not OURS.fullmatch(image)}
    assert set(found.values()) == wanted
    asked = {name: image for _, image in image_references() for name in re.findall(r"\w+_DIGEST", image)}
    assert {name: image.partition("@")[0] for name, image in asked.items()} == found
    (command,) = re.findall(r"--format '[^']+'", text)
    assert f"docker buildx imagetools inspect {command} {found['PYTHON_DIGEST']}`" in DOCUMENT


def test_nodes_have_a_python_whose_tarfile_is_mended() -> None:
    for path in IMAGES:
        (version,) = re.findall(r"^ARG BASE_IMAGE=python:(\d+)\.(\d+)\.(\d+)-", path.read_text(), re.MULTILINE)
        assert tuple(map(int, version)) >= (3, 11, 14) and version[:2] == ("3", "11")  # the lists are for that
    (checked,) = re.findall(r'^RUN python -c "(.+)"$', (INFRA / "container" / "Dockerfile").read_text(), re.MULTILINE)
    for version_info, said in (((3, 11, 13), "Python 3.11.14"), ((3, 11, 14), ""), ((3, 12, 0), "")):
        code = f"import sys; sys.version_info = {version_info}; {checked}"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (ran.returncode == 0, said in ran.stderr) == (not said, True)


def test_images_carry_the_versions_of_this_project() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    for file, image in image_references():
        name, _, tag = image.rpartition(":")
        if name.endswith("pd-core"):
            assert re.fullmatch(rf"{re.escape(version[1])}-(cpu|gpu)(-aws|-gcp)?", tag), file
        elif name.endswith("pd-core-mlflow"):
            assert tag == CONSTRAINTS["mlflow"], file


@each(IMAGES)
def test_image_files_are_sound(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, "--no-color", str(path)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    text = path.read_text()
    users = re.findall(r"^USER (.+)$", text, re.MULTILINE)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith(("ENV", "ARG")):
            assert not SECRET_NAME.search(line), line
        for command in re.findall(r"pip install[^&;]*", line):
            assert "--no-deps" in command and ("--require-hashes" in command or "--no-index" in command), command


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    open_to = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert [name for name in open_to if not (ROOT / name).exists()] == []
    for path in IMAGES:
        for line in re.findall(r"^COPY (.+)$", path.read_text(), re.MULTILINE):
            for source in shlex.split(line)[:-1]:
                assert (ROOT / source).exists(), source
                assert any(source == name or source.startswith(f"{name}/") for name in open_to), source


def let_in(path: str, lines: list[str]) -> bool:
    """Whether docker's rules let a file into the build context: the last line that fits it or a folder of it decides."""
    result = True
    names = path.split("/")
    above = ["/".join(names[: n + 1]) for n in range(len(names))]
    for line in lines:
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, one) for one in above):
            result = line.startswith("!")
    return result


PASSWORDS = [".env", "infra/mlflow/.env", "infra/mlflow/.env.local", "infra/container/.env", "workflows/configs/.env"]


@pytest.mark.parametrize("path", PASSWORDS)
def test_no_file_of_passwords_gets_into_an_image_or_to_the_cluster(path: str, tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert not let_in(path, lines) and let_in("infra/mlflow/serve.sh", lines) and not let_in("tests/s3.py", lines)
    shutil.copy(ROOT / ".rayignore", tmp_path)
    for name in (path, "workflows/curate.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (left_out,) = get_excludes_from_ignore_files(tmp_path, include_gitignore=False)
    assert left_out(tmp_path / path) and not left_out(tmp_path / "workflows/curate.py")


def listed(path: Path) -> dict[str, str]:
    """Version of each package of a list of the images; every one has a hash, and nothing else stands there."""
    text = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("#"))
    entry = r"([a-z0-9-]+)==([\w.!]+)(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    assert text and re.sub(entry, "", text) == "", path
    return dict(re.findall(entry, text))


@each(PINS)
def test_what_images_install_is_pinned_by_hash(path: Path) -> None:
    for name, version in listed(path).items():
        assert CONSTRAINTS.get(name, version) == version, f"constraints.txt has another {name}"


def needed(requirements: list[str]) -> set[str]:
    """Names of all that some requirements need, by what is installed here."""
    found: set[str] = set()
    asked = [Requirement(text) for text in requirements]
    while asked:
        one = asked.pop()
        name = canonicalize_name(one.name)
        for extra in one.extras or {""}:
            if f"{name}[{extra}]" not in found:
                found.add(f"{name}[{extra}]")
                inner = [Requirement(text) for text in distribution(name).requires or []]
                asked += [r for r in inner if r.marker is None or r.marker.evaluate({"extra": extra})]
                asked += [Requirement(name)] if extra else []
    return {name.partition("[")[0] for name in found}


def test_the_lists_are_whole() -> None:
    """The images install without resolving: what is needed and not listed would be missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    more = project["project"]["optional-dependencies"]
    container = INFRA / "container"
    base = listed(container / "requirements.txt")
    assert needed([*project["project"]["dependencies"], *more["diffusers"]]) <= base.keys()
    assert needed(more["cpu"]) <= base.keys() | listed(container / "faiss-cpu.txt").keys()
    assert {Requirement(text).name for text in project["build-system"]["requires"]} <= base.keys()
    assert (
        needed(["mlflow"]) | {"flask-wtf", "psycopg2-binary", "boto3"}
        <= listed(INFRA / "mlflow" / "requirements.txt").keys()
    )
    for variant in ("faiss-cpu", "faiss-gpu", "cloud-aws", "cloud-gcp"):
        assert not base.keys() & listed(container / f"{variant}.txt").keys(), (
            variant
        )  # a second version would replace the first


def test_a_template_engine_with_a_known_hole_is_not_accepted() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (jinja2,) = [one for text in project["dependencies"] if (one := Requirement(text)).name == "jinja2"]
    assert [jinja2.specifier.contains(version) for version in ("3.1.5", "3.1.6")] == [False, True]


def test_both_images_hold_the_same_faiss_and_one_botocore() -> None:
    assert listed(INFRA / "container" / "faiss-gpu.txt")["faiss-gpu"] == CONSTRAINTS["faiss-cpu"]
    boto3 = {versions["boto3"] for path in PINS if "boto3" in (versions := listed(path))}
    assert boto3 == {CONSTRAINTS["botocore"]}  # each boto3 asks for the botocore of its own number


# ---- scripts -------------------------------------------------------------------------------------------------------------


@each(SCRIPTS)
def test_scripts_are_shell(path: Path) -> None:
    assert subprocess.run(["sh", "-n", str(path)], capture_output=True, check=False).stderr == b""


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (4, 4), (2, 2), (1, 1)])
def test_nothing_new_is_a_success_for_a_schedule_and_all_else_is_not(tmp_path: Path, code: int, expected: int) -> None:
    (tmp_path / "infra" / "container").mkdir(parents=True)
    (tmp_path / "workflows").mkdir()
    shutil.copy(INFRA / "container" / "scheduled.sh", tmp_path / "infra" / "container")
    (tmp_path / "workflows" / "curate.py").write_text(f"import sys; print(sys.argv[1:]); sys.exit({code})")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["sh", str(tmp_path / "infra" / "container" / "scheduled.sh"), "--config", "a b.yaml"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (expected, "['--config', 'a b.yaml']\n")


def test_programs_are_among_what_make_check_checks() -> None:
    said = subprocess.run(["make", "-n", "check"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (mypy,) = [line for line in said.splitlines() if "/mypy " in line]
    assert {str(path.parent.relative_to(ROOT)) for path in PROGRAMS} <= set(mypy.split())


# ---- MLflow --------------------------------------------------------------------------------------------------------------


def test_mlflow_starts_with_authentication_and_options_that_it_knows() -> None:
    from mlflow.cli import server

    known = {option for parameter in server.params for option in (*parameter.opts, *parameter.secondary_opts)}
    text = (INFRA / "mlflow" / "serve.sh").read_text()
    (command,) = re.findall(r"^exec (mlflow server .*(?:\\\n.*)*)", text, re.MULTILINE)
    used = re.findall(r"(?<=\s)(--[\w-]+)", command)
    assert [option for option in used if option not in known] == []
    assert "--app-name basic-auth" in command
    starts = [named(p) for p in FILES if re.search(r"^[^#]*mlflow server", p.read_text(), re.MULTILINE)]
    assert starts == ["infra/mlflow/serve.sh"]  # the one place; the image runs it


def test_users_database_holds_no_password() -> None:
    import configparser

    parser = configparser.ConfigParser()
    parser.read(INFRA / "mlflow" / "basic_auth.ini")
    section = parser["mlflow"]
    assert section.keys() == {"database_uri", "authorization_function", "default_permission"}
    assert re.fullmatch(r"postgresql\+psycopg2://mlflow@postgres:5432/mlflow", section["database_uri"])


@each(COMPOSE)
def test_compose_files_are_sound(path: Path) -> None:
    (values,) = load(path)
    text = re.sub(r"@\$\{\w+_DIGEST:\?[^}]*\}", "", path.read_text())  # this parser knows no tag beside a digest
    PyCompose.from_yaml(text)  # raises on an unknown key
    with pytest.raises(ValueError, match="portz"):
        PyCompose.from_yaml(text.replace("ports:", "portz:"))
    for service in values["services"].values():
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
        assert not service.get("privileged") and service.get("network_mode", "none") == "none"
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
        assert set(service.get("depends_on", {})) <= values["services"].keys()
        for name, value in service.get("environment", {}).items():
            if SECRET_NAME.search(name):
                assert value is None or re.fullmatch(r"\$\{\w+(:\?.*)?\}", value), f"{name} has a value"
        if "build" in service:
            context = path.parent / service["build"]["context"]
            assert context.resolve() == ROOT
            wanted = re.findall(r"^ARG (\w+)$", (context / service["build"]["dockerfile"]).read_text(), re.MULTILINE)
            assert set(wanted) == service["build"]["args"].keys()  # those without a default


# ---- secrets -------------------------------------------------------------------------------------------------------------

SECRETS = {
    "AWS key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "password in a URL": r"://[^\s/:@'\"]+:[^\s/@'\"]+@",
    "Secret with data": r"^kind: Secret$",
    "a value": r"(?i)^[ \t]*[\w-]*(password|secret|token|access_key)[\w-]*[ \t]*[:=][ \t]*['\"]?[^\s'\"${}\[\]|>]{8,}['\"]?$",
    "long random text": r"\b(?=[A-Za-z0-9+/]*[0-9])(?=[A-Za-z0-9+/]*[A-Z])(?=[A-Za-z0-9+/]*[a-z])[A-Za-z0-9+/]{32,}\b",
}


def secrets_in(text: str) -> list[str]:
    return [f"{what}: {m[0]}" for what, rule in SECRETS.items() for m in re.finditer(rule, text, re.MULTILINE)]


@each([*FILES, ROOT / "docs" / "operations.md"])
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    known = ("secretName: pd-core-ray-token",)
    assert [found for found in secrets_in(text) if not found.endswith(known)] == []


@pytest.mark.parametrize(
    "line",
    [
        "aws_access_key_id = AKIAIOSFODNN7EXAMPLE",
        "  POSTGRES_PASSWORD: correct-horse",
        "database_uri = postgresql://mlflow:hunter22@postgres/mlflow",
        "kind: Secret",
        "-----BEGIN RSA PRIVATE KEY-----",
        "auth: wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    ],
)
def test_a_planted_secret_is_found(line: str) -> None:
    assert secrets_in(f"a: 1\n{line}\n") != []


# ---- docs/operations.md --------------------------------------------------------------------------------------------------


def texts_of_ours() -> str:
    """Every text in the source, what is filled in standing as `…`."""
    import ast

    found = []
    for path in (ROOT / "pd_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_lines_of_the_troubleshooting_table_are_lines_of_ours() -> None:
    (table,) = re.findall(r"^\| line \|.*\n\|[-|]+\n((?:\|.*\n)+)", DOCUMENT, re.MULTILINE)
    lines = [row.split(" | ")[0].removeprefix("| ").strip("`") for row in table.splitlines()]
    lines = [line.replace("MLFLOW_TRACKING_URI", "…") for line in lines]  # a constant, filled in
    ours = texts_of_ours()
    pieces = [(line, piece.strip(" ().'")) for line in lines for piece in line.split("…") if re.search(r"\w{3}", piece)]
    assert len(lines) > 20 and [pair for pair in pieces if pair[1] not in ours] == []


def test_files_that_the_document_names_are_there() -> None:
    named_files = re.findall(r"infra/[\w./-]+\w", DOCUMENT)
    assert len(named_files) > 10
    assert [n for n in named_files if not (ROOT / n).exists() and not n.startswith("infra/monitoring")] == []


def test_it_installs_in_ten_commands() -> None:
    (block,) = re.findall(r"Ten commands:\n\n```sh\n(.*?)```", DOCUMENT, re.DOTALL)
    assert [int(n) for n in re.findall(r"^# (\d+) ", block, re.MULTILINE)] == list(range(1, 11))
    applied = {ROOT / n for n in re.findall(r"-f (infra/[\w./-]+)", block) if "Dockerfile" not in n}
    left_out = {m.path for m in MANIFESTS} - {m.path for m in MANIFESTS for a in applied if m.path.is_relative_to(a)}
    jobs = {path for path in left_out if path.parent.name == "jobs"}
    assert left_out - jobs == {INFRA / "kubernetes" / "schedule" / "raycronjob.yaml"}  # the other schedule


def test_the_documented_command_writes_the_names_everywhere(tmp_path: Path) -> None:
    """Command 2 on a copy: afterwards no placeholder is left, however often one stands on a line."""
    (block,) = re.findall(r"^# 2 .*\n((?:.*\n)+?)# 3 ", DOCUMENT, re.MULTILINE)
    names = {
        "REGISTRY": "images.invalid/team",
        "BUCKET": "bucket-of-ours",
        "ACCOUNT": "999988887777",
        "ISSUER": "oidc.eks.eu-west-1.amazonaws.com/id/AB",
        "PYTHON_DIGEST": f"sha256:{'1' * 64}",
        "POSTGRES_DIGEST": f"sha256:{'2' * 64}",
    }
    export, *rest = block.splitlines()
    assert export.partition("   #")[0] == "export " + " ".join(f"{name}=..." for name in names)
    shutil.copytree(INFRA, tmp_path / "infra", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["bash", "-ec", "\n".join(rest)], cwd=tmp_path, env={**os.environ, **names}, check=True)
    left = re.compile(r"registry\.example\.com|my-bucket|111122223333|oidc\.example\.com|sha256:digest-of")
    copies = [path for path in (tmp_path / "infra").rglob("*") if path.is_file()]
    assert [line for path in copies for line in path.read_text().splitlines() if left.search(line)] == []
    assert json.loads((tmp_path / "infra" / "policies" / "bucket.json").read_text())
    assert (
        f"postgres:17.6-bookworm@{names['POSTGRES_DIGEST']} " in (tmp_path / "infra/mlflow/kubernetes.yaml").read_text()
    )


def test_a_role_trusts_the_accounts_that_name_it_and_no_others() -> None:
    made = dict(re.findall(r"^aws iam create-role --role-name (\S+) .*file://(\S+)$", DOCUMENT, re.MULTILINE))
    given = dict(re.findall(r"^aws iam put-role-policy --role-name (\S+) .*file://(\S+)$", DOCUMENT, re.MULTILINE))
    assert {ROOT / path for path in made.values()} == set(TRUST) and made.keys() == given.keys()
    assert {ROOT / path for path in given.values()} < set(POLICIES)
    for role, trust in made.items():
        (statement,) = json.loads((ROOT / trust).read_text())["Statement"]
        assert statement["Action"] == "sts:AssumeRoleWithWebIdentity" and statement["Condition"].keys() == {
            "StringEquals"
        }
        issuer = statement["Principal"]["Federated"].removeprefix("arn:aws:iam::111122223333:oidc-provider/")
        trusted = statement["Condition"]["StringEquals"]
        accounts = [
            f"system:serviceaccount:{m.values['metadata']['namespace']}:{m.name}"
            for m in MANIFESTS
            if m.kind == "ServiceAccount"
            and m.values["metadata"]
            .get("annotations", {})
            .get("eks.amazonaws.com/role-arn", "")
            .endswith(f"role/{role}")
        ]
        assert accounts and trusted == {f"{issuer}:aud": "sts.amazonaws.com", f"{issuer}:sub": sorted(accounts)}


def test_accounts_that_the_document_asks_for_are_those_with_roles() -> None:
    (sentence,) = re.findall(r"two roles, (.*?)\(", DOCUMENT)
    roles = {m.name for m in MANIFESTS if m.kind == "ServiceAccount" and "role-arn" in json.dumps(m.values["metadata"])}
    assert set(re.findall(r"`([\w-]+)`", sentence)) == roles
