"""infra/kubernetes and infra/mlflow: unknown keys are refused, no root, no open door, jobs that are understood.

Nothing is started. KubeRay's resource definitions are not part of this project: where they are absent, its kinds are
checked in all but their schema.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from pd_core import cli
from pd_core.core.settings import load as settings_load
from pd_core.core.settings.base import WorkflowSettings
from pd_core.core.settings.index import BuildIndexSettings
from tests.infra import files
from tests.infra.files import CLUSTERS, DOCUMENT, MANIFESTS, ROOT, Manifest, leaves, load, of_kind, planted
from tests.infra.test_rights import BUCKET, SECRET_NAME, allowed

KUBERNETES = "1.33"  # oldest version that the manifests are written for
CRDS_VARIABLE = "KUBERAY_CRDS"  # not PD_CORE_...: that would be a setting
CRDS = Path(os.environ.get(CRDS_VARIABLE, ROOT.parent / "shared" / "data" / "kuberay-crds"))

each_manifest = pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=[f"{files.named(m.path)}:{m.kind}/{m.name}" for m in MANIFESTS]
)
each_cluster = pytest.mark.parametrize("cluster", CLUSTERS)


# ---- schemas ---------------------------------------------------------------------------------------------------------


def kubernetes_problems(manifest: Manifest) -> list[str]:
    """What Kubernetes' own schema, with unknown keys refused, says against an object and its pods."""
    objects = [manifest.values]
    if manifest.kuberay:  # its metadata, which the resource definitions leave open
        objects = [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest.values["metadata"]}]
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
    found = []
    for values in (*objects, *({**pod, "template": template} for template in manifest.pods())):
        try:
            kubernetes_validate.validate(values, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{'.'.join(str(part) for part in error.path)}: {error.message}")
    return found


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


def kuberay_problems(manifest: Manifest) -> list[str]:
    """What KubeRay's resource definition, with unknown keys refused, says against an object."""
    validator = kuberay_validator(manifest.kind, manifest.values["apiVersion"].removeprefix("ray.io/"))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest.values)]


needs_definitions = pytest.mark.skipif(
    not (CRDS / "ray.io_rayclusters.yaml").exists(),
    reason=f"no resource definitions of KubeRay: set {CRDS_VARIABLE} to helm-chart/kuberay-operator/crds of a release "
    "(github.com/ray-project/kuberay); all else of these manifests is checked without them",
)


@each_manifest
def test_kubernetes_schema(manifest: Manifest) -> None:
    assert kubernetes_problems(manifest) == []


@needs_definitions
@pytest.mark.parametrize("manifest", [m for m in MANIFESTS if m.kuberay], ids=lambda manifest: manifest.name)
def test_kuberay_schema(manifest: Manifest) -> None:
    assert kuberay_problems(manifest) == []


# ---- who runs, who may come in ---------------------------------------------------------------------------------------


def root_problems(manifest: Manifest) -> list[str]:
    """Containers that may be root, or gain rights, or would be refused in the namespace."""
    problems = []
    for pod, container in manifest.containers():
        inner = container.get("securityContext", {})
        both = {**pod.get("securityContext", {}), **inner}
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


def door_problems(manifest: Manifest) -> list[str]:
    """What would let the outside in."""
    closed_to_it = {
        "a kind of gate": manifest.kind not in ("Ingress", "Gateway", "HTTPRoute", "Route"),
        "Service": manifest.kind != "Service" or manifest.values["spec"].get("type", "ClusterIP") == "ClusterIP",
    }
    if cluster := manifest.cluster():
        head, options = cluster["headGroupSpec"], cluster.get("authOptions", {})
        modes = [
            v.get("value") for _, c in manifest.containers() for v in c.get("env", []) if v["name"] == "RAY_AUTH_MODE"
        ]
        closed_to_it |= {
            # KubeRay's default for the dashboard is 0.0.0.0: it needs the token
            "authOptions": options.get("mode") == "token" and bool(options.get("secretName")),
            "serviceType": head.get("serviceType") == "ClusterIP" and "headService" not in head,
            "enableIngress": not head.get("enableIngress"),
            "RAY_AUTH_MODE": set(modes) <= {"token"},
        }
    return [name for name, holds in closed_to_it.items() if not holds]


@each_manifest
def test_no_container_is_root_and_no_door_is_open(manifest: Manifest) -> None:
    assert root_problems(manifest) + door_problems(manifest) == []


WORKER = "spec.workerGroupSpecs.1.template.spec"


