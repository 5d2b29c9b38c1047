"""Tables of classes: whatever a class is called, it is read back as it was written, and no two classes are mixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mgd_pipeline.errors import DataError
from mgd_stages.run.class_tables import class_tsv, confusion_csv, read_class_tsv, read_confusion
from mgd_stages.study.results import _class_lines

ODD = ["car, parked", 'the "other"', "a|b", "<b>", "=1+1", "$x$", "-", "line\x0bfeed", "车", " blank"]


def test_odd_names_are_read_back(tmp_path: Path) -> None:
    confusion = np.arange(100).reshape(10, 10)
    (tmp_path / "c.csv").write_bytes(confusion_csv(confusion, ODD))
    names, matrix = read_confusion(tmp_path / "c.csv") or ([], np.zeros(0))
    assert names == ODD and np.array_equal(matrix, confusion)
    shares = {"distilled": {name: number / 10 for number, name in enumerate(ODD)}}
    (tmp_path / "t.tsv").write_bytes(class_tsv(shares, ODD))
    assert read_class_tsv(tmp_path / "t.tsv") == shares


def test_tables_with_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    """0.1.0 wrote them, with the last class's numbers for both."""
    (tmp_path / "c.csv").write_bytes(confusion_csv(np.arange(9).reshape(3, 3), ["back", "crack", "crack"]))
    with pytest.raises(DataError, match=r"c\.csv: is not a confusion matrix any more"):
        read_confusion(tmp_path / "c.csv")
    (tmp_path / "t.tsv").write_bytes(class_tsv({"distilled": {"back": 0.5, "crack": 0.25}}, ["back", "crack", "crack"]))
    with pytest.raises(DataError, match=r"t\.tsv: is no table of classes any more"):
        read_class_tsv(tmp_path / "t.tsv")


def test_a_bar_in_a_name_makes_no_column() -> None:
    row = {"partition": "1/8", "variant": "distilled", "seed": 0, "metric": "iou", "class": "a|b", "value": 0.5}
    header, rule, line = _class_lines(pa.Table.from_pylist([row, {**row, "class": "c"}]))
    assert header.replace(r"\|", "").count("|") == rule.count("|") == line.count("|") and r"a\|b" in header
