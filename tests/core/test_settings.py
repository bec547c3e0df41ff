"""Settings: precedence, refusals with the nearest name, --help at once."""

import os
import re
from itertools import pairwise
from pathlib import Path

import pytest

from pd_core.core.errors import UserError
from pd_core.core.settings import index
from pd_core.core.settings import load as settings_load
from pd_core.core.settings.base import WorkflowSettings
from pd_core.core.settings.curate import CurateSettings, GateSettings, RecipeSettings
from pd_core.core.settings.evaluate import TradeoffSettings
from pd_core.core.settings.finetune import FinetuneSettings
from pd_core.core.settings.generate import GenerateSettings
from pd_core.core.settings.index import BuildIndexSettings
from pd_core.core.settings.load import CONFIG_BYTES, EXAMPLES, setting_names, to_yaml

ROOT = Path(__file__).resolve().parents[2]


def load(*argv: str) -> BuildIndexSettings:
    return settings_load.load(BuildIndexSettings, argv, prog="build_index.py")


def test_precedence_command_line_over_environment_over_yaml_over_preset_over_default(tmp_path, monkeypatch):
    file = tmp_path / "settings.yaml"
    file.write_text("preset: paper\ndensity: {k: 7}\nestimator: {batch_size: 32, seed: 5}\nfeatures: {batch_size: 3}\n")
    monkeypatch.setenv("PD_CORE_ESTIMATOR__SEED", "6")
    monkeypatch.setenv("PD_CORE_FEATURES__BATCH_SIZE", "4")
    settings = load("--config", str(file), "--features.batch_size", "5")
    assert settings.features.batch_size == 5  # command line
    assert settings.estimator.seed == 6  # environment
    assert settings.density.k == 7 and settings.estimator.batch_size == 32  # file, over the preset's 20 and 64
    assert settings.estimator.target == "density"  # preset
    assert settings.index.target_recall == 0.99  # default


def test_paper_preset_is_the_reference_of_the_paper():
    settings = load("--preset", "paper")
    assert (settings.features.model, settings.features.preprocess) == (
        "vit_base_patch16_224.augreg_in21k_ft_in1k",
        "paper",
    )
    assert (settings.density.k, settings.density.volume_dim, settings.density.exact) == (20, 1.0, True)
    fit = settings.estimator
    assert (fit.hidden, fit.learning_rate, fit.batch_size, fit.epochs) == ((512, 256, 128), 1e-3, 64, 100)
    assert (fit.standardize, fit.target, fit.split, fit.holdout_fraction, fit.patience) == (
        False,
        "density",
        "random",
        0.2,
        0,
    )


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--data.sourc=x", "did you mean 'data.source'?"),
        ("--k=3", "did you mean 'density.k'?"),
        ("--dryrun", "did you mean 'dry-run'?"),
        ("--zzzzzz=1", "see --help"),
        ("--data.so=x", "unknown setting"),  # an abbreviation is not a name
    ],
)
def test_unknown_option_exits_2_with_one_line(argument, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        load(argument)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert expected in error and "\n" not in error


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--density.k", "0"], "density.k"),
        (["--density.k", "many"], "density.k"),
        (["--density", "3"], "density"),
        (["--preset", "papr"], "'default', 'paper' or 'million'"),
        (["--index.kind", "hnsw"], "index.kind"),
        (["--data.labels", "folder"], "none, parent, column:NAME or member:EXT"),
        (["--data.background", "1,2,300"], "0..255"),
        (["--density.exact", "--index.kind", "ivf_flat"], "drop density.exact"),
        (["--index.kind", "flat", "--index.cells", "8"], "index.cells"),
        (["--config", "/nowhere/at/all.yaml"], "no such file"),
        (["--density.volume_dim", "inf"], "density.volume_dim: input should be a finite number"),
        (["--estimator.hidden", "512,0"], "estimator.hidden.1: input should be greater than 0"),
        (["--tracking.uri", "https://me:secret@host"], "MLFLOW_TRACKING_PASSWORD) (found 'https://***@host')"),
        (["--tracking.uri", "https://me:se/cret@host"], "tracking.uri: must not hold a name or password"),
        (["--data.source", "s3://KEY:se/cret@bucket/x"], "data.source: must not hold a name or password"),
        (["--output", "s3://KEY:secret@bucket/x"], "output: must not hold a name or password"),
        (["--data.source", "https://h/x?X-Amz-Signature=secret"], "data.source: must not hold a query"),
        (["--data.source", "https://h/x?secret"], "(found 'https://h/x?***')"),
        (["--features.checkpoint", "s3://b/w.pt?versionId=secret"], "features.checkpoint: must not hold a query"),
        (["--output", "s3://b/x?token=secret"], "output: must not hold a query"),
        (["--tracking.uri", "http://h:5000/?token=secret"], "tracking.uri: must not hold a query"),
    ],
)
def test_wrong_values_are_one_line_that_names_the_setting(argv, expected):
    with pytest.raises(UserError) as error:
        load(*argv)
    assert expected in str(error.value) and "\n" not in str(error.value) and "cret" not in str(error.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://[::1]:5000",
        "http://host:5000/a:b@c",
        "s3://bucket/a@b/*.png",
        "sqlite:///a@b",
        "s3://b/year=20??/*/?.png",
        "/disk/what?name=x.png",
    ],
)
def test_urls_without_a_password_or_a_query_are_settings(uri):
    assert load("--data.source", uri).data.source == uri


