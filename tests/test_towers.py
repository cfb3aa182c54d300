"""Names and counts of towers, and what is refused."""

import pytest

from fusionlab import towers
from fusionlab.errors import UserError


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: towers.parse_untie("q k ffm"), "'ffm', did you mean.*ffn"),
    (lambda: towers.tower_names(("text", "image"), (0,)), "one tower each"),
    (lambda: towers.tower_names(("a", "b"), (0, 2)), "without a gap"),
  ],
)
def test_bad_towers_are_refused_in_one_line(call, message):
  """Each mistake names what was given and what would do."""
  with pytest.raises(UserError, match=message) as error:
    call()
  assert "\n" not in str(error.value)


def test_tower_names_join_the_modalities_that_share_one():
  """Leave-one-out towers are named by their modalities."""
  names = towers.tower_names(("text", "image", "speech"), (0, 1, 1))
  assert names == ("text", "image+speech")
  assert towers.tower_counts((5, 3, 2), (0, 1, 1)) == (5, 5)
