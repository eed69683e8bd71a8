"""All toys, by name. Importing a module registers its toys."""

from tests import _toys_loops, _toys_mixers, _toys_more, _toys_odd, _toys_plain, _toys_writes
from tests._toys_base import TOYS, Toy, make

MODULES = (_toys_loops, _toys_mixers, _toys_more, _toys_odd, _toys_plain, _toys_writes)

__all__ = ["MODULES", "TOYS", "Toy", "make"]
