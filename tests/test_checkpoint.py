"""Checkpoints of unfinished trainings: whole or not used, and the one before is never lost."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgd_pipeline.training.checkpoint import TrainingCheckpoint


def training(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    network = nn.Linear(3, 2)
    return {"network": network, "optimizer": torch.optim.AdamW(network.parameters())}


def step(parts: dict[str, Any]) -> None:
    parts["network"](torch.ones(1, 3)).sum().backward()
    parts["optimizer"].step()


def states(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and same(list(one.values()), list(other.values()))
    return all(map(same, one, other)) and len(one) == len(other) if isinstance(one, (list, tuple)) else one == other


def save(folder: Path, *steps: int, key: str = "key") -> dict[int, dict[str, Any]]:
    """Checkpoints of these steps, one after the other; the state of each."""
    parts, saved = training(), {}
    for number in steps:
        step(parts)
        TrainingCheckpoint(folder, key).save(number, parts, {"loss": [(number, 0.5)]})
        saved[number] = states(parts)
    return saved


def restores(folder: Path, step: int, key: str = "key") -> dict[str, Any]:
    """What the checkpoint of this step brings back."""
    parts = training(1)
    assert TrainingCheckpoint(folder, key).restore(parts) == (step, {"loss": [(step, 0.5)]})
    return states(parts)


def test_a_state_that_another_process_has_just_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two terminals with the same command: one tidies up while the other one looks."""
    saved, checkpoint, parts = save(tmp_path, 3, 4), TrainingCheckpoint(tmp_path, "key"), training(1)
    seen = checkpoint._files()
    seen[0].unlink()
    monkeypatch.setattr(checkpoint, "_files", lambda: seen)
    assert checkpoint.restore(parts) == (3, {"loss": [(3, 0.5)]}) and same(states(parts), saved[3])
    assert checkpoint.set_aside() is not None


def test_a_checkpoint_comes_back_whole_and_the_last_two_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    checkpoint, parts = TrainingCheckpoint(folder, "key"), training(1)
    assert checkpoint.restore(parts) is None
    assert same(save(folder, 1, 2, 30, 100)[100], restores(folder, 100))
    assert [path.name for path in sorted(folder.iterdir())] == ["checkpoint-key-00000030.pt", "checkpoint-key-00000100.pt"]
    checkpoint.remove()
    checkpoint.remove()
    assert checkpoint.restore(parts) is None and not list(folder.iterdir())


def test_a_checkpoint_of_something_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 7)
    assert TrainingCheckpoint(tmp_path, "other").restore(training()) is None
    assert TrainingCheckpoint(tmp_path, "key").restore(training()) is not None
    with monkeypatch.context() as later:
        later.setattr("mgd_pipeline.training.checkpoint._FORMAT", 99)
        assert TrainingCheckpoint(tmp_path, "key").restore(training()) is None, "a later version of the code"
    # --- another run in the same folder: its checkpoints of later steps push none of ours away, nor ours any of its
    save(tmp_path, 900, 1000, key="another")
    save(tmp_path, 1, 2)
    restores(tmp_path, 7)
    restores(tmp_path, 1000, "another")


def test_unfinished_trainings_of_other_keys_are_told_and_three_are_kept(tmp_path: Path) -> None:
    parts = training()
    TrainingCheckpoint(tmp_path, "noted", {"student.steps": 9000, "seed": None}, 9000).save(50, parts, {})
    save(tmp_path, 20, 30, key="old")  # as version 0.1 left them: nothing is noted
    save(tmp_path, 10, key="least")
    save(tmp_path, 40, key="fourth")
    TrainingCheckpoint(tmp_path, "mine").save(1, parts, {})
    (tmp_path / "checkpoint-fourth.json").write_text("[")  # damaged
    mine = TrainingCheckpoint(tmp_path, "mine")
    others = mine.unfinished()
    assert [(run.step, run.steps) for run in others] == [(50, 9000), (40, None), (30, None), (10, None)]
    assert others[0].settings == {"student.steps": 9000, "seed": None} and others[2].settings is None and others[2].size > 0
    assert [run.step for run in mine.tidy()] == [10] and mine.tidy() == []
    assert not list(tmp_path.glob("*least*")) and len(mine.unfinished()) == 3
    mine.remove()
    assert not list(tmp_path.glob("*mine*")) and len(mine.unfinished()) == 3, "what is finished takes nobody else's along"
    noted = TrainingCheckpoint(tmp_path, "noted")
    assert noted.restore(training()) is not None
    noted.remove()
    assert not list(tmp_path.glob("*noted*"))


def test_what_is_set_aside_is_neither_used_nor_lost(tmp_path: Path) -> None:
    checkpoint = TrainingCheckpoint(tmp_path, "key")
    assert checkpoint.set_aside() is None
    save(tmp_path, 80, 90)
    kept = checkpoint.set_aside()
    assert kept is not None and kept.name == "set-aside-key-00000090.pt" and list(tmp_path.iterdir()) == [kept]
    assert checkpoint.restore(training()) is None
    save(tmp_path, 10)
    assert checkpoint.set_aside() == kept and list(tmp_path.iterdir()) == [kept], "the most steps are kept"
    # --- brought back by the command that is printed
    kept.rename(tmp_path / "checkpoint-key-00000090.pt")
    restores(tmp_path, 90)
    checkpoint.set_aside()
    (other,) = TrainingCheckpoint(tmp_path, "other").unfinished()
    assert other.step == 90, "another training tells of it, too"
    checkpoint.remove()
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_not_used_but_the_one_before_is(tmp_path: Path) -> None:
    saved, newest = save(tmp_path, 5, 6), tmp_path / "checkpoint-key-00000006.pt"
    whole = newest.read_bytes()
    flipped = [bytearray(whole) for _ in range(5)]
    for damaged, position in zip(flipped, (0, 31, 32, len(whole) // 2, len(whole) - 1), strict=True):
        damaged[position] ^= 1
    for content, step in ((b"", 5), (whole[:20], 5), (whole[:-1], 5), *((bad, 5) for bad in flipped), (whole, 6)):
        newest.write_bytes(content)
        assert same(restores(tmp_path, step), saved[step])


@pytest.mark.parametrize("name", ["open", "write", "fsync", "replace"])
def test_a_full_disk_or_a_kill_never_costs_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    saved = save(tmp_path, 1, 2)
    before = sorted(os.listdir(tmp_path))
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patched, pytest.raises(type(error)):
            patched.setattr(os, name, fail)
            save(tmp_path, 3)
        assert sorted(os.listdir(tmp_path)) == before, "nothing is left beside them"
    assert same(restores(tmp_path, 2), saved[2])
