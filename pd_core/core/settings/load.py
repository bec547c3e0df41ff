"""Settings of each workflow from the command line, the environment and YAML files: parsed and checked once.

Precedence, lowest first: defaults, `--preset`, the YAML file of `--config`, environment (`PD_CORE_DATA__SOURCE`),
command line (`--data.source`). Unknown names are refused with the nearest known one, wherever they come from.
This module imports neither torch nor Ray, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from pd_core.core.errors import EXIT_BAD_INPUT, UserError, printable, redact, shown
from pd_core.core.settings.base import ENV_PREFIX, MIB, Section, WorkflowSettings, flatten, nearest_name
from pd_core.core.settings.curate import CurateSettings, GateSettings, RecipeSettings
from pd_core.core.settings.evaluate import EvaluateSettings, TradeoffSettings
from pd_core.core.settings.finetune import FinetuneSettings
from pd_core.core.settings.generate import GenerateSettings, PerturbSettings
from pd_core.core.settings.index import BuildIndexSettings

CONFIG_BYTES = MIB  # of a --config file
MAX_DEPTH, MAX_ALIASES = 32, 100  # in it
_LONG_NUMBER = re.compile(
    r"[-+]?[0-9][0-9a-fA-FxXoO_:.]{63,}"
)  # as YAML reads them, in time that grows with their square
_LISTED: Mapping[str, type[Section]] = {
    "recipes": RecipeSettings,
    "gates": GateSettings,
}  # settings that are lists of sections
WORKFLOWS: Sequence[type[WorkflowSettings]] = (
    BuildIndexSettings,
    GenerateSettings,
    PerturbSettings,
    EvaluateSettings,
    TradeoffSettings,
    FinetuneSettings,
    CurateSettings,
)
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper": {
        # timm 0.5.4, which the authors used, knew these weights as vit_base_patch16_224; today that name means newer
        # ones
        "features": {
            "model": "vit_base_patch16_224.augreg_in21k_ft_in1k",
            "preprocess": "paper",
            "precision": "fp32",
        },
        "index": {"kind": "flat"},
        "density": {"k": 20, "volume_dim": 1.0, "exact": True},
        "estimator": {
            "hidden": (512, 256, 128),
            "learning_rate": 1e-3,
            "batch_size": 64,
            "epochs": 100,
            "patience": 0,
            "standardize": False,
            "target": "density",
            "split": "random",
            "holdout_fraction": 0.2,
        },
    },
    "million": {
        "features": {"precision": "bf16", "batch_size": 128, "part_rows": 8192},
        "density": {"block_rows": 131_072},
        "estimator": {"batch_size": 4096, "epochs": 20, "patience": 3},
    },
}
Settings = TypeVar("Settings", bound=WorkflowSettings)


def setting_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted name of every leaf setting, e.g. `data.source`."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from setting_names(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{field.alias or name}"


EXAMPLES = {  # as JSON on the command line
    "recipes": '[{"name": "typical", "n": 1000, "threshold": "p80", "weight": 20}]',
    "gates": '[{"metric": "precision", "recipe": "typical", "min": 0.6}]',
}


def _help_of_items(name: str, section: type[Section]) -> str:
    """The fields of what a list of sections holds, in the form of the options above it; argparse knows no such list."""
    fields = sorted(section.model_fields.items(), key=lambda item: not item[1].is_required())
    lines = [f"each of {name}, in a file or as --{name} '{EXAMPLES[name]}':"]
    for key, field in fields:
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        told = f"{{{','.join(choices)}}} " if choices else ""
        told += str(field.description)
        if field.is_required():
            told += " (required)"
        elif field.default is not None:
            told += f" (default: {field.default})"
        lines += textwrap.wrap(told, 79, initial_indent=f"  {key:<20}  ", subsequent_indent=" " * 24)
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """argparse that reports a wrong option as one line with the nearest name."""

    known: Sequence[str] = ()

    def spell_out_letters(self) -> None:
        """Let a setting of one letter be written --n like all others, where pydantic-settings offers -n alone."""
        for action in self._actions:
            for option in [o for o in action.option_strings if len(o) == 2 and o != "-h"]:
                action.option_strings = [*action.option_strings, f"-{option}"]
                self._option_string_actions[f"-{option}"] = action

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0] if "unrecognized" in message else None
        if unknown and unknown.startswith("-"):
            name = unknown.lstrip("-").partition("=")[0]
            message = f"unknown setting --{name}; {nearest_name(name, self.known)}"
        elif unknown:
            message = f"unexpected argument {unknown!r}; settings are written --section.name value"
        print(shown(f"{self.prog}: error: {message}"), file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


@dataclass
class _Level:
    """A list or a mapping of a YAML file while it is read: the keys so far, and whether the next node is one."""

    keys: set[str] | None
    anchored: bool
    at_key: bool = True


def _check_yaml(data: bytes, where: str) -> None:
    """Hold a file to what settings need, before anything is made of it.

    Raises:
        UserError: it nests or repeats itself too much, or has a key twice; names the place.
        yaml.YAMLError: it is no YAML.
    """
    levels: list[_Level] = []
    aliases = 0
    for event in yaml.parse(data, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            levels.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        fault = _fault_of_key(levels[-1], event) if levels else ""
        if isinstance(event, yaml.ScalarEvent) and event.style is None and _LONG_NUMBER.fullmatch(event.value):
            fault = "a number of so many digits"
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            if aliases > MAX_ALIASES or any(level.anchored for level in levels):
                fault = "what is repeated repeats something itself, or too much is"
        elif isinstance(event, yaml.CollectionStartEvent):
            keys: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
            levels.append(_Level(keys, event.anchor is not None))
            fault = fault or ("is nested too deeply" if len(levels) > MAX_DEPTH else "")
        if fault:
            mark = event.start_mark
            place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
            raise UserError(f"{where}: {place}{fault}; mend the file")


def _fault_of_key(level: _Level, event: yaml.NodeEvent) -> str:
    """That a node of the level is a key that it has already, in either spelling; else nothing."""
    is_key, level.at_key = level.at_key, not level.at_key
    if level.keys is None or not is_key or not isinstance(event, yaml.ScalarEvent):
        return ""
    key = str(event.value).replace("-", "_")
    if key in level.keys:
        return f"{printable(key)[:80]!r} is set twice"
    level.keys.add(key)
    return ""


def _read_config(path: str, where: str) -> bytes:
    from pd_core.core import files

    try:
        with files.explained(where):
            return files.read_file(path, where, CONFIG_BYTES)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UserError(f"{where}: no such file; check the path") from None
        raise


def _read_yaml(path: str, known: Sequence[str]) -> dict[str, Any]:
    where = f"--config {path}"
    data = _read_config(path, where)
    try:
        _check_yaml(data, where)
        values = yaml.safe_load(data) or {}
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of a date or a number that none is
        raise UserError(f"{where}: not YAML ({' '.join(str(error).split())}); mend the file") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected 'section:' entries, found {type(values).__name__}; mend the file")
    accepted = {name.replace("-", "_") for name in known}
    for key, _ in flatten(values):
        path_of = key.replace("-", "_").split(".")
        # a setting that is itself a mapping holds keys of its own
        if not any(".".join(path_of[:depth]) in accepted for depth in range(1, len(path_of) + 1)):
            raise UserError(f"--config {path}: unknown setting '{key}'; {nearest_name(key, known)}")
    return values


def _refuse_unknown_environment(known: Sequence[str]) -> None:
    everywhere = [*known, *(name for workflow in WORKFLOWS for name in setting_names(workflow))]  # one shell, many runs
    accepted = {ENV_PREFIX + name.replace(".", "__").replace("-", "_").upper() for name in everywhere}
    for variable in os.environ:
        if variable.upper().startswith(ENV_PREFIX) and variable.upper() not in accepted:
            name = variable[len(ENV_PREFIX) :].lower().replace("__", ".")
            raise UserError(f"environment {variable}: unknown setting '{name}'; {nearest_name(name, known)}")


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden" and (of := _LISTED.get(str(item["loc"][0]))):
            message = f"unknown setting; {nearest_name(str(item['loc'][-1]), list(of.model_fields))}"
        found = f" (found {item['input']!r})" if item["loc"] and not isinstance(item["input"], BaseModel | dict) else ""
        found = redact(re.sub(r"//.*@", "//***@", found))  # a URL with a password in it, which may hold a slash
        lines.append(f"{name}: {message[0].lower()}{message[1:]}{found}" if name else message)
    return "; ".join(lines)


def _is_list(model: type[BaseModel], name: str) -> bool:
    """Whether a setting of the workflow itself, not of a section, is a list."""
    return any((f.alias or n) == name and get_origin(f.annotation) is list for n, f in model.model_fields.items())


def _spelled(argument: str, known: Sequence[str]) -> str:
    """An option with the hyphens or underscores that its setting has; anything else as it is."""
    name, given, value = argument[2:].partition("=")
    no, plain = ("no-", name[3:]) if name.startswith("no-") else ("", name)
    plain = plain.replace("-", "_")
    if not argument.startswith("--") or not (same := [k for k in known if k.replace("-", "_") == plain]):
        return argument
    return f"--{no}{same[0]}{given}{value}"


def _spread(argv: Sequence[str], lists: Collection[str]) -> list[str]:
    """`--samples a b` as `--samples a --samples b`, which is what pydantic-settings reads."""
    spread: list[str] = []
    option, waiting = "", False  # the list that is being given; whether its first value is still to come
    for argument in argv:
        if argument.startswith("--"):
            name, given, _ = argument[2:].partition("=")
            option = argument.partition("=")[0] if name in lists else ""
            waiting = bool(option) and not given
        elif option and not waiting:
            spread.append(option)
        else:
            waiting = False
        spread.append(argument)
    return spread


def load(settings_class: type[Settings], argv: Sequence[str], prog: str) -> Settings:
    """Resolve settings from presets, YAML, environment and command line.

    Args:
        settings_class: the workflow's settings.
        argv: arguments without the program name.
        prog: program name shown by --help.

    Raises:
        UserError: a file, a variable or a value is wrong.
        SystemExit: --help (0), or an unknown option (2, after one line on standard error).
    """
    known = list(setting_names(settings_class))
    _refuse_unknown_environment(known)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=os.environ.get(f"{ENV_PREFIX}CONFIG"))
    first.add_argument("--preset", default=os.environ.get(f"{ENV_PREFIX}PRESET"))
    early, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    from_yaml = _read_yaml(early.config, known) if early.config else {}
    preset = early.preset or from_yaml.get("preset", "default")
    from_preset = dict(PRESETS.get(preset, {})) if "preset" in settings_class.model_fields else {}

    parser = _Parser(prog=prog, description=inspect.getdoc(settings_class), allow_abbrev=False)
    parser.known = known
    if listed := [name for name in _LISTED if name in settings_class.model_fields]:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter  # of the epilog, which has its lines
        parser.epilog = "\n\n".join(_help_of_items(name, _LISTED[name]) for name in listed)

    class Resolved(settings_class):  # type: ignore[valid-type, misc]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            # pydantic-settings puts the command line in front of these by itself
            return (
                EnvSettingsSource(settings_cls),
                InitSettingsSource(settings_cls, from_yaml),
                InitSettingsSource(settings_cls, from_preset),
            )

    lists = {name for name in known if _is_list(settings_class, name)}
    argv = _spread([_spelled(argument, known) for argument in argv], lists)
    cli: CliSettingsSource[Any] = CliSettingsSource(
        Resolved,
        root_parser=parser,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )
    parser.spell_out_letters()
    try:
        return resolved(settings_class, Resolved(_cli_settings_source=cli(args=list(argv))))
    except SettingsError as error:
        raise UserError(f"settings: {_told_unparsed(error)}") from None
    except ValidationError as error:
        raise UserError(f"settings: {_explain(error)}") from None
    except RecursionError:
        raise UserError(f"settings: {_deepest(argv)}: is nested too deeply; write it in a --config file") from None


def _deepest(argv: Sequence[str]) -> str:
    """The option or variable whose value opens most brackets."""
    named = {argument.partition("=")[0]: argument for argument in argv}
    named |= {option: value for option, value in pairwise(argv) if option.startswith("--")}
    named |= {name: value for name, value in os.environ.items() if name.upper().startswith(ENV_PREFIX)}
    return max(named, key=lambda name: named[name].count("[") + named[name].count("{"))[:80]


def _told_unparsed(error: SettingsError) -> str:
    """Of a value that is no JSON, where a list or a section is wanted."""
    found = re.search(r'field "(\w+)" from source "(\w+)"', str(error))
    if found is None:
        return " ".join(str(error).split())
    name = f"{ENV_PREFIX}{found[1].upper()}" if found[2].startswith("Env") else f"--{found[1]}"
    why = "" if error.__cause__ is None else f" ({' '.join(str(error.__cause__).split())})"
    return f"{name}: is not JSON{why}; names in it are quoted, as --help shows, or write it in a --config file"


def made(settings_class: type[Settings], **values: Any) -> Settings:
    """Settings of a workflow that another one starts: these values, defaults for the others, the environment unread.

    Raises:
        UserError: as `load`.
    """

    class Given(settings_class):  # type: ignore[valid-type, misc]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)

    try:
        return resolved(settings_class, Given(**values))
    except ValidationError as error:
        raise UserError(f"settings: {_explain(error)}") from None


def resolved(settings_class: type[Settings], settings: BaseModel, **values: Any) -> Settings:
    """The settings as an instance of a class that has the same, with these values in the place of theirs, which are
    valid.
    """
    given = {name: getattr(settings, name) for name in settings_class.model_fields} | values
    return cast("Settings", settings_class.model_construct(**given))


def to_yaml(settings: BaseModel) -> str:
    """Resolved settings as YAML that `--config` accepts again."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
