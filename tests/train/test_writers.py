"""Metrics files: new columns, cuts, merges, and what a kill leaves."""

import csv
import json
from typing import ClassVar

import pytest

from fusionlab.errors import UserError
from fusionlab.train.writers import Writers, write_atomic


def rows(folder):
  with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


@pytest.mark.smoke
def test_csv_extends_its_header(tmp_path):
  """A new metric adds a column; earlier rows have an empty cell there."""
  writers = Writers("csv", tmp_path)
  writers.write(1, {"train/loss": 2.5})
  writers.write(2, {"train/loss": 2.0, "eval/loss/image": 3.25})
  writers.write(3, {"train/loss": 1.5})
  got = rows(tmp_path)
  assert list(got[0]) == ["step", "train/loss", "eval/loss/image"]
  assert [r["eval/loss/image"] for r in got] == ["", "3.25", ""]


def test_csv_merges_rows_of_one_step(tmp_path):
  """Training and held-out metrics of a step share its row, in any order."""
  writers = Writers("csv", tmp_path)
  writers.write(1, {"a": 1.0, "b": 1.0})
  writers.write(2, {"a": 2.0})
  writers.write(2, {"b": 0.1})
  writers.write(2, {"c": 3.0})
  writers.write(3, {"a": 4.0})
  assert [tuple(r.values()) for r in rows(tmp_path)] == [
    ("1", "1", "1", ""),
    ("2", "2", "0.1", "3"),
    ("3", "4", "", ""),
  ]


def test_numbers_read_back_exactly(tmp_path):
  """The text of a float is the shortest that gives the same float."""
  values = [0.1, 1 / 3, 2.5e-8, 1e30, 12345678.9, float("inf")]
  Writers("csv", tmp_path).write(1, {f"m{i}": v for i, v in enumerate(values)})
  (row,) = rows(tmp_path)
  assert [float(row[f"m{i}"]) for i in range(len(values))] == values


@pytest.mark.smoke
def test_truncate_cuts_later_rows(tmp_path):
  """A resumed run continues both files from the restored step."""
  writers = Writers("csv jsonl", tmp_path)
  for step in range(1, 6):
    writers.write(step, {"train/loss": float(step)})
  writers.close()
  writers = Writers("csv jsonl", tmp_path)
  writers.truncate(3)
  writers.write(4, {"train/loss": 0.5})
  assert [r["step"] for r in rows(tmp_path)] == ["1", "2", "3", "4"]
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
  assert json.loads(lines[-1])["train/loss"] == 0.5


def test_torn_last_line_is_dropped(tmp_path):
  """What a crash of the machine tore is cut on the next start."""
  writers = Writers("csv jsonl", tmp_path)
  writers.write(1, {"a": 1.0, "b": 2.0})
  for name in ("metrics.csv", "metrics.jsonl"):
    with open(tmp_path / name, "a", encoding="utf-8") as file:
      file.write('{"st' if name.endswith("l") else "2,1")
  writers = Writers("csv jsonl", tmp_path)
  writers.truncate(10)
  writers.write(2, {"a": 3.0, "b": 4.0})
  assert [r["a"] for r in rows(tmp_path)] == ["1", "3"]
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["a"] for line in lines] == [1, 3]


def test_jsonl_has_null_for_what_is_not_finite(tmp_path):
  """The file stays valid JSON."""
  Writers("jsonl", tmp_path).write(1, {"a": float("nan"), "b": 1.0})
  line = (tmp_path / "metrics.jsonl").read_text()
  assert json.loads(line) == {"step": 1, "a": None, "b": 1.0}


def test_tensorboard_writes_events(tmp_path):
  """Event files hold the scalar's name."""
  writers = Writers("tensorboard", tmp_path)
  writers.truncate(0)
  writers.write(1, {"train/loss/text": 1.5})
  writers.close()
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"train/loss/text" in events.read_bytes()


def test_has_evaluation(tmp_path):
  """True only where the last row is of that step and was evaluated."""
  writers = Writers("csv", tmp_path)
  writers.write(4, {"eval/loss": 1.0})
  assert writers.has_evaluation(4)
  writers.write(5, {"train/loss": 1.0})
  assert not writers.has_evaluation(5)
  assert not writers.has_evaluation(4)


def test_unknown_writer_names_the_nearest(tmp_path):
  """A misspelt name is one line."""
  with pytest.raises(UserError, match=r"'cvs'.*'csv'"):
    Writers("cvs", tmp_path)


class Collect:
  """A writer from outside."""

  seen: ClassVar[list] = []

  def __init__(self, workdir):
    self.workdir = workdir

  def write(self, step, row):
    self.seen.append((step, dict(row)))


def test_writer_from_outside(tmp_path):
  """`package.module:Class` is a writer without a fork."""
  Writers(f"{__name__}:Collect", tmp_path).write(7, {"a": 1.0})
  assert Collect.seen == [(7, {"a": 1.0})]


def test_foreign_csv_is_refused(tmp_path):
  """A metrics.csv of something else is not overwritten."""
  (tmp_path / "metrics.csv").write_text("time,loss\n1,2\n")
  with pytest.raises(UserError, match="column 'step'"):
    Writers("csv", tmp_path)
  assert (tmp_path / "metrics.csv").read_text() == "time,loss\n1,2\n"


def test_atomic_write_leaves_no_temporary(tmp_path):
  """Only the file itself remains."""
  write_atomic(tmp_path / "a", "x")
  write_atomic(tmp_path / "a", b"y")
  assert [p.name for p in tmp_path.iterdir()] == ["a"]
  assert (tmp_path / "a").read_text() == "y"
