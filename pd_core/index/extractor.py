"""The frozen feature extractor F: what it is made of, and images through it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pd_core.core import arithmetic, artifacts, trust
from pd_core.core.errors import UserError, one_line, printable
from pd_core.core.settings.index import FeatureSettings
from pd_core.engine import tasks
from pd_core.images.resize import Preprocess
from pd_core.index import backbones

if TYPE_CHECKING:
    import torch

MODEL = re.compile(r"(hf[-_]hub:[\w-][\w.-]*/)?[\w.-]+(@[\w.-]+)?")  # a name of timm's registry, or of its hub
MAX_INPUT_PX = 4096  # of a recorded extractor


# ---- the extractor ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ExtractorSpec:
    """What decides a feature: the fingerprint of F (docs/method.md, section 1).

    Attributes:
        model: name, as `backbones.load` knows it.
        checkpoint: URI of the weights, or None for timm's hub. Where it lies does not decide a feature, its hash does.
        weights_sha256: hash of every tensor of the backbone, by name.
        feature_dim: D.
        preprocess: from RGB image to model input.
        precision: fp32, bf16 or fp16.
        library: package that defines the model, with its version; other versions give other features.
    """

    model: str
    checkpoint: str | None
    weights_sha256: str
    feature_dim: trust.Small
    preprocess: Preprocess
    precision: Literal["fp32", "bf16", "fp16"]
    library: str

    def identity(self) -> dict[str, Any]:
        """JSON-able, without the place the weights came from."""
        values = asdict(self)
        del values["checkpoint"]
        return json.loads(artifacts.canonical(values))

    def to_json(self) -> dict[str, Any]:
        """JSON-able, all of it."""
        return {**self.identity(), "checkpoint": self.checkpoint}

    @classmethod
    def from_json(cls, values: object, where: str) -> ExtractorSpec:
        """Inverse of `to_json`.

        Args:
            values: as they were read.
            where: URI of the record, for messages.

        Raises:
            UserError: they are not of an extractor, or of one that reads its configuration from anywhere.
        """
        spec = trust.checked(cls, values, where)
        if not MODEL.fullmatch(spec.model):
            raise UserError(
                f"{where}: names the model {printable(spec.model)[:80]!r}, which is no model of timm or its hub"
            )
        if max(spec.preprocess.height, spec.preprocess.width) > MAX_INPUT_PX:
            raise UserError(
                f"{where}: its images have more than {MAX_INPUT_PX} px a side; it is damaged, make it again"
            )
        return spec


class Extractor:
    """F on one device: uint8 images to float32 features.

    Args:
        spec: what to load; the loaded weights must have its hash.
        device: `cpu`, `cuda`, `cuda:1`.
        threads: of the CPU arithmetic; Ray workers start with one.

    Raises:
        UserError: unknown model, or weights or a library other than those of the spec.
    """

    def __init__(self, spec: ExtractorSpec, device: str = "cpu", threads: int = 1) -> None:
        import torch

        library = backbones.library(spec.model)
        if library != spec.library:
            raise UserError(
                f"{library} is installed, the features were made with {spec.library}, and they move with the version; "
                f"pip install {spec.library.replace(' ', '==')} or make them again with build_index.py"
            )
        model = backbones.load(spec.model, spec.checkpoint)
        found = backbones.weights_hash(model)
        if found != spec.weights_sha256:
            raise UserError(
                f"{spec.checkpoint or spec.model}: weights {found[:12]} are not those of the run "
                f"({spec.weights_sha256[:12]}); make the same file visible on every node"
            )
        self.spec = spec
        self.device = torch.device(device)
        _set_arithmetic(threads, device)
        self.model = model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        shape = (1, 3, 1, 1)
        self.mean = torch.tensor(spec.preprocess.mean, device=self.device).view(shape)
        self.std = torch.tensor(spec.preprocess.std, device=self.device).view(shape)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 or float [b, 3, H, W] in 0..255 to the model's input range; differentiable."""
        return (pixels.float() / 255 - self.mean) / self.std

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalised float [b, 3, H, W] to float32 features [b, D]; differentiable."""
        import torch

        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.spec.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(inputs.contiguous(memory_format=torch.channels_last)).float()

    def extract(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [b, H, W, 3] to float32 [b, D]."""
        import torch

        with torch.inference_mode():
            batch = torch.from_numpy(pixels).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            return self.forward(self.normalize(batch)).cpu().numpy()

    def extract_some(self, pixels: np.ndarray, batch_size: int) -> np.ndarray:
        """`extract` of at most `batch_size` images: the model always sees that many.

        The kernels that a library picks depend on how many there are, and with them the last bits. So an image has the
        same feature beside whatever others, in a last batch too.
        """
        found = len(pixels)
        padded = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
        padded[:found] = pixels
        with np.errstate(all="ignore"):
            return self.extract(padded)[:found]


def _set_arithmetic(threads: int, device: str) -> None:
    """Set torch to what decides the last bits of a feature: of this process, until it is set otherwise."""
    import torch

    torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":  # fp32 means fp32, and the same bits every time
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


@contextmanager
def as_in_the_stage(threads: int, device: str) -> Iterator[None]:
    """Inside, torch computes as in the stage, whatever it is set to; afterwards it is set as before."""
    import torch

    with arithmetic.kept():
        torch.set_float32_matmul_precision("highest")  # it may be less where users train
        _set_arithmetic(threads, device)
        yield


def describe(settings: FeatureSettings) -> ExtractorSpec:
    """Load the model once to learn its weights' hash, its feature dimension and its preprocessing.

    Raises:
        UserError: as `backbones.load`.
    """
    model = backbones.load(settings.model, settings.checkpoint)
    preprocess = backbones.preprocess_of(model, settings)
    return ExtractorSpec(
        model=settings.model,
        checkpoint=settings.checkpoint,
        weights_sha256=backbones.weights_hash(model),
        feature_dim=_feature_dim(model, settings.model, preprocess),
        preprocess=preprocess,
        precision=settings.precision,
        library=backbones.library(settings.model),
    )


def describe_remotely(settings: FeatureSettings) -> Any:
    """Reference to the ExtractorSpec: the driver itself never loads a model."""
    return tasks.task(describe).remote(settings)


def _feature_dim(model: torch.nn.Module, name: str, preprocess: Preprocess) -> int:
    import torch

    try:
        with torch.inference_mode():
            output = model(torch.zeros(1, 3, preprocess.height, preprocess.width))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"--features.model {name}: does not take {preprocess.height}x{preprocess.width} px images "
            f"({one_line(error)}); choose another --features.image_size or --features.preprocess"
        ) from None
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        raise UserError(f"--features.model {name}: gives no pooled feature vector; choose a classification backbone")
    return int(output.shape[1])