@pytest.mark.parametrize(
    ("check", "kind", "path", "value"),
    [
        (kubernetes_problems, "CronJob", "spec.jobTemplate.spec.template.spec.restartPolicyy", "Never"),
        (kubernetes_problems, "Deployment", "spec.replicas", "one"),
        (kubernetes_problems, "RayCluster", f"{WORKER}.containers.0.resources.limit", {}),
        (kubernetes_problems, "RayCluster", "spec.autoscalerOptions.env", [1]),
        pytest.param(kuberay_problems, "RayCluster", "spec.workerGroupSpecs.0.minReplica", 0, marks=needs_definitions),
        pytest.param(kuberay_problems, "RayJob", "spec.entryPoint", "x", marks=needs_definitions),
        pytest.param(kuberay_problems, "RayCronJob", "spec.jobTemplate.spec", {}, marks=needs_definitions),
        (root_problems, "Deployment", "spec.template.spec.securityContext", {}),
        (root_problems, "RayCluster", f"{WORKER}.securityContext.runAsUser", 0),
        (root_problems, "RayCluster", "spec.autoscalerOptions.securityContext", {}),
        (root_problems, "CronJob", "spec.jobTemplate.spec.template.spec.hostNetwork", True),
        (door_problems, "Service", "spec.type", "LoadBalancer"),
        (door_problems, "Service", "spec.type", "NodePort"),
        (door_problems, "RayCluster", "spec.authOptions", {"mode": "disabled"}),
        (door_problems, "RayCluster", "spec.headGroupSpec.serviceType", "LoadBalancer"),
        (door_problems, "RayCluster", "spec.headGroupSpec.enableIngress", True),
    ],
)
def test_a_planted_fault_is_found(check: Callable[[Manifest], list[str]], kind: str, path: str, value: Any) -> None:
    assert check(planted(kind, path, value)) != []


def test_only_the_namespace_and_the_operator_reach_the_dashboard() -> None:
    policies = [m.values["spec"] for m in of_kind("NetworkPolicy")]
    head = {"ray.io/node-type": "head"}
    (policy,) = [one for one in policies if head.items() <= one["podSelector"].get("matchLabels", {}).items()]
    assert policy["policyTypes"] == ["Ingress"]
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    for rule in policy["ingress"]:
        if any(port["port"] == 8265 for port in rule.get("ports", [{"port": 8265}])):
            assert rule["from"]
            for peer in rule["from"]:
                outside = "namespaceSelector" in peer and peer.get("podSelector", {}).get("matchLabels") != operator
                assert "ipBlock" not in peer and not outside


# ---- what a manifest refers to ---------------------------------------------------------------------------------------


