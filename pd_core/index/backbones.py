"""Backbones of extractors, loaded by name with their weights: timm's models, and the Inception of FID."""

from __future__ import annotations

import hashlib
import io
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pd_core.core import files, trust
from pd_core.core.errors import RunError, UserError, one_line
from pd_core.core.settings.data import INCEPTION, ExtractorSettings
from pd_core.images.resize import Preprocess

if TYPE_CHECKING:
    import torch


# The weights of the Inception of FID, TensorFlow's of 2015-12-05 as torch-fidelity publishes them; by the custom of
# torch's hub the name ends in the first digits of the file's sha256.
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d"
INCEPTION_BYTES = 256 << 20  # at most, of which it has 91
BESIDE_WEIGHTS = 16  # a checkpoint may hold so many times the weights: an optimizer's state, averages, double precision


def library(name: str) -> str:
    """Package that defines the model, with its version: features move with it. Raises UserError where it is missing."""
    if name == INCEPTION:
        from importlib import metadata

        try:
            return f"torch-fidelity {metadata.version('torch-fidelity')}"
        except metadata.PackageNotFoundError:
            raise UserError(
                f"--features.model {INCEPTION}: torch-fidelity is not installed here; pip install torch-fidelity"
            ) from None
    import timm

    return f"timm {timm.__version__}"


def load(name: str, checkpoint: str | None) -> torch.nn.Module:
    """A model without its classifier, in eval mode: normalised float [b, 3, H, W] to pooled features [b, D].

    Args:
        name: timm's, or `inception-v3-compat`.
        checkpoint: URI of the weights, or None for those that its package downloads.

    Raises:
        UserError: no such model, no such file, or weights of another architecture.
        RunError: the hub is there but does not answer now.
    """
    model = _inception(checkpoint) if name == INCEPTION else _timm(name, checkpoint)
    return model.eval().requires_grad_(False)


def preprocess_of(model: torch.nn.Module, settings: ExtractorSettings) -> Preprocess:
    """From RGB image to the model's input, as the model's own config or the settings say."""
    if settings.model == INCEPTION:
        return Preprocess.inception()
    if settings.preprocess == "paper":
        return Preprocess.paper()
    from timm.data import resolve_model_data_config

    data = resolve_model_data_config(model)
    _, height, width = data["input_size"]
    return Preprocess(
        height=settings.image_size or height,
        width=settings.image_size or width,
        interpolation=data["interpolation"],
        crop_pct=float(data["crop_pct"]),
        crop_mode=data["crop_mode"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _timm(name: str, checkpoint: str | None) -> torch.nn.Module:
    import timm

    try:
        model = timm.create_model(name, pretrained=checkpoint is None, num_classes=0)
    except RuntimeError as error:
        if "Unknown model" not in str(error) and "Invalid pretrained tag" not in str(error):
            raise UserError(f"--features.model {name}: {one_line(error)}") from None
        raise UserError(f"--features.model {name}: timm has no such model; {_nearest_model(name)}") from None
    except Exception as error:  # the hub raises dozens of types: offline, gated, renamed, full disk
        raise _not_loaded(name, error) from None
    if checkpoint is not None:
        _load_weights(model, name, checkpoint)
    return model


def _inception(checkpoint: str | None) -> torch.nn.Module:
    """torch-fidelity's port of the 2015 network up to its 2,048 pooled features; its own resizing is left out, since
    images come at 299 px.
    """
    import torch

    library(INCEPTION)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    uri = checkpoint or _downloaded(INCEPTION, INCEPTION_URL, INCEPTION_SHA256)
    data = _read_bytes(uri, INCEPTION_BYTES)
    if not hashlib.sha256(data).hexdigest().startswith(INCEPTION_SHA256):
        raise UserError(
            f"--features.checkpoint {uri}: not the weights that an FID is computed with; give the file that "
            f"torch-fidelity publishes, {INCEPTION_URL.rpartition('/')[2]}"
        )
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:  # it unpickles what it is given: only plain tensors
        torch.save(_tensors(data, uri), file.name)
        whole = FeatureExtractorInceptionV3(INCEPTION, ["2048"], file.name)
    layers = [layer for name, layer in whole.named_children() if name != "fc"]  # in the order of its `forward`
    return torch.nn.Sequential(*layers, torch.nn.Flatten())


def _downloaded(name: str, url: str, sha256: str) -> str:
    """Path of the file in torch's own cache, with the hash checked."""
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except Exception as error:
            raise _not_loaded(name, error) from None
    return str(path)


def _not_loaded(name: str, error: Exception) -> Exception:
    status = getattr(getattr(error, "response", None), "status_code", 0) or getattr(error, "code", 0) or 0
    # the same may work a minute later
    passing = status == 429 or (isinstance(status, int) and status >= 500) or "Timeout" in type(error).__name__
    return (RunError if passing else UserError)(
        f"--features.model {name}: cannot load its weights from the hub ({type(error).__name__}: {one_line(error)}); "
        "check the network, or give --features.checkpoint"
    )


def _nearest_model(name: str) -> str:
    import difflib

    import timm

    match = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.5)
    return f"did you mean '{match[0]}'?" if match else "timm.list_models() lists all"


def _load_weights(model: torch.nn.Module, name: str, checkpoint: str) -> None:
    own = sum(tensor.nbytes for tensor in model.state_dict().values())
    most = min(BESIDE_WEIGHTS * own + trust.TEXT_BYTES, trust.WEIGHTS_BYTES)
    tensors = _tensors(_read_bytes(checkpoint, most), checkpoint)
    classifier = model.default_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    wanted = model.state_dict()
    tensors = {
        key: t for key, t in tensors.items() if key in wanted or not key.startswith(tuple(f"{h}." for h in heads))
    }
    missing = sorted(set(wanted) - set(tensors))
    surplus = sorted(set(tensors) - set(wanted))
    shapes = [key for key in wanted if key in tensors and wanted[key].shape != tensors[key].shape]
    if missing or surplus or shapes:
        example = (missing or surplus or shapes)[0]
        raise UserError(
            f"--features.checkpoint {checkpoint}: not weights of {name} ({len(missing)} tensors missing, "
            f"{len(surplus)} unknown, {len(shapes)} of another shape, e.g. '{example}'); "
            "give --features.model the checkpoint's architecture"
        )
    model.load_state_dict(tensors)


def _read_bytes(uri: str, most: int) -> bytes:
    where = f"--features.checkpoint {uri}"
    with files.explained(where):
        return files.read_file(uri, where, most)


def _tensors(data: bytes, uri: str) -> dict[str, torch.Tensor]:
    """The state dict in a file's bytes; no code of it is run."""
    import torch

    try:
        loaded = _unpacked(data, uri.endswith(".safetensors"))
    except Exception as error:  # bytes of another kind are opcodes at random, which may raise nearly anything
        raise UserError(
            f"--features.checkpoint {uri}: not a file of weights only ({one_line(error)}); save it as .safetensors"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f"--features.checkpoint {uri}: holds no state dict; save model.state_dict()")
    return {str(key).removeprefix("module."): value for key, value in loaded.items()}


def _unpacked(data: bytes, is_safetensors: bool) -> Any:
    import safetensors.torch
    import torch

    if is_safetensors:
        return safetensors.torch.load(data)
    if data.startswith(b"PK"):  # torch never packs; what is packed may unfold to a thousand times its size
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if sum(entry.file_size for entry in file.infolist()) > len(data):
                raise ValueError("is compressed")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def weights_hash(model: torch.nn.Module) -> str:
    """sha256 over name, type, shape and bytes of every tensor of the model, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()
