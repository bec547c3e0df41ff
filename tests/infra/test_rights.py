"""infra/policies and infra/mlflow: nobody may do more than is needed, and no file holds a secret."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from pd_core.core import artifacts
from pd_core.curate import releases
from tests.infra.files import DOCUMENT, FILES, INFRA, POLICIES, ROOT, TRUST, each, load, of_kind, texts

BUCKET = "s3://my-bucket/"
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)


# ---- bucket policies -------------------------------------------------------------------------------------------------


def allowed(action: str, uri: str, policy: str = "bucket.json") -> bool:
    """Whether a policy lets its holder do this to an object; what one statement denies, no other allows."""
    arn = uri.replace("s3://", "arn:aws:s3:::")
    effects = set()
    for statement in json.loads((INFRA / "policies" / policy).read_text())["Statement"]:
        # a folder that is read, such as a saved pipeline, is read object by object
        if any(fnmatchcase(action, a) for a in texts(statement["Action"])) and any(
            fnmatchcase(arn, r) or fnmatchcase(f"{arn}/x", r) for r in texts(statement["Resource"])
        ):
            effects.add(statement["Effect"])
    return effects == {"Allow"}


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


EC2 = "arn:aws:ec2:us-east-1:111122223333"


@pytest.mark.parametrize(
    ("action", "resource", "condition"),
    [
        ("s3:ListBucket", "arn:aws:s3:::my-bucket", {}),
        ("s3:GetObject", "arn:aws:s3:::my-bucket/*", {}),
        ("ec2:CreateTags", "*", {}),
        ("ec2:CreateTags", f"{EC2}:instance/*", {}),
        ("ec2:RunInstances", "*", {}),
        ("ec2:RunInstances", f"{EC2}:instance/*", {"StringEquals": {"aws:RequestTag/ray-cluster-name": "pd-core"}}),
        ("ec2:RunInstances", f"{EC2}:subnet/*", {}),
        ("ec2:TerminateInstances", f"{EC2}:instance/*", {}),
        ("iam:PassRole", "arn:aws:iam::111122223333:role/pd-core-worker", {}),
    ],
)
def test_a_policy_that_is_too_wide_is_found(action: str, resource: str, condition: dict[str, Any]) -> None:
    assert policy_problems({"Action": action, "Resource": resource, "Condition": condition}) == [action]


def test_the_bucket_policy_gives_what_is_needed_and_no_more() -> None:
    assert allowed("s3:GetObject", f"{BUCKET}images/a.png") and allowed("s3:PutObject", f"{BUCKET}pd/a")
    for uri in ("images/a.png", "models/a", "mlflow/a", "a"):
        assert not allowed("s3:PutObject", BUCKET + uri) and not allowed("s3:DeleteObject", BUCKET + uri)
    assert not allowed("s3:GetObject", f"{BUCKET}mlflow/a")
    assert not allowed("s3:GetObject", f"{BUCKET}pd/a", "mlflow-bucket.json")
    (shown,) = re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)
    assert json.loads(shown) == json.loads((INFRA / "policies" / "bucket.json").read_text())


def test_of_a_release_no_more_may_be_deleted_than_curate_deletes(tmp_path: Path) -> None:
    """A release as `releasing` lays it out is damaged and mended: what goes meanwhile may go, all else may not."""
    configured = [yaml.safe_load(text) for m in of_kind("ConfigMap") for text in m.values["data"].values()]
    (output,) = {str(settings["output"]) for settings in configured}
    folder = tmp_path / "releases" / "2026-11-29-0123456789ab"
    release = artifacts.Stage(str(folder), "release", 1, {"sets": 1})
    part, *others = ("typical/part-00000000.parquet", releases.METRICS, releases.RECORD, releases.CARD)

    def make() -> tuple[list[artifacts.Part], dict[str, Any]]:
        done = release.finished_parts()
        return [done.get(name) or release.write_part(name, name.encode(), 0) for name in (part, *others)], {}

    def there() -> set[str]:
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}

    release.complete(make, overwrite=False)
    whole = there()
    (folder / part).unlink()
    damaged = there()
    assert release.begin(overwrite=False) is None
    deleted = damaged - there()
    assert deleted
    for name in whole:
        assert allowed("s3:DeleteObject", f"{output}/{name}") == (name in deleted), name
        assert not allowed("s3:DeleteObjectVersion", f"{output}/{name}")
        assert allowed("s3:PutObject", f"{output}/{name}") and allowed("s3:GetObject", f"{output}/{name}")
    for other in (releases.LATEST, "index/20261129T010203Z-0123456789ab/features/part-00000000.parquet", "lock/1.json"):
        assert allowed("s3:DeleteObject", f"{output}/{other}")


# ---- roles -----------------------------------------------------------------------------------------------------------


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


def test_a_role_trusts_the_accounts_that_name_it_and_no_others() -> None:
    made = dict(re.findall(r"^aws iam create-role --role-name (\S+) .*file://(\S+)$", DOCUMENT, re.MULTILINE))
    given = dict(re.findall(r"^aws iam put-role-policy --role-name (\S+) .*file://(\S+)$", DOCUMENT, re.MULTILINE))
    assert {ROOT / path for path in made.values()} == set(TRUST) and made.keys() == given.keys()
    assert {ROOT / path for path in given.values()} < set(POLICIES)
    roles: dict[str, list[str]] = {}
    for account in of_kind("ServiceAccount"):
        metadata = account.values["metadata"]
        if arn := metadata.get("annotations", {}).get("eks.amazonaws.com/role-arn"):
            subject = f"system:serviceaccount:{metadata['namespace']}:{account.name}"
            roles.setdefault(arn.rpartition("role/")[2], []).append(subject)
    for role, trust in made.items():
        (statement,) = json.loads((ROOT / trust).read_text())["Statement"]
        assert statement["Action"] == "sts:AssumeRoleWithWebIdentity"
        issuer = statement["Principal"]["Federated"].removeprefix("arn:aws:iam::111122223333:oidc-provider/")
        trusted = {f"{issuer}:aud": "sts.amazonaws.com", f"{issuer}:sub": sorted(roles[role])}
        assert statement["Condition"] == {"StringEquals": trusted}
    (sentence,) = re.findall(r"two roles, (.*?)\(", DOCUMENT)
    named = {subject.rpartition(":")[2] for subjects in roles.values() for subject in subjects}
    assert set(re.findall(r"`([\w-]+)`", sentence)) == named


# ---- secrets ---------------------------------------------------------------------------------------------------------

SECRETS = {
    "AWS key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "password in a URL": r"://[^\s/:@'\"]+:[^\s/@'\"]+@",
    "Secret with data": r"^kind: Secret$",
    "a value": r"(?i)^[ \t]*[\w-]*(password|secret|token|access_key)[\w-]*[ \t]*[:=][ \t]*"
    r"['\"]?[^\s'\"${}\[\]|>]{8,}['\"]?$",
    "long random text": r"\b(?=[A-Za-z0-9+/]*[0-9])(?=[A-Za-z0-9+/]*[A-Z])(?=[A-Za-z0-9+/]*[a-z])"
    r"[A-Za-z0-9+/]{32,}\b",
}


def secrets_in(text: str) -> list[str]:
    return [f"{what}: {m[0]}" for what, rule in SECRETS.items() for m in re.finditer(rule, text, re.MULTILINE)]


def test_no_file_holds_a_secret() -> None:
    known = ("secretName: pd-core-ray-token",)
    found = [
        (path, secret) for path in [*FILES, ROOT / "docs/operations.md"] for secret in secrets_in(path.read_text())
    ]
    assert [pair for pair in found if not pair[1].endswith(known)] == []


def test_a_planted_secret_is_found() -> None:
    lines = ["aws_access_key_id = AKIAIOSFODNN7EXAMPLE", "  POSTGRES_PASSWORD: correct-horse", "kind: Secret"]
    lines += ["-----BEGIN RSA PRIVATE KEY-----", "auth: wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"]
    lines += ["database_uri = postgresql://mlflow:hunter22@postgres/mlflow"]
    assert [line for line in lines if not secrets_in(f"a: 1\n{line}\n")] == []
