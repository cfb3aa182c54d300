"""One file per paper; `MODELS` names them."""

from fusionlab.registry import Registry

MODELS = Registry(
  "model",
  {
    "transformer": "fusionlab.models.transformer:Transformer",
    "mixture_of_transformers": (
      "fusionlab.models.mixture_of_transformers:MixtureOfTransformers"
    ),
    "transfusion": "fusionlab.models.transfusion:Transfusion",
    "lmfusion": "fusionlab.models.lmfusion:LMFusion",
  },
)


def __getattr__(name: str):
  # Imported on first use: transformer itself reads MODELS.
  if name == "build_model":
    from fusionlab.models.transformer import build_model

    return build_model
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
