"""Image generators behind one protocol (seeds to images; latents to images): noise, an adapter for each format, and how
one is opened.
"""

# what factories of users import (docs/generators.md)
from pd_core.generators.noise import generators_of, normal_latents, truncated_latents
from pd_core.generators.protocol import Conditions, check_conditions, files_hash, to_uint8

__all__ = [
    "Conditions",
    "check_conditions",
    "files_hash",
    "generators_of",
    "normal_latents",
    "to_uint8",
    "truncated_latents",
]
