"""The Inception of FID against torch-fidelity itself; timm's models are held to timm in test_ground and test_pipeline."""

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from pd_core import backbones, features
from pd_core.config import INCEPTION, FeatureSettings
from pd_core.errors import UserError
from pd_core.evaluation_page import metric_names


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


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(theirs.state_dict(), file)
    return file


def test_inception_gives_torch_fidelitys_features(theirs, weights):
    spec = features.describe(FeatureSettings(model=INCEPTION, checkpoint=str(weights)))
    assert (spec.feature_dim, spec.preprocess.height, spec.preprocess.width) == (2048, 299, 299)
    assert spec.library.startswith("torch-fidelity ")
    pixels = np.random.default_rng(1).integers(0, 256, (3, 299, 299, 3), np.uint8)
    pixels[1] //= 2  # images that differ in more than noise
    pixels[2, :150] = 255
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2))[0].numpy()
    assert np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(features.Extractor(spec).extract(pixels), expected, rtol=1e-4, atol=1e-5)


def test_gradients_go_through_inception(weights):
    model = backbones.load(INCEPTION, str(weights))
    inputs = torch.rand(1, 3, 299, 299, requires_grad=True)
    model(inputs).square().sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0


def test_weights_of_another_network_are_refused(theirs, tmp_path):
    file = tmp_path / "other.pth"
    torch.save({name: tensor for name, tensor in theirs.state_dict().items() if name != "fc.bias"}, file)
    with pytest.raises(UserError, match=r"other\.pth: not weights of inception-v3-compat .*fc\.bias"):
        backbones.load(INCEPTION, str(file))


def test_weights_that_hold_code_are_refused(tmp_path):
    file = tmp_path / "code.pth"
    torch.save(Unloaded, file)
    with pytest.raises(UserError, match="not a file of weights only"):
        backbones.load(INCEPTION, str(file))


@pytest.mark.parametrize("more", [{"image_size": 64}, {"preprocess": "paper"}])
def test_inception_at_another_size_is_no_fid(more):
    with pytest.raises(ValueError, match="299 px as FID has it"):
        FeatureSettings(model=INCEPTION, **more)


def test_only_inception_names_an_fid():
    assert metric_names(INCEPTION)["frechet_distance"] == "FID"
    assert metric_names("tf_efficientnet_lite2")["frechet_distance"] == "Fréchet distance"
