"""One page about a run, or about several: `python -m fusionlab.report W`.

Only files of the workdirs are read, and the page needs nothing but itself.
"""

from collections.abc import Sequence
from pathlib import Path


def write(workdir: str | Path, out: str | Path | None = None) -> Path:
  """Writes the report of one run, whole or not at all.

  Args:
    workdir: the run's folder; a run that is going on or failed will do.
    out: the page; None is `<workdir>/report.html`.

  Returns:
    The page's path.

  Raises:
    UserError: no run's folder, a file of it that cannot be read, or a page that
      cannot be written.
  """
  from fusionlab.report import page

  return page.write(workdir, out)


def compare(
  workdirs: Sequence[str | Path], out: str | Path = "comparison.html"
) -> Path:
  """Writes one page that compares runs, whole or not at all.

  Args:
    workdirs: two folders or more, in the order of the page.
    out: the page.

  Returns:
    The page's path.

  Raises:
    UserError: see `write`; fewer than two folders, or one given twice.
  """
  from fusionlab.report import comparison

  return comparison.write(workdirs, out)
