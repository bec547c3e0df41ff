"""NVIDIA's StyleGAN2-ADA and StyleGAN3 network pickles: G_ema, run with reference operations, so without compiling
anything.

The pickles hold the source of their networks and import `torch_utils` and `dnnlib` from NVIDIA's code, which its
licence keeps out of this package; the user names a directory that holds it. Latents are ours (a CPU generator per
seed), so a seed's image is another than that of NVIDIA's scripts, which draw with numpy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pd_core.core import artifacts, files
from pd_core.core.errors import UserError, one_line
from pd_core.generators.noise import normal_latents
from pd_core.generators.pairs import Pair, Weights, check_trainable, frozen, image_shape, weights_hash
from pd_core.generators.protocol import Conditions, check_conditions, files_hash, generate_decoded, read_file

if TYPE_CHECKING:
    import torch

    from pd_core.core.settings.generate import GeneratorSettings

CODE = ("torch_utils", "dnnlib")
PRECISIONS = "StyleGAN runs in fp32, or on a GPU in fp16, its own mixed precision; set one of them"
COMPILED = ("bias_act", "upfirdn2d", "filtered_lrelu")


def open_pickle(settings: GeneratorSettings, device: str = "cpu") -> StyleGAN:
    """G_ema of a network pickle, on a device.

    Its code stays on `sys.path` for as long as the process lives: networks import from it when they are copied or
    pickled again.

    Args:
        settings: `path` of the pickle, local or s3://; `code`, the directory of stylegan2-ada-pytorch or stylegan3.
        device: "cpu", "cuda", "cuda:1".

    Raises:
        UserError: no permission to load a pickle, code or pickle missing, not a network pickle, bf16.
    """
    pickled = _unpickled(settings)
    network = pickled.network("G_ema").eval().requires_grad_(False).to(device)
    return StyleGAN(network, settings, device, pickled.file_hash, pickled.code_hash)


def open_pair(settings: GeneratorSettings, device: str = "cpu") -> Pair:
    """G and D of a network pickle; the moving average starts from its G_ema.

    D is called as NVIDIA's training does, with images float32 [B, C, H, W] in [-1, 1] and one-hot classes. The
    truncation of the settings is for sampling; noise inputs are theirs, in training too, so that an image is a function
    of its latent.

    Args:
        settings: as for `open_pickle`.
        device: "cpu", "cuda", "cuda:1".

    Raises:
        UserError: what `open_pickle` refuses, fp16, or a pickle without G or D.
    """
    if settings.precision != "fp32":
        raise UserError(f"--generator.precision {settings.precision}: a StyleGAN is fine-tuned in fp32; leave it out")
    pickled = _unpickled(settings)
    generator, critic = (pickled.network(name).float().requires_grad_(True).to(device) for name in ("G", "D"))
    check_trainable(generator, f"{pickled.where}, G")
    check_trainable(critic, f"{pickled.where}, D")
    average = {name: tensor.float().to(device) for name, tensor in pickled.network("G_ema").state_dict().items()}
    if average.keys() != generator.state_dict().keys():
        raise UserError(f"{pickled.where}: G and G_ema are other networks; name a pickle whose G_ema is of its G")
    untruncated = settings.model_copy(update={"truncation": 1.0})
    live = StyleGAN(generator.eval(), untruncated, device, pickled.file_hash, pickled.code_hash)
    colors, size = image_shape(live)
    return Pair(
        generator=generator,
        discriminator=critic,
        live=live,
        judge=partial(_judged, critic, live.num_classes),
        averaged_start=average,
        colors=colors,
        size=size,
        sampler=partial(_sampler, generator, settings, device, pickled.code_hash),
        save=partial(_save, pickled.content, generator, critic),
        name=f"{pickled.where}, D",
    )


def _judged(critic: Any, num_classes: int, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    return critic(images, _one_hot(labels, num_classes, len(images), images.device), force_fp32=True)


def _sampler(generator: Any, settings: GeneratorSettings, device: str, code_hash: str, weights: Weights) -> StyleGAN:
    return StyleGAN(frozen(generator, weights), settings, device, weights_hash(weights), code_hash)


def _save(content: Mapping[str, Any], generator: Any, critic: Any, folder: str, weights: Weights) -> None:
    """network.pkl: what the original held, with other networks."""
    networks = {"G": frozen(generator), "D": frozen(critic), "G_ema": frozen(generator, weights)}
    with open(os.path.join(folder, "network.pkl"), "wb") as file:
        pickle.dump({**content, **{name: network.to("cpu") for name, network in networks.items()}}, file)


@dataclass(frozen=True)
class _Pickled:
    """Content of a network pickle, hashes of it and of NVIDIA's code, and its name for messages."""

    content: Mapping[str, Any]
    file_hash: str
    code_hash: str
    where: str

    def network(self, name: str) -> torch.nn.Module:
        import torch

        found = self.content.get(name)
        if not isinstance(found, torch.nn.Module) or (name != "D" and not hasattr(found, "z_dim")):
            raise UserError(
                f"{self.where}: holds no network {name}; name a network-snapshot pickle of StyleGAN2-ADA or StyleGAN3"
            )
        return found


