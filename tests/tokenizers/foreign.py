"""Small tokenizers as other libraries write them."""

import json

from tokenizers import (
  AddedToken,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

TEXTS = ["the red apple and the green apple é 赤い"] * 9
END = "<|endoftext|>"
BYTES = [f"<0x{i:02X}>" for i in range(256)]
CONTROL = ["<unk>", "<s>", "</s>"]


def byte_level():
  """As GPT-2: 0 ends documents, 280 is special, 281 a token that was added."""
  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=280,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    special_tokens=[END],
    show_progress=False,
  )
  made.train_from_iterator(TEXTS, trainer)
  made.add_special_tokens(["<|user|>"])
  made.add_tokens([AddedToken("<tool>", special=False)])
  made.post_processor = processors.TemplateProcessing(
    single=f"{END} $A {END}", special_tokens=[(END, 0)]
  )
  made.enable_truncation(4)
  made.enable_padding()
  return made.to_str().encode()


def sentencepiece(kind="BPE"):
  """As Llama 2 (BPE) or T5 (Unigram): <unk>, <s>, </s>, 256 bytes, pieces."""
  if kind == "BPE":
    made = _spaced(models.BPE(unk_token="<unk>", byte_fallback=True))
    trainer = trainers.BpeTrainer(
      vocab_size=280, special_tokens=[*CONTROL, *BYTES], show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
  else:
    pieces = ["▁", "▁the", "▁apple", *"aplest<>/"]
    scores = [(p, 0.0) for p in [*CONTROL, *BYTES]]
    scores += [(p, -2.0 - i / 9) for i, p in enumerate(pieces)]
    made = _spaced(models.Unigram(scores, unk_id=0, byte_fallback=True))
  content = json.loads(made.to_str())
  content["added_tokens"] = [
    {"id": i, "content": token, "special": True}
    | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, token in enumerate(CONTROL)
  ]
  return json.dumps(content).encode()


def _spaced(model):
  made = Tokenizer(model)
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  made.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  return made
