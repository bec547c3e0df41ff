"""Writes small colour images to try pd_core on: the emoji of an npm package, on white, each under its category.

    npm pack emoji-datasource-google@16.0.0 --ignore-scripts --pack-destination runs
    tar -xzf runs/emoji-datasource-google-16.0.0.tgz -C runs package/emoji.json package/img/google/64
    python demo/make_emoji.py --source runs/package --output runs/emoji32

    runs/emoji32/<category>/<code points>.png    1,911 colour images, 32x32: flags, smileys-emotion, animals-nature, ...

One image per emoji. The package has 3,786 images, the other half of which are skin tones: the same drawings of people
five times over, in other colours. Pseudo density counts near neighbours, so it would tell how many tones a drawing
comes in.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pd_core.core import errors
from pd_core.core.errors import UserError
from pd_core.engine import console

if TYPE_CHECKING:
    from PIL import Image

IMAGES = Path("img/google/64")  # of the package: 64 px, with alpha


def listing(source: Path) -> list[tuple[Path, str]]:
    """File and category of every emoji, by the package's emoji.json.

    Args:
        source: the unpacked package.

    Raises:
        UserError: no readable emoji.json there.
    """
    path = source / "emoji.json"
    try:
        emojis = json.loads(path.read_text(encoding="utf-8"))
        return [(source / IMAGES / emoji["image"], slug(emoji["category"])) for emoji in emojis]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--source {source}: emoji.json cannot be read ({error}); unpack the npm package there"
        ) from None


def slug(category: str) -> str:
    """A folder's name: "Smileys & Emotion" is smileys-emotion."""
    return re.sub(r"[^a-z0-9]+", "-", category.lower()).strip("-")


def shrunk(path: Path, size: int) -> Image.Image:
    """The RGB image on white; each pixel is the mean of the area that it covers.

    Raises:
        UserError: not a readable image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            rgba = image.convert("RGBA")
    except OSError as error:
        raise UserError(f"{path}: not a readable image ({error}); unpack the package again") from None
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB").resize((size, size), Image.Resampling.BOX)


def write_emoji(source: Path, output: Path, size: int) -> int:
    """Writes `output`/<category>/<code points>.png and returns their number; the folder appears when it is complete.

    Raises:
        UserError: of `listing` and `shrunk`, or `output` is there and is not a folder of these images in this size.
    """
    from PIL import Image

    files = listing(source)
    if output.exists():
        found = sorted(path.relative_to(output).as_posix() for path in output.glob("*/*.png"))
        if found != sorted(f"{category}/{path.name}" for path, category in files):
            raise UserError(f"--output {output}: holds something else; choose another or remove it")
        with Image.open(output / found[0]) as image:
            if image.size != (size, size):
                raise UserError(f"--output {output}: holds images of {image.width} px, not {size}; choose another")
        return len(files)
    partial = output.with_name(f".partial-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for path, category in files:
        target = partial / category / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shrunk(path, size).save(target)
    partial.rename(output)
    return len(files)


def main(arguments: list[str] | None = None) -> int:
    """Parses the arguments, writes the images and says where; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write emoji as small colour images.")
    parser.add_argument("--source", type=Path, required=True, help="folder of the unpacked npm package")
    parser.add_argument("--output", type=Path, default=Path("runs/emoji32"), help="default: %(default)s")
    parser.add_argument("--size", type=int, choices=(8, 16, 32, 64), default=32, help="px (default: %(default)s)")
    args = parser.parse_args(arguments)

    def program() -> None:
        count = write_emoji(args.source, args.output, args.size)
        console.say(f"emoji: {args.output.absolute()} ({count} images of {args.size} px)")

    return errors.exit_code(program)


if __name__ == "__main__":
    sys.exit(main())