def _unpickled(settings: GeneratorSettings) -> _Pickled:
    """What the pickle of the settings holds, once all of them are checked; NVIDIA's reference operations are set."""
    assert settings.path is not None, "open_generator refuses settings without a path"
    where = f"--generator.path {settings.path}"
    if not settings.allow_pickle:
        raise UserError(
            f"{where}: a pickle, which can run any code it holds when it is loaded; pass --generator.allow-pickle if "
            "you trust it"
        )
    if settings.precision == "bf16":
        raise UserError(f"--generator.precision bf16: {PRECISIONS}")
    code = _import_from(settings.code)
    data = read_file(settings.path)
    content = _content(data, where)
    _use_reference_operations()
    return _Pickled(content, artifacts.sha256(data), files_hash(code, ".py"), where)


def _import_from(code: str | None) -> str:
    """Put NVIDIA's code on sys.path; its absolute path."""
    if code is None:
        raise UserError(
            "--generator.code: not set; StyleGAN pickles need NVIDIA's code, name your copy of stylegan2-ada-pytorch "
            "or stylegan3"
        )
    folder = files.absolute(code)
    missing = [name for name in CODE if not os.path.isdir(os.path.join(folder, name))]
    if missing:
        raise UserError(
            f"--generator.code {code}: has no {' and no '.join(missing)}; name the directory of stylegan2-ada-pytorch "
            "or stylegan3"
        )
    for name in CODE:
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if loaded and not files.is_inside(loaded, folder):
            raise UserError(f"--generator.code {code}: this process has {name} from {loaded} already; use one copy")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return folder


def _content(data: bytes, where: str) -> Mapping[str, Any]:
    try:
        with _version_parser():
            content = pickle.load(io.BytesIO(data))  # noqa: S301 - permitted; NVIDIA has no other form
    except Exception as error:  # bytes of another kind are opcodes at random, which may raise nearly anything
        reason = one_line(error)
        raise UserError(
            f"{where}: cannot be unpickled with this code ({type(error).__name__}: {reason}); use the code it was made "
            "with, and convert TensorFlow's with its legacy.py"
        ) from None
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def _version_parser() -> Iterator[None]:
    """Stand in for `pkg_resources.parse_version`, which StyleGAN3's operations import and setuptools 82 took away."""
    if importlib.util.find_spec("pkg_resources") is not None:
        yield
        return
    from packaging.version import parse

    stand_in: Any = ModuleType("pkg_resources")
    stand_in.parse_version = parse
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]  # others who look for it shall not find this


def _use_reference_operations() -> None:
    """Let NVIDIA's operations take the way they take on a CPU everywhere.

    On a GPU they compile CUDA code at first use: that needs a compiler on every node, fails on many, and StyleGAN2-ADA
    then goes on with other operations after a warning. The reference ones are slower, are there always, and
    differentiate to any order.
    """
    for name in COMPILED:
        module: Any = sys.modules.get(f"torch_utils.ops.{name}")
        if module is not None:
            module._init = lambda: False


class StyleGAN:
    """A StyleGAN generator; a `LatentGenerator`. Latents are z, standard normal."""

    takes_prompts = False

    def __init__(self, network: Any, settings: GeneratorSettings, device: str, file_hash: str, code_hash: str):
        self.num_classes = int(network.c_dim)
        self._network, self._device = network, device
        self._hashes = {"file": file_hash, "code": code_hash}
        self._options = {
            "truncation_psi": settings.truncation,
            "noise_mode": settings.noise,
            "force_fp32": settings.precision == "fp32",
        }

    def identity(self) -> dict[str, Any]:
        """Hash of the pickle and of NVIDIA's code, options of the network, torch's version."""
        return {
            "network": type(self._network).__name__,
            **self._hashes,
            "resolution": int(self._network.img_resolution),
            "options": self._options,
            "versions": {"torch": version("torch")},
        }

    def generate(self, seeds: Sequence[int], conditions: Conditions) -> torch.Tensor:
        """uint8 [B, H, W, 3] on the device; see Generator."""
        return generate_decoded(self, seeds, conditions)

    def latents(self, seeds: Sequence[int]) -> torch.Tensor:
        """Standard normal z, float32 [B, z_dim], on the device."""
        return normal_latents(seeds, (self._network.z_dim,), self._device)

    def decode(self, latents: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """float32 [B, 3, H, W], about [-1, 1], not clamped; differentiable in z, noise inputs held constant.

        Raises:
            UserError: fp16 on a CPU. It is not refused at opening: a driver without a GPU opens generators to describe
                them.
        """
        if not self._options["force_fp32"] and latents.device.type != "cuda":
            raise UserError(f"--generator.precision fp16: this process runs on {latents.device.type}; {PRECISIONS}")
        return self._network(latents, self._classes(len(latents), conditions), **self._options).float()

    def _classes(self, batch: int, conditions: Conditions) -> torch.Tensor:
        import torch

        check_conditions(self, conditions.labels, conditions.prompts)
        labels = None if conditions.labels is None else torch.tensor(conditions.labels, device=self._device)
        return _one_hot(labels, self.num_classes, batch, self._device)


def _one_hot(labels: torch.Tensor | None, num_classes: int, batch: int, device: torch.device | str) -> torch.Tensor:
    """One-hot float32 [B, c_dim]; [B, 0] for an unconditional network."""
    import torch

    if labels is None:
        return torch.zeros(batch, 0, device=device)
    return torch.nn.functional.one_hot(labels, num_classes).float()
