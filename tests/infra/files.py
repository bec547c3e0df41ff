"""The files of infra/ by their kinds, and the Kubernetes objects in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
DOCUMENT = (ROOT / "docs" / "operations.md").read_text()
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, as for kubectl; PyYAML keeps the last one silently."""

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
MONITORING = [path for path in FILES if path.is_relative_to(INFRA / "monitoring")]  # has tests of its own
YAML_FILES = [path for path in FILES if path.suffix in (".yaml", ".yml")]
COMPOSE = [path for path in YAML_FILES if path.name == "compose.yaml"]
LAUNCHERS = [path for path in YAML_FILES if path.parent.name == "launcher"]
IMAGES = [path for path in FILES if path.name == "Dockerfile"]
POLICIES = [path for path in FILES if path.parent.name == "policies"]
TRUST = [path for path in FILES if path.parent.name == "trust"]
SCRIPTS = [path for path in FILES if path.suffix == ".sh"]
PROGRAMS = [path for path in FILES if path.suffix == ".py"]
PINS = [path for path in FILES if path.suffix == ".txt"]
KINDS = (COMPOSE, LAUNCHERS, IMAGES, POLICIES, TRUST, SCRIPTS, PROGRAMS, PINS, MONITORING)


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=[named(path) for path in paths])


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(nearest name, value) of all that lies inside of mappings and lists."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, key)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner, name)
    else:
        yield name, value


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
        return self.values["apiVersion"].startswith("ray.io/")

    def cluster(self) -> dict[str, Any] | None:
        """The Ray cluster that an object of KubeRay describes, if it does."""
        if not self.kuberay:
            return None
        spec = self.values["spec"].get("jobTemplate", self.values["spec"])
        return spec if self.kind == "RayCluster" else spec.get("rayClusterSpec")

    def pods(self) -> Iterator[dict[str, Any]]:
        """Every pod template, KubeRay's sidecar of the autoscaler as a container of a pod of its own."""
        spec = self.values.get("spec", {})
        if cluster := self.cluster():
            head, options = cluster["headGroupSpec"], cluster.get("autoscalerOptions", {})
            for group in (head, *cluster.get("workerGroupSpecs", [])):
                yield group["template"]
            keys = ("env", "envFrom", "image", "resources", "securityContext", "volumeMounts")
            container = {"name": "autoscaler", **{key: options[key] for key in keys if key in options}}
            context = head["template"]["spec"].get("securityContext", {})
            yield {"spec": {"containers": [container], "securityContext": context}}
        elif self.kind == "CronJob":
            yield spec["jobTemplate"]["spec"]["template"]
        elif "template" in spec and not self.kuberay:
            yield spec["template"]

    def containers(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(pod spec, container) of every container."""
        for pod in (template["spec"] for template in self.pods()):
            for container in [*pod.get("initContainers", []), *pod["containers"]]:
                yield pod, container


MANIFESTS = [
    Manifest(path, document)
    for path in YAML_FILES
    if path not in MONITORING
    for document in load(path)
    if isinstance(document, dict) and {"apiVersion", "kind"} <= document.keys()
]


def of_kind(*kinds: str) -> list[Manifest]:
    return [manifest for manifest in MANIFESTS if manifest.kind in kinds]


CLUSTERS = [cluster for manifest in MANIFESTS if (cluster := manifest.cluster())]


def planted(kind: str, path: str, value: Any) -> Manifest:
    """A copy of the first object of this kind, with a value set at a dotted path."""
    original = of_kind(kind)[0]
    values = json.loads(json.dumps(original.values))
    *parents, last = path.split(".")
    place: Any = values
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return Manifest(original.path, values)


def texts(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