LAUGHS = "data: &a [x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghij")
)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, "line 2, column 8: what is repeated repeats something itself"),
        ("data: &a {source: *a}", "line 1, column 19: what is repeated repeats"),
        ("data: &a [x]\nindex: [" + "*a, " * 101 + "]", "line 2, column 409: .* or too much is"),
        ("data: " + "[" * 100_000, "line 1, column 38: is nested too deeply"),
        ("{a: " * 40, "line 1, column 129: is nested too deeply"),
        ("- " * 100_000, "line 1, column 65: is nested too deeply"),
        ("data: {source: a}\noutput: b\ndata: {source: c}", "line 3, column 1: 'data' is set twice"),
        ("data: {source: a, source: c}", "line 1, column 19: 'source' is set twice"),
        ("max-candidates: 1\nmax_candidates: 2", "line 2, column 1: 'max_candidates' is set twice"),
        ("output: 2001-99-99", "not YAML"),  # a date that none is
        (f"output: {'9' * 5000}", "line 1, column 9: a number of so many digits"),
        ("output: 1" + ":1" * 9_999, "line 1, column 9: a number of so many digits"),  # to base 60
        (f"output: 0x{'f' * 10_000}", "line 1, column 9: a number of so many digits"),
        ("? [a]\n: b", "not YAML"),
        ("output: !!python/object/apply:os.system [ls]", "not YAML .*line 1, column 9"),
        ("output: \x00", "not YAML"),
        ("a: b: c", "not YAML .*line 1, column 5"),
        ("# " + "x" * CONFIG_BYTES, "has 1,048,578 bytes, more than the 1,048,576"),
        ("data: {sorce: x}", r"unknown setting 'data\.sorce'; did you mean 'data\.source'\?"),
        ("dat: {source: x}", r"unknown setting 'dat\.source'"),
        ("- a list", "expected 'section:' entries"),
        ("a: [", "not YAML"),
    ],
    ids=range(22),
)
def test_yaml_of_strangers_is_one_line_that_names_the_place(tmp_path, text, expected):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"^--config {file}: [^\n]*{expected}"):
        load("--config", str(file))


@pytest.mark.timeout(30)
def test_a_file_of_settings_without_an_end_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "settings.yaml")
    for path in (tmp_path / "settings.yaml", "/dev/zero"):
        with pytest.raises(UserError, match=rf"^--config {path}: is no regular file"):
            load("--config", str(path))
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=rf"^--config {path}: .*check the path"):
            load("--config", str(path))


def test_yaml_may_repeat_what_it_names(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("data: {source: &name images}\noutput: *name\nindex: &i {cells: 5}\n")
    assert load("--config", str(file)).output == "images"


@pytest.mark.parametrize("by", ["argument", "variable"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 5000 + "]" * 5000, "is nested too deeply; "),
        ('[{"name": ' + "[" * 5000 + "]" * 5000 + "}]", "is nested too deeply; "),
        ("[{name: a, n: 5}]", "is not JSON .*--config file$"),
    ],
    ids=["deep", "deep inside", "no JSON"],
)
def test_a_list_that_cannot_be_read_is_one_line(monkeypatch, by, text, expected):
    argv = ["--output", "x", "--recipes", text] if by == "argument" else []
    if by == "variable":
        monkeypatch.setenv("PD_CORE_RECIPES", text)
    name = {"argument": "--recipes", "variable": "PD_CORE_RECIPES"}[by]
    with pytest.raises(UserError, match=rf"^settings: {name}: {expected}[^\n]*$"):
        settings_load.load(CurateSettings, argv, prog="curate.py")


