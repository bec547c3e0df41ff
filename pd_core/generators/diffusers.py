"""Saved diffusers pipelines: unconditional, class-conditional, latent, text-to-image, consistency models.

Pipelines that are a U-Net or a DiT with a scheduler run in our own loop (denoising.py); all others are called as they
are, with one CPU random generator per sample.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pd_core.core import files as core_files
from pd_core.core import trust
from pd_core.core.errors import UserError, one_line
from pd_core.generators.denoising import (
    DeterministicDiffusion,
    Diffusion,
    Network,
    dit_network,
    draws_noise,
    encoded,
    unet_network,
)
from pd_core.generators.noise import generators_of
from pd_core.generators.protocol import Conditions, Generator, check_conditions, files_hash, to_uint8

if TYPE_CHECKING:
    import torch

    from pd_core.core.settings.generate import GeneratorSettings

DISTILLED = ("ConsistencyModelPipeline",)
UNET_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline", "ConsistencyModelPipeline")
PARAMETERS = {  # setting -> parameter of a pipeline's __call__
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "eta": "eta",
    "height": "height",
    "width": "width",
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = (
    "1"  # read when it is imported; code of a pipeline's own is never run here
)


def open_pipeline(settings: GeneratorSettings, device: str = "cpu") -> Generator:
    """A saved pipeline as a generator, on a device; where it draws no noise after its start, a LatentGenerator.

    Args:
        settings: `path` is a directory that `save_pretrained` wrote, local or s3://, or else the id of one on the hub.
        device: "cpu", "cuda", "cuda:1".

    Raises:
        UserError: no such directory or hub id, not a saved pipeline, weights only as pickles without permission, one
            that makes no images from noise, or steps, scheduler, guidance, eta or size that it does not take.
    """
    pipeline, files = _loaded(settings, device)
    if settings.scheduler is not None:
        pipeline.register_modules(scheduler=_scheduler(settings.scheduler, pipeline))
    for part in pipeline.components.values():
        if hasattr(part, "requires_grad_"):
            part.requires_grad_(False)  # images are differentiated by their latents, never by the weights
    arguments = _call_arguments(pipeline, settings)
    identity = partial(_identity, pipeline, arguments, settings.precision, files)
    if _in_own_loop(pipeline):
        return _open_denoising(pipeline, arguments, device, identity)
    return CalledPipeline(pipeline, arguments, device, identity)


class TrainablePipeline:
    """A saved pipeline of our own loop whose network is to be trained, in float32; the rest of it is frozen.

    Attributes:
        network: U-Net or transformer, in training mode. scheduler: the one it was saved with, which tells how it was
            trained.
        size: (height, width) of its images, px. colors: 1 or 3. num_classes: 0 where it takes no labels.
    """

    def __init__(self, pipeline: Any, settings: GeneratorSettings, device: str, files: str):
        self._pipeline, self._settings, self._device, self._files = pipeline, settings, device, files
        self._role = "transformer" if hasattr(pipeline, "transformer") else "unet"
        self.network = getattr(pipeline, self._role).train().requires_grad_(True)
        self.scheduler = pipeline.scheduler
        described = self._described()
        self.shape, self.out_channels, self.num_classes = (
            described.shape,
            described.out_channels,
            described.num_classes,
        )
        autoencoder = getattr(pipeline, "vqvae", None) or getattr(pipeline, "vae", None)
        scale = 1 if autoencoder is None else 2 ** (len(autoencoder.config.block_out_channels) - 1)
        self.size = (self.shape[1] * scale, self.shape[2] * scale)
        self.colors = self.shape[0] if autoencoder is None else int(autoencoder.config.in_channels)

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The network's output, float32 [B, C or 2C, h, w], of noisy latents [B, C, h, w] and their timesteps, [B]."""
        return self._described().predict(noisy, timesteps, labels)

    def encode(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents of images; see denoising.encoded."""
        return encoded(self._pipeline, images, noise)

    def sampler(self, network: Any) -> Generator:
        """Images of another network of this kind, as the settings say: their scheduler, steps and guidance."""
        trained = getattr(self._pipeline, self._role)
        try:
            self._pipeline.register_modules(**{self._role: network})
            if self._settings.scheduler is not None:
                self._pipeline.register_modules(scheduler=_scheduler(self._settings.scheduler, self._pipeline))
            arguments = _call_arguments(self._pipeline, self._settings)
            identity = partial(_identity, self._pipeline, arguments, "fp32", self._files)
            return _open_denoising(self._pipeline, arguments, self._device, identity)
        finally:
            self._pipeline.register_modules(**{self._role: trained}, scheduler=self.scheduler)

    def save(self, folder: str, network: Any) -> None:
        """The pipeline as it was saved, with another network of this kind in its place."""
        trained = getattr(self._pipeline, self._role)
        try:
            self._pipeline.register_modules(**{self._role: network})
            self._pipeline.save_pretrained(folder, safe_serialization=True)
        finally:
            self._pipeline.register_modules(**{self._role: trained})

    def _described(self) -> Network:
        if self._role == "transformer":
            return dit_network(self._pipeline, guidance=1.0)
        return unet_network(self._pipeline)


def open_trainable(settings: GeneratorSettings, device: str = "cpu") -> TrainablePipeline:
    """A saved pipeline to be trained on, in float32 whatever precision it is sampled with.

    Raises:
        UserError: as `open_pipeline`; or a pipeline that has a loop of its own, or one that was distilled, whose loss
            is no prediction of noise.
    """
    pipeline, files = _loaded(settings.model_copy(update={"precision": "fp32"}), device)
    name = type(pipeline).__name__
    if not _in_own_loop(pipeline) or name in DISTILLED:
        raise UserError(
            f"--generator.path {settings.path}: {name} cannot be fine-tuned here; pipelines of a U-Net or DiT and a "
            f"scheduler can ({', '.join(sorted({*UNET_PIPELINES, 'DiTPipeline'} - {*DISTILLED}))})"
        )
    for part in pipeline.components.values():
        if hasattr(part, "requires_grad_"):
            part.requires_grad_(False)
    return TrainablePipeline(pipeline, settings, device, files)


# ---- Loading ---------------------------------------------------------------------------------------------------------


def _loaded(settings: GeneratorSettings, device: str) -> tuple[Any, str]:
    """The pipeline on a device, and the hash of its files."""
    assert settings.path is not None, "open_generator refuses settings without a path"
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise UserError("--generator.kind diffusers: not installed; pip install 'pd-core[diffusers]'") from None
    where = f"--generator.path {settings.path}"
    with _local_folder(settings.path, settings.allow_pickle) as folder, core_files.explained(where):
        trust.check_folder(folder, where)
        index = _model_index(folder, settings.path)
        _be_quiet()
        pipeline = _load(folder, index, settings).to(device)
        files = files_hash(folder)  # while the copy is here: a bucket is not read twice
    return pipeline, files


@contextlib.contextmanager
def _local_folder(path: str, allow_pickle: bool) -> Iterator[str]:
    """The pipeline's directory on this machine: as it is, copied from a store while it is loaded, or from the hub."""
    if not core_files.is_local(path):
        fs, remote = core_files.filesystem(path)
        if not fs.isdir(remote):
            raise UserError(f"--generator.path {path}: no such directory; check the path")
        if any(".." in name.split("/") for name in fs.find(remote)):  # the copy would lie beside its folder
            raise UserError(f"--generator.path {path}: holds names that lead out of it; use another")
        with tempfile.TemporaryDirectory() as copy:
            fs.get(remote.rstrip("/") + "/", copy, recursive=True)
            yield copy
        return
    local = core_files.absolute(path)
    if os.path.isdir(local):
        yield local
    elif os.path.exists(local):
        raise UserError(
            f"--generator.path {path}: a file; a diffusers pipeline is a directory that save_pretrained wrote"
        )
    else:
        yield _from_hub(path, allow_pickle)


def _from_hub(name: str, allow_pickle: bool) -> str:
    from diffusers import DiffusionPipeline

    _be_quiet()
    try:
        return str(DiffusionPipeline.download(name, use_safetensors=None if allow_pickle else True))
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise UserError(
            f"--generator.path {name}: no such directory here, and the hub does not give it ({reason}); check the "
            "name, the network, or HF_TOKEN for one that asks for a licence"
        ) from None


def _model_index(folder: str, path: str) -> dict[str, Any]:
    """model_index.json, the list of a pipeline's parts."""
    where = f"--generator.path {path}"
    try:
        index = json.loads(core_files.read_file(os.path.join(folder, "model_index.json"), where, trust.TEXT_BYTES))
    except FileNotFoundError:
        raise UserError(
            f"{where}: no model_index.json in it, so not a saved diffusers pipeline; name the directory that "
            "save_pretrained wrote"
        ) from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: model_index.json is not JSON ({error}); save the pipeline again") from None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UserError(
            f"{where}: model_index.json names no pipeline class of diffusers; one with code of its own needs "
            "--generator.kind python"
        )
    return index


