"""Files of weights: damage is noticed, foreign pickles run no code, and old checkpoints have a way in."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
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
        ("link", "is a link to away, which does not exist; restore what it links to"),
        ("half", "it is cut off, damaged or something else"),
        ("gone", "no such file"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_what_stands_in_the_place_of_weights_is_named(tmp_path: Path, content: bytes | str, said: str, name: str) -> None:
    path = tmp_path / name
    if content == "link":
        path.symlink_to("away")
    elif content == "half":
        save_file(STATE, path) if name == "a.safetensors" else torch.save(STATE, path)
        assert same(read_state_dict(path), STATE)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    for read in (read_state_dict, read_metadata) if name == "a.safetensors" and content != "half" else (read_state_dict,):
        with pytest.raises(WeightsError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
        assert said in str(caught.value)


SEVERAL = "; it holds ema, best: choose one by `mgd-pipeline convert-weights --key`"


@pytest.mark.parametrize(("content", "more"), [([torch.zeros(1)], "$"), ({"ema": STATE, "best": STATE}, SEVERAL)])
def test_files_that_hold_no_state_dict(tmp_path: Path, content: object, more: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=rf"w\.pth: expected a state dict of tensors{more}"):
        read_state_dict(tmp_path / "w.pth")
    torch.save(content, tmp_path / "w.safetensors")
    said = r"is a file of PyTorch under the name of safetensors; .*convert-weights \S+/w.pt \S+/w.safetensors`"
    with pytest.raises(WeightsError, match=said):
        read_state_dict(tmp_path / "w.safetensors")


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


WRAPPED = {f"module.{key}": value for key, value in STATE.items()}
BOTH = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in STATE.items()}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"state_dict": WRAPPED, "epoch": 3, "args": argparse.Namespace(lr=0.1, name="x")}, None),
        ({"model": {"other": torch.ones(1)}, "nested": {"ema": WRAPPED}}, "nested.ema"),
        ({f"module._orig_mod.{key}": value for key, value in STATE.items()}, None),
        ({**STATE, "tied": STATE["a"]}, None),  # one tensor of two names
        ({"epoch": 3, "ema": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}}, None),
        ({"state_dict": BOTH}, "teacher"),  # by the beginning of its names
    ],
    ids=["lightning", "nested", "compiled", "tied", "only one", "one of two by its names"],
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


EMA = {"model": STATE, "ema": STATE}
NESTED = {"state_dict": {"model": STATE, "ema": {"module": STATE, "decay": 0.9}}}
MADE = "3 tensors -> new.safetensors\n"


@pytest.mark.parametrize(
    ("content", "options", "choice", "words"),
    [
        (STATE, [], None, MADE),
        ({"model": STATE, "optimizer": {"state": {0: STATE}, "lr": 0.1}}, [], None, MADE),
        (EMA, [], "model is taken, not ema (`mgd-pipeline convert-weights old.pth NEW.safetensors --key ema`", MADE),
        (NESTED, [], "state_dict.model is taken, not state_dict.ema", MADE),
        ({"epoch": 3, "best": 0.4}, [], None, "no state dict of tensors found in epoch, best; name it by --key"),
        ({"a": {"b": STATE}}, ["--key", "a.c"], None, "has no 'c' at a.c; it has b"),
        ({**STATE, "module.a": torch.ones(1)}, [], None, "without module. before it; choose one, such as by --key module"),
        (b"no checkpoint", [], None, "old.pth: holds other Python objects"),
        (None, [], None, "old.pth: No such file or directory"),
        (STATE, ["--key", "x"], None, "has no 'x' at x"),
    ],
)
def test_the_command_says_what_it_made_or_why_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, options: list[str], choice: str | None, words: str
) -> None:
    """And which of several state dicts it takes."""
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("old.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, "old.pth")
    done = CliRunner().invoke(app, ["convert-weights", "old.pth", "new.safetensors", *options])
    if words == MADE:
        said = choice_of_state_dict(Path("old.pth"))
        assert said is None if choice is None else said is not None and choice in said
        assert done.exit_code == 0 and done.output == (f"{said}\n{MADE}" if said else MADE)
    else:
        assert done.exit_code == 1 and words in done.output and done.output.count("error:") == 1, done.output
    if content is STATE:
        done = CliRunner().invoke(app, ["convert-weights", "old.pth", "new.pth"])
        assert done.exit_code == 1 and done.output == "error: new.pth: name the result .safetensors\n"
