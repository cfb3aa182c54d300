"""(model, params, batch) → flat dict of means per target modality."""

from typing import Any

import numpy as np

from fusionlab.batch import Vocabulary
from fusionlab.registry import Registry

OBJECTIVES = Registry(
  "objective",
  {
    "next_token": "fusionlab.objectives.next_token:NextToken",
    "next_token_diffusion": "fusionlab.objectives.diffusion:NextTokenDiffusion",
  },
)


def build_objective(
  config: Any, vocabulary: Vocabulary, token_bytes: np.ndarray
) -> Any:
  """Builds the objective that `config.kind` names.

  Args:
    config: the objective's own dataclass.
    vocabulary: the shared id space; a token's loss belongs to its range.
    token_bytes: int32 [V], bytes of text that each id stands for.
  """
  return OBJECTIVES.load(config.kind)(config, vocabulary, token_bytes)
