"""Which flag belongs to which place."""

import pytest

from fusionlab.data.sources.places import flag_places, places


@pytest.mark.smoke
def test_every_place_is_read():
  found = places("test")
  assert len(found) == len({p.code for p in found}) == 256
  assert all(p.name and p.name != "none" and "&" not in p.name for p in found)


@pytest.mark.smoke
@pytest.mark.parametrize(
  ("flag", "code"),
  [("🇮🇹", "it"), ("🇬🇧", "uk"), ("🇫🇷", "fr"), ("🇨🇭", "sz"), ("🇨🇩", "cg")],
)
def test_flags_find_their_place(flag, code):
  assert flag_places("test")[flag].code == code


def test_matches_agree_with_the_names():
  matched = flag_places("test")
  assert abs(len(matched) - 243) <= 2
  assert len({p.code for p in matched.values()}) == len(matched)
  assert "🇵🇸" not in matched  # Two places: Gaza Strip and West Bank.
