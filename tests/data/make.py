"""Makes what made_before_rooms.tar.xz holds, with the tree that is the current folder; README.md beside this says when.

`commands` is frozen with the archive: tests/test_kept.py gives the same commands to the tree of today.
"""

import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

MODEL = "test_efficientnet"
IMAGES = 60
MTIME = 1_700_000_000  # of every file, whole seconds: a listing records those of the images
PLACE = Path("/tmp/kept-made")  # a listing's identity holds where its source lies: images and samples are given there
STOPPED = {"build_index": "features", "generate": "samples"}  # the stage in which a run of the command was killed


def commands(root: Path, stopped: bool = False) -> dict[str, list[str]]:
    """Arguments by workflow, for weights and outputs in root, sources in PLACE; stopped: into other outputs."""
    index, samples = str(root / "index"), str(root / "samples")
    end = "-stopped" if stopped else ""
    given = ["--checkpoint", str(root / "extractor.safetensors"), "--no-tracking.enabled"]
    bars = ["--generator.kind=torchscript", "--generator.path", str(root / "bars.pt"), "--generator.latent_shape=[4]"]
    build = [
        "--data.source",
        str(PLACE / "images"),
        "--data.labels=parent",
        f"--features.model={MODEL}",
        "--features.part_rows=8",
    ]
    build += ["--features.checkpoint", str(root / "extractor.safetensors"), "--features.batch_size=4", "--density.k=5"]
    build += ["--estimator.hidden=[16]", "--estimator.epochs=3", "--index.kind=flat", "--report.images=1"]
    build += ["--report.neighbors=1", "--no-tracking.enabled", "--output", index + end]
    generate = ["--index", index, *bars, "--n=48", "--score=both", "--keep-rejected", "--weighting.threshold=p60"]
    generate += [
        "--weighting.weight=4",
        "--chunk=8",
        "--part_rows=8",
        "--pilot=16",
        "--images=1",
        "--output",
        samples + end,
    ]
    perturb = ["--index", index, *bars, "--n=6", "--chunk=3", "--part_rows=6", "--steps=2", "--direction=up"]
    perturb += ["--epsilon=1.0", "--images=1", "--output", str(root / "perturbed")]
    evaluate = [
        "--real",
        index,
        "--samples",
        str(PLACE / "samples"),
        "--extraction.batch_size=8",
        "--extraction.part_rows=32",
    ]
    evaluate += ["--images=1", "--output", str(root / "evaluated")]
    made = {"build_index": build, "generate": generate + given}
    return made if stopped else {**made, "perturb": perturb + given, "evaluate": evaluate + given}


def write_images(folder: Path) -> None:
    """A disc on a plain ground, in two folders that are the labels."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:16, :16]
    for i in range(IMAGES):
        pixels = np.full((16, 16, 3), [(37 * i) % 256, (91 * i) % 256, (11 * i) % 256], np.uint8)
        pixels[(x - i % 16) ** 2 + (y - i % 13) ** 2 < 9 + i % 25] = [(53 * i) % 256, (29 * i) % 256, (71 * i) % 256]
        file = folder / "ab"[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        os.utime(file, (MTIME, MTIME))


def write_networks(root: Path) -> None:
    """An extractor whose kernels repeat, so that the archive stays small, and a generator of four bars."""
    import safetensors.torch
    import timm
    import torch

    from tests.tiny_generators import save_bars

    state = timm.create_model(MODEL, num_classes=0).state_dict()
    for name, weights in state.items():
        if weights.ndim > 1:
            noise = (torch.arange(weights.numel()) * 7919 % 1021 - 510) / 256  # no sums: the same bits everywhere
            scale = 2.0 ** -round(torch.tensor(weights[0].numel()).log2().item() / 2)
            state[name] = (noise * scale).reshape(weights.shape)
    safetensors.torch.save_file(state, root / "extractor.safetensors")
    save_bars(root / "bars.pt")


def run(workflow: str, arguments: list[str]) -> "subprocess.Popen[str]":
    """A workflow of the current folder's tree, without any GPU: where features were made is part of what they are."""
    return subprocess.Popen(
        [sys.executable, f"workflows/{workflow}.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def kill_in(stage: Path, process: "subprocess.Popen[str]") -> None:
    """SIGKILL as soon as the stage has a part."""
    while process.poll() is None and not list(stage.glob("_parts/*.json")):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    time.sleep(5)  # until the processes of its Ray have seen that it is gone
    assert not (stage / "artifact.json").exists(), f"{stage} was finished before it could be stopped: run this again"


def kept(file: Path, root: Path) -> bool:
    """Reports are drawn again from the tables, and their pictures would be three quarters of the archive; one stays."""
    return file.is_file() and (
        file.relative_to(root).parts[1:2] != ("report",) or file.is_relative_to(root / "evaluated")
    )


def pack(root: Path, archive: Path) -> None:
    """The files below root, without who made them."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for file in sorted(path for path in root.rglob("*") if kept(path, root)):
            info = tarfile.TarInfo(file.relative_to(root).as_posix())
            info.size, info.mtime = file.stat().st_size, MTIME
            tar.addfile(info, io.BytesIO(file.read_bytes()))


def main() -> None:
    root, archive = PLACE, Path(__file__).parent / "made_before_rooms.tar.xz"
    root.mkdir()
    sys.path.insert(0, os.getcwd())
    write_images(root / "images")
    write_networks(root)
    for workflow, arguments in commands(root).items():
        told = (process := run(workflow, arguments)).communicate()[0]
        assert process.returncode == 0, told
    for workflow, arguments in commands(root, stopped=True).items():
        kill_in(Path(arguments[arguments.index("--output") + 1]) / STOPPED[workflow], run(workflow, arguments))
    pack(root, archive)


if __name__ == "__main__":
    main()
