"""The training loop: workers, compilers, precision, and no waiting for the device."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from contextlib import nullcontext
from functools import partial
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import mgd_stages.stages.train_student as stage
from conftest import TINY, training_set
from mgd_pipeline.data import manifest as manifests
from mgd_pipeline.data.shapes import CLASSES
from mgd_pipeline.errors import DataError, LoaderError, MemoryShortage, NonFiniteError, OutputError
from mgd_pipeline.networks.segmentation import build_network
from mgd_pipeline.training import loading, shared_memory
from mgd_pipeline.training.batches import Batch, cached_targets
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.features import with_projections
from mgd_pipeline.training.knowledge import knowledge_of
from mgd_pipeline.training.loading import load_batches
from mgd_pipeline.training.optimisation import StepLoss, build_average, build_optimizer, update_average
from mgd_pipeline.training.terms import step_terms, total_loss
from mgd_stages.cli import app
from mgd_stages.run.machine import check_compiler
from mgd_stages.run.project import Project, open_project
from student_runs import CPU, FEATURE, distil, in_steps

WITHOUT_BACKGROUND = json.dumps({name: [k] if k else [] for k, name in enumerate(CLASSES)})


def test_a_device_that_is_too_small_is_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    in_steps(monkeypatch, too_large)
    with pytest.raises(MemoryShortage, match=r"distilled: cpu is out of memory with \d+ \+ \d+ images a step; lower views\.crop"):
        distil(project)


NO_MEMORY = r"no shared memory.*--num-workers 0.*docker run --shm-size"


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("an image is gone", DataError, "the image is gone"),
        ("a bug", TypeError, "'NoneType' object is not callable"),
        ("the loss", NonFiniteError, "not finite at step 0"),
        ("dies", LoaderError, r"died: .*\(pid"),
        ("dies while it hands over", LoaderError, r"died: .*\(pid"),
        ("hangs", LoaderError, r"no batch within 4 s: .*Process-\d+ \(pid \d+\)"),
        ("no room", LoaderError, r"the batches under way need.*--num-workers 0.*docker run --shm-size"),
        ("not writable", LoaderError, r"No such file or directory.*--num-workers 0.*docker run --shm-size"),
        ("no room in the worker", LoaderError, NO_MEMORY),
        ("bus error", LoaderError, NO_MEMORY),
    ],
)
def test_what_goes_wrong_with_workers_is_named_and_no_process_is_left(
    project: Project, monkeypatch: pytest.MonkeyPatch, fault: str, error: type[Exception], said: str
) -> None:
    """Also while somebody holds on to the error: Python waits for them at its end, and they ignore the signal that it sends."""
    parent, whole = os.getpid(), TrainingSet.__getitem__

    def fated(self: TrainingSet, step: int) -> Batch:
        if os.getpid() != parent and step == 3:
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return whole(self, step)

    def handed_over(ticket: object) -> object:
        (worker,) = multiprocessing.active_children()
        threading.Timer(0.2, os.kill, (worker.pid, signal.SIGKILL)).start()  # torch learns of it after us
        raise ConnectionResetError(104, "Connection reset by peer")

    def full(*_: object) -> Any:
        if fault == "bus error":
            os.kill(os.getpid(), signal.SIGBUS)
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    def gone(*_: object) -> Any:
        raise DataError("the image is gone")

    sharer = resource_sharer._resource_sharer  # pyright: ignore[reportAttributeAccessIssue]
    patches: dict[str, tuple[Any, str, Any]] = {
        "an image is gone": (manifests, "read_image", gone),
        "a bug": (TrainingSet, "_mine", None),
        "the loss": (stage, "step_loss", lambda terms, _: StepLoss(torch.tensor(float("nan"), requires_grad=True), terms)),
        "dies": (TrainingSet, "__getitem__", fated),
        "dies while it hands over": (sharer, "get_connection", handed_over),
        "hangs": (TrainingSet, "__getitem__", fated),
        "no room": (shared_memory, "free_shared_memory", lambda: 1000),
        "not writable": (shared_memory, "SHARED", project.base / "none"),
        "no room in the worker": (torch.UntypedStorage, "_new_shared", full),
        "bus error": (torch.UntypedStorage, "_new_shared", full),
    }
    monkeypatch.setattr(*patches[fault])
    monkeypatch.setattr(loading, "_WORKER_SECONDS", 4.0 if fault == "hangs" else 60.0)
    with pytest.raises(error, match=said) as held:
        distil(project, num_workers=1)
    assert held.value.__traceback__ is not None and not multiprocessing.active_children()
    assert ("Out of memory is the usual reason" in str(held.value)) == fault.startswith("dies")
    if fault == "no room":
        distil(project, num_workers=0)  # which needs none


def test_waiting_for_data_is_measured_and_said(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = project.results / "train-student-distilled/speed.json"
    before, whole = json.loads(speed.read_text()), TrainingSet.__getitem__
    assert before["images_per_second"] > 0 and 0 <= before["waiting_for_data"] < 1 and before["peak_memory_mb"] > 100
    monkeypatch.setattr(TrainingSet, "__getitem__", lambda self, step: (time.sleep(1), whole(self, step))[1])
    distil(project)
    assert json.loads(speed.read_text())["waiting_for_data"] > max(0.3, before["waiting_for_data"])
    out = capsys.readouterr().out
    assert "of the time went into waiting for data; raise --num-workers (it was 0," in out
    images = project.params.student.labelled_batch + project.params.student.unlabelled_batch
    shown = re.findall(r"(\d+) ms a step, ([\d.]+) images/s", out)
    assert shown
    for milliseconds, rate in shown:
        assert float(milliseconds) >= 1000, "each step waited for a second"
        assert float(milliseconds) / 1000 * float(rate) == pytest.approx(images, rel=0.02)


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers read from it, shapes that depend on values, copies from pageable memory.

    The device is torch's `meta`, which has no values: reading one is an error of its own.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, tensors = str(func), [value for value in args if isinstance(value, torch.Tensor)]
        indices = args[1] if name.startswith("aten.index") and isinstance(args[1], list) else []
        out = func(*args, **(kwargs or {}))
        reads = any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default"))
        masked = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        on_device = any(tensor.device.type == self.device for tensor in tensors)
        arrives = isinstance(out, torch.Tensor) and out.is_meta and any(not tensor.is_meta for tensor in tensors)
        if arrives or (on_device and (reads or masked)):
            self.waits.append(name)
        return out


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["student.ohem={threshold: 0.7, min_kept: 500}"],
        ["losses.confidence=0.5"],
        ["losses.pixel_distance=kl", "losses.pixel_weights=[agreement, edges, correct, balance]", "losses.channel=1"],
        ["losses.pixel_distance=dist", "losses.region_distance=kl", "losses.image_distance=presence"],
        ["losses.pixel_distance=binary", "losses.pixel_choice=by-class", "losses.pixel_weights=[margin]"],
        ["losses.pixel_distance=cauchy-schwarz", "losses.pixel_choice=ensemble"],
        ["losses.pixel_distance=ttm"],
        ["losses.pixel_distance=kl", f"teachers.wide.class_map={WITHOUT_BACKGROUND}"],
        FEATURE,
    ],
)
def test_a_step_waits_for_nothing(project: Project, monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    params = open_project(project.base / "params.yaml", [*TINY, *overrides]).params
    device = torch.device("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    network = build_network(params.student.network, 9).to(device)
    average = build_average(network, params.student.model_copy(update={"ema": 0.9}))
    assert average is not None
    dataset = training_set(project)
    knowledge = knowledge_of(params, dataset.manifest, dataset.open_caches(), device)
    trained = with_projections(network, knowledge.features, params.targets.region_stride)
    optimizer, targets = build_optimizer(trained, params.student), partial(cached_targets, losses=params.losses)
    batches = load_batches(dataset, 0, 0, 0, device)
    for batch in (next(batches), next(batches)):  # constants are copied to the device by the first step, and kept
        with Waits() as waits:
            terms = step_terms(trained, batch, targets, params, knowledge)
            total_loss(terms, params.losses).backward()
            optimizer.step()
            update_average(average, network, 0.9, 3)
    assert waits.waits == []


def test_waits_would_be_noticed() -> None:
    values = torch.arange(4.0)
    with Waits("cpu") as waits:
        float(values.sum())
        bool(values.sum() > 0)
        values[values > 2]
        torch.nonzero(values)
        values.to("meta")
    assert len(waits.waits) == 5


def test_without_a_compiler_one_line_says_so(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the tests that compile: torch looks for a compiler once in a process."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    done = CliRunner().invoke(app, ["train-student", "--compile", "--config", str(project.base / "params.yaml")])
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.exit_code == 2 and "--compile: no compiler for cpu" in line
    assert "No working C++ compiler" in line and "leave --compile out" in line


def test_bfloat16_terms_are_those_of_float32_within_its_precision(project: Project) -> None:
    """8 bits of mantissa: forward passes differ by some 1 %, losses are computed in float32 from there."""
    dataset, terms = training_set(project), {}
    batch = dataset[0]
    for precision in ("float32", "bfloat16"):
        params = open_project(project.base / "params.yaml", [*TINY, *FEATURE, f"student.precision={precision}"]).params
        knowledge = knowledge_of(params, dataset.manifest, dataset.open_caches(), CPU)
        torch.manual_seed(0)
        trained = with_projections(build_network(params.student.network, 9), knowledge.features, 16)
        torch.manual_seed(0)
        terms[precision] = step_terms(trained, batch, partial(cached_targets, losses=params.losses), params, knowledge)
    assert all(value.dtype == torch.float32 for value in terms["bfloat16"].values())
    for name, value in terms["float32"].items():
        assert terms["bfloat16"][name].item() == pytest.approx(value.item(), rel=0.03, abs=2e-3), name
    assert any(terms["bfloat16"][name].item() != value.item() for name, value in terms["float32"].items())


@pytest.mark.parametrize("heard", [[], FEATURE], ids=["", "feature"])
def test_a_compiled_network_trains_to_the_same_file_format(
    project: Project, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    """With the eager backend: what is tested is our use of it, not the compiler."""
    project = open_project(project.base / "params.yaml", [*TINY, *heard])
    if heard:
        distil(project)
    plain, whole, compiled = project.student("distilled").read_bytes(), torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(whole(network, backend="eager")))
    distil(project, compiled=True)
    assert len(compiled) == 1 and project.student("distilled").read_bytes() == plain


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CppCompileError: C++ compile error\n\nOutput:\nerror writing to /t/cc.s: No space left on device\n"),
        RuntimeError("PermissionError: [Errno 13] Permission denied: '/t/torchinductor'\n\nSet TORCHDYNAMO_VERBOSE=1"),
        OSError(30, "Read-only file system", "/t/torchinductor"),
    ],
)
def test_a_full_temporary_folder_is_no_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    def compiled(_: object) -> None:
        raise error

    monkeypatch.setattr(torch, "compile", lambda _: compiled)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(OutputError, match=r"^--compile: .*/t/.*make room there, or name other folders by TMPDIR") as caught:
        check_compiler(CPU)
    assert f"{tmp_path} (TMPDIR) has" in str(caught.value) and "no compiler" not in str(caught.value)
