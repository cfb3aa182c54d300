"""Sources, preparation, documents, the packing plan and the loader.

`open_data` is the room's door. It is imported when it is first asked for, since
reading a config (`fusionlab.data.config`) should not import TFDS and grain.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from fusionlab.data.opening import Data, cache_folder, open_data

__all__ = ["Data", "cache_folder", "open_data"]


def __getattr__(name: str) -> Any:
  if name in __all__:
    return getattr(importlib.import_module("fusionlab.data.opening"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
