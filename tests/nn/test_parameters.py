"""Parameters that a model is given are those that it would declare."""

import jax
import pytest
from flax import errors

from tests.models.tiny import batch_for, make


@pytest.mark.parametrize("name", ["w_in", "scale"])
def test_a_parameter_of_another_shape_is_refused(name):
  """By its name and both shapes, not by a product that fails somewhere."""
  model, params = make()
  batch = batch_for(model)

  def longer(path, leaf):
    last = jax.tree_util.keystr(path[-1:], simple=True)
    return leaf.repeat(2, axis=-1) if last == name else leaf

  longer = jax.tree_util.tree_map_with_path(longer, params)
  with pytest.raises(errors.ScopeParamShapeError, match=name):
    model.apply({"params": longer}, batch)
