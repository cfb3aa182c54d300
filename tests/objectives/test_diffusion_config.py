"""Settings of text and pictures that make no sense, alone or with the model."""

import pytest

from configs import mot_transfusion
from fusionlab.config import from_mapping
from fusionlab.errors import ConfigError
from fusionlab.experiment import Experiment
from fusionlab.models.config import TransformerConfig
from fusionlab.objectives.diffusion import NextTokenDiffusionConfig


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"heldout_times": (0.0, 0.5)}, "above 0"),
    ({"heldout_times": (0.5, 0.5)}, "one twice"),
    ({"heldout_times": ()}, "above 0"),
    ({"heldout_times": (1.5,)}, "at most 1.0"),
    ({"noise_limit": 0.0}, "above 0"),
    ({"diffusion_weight": -1.0}, "at least 0"),
  ],
  ids=str,
)
def test_a_wrong_setting_is_said(settings, said):
  with pytest.raises(ConfigError) as error:
    from_mapping(NextTokenDiffusionConfig, settings, "config.objective")
  assert said in str(error.value) and "config.objective." in str(error.value)


@pytest.mark.parametrize(
  ("model", "objective", "said"),
  [
    ({"process": "dpm"}, {}, "config.model.process.*did you mean 'ddpm'"),
    (
      {},
      {"noise_limit": 1e-4},
      "config.objective.noise_limit=0.0001.*at least 0.001, one timestep",
    ),
    (
      {"num_timesteps": 4},
      {},
      "config.objective.heldout_times=.*at least 0.25, one timestep",
    ),
    (
      {},
      {"flow_time": "logit_normal"},
      "config.objective.flow_time.*is of config.model.process='flow'",
    ),
  ],
)
def test_what_the_process_lacks_is_said(model, objective, said):
  """The process is the model's: what it predicts, and how it is drawn from."""
  mapping = mot_transfusion.get_config().to_dict()
  mapping["model"] |= {"process": "ddpm"} | model
  mapping["objective"] |= objective
  with pytest.raises(ConfigError, match=said):
    Experiment.from_mapping(mapping)
  mapping["model"] |= {"process": "flow"}
  Experiment.from_mapping(mapping)


def test_a_model_that_predicts_no_noise_is_refused():
  with pytest.raises(
    ConfigError, match="'transformer' does not; set it to 'tr"
  ):
    NextTokenDiffusionConfig().check_model(
      "config.objective", TransformerConfig()
    )
