"""Control fidelity and diversity of image generators, at scale, by pseudo density (arXiv 2407.08659).

The library is `pd_core.api`; its names are offered here and imported when one is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pd_core.api import Index, density_coverage, frechet_distance, precision_recall, pseudo_density, vendi_score
    from pd_core.api import open as open  # noqa: A004
    from pd_core.core.errors import RunError, UserError

__all__ = [
    "Index",
    "RunError",
    "UserError",
    "density_coverage",
    "frechet_distance",
    "open",
    "precision_recall",
    "pseudo_density",
    "vendi_score",
]


if not TYPE_CHECKING:  # a type checker sees the names above, and a misspelt one

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from pd_core import api

        globals()[name] = value = getattr(api, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
