"""Kind `openmoji`: pictures in two styles, captions, splits without leaks."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import features

from fusionlab.data.config import SourceConfig
from fusionlab.data.sources import Example, load_source
from fusionlab.data.sources.captions import LINE_DRAWING
from fusionlab.data.sources.likeness import SAME, SAME_LINES, thumb
from fusionlab.data.sources.openmoji import base_group
from fusionlab.errors import UserError


def emoji_of(key: str) -> str:
  stem = key.split("/")[0]
  return "".join(chr(int(code, 16)) for code in stem.split("-"))


def image_of(example: Example) -> np.ndarray:
  image = example.parts[1].alternatives[0]
  assert isinstance(image, np.ndarray)
  return image


@pytest.mark.parametrize(
  ("split", "style", "count"),
  [
    ("train", "color", 1436),
    ("train", "line", 1317),
    ("heldout_picture", "color", 97),
    ("heldout_picture", "line", 93),
    ("heldout_style", "color", 104),
    ("heldout_style", "line", 112),
  ],
)
def test_counts(openmoji, split, style, count):
  # Pillow's and resvg's versions may move a picture across "the same".
  found = Counter((e.split, k.split("/")[1]) for k, e in openmoji.items())
  assert abs(found[split, style] - count) <= max(3, 0.02 * count)


def test_a_base_emoji_is_on_one_side(openmoji):
  sides = defaultdict(set)
  for key, example in openmoji.items():
    held = example.split == "heldout_picture"
    sides[base_group(emoji_of(key))].add(held)
  assert all(len(s) == 1 for s in sides.values())


def test_a_held_out_style_has_its_other_style_in_training(openmoji):
  for key, example in openmoji.items():
    if example.split == "heldout_style":
      stem, style = key.split("/")
      other = {"color": "line", "line": "color"}[style]
      assert openmoji[f"{stem}/{other}"].split == "train"


def test_no_two_pictures_are_the_same(openmoji, flags):
  """So no held-out picture is seen in training under another name."""
  both = [image_of(e) for e in (*openmoji.values(), *flags.values())]
  thumbs = np.stack([thumb(image) for image in both]).astype(np.float64)
  squares = np.einsum("nf,nf->n", thumbs, thumbs)
  apart = (
    squares[:, None]
    + squares
    - 2 * np.einsum("nf,mf->nm", thumbs, thumbs, optimize=True)
  )
  np.fill_diagonal(apart, 1)
  assert apart.min() > (0.999 * SAME) ** 2


def test_styles_of_an_emoji_differ(openmoji):
  pairs = 0
  for key, example in openmoji.items():
    stem, style = key.split("/")
    if style == "line" and f"{stem}/color" in openmoji:
      color = thumb(image_of(openmoji[f"{stem}/color"]))
      assert np.linalg.norm(color - thumb(image_of(example))) >= SAME_LINES
      pairs += 1
  assert pairs > 1300


def test_line_drawings_are_black_on_white_and_colour_is_not(openmoji):
  saturated = Counter()
  for key, example in openmoji.items():
    image = image_of(example).astype(int)
    assert image.shape == (64, 64, 3)
    assert image.min() < 128 and image.max() == 255  # Neither blank nor full.
    colourful = (image.max(-1) - image.min(-1)).max() > 32
    saturated[key.split("/")[1]] += colourful
  assert saturated["line"] == 0
  assert saturated["color"] > 1300


def test_both_styles_stand_in_the_same_place(openmoji):
  shifts = []
  for key, example in openmoji.items():
    stem, style = key.split("/")
    if style == "line" and f"{stem}/color" in openmoji:
      boxes = []
      for image in (image_of(example), image_of(openmoji[f"{stem}/color"])):
        rows = np.flatnonzero((image.min(-1) < 160).any(1))
        boxes.append((rows[0] + rows[-1]) / 2)
      shifts.append(abs(boxes[0] - boxes[1]))
  assert np.median(shifts) <= 0.5
  assert np.mean(np.array(shifts) <= 2) > 0.85


def test_captions_name_the_emoji_and_the_style_in_many_languages(openmoji):
  apple = openmoji["1F34E/line"].parts[0].alternatives
  assert apple[0] == "red apple, line drawing"
  assert "roter apfel, Strichzeichnung" in apple
  assert "赤リンゴ、線画" in apple
  assert openmoji["1F34E/color"].parts[0].alternatives[0] == "red apple"
  sizes = [len(e.parts[0].alternatives) for e in openmoji.values()]
  assert np.mean(sizes) > 13
  for key, example in openmoji.items():
    captions = example.parts[0].alternatives
    assert len(set(captions)) == len(captions) >= 5  # "DVD" is nearly all.
    for caption in captions:
      caption.encode()  # Valid UTF-8.
      assert "_" not in caption and caption == caption.strip()
    ends = tuple(LINE_DRAWING.values())
    assert all(c.endswith(ends) for c in captions) == key.endswith("/line")


def test_subdivision_flags_say_so_and_country_flags_are_elsewhere(openmoji):
  first = {e.parts[0].alternatives[0] for e in openmoji.values()}
  assert "flag: England" in first
  assert "Flagge: england" in {
    c for e in openmoji.values() for c in e.parts[0].alternatives
  }
  assert not first & {"flag: Italy", "Italy", "flag: Bouvet Island"}
  assert not [c for c in first if c.startswith("flag:") and "line" in c]


def only_some(source, every: int) -> None:
  """Lets a source draw each `every`-th emoji only."""
  some = list(source._listed())[::every]
  source._listed = lambda: iter(some)


def test_skin_tones_are_on_the_side_of_their_emoji(openmoji):
  source = load_source("t", SourceConfig(kind="openmoji", path="skin_tones"))
  only_some(source, 4)
  sides = {
    base_group(emoji_of(k)): e.split == "heldout_picture"
    for k, e in openmoji.items()
  }
  style = {
    emoji_of(k).replace("\ufe0f", ""): e.split
    for k, e in openmoji.items()
    if k.endswith("/color")
  }
  found = Counter()
  for example in source.examples():
    text = emoji_of(example.key)
    plain = "".join(c for c in text if not "\U0001f3fb" <= c <= "\U0001f3ff")
    assert plain != text and example.key.endswith("/color")
    assert (example.split == "heldout_picture") == sides[base_group(text)]
    if style.get(plain.replace("\ufe0f", "")) == "heldout_style":
      assert example.split == "heldout_style"
    found[example.split] += 1
  assert len(source) == sum(found.values()) > 400
  assert found["heldout_picture"] > 10 and found["heldout_style"] > 3


@pytest.mark.smoke
@pytest.mark.parametrize(
  ("one", "other"),
  [
    ("👩🏾‍🍳", "🧑‍🍳"),  # woman cook: medium-dark skin tone; cook
    ("🏃‍♀️‍➡️", "🏃"),  # woman running facing right; person running
    ("👨‍🦰", "👩"),  # man: red hair; woman
    ("👨‍👩‍👧", "👪"),
    ("👬🏼", "🧑‍🤝‍🧑"),
    ("👩‍❤️‍💋‍👨", "💏"),
    ("🤶", "🧑‍🎄"),
    ("🫱🏿‍🫲🏻", "🤝"),
    ("👩🏻‍🐰‍👩🏿", "👯‍♀️"),
    ("👨🏻‍🫯‍👨🏿", "🤼"),
    ("❤️", "❤"),
  ],
)
def test_variants_have_one_base(one, other):
  assert base_group(one) == base_group(other)


@pytest.mark.smoke
def test_different_emoji_have_different_bases():
  several = [
    "🧑‍🍳",
    "🧑‍🌾",
    "🏃",
    "🧑",
    "👪",
    "♀",
    "♂",
    "➡️",
    "🏻",
    "🏼",
    "❤️",
    "💙",
  ]
  assert len({base_group(e) for e in several}) == len(several)


def test_the_same_twice():
  config = SourceConfig(kind="openmoji")
  one, other = load_source("one", config), load_source("other", config)
  assert one.fingerprint() == other.fingerprint()
  tones = SourceConfig(kind="openmoji", path="skin_tones")
  assert one.fingerprint() != load_source("x", tones).fingerprint()
  only_some(one, 10)
  only_some(other, 10)
  assert len(one) == len(other) > 250
  for new, old in zip(one.examples(), other.examples(), strict=True):
    assert (new.key, new.split) == (old.key, old.split)
    assert new.parts[0] == old.parts[0]
    assert np.array_equal(image_of(new), image_of(old))


def test_a_version_takes_the_emoji_up_to_it():
  """Those of 0.6, which have no gendered variants; another fingerprint."""
  every = load_source("o", SourceConfig(kind="openmoji"))
  first = load_source("o", SourceConfig(kind="openmoji", path="0.6"))
  assert first.fingerprint() != every.fingerprint()
  old, new = ({e.text for e in s._listed()} for s in (first, every))
  assert old < new
  assert 600 < len(old) < 720
  assert "🍎" in old and "🦥" not in old


@pytest.mark.smoke
@pytest.mark.parametrize("path", ["skintones", "0.6.1", "-1"])
def test_unknown_path_is_refused_with_the_nearest(path):
  with pytest.raises(UserError, match="knows '', 'skin_tones' and Emoji"):
    load_source("o", SourceConfig(kind="openmoji", path=path))


@pytest.mark.smoke
def test_a_pillow_without_raqm_is_refused(monkeypatch):
  monkeypatch.setattr(features, "check", lambda feature: feature != "raqm")
  with pytest.raises(UserError, match=r"no raqm.*pip install") as error:
    load_source("o", SourceConfig(kind="openmoji"))
  assert "\n" not in str(error.value)
