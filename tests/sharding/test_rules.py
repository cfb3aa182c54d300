"""Every axis is named, every name has a rule, and sizes must divide."""

import jax
import pytest

from fusionlab.batch import LatentGrid, Vocabulary
from fusionlab.errors import UserError
from fusionlab.models import MODELS
from fusionlab.models.mixture_of_transformers import (
  MixtureOfTransformersConfig,
)
from fusionlab.models.transfusion import Transfusion
from fusionlab.sharding import axes, rules
from fusionlab.sharding.mesh import MeshConfig, make_mesh

VOCABULARY = Vocabulary(("text", "image"), (48, 16))
CONTINUOUS = Vocabulary(
  ("text", "image"), (48, 1), grids=(None, LatentGrid(side=4, channels=2))
)


@pytest.mark.parametrize("kind", sorted(MODELS.entries))
def test_every_parameter_axis_is_named(kind):
  """No unnamed axis, no unknown name, no mesh axis twice in one array."""
  cls = MODELS.load(kind)
  continuous = issubclass(cls, Transfusion)
  model = cls(cls.Config(), CONTINUOUS if continuous else VOCABULARY)
  shapes = model.abstract_params()

  def check(names, leaf):
    assert len(names) == leaf.ndim
    assert set(names) <= set(axes.PARAMETER_AXES)
    rules.spec(names)

  jax.tree.map(
    check, model.param_axes(), shapes, is_leaf=lambda x: isinstance(x, tuple)
  )


def test_every_axis_name_has_a_rule():
  """axes.py and the rules agree."""
  assert set(rules.RULES) == set(axes.PARAMETER_AXES + axes.ACTIVATION_AXES)


def test_unknown_and_colliding_axes_are_refused():
  """A misspelt axis name is met with the nearest one."""
  with pytest.raises(UserError, match="did you mean 'embed'"):
    rules.spec(("embd",))
  with pytest.raises(UserError, match="twice"):
    rules.spec((axes.EMBED, axes.EMBED))


def test_parameters_that_do_not_divide_are_refused_with_the_arithmetic():
  """The message says which key to change, and to what."""
  model = MODELS.load("mixture_of_transformers")(
    MixtureOfTransformersConfig(dim=36, num_heads=6), VOCABULARY
  )
  shapes = model.abstract_params()
  names = model.param_axes()
  for config, message in (
    (MeshConfig(fsdp=8), r"fsdp=8 .*config\.model\.dim=36 .*4 x 8 \+ 4.*=40"),
    (MeshConfig(tensor=4), r"config\.model\.num_kv_heads=6 .*1 x 4 \+ 2.*=8"),
    (MeshConfig(tensor=3, data=2), r"config\.model\.(vocab_size|ffn_dim)="),
  ):
    with pytest.raises(UserError, match=message):
      rules.check_params(names, shapes, make_mesh(config))
  rules.check_params(names, shapes, make_mesh(MeshConfig(tensor=2, fsdp=4)))
