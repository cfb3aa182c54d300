"""Writes a page about a run, or one that compares several.

  python -m fusionlab.report runs/demo                      runs/demo/report.html
  python -m fusionlab.report runs/a runs/b runs/c           comparison.html
  python -m fusionlab.report runs/a runs/b --out pages/ab.html

The page is one HTML file with pictures, curves, held-out scores with intervals,
parameters and FLOPs, what was run and what failed. It needs no network, and only
files of the workdirs are read, so a run that is going on can be looked at too.
For pictures and intervals, score the run first:

  python -m experiments.run --workdir=runs/demo --mode=evaluate
"""

import os

# Shapes are all that is computed here: an accelerator may be busy training.
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fusionlab import report
from fusionlab.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command line and prints the page's path.

  Args:
    argv: words after the program's name; default those of the process.

  Returns:
    The exit code: 0, or 2 after one line about what the user can change.
  """
  parser = argparse.ArgumentParser(
    prog="python -m fusionlab.report", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument(
    "workdirs", metavar="WORKDIR", nargs="+", type=Path,
    help="a run's folder; several are compared on one page",
  )  # fmt: skip
  parser.add_argument(
    "--out", metavar="FILE", type=Path,
    help="the page (default: WORKDIR/report.html; of several, comparison.html)",
  )  # fmt: skip
  options = parser.parse_args(argv)
  try:
    if len(options.workdirs) == 1:
      path = report.write(options.workdirs[0], options.out)
    else:
      path = report.compare(options.workdirs, options.out or "comparison.html")
  except UserError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  print(path)
  return 0


if __name__ == "__main__":
  sys.exit(main())
