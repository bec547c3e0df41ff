"""Generators: samples that depend on their seeds alone, diffusers' own pipelines as reference, gradients, bad input."""

import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from pd_core.core import files
from pd_core.core.errors import UserError
from pd_core.core.s3 import S3FileSystem
from pd_core.core.settings import load as settings_load
from pd_core.core.settings.generate import GenerateSettings, GeneratorSettings
from pd_core.generators import noise, protocol
from pd_core.generators.denoising import DeterministicDiffusion, Network
from pd_core.generators.diffusers import CalledPipeline
from pd_core.generators.noise import generators_of, normal_latents
from pd_core.generators.open import open_generator
from pd_core.generators.protocol import (
    Conditions,
    Generator,
    LatentGenerator,
    check_conditions,
    checked,
    files_hash,
    generate_checked,
    to_uint8,
)
from pd_core.generators.python import split
from tests import tiny_generators as tiny
from tests.nvidia import StandIn

DOCS = Path(__file__).resolve().parents[2] / "docs" / "generators.md"
WORDS = ("a cat", "two dogs", "sea")

# name -> how to save it, further settings, what three samples are asked to show
FAMILIES: dict[str, tuple[Callable[[Path], str], dict[str, Any], Conditions]] = {
    "ddpm": (tiny.save_ddpm, {"steps": 6}, Conditions()),
    "ddpm, classes": (partial(tiny.save_ddpm, classes=4), {"steps": 6}, Conditions(labels=(0, 3, 1))),
    "ddpm, euler ancestral": (
        tiny.save_ddpm,
        {"steps": 6, "scheduler": "EulerAncestralDiscreteScheduler"},
        Conditions(),
    ),
    "ddim": (tiny.save_ddim, {"steps": 6}, Conditions()),
    "ddim, eta": (tiny.save_ddim, {"steps": 6, "eta": 1.0}, Conditions()),
    "consistency": (tiny.save_consistency, {"steps": 3}, Conditions(labels=(9, 0, 2))),
    "dit": (tiny.save_dit, {"steps": 4}, Conditions(labels=(7, 999, 0))),
    "dit, ddpm": (tiny.save_dit, {"steps": 4, "scheduler": "DDPMScheduler"}, Conditions(labels=(7, 999, 0))),
    "ldm": (tiny.save_ldm, {"steps": 4}, Conditions()),
    "ldm, eta": (tiny.save_ldm, {"steps": 4, "eta": 1.0}, Conditions()),
    "stable diffusion": (tiny.save_stable_diffusion, {"steps": 3}, Conditions(prompts=WORDS)),
    "stable diffusion, eta": (tiny.save_stable_diffusion, {"steps": 3, "eta": 1.0}, Conditions(prompts=WORDS)),
}
MULTISTEP = (
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
)


