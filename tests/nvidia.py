"""The mechanism of NVIDIA's pickles in miniature, for tests: an object is pickled as the source of its module, its
class's name and its state; the source imports `torch_utils` and `dnnlib` when it is loaded.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from pd_core.generators.stylegan import _version_parser

PERSISTENCE = """
import types
import dnnlib

def class_of(source, name):
    module = types.ModuleType("imported_from_pickle")
    exec(source, module.__dict__)
    cls = getattr(module, name)
    cls.__reduce__ = lambda self: (rebuilt, ({"source": source, "name": name, "state": self.__dict__},))
    return cls

def persistent(source, name, *args):
    return class_of(source, name)(*args)

def rebuilt(meta):
    network = object.__new__(class_of(meta["source"], meta["name"]))
    network.__dict__.update(meta["state"])
    return network
"""
OPERATION = """
import torch

def _init():
    raise RuntimeError("a compiler was asked for")

def bias_act(x, impl="cuda"):
    if impl == "cuda" and _init():
        raise RuntimeError("a compiled operation was called")
    return torch.nn.functional.leaky_relu(x, 0.2)
"""
NETWORKS = """
import torch
import dnnlib
from torch_utils.ops import bias_act

class Generator(torch.nn.Module):
    def __init__(self, z_dim, c_dim, img_resolution):
        super().__init__()
        self.z_dim, self.c_dim, self.img_resolution, self.img_channels = z_dim, c_dim, img_resolution, 3
        self.mapping = torch.nn.Linear(z_dim + c_dim, 8)
        self.synthesis = torch.nn.Linear(8, 3 * img_resolution ** 2)
        self.register_buffer("noise_const", torch.randn(3 * img_resolution ** 2))
        self.register_buffer("w_avg", torch.zeros(8))

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, **synthesis_kwargs):
        assert z.shape[1:] == (self.z_dim,) and c.shape == (len(z), self.c_dim), (z.shape, c.shape)
        assert set(synthesis_kwargs) == {"noise_mode", "force_fp32"}, synthesis_kwargs
        w = bias_act.bias_act(self.mapping(torch.cat([z, c], dim=1)))
        w = self.w_avg.lerp(w, truncation_psi)
        x = self.synthesis(w)
        if synthesis_kwargs["noise_mode"] == "const":
            x = x + 0.1 * self.noise_const
        return x.reshape(len(z), 3, self.img_resolution, self.img_resolution)

class Discriminator(torch.nn.Module):
    def __init__(self, c_dim, img_resolution):
        super().__init__()
        self.c_dim, self.img_resolution, self.img_channels = c_dim, img_resolution, 3
        self.hidden = torch.nn.Linear(3 * img_resolution ** 2, 8)
        self.out = torch.nn.Linear(8 + c_dim, 1)

    def forward(self, img, c, force_fp32=False):
        assert img.shape[1:] == (3, self.img_resolution, self.img_resolution) and c.shape == (len(img), self.c_dim)
        assert force_fp32
        x = bias_act.bias_act(self.hidden(img.flatten(1)))
        return self.out(torch.cat([x, c], dim=1))
"""


class StandIn:
    """A directory of code and a way to pickle networks with it, in whose place this process knows no such module."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.code = folder, folder / "code"
        (self.code / "torch_utils" / "ops").mkdir(parents=True)
        (self.code / "dnnlib").mkdir()
        for name in ("torch_utils", "torch_utils/ops", "dnnlib"):
            (self.code / name / "__init__.py").write_text("")
        (self.code / "torch_utils" / "persistence.py").write_text(PERSISTENCE)
        (self.code / "torch_utils" / "ops" / "bias_act.py").write_text(OPERATION)

    def forget(self) -> None:
        for name in [n for n in sys.modules if n.split(".")[0] in ("torch_utils", "dnnlib")]:
            del sys.modules[name]
        sys.path[:] = [entry for entry in sys.path if entry != str(self.code)]

    def saved(self, classes: int, *keys: str) -> str:
        """A pickle of networks of 8 px under these names, G_ema by default, each with weights of its own."""
        sys.path.insert(0, str(self.code))
        import torch_utils.persistence as persistence  # type: ignore[import-not-found]

        keys = keys or ("G_ema",)
        torch.manual_seed(1)
        content: dict[str, Any] = {"training_set_kwargs": None}
        with _version_parser():
            for key in keys:
                name, arguments = ("Discriminator", (classes, 8)) if key == "D" else ("Generator", (4, classes, 8))
                content[key] = persistence.persistent(NETWORKS, name, *arguments).eval().requires_grad_(False)
        file = self.folder / f"network-{classes}-{'-'.join(keys)}.pkl"
        file.write_bytes(pickle.dumps(content))
        self.forget()
        return str(file)
