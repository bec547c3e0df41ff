"""`pd-core COMMAND ...`: every workflow under one command, which workflows/*.py run by the names of their files.

Like config, this module imports neither torch nor Ray, so `--help` and refused settings are instant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Generic

from pd_core.core import errors
from pd_core.core.settings import load
from pd_core.core.settings.base import nearest_name
from pd_core.core.settings.curate import CurateSettings
from pd_core.core.settings.evaluate import EvaluateSettings, TradeoffSettings
from pd_core.core.settings.finetune import FinetuneSettings
from pd_core.core.settings.generate import GenerateSettings, PerturbSettings
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.core.settings.load import Settings

PROG = "pd-core"


@dataclass(frozen=True)
class Command(Generic[Settings]):
    """A workflow: its settings, whose docstring says what it does, and what runs or plans it by them."""

    settings: type[Settings]
    start: Callable[[Settings], int | None]


def run(name: str, argv: Sequence[str], prog: str = "") -> int | None:
    """Parse the settings of a command, then run or plan it; returns the exit code where it has codes of its own.

    Args:
        name: a key of COMMANDS.
        argv: arguments after the name.
        prog: what --help calls the program; `pd-core NAME` if empty.
    """
    command = COMMANDS[name]
    return command.start(load.load(command.settings, argv, prog=prog or f"{PROG} {name}"))


def main() -> int:
    """The console script `pd-core`; returns the exit code."""
    return errors.exit_code(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> int | None:
    if not argv:
        raise errors.UserError(f"{PROG}: no command given; see --help for all commands")
    if argv[0] in ("-h", "--help", "--version"):
        print(f"{PROG} {metadata.version(PROG)}" if argv[0] == "--version" else _help())
        return None
    name = argv[0].removesuffix(".py").replace("_", "-")  # messages name the commands by the files of workflows/
    if name not in COMMANDS:
        nearest = nearest_name(name, list(COMMANDS), "commands")
        raise errors.UserError(f"{PROG} {argv[0]}: no such command; {nearest}")
    return run(name, argv[1:])


def _help() -> str:
    lines = [f"  {name:<12} {str(of.settings.__doc__).splitlines()[0]}\n" for name, of in COMMANDS.items()]
    return (
        f"usage: {PROG} COMMAND [--section.name VALUE ...]\n\ncommands:\n{''.join(lines)}\n"
        f"{PROG} COMMAND --help lists every setting of a command; {PROG} --version tells the version.\n"
        "Where a message names build_index.py, build-index is meant; the command has either name."
    )


# ---- The commands; what they import is heavy, so it comes late -------------------------------------------------------


def _build_index(settings: BuildIndexSettings) -> None:
    from pd_core.build import workflow as build_workflow

    (build_workflow.plan_build_index if settings.dry_run else build_workflow.build_index)(settings)


def _generate(settings: GenerateSettings) -> None:
    from pd_core.generate import verify, workflow

    if settings.verify is not None:
        told = (settings.generator, settings.verify_seed, settings.index, settings.checkpoint)
        verify.verify(settings.verify, settings.rows, *told)
    else:
        (workflow.plan_generate if settings.dry_run else workflow.generate)(settings)


def _perturb(settings: PerturbSettings) -> None:
    from pd_core.perturb import workflow as perturb_workflow

    (perturb_workflow.plan_perturb if settings.dry_run else perturb_workflow.perturb)(settings)


def _evaluate(settings: EvaluateSettings) -> None:
    from pd_core.evaluate import workflow as evaluate_workflow

    (evaluate_workflow.plan_evaluate if settings.dry_run else evaluate_workflow.evaluate)(settings)


def _tradeoff(settings: TradeoffSettings) -> None:
    from pd_core.evaluate.tradeoff import workflow as tradeoff_workflow

    (tradeoff_workflow.plan_tradeoff if settings.dry_run else tradeoff_workflow.compare)(settings)


def _finetune(settings: FinetuneSettings) -> None:
    from pd_core.finetune import workflow as finetune_workflow

    (finetune_workflow.plan_finetune if settings.dry_run else finetune_workflow.finetune)(settings)


def _curate(settings: CurateSettings) -> int:
    from pd_core.curate import verify
    from pd_core.curate import workflow as curate_workflow

    if settings.verify is not None:
        verify.verify_release(settings.verify)
    elif settings.dry_run:
        curate_workflow.plan_curate(settings)
    else:
        return curate_workflow.curate(settings)
    return errors.EXIT_DONE


COMMANDS: Mapping[str, Command[Any]] = {
    "build-index": Command(BuildIndexSettings, _build_index),
    "generate": Command(GenerateSettings, _generate),
    "perturb": Command(PerturbSettings, _perturb),
    "evaluate": Command(EvaluateSettings, _evaluate),
    "tradeoff": Command(TradeoffSettings, _tradeoff),
    "finetune": Command(FinetuneSettings, _finetune),
    "curate": Command(CurateSettings, _curate),
}


if __name__ == "__main__":
    sys.exit(main())
