"""What a training leaves behind, as parts of its stage: states to go on from, averages of each evaluation, what was
measured.

    state-00000100.pt               everything that step 100 and later depend on; the newest few are kept
    average-00000100.safetensors    the moving average of the generator's weights at an evaluation
    companions-00000100.safetensors a GAN's networks in training, which are saved beside it
    samples-00000100.parquet        a few images of that evaluation, from the same seeds each time
    evaluations.parquet, history.parquet, summary.json    written when the training is over

Each part is one write with a record of its hash (artifacts.Stage), on any store; a state whose bytes do not have it is
not taken up. Ray Train's own checkpoints are not used: they are registered some time after they were reported, and a
driver that dies in between loses them.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pd_core.core import artifacts, files, schemas
from pd_core.core.errors import RunError
from pd_core.engine import console
from pd_core.finetune import judge as finetune_judge

if TYPE_CHECKING:
    import torch

AT_EVALUATIONS = ("average", "companions", "samples")  # kinds of parts, which are written once and not read again
SUMMARY, EVALUATIONS, HISTORY = "summary.json", "evaluations.parquet", "history.parquet"
HISTORY_ROWS = 2000  # steps that are logged, at most; of more, every so manieth


@dataclass
class Progress:
    """How far a training is; part of its state.

    Attributes:
        step: steps done.
        history: (step, name, value) of what was logged.
        evaluations: rows of schemas.evaluations().
        best: step of the best evaluation. waited: evaluations since.
        finished: no step follows. stopped_early: because `waited` reached the patience.
        replaced: draws whose image could not be read, and had another in its place.
    """

    step: int = 0
    history: list[tuple[int, str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best: int = 0
    waited: int = 0
    finished: bool = False
    stopped_early: bool = False
    replaced: int = 0

    def value(self, step: int, metric: str) -> float:
        """Of an evaluation."""
        return next(row["value"] for row in self.evaluations if (row["step"], row["metric"]) == (step, metric))

    def judge(self, metric: str, patience: int) -> None:
        """Take the evaluation of this step into account, which was added last."""
        if self.step == 0 or finetune_judge.better(
            metric, self.value(self.step, metric), self.value(self.best, metric)
        ):
            self.best, self.waited = self.step, 0
        else:
            self.waited += 1
        self.stopped_early = bool(patience) and self.waited >= patience

    def summary(self, metric: str) -> dict[str, Any]:
        """JSON-able, without the tables. metric: that chose the best step."""
        return {
            "steps": self.step,
            "best": self.best,
            "best_value": self.value(self.best, metric),
            "stopped_early": self.stopped_early,
            "replaced": self.replaced,
        }


def average_name(step: int) -> str:
    """Part of the averaged weights."""
    return f"average-{step:08d}.safetensors"


def companions_name(step: int) -> str:
    """Part of what is saved with the averaged weights."""
    return f"companions-{step:08d}.safetensors"


def samples_name(step: int) -> str:
    """Part of the images."""
    return f"samples-{step:08d}.parquet"


def by_step(names: Iterable[str], kind: str) -> dict[int, str]:
    """Those of a kind, such as `state`, by their step, ascending."""
    form = re.compile(rf"{kind}-(\d{{8}})\.\w+")
    return {int(found[1]): name for name in sorted(names) if (found := form.fullmatch(name))}


def write_state(stage: artifacts.Stage, progress: Progress, model: Mapping[str, Any], keep: int) -> None:
    """Write the state of a step, then drop all but the newest `keep`."""
    import torch

    sink = io.BytesIO()
    torch.save({"progress": asdict(progress), "model": model}, sink)
    stage.write_part(f"state-{progress.step:08d}.pt", bytes(sink.getbuffer()), 0)
    for name in list(by_step(stage.finished_parts(), "state").values())[:-keep]:
        stage.drop_part(name)


def drop_after_loss(stage: artifacts.Stage) -> None:
    """Where parts that training writes once and reads no more are gone or cut short: drop the states behind the first
    of them, and the summary, so that training goes on from before it and writes them again.
    """
    lost = stage.lost_parts()
    states = set(by_step(lost, "state").values())
    for name in states:
        stage.drop_part(name)
    if not lost.keys() - states:
        return
    stage.drop_part(SUMMARY)
    if written := [step for kind in AT_EVALUATIONS for step in by_step(lost, kind)]:
        for step, name in by_step(stage.finished_parts(), "state").items():
            if step >= min(written):
                stage.drop_part(name)
        console.say(f"training: {artifacts.told_damage(lost)}; going on from before step {min(written)}")


def newest(stage: artifacts.Stage) -> int:
    """Step of the last state, -1 where there is none."""
    return max(by_step(stage.finished_parts(), "state"), default=-1)


def newest_state(stage: artifacts.Stage) -> str | None:
    """Part of the last whole state; those before it are gone where a later one was broken."""
    parts = stage.finished_parts()
    for name in reversed(by_step(parts, "state").values()):
        if artifacts.sha256(_state_bytes(stage, name)) == parts[name].sha256:
            return name
        console.say(f"training: {name} is not as it was written; going on from the one before")
        stage.drop_part(name)
    return None


def read_state(stage: artifacts.Stage, name: str, device: str) -> tuple[Progress, dict[str, Any]]:
    """(progress, state of the model) of a part; tensors on the device."""
    import torch

    data = _state_bytes(stage, name)
    values = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    return Progress(**values["progress"]), values["model"]


def _state_bytes(stage: artifacts.Stage, name: str) -> bytes:
    """Raises RunError: it has gone since it was found, which a run does that is still writing its own states here."""
    uri = files.join(stage.uri, name)
    try:
        return files.read_bytes(uri)
    except FileNotFoundError:
        raise RunError(
            f"{uri}: gone since it was found, another run of this --output is still writing; end it, or run the same "
            "command again when it is over"
        ) from None


def write_average(
    stage: artifacts.Stage, step: int, weights: Mapping[str, torch.Tensor], companions: Mapping[str, torch.Tensor]
) -> None:
    """Write the averaged weights of an evaluation, and what is saved with them, where there is any."""
    stage.write_part(average_name(step), to_safetensors(weights), 0)
    if companions:
        stage.write_part(companions_name(step), to_safetensors(companions), 0)


def to_safetensors(weights: Mapping[str, torch.Tensor]) -> bytes:
    """The file of some weights; tensors that share memory are written each by itself."""
    import safetensors.torch

    return bytes(safetensors.torch.save({name: value.contiguous().clone() for name, value in weights.items()}))


def read_weights(uri: str) -> dict[str, torch.Tensor]:
    """Weights of a safetensors file, on the CPU."""
    import safetensors.torch

    return dict(safetensors.torch.load(files.read_bytes(uri)))


def write_results(stage: artifacts.Stage, progress: Progress, metric: str, rates: Mapping[str, float]) -> None:
    """Write what was measured and logged; the summary last.

    metric: that chose the best step. rates: how fast it was, which no result depends on.
    """
    stage.write_table(EVALUATIONS, pa.Table.from_pylist(progress.evaluations, schema=schemas.evaluations()))
    rows = [dict(zip(("step", "name", "value"), row, strict=True)) for row in progress.history]
    stage.write_table(HISTORY, pa.Table.from_pylist(rows, schema=schemas.history()))
    stage.write_part(SUMMARY, json.dumps(progress.summary(metric) | dict(rates)).encode(), 0)


def read_summary(stage: artifacts.Stage) -> dict[str, Any] | None:
    """What `write_results` left, where the training is over."""
    if SUMMARY not in stage.finished_parts():
        return None
    return dict(files.read_json(files.join(stage.uri, SUMMARY)))
