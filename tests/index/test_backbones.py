"""The Inception of FID against torch-fidelity; timm's models are held to timm in test_ground and test_workflow."""

import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from pd_core.core.errors import UserError
from pd_core.core.settings.data import INCEPTION
from pd_core.core.settings.index import FeatureSettings
from pd_core.evaluate.report import metric_names
from pd_core.index import backbones, extractor
from tests import tiny


class Unloaded(FeatureExtractorInceptionV3):
    """With the weights it is born with: the published ones cannot be had where the tests run."""

    def load_state_dict(self, state):
        assert state == {}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "empty.pth"
    torch.save({}, file)
    torch.manual_seed(0)
    model = Unloaded(INCEPTION, ["2048"], str(file))
    for module in model.modules():  # so that images give features apart, and no layer passes for the next
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.get_buffer("running_mean"), 0, 0.1)
            torch.nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
    return model


@pytest.fixture
def weights(theirs, tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), file)
    monkeypatch.setattr(backbones, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    return file


def test_inception_gives_torch_fidelitys_features(theirs, weights):
    spec = extractor.describe(FeatureSettings(model=INCEPTION, checkpoint=str(weights)))
    assert (spec.feature_dim, spec.preprocess.height, spec.preprocess.width) == (2048, 299, 299)
    assert spec.library.startswith("torch-fidelity ")
    pixels = np.random.default_rng(1).integers(0, 256, (3, 299, 299, 3), np.uint8)
    pixels[1] //= 2  # images that differ in more than noise
    pixels[2, :150] = 255
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2))[0].numpy()
    assert np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(extractor.Extractor(spec).extract(pixels), expected, rtol=1e-4, atol=1e-5)


def test_gradients_go_through_inception(weights):
    model = backbones.load(INCEPTION, str(weights))
    inputs = torch.rand(1, 3, 299, 299, requires_grad=True)
    model(inputs).square().sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0


def test_only_the_published_weights_make_an_fid(weights, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=r"weights\.pth: not the weights that an FID is computed with; give .*6726825d\.pth"
    ):
        backbones.load(INCEPTION, str(weights))


def test_a_file_that_holds_code_is_refused_before_it_runs(tmp_path, monkeypatch):
    file = tmp_path / "code.pth"
    torch.save(Unloaded, file)
    monkeypatch.setattr(backbones, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    with pytest.raises(UserError, match="not a file of weights only"):
        backbones.load(INCEPTION, str(file))


def write_pipe(path: Path) -> None:
    os.mkfifo(path)


def write_vast(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)  # takes no room on the disk


def write_packed(path: Path) -> None:
    """64 MB of zeros in 65 kB."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(1 << 24)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    path.write_bytes(packed.getvalue())


def write_nested(path: Path) -> None:
    path.write_bytes(pickle.dumps([], 2)[:-1] + b"0" + b"(" * 100_000)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (write_pipe, "is no regular file, but a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file, but a pipe, a socket or a device"),
        (write_vast, r"has 1,099,511,627,776 bytes, more than the [\d,]+ that"),
        (write_packed, "is compressed"),
        (write_nested, "not a file of weights only"),
        (Path.mkdir, "Is a directory"),
    ],
    ids=["pipe", "device", "vast", "packed", "nested", "directory"],
)
@pytest.mark.parametrize("model", [tiny.MODEL, INCEPTION])
def test_a_checkpoint_without_an_end_is_refused_unread(tmp_path, monkeypatch, model, write, expected):
    file = tmp_path / "weights.pth"
    write(file)
    if file.is_file() and file.stat().st_size < 1 << 20:
        monkeypatch.setattr(backbones, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    with pytest.raises(UserError, match=rf"^--features.checkpoint {file}: .*{expected}"):
        backbones.load(model, str(file))


def test_a_checkpoint_of_any_bytes_is_weights_or_one_line(tmp_path):
    whole = io.BytesIO()
    torch.save({"weight": torch.zeros(4)}, whole)
    rng, file = np.random.default_rng(0), tmp_path / "weights.pth"
    for content in (whole.getvalue(), pickle.dumps({"a": 1}, 2)):
        for _ in range(100):
            harmed = bytearray(content)
            for place in rng.integers(len(harmed), size=3):
                harmed[place] = rng.integers(256)
            file.write_bytes(harmed)
            with pytest.raises(UserError, match=r"^--features.checkpoint [^\n]*$"):
                backbones.load(tiny.MODEL, str(file))


def test_a_download_of_other_content_is_refused_and_kept_nowhere(weights, tmp_path, monkeypatch):
    """From a URL of our own, into a cache of our own."""
    monkeypatch.undo()
    monkeypatch.setattr(backbones, "INCEPTION_URL", weights.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cannot load its weights from the hub .*invalid hash"):
        backbones.load(INCEPTION, None)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    monkeypatch.setattr(backbones, "INCEPTION_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    assert backbones.load(INCEPTION, None)(torch.zeros(1, 3, 299, 299)).shape == (1, 2048)


@pytest.mark.parametrize("more", [{"image_size": 64}, {"preprocess": "paper"}, {"precision": "bf16"}])
def test_inception_in_another_form_is_no_fid(more):
    with pytest.raises(ValueError, match="299 px in fp32, as FID has it"):
        FeatureSettings(model=INCEPTION, **more)


def test_only_inception_names_an_fid():
    assert metric_names(INCEPTION)["frechet_distance"] == "FID"
    assert metric_names("tf_efficientnet_lite2")["frechet_distance"] == "Fréchet distance"