@pytest.fixture(scope="module", autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny: threads would wait for each other
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves each pipeline once: how it is saved -> its folder."""
    folders: dict[str, str] = {}

    def folder(save: Callable[[Path], str]) -> str:
        name = repr(save)
        if name not in folders:
            folders[name] = save(tmp_path_factory.mktemp("pipeline"))
        return folders[name]

    return folder


def opened(path: str | None, **settings: Any) -> Any:
    return open_generator(GeneratorSettings(path=path, **settings), device="cpu", threads=1)


def pick(conditions: Conditions, rows: list[int]) -> Conditions:
    labels, prompts = conditions.labels, conditions.prompts
    return Conditions(
        labels=None if labels is None else tuple(labels[row] for row in rows),
        prompts=None if prompts is None else tuple(prompts[row] for row in rows),
    )


def levels_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


# ---- Samples and seeds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_a_function_of_its_seed_whatever_its_batch(saved, family):
    save, settings, conditions = FAMILIES[family]
    generator = opened(saved(save), **settings)
    assert isinstance(generator, Generator)
    seeds = [11, 2**62 + 11, 13]  # of which 32 bits could not tell the first two apart
    together = checked(generator.generate(seeds, conditions), 3)
    assert together.shape == (3, tiny.SIZE, tiny.SIZE, 3)
    turned = generator.generate(seeds[::-1], pick(conditions, [2, 1, 0])).flip(0)
    alone = torch.cat([generator.generate([seeds[row]], pick(conditions, [row])) for row in range(3)])
    # other batch shapes sum in another order: float32 moves by 1e-6 or so, which may cross one level of 256; where it
    # is between
    # two codes of a vector-quantised decoder (one of 192 here), a patch takes the other code
    for again in (turned, alone):
        differences = (together.int() - again.int()).abs()
        assert (differences > 1).float().mean() <= (0.01 if save is tiny.save_ldm else 0)
    same_condition = pick(conditions, [0, 0, 0])
    other = generator.generate(seeds, same_condition)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert levels_apart(other[a], other[b]) > 8  # other seeds, other images


def test_all_bits_of_a_seed_decide():
    seeds = [5 + 2**bit for bit in range(63) if bit not in (0, 2)] + [5]  # 5 = 2^2 + 2^0
    draws = normal_latents(seeds, (64,))
    assert len({tuple(row) for row in draws.tolist()}) == len(seeds)
    assert torch.equal(normal_latents(seeds, (64,)), draws)
    assert [generator.initial_seed() for generator in generators_of(seeds)] == seeds
    with pytest.raises(OverflowError):
        generators_of([-1])


def test_a_generator_is_the_mersenne_twister_from_the_words_of_its_seed():
    """numpy's, from SHAKE-128 of the seed: what anyone can draw again without torch."""
    seed = 2**62 + 12345
    words = np.frombuffer(hashlib.shake_128(seed.to_bytes(8, "little")).digest(2496), "<u4").astype(np.uint32)
    twister: Any = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    drawn = torch.randint(2**20, (2000,), generator=generators_of([seed])[0])  # torch: 32 random bits, modulo
    assert drawn.tolist() == (twister.random_raw(2000) % 2**20).tolist()


def test_draws_of_many_seeds_are_standard_normal_and_independent():
    seeds = [*range(1000), *(2**32 * i for i in range(1, 1001))]  # neighbours, and what 32 bits could not tell apart
    draws = normal_latents(seeds, (1024,)).double().numpy()
    # Kolmogorov-Smirnov of all, and of the first draw of each seed; the seeds are fixed, so this passes or fails for
    # good
    assert stats.kstest(draws.ravel(), "norm").pvalue > 0.01
    assert stats.kstest(draws[:, 0], "norm").pvalue > 0.01
    # correlations of independent rows of 1024 are N(0, 1/1024): the largest of 2 million lies below 6 / sqrt(1024) but
    # for 4e-3
    correlation = draws @ draws.T / draws.shape[1]
    correlation[range(len(seeds)), range(len(seeds))] = 0
    assert abs(correlation).max() < 6 / 32


def test_another_layout_of_torchs_state_is_noticed(monkeypatch):
    noise._twister_state.cache_clear()
    monkeypatch.setattr(noise, "WORDS_AT", slice(32, 32 + 8 * 624))
    with pytest.raises(RuntimeError, match="in a way that pd_core does not know"):
        generators_of([1])
    monkeypatch.undo()
    generators_of([1])


@pytest.mark.parametrize("family", ["ddpm, classes", "consistency", "dit", "stable diffusion"])
def test_conditions_reach_the_image(saved, family):
    save, settings, conditions = FAMILIES[family]
    images = opened(saved(save), **settings).generate([5, 5, 5], conditions)
    assert levels_apart(images[0], images[1]) > 0 and levels_apart(images[0], images[2]) > 0


@pytest.mark.parametrize("family", ["ddpm", "ddim", "ddim, eta", "consistency", "dit", "ldm", "stable diffusion, eta"])
def test_images_are_those_of_diffusers_own_pipeline(saved, family):
    from diffusers import DiffusionPipeline

    save, settings, conditions = FAMILIES[family]
    seeds = [3, 4, 5]
    ours = opened(saved(save), **settings).generate(seeds, conditions)
    pipeline = DiffusionPipeline.from_pretrained(saved(save), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": settings["steps"]} | (
        {"eta": settings["eta"]} if "eta" in settings else {}
    )
    if conditions.prompts:
        options["prompt"] = list(conditions.prompts)
    elif conditions.labels:
        options["class_labels"] = list(conditions.labels)
    if not conditions.prompts and family != "dit":
        options["batch_size"] = 3
    theirs = pipeline(generator=generators_of(seeds), output_type="np", **options).images
    theirs = (torch.as_tensor(theirs) * 255).round().to(torch.uint8)
    assert levels_apart(ours, theirs) <= 1


@pytest.mark.parametrize("name", MULTISTEP)
def test_schedulers_by_name_as_in_a_pipeline_that_takes_any(saved, name):
    """LDMPipeline passes on whatever scheduler it holds: a reference that our loop shares no line with."""
    import diffusers

    path = saved(tiny.save_ldm)
    generator = opened(path, scheduler=name, steps=5)
    assert generator.identity()["schedulers"]["scheduler"]["_class_name"] == name
    ours = generator.generate([1, 2], Conditions())
    pipeline = diffusers.LDMPipeline.from_pretrained(path, use_safetensors=True)
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    pipeline.scheduler.set_timesteps(5)  # LDMPipeline scales its noise before it sets them, by what belongs to others
    pipeline.set_progress_bar_config(disable=True)
    theirs = torch.as_tensor(
        pipeline(batch_size=2, generator=generators_of([1, 2]), num_inference_steps=5, output_type="np").images
    )
    assert levels_apart(ours, (theirs * 255).round().to(torch.uint8)) <= 1
    # what a multistep scheduler remembers of one batch must not reach the next, of another size
    generator.generate([7, 8, 9], Conditions())
    assert torch.equal(generator.generate([1, 2], Conditions()), ours)


def test_learned_variance_is_used_by_ddpm_and_left_out_by_others(saved, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    path = tiny._save(
        DDPMPipeline(tiny.unet(out_channels=6), DDPMScheduler(variance_type="learned_range")), tmp_path / "learned"
    )
    ours = opened(path, steps=5).generate([1], Conditions())
    pipeline = DDPMPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(generator=generators_of([1])[0], num_inference_steps=5, output_type="np").images
    assert levels_apart(ours, (torch.as_tensor(theirs) * 255).round().to(torch.uint8)) <= 1
    other = opened(path, steps=5, scheduler="DDIMScheduler").generate([1], Conditions())
    assert levels_apart(ours, other) > 8


def test_precisions_agree_roughly(saved):
    path = saved(tiny.save_ddim)
    exact = opened(path, steps=4).generate([1, 2], Conditions())
    rough = opened(path, steps=4, precision="bf16").generate([1, 2], Conditions())
    assert 0 < (exact.float() - rough.float()).abs().mean() < 8  # bfloat16 has 8 bits: some levels of 256


class Forgetful:
    """A pipeline that hands its scheduler no generator, and draws by itself on demand."""

    def __init__(self, draws: bool):
        from diffusers import DDPMScheduler

        self.draws = draws
        self.scheduler: Any = DDPMScheduler()
        self.components = {"scheduler": self.scheduler}
        self.config = type("Config", (), {"_name_or_path": "forgetful"})

    def __call__(self, prompt, generator=None, num_inference_steps=4, output_type="pil"):
        latents = torch.cat([torch.randn(1, 3, 8, 8, generator=g) for g in generator])
        if self.draws:
            latents = torch.randn_like(latents)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(latents * 0.1, t, latents).prev_sample
        return type("Output", (), {"images": (latents / 2 + 0.5).clamp(0, 1)})


def test_schedulers_get_generators_that_their_pipeline_does_not_pass():
    pipeline = Forgetful(draws=False)
    generator = CalledPipeline(pipeline, {}, "cpu", dict)
    together = generator.generate([1, 2], Conditions(prompts=("x", "x")))
    alone = generator.generate([2], Conditions(prompts=("x",)))
    assert levels_apart(together[1:], alone) <= 1 and levels_apart(together[0], together[1]) > 8
    assert "step" not in vars(pipeline.scheduler)


def test_a_pipeline_that_draws_from_the_global_state_is_refused():
    generator = CalledPipeline(Forgetful(draws=True), {}, "cpu", dict)
    with pytest.raises(UserError, match="it: draws from the global random state of torch, so"):
        generate_checked(generator, [1, 2], Conditions(prompts=("x", "x")), "it", "cpu")


DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(1),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002
    "Python": random.random,
}


@pytest.mark.parametrize("library", [*DRAWS, None])
def test_every_kind_of_generator_is_held_to_its_seeds(library):
    class Careless:
        num_classes, takes_prompts = 0, False

        def identity(self) -> dict[str, Any]:
            return {}

        def generate(self, seeds, conditions) -> torch.Tensor:
            DRAWS.get(library, lambda: None)()
            random.Random(1).random(), np.random.default_rng(1).random(), normal_latents([1], (1,))  # one's own: fine
            with torch.random.fork_rng():
                torch.manual_seed(seeds[0])  # put back afterwards: fine too
            return torch.zeros(len(seeds), 4, 4, 3, dtype=torch.uint8)

    call = partial(generate_checked, Careless(), [1, 2], Conditions(), "--generator.path g.py:make", "cpu")
    if library is None:
        assert call().shape == (2, 4, 4, 3)
        Careless.generate = lambda *_: torch.zeros(1, 4, 4, 3, dtype=torch.uint8)  # type: ignore[method-assign]
        with pytest.raises(UserError, match=r"gave \[1, 4, 4, 3\]"):
            call()
        return
    with pytest.raises(
        UserError, match=f"^--generator.path g.py:make: draws from the global random state of {library}, so"
    ):
        call()


# ---- Latents and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save", "settings", "differentiable"),
    [
        (tiny.save_ddpm, {"steps": 4}, False),
        (tiny.save_ddpm, {"steps": 4, "scheduler": "DDIMScheduler"}, True),
        (tiny.save_ddim, {"steps": 4}, True),
        (tiny.save_ddim, {"steps": 4, "eta": 0.0}, True),
        (tiny.save_ddim, {"steps": 4, "eta": 0.5}, False),
        (tiny.save_ddim, {"steps": 4, "scheduler": "DPMSolverMultistepScheduler"}, True),
        (tiny.save_consistency, {"steps": 1}, True),  # one step of a consistency model is a plain function
        (tiny.save_consistency, {"steps": 2}, False),
        (tiny.save_stable_diffusion, {"steps": 2}, False),
    ],
)
def test_latents_are_offered_where_the_first_noise_decides_the_image(saved, save, settings, differentiable):
    assert isinstance(opened(saved(save), **settings), LatentGenerator) == differentiable


