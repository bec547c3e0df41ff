"""infra/launcher: files of Ray's cluster launcher, held to Ray's own validation and to the clouds' own descriptions."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest

from tests.infra.files import CONSTRAINTS, DOCUMENT, INFRA, LAUNCHERS, each, load


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
    workers = dict(values["available_node_types"])
    assert workers.pop(values["head_node_type"])["resources"] == {"CPU": 0}
    assert sorted(bool(one["resources"].get("GPU")) for one in workers.values()) == [False, True]
    for one in workers.values():
        assert one["min_workers"] == 0 and one["max_workers"] > 0
        assert "spot" in json.dumps(one["node_config"]).lower()
        assert ("docker" in one) == bool(one["resources"].get("GPU"))
    assert "--env=RAY_AUTH_MODE=token" in values["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in values["file_mounts"]  # where Ray looks for it, as the image's user
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


def test_aws_accepts_the_nodes_and_they_name_their_image() -> None:
    """By botocore's description of RunInstances; Ray's default image is too old for the CUDA of the pinned torch."""
    import botocore.session
    from botocore.validate import ParamValidator

    service = botocore.session.Session().get_service_model("ec2", "2016-11-15")
    shape = service.operation_model("RunInstances").input_shape
    (values,) = load(INFRA / "launcher" / "aws.yaml")
    for one in values["available_node_types"].values():
        node = {**one["node_config"], "MinCount": 1, "MaxCount": 1}
        node["SubnetId"] = node.pop("SubnetIds")[0]  # Ray takes one after the other
        assert ParamValidator().validate(node, shape).generate_report() == ""
        faulty = {**node, "IamInstanceProfil": {}}
        assert "IamInstanceProfil" in ParamValidator().validate(faulty, shape).generate_report()
        assert re.fullmatch(r"ami-[0-9a-f]{17}", node["ImageId"])
        (disk,) = node["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 256  # the image of the instance and both of ours
    assert values["available_node_types"]["cpu"]["node_config"]["IamInstanceProfile"].keys() == {"Name"}
    assert CONSTRAINTS["cuda-toolkit"].startswith("13."), "the comment on the driver is for CUDA 13"


@pytest.mark.parametrize("fails", [None, "pd-core-s3-key-id", "pd-core-s3-secret"])
def test_an_instance_on_google_cloud_without_its_key_does_not_start(tmp_path: Path, fails: str | None) -> None:
    (values,) = load(INFRA / "launcher" / "gcp.yaml")
    (command,) = [line for line in values["initialization_commands"] if "gcloud" in line]
    (file,) = [o.partition("=")[2] for o in values["docker"]["run_options"] if o.startswith("--env-file=")]
    assert command.count(file) == 1
    gcloud, written = tmp_path / "gcloud", tmp_path / "env"
    gcloud.write_text(f'#!/bin/sh\ncase "$*" in *--secret={fails}) exit 1;; esac\nprintf %s "value of $5"\n')
    gcloud.chmod(0o755)
    ran = subprocess.run(  # as Ray does: in parentheses, at the end of what it puts before
        ["bash", "-c", f"true; export A=1 && ({command.replace(file, str(written))})"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=False,
    )
    assert (ran.returncode == 0) == written.exists() == (fails is None)
    if fails is None:
        lines = dict(line.split("=", 1) for line in written.read_text().splitlines())
        assert lines.pop("AWS_ENDPOINT_URL").startswith("https://")
        assert lines == {
            "AWS_ACCESS_KEY_ID": "value of --secret=pd-core-s3-key-id",
            "AWS_SECRET_ACCESS_KEY": "value of --secret=pd-core-s3-secret",
        }
        assert written.stat().st_mode & 0o077 == 0


def test_the_account_that_ray_makes_on_google_cloud_is_named() -> None:
    package = find_spec("ray")
    assert package is not None and package.origin is not None
    source = (Path(package.origin).parent / "autoscaler/_private/gcp/config.py").read_text()
    (roles,) = re.findall(r"^DEFAULT_SERVICE_ACCOUNT_ROLES = \[(.*?)\]", source, re.DOTALL | re.MULTILINE)
    (version,) = re.findall(r'^VERSION = "(\w+)"', source, re.MULTILINE)
    assert 'DEFAULT_SERVICE_ACCOUNT_ID = RAY + "-sa-" + VERSION' in source
    file = INFRA / "launcher" / "gcp.yaml"
    for name in (f"ray-autoscaler-sa-{version}", *re.findall(r'"(roles/[\w.]+)"', roles)):
        assert name in file.read_text(), name
    assert f"ray-autoscaler-sa-{version}" in DOCUMENT
    for one in load(file)[0]["available_node_types"].values():
        assert one["node_config"]["serviceAccounts"][0]["email"].startswith("pd-core-")
