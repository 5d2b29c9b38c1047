"""Runs all benchmarks and writes docs/benchmarks.md: `make bench`, about 10 minutes on 2 idle cores."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from mgd_stages.run.project import choose_device
from reader import Table, growth_table, reader_tables, strewn_table, writer_table
from stage_one import stage_one_table
from steps import loader_table, steps_table

HEAD = """# Benchmarks

`make bench` wrote this page. Its parts are `python benchmarks/reader.py` (reading, writing, growth),
`python benchmarks/stage_one.py` and `python benchmarks/steps.py` (memory of the loader, training steps).
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shows that it runs, not how fast")
    parser.add_argument("--device", default="auto", help="of the training steps: cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks.md"))
    arguments = parser.parse_args()
    device, began = choose_device(arguments.device), time.monotonic()
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in ("reading", "writing", "growth", "strewn", "loader", "stage one", "steps"):
            place = Path(folder) / part
            place.mkdir()
            if part == "reading":
                tables += reader_tables(place, arguments.quick)
            elif part == "stage one":
                tables.append(stage_one_table(place, device, arguments.quick))
            elif part == "steps":
                tables.append(steps_table(place, device, arguments.quick))
            else:
                table = {"strewn": strewn_table, "writing": writer_table, "growth": growth_table, "loader": loader_table}[part]
                tables.append(table(place, arguments.quick))
            print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
    text = "\n".join(table.markdown().replace("### ", "## ") for table in tables)
    took = f"All of it took {(time.monotonic() - began) / 60:.0f} minutes."
    arguments.output.write_text(f"{HEAD}{machine(device)}. {took}\n\n{text}", encoding="utf-8")
    print(f"-> {arguments.output}")


if __name__ == "__main__":
    main()