@pytest.mark.parametrize("family", ["ddim", "dit", "ldm"])
def test_decoded_latents_are_the_generated_images(saved, family):
    save, settings, conditions = FAMILIES[family]
    generator = opened(saved(save), **settings)
    latents = generator.latents([1, 2, 3])
    assert latents.dtype == torch.float32
    with torch.no_grad():
        images = generator.decode(latents, conditions)
    assert levels_apart(to_uint8(images), generator.generate([1, 2, 3], conditions)) <= 1


def sampler(predict: Callable[..., torch.Tensor], scheduler: Any, steps: int) -> DeterministicDiffusion:
    network = Network(predict, lambda latents: latents, (3, tiny.SIZE, tiny.SIZE), 3, 0)
    return DeterministicDiffusion(network, scheduler, steps, None, "cpu", dict)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"])
def test_gradient_of_decode_is_the_difference_quotient(name):
    import diffusers

    # without clipping, whose kinks a difference quotient would trip over
    scheduler = getattr(diffusers, name).from_config({"clip_sample": False, "num_train_timesteps": 1000})
    unet = tiny.unet().double()
    generator = sampler(lambda noisy, t, labels: unet(noisy, t).sample, scheduler, steps=3)
    latents = generator.latents([1]).double().requires_grad_()
    random = torch.Generator().manual_seed(0)
    target, direction = torch.randn(2, *latents.shape, generator=random, dtype=torch.float64)

    def value(shift: float) -> torch.Tensor:
        return (generator.decode(latents + shift * direction, Conditions()) * target).sum()

    (gradient,) = torch.autograd.grad(value(0.0), latents)
    with torch.no_grad():
        step = 1e-4  # central difference: error of order step^2 against sums in float64
        quotient = (value(step) - value(-step)) / (2 * step)
    assert torch.allclose((gradient * direction).sum(), quotient, rtol=1e-5)


def test_decode_keeps_no_activations_between_steps():
    from diffusers import DDIMScheduler

    unet, calls = tiny.unet(), []

    def predict(noisy: torch.Tensor, timestep: torch.Tensor, labels: None) -> torch.Tensor:
        calls.append(1)
        return unet(noisy, timestep).sample

    generator = sampler(predict, DDIMScheduler(), steps=7)
    latents = generator.latents([1]).requires_grad_()
    images = generator.decode(latents, Conditions())
    assert len(calls) == 7
    images.sum().backward()
    assert len(calls) == 14  # each step computed again on the way back
    assert latents.grad is not None and bool((latents.grad != 0).any())


# ---- Identity --------------------------------------------------------------------------------------------------------


def test_identity_is_stable_and_tells_weights_scheduler_and_steps(tmp_path):
    path = tiny.save_ddim(tmp_path / "one")
    first = opened(path, steps=4).identity()
    assert json.loads(json.dumps(first)) == first == opened(path, steps=4).identity()
    assert first["pipeline"] == "DDIMPipeline" and first["arguments"]["num_inference_steps"] == 4
    assert opened(path).identity()["arguments"]["num_inference_steps"] == 50  # the pipeline's own default
    assert opened(path, steps=4, scheduler="PNDMScheduler").identity() != first
    weights = tmp_path / "one" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert opened(path, steps=4).identity()["files"] != first["files"]


