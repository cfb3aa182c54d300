"""Several processes of one job: how they meet, agree, and end together.

Everything here does nothing where a program runs alone.
"""

from fusionlab.processes.agreement import agree, from_first
from fusionlab.processes.joining import join
from fusionlab.processes.peers import fail, is_first, name, on_end, watch

__all__ = [
  "agree",
  "fail",
  "from_first",
  "is_first",
  "join",
  "name",
  "on_end",
  "watch",
]
