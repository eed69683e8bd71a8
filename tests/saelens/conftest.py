"""SAELens is imported once, where a test asks for it: the import is slow, and other runs do not have it."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def lens() -> ModuleType:
    with warnings.catch_warnings():  # what its own dependencies deprecate
        warnings.simplefilter("ignore")
        return importlib.import_module("sae_lens")