def test_all_lies_in_the_namespace() -> None:
    (namespace,) = of_kind("Namespace")
    assert namespace.values["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {m.values["metadata"].get("namespace") for m in MANIFESTS if m is not namespace} == {namespace.name}


@each_manifest
def test_secrets_come_by_reference_and_the_document_makes_them(manifest: Manifest) -> None:
    wanted = []
    for variable in (v for _, container in manifest.containers() for v in container.get("env", [])):
        assert "valueFrom" in variable or not SECRET_NAME.search(variable["name"]), f"{variable['name']} has a value"
        if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
            wanted.append((reference["name"], reference["key"]))
    if cluster := manifest.cluster():
        wanted.append((cluster["authOptions"]["secretName"], "auth_token"))  # the key that KubeRay looks for
    for name, key in wanted:
        command = re.search(rf"create secret generic {name} ((?:.*\\\n)*.*)", DOCUMENT)
        assert command and f"--from-literal={key}=" in command[1], f"docs/operations.md makes no {key} in Secret {name}"


def test_ray_and_mlflow_have_keys_of_their_own() -> None:
    """The prefixes of bucket.json and mlflow-bucket.json are apart; one Secret for both would join them."""
    takers: dict[str, set[str]] = {}
    for container in (container for manifest in MANIFESTS for _, container in manifest.containers()):
        for source in container.get("envFrom", []):
            assert source["secretRef"]["optional"] is True
            takers.setdefault(source["secretRef"]["name"], set()).add(container["name"])
    assert takers == {"pd-core-s3": {"ray-head", "ray-worker"}, "pd-core-mlflow-s3": {"mlflow"}}
    assert all(f"`{name}`" in DOCUMENT or f"generic {name}`" in DOCUMENT for name in takers)


@each_manifest
def test_accounts_and_configuration_exist(manifest: Manifest) -> None:
    (cluster,) = of_kind("RayCluster")
    there = {kind: {m.name for m in of_kind(kind)} for kind in ("ServiceAccount", "ConfigMap", "Service")}
    there["Service"].add(f"{cluster.name}-head-svc")  # files.named so by KubeRay
    for pod in (template["spec"] for template in manifest.pods()):
        assert pod.get("serviceAccountName") in {None, *there["ServiceAccount"]}
        assert {v["configMap"]["name"] for v in pod.get("volumes", []) if "configMap" in v} <= there["ConfigMap"]
    assert set(re.findall(r"([\w-]+)\.pd-core\.svc", json.dumps(manifest.values))) <= there["Service"]
    selector = manifest.values.get("spec", {}).get("clusterSelector")
    assert selector in (None, {"ray.io/cluster": cluster.name})


# ---- the Ray cluster -------------------------------------------------------------------------------------------------


@each_cluster
def test_groups_scale_from_zero_and_cpu_and_gpu_are_apart(cluster: dict[str, Any]) -> None:
    assert cluster["rayVersion"] == files.CONSTRAINTS["ray"]
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    gpus = []
    for group in cluster["workerGroupSpecs"]:
        assert (group["minReplicas"], group["replicas"]) == (0, 0) and group["maxReplicas"] > 0
        pod = group["template"]["spec"]
        assert pod["nodeSelector"] and pod["tolerations"], "spot"
        assert pod["restartPolicy"] == "Never"  # autoscaler v2 asks for it
        resources = pod["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        gpus.append(int(resources["limits"].get("nvidia.com/gpu", 0)))
        assert pod["containers"][0]["image"].endswith("-gpu" if gpus[-1] else "-cpu")
    assert sorted(map(bool, gpus)) == [False, True]


@each_cluster
def test_what_is_spilled_does_not_fill_the_node(cluster: dict[str, Any]) -> None:
    """A pod that fills its node's disk is evicted: temporary files lie on a volume with a size, the rest is asked."""
    head, *workers = (g["template"]["spec"] for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))
    for pod in (head, *workers):
        assert "ephemeral-storage" in pod["containers"][0]["resources"]["requests"]
    for pod in workers:  # to the head KubeRay gives an emptyDir there, beside the autoscaler's
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert Path("/tmp/ray").is_relative_to(mount["mountPath"])
        (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
        claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
        assert re.fullmatch(r"\d+Gi", claim["resources"]["requests"]["storage"])
        assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]  # may write to it


def admits(pod: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether the scheduler may put a pod onto a node with these labels; NotIn holds for a label that is absent."""
    affinity = pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    terms = affinity["nodeSelectorTerms"] if affinity else [{"matchExpressions": []}]  # one of them, all of it
    assert all(t.keys() == {"matchExpressions"} for t in terms)
    assert {e["operator"] for t in terms for e in t["matchExpressions"]} <= {"NotIn"}
    return pod.get("nodeSelector", {}).items() <= labels.items() and any(
        all(labels.get(e["key"]) not in e["values"] for e in term["matchExpressions"]) for term in terms
    )


def test_only_workers_run_on_spot_nodes() -> None:
    nodes = [
        {"karpenter.sh/capacity-type": "spot"},
        {"eks.amazonaws.com/capacityType": "SPOT"},
        {"cloud.google.com/gke-spot": "true"},
        {},
        {"karpenter.sh/capacity-type": "on-demand"},
        {"eks.amazonaws.com/capacityType": "ON_DEMAND"},
    ]
    pods = [(pod, container["name"]) for m in MANIFESTS for pod, container in m.containers()]
    found = {name: [admits(pod, node) for node in nodes] for pod, name in pods if name != "autoscaler"}
    assert found.pop("ray-worker") == [True] + [False] * 5  # as the files stand: onto Karpenter's spot nodes alone
    assert found == dict.fromkeys(("ray-head", "mlflow", "postgres", "submit"), [False] * 3 + [True] * 3)


def test_nights_do_not_overlap_and_only_one_schedule_is_on() -> None:
    (cron,), (alpha,) = of_kind("CronJob"), of_kind("RayCronJob")
    assert cron.values["spec"]["concurrencyPolicy"] == "Forbid"
    assert cron.values["spec"]["jobTemplate"]["spec"]["backoffLimit"] == 0
    assert alpha.values["spec"]["suspend"] is True


def test_botocore_reads_the_region_that_the_files_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import botocore.session

    found = []
    for path in [*files.YAML_FILES, ROOT / "docs" / "operations.md"]:
        text = re.sub(r"\$\{\w+:-(\S+)\}", r"\1", path.read_text())  # compose: where the shell has none
        found += re.findall(r"\b(AWS_\w*REGION)(?:, value: |: |=)([\w-]+)", text)
    assert len(found) == 7
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name, value in set(found):
        for known in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(known, raising=False)
        monkeypatch.setenv(name, value)
        for service in ("s3", "ec2"):
            made = botocore.session.Session().create_client(service, aws_access_key_id="x", aws_secret_access_key="x")
            assert made.meta.region_name == value, name


def test_a_job_that_is_stopped_has_time_to_give_its_lock_back() -> None:
    """By a variable of the head that Ray reads; its default is shorter than a store that is slow."""
    import inspect

    from ray.dashboard.modules.job import job_supervisor

    name = "RAY_JOB_STOP_WAIT_TIME_S"
    assert f'"{name}"' in inspect.getsource(job_supervisor)
    for path in files.LAUNCHERS:
        assert f"--env={name}=60" in load(path)[0]["docker"]["run_options"]
    for cluster in CLUSTERS:
        (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        assert {"name": name, "value": "60"} in head["env"]


# ---- what Ray is given to run ----------------------------------------------------------------------------------------


def entrypoints() -> Iterator[tuple[Manifest, list[str]]]:
    for manifest in of_kind("RayJob", "RayCronJob"):
        spec = manifest.values["spec"]
        yield manifest, shlex.split(spec.get("jobTemplate", spec)["entrypoint"])
    for manifest in of_kind("CronJob"):
        for _, container in manifest.containers():
            command = [*container["command"], *container["args"]]
            assert command[:3] == ["ray", "job", "submit"]
            yield manifest, command[command.index("--") + 1 :]


ENTRYPOINTS = list(entrypoints())


def workflow_of(command: list[str]) -> str:
    if command[:2] == ["sh", "/opt/pd_core/infra/container/scheduled.sh"]:
        return "curate"
    assert command[0] == "python" and command[1].startswith("/opt/pd_core/workflows/")
    return Path(command[1]).stem


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of the ConfigMaps, by the paths that the pods see them at."""
    folder = tmp_path_factory.mktemp("mounted")
    contents = {name: text for m in of_kind("ConfigMap") for name, text in m.values["data"].items()}
    for name, text in contents.items():
        (folder / name).write_text(text)
    return {f"/etc/pd_core/{name}": str(folder / name) for name in contents}


@pytest.mark.parametrize(
    ("manifest", "command"), ENTRYPOINTS, ids=[f"{m.kind}-{m.name}{i}" for i, (m, _) in enumerate(ENTRYPOINTS)]
)
def test_jobs_are_understood_may_do_what_they_do_and_ask_for_gpus(
    manifest: Manifest, command: list[str], mounted: dict[str, str]
) -> None:
    workflow = workflow_of(command)
    kind: type[WorkflowSettings] = cli.COMMANDS[workflow.replace("_", "-")].settings
    settings = settings_load.load(kind, [mounted.get(word, word) for word in command[2:]], prog=workflow)
    assert str(settings.output).startswith(BUCKET), "a local output would go with the pod"
    values = settings.model_dump(exclude={"tracking"})
    for name, uri in leaves(values):
        if isinstance(uri, str) and "://" in uri:
            assert allowed("s3:GetObject", uri), f"{name}: infra/policies/bucket.json lets nobody read {uri}"
    assert allowed("s3:PutObject", f"{settings.output}/x") and allowed("s3:DeleteObject", f"{settings.output}/x")
    # the GPU group is empty at the start: a stage that asks for none would run on CPUs for ever
    asked = [value for name, value in leaves(values) if name in ("actor_gpus", "worker_gpus")]
    assert asked == [1] * {"curate": 3, "tradeoff": 2}.get(workflow, 1)


def test_there_is_a_job_for_every_workflow() -> None:
    run = {workflow_of(command) for manifest, command in ENTRYPOINTS if manifest.kind == "RayJob"}
    assert run == {path.stem for path in (ROOT / "workflows").glob("*.py")}


def test_environment_variables_of_ours_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {name for path in files.FILES for name in re.findall(r"\bPD_CORE_[A-Z0-9_]+", path.read_text())}:
        monkeypatch.setenv(name, "1")
    settings_load.load(BuildIndexSettings, [], prog="test")  # refuses unknown ones
