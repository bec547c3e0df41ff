"""Where the images of an index are: the source and the listing that an output of build_index was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pd_core.core import artifacts, files, trust
from pd_core.core.errors import UserError
from pd_core.core.settings.data import DataSettings
from pd_core.engine import resources, runs, tasks
from pd_core.images import listing, sources
from pd_core.images.sources.names import unescape

SOURCE = "--source"


def original_of(uri: str, beside: str | None = None, option: str = SOURCE) -> tuple[sources.Source, listing.Listing]:
    """The source and the listing that an output of build_index was made from. Raises UserError as `source_of`."""
    source, folder = source_of(uri, beside, option), files.join(uri, "listing")
    with files.explained(folder):
        artifact = artifacts.load_artifact(folder)
        assert artifact is not None, "run.json is written after the listing"
        artifacts.check_whole(folder, artifact)
    return source, listing.read_artifact(folder, artifact)


def unchanged_original_of(
    uri: str, beside: str | None = None, option: str = SOURCE
) -> tuple[sources.Source, listing.Listing]:
    """`original_of`, if the source is as it was listed: in another space only the same images compare.

    Raises:
        UserError: it holds other files now.
    """
    source, listed = original_of(uri, beside, option)
    artifact = artifacts.load_artifact(listed.uri)
    assert artifact is not None, "original_of has read it"
    now = tasks.get(tasks.task(sources.state, resources.IO_CPUS).remote(source))
    if what := artifacts.differences(artifact.identity.get("state") or {}, now):
        raise UserError(
            f"{source.root}: has changed since {uri} was made of it ({'; '.join(what)}), so that another extractor "
            "would see other images; bring it back, or run build_index.py again"
        )
    return source, listed


@dataclass(frozen=True)
class _Named:
    """What is used of a source in the identity of a listing, as `sources.identity` has it."""

    kind: Literal["directory", "glob", "parquet", "webdataset"]
    root: str
    names: tuple[str, ...]
    patterns: tuple[str, ...]


def source_of(uri: str, beside: str | None = None, option: str = SOURCE) -> sources.Source:
    """The source that an output of build_index was made from; its root is absolute, whatever the settings named.

    Args:
        uri: the output.
        beside: where else than beside it this command says that the images are, or None.
        option: by which it says so, for messages.

    Raises:
        UserError: its settings are of another pd_core, or its records lead to another place than these two.
    """
    record, folder = files.join(uri, runs.RUN), files.join(uri, "listing")
    with files.explained(record):
        run, artifact = files.read_json(record), artifacts.load_artifact(folder)
    if artifact is None:
        raise UserError(f"{folder}: is not finished, so nothing tells where its images are; run build_index.py again")
    try:
        settings = DataSettings.model_validate(run["settings"]["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: data settings of another pd_core; run build_index.py on it again") from error
    where = files.join(folder, files.ARTIFACT)
    named = trust.checked(_Named, artifact.identity.get("source"), where, whole=False)
    return sources.Source(
        named.kind,
        trust.recorded_path(unescape(named.root), where, [uri, beside], option),
        named.names,
        tuple(unescape(pattern) for pattern in named.patterns),
        settings,
    )
