"""Shared fixtures: a tiny rendered project, trained for a few steps once a session and copied by the tests that need it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

import caches
from mgd_pipeline.caches.format import Layout
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.segmentation import build_network, upsample
from mgd_pipeline.networks.weights import save_weights
from mgd_pipeline.params import NetworkParams
from mgd_pipeline.teachers.kinds import build_teacher
from mgd_pipeline.teachers.teacher import Teacher
from mgd_pipeline.training.dataset import TrainingSet
from mgd_stages.demo import demo
from mgd_stages.run.project import Project, open_project

PLAIN = [
    "targets.logits=uint8",
    "targets.region_embeddings=float16",
    "targets.compression=none",
    "losses.image_distance=l1",
]
"""The encodings of version 0.1.0, which feed every loss and whose sizes are known beforehand."""
TINY = [
    *PLAIN,
    "data.height=48",
    "data.width=72",
    "data.train=24",
    "data.val=2",
    "data.test=5",
    "data.partition=1/4",
    "views.crop=[32,32]",
    "teachers.wide.encoder=tu-test_resnet",
    "teachers.wide.decoder_channels=16",
    "teachers.deep.encoder=tu-test_efficientnet",
    "teachers.deep.decoder_channels=32",
    "student.network.encoder=tu-test_efficientnet",
    "student.network.decoder_channels=16",
    "teacher_training.steps=3",
    "teacher_training.labelled_batch=2",
    "teacher_training.unlabelled_batch=2",
    "student.steps=4",
    "student.labelled_batch=2",
    "student.unlabelled_batch=2",
    "evaluation.overlays=1",
]
LONGER = [*TINY, "student.steps=60", "student.ema=0.9"]

T = TypeVar("T")
_SAID = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="prove with the large counts (make test-long), not the small ones")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_SAID, []):
        terminalreporter.line(f"counted: {line}")


class Counted:
    """How much a proof tries, and what it counted, printed at the end of a run in one process, such as `make test-long`."""

    def __init__(self, config: pytest.Config) -> None:
        self._long = config.getoption("--long")
        self._said = config.stash.setdefault(_SAID, [])

    def of(self, short: T, long: T) -> T:
        return long if self._long else short

    def say(self, line: str) -> None:
        self._said.append(line)


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Counted:
    return Counted(request.config)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two cores are shared; and sums in one order make runs comparable to the bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_hub() -> Iterator[None]:
    """No test asks the hub for weights, nor waits until it does not answer; nor do commands in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(params=[caches.LAYOUT, caches.SMALL], ids=["plain", "small"])
def layout(request: pytest.FixtureRequest) -> Iterator[Layout]:
    """The layout of the caches that a test builds: one that stores values as they are, and one that encodes and compresses them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches, "USED", request.param)
        yield request.param


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole pipeline at toy size; read-only for tests."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    demo(folder, full=True, seed=0, overrides=TINY, device=torch.device("cpu"))
    return folder


@pytest.fixture
def project(finished_project: Path, tmp_path: Path) -> Project:
    """A private copy of the finished project."""
    copy = tmp_path / "project"
    shutil.copytree(finished_project, copy, symlinks=True)
    return open_project(copy / "params.yaml", TINY)


@pytest.fixture
def longer(project: Project) -> Project:
    """The project with a student that is worth interrupting."""
    return open_project(project.base / "params.yaml", LONGER)


def as_folder(project: Project, classes: Sequence[str], *overrides: str) -> Project:
    """A finished project whose data set is one of one's own, with the images, masks and ids of the built-in one."""
    data = {"dataset": "folder", "root": project.params.data.root, "partition": "1/4", "classes": list(classes)}
    tiny = [one for one in TINY if not one.startswith("data.")]
    return open_project(project.base / "params.yaml", [f"data={json.dumps(data)}", *tiny, *overrides])


@pytest.fixture
def batches_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images stage one shows a teacher at a time, in this process, as it does."""
    import mgd_stages.run.teacher_batches as stage

    seen: list[int] = []
    real = stage.dense_targets

    def counting(teacher: Teacher, images: list[Any], *others: Any) -> Any:
        seen.append(len(images))
        return real(teacher, images, *others)

    monkeypatch.setattr(stage, "dense_targets", counting)
    return seen


def teacher_of(project: Project, name: str) -> Teacher:
    """A finished project's teacher, ready to predict."""
    classes = read_manifest(project.manifest, project.base).classes
    return build_teacher(name, project.params.teachers[name], classes, project.base)


