"""Mappings become dataclasses strictly, and come back unchanged."""

import dataclasses
import json

import pytest

from fusionlab.config import flatten, from_mapping, option, to_mapping
from fusionlab.errors import ConfigError, UserError, nearest
from fusionlab.experiment import Experiment
from fusionlab.registry import Registry


@dataclasses.dataclass(frozen=True)
class Inner:
  count: int = option(3, "how many", minimum=1, maximum=9)
  rate: float = option(0.5, "how fast", minimum=0.0)
  shape: str = option("round", "which", choices=("round", "square"))
  sizes: tuple[int, ...] = option((1, 2), "each size", minimum=0)
  on: bool = option(False, "whether")


@dataclasses.dataclass(frozen=True)
class Outer:
  inner: Inner = option(Inner, "nested")
  named: dict[str, Inner] = option(dict, "by name")

  def check(self, path: str) -> None:
    if self.inner.count == 7:
      raise ConfigError(f"{path}.inner.count must not be 7")


def test_defaults_stay_where_the_mapping_is_silent():
  assert from_mapping(Outer, {}) == Outer()
  assert from_mapping(Outer, {"inner": {"count": 4}}).inner == Inner(count=4)


def test_sections_by_name_become_dataclasses():
  built = from_mapping(Outer, {"named": {"a": {"count": 2}, "b": {}}})
  assert built.named == {"a": Inner(count=2), "b": Inner()}


@pytest.mark.parametrize(
  ("mapping", "words"),
  [
    ({"iner": {}}, ["config.iner", "'inner'"]),
    ({"inner": {"cuont": 1}}, ["config.inner.cuont", "'count'"]),
    ({"inner": 3}, ["config.inner", "section"]),
    ({"inner": {"count": "4"}}, ["config.inner.count='4'", "str", "int"]),
    ({"inner": {"count": 4.0}}, ["config.inner.count=4.0", "float", "int"]),
    ({"inner": {"count": True}}, ["config.inner.count=True", "bool"]),
    ({"inner": {"on": 1}}, ["config.inner.on=1", "bool"]),
    ({"inner": {"count": 0}}, ["config.inner.count=0", "at least 1"]),
    ({"inner": {"count": 10}}, ["config.inner.count=10", "at most 9"]),
    ({"inner": {"rate": float("nan")}}, ["config.inner.rate", "finite"]),
    ({"inner": {"shape": "squar"}}, ["config.inner.shape", "'square'"]),
    ({"inner": {"sizes": "1"}}, ["config.inner.sizes", "sequence of int"]),
    ({"inner": {"sizes": (1, -1)}}, ["config.inner.sizes", "at least 0"]),
    ({"named": {"a": {"cont": 1}}}, ["config.named.a.cont", "'count'"]),
    ({"named": 3}, ["config.named", "keyed by name"]),
    ({"inner": {"count": 7}}, ["config.inner.count must not be 7"]),
  ],
)
def test_a_mistake_is_one_line_that_names_key_and_remedy(mapping, words):
  with pytest.raises(ConfigError) as caught:
    from_mapping(Outer, mapping)
  message = str(caught.value)
  assert "\n" not in message
  for word in words:
    assert word in message


def test_a_whole_number_serves_as_a_float():
  rate = from_mapping(Outer, {"inner": {"rate": 2}}).inner.rate
  assert isinstance(rate, float)


@pytest.mark.smoke
def test_an_experiment_survives_json():
  experiment = Experiment.from_mapping(
    {
      "model": {"kind": "mixture_of_transformers", "towers": [0, 1]},
      "data": {"sources": {"mine": {"kind": "jsonl", "path": "a.jsonl"}}},
      "optimizer": {"learning_rate": 1e-4},
    }
  )
  back = json.loads(json.dumps(to_mapping(experiment)))
  assert Experiment.from_mapping(back) == experiment


def test_microbatches_and_groups_must_divide():
  sources = {"sources": {"a": {"kind": "jsonl"}}}
  with pytest.raises(ConfigError, match=r"accumulate=3 .*batch_size=8"):
    Experiment.from_mapping(
      {"data": sources, "train": {"batch_size": 8, "accumulate": 3}}
    )
  with pytest.raises(ConfigError, match=r"group_rows=3"):
    Experiment.from_mapping({"data": {**sources, "group_rows": 3}})


def test_flatten_names_every_leaf():
  assert flatten({"a": {"b": (1, 2), "c": {"d": 3}}}) == {
    "a.b": [1, 2],
    "a.c.d": 3,
  }


def test_nearest_lists_the_allowed_where_nothing_is_close():
  assert nearest("dmi", ["dim", "depth"]) == ", did you mean 'dim'?"
  assert nearest("zzz", ["dim", "depth"]) == " (allowed: depth, dim)"


def test_registry_takes_names_and_classes_from_outside():
  registry = Registry("thing", {"counter": "collections:Counter"})
  assert registry.load("counter").__name__ == "Counter"
  assert registry.load("collections:OrderedDict").__name__ == "OrderedDict"
  for kind, words in {
    "countr": "'counter'",
    "no_such_package:X": "no_such_package",
    "collections:Countr": "'Counter'",
  }.items():
    with pytest.raises(UserError, match=words):
      registry.load(kind)
