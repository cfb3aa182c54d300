"""A checkpoint as a model of lm-eval, EleutherAI's evaluation harness.

  python -m fusionlab.evaluate.lm_eval run --model fusionlab \
      --model_args path=runs/demo --tasks my_task --include_path tasks

This is lm-eval's own command with the model `fusionlab` registered
(docs/guides/lm_eval.md); it needs the extra `lm-eval`. Text only: a request is a
document `<bos> context continuation`.
"""

# lm-eval is an extra.
# pyright: reportMissingImports=false

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
  normalize_gen_kwargs,
  postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fusionlab.errors import UserError
from fusionlab.evaluate.likelihood import Scorer
from fusionlab.generation.generate import generate
from fusionlab.tokenizers import Tokenizers
from fusionlab.train.checkpoint import load_model


@register_model("fusionlab")
class FusionlabLM(TemplateLM):
  """Answers lm-eval's requests with the text side of a checkpoint."""

  def __init__(
    self,
    path: str = "",
    *,
    loaded: tuple[Any, Any, Tokenizers] | None = None,
    max_length: int = 0,
    batch_tokens: int = 8192,
    batch_size: int | str | None = None,
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    """Loads a checkpoint; lm-eval passes the keys of `--model_args`.

    Args:
      path: a workdir, its checkpoints folder, or one step's folder.
      loaded: model, parameters and tokenizers, in place of `path`.
      max_length: tokens of a document at most; a longer context loses its
        beginning. 0: the rows' length in training, where the model knows it.
      batch_tokens: see `Scorer`.
      batch_size: unused, lm-eval passes it; batches are made by length.
      max_batch_size: unused, as `batch_size`.
      device: unused, JAX chooses it.

    Raises:
      UserError: not exactly one of `path` and `loaded`, or no checkpoint.
    """
    super().__init__()
    if bool(path) == (loaded is not None):
      raise UserError(
        "the model of lm-eval needs either a path or a loaded checkpoint; give"
        " --model_args path=<workdir>"
      )
    loaded = load_model(path) if loaded is None else loaded
    model, params, self.tokenizers = loaded
    max_length = max_length or model.row_length
    self.max_length = max_length or sys.maxsize
    self._model, self._params = model, params
    self._scorer = Scorer(model, params, batch_tokens=batch_tokens)

  @property
  def eot_token_id(self) -> int:
    """The id that ends a document."""
    return self.tokenizers.vocabulary.eos

  @property
  def prefix_token_id(self) -> int:
    """The id that begins a document."""
    return self.tokenizers.vocabulary.bos

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Returns the ids of a text, without `<bos>`.

    Args:
      string: the text.
      add_special_tokens: unused: `<bos>` is put where a document is made.
      **kwargs: unused.
    """
    return self.tokenizers.text.encode(string)

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Log p of whole texts, each in windows of `max_length` where it is longer.

    Args:
      requests: `args` is (text,).
      disable_tqdm: unused.

    Returns:
      Per text nats, summed over its tokens, the first given `<bos>`.
    """
    prompts, continuations, owners = [], [], []
    for index, request in enumerate(requests):
      windows = get_rolling_token_windows(
        self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length - 1,
        context_len=1,
      )
      for context, continuation in map(make_disjoint_window, windows):
        prompts.append(self._document(context, 1))
        continuations.append(continuation)
        owners.append(index)
    scores = self._scorer.score(prompts, continuations)
    owner = np.asarray(owners, np.int64)
    total = np.bincount(owner, scores.log_probability, len(requests))
    return total.tolist()

  def generate_until(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Continues each context up to a stop string or the limit.

    Args:
      requests: `args` is (context, options); `until`, `max_gen_toks`, `do_sample`,
        `temperature`, `top_p` and `top_k` of the options are heeded.
      disable_tqdm: unused.

    Returns:
      Per request the new text, without the stop string.
    """
    answers = [""] * len(requests)
    alike: dict[tuple[Any, ...], list[tuple[int, list[int]]]] = {}
    for index, request in enumerate(requests):
      arguments: Any = request.args
      context, given = arguments
      options: Any = normalize_gen_kwargs(given)
      limit = options["max_gen_toks"]
      sampled = options["do_sample"]
      settings = (
        limit,
        tuple(options["until"]),
        float(options.get("temperature", 1.0)) if sampled else 0.0,
        float(options.get("top_p", 1.0)) if sampled else 1.0,
        int(options.get("top_k", 0)) if sampled else 0,
      )
      # What follows may take half of the places, not all of the context's.
      kept = min(limit, self.max_length // 2)
      ids = self._document(self.tok_encode(context), kept)
      alike.setdefault(settings, []).append((index, ids))
    for (limit, until, temperature, top_p, top_k), group in alike.items():
      texts = generate(
        self._model,
        self._params,
        self.tokenizers,
        [ids for _, ids in group],
        make="text",
        max_new_tokens=limit,
        stop=until,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
      )
      for (index, _), result in zip(group, texts, strict=True):
        answers[index] = postprocess_generated_text(
          result.text, list(until), None
        )
    return answers

  def _loglikelihood_tokens(
    self,
    requests: list[tuple[tuple[str, str], list[int], list[int]]],
    **kwargs: Any,
  ) -> list[tuple[float, bool]]:
    scores = self._scorer.score(
      [self._document(context, len(ids)) for _, context, ids in requests],
      [ids for _, _, ids in requests],
    )
    return list(
      zip(scores.log_probability.tolist(), scores.greedy.tolist(), strict=True)
    )

  def _document(self, context: list[int], continuation: int) -> list[int]:
    """`<bos>` and as much of the context's end as leaves room."""
    if context and context[0] == self.prefix_token_id:
      context = context[1:]
    room = max(0, self.max_length - 1 - continuation)
    return [self.prefix_token_id, *context[max(0, len(context) - room) :]]


def main() -> None:
  """Runs lm-eval's command line with this model registered."""
  try:
    cli_evaluate()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()
