"""What the tests of compiling for absent machines share."""

from configs.mot_chameleon import get_config
from fusionlab.experiment import Experiment


def experiment_of(mesh, *, rows, row_length=384, **model):
  """The default configuration, small, with AdamW."""
  mapping = get_config().to_dict()
  mapping["model"] |= {"dim": 256, "num_heads": 4, "num_layers": 2, **model}
  mapping["data"]["row_length"] = row_length
  mapping["optimizer"]["kind"] = "adamw"
  mapping["train"]["batch_size"] = rows
  mapping["mesh"] |= mesh
  return Experiment.from_mapping(mapping)
