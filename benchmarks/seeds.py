"""Mean and standard deviation over finished projects that differ in their seed only; a Markdown table on standard output.

for seed in 0 1 2; do mgd-pipeline demo runs/$seed --full --seed $seed; done
python benchmarks/seeds.py runs/0 runs/1 runs/2
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def mious(project: Path) -> dict[str, float]:
    """mIoU in per cent of every network of a finished project."""
    results = project / "data/results"
    evaluation = json.loads((results / "evaluation/metrics.json").read_text())
    found = {
        "student, labelled images only": evaluation["supervised"]["miou"],
        "student, distilled": evaluation["distilled"]["miou"],
    }
    for path in sorted((results / "teachers").glob("*.json")):
        found[f"teacher {path.stem}"] = json.loads(path.read_text())["miou"]
    found["gain of distillation"] = found["student, distilled"] - found["student, labelled images only"]
    return {name: 100 * value for name, value in found.items()}


def main(folders: list[str]) -> None:
    runs = [mious(Path(folder)) for folder in folders]
    print(f"| mIoU, % | {' | '.join(Path(folder).name for folder in folders)} | mean | standard deviation |")
    print("|---|" + "---|" * (len(runs) + 2))
    for name in runs[0]:
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells = " | ".join(f"{value:.1f}" for value in values)
        print(f"| {name} | {cells} | {statistics.mean(values):.1f} | {spread:.1f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
