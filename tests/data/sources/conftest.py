"""The packaged sources' examples, drawn once for all tests."""

import pytest

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import Example, load_source


@pytest.fixture(scope="session")
def openmoji() -> dict[str, Example]:
  """Key -> example of kind `openmoji`, in order."""
  source = load_source("openmoji", SourceConfig(kind="openmoji"))
  return {e.key: e for e in source.examples()}


@pytest.fixture(scope="session")
def flags() -> dict[str, Example]:
  """Key -> example of kind `flags`, in order."""
  source = load_source("flags", SourceConfig(kind="flags"))
  return {e.key: e for e in source.examples()}


@pytest.fixture(scope="session")
def factbook() -> dict[str, Example]:
  """Key -> example of kind `factbook`, in order."""
  source = load_source("factbook", SourceConfig(kind="factbook"))
  return {e.key: e for e in source.examples()}
