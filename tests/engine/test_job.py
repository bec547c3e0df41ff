"""`ray job submit` against `ray start --head`, with the workflow's own defaults of a job: nothing installed by hand."""

import re

import pytest

from tests import tiny, toy_generator
from tests.ray_head import running_head

# a head with a dashboard takes 10 s, a job 15 s more, on top of the workflow
pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with running_head(tmp_path_factory.mktemp("head"), "--num-cpus=4") as head:
        yield head


def test_jobs_run_the_workflows(head, tmp_path):
    images, checkpoint = tiny.write_images(tmp_path / "images"), tiny.write_checkpoint(tmp_path / "tiny.safetensors")
    done = head.submit("build_index.py", *tiny.arguments(images, checkpoint, tmp_path / "out", "--no-tracking.enabled"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "run.json").exists()
    assert re.search(r"ray: 4 CPUs and 0 GPUs at ", done.stdout)

    argv = toy_generator.sampling(index=tmp_path / "out", output=tmp_path / "samples")
    done = head.submit("generate.py", *argv, "--no-tracking.enabled")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"report: {tmp_path / 'samples'}/report/index.html" in done.stdout


def test_a_job_with_bad_input_fails_with_the_line(head, tmp_path):
    done = head.submit("build_index.py", "--data.source=/nowhere/at/all", f"--output={tmp_path / 'out'}")
    assert done.returncode != 0
    assert "error: /nowhere/at/all: no such file or directory" in done.stdout + done.stderr


def test_a_job_without_settings_runs_the_demo_and_says_so(head):
    done = head.submit("build_index.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no settings given: using workflows/configs/default.yaml" in done.stdout
    assert "making the demo images in runs/demo-data" in done.stdout
    assert re.search(r"ray: /\S+/runs/digits is in the job's temporary copy .* give --output", done.stdout)
    assert re.search(r"report: (/\S+/runs/digits/report/index.html)", done.stdout)