def test_a_pipeline_in_a_bucket(tmp_path, s3_environment):
    path = tiny.save_ddim(tmp_path / "p")
    bucket = s3_environment.make_bucket()
    s3_environment.filesystem().put(path, f"{bucket}/models/p", recursive=True)
    there, here = opened(f"s3://{bucket}/models/p", steps=2), opened(path, steps=2)
    s3_environment.filesystem().rm(f"{bucket}/models/p", recursive=True)  # read once, for weights and identity
    assert torch.equal(there.generate([1], Conditions()), here.generate([1], Conditions()))
    assert there.identity() == here.identity()  # the same files, wherever they lie
    refused("no such directory", f"s3://{bucket}/models/q")


# ---- Bad input -------------------------------------------------------------------------------------------------------


def refused(expected: str, path: str | None, **settings: Any) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        opened(path, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("expected", "settings"),
    [
        ("did you mean DDIMScheduler?", {"scheduler": "DDIMSheduler"}),
        ("did you mean DEISMultistepScheduler?", {"scheduler": "DEISMultistep"}),
        ("not for a model trained with DDPMScheduler", {"scheduler": "FlowMatchEulerDiscreteScheduler"}),
        ("--generator.eta: UniPCMultistepScheduler takes none", {"scheduler": "UniPCMultistepScheduler", "eta": 0.0}),
        ("--generator.eta: DDPMScheduler takes none", {"eta": 0.0}),
        ("--generator.guidance: DDPMPipeline takes none", {"guidance": 2.0}),
        ("--generator.height: DDPMPipeline takes none", {"height": 32}),
        ("--generator.steps 1001: the model was trained with 1000", {"steps": 1001}),
    ],
)
def test_settings_that_a_pipeline_does_not_take(saved, expected, settings):
    refused(expected, saved(tiny.save_ddpm), **settings)


def test_size_of_text_to_image(saved):
    path = saved(tiny.save_stable_diffusion)
    refused("--generator.height 30: must be a multiple of 8 px", path, height=30)
    images = opened(path, steps=2, height=32, width=24).generate([1], Conditions(prompts=("a",)))
    assert images.shape == (1, 32, 24, 3)


def test_a_safety_checker_stays_unless_it_is_refused(saved, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    )
    for name in ("concept_embeds_weights", "special_care_embeds_weights"):
        torch.nn.init.constant_(getattr(checker, name), -3.0)  # below any cosine: every image is suspect
    parts = StableDiffusionPipeline.from_pretrained(saved(tiny.save_stable_diffusion)).components
    size = {"height": 16, "width": 16}
    parts |= {"safety_checker": checker, "feature_extractor": CLIPImageProcessor(size=size, crop_size=size)}
    path = tiny._save(StableDiffusionPipeline(**parts), tmp_path / "checked")
    kept, refused_it = opened(path, steps=2), opened(path, steps=2, safety_checker=False)
    assert bool((kept.generate([1], Conditions(prompts=("a",))) == 0).all())  # blacked out
    assert bool((refused_it.generate([1], Conditions(prompts=("a",))) != 0).any())
    assert kept.identity()["safety_checker"] and not refused_it.identity()["safety_checker"]


def test_guidance_reaches_dit_and_stable_diffusion(saved):
    for family in ("dit", "stable diffusion"):
        save, settings, conditions = FAMILIES[family]
        plain, guided = (
            opened(saved(save), **settings, guidance=g).generate([1, 2, 3], conditions) for g in (1.0, 9.0)
        )
        assert levels_apart(plain, guided) > 0


