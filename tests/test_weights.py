"""Files of weights: damage is noticed, foreign pickles run no code, and old checkpoints have a way in."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import Counted
from mgd_pipeline.errors import WeightsError
from mgd_pipeline.networks.weights import choice_of_state_dict, convert_weights, read_metadata, read_state_dict, save_weights
from mgd_stages.cli import app

STATE = {"a": torch.arange(60.0).view(3, 20), "b": torch.ones(4, dtype=torch.int64), "c": torch.zeros(0)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_round_trip_and_same_bytes(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", STATE, {"classes": ["ä", "b"]})
    save_weights(tmp_path / "b.safetensors", dict(reversed(STATE.items())), {"classes": ["ä", "b"]})
    assert same(read_state_dict(tmp_path / "a.safetensors"), STATE)
    assert read_metadata(tmp_path / "a.safetensors") == {"classes": ["ä", "b"]}
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_every_flipped_bit_is_noticed(tmp_path: Path, counted: Counted) -> None:
    """In tensors, in their names and shapes, in the metadata: an error, or the very same content."""
    path = tmp_path / "a.safetensors"
    save_weights(path, STATE, {"classes": ["a", "b"], "trained_on": "0123"})
    good, metadata = path.read_bytes(), read_metadata(path)
    rng = np.random.default_rng(0)
    flips, errors = counted.of(300, 2000), 0
    for _ in range(flips):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            assert same(read_state_dict(path), STATE) and read_metadata(path) in (metadata, {})
        except WeightsError:
            errors += 1
    assert errors > 0.9 * flips
    counted.say(f"{flips} bit flips in a file of weights: {errors} typed errors, {flips - errors} harmless, 0 silent")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no weights; the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "fetch the file by `git lfs pull`"),
        (b"/annex/objects/MD5E-s9--4d7a\n", "fetch the file by `git annex get`"),
        (b"<!DOCTYPE html><html>", "holds no weights; it is a web page"),
        (None, "is a link to away, which does not exist; restore what it links to"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_what_stands_in_the_place_of_weights_is_named(tmp_path: Path, content: bytes | None, said: str, name: str) -> None:
    path = tmp_path / name
    if content is None:
        path.symlink_to("away")
    else:
        path.write_bytes(content)
    for read in (read_state_dict, read_metadata) if name == "a.safetensors" else (read_state_dict,):
        with pytest.raises(WeightsError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)


def test_a_file_of_pytorch_called_safetensors_is_named(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.safetensors")
    said = (
        rf"is a file of PyTorch under the name of safetensors; .*convert-weights {tmp_path / 'a.pt'} {tmp_path / 'a.safetensors'}"
    )
    with pytest.raises(WeightsError, match=said):
        read_state_dict(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_file(STATE, path) if name.endswith("safetensors") else torch.save(STATE, path)
    assert same(read_state_dict(path), STATE)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"not weights at all", whole[:20]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=re.escape(f"{path}: ")) as caught:
            read_state_dict(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="no such file"):
        read_state_dict(tmp_path / f"gone_{name}")


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, torch.zeros(1)], ids=["list", "number", "tensor"])
def test_files_that_hold_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth: expected a state dict of tensors"):
        read_state_dict(tmp_path / "w.pth")


def test_safetensors_alone_would_not_notice(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    assert not same(load_file(tmp_path / "a.safetensors"), STATE)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_hostile_pickles_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where the environment asks torch for its old behaviour."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": STATE, "extra": Canary(tmp_path / "canary")}, tmp_path / "bad.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    for name, said in (("bad", "bad.pth: holds Python objects beside tensors; .*convert-weights"), ("plain", "plain.pth: ")):
        with pytest.raises(WeightsError, match=said):
            read_state_dict(tmp_path / f"{name}.pth")
    with pytest.raises(WeightsError, match=r"holds .*mkdir, and reading that runs the code"):
        convert_weights(tmp_path / "bad.pth", tmp_path / "a.safetensors")
    assert not (tmp_path / "canary").exists() and not (tmp_path / "a.safetensors").exists()
    assert convert_weights(tmp_path / "bad.pth", tmp_path / "a.safetensors", trust=True) == 3
    assert (tmp_path / "canary").exists(), "the payload works, so the refusals above mean something"


WRAPPED = OrderedDict((f"module.{key}", value) for key, value in STATE.items())
BOTH = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in STATE.items()}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"model": STATE, "ema": STATE},
            "model is taken, not ema (`mgd-pipeline convert-weights old.pth NEW.safetensors --key ema`",
        ),
        ({"state_dict": {"model": STATE, "ema": {"module": STATE, "decay": 0.9}}}, "state_dict.model is taken, not state_dict.ema"),
        ({"model": STATE, "optimizer": {"state": {0: STATE}, "lr": 0.1}}, None),
    ],
)
def test_which_of_several_state_dicts_is_taken_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, said: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "old.pth")
    choice = choice_of_state_dict(Path("old.pth"))
    assert choice is None if said is None else choice is not None and said in choice
    converted = CliRunner().invoke(app, ["convert-weights", "old.pth", "new.safetensors"])
    assert converted.stdout.splitlines() == [*([choice] if choice else []), "3 tensors -> new.safetensors"]


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (dict(STATE), None),
        ({"state_dict": WRAPPED, "epoch": 3, "args": argparse.Namespace(lr=0.1, name="x")}, None),
        ({"model": {"other": torch.ones(1)}, "nested": {"ema": WRAPPED}}, "nested.ema"),
        ({f"module._orig_mod.{key}": value for key, value in STATE.items()}, None),
        ({**STATE, "tied": STATE["a"]}, None),  # one tensor of two names
        ({"epoch": 3, "ema": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}}, None),
        ({"state_dict": BOTH}, "teacher"),  # by the beginning of its names
        ({"student": {"x": torch.ones(1)}, "teacher": STATE}, "teacher"),  # by its own key
    ],
    ids=["plain", "lightning", "nested", "compiled", "tied", "only one", "one of two by its names", "one of two by its key"],
)
def test_checkpoints_are_converted(tmp_path: Path, content: dict[str, Any], key: str | None) -> None:
    torch.save(content, tmp_path / "old.pth")
    count = len(STATE) + ("tied" in content)
    assert convert_weights(tmp_path / "old.pth", tmp_path / "new.safetensors", key=key) == count
    converted = read_state_dict(tmp_path / "new.safetensors")
    assert len(converted) == count and same({key: converted[key] for key in STATE}, STATE)


def test_a_part_of_a_safetensors_file_keeps_what_the_file_says_of_itself(tmp_path: Path) -> None:
    save_weights(tmp_path / "both.safetensors", {key: value.clone() for key, value in BOTH.items()}, {"classes": ["a", "b"]})
    convert_weights(tmp_path / "both.safetensors", tmp_path / "new.safetensors", key="student")
    assert same(read_state_dict(tmp_path / "new.safetensors"), STATE)
    assert read_metadata(tmp_path / "new.safetensors") == {"classes": ["a", "b"]}


def test_two_tensors_never_become_one(tmp_path: Path) -> None:
    torch.save({**STATE, "module.a": torch.ones(1)}, tmp_path / "old.pth")
    with pytest.raises(WeightsError, match=r"holds a with and without module\. before it; choose one, such as by --key module"):
        convert_weights(tmp_path / "old.pth", tmp_path / "new.safetensors")
    torch.save({"ema": STATE, "best": STATE}, tmp_path / "old.pth")
    with pytest.raises(WeightsError, match="it holds ema, best: choose one by `mgd-pipeline convert-weights --key`"):
        read_state_dict(tmp_path / "old.pth")


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ({"epoch": 3, "best": 0.4}, [], "no state dict of tensors found in epoch, best; name it by --key"),
        ({"a": {"b": STATE}}, ["--key", "a.c"], "has no 'c' at a.c; it has b"),
        (None, [], "old.pth: holds other Python objects"),
        (STATE, [], ""),
    ],
)
def test_the_command_says_what_it_made_or_why_it_cannot(tmp_path: Path, content: object, options: list[str], words: str) -> None:
    old, new = tmp_path / "old.pth", tmp_path / "new.safetensors"
    torch.save(content, old) if content else old.write_bytes(b"no checkpoint")
    done = CliRunner().invoke(app, ["convert-weights", str(old), str(new), *options])
    if words:
        assert done.exit_code == 1 and words in done.output and done.output.count("error:") == 1, done.output
    else:
        assert done.exit_code == 0 and done.output == f"3 tensors -> {new}\n"
        for source, target in (("missing.pth", "new.safetensors"), ("old.pth", "new.pth")):
            done = CliRunner().invoke(app, ["convert-weights", str(tmp_path / source), str(tmp_path / target)])
            assert done.exit_code == 1 and done.output.startswith("error: ")
