"""What the training programs of the demo share: images in, batches, and a folder that appears when it is complete."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pd_core.core import artifacts, errors
from pd_core.core.errors import UserError
from pd_core.engine import console

if TYPE_CHECKING:
    import torch

RECORD = "train.json"


# ---- Images ----------------------------------------------------------------------------------------------------------


def read_images(folder: Path) -> np.ndarray:
    """uint8 [N, S, S] or [N, S, S, 3]: the grey or the colour PNGs in the label folders of `folder`, by name.

    Raises:
        UserError: no such folder, no PNG in it, an image that is unreadable, neither 8-bit grey nor RGB, or of another
            mode or size than the first, or images that are not square.
    """
    from PIL import Image

    paths = sorted(folder.glob("*/*.png"))
    if not paths:
        raise UserError(
            f"--data {folder}: no <label>/*.png there; write the images with demo/make_digits.py or demo/make_emoji.py"
        )
    images: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                mode, pixels = image.mode, np.asarray(image)
        except OSError as error:  # what Pillow raises for files that are no images, or not whole
            raise UserError(f"{path}: not a readable image ({error}); remove it or write it again") from None
        if mode not in ("L", "RGB"):
            raise UserError(f"{path}: mode {mode}, neither 8-bit grey (L) nor RGB; convert it")
        images.append(pixels)
        if pixels.ndim != images[0].ndim:
            modes = ("RGB", "L") if mode == "L" else ("L", "RGB")
            raise UserError(f"{path}: mode {mode}, {paths[0].name} has mode {modes[0]}; convert all to one")
        if pixels.shape != images[0].shape:
            raise UserError(f"{path}: {pixels.shape[1::-1]} px, others have {images[0].shape[1::-1]}; use one size")
    height, width = images[0].shape[:2]
    if height != width:
        raise UserError(f"--data {folder}: images of {width}x{height} px; they must be square")
    return np.stack(images)


def check_side(images: np.ndarray, halvings: int, folder: Path) -> None:
    """Raises UserError unless the images' side can be halved so many times."""
    side = images.shape[1]
    if side % 2**halvings:
        raise UserError(
            f"--data {folder}: images of {side}x{side} px cannot be halved {halvings} times, as --channels asks; "
            "give it fewer numbers, or use images of another size"
        )


def colors_of(images: np.ndarray) -> int:
    """1 or 3: channels of uint8 [N, S, S] or [N, S, S, 3]."""
    return 1 if images.ndim == 3 else images.shape[3]


def shuffled_batches(images: torch.Tensor, batch_size: int, random: torch.Generator) -> Iterator[torch.Tensor]:
    """float32 [batch_size, C, S, S] in [-1, 1] without end; each image once before any comes again.

    images: uint8 [N, S, S] (C is 1) or [N, S, S, C].
    """
    import torch

    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=random)])
        chosen, order = order[:batch_size], order[batch_size:]
        yield images[chosen].float() / 127.5 - 1


# ---- The folder of a model -------------------------------------------------------------------------------------------


def identity_of(images: np.ndarray, recipe: Any) -> dict[str, Any]:
    """JSON-able: the recipe, a dataclass, and the images, by which a finished model is known."""
    data = {"shape": images.shape, "sha256": hashlib.sha256(images.tobytes()).hexdigest()}
    identity: dict[str, Any] = json.loads(json.dumps({"recipe": asdict(recipe), "images": data}))
    return identity


def is_finished(output: Path, identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether `output` holds the model of this identity.

    Raises:
        UserError: it holds another one and `overwrite` is off, or something that is not of this program.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / RECORD).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"--output {output}: holds what is not of this program; choose another")
    if found == identity:
        return True
    if not overwrite:
        what = "; ".join(artifacts.differences(found, identity))
        raise UserError(f"--output {output}: holds a model of other settings ({what}); choose another or --overwrite")
    return False


@contextlib.contextmanager
def moved_into_place(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` that takes its place as a whole; after an error it is gone, and `output` as it
    was.
    """
    partial, replaced = (output.with_name(f".{kind}-{output.name}-{os.getpid()}") for kind in ("partial", "replaced"))
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error}); choose another") from None
    try:
        yield partial
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
    finally:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        for folder in (partial, replaced):
            shutil.rmtree(folder, ignore_errors=True)


def make_model(
    name: str,
    output: Path,
    images: np.ndarray,
    identity: dict[str, Any],
    threads: int,
    overwrite: bool,
    write: Callable[[Path], None],
    said: str = "",
) -> None:
    """Make a model in `output`, unless it is there, and say so.

    Args:
        name: of what is made. said: how to use it.
        images, identity: see `identity_of`.
        threads: of torch.
        write: trains it, and saves it into an empty folder.

    Raises:
        UserError: of `is_finished` and `moved_into_place`.
    """
    if is_finished(output, identity, overwrite):
        console.say(f"{name}: {output} (kept, it is of these settings and images){said}")
        return
    with moved_into_place(output) as folder:
        import torch

        torch.set_num_threads(threads)
        start = time.perf_counter()
        write(folder)
        (folder / RECORD).write_text(json.dumps(identity, indent=2) + "\n")
    seconds = time.perf_counter() - start
    steps = identity["recipe"]["steps"]
    console.say(f"{name}: {output} ({len(images)} images, {steps} steps, {seconds:.0f} s){said}")


# ---- The command line ------------------------------------------------------------------------------------------------


def parser(description: str, output: str, recipe: Any, resolutions: str) -> argparse.ArgumentParser:
    """The options of every training program.

    Args:
        description: of the program.
        output: default of --output.
        recipe: defaults of --seed, --steps and --channels.
        resolutions: at which the networks have --channels.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--data", type=Path, default=Path("runs/demo-data/digits"), help="default: %(default)s")
    made.add_argument("--output", type=Path, default=Path(output), help="default: %(default)s")
    made.add_argument("--seed", type=int, default=recipe.seed, help="default: %(default)s")
    made.add_argument("--steps", type=positive, default=recipe.steps, help="default: %(default)s")
    made.add_argument(
        "--channels",
        type=positive,
        nargs="+",
        default=recipe.channels,
        help=f"of the network at {resolutions} (default: {' '.join(map(str, recipe.channels))})",
    )
    made.add_argument("--threads", type=positive, default=2, help="default: %(default)s")
    made.add_argument("--overwrite", action="store_true", help="replace a model of other settings or images")
    return made


def positive(text: str) -> int:
    """The number, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def exit_code(program: Callable[[], None]) -> int:
    """Runs a training program and returns its exit code."""

    def interruptible() -> None:
        try:
            program()
        except KeyboardInterrupt:
            # a line of its own: the progress bar may not have ended its
            print("\ninterrupted: nothing is written; the same command starts anew", file=sys.stderr)
            raise SystemExit(errors.EXIT_INTERRUPTED) from None

    return errors.exit_code(interruptible)