def test_a_missing_or_foreign_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("not set; name the generator", None)
    refused("no such directory, and no hub id", str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    refused("no model_index.json", str(tmp_path / "empty"))
    (tmp_path / "file").write_text("x")
    refused("a file; a diffusers pipeline is a directory", str(tmp_path / "file"))
    (tmp_path / "empty" / "model_index.json").write_text("{")
    refused("is not JSON", str(tmp_path / "empty"))
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": ["pipeline", "Mine"]}')
    refused("with code of its own needs --generator.kind python", str(tmp_path / "empty"))
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    refused("diffusers cannot load it", str(tmp_path / "empty"))


def test_the_hub_is_asked_after_the_disk(monkeypatch):
    from diffusers import DiffusionPipeline

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(DiffusionPipeline, "download", offline)
    refused("the hub does not give it (no route to host)", "someone/something")


CODE = """
import pathlib
from diffusers import DDIMPipeline
pathlib.Path({touched!r}).touch()
class Mine(DDIMPipeline): ...
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("changes", "places", "expected"),
    [
        ({"_class_name": ["mymodule", "Mine"]}, ["mymodule.py"], "needs --generator.kind python"),
        ({"_class_name": "Mine"}, ["Mine.py", "mymodule.py"], "diffusers cannot load it"),
        ({"unet": ["mymodule", "Mine"]}, ["unet/mymodule.py", "mymodule.py"], "diffusers cannot load it"),
        ({"unet": ["subprocess", "run"]}, [], "diffusers cannot load it"),
        ({}, ["None.py"], "diffusers cannot load it"),  # what diffusers looks for where no custom pipeline is asked for
    ],
)
def test_code_beside_a_pipeline_is_not_run(tmp_path, monkeypatch, changes, places, expected):
    path, touched = tiny.save_ddim(tmp_path / "p"), tmp_path / "touched"
    index = tmp_path / "p" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    for place in places:
        (tmp_path / "p" / place).write_text(CODE.format(touched=str(touched)))
    monkeypatch.chdir(tmp_path / "p")
    refused(expected, path, allow_pickle=True)
    assert not touched.exists()


def test_code_that_transformers_would_load_is_not_run(tmp_path):
    path, touched = tiny.save_ddim(tmp_path / "p"), tmp_path / "touched"
    index = tmp_path / "p" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"unet": ["transformers", "AutoModel"]}))
    where = {"AutoConfig": "mymodule.Mine", "AutoModel": "mymodule.Mine"}
    (tmp_path / "p" / "unet" / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": where}))
    (tmp_path / "p" / "unet" / "mymodule.py").write_text(CODE.format(touched=str(touched)))
    refused("diffusers cannot load it", path, allow_pickle=True)
    assert not touched.exists()


def test_diffusers_is_told_to_run_no_code_of_others():
    code = "import pd_core.generators.diffusers; from diffusers.utils import constants as theirs; print(theirs.{})"
    command = [sys.executable, "-c", code.format("DIFFUSERS_DISABLE_REMOTE_CODE")]
    environment = {**os.environ, "DIFFUSERS_DISABLE_REMOTE_CODE": "0"}
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "True\n"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("place", ["model_index.json", "unet/config.json", "unet/more.safetensors", "scheduler/x.json"])
def test_a_pipe_in_a_pipeline_is_refused_unread(tmp_path, place):
    path = tiny.save_ddim(tmp_path / "p")
    (tmp_path / "p" / place).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "p" / place)
    refused(f"--generator.path {path}, {place}: is no regular file, but a pipe", path)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["torchscript", "stylegan"])
def test_a_generator_without_an_end_is_refused_unread(nvidia, tmp_path, kind):
    file = tmp_path / "generator"
    code, _ = nvidia
    settings: dict[str, Any] = {"latent_shape": (2,)}
    if kind == "stylegan":
        settings = {"code": str(code), "allow_pickle": True}
    os.mkfifo(file)
    refused("is no regular file, but a pipe", str(file), kind=kind, **settings)
    refused("is no regular file, but a pipe, a socket or a device", "/dev/zero", kind=kind, **settings)
    file.unlink()
    file.touch()
    os.truncate(file, 1 << 40)
    refused("has 1,099,511,627,776 bytes, more than the", str(file), kind=kind, **settings)
    (tmp_path / "more").mkdir()
    os.mkfifo(tmp_path / "more" / "x.py")
    with pytest.raises(UserError, match="is no regular file"):
        files_hash(str(tmp_path / "more"))
    with pytest.raises(UserError, match=r"^--generator.prompts .*is no regular file"):
        protocol.read_prompts(str(tmp_path / "more" / "x.py"))


def test_names_in_a_store_do_not_lead_out_of_the_copy(tmp_path, monkeypatch):
    """A store that keeps such a name; the one of the other tests refuses to."""
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(tiny.save_ddim(tmp_path / "p"), "/bucket/p", recursive=True)
    local = files.filesystem
    there = lambda uri: (store, uri.removeprefix("s3:/")) if uri.startswith("s3://") else local(uri)  # noqa: E731
    monkeypatch.setattr(files, "filesystem", there)
    opened("s3://bucket/p", steps=2)
    store.pipe_file("/bucket/p/../../evil", b"x")
    refused("holds names that lead out of it", "s3://bucket/p")


def test_weights_that_are_pickles_need_permission(tmp_path):
    from safetensors.torch import load_file

    path = tiny.save_ddim(tmp_path / "p")
    expected = opened(path, steps=2).generate([1], Conditions())
    weights = tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    refused("unet/diffusion_pytorch_model.bin is a pickle, which can run any code", path)
    allowed = opened(path, steps=2, allow_pickle=True)
    assert levels_apart(allowed.generate([1], Conditions()), expected) <= 1


def test_pipelines_that_need_more_than_noise_or_text(saved, tmp_path):
    index = Path(saved(tiny.save_stable_diffusion)) / "model_index.json"
    before = index.read_text()
    index.write_text(before.replace('"StableDiffusionPipeline"', '"StableDiffusionImg2ImgPipeline"'))
    try:
        refused("StableDiffusionImg2ImgPipeline needs image", str(index.parent))
    finally:
        index.write_text(before)


@pytest.mark.parametrize(
    ("expected", "settings"),
    [
        ("generator.steps has no meaning for generator.kind 'python'", {"kind": "python", "steps": 3}),
        ("generator.truncation has no meaning for generator.kind 'diffusers'", {"truncation": 0.7}),
        (
            "generator.arguments has no meaning for generator.kind 'stylegan'",
            {"kind": "stylegan", "arguments": {"a": 1}},
        ),
        ("generator.allow-pickle has no meaning", {"kind": "torchscript", "allow_pickle": True}),
    ],
)
def test_settings_of_another_kind(expected, settings):
    with pytest.raises(ValidationError, match=re.escape(expected)):
        GeneratorSettings(**settings)


@pytest.mark.parametrize(
    ("argv", "yaml", "environment"),
    [
        (["--generator.allow-pickle"], "", {}),
        (["--generator.allow_pickle"], "", {}),
        ([], "generator: {allow-pickle: true}", {}),
        ([], "generator: {allow_pickle: true}", {}),
        ([], "", {"PD_CORE_GENERATOR__ALLOW_PICKLE": "true"}),
        (["--generator.allow-pickle"], "generator: {allow_pickle: false}", {}),
    ],
)
def test_permission_to_load_pickles_is_heard(tmp_path, monkeypatch, argv, yaml, environment):
    (tmp_path / "s.yaml").write_text(yaml)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start = ["--config", str(tmp_path / "s.yaml"), "--generator.path", "x"]
    load = partial(settings_load.load, GenerateSettings, prog="generate.py")
    assert load([*start, *argv]).generator.allow_pickle
    assert not load([*start, "--no-generator.allow-pickle"]).generator.allow_pickle
    assert not load(["--generator.path", "x", "--generator.steps", "3"]).generator.allow_pickle or environment


class Asked:
    """A generator as `check_conditions` sees it."""

    def __init__(self, num_classes: int, takes_prompts: bool):
        self.num_classes, self.takes_prompts = num_classes, takes_prompts


@pytest.mark.parametrize(
    ("generator", "labels", "prompts", "expected"),
    [
        (Asked(0, False), None, None, None),
        (Asked(3, False), (0, 2), None, None),
        (Asked(0, True), None, ("a",), None),
        (Asked(0, False), (0,), None, "takes no class labels"),
        (Asked(3, False), None, None, "one of 3 classes"),
        (Asked(3, False), (0, 3), None, "no class 3; this generator has the classes 0 to 2"),
        (Asked(3, False), (-1,), None, "no class -1"),
        (Asked(0, False), None, ("a",), "takes no text"),
        (Asked(0, True), None, None, "draws what a text says"),
    ],
)
def test_conditions_are_held_to_the_generator(generator, labels, prompts, expected):
    if expected is None:
        check_conditions(generator, labels, prompts)
        return
    with pytest.raises(UserError, match=expected):
        check_conditions(generator, labels, prompts)


@pytest.mark.parametrize("family", ["ddim", "ddpm, classes", "stable diffusion"])
def test_every_adapter_refuses_wrong_conditions(saved, family):
    save, settings, conditions = FAMILIES[family]
    generator = opened(saved(save), **settings)
    wrong = Conditions(labels=(4,)) if conditions.prompts is None else Conditions(labels=(0,), prompts=("a",))
    with pytest.raises(UserError, match=r"--generator\.labels"):
        generator.generate([1], wrong)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), None),
        (torch.zeros(3, 8, 8, 3, dtype=torch.uint8), r"gave \[3, 8, 8, 3\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"gave \[2, 3, 8, 8\]"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), r"gave \[2, 8, 8\]"),
        (torch.zeros(2, 0, 8, 3, dtype=torch.uint8), r"gave \[2, 0, 8, 3\]"),
        (torch.zeros(2, 8, 8, 3), "gave torch.float32"),
        ([[0]], "gave list"),
    ],
)
def test_images_are_held_to_the_promise(images, expected):
    if expected is None:
        assert checked(images, 2) is images
        return
    with pytest.raises(UserError, match=expected):
        checked(images, 2)


# ---- TorchScript -----------------------------------------------------------------------------------------------------


class Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 3 * 4 * 4)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.layer(z)).reshape(-1, 3, 4, 4)


class Conditional(torch.nn.Module):
    num_classes: int

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 5

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return z * 0 + labels.reshape(-1, 1, 1, 1).float() / 5


class Unlabelled(torch.nn.Module):
    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return z


class Noisy(torch.nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z + torch.randn_like(z))


class Flat(torch.nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z


@pytest.fixture
def scripted(tmp_path):
    def path(module: torch.nn.Module) -> str:
        file = tmp_path / f"{type(module).__name__}.pt"
        with pytest.warns(FutureWarning):
            torch.jit.save(torch.jit.script(module), str(file))
        return str(file)

    return path


def test_torchscript_gives_the_modules_images(scripted):
    torch.manual_seed(0)
    module = Decoder().eval()
    generator = opened(scripted(module), kind="torchscript", latent_shape=(6,), value_range="0..1")
    assert isinstance(generator, LatentGenerator)
    images = checked(generator.generate([3, 8], Conditions()), 2)
    with torch.no_grad():
        expected = (module(normal_latents([3, 8], (6,))) * 255).round().permute(0, 2, 3, 1)
    assert levels_apart(images, expected.to(torch.uint8)) <= 1
    assert levels_apart(generator.generate([8], Conditions()), images[1:]) <= 1
    latents = generator.latents([3]).requires_grad_()
    generator.decode(latents, Conditions()).sum().backward()
    assert latents.grad is not None and bool((latents.grad != 0).all())
    assert json.loads(json.dumps(generator.identity())) == generator.identity()


@pytest.mark.parametrize(("value_range", "expected"), [("-1..1", (128, 255)), ("0..1", (0, 255)), ("0..255", (0, 1))])
def test_torchscript_value_ranges(scripted, value_range, expected):
    """Outputs 0 and 1 of the module, by its range: the definition of the range."""
    generator = opened(scripted(Flat()), kind="torchscript", latent_shape=(3, 2, 2), value_range=value_range)
    values = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 3, 2, 2)
    images = to_uint8(generator.decode(values, Conditions()))
    assert images[:, 0, 0, 0].tolist() == list(expected)


def test_torchscript_labels(scripted):
    generator = opened(scripted(Conditional()), kind="torchscript", latent_shape=(3, 2, 2), value_range="0..1")
    assert generator.num_classes == 5
    images = generator.generate([1, 2], Conditions(labels=(4, 1)))
    assert images[:, 0, 0, 0].tolist() == [204, 51]  # 4/5 and 1/5 of 255
    with pytest.raises(UserError, match="no class 5"):
        generator.generate([1], Conditions(labels=(5,)))


def test_torchscript_bad_input(scripted, tmp_path):
    options: dict[str, Any] = {"kind": "torchscript", "latent_shape": (3, 2, 2)}
    refused("no such file", str(tmp_path / "absent.pt"), **options)
    refused("Is a directory", str(tmp_path), **options)
    (tmp_path / "text.pt").write_text("x")
    refused("--generator.latent_shape: not set", str(tmp_path / "text.pt"), kind="torchscript")
    refused("not a TorchScript file", str(tmp_path / "text.pt"), **options)
    refused("no integer num_classes", scripted(Unlabelled()), **options)
    with pytest.raises(UserError, match="global random state of torch, so"):
        generate_checked(opened(scripted(Noisy()), **options), [1], Conditions(), "it", "cpu")
    with pytest.raises(UserError, match=r"gave \[1, 6\]"):
        opened(scripted(Flat()), kind="torchscript", latent_shape=(6,)).generate([1], Conditions())


# ---- Python factories ------------------------------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path):
    """The first example of the documentation, word for word; tests/finetune/test_gan.py has the second."""
    code, _ = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S)
    file = tmp_path / "blobs.py"
    file.write_text(code)
    return file


def test_the_documented_factory(example):
    generator = opened(f"{example}:make", kind="python", arguments={"size": 24})
    assert isinstance(generator, LatentGenerator)
    conditions = Conditions(labels=(0, 2, 1))
    images = checked(generator.generate([1, 2, 3], conditions), 3)
    assert images.shape == (3, 24, 24, 3)
    assert levels_apart(generator.generate([2], Conditions(labels=(2,))), images[1:2]) <= 1
    decoded = generator.decode(generator.latents([1, 2, 3]), conditions)
    assert levels_apart(to_uint8(decoded), images) <= 1
    latents = generator.latents([1]).requires_grad_()
    generator.decode(latents, Conditions(labels=(0,))).sum().backward()
    assert latents.grad is not None and bool((latents.grad != 0).any())
    assert json.loads(json.dumps(generator.identity())) == generator.identity()


def test_a_factory_of_a_module(example, monkeypatch):
    monkeypatch.syspath_prepend(str(example.parent))
    generator = opened("blobs:make", kind="python", arguments={"size": 8})
    assert isinstance(generator, Generator)
    assert (generator.identity()["factory"], generator.identity()["file"]) == ("make", files_hash(str(example)))
    monkeypatch.delitem(sys.modules, "blobs")


LACKING = """
class Half:
    num_classes = 0
    takes_prompts = False
    def identity(self): return {}
class NoDecode(Half):
    def generate(self, seeds, conditions): ...
    def latents(self, seeds): ...
class Whole(Half):
    def generate(self, seeds, conditions): ...
class Many(Whole):
    num_classes = "ten"
class Unsaid(Whole):
    takes_prompts = None
class Opaque(Whole):
    def identity(self): return {"weights": object()}
def made(size): return Whole()
number = 3
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Half", "gave Half without generate"),
        ("NoDecode", "gave NoDecode without decode"),
        ("Many", "num_classes is 'ten'"),
        ("Unsaid", "takes_prompts is None"),
        ("Opaque", "identity() gives what JSON cannot hold"),
        ("made", "do not fit made (missing a required argument: 'size')"),
        ("number", "has no function or class number"),
        ("absent", "has no function or class absent"),
    ],
)
def test_factories_that_make_no_generator(tmp_path, name, expected):
    file = tmp_path / "lacking.py"
    file.write_text(LACKING)
    refused(expected, f"{file}:{name}", kind="python")