def _refuse_pickles(folder: str, path: str) -> None:
    """Weights that lie there only as pickles, found before diffusers looks for them."""
    for part in sorted(os.listdir(folder)):
        directory = os.path.join(folder, part)
        names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles and not any(name.endswith(".safetensors") for name in names):
            raise UserError(
                f"--generator.path {path}: {part}/{pickles[0]} is a pickle, which can run any code it holds; save the "
                "pipeline with safetensors, or pass --generator.allow-pickle if you trust it"
            )


def _load(folder: str, index: dict[str, Any], settings: GeneratorSettings) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    if not settings.allow_pickle:
        _refuse_pickles(folder, str(settings.path))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    options: dict[str, Any] = {"use_safetensors": None if settings.allow_pickle else True}
    if "safety_checker" in index and not settings.safety_checker:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **options)
    except Exception as error:  # what its files say reaches constructors of any class, which may raise nearly anything
        reason = one_line(error)
        raise UserError(f"--generator.path {settings.path}: diffusers cannot load it ({reason})") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _be_quiet() -> None:
    """No progress bars and no advice from the libraries: a run has hundreds of batches, and one line of its own."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with contextlib.suppress(ImportError):  # unconditional pipelines do without transformers
        from transformers.utils import logging as text_logging

        text_logging.set_verbosity_error()
        text_logging.disable_progress_bar()


# ---- Settings --------------------------------------------------------------------------------------------------------


def _scheduler(name: str, pipeline: Any) -> Any:
    """A scheduler of diffusers by its class name, configured as the one saved with the pipeline."""
    import diffusers

    saved = getattr(pipeline, "scheduler", None)
    if saved is None:
        raise UserError(f"--generator.scheduler {name}: {type(pipeline).__name__} has none to replace; drop it")

    known = sorted(n for n in dir(diffusers) if n.endswith("Scheduler"))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0) or known
        raise UserError(f"--generator.scheduler {name}: diffusers has no such scheduler; did you mean {near[0]}?")
    cls = getattr(diffusers, name)
    relatives = {*saved._compatibles, type(saved).__name__}
    if name not in relatives and type(saved).__name__ not in getattr(cls, "_compatibles", ()):
        raise UserError(
            f"--generator.scheduler {name}: not for a model trained with {type(saved).__name__}; use one of "
            f"{', '.join(sorted(relatives))}"
        )
    try:
        return cls.from_config(saved.config)
    except (ImportError, ValueError, NotImplementedError) as error:
        reason = one_line(error)
        raise UserError(f"--generator.scheduler {name}: cannot be made for this pipeline ({reason})") from None


def _call_arguments(pipeline: Any, settings: GeneratorSettings) -> dict[str, Any]:
    """The settings under the names of a pipeline's `__call__`, with its own steps and guidance where they are unset."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    arguments = {
        name: accepted[name].default for name in (PARAMETERS["steps"], PARAMETERS["guidance"]) if name in accepted
    }
    for setting, parameter in PARAMETERS.items():
        value = getattr(settings, setting)
        if value is None:
            continue
        # DDPMPipeline and DiTPipeline know of no eta, our loop gives it to the scheduler that replaced theirs
        if parameter not in accepted and not (setting == "eta" and _in_own_loop(pipeline)):
            raise UserError(f"--generator.{setting}: {type(pipeline).__name__} takes none; drop it")
        arguments[parameter] = value
    _check_values(pipeline, arguments)
    return arguments


