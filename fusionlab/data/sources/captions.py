"""Names of emoji in the languages of the package `emoji`, as captions."""

from types import ModuleType

# How a caption says that its picture is the line drawing, after the name, in
# the punctuation of the language. Order: English first, then as `emoji` has
# them; a language of `emoji` that is not here gets no caption of that style.
LINE_DRAWING = {
  "en": ", line drawing",
  "es": ", dibujo lineal",
  "ja": "、線画",
  "ko": ", 선화",
  "pt": ", desenho de linha",
  "it": ", disegno al tratto",
  "fr": ", dessin au trait",
  "de": ", Strichzeichnung",
  "fa": "، طراحی خطی",
  "id": ", gambar garis",
  "zh": "，线描",
  "ru": ", контурный рисунок",
  "tr": ", çizgi çizim",
  "ar": "، رسم خطي",
}

# How a caption says that it names a flag. Most languages of `emoji` write the
# word themselves ("drapeau italie"); English and Chinese give the bare place.
FLAG = {
  "en": "flag",
  "es": "bandera",
  "ja": "旗",
  "ko": "깃발",
  "pt": "bandeira",
  "it": "bandiera",
  "fr": "drapeau",
  "de": "Flagge",
  "fa": "پرچم",
  "id": "bendera",
  "zh": "旗帜",
  "ru": "флаг",
  "tr": "bayrak",
  "ar": "علم",
}


def load_languages(emoji: ModuleType) -> tuple[str, ...]:
  """Loads all languages of the package `emoji`; returns them, English first."""
  for language in emoji.LANGUAGES:
    emoji.config.load_language(language)
  return ("en", *(x for x in sorted(emoji.LANGUAGES) if x != "en"))


def is_place_flag(text: str) -> bool:
  """Whether an emoji is the flag of a country or of a part of one."""
  regional = all("\U0001f1e6" <= c <= "\U0001f1ff" for c in text)
  tagged = text[0] == "\U0001f3f4" and "\U000e007f" in text
  return regional or tagged


def name_in(entry: dict[str, str], language: str, *, flag: bool) -> str:
  """An emoji's name in one language, or "" where there is none.

  Args:
    entry: the emoji's value in `emoji.EMOJI_DATA`.
    language: a code such as "de".
    flag: whether the emoji is a place's flag: its name then begins with the
      word for flag and a colon ("flag: Italy", "Flagge: italien").
  """
  name = entry.get(language, "").strip(":").replace("_", " ").strip()
  if name and flag and language in FLAG:
    word = FLAG[language]
    if name.casefold().startswith(word.casefold() + " "):
      name = name[len(word) + 1 :]
    name = f"{word}: {name}"
  return name


def captions(
  entry: dict[str, str],
  languages: tuple[str, ...],
  *,
  flag: bool = False,
  line: bool = False,
) -> tuple[str, ...]:
  """Captions of one picture, English first, each different from the others.

  Args:
    entry: the emoji's value in `emoji.EMOJI_DATA`.
    languages: codes in order, from `load_languages`.
    flag: whether the emoji is a place's flag.
    line: whether the picture is the line drawing.

  Returns:
    One or more captions.
  """
  said = []
  for language in languages:
    name = name_in(entry, language, flag=flag)
    style = LINE_DRAWING.get(language, "") if line else ""
    if name and (style or not line):
      said.append(name + style)
  return tuple(dict.fromkeys(said))
