"""Numbers as a person reads them."""

import math

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float) -> str:
  """Four significant digits: '2.504', '0.0312', '1,234'.

  Args:
    value: what is not finite is written as 'nan' or 'inf'.
  """
  if not math.isfinite(value):
    return str(float(value))
  if value == 0 or 1e-4 <= abs(value) < 1e7:
    if abs(value) >= 1000 or value == int(value):
      return f"{value:,.0f}"
    decimals = 3 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(max(decimals, 0), 6)}f}"
  return f"{value:.3g}"


def percent(value: float) -> str:
  """A fraction as '41.2 %'; a very small one with two digits, '0.028 %'."""
  if not math.isfinite(value):
    return str(float(value))
  value *= 100
  if value and abs(value) < 0.1:
    return f"{value:.2g} %"
  return f"{value:.1f} %"


def rank(value: float) -> str:
  """A rank or a median of ranks: '1,549' or '12.5'."""
  return f"{value:,.1f}".removesuffix(".0")


def amount(value: float) -> str:
  """Three digits and a prefix of ten: '1.62 M', '94.0 G', '512'."""
  for size, prefix in _PREFIXES:
    if abs(value) >= size:
      scaled = value / size
      digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
      return f"{scaled:,.{digits}f} {prefix}"
  return f"{value:,.0f} "


def duration(seconds: float) -> str:
  """Seconds as '1 h 02 min', '5 min 10 s' or '33 s'."""
  whole = int(seconds + 0.5)
  minutes, rest = divmod(whole, 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours:,} h {minutes:02d} min"
  return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