def _check_values(pipeline: Any, arguments: dict[str, Any]) -> None:
    scheduler = getattr(pipeline, "scheduler", None)
    if "eta" in arguments and (scheduler is None or "eta" not in inspect.signature(scheduler.step).parameters):
        raise UserError(f"--generator.eta: {type(scheduler).__name__} takes none; use DDIMScheduler or drop it")
    for side in ("height", "width"):
        if arguments.get(side, 0) % 8:
            raise UserError(f"--generator.{side} {arguments[side]}: must be a multiple of 8 px")
    levels = getattr(scheduler, "config", {}).get("num_train_timesteps")
    steps = arguments.get("num_inference_steps")
    if levels and steps and steps > levels:
        raise UserError(
            f"--generator.steps {steps}: the model was trained with {levels} noise levels; use at most as many"
        )


def _in_own_loop(pipeline: Any) -> bool:
    return type(pipeline).__name__ in (*UNET_PIPELINES, "DiTPipeline")


def _identity(pipeline: Any, arguments: dict[str, Any], precision: str, files: str) -> dict[str, Any]:
    schedulers = {
        name: json.loads(part.to_json_string())
        for name, part in pipeline.components.items()
        if hasattr(part, "set_timesteps")
    }
    libraries = ["torch", "diffusers"]
    if any(type(part).__module__.startswith("transformers.") for part in pipeline.components.values()):
        libraries.append("transformers")
    return {
        "pipeline": type(pipeline).__name__,
        "files": files,
        "schedulers": schedulers,
        "safety_checker": getattr(pipeline, "safety_checker", None) is not None,
        "arguments": arguments,
        "precision": precision,
        "versions": {library: version(library) for library in libraries},
    }