def test_python_paths(tmp_path):
    refused("expected MODULE:FACTORY or FILE.py:FACTORY", "nothing", kind="python")
    refused("no such file", f"{tmp_path}/absent.py:make", kind="python")
    refused("no module no_such_module", "no_such_module.part:make", kind="python")
    refused("builtins is no file", "builtins:dict", kind="python")
    refused("TypeError: the 'package' argument is required", ".relative:make", kind="python")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("g.py:make", ("g.py", "make")),
        ("/data/a:b/g.py:make", ("/data/a:b/g.py", "make")),
        ("package.module:Factory", ("package.module", "Factory")),
        ("g.py", None),
        (":make", None),
        ("g.py:", None),
        ("g.py:a.b", None),
    ],
)
def test_a_path_is_split_at_its_last_colon(path, expected):
    if expected is None:
        with pytest.raises(UserError, match=r"expected MODULE:FACTORY or FILE\.py:FACTORY"):
            split(path)
        return
    assert split(path) == expected


def test_splitting_a_path_needs_no_torch():
    code = (
        "import sys; from pd_core.generators.python import split; split('g.py:make'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


BROKEN = {  # source of the file -> line and what is said of it
    "x = 1\ndef make(:\n    pass\n": (2, "SyntaxError: invalid syntax"),
    "import json\nimport no_such_dependency\n": (2, "ModuleNotFoundError: No module named 'no_such_dependency'"),
    "import json\n\njson.loads('{')\n": (3, "JSONDecodeError: Expecting property name"),  # not a line of json's
    "import sys\nsys.exit(3)\n": (2, "SystemExit: 3"),
    "def make():\n    return helper()\ndef helper():\n    raise KeyError\n": (4, "KeyError; mend"),
    "def make():\n    raise RuntimeError('two\\nlines')\n": (2, "RuntimeError: two lines"),
    "class make:\n    num_classes, takes_prompts, generate = 0, False, None\n    def identity(self): 1 / 0\n": (
        3,
        "ZeroDivisionError: division by zero",
    ),
}


@pytest.mark.parametrize("source", BROKEN)
@pytest.mark.parametrize("of_module", [False, True])
def test_defects_of_the_users_code_are_one_line_with_its_place(tmp_path, monkeypatch, source, of_module):
    line, expected = BROKEN[source]
    name = f"broken_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    file = tmp_path / f"{name}.py"
    file.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = f"{name if of_module else file}:make"
    refused(f"--generator.path {path}: {file}, line {line}: {expected}", path, kind="python")
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_what_the_users_code_says_itself_stays_as_it_is(tmp_path):
    file = tmp_path / "polite.py"
    file.write_text(
        "from pd_core.core.errors import UserError\ndef make(): raise UserError('weights: none; get some')\n"
    )
    with pytest.raises(UserError, match=r"^weights: none; get some$"):
        opened(f"{file}:make", kind="python")


def test_identity_tells_factories_and_versions_of_a_file_apart(example):
    """small() and large() say the same of themselves; so does a file before and after an edit."""
    text = example.read_text().replace('"code": files_hash(__file__), ', "")
    text += "\n\ndef small(device):\n    return Blobs(8, device)\n\n\ndef large(device):\n    return Blobs(9, device)\n"
    example.write_text(text)
    small, large = (opened(f"{example}:{name}", kind="python").identity() for name in ("small", "large"))
    assert small["generator"] == large["generator"] and small != large
    assert json.loads(json.dumps(small)) == small == opened(f"{example}:small", kind="python").identity()
    example.write_text(text.replace("Blobs(8,", "Blobs(7,"))
    edited = opened(f"{example}:small", kind="python")
    assert edited.identity()["generator"] == small["generator"] and edited.identity() != small
    # and it is the edited file that runs, though this process has imported the one before
    assert edited.generate([1], Conditions(labels=(0,))).shape == (1, 7, 7, 3)


# ---- StyleGAN --------------------------------------------------------------------------------------------------------


@pytest.fixture
def nvidia(tmp_path):
    stand_in = StandIn(tmp_path)
    yield stand_in.code, stand_in.saved
    stand_in.forget()


def stylegan(path: str, code: Path, **settings: Any) -> Any:
    return opened(path, kind="stylegan", code=str(code), allow_pickle=True, **settings)


def test_stylegan_pickles_through_the_code_they_name(nvidia):
    code, saved = nvidia
    generator = stylegan(saved(0), code)
    network = generator._network
    assert isinstance(generator, LatentGenerator)
    images = checked(generator.generate([1, 2, 3], Conditions()), 3)
    assert images.shape == (3, 8, 8, 3)
    assert levels_apart(generator.generate([2], Conditions()), images[1:2]) <= 1
    assert levels_apart(images[0], images[1]) > 1
    latents = generator.latents([1, 2, 3])
    assert torch.equal(latents, normal_latents([1, 2, 3], (4,)))
    with torch.no_grad():  # the network of the pickle itself, called as NVIDIA's scripts call it
        direct = network(latents, torch.zeros(3, 0), truncation_psi=1, noise_mode="const", force_fp32=True)
    theirs = (direct.permute(0, 2, 3, 1) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    assert levels_apart(images, theirs) <= 1
    latents.requires_grad_()
    generator.decode(latents, Conditions()).sum().backward()
    assert latents.grad is not None and bool((latents.grad != 0).all())
    assert json.loads(json.dumps(generator.identity())) == generator.identity()


def test_stylegan_labels_truncation_and_noise(nvidia):
    code, saved = nvidia
    path = saved(3)
    generator = stylegan(path, code)
    assert generator.num_classes == 3
    images = generator.generate([1, 1], Conditions(labels=(0, 2)))
    assert levels_apart(images[0], images[1]) > 1
    with pytest.raises(UserError, match="no class 3"):
        generator.generate([1], Conditions(labels=(3,)))
    mean = stylegan(path, code, truncation=0.0).generate([1, 2], Conditions(labels=(0, 2)))
    assert levels_apart(mean[0], mean[1]) == 0  # psi = 0: the image of the mean latent, whatever the seed
    without = stylegan(path, code, noise="none").generate([1, 1], Conditions(labels=(0, 2)))
    assert levels_apart(images, without) > 1


def test_stylegan_bad_input(nvidia, tmp_path):
    code, saved = nvidia
    path = saved(0)
    refused("a pickle, which can run any code it holds", path, kind="stylegan", code=str(code))
    refused("--generator.code: not set", path, kind="stylegan", allow_pickle=True)
    options: dict[str, Any] = {"kind": "stylegan", "allow_pickle": True}
    refused("has no torch_utils and no dnnlib", path, code=str(tmp_path), **options)
    refused("no such file", str(tmp_path / "absent.pkl"), code=str(code), **options)
    refused("--generator.precision bf16", path, code=str(code), precision="bf16", **options)
    refused("holds no network G_ema", saved(0, "G"), code=str(code), **options)
    buffer = io.BytesIO()
    torch.save({"state": torch.zeros(1)}, buffer)
    (tmp_path / "weights.pkl").write_bytes(buffer.getvalue())
    refused("cannot be unpickled", str(tmp_path / "weights.pkl"), code=str(code), **options)


@pytest.mark.parametrize(
    ("content", "raised"),
    [
        (b"", "EOFError"),
        (b"x", "UnpicklingError"),
        (b"I am text\n", "ValueError"),
        (b"\x8c\x02\xff\xfe.", "UnicodeDecodeError"),
        (b"]K\x01R.", "TypeError"),
        (b"]K\x01K\x02s.", "IndexError"),
        (b"cno_such_module\nname\n.", "ModuleNotFoundError"),
        (b"cjson\nname\n.", "AttributeError"),
    ],
)
def test_files_that_are_no_pickles(nvidia, tmp_path, content, raised):
    (tmp_path / "text.pkl").write_bytes(content)
    with pytest.raises(UserError, match=rf"cannot be unpickled with this code \({raised}: ") as caught:
        stylegan(str(tmp_path / "text.pkl"), nvidia[0])
    assert "\n" not in str(caught.value)


def test_stylegan_in_half_precision_is_described_anywhere_and_runs_on_gpus(nvidia):
    """The driver's machine, which may have no GPU, opens a generator to learn its identity."""
    code, saved = nvidia
    generator = stylegan(saved(0), code, precision="fp16")
    assert generator.identity()["options"]["force_fp32"] is False
    for run in (
        lambda: generator.generate([1], Conditions()),
        lambda: generator.decode(generator.latents([1]), Conditions()),
    ):
        with pytest.raises(
            UserError, match=r"--generator\.precision fp16: this process runs on cpu; StyleGAN runs in fp32"
        ):
            run()


@pytest.mark.parametrize("read", [protocol.read_prompts, protocol.read_file])
def test_a_store_that_refuses_is_one_line(s3_environment, monkeypatch, read):
    """Without credentials botocore's own error comes through, which is no OSError."""

    bucket = s3_environment.make_bucket()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="credentials"):
        read(f"s3://{bucket}/prompts.txt")


# ---- truncated latents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.2, 1.0])
def test_truncated_latents_are_a_truncated_normal_and_change_only_what_lies_beyond(bound):
    """Kolmogorov–Smirnov against scipy's truncnorm, 20,000 entries; those of normal_latents within the bound are
    kept.
    """
    seeds = list(range(200))
    plain, cut = noise.normal_latents(seeds, (100,)), noise.truncated_latents(seeds, (100,), bound)
    inside = plain.abs() <= bound
    assert torch.equal(cut[inside], plain[inside]) and bool((cut.abs() <= bound).all())
    assert stats.kstest(cut.flatten().numpy(), stats.truncnorm(-bound, bound).cdf).pvalue > 1e-3
    assert torch.equal(noise.truncated_latents([7], (100,), bound)[0], cut[7])


def test_the_bound_of_latents_is_the_generators(tmp_path):
    path = tiny.save_bars(tmp_path / "bars.pt")
    plain, cut = (
        open_generator(GeneratorSettings(kind="torchscript", path=path, latent_shape=(4,), latent_bound=bound))
        for bound in (None, 0.5)
    )
    assert isinstance(cut, protocol.LatentGenerator)
    assert bool((cut.latents([1, 2, 3]).abs() <= 0.5).all()) and plain.identity() != cut.identity()
    images = cut.generate([1, 2, 3], protocol.Conditions()).float() / 127.5 - 1
    expected = torch.exp(tiny.RATE * cut.latents([1, 2, 3])) / 4 - 1
    torch.testing.assert_close(images[:, 0, ::4, 0], expected, atol=1 / 127, rtol=0)
    with pytest.raises(ValueError, match=r"latent_bound has no meaning for generator.kind 'diffusers'"):
        GeneratorSettings(path=path, latent_bound=0.5)
