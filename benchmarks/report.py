"""Runs all benchmarks and writes docs/benchmarks.md: `make bench`, about 13 minutes on 2 idle cores."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import torch

import reader
from common import measure, parser
from mgd_stages.run.project import choose_device
from stage_one import stage_one_table
from steps import loader_table, small_caches_table, steps_table

HEAD = """# Benchmarks

`make bench` wrote this page. Its parts are `python benchmarks/reader.py` (reading, writing, growth),
`python benchmarks/stage_one.py` and `python benchmarks/steps.py` (memory of the loader, training steps, small caches).
The top of each script says how its figures are measured. Compare within a table, never between two runs:
the machines are shared, and their speed changes from minute to minute.
"Limit" is the fastest that the machine allows. "Times ours" is a contender's time divided by ours, so we are faster above 1.
`mgd-pipeline bench` measures the main figures with the teacher caches, images and networks of your own project.

"""


def machine(device: torch.device) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    cores = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"Commit {commit}, {time.strftime('%Y-%m-%d')}, {cores}, {name}, {versions}"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--output", type=Path, default=Path("docs/benchmarks.md"))
    arguments = options.parse_args()
    began, tables = time.monotonic(), []
    for table in measure(arguments, *reader.PARTS, loader_table, stage_one_table, steps_table, small_caches_table):
        tables.append(table.markdown())
        print(f"{table.title}: {time.monotonic() - began:.0f} s", flush=True)
    took = f"All of it took {(time.monotonic() - began) / 60:.0f} minutes."
    text = "\n".join([f"{HEAD}{machine(choose_device(arguments.device))}. {took}\n", *tables])
    arguments.output.write_text(text, encoding="utf-8")
    print(f"-> {arguments.output}")


if __name__ == "__main__":
    main()