def test_unknown_environment_variable_is_refused(monkeypatch):
    monkeypatch.setenv("PD_CORE_DATA__SORCE", "x")
    with pytest.raises(UserError, match=r"PD_CORE_DATA__SORCE.*did you mean 'data.source'"):
        load()


def test_printed_settings_are_accepted_again(tmp_path):
    first = load("--preset", "paper", "--data.source", "images", "--data.background", "1,2,3", "--output", "out")
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(first))
    assert load("--config", str(file)).model_copy(update={"config": None}) == first


def test_help_names_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        load("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for name in setting_names(BuildIndexSettings):
        assert f"--{name}" in text
    assert "(default: 0.99)" in text and "(default: 67108864)" in text


def test_help_of_curate_names_what_recipes_and_gates_may_hold(capsys):
    with pytest.raises(SystemExit):
        settings_load.load(CurateSettings, ["--help"], prog="curate.py")
    _, recipes, gates = re.split(r"each of (?:recipes|gates), .*", capsys.readouterr().out)
    for text, section in ((recipes, RecipeSettings), (gates, GateSettings)):
        assert re.findall(r"^  ([a-z_]+) ", text, re.MULTILINE) == sorted(
            section.model_fields, key=lambda name: not section.model_fields[name].is_required()
        )
    assert re.search(r"n +accepted images \(required\)", recipes) and "{index,judge} where it is measured" in gates


def test_what_help_shows_of_recipes_and_gates_is_accepted():
    recipes, gates = EXAMPLES["recipes"], EXAMPLES["gates"]
    settings = settings_load.load(CurateSettings, ["--recipes", recipes, "--gates", gates], prog="curate.py")
    assert settings.recipes[0].name == settings.gates[0].recipe == "typical"


@pytest.mark.parametrize("file", sorted((ROOT / "workflows" / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_load(file):
    text = file.read_text()
    marks: dict[str, type[WorkflowSettings]] = {
        "recipes:": CurateSettings,
        "training:": FinetuneSettings,
        "thresholds:": TradeoffSettings,
        "generator:": GenerateSettings,
    }
    workflow = next((settings for mark, settings in marks.items() if mark in text), index.BuildIndexSettings)
    assert settings_load.load(workflow, ["--config", str(file)], prog="test").output


@pytest.mark.parametrize(
    ("workflow", "argv", "expected"),
    [
        (
            GenerateSettings,
            ["--generator.arguments", '{"a": [{"b": "https://h/x?sig=1"}]}'],
            r"generator\.arguments: must not hold a query",
        ),
        (CurateSettings, ["--lock.lease_s", "1e9"], r"lock\.lease_s: input should be less than or equal to 604800"),
    ],
    ids=["a query at any depth", "a lease longer than a lock may block"],
)
def test_what_other_workflows_refuse(workflow, argv, expected):
    with pytest.raises(UserError, match=expected):
        settings_load.load(workflow, argv, prog="x")


@pytest.mark.parametrize("argv", [["--data.follow-links"], ["--data.follow_links"]])
def test_links_are_followed_where_it_is_asked_for(argv, tmp_path):
    assert load(*argv).data.follow_links
    assert not load("--data.source", "x").data.follow_links
    file = tmp_path / "settings.yaml"
    for text in ("data: {follow-links: true}", "data: {follow_links: true}"):
        file.write_text(text)
        assert load("--config", str(file)).data.follow_links
    file.write_text(to_yaml(load(*argv)))
    assert load("--config", str(file)).data.follow_links


@pytest.mark.parametrize("name", ["max_bad_fraction", "max-bad-fraction"])
def test_hyphens_and_underscores_of_options_are_one(name):
    given = [f"--data.{name}", "0.5", "--data.follow_links", "--no-tracking.enabled"]
    settings = settings_load.load(BuildIndexSettings, given, prog="x")
    assert (settings.data.max_bad_fraction, settings.data.follow_links, settings.tracking.enabled) == (0.5, True, False)
