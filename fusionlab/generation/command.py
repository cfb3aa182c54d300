"""`--mode=generate`: prompts of a command line to files in the run's folder."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
)

from fusionlab.errors import UserError
from fusionlab.generation.config import Request, Sampling
from fusionlab.generation.denoising import snapshot_steps
from fusionlab.generation.generate import Generated, generate
from fusionlab.generation.prompts import PARTS, Part, Prompt
from fusionlab.train.checkpoint import find, load_model


def pair(prompts: Sequence[str], images: Sequence[str]) -> list[Prompt]:
  """Puts each picture in front of its text.

  Args:
    prompts: texts.
    images: files.

  Raises:
    UserError: neither, or several of both in different numbers.
  """
  if not prompts and not images:
    raise UserError(
      "--mode=generate needs --prompt, --image or --prompt_file; try"
      " --prompt='red apple' --make=image"
    )
  if not images:
    return list(prompts)
  paths = [Path(i).expanduser() for i in images]
  if not prompts:
    return [[path] for path in paths]
  count = max(len(prompts), len(paths))
  if {len(prompts), len(paths)} - {1, count}:
    raise UserError(
      f"{len(prompts)} prompts and {len(paths)} images: give as many of both, or"
      f" one of either"
    )
  texts = list(prompts) * (count // len(prompts))
  paths = paths * (count // len(paths))
  return [[path, text] for path, text in zip(paths, texts, strict=True)]


def run(
  workdir: str, request: Request, *, console: Console | None = None
) -> Path:
  """Generates with the newest checkpoint of a run and writes what came out.

  Pictures become PNGs, texts `generated.txt`, and all of it with the settings
  `generated.json`. A continuous picture's snapshots become a PNG each, named by the
  sampler's step, and with the picture one strip.

  Args:
    workdir: the run's folder, or a checkpoint's.
    request: what was asked for.
    console: where it is shown; default standard output.

  Returns:
    The folder, which is whole or not there.

  Raises:
    UserError: no checkpoint, a prompt or a setting that is wrong (see
      `generate`), or an `out` that exists.
  """
  console = console or Console()
  prompts = pair(request.prompts, request.images)
  path = find(Path(workdir).expanduser())
  folder = _folder(Path(workdir).expanduser(), request.out)
  model, params, tokenizers = load_model(path)
  with Progress(
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    console=console,
    transient=True,
    disable=not console.is_terminal,
  ) as progress:
    task = progress.add_task("generating", total=None)
    results = generate(
      model,
      params,
      tokenizers,
      prompts,
      on_progress=lambda done, count: progress.update(
        task, completed=done, total=count
      ),
      **request.settings,
    )
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
  try:
    shown = _write(partial, prompts, results, path, request.settings)
    partial.chmod(0o755)
    os.replace(partial, folder)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  console.print(shown, markup=False, highlight=False, soft_wrap=True)
  console.print(
    f"written: {folder}", markup=False, highlight=False, soft_wrap=True
  )
  return folder


def _folder(workdir: Path, out: str) -> Path:
  """Where results go: `out`, or the next number in the run's `generated`."""
  if out:
    folder = Path(out).expanduser()
    if folder.exists():
      raise UserError(f"--out={out} exists; name a folder that does not")
    return folder
  # Never inside of a checkpoint.
  is_run = (workdir / "checkpoints").is_dir()
  above = workdir / "generated" if is_run else Path("generated")
  numbers = [int(p.name) for p in above.glob("*") if p.name.isdigit()]
  return above / f"{max(numbers, default=0) + 1:03d}"


def _write(
  folder: Path,
  prompts: Sequence[Prompt],
  results: Sequence[Generated],
  checkpoint: Path,
  settings: Mapping[str, Any],
) -> str:
  """Writes the files of a folder; returns what `generated.txt` says."""
  entries, lines = [], []
  steps = snapshot_steps(
    settings.get("snapshots", 0),
    settings.get("diffusion_steps", Sampling.diffusion_steps),
  )
  for result in results:
    name = f"{result.prompt:03d}_{result.sample}"
    parts = []
    for part in result.parts:
      if isinstance(part, str):
        parts.append({"text": part})
        continue
      number = sum("picture" in p for p in parts)
      stem = f"{name}_{number}" if number else name
      entry: dict[str, Any] = {"picture": f"{stem}.png"}
      files = {entry["picture"]: part}
      if steps:
        before = result.snapshots[number]
        stages = [f"{stem}_step{i:03d}.png" for i in steps]
        files |= dict(zip(stages, before, strict=True))
        entry |= {"steps": stages, "strip": f"{stem}_steps.png"}
        files[entry["strip"]] = np.concatenate([*before, part], axis=1)
      for file, pixels in files.items():
        Image.fromarray(np.asarray(pixels)).save(folder / file)
      parts.append(entry)
    prompt = _said(prompts[result.prompt])
    entries.append(
      {
        "prompt": prompt,
        "sample": result.sample,
        "parts": parts,
        "finish": result.finish,
        "ids": list(result.ids),
      }
    )
    continued = "".join(p.get("text") or f"<{p['picture']}>" for p in parts)
    lines.append(f"{name}  {''.join(prompt)} → {continued}")
  content = {
    "checkpoint": str(checkpoint),
    "settings": dict(settings),
    "results": entries,
  }
  text = "\n".join(lines) + "\n"
  (folder / "generated.json").write_text(json.dumps(content, indent=1) + "\n")
  (folder / "generated.txt").write_text(text, encoding="utf-8")
  return text.rstrip("\n")


def _said(prompt: Prompt) -> list[str]:
  """A prompt as texts, a picture by its file."""
  parts: Sequence[Part] = [prompt] if isinstance(prompt, PARTS) else prompt
  return [p if isinstance(p, str) else f"<{p}>" for p in parts]