# ---- Generators ------------------------------------------------------------------------------------------------------


def _open_denoising(
    pipeline: Any, arguments: dict[str, Any], device: str, identity: Callable[[], dict[str, Any]]
) -> Diffusion:
    if type(pipeline).__name__ == "DiTPipeline":
        network = dit_network(pipeline, arguments["guidance_scale"])
    else:
        network = unet_network(pipeline)
    steps, eta = arguments["num_inference_steps"], arguments.get("eta")
    noisy = draws_noise(pipeline.scheduler, network.shape[0], network.out_channels, steps, eta)
    cls = Diffusion if noisy else DeterministicDiffusion
    return cls(network, pipeline.scheduler, steps, eta, device, identity)


class CalledPipeline:
    """A pipeline run by its own `__call__`, from prompts or from nothing; a `Generator`.

    Raises:
        UserError: the pipeline needs something else than a prompt, such as an image.
    """

    num_classes = 0

    def __init__(self, pipeline: Any, arguments: dict[str, Any], device: str, identity: Callable[[], dict[str, Any]]):
        accepted = inspect.signature(type(pipeline).__call__).parameters
        needed = {n for n, p in accepted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        other = (needed - {"self", "prompt", "batch_size"}) | (
            {"image"} & accepted.keys() if "strength" in accepted else set()
        )
        if other or "generator" not in accepted or not {"prompt", "batch_size"} & accepted.keys():
            wants = f"needs {', '.join(sorted(other))}" if other else "takes neither prompts nor a number of images"
            raise UserError(
                f"--generator.path {pipeline.config._name_or_path}: {type(pipeline).__name__} {wants}; use a pipeline "
                "that makes images from noise or text, or write a --generator.kind python"
            )
        self.takes_prompts = "prompt" in accepted
        self._pipeline, self._arguments = pipeline, arguments
        self._device, self._identity = device, identity

    def identity(self) -> dict[str, Any]:
        """Weights' hash, pipeline, schedulers and their configuration, arguments of the call, library versions."""
        return self._identity()

    def generate(self, seeds: Sequence[int], conditions: Conditions) -> torch.Tensor:
        """uint8 [B, H, W, 3] on the device; see Generator."""
        import torch

        check_conditions(self, conditions.labels, conditions.prompts)
        generators = generators_of(seeds)
        what = {"prompt": list(conditions.prompts)} if conditions.prompts is not None else {"batch_size": len(seeds)}
        name = f"--generator.path: {type(self._pipeline).__name__}"
        with torch.no_grad(), _seeded_steps(self._pipeline, generators):
            output = self._pipeline(generator=generators, output_type="pt", **what, **self._arguments)
        images = getattr(output, "images", None)
        if images is None:
            raise UserError(f"{name} gives no images; use a pipeline that does")
        if not isinstance(images, torch.Tensor):  # pipelines that know no "pt" give arrays [B, H, W, 3]
            images = torch.as_tensor(images).permute(0, 3, 1, 2).to(self._device)
        self._check_size(images)
        return to_uint8(images.float() * 2 - 1)

    def _check_size(self, images: torch.Tensor) -> None:
        for side, found in zip(("height", "width"), images.shape[2:], strict=True):
            if self._arguments.get(side, found) != found:
                name = type(self._pipeline).__name__
                raise UserError(f"--generator.{side} {self._arguments[side]}: {name} makes {found} px of it; set that")


@contextlib.contextmanager
def _seeded_steps(pipeline: Any, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Hand the samples' generators to schedulers whose pipeline passes none; what a pipeline does pass goes first.

    Without it LDMTextToImagePipeline, for one, draws the noise of each step from torch's global state.
    """
    schedulers = [
        part
        for part in pipeline.components.values()
        if hasattr(part, "set_timesteps") and "generator" in inspect.signature(part.step).parameters
    ]
    for scheduler in schedulers:
        scheduler.step = partial(scheduler.step, generator=list(generators))
    try:
        yield
    finally:
        for scheduler in schedulers:
            del scheduler.step  # the class's own again