def region_means(features: torch.Tensor, size: tuple[int, int], stride: int = 16) -> torch.Tensor:
    """What region embeddings are: means over blocks of pixels of native features (B, D, h, w) of images of `size`."""
    padded = (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
    full = upsample(features, padded)[..., : size[0], : size[1]]
    missing = (0, -size[1] % stride, 0, -size[0] % stride)
    return torch.nn.functional.avg_pool2d(torch.nn.functional.pad(full, missing, mode="replicate"), stride)


def tiny_student(path: Path, *, decoder: str = "fpn", seed: int = 0, **changes: Any) -> Path:
    """A student file with random weights, whose logits depend on the normalisation and whose masks have several classes."""
    params = NetworkParams(encoder="tu-test_resnet", decoder=decoder, decoder_channels=64)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(seed)
    network = build_network(params, len(changes.get("classes", range(4))))
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            torch.nn.init.normal_(layer.running_mean, std=0.2)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)
    head = network.model.segmentation_head[0]
    torch.nn.init.normal_(head.weight)
    with torch.no_grad():  # no class is everywhere
        network.eval()
        logits = network(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 4 - 2).logits
        head.bias -= logits.mean((0, 2, 3))
    metadata = {
        "kind": "student",
        "network": params.model_dump(),
        "classes": ["sky", "sea", "sand", "salt"],
        "palette": [[0, 0, 0], [0, 0, 255], [255, 255, 0], [250, 240, 230]],
        "normalisation": [list(values) for values in normalisation(params.encoder)[:2]],
        "long_side": None,
        **changes,
    }
    save_weights(path, network.model.state_dict(), metadata)
    return path


def training_set(project: Project, seed: int = 0) -> TrainingSet:
    """What train-student reads in a finished project, with the targets of all teachers."""
    params = project.params
    manifest = read_manifest(project.manifest, project.base)
    caches = {name: project.targets(name) for name in params.teachers}
    return TrainingSet(manifest, params.views, params.cutmix, params.student, seed, caches=caches)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on this machine that has the bucket `lab`."""
    missing = [name for name in ("dvc_s3", "moto", "flask", "flask_cors") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: S3 is tested where the dev extra is")
    program = (
        "from moto.server import ThreadedMotoServer\n"
        "server = ThreadedMotoServer('127.0.0.1', 0, verbose=False)\n"
        "server.start()\n"
        "print('http://%s:%d' % server.get_host_and_port(), flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address, "the S3 server does not begin; its errors are above"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(urllib.request.Request(f"{address}/lab", method="PUT")).close()
        yield address
        server.kill()


def run(folder: Path, *command: str, **environment: str) -> str:
    """A command in a folder, as on a machine where nobody has configured git or DVC; returns what it printed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "1",
            "OMP_NUM_THREADS": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            **{f"GIT_{role}_{key}": f"{key}@example" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")},
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def stages_run(output: str) -> set[str]:
    """The stages that a `dvc repro` ran, by what it printed."""
    return set(re.findall(r"Running stage '([^']+)'", output))


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """Tests kill processes and let calls fail, but cut no power: syncing shows nothing here, and took most of the time of a build.
    Commands in processes of their own do sync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


SERVER = """
import json, os, signal, socket, sys
import dvc.cli.parser, dvc.repo.reproduce, dvc.repo.checkout, dvc.stage.run, dvc_data.hashfile.checkout
import timm, torch, transformers.models.segformer
from mgd_stages.stages import compare_teachers, evaluate, precompute_teachers, prepare_data, train_student, train_teacher
from mgd_stages.reports import page
from mgd_stages.cli import app

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(sys.argv[1])
    listening.listen()
    while True:
        call, _ = listening.accept()
        if os.fork():
            call.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message, files, _, _ = socket.recv_fds(call, 1 << 20, 2)
        asked = json.loads(message)
        for number, file in enumerate(files, 1):
            os.dup2(file, number)
        os.chdir(asked["folder"])
        os.environ.update(asked["environment"])
        sys.path[0], sys.argv = "", asked["command"]
        try:
            code = (app if sys.argv[0] == "mgd-pipeline" else dvc.cli.main)(sys.argv[1:])
        except SystemExit as left:
            code = left.code
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        call.send(bytes([code or 0]))
        os._exit(0)
"""
"""Runs commands in forks of one process that has imported everything: twenty stages import torch once, not twenty times."""
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as call:
    call.connect({address!r})
    command = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    asked = {{"folder": os.getcwd(), "command": command, "environment": dict(os.environ)}}
    socket.send_fds(call, [json.dumps(asked).encode()], [1, 2])
    sys.exit((call.recv(1) or b"?")[0])
"""


@dataclass
class Forks:
    """`dvc` and `mgd-pipeline` as `run` runs them, but in forks of one process. They see the caches of published weights in
    home/hub and home/torch, and no network."""

    home: Path

    def run(self, folder: Path, *command: str, **environment: str) -> str:
        path = [str(self.home / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        return run(folder, *command, **{"PATH": os.pathsep.join(path), **environment})


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    home = tmp_path_factory.mktemp("forks")
    caches = {"TORCH_HOME": str(home / "torch"), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(home / "calls")], env={**os.environ, **caches})
    (home / "bin").mkdir()
    for name in ("mgd-pipeline", "dvc"):
        (home / "bin" / name).write_text(CLIENT.format(python=sys.executable, address=str(home / "calls")))
        (home / "bin" / name).chmod(0o755)
    while not (home / "calls").exists():
        assert server.poll() is None
        time.sleep(0.1)
    yield Forks(home)
    server.kill()
    server.wait()
