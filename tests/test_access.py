"""What may not be read, or lies on a disk that does not answer, is neither missing nor damaged; what is no cache is called so."""

from __future__ import annotations

import ast
import builtins
import errno
import io
import json
import os
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from caches import build, file_bytes, images, spoil
from conftest import TINY, tiny_student
from mgd_pipeline import access
from mgd_pipeline.caches import shard_reader
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.data.images import read_image
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import AccessError, CacheError, CacheIncomplete, DataError, shell_command
from mgd_pipeline.networks.weights import read_metadata, read_state_dict
from mgd_stages.cli import app
from mgd_stages.run.project import Project, open_project
from object_server import failing as failing_answers
from object_server import serving

SHARD = "logits/c/1/0/0/0"
SETS = [part for key in TINY for part in ("--set", key)]
DESTROYS = ("remove", "precompute-teachers", "dvc checkout", "prepare-data", "is missing", "does not exist", "no such file")
"""What no message may say of a file that may be whole."""


CALLS = ("stat", "open", "listdir", "scandir")


@contextmanager
def failing(below: Path, number: int, calls: tuple[str, ...] = CALLS) -> Iterator[None]:
    """The system gives this error for all paths below one. Tests may run as root, whom no mode keeps out."""

    def refuse(real: Any) -> Any:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if not isinstance(path, int) and f"{Path(os.fspath(path)).absolute()}/".startswith(f"{below.absolute()}/"):
                raise OSError(number, os.strerror(number), os.fspath(path))
            return real(path, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(os, name, refuse(getattr(os, name)))
        for module in (builtins, io) if "open" in calls else ():
            patch.setattr(module, "open", refuse(open))
        yield


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "300"})


def lines_of(done: Any) -> list[str]:
    assert isinstance(done.exception, SystemExit) or done.exception is None, done.exception
    return done.stderr.splitlines()


REFUSALS = {
    errno.EACCES: "you may not read it (Permission denied); check ",
    errno.EPERM: "you may not read it (Operation not permitted); check ",
    **{
        number: f"cannot be read now ({os.strerror(number)}), which does not mean that it is damaged; see whether its disk is"
        for number in (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EREMOTEIO)
    },
    errno.EMFILE: "cannot be opened, too many files are open; raise `ulimit -n`",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 11 images, to read."""
    return build(tmp_path_factory.mktemp("with space"), images(11))


@pytest.mark.parametrize(
    ("place", "number"),
    [
        *((place, errno.EACCES) for place in ("", "commit.json", "zarr.json", "images.parquet", "logits")),
        *((place, errno.EIO) for place in ("", "commit.json", "zarr.json", "images.parquet", "logits")),
        *((SHARD, number) for number in REFUSALS),
    ],
)
def test_what_a_cache_may_not_give_is_neither_missing_nor_damaged(whole: Path, place: str, number: int) -> None:
    path = whole
    with failing(path / place, number):
        done = call("cache", "verify", "--full", path)
        listed = call("cache", "list", path.parent)
    assert done.exit_code == 7, done.output
    assert lines_of(done) and (len(lines_of(done)) == 1 or place == "logits")
    for line in lines_of(done):
        assert line.startswith(f"error: {path / place}") and REFUSALS[number] in line
        assert not any(word in line for word in DESTROYS), line
    refused = listed.exit_code == 7 and f"error: {path / place}" in listed.stderr and REFUSALS[number] in listed.stderr
    assert refused or place in ("logits", SHARD)
    assert "no damage found" not in done.stdout or "only a part of it can be read" in done.stdout


def test_a_disk_that_goes_away_between_two_reads_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "_WHOLE", 0)
    cache = open_cache(whole)
    cache.read([4])

    def away(*_: object) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    for shard in cache._shards.values():
        shard.preadv = away
    with pytest.raises(AccessError, match=rf"{whole}/logits/c/1/0/0/0: cannot be read now"):
        cache.read([5])


def test_others_are_listed_and_verified_beside_a_closed_one(whole: Path, tmp_path: Path) -> None:
    """And damage counts more than what could not be read."""
    for name in ("a", "b", "c"):
        shutil.copytree(whole, tmp_path / f"{name}.zarr")
    with failing(tmp_path / "b.zarr", errno.EACCES):
        listed, done = call("cache", "list", tmp_path), call("cache", "verify", "--json", tmp_path)
    a, c = listed.stdout.splitlines()
    assert "11 images" in a and "11 images" in c and listed.exit_code == 7
    assert listed.stderr.startswith(f"error: {tmp_path}/b.zarr/commit.json: you may not read it")
    assert done.exit_code == 7 and [len(facts["unread"]) for facts in json.loads(done.stdout)] == [0, 1, 0]

    closed, damaged = tmp_path / "a.zarr" / SHARD, tmp_path / "a.zarr/region_embeddings/c/0/0/0/0"
    spoil(damaged)
    with failing(closed, errno.EACCES, ("open",)):
        done = call("cache", "verify", "--full", tmp_path / "a.zarr")
    assert done.exit_code == 3
    assert any(f"{damaged}: differs" in line for line in lines_of(done))
    assert sum(f"{closed}: you may not read it" in line for line in lines_of(done)) == 1, "once, however many records"


def test_a_closed_cache_is_not_computed_again(project: Project, batches_seen: list[int]) -> None:
    """Neither where it lies, nor from a closed shard of the work folder."""
    shard = next((project.base / ".mgd/work").glob("targets-*/*/shards/*"))
    for closed in (project.targets("wide"), shard):
        before = file_bytes(closed)
        if closed == shard:  # the cache is gone, as under DVC, and its shards are what is left
            for name in ("wide", "deep"):
                shutil.rmtree(project.targets(name))
        with failing(closed, errno.EACCES):
            done = call("precompute-teachers", "--config", project.base / "params.yaml", *SETS)
        assert done.exit_code == 7 and REFUSALS[errno.EACCES] in lines_of(done)[-1], done.output
        assert file_bytes(closed) == before and batches_seen == []


def test_who_closed_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that is closed, not the file that was asked for; its owner, or oneself; a command that a shell takes."""
    folder = tmp_path / "Anna's caches"
    (folder / "t.zarr").mkdir(parents=True)
    folder.chmod(0o700)
    monkeypatch.setattr(os, "access", lambda place, need, **_: not (need & os.X_OK and place == folder))

    def said() -> str:
        return str(access.access_error(folder / "t.zarr/commit.json", PermissionError(errno.EACCES, "Permission denied")))

    owner, command = access._owner(os.geteuid()), f"rX {shlex.quote(str(folder))}` (see the page Sharing)"
    assert said() == (
        f"{folder}/t.zarr/commit.json: you may not read it (Permission denied); check the permissions drwx------ of the folder "
        f"{folder}, which belongs to {owner}: call `chmod -R u+{command}"
    )
    group = folder.stat().st_gid
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    monkeypatch.setattr(os, "getgroups", lambda: [])
    for mine, whom in ((group, "g"), (group + 1, "o")):
        monkeypatch.setattr(os, "getegid", lambda mine=mine: mine)
        assert said().endswith(f"which belongs to {owner}: ask {owner} to call `chmod -R {whom}+{command}")
    assert access._owner(2**31 - 7) == f"the user {2**31 - 7}"


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's view needs root, who can become one")
def test_another_user_sees_it_so(tmp_path: Path) -> None:
    """By the kernel's own answers."""
    top = Path("/tmp") if os.stat("/tmp").st_mode & stat.S_IXOTH else tmp_path
    place = top / f"mgd-access-{os.getpid()}"
    try:
        path = build(place, images(5))
        place.chmod(0o755)
        (path / "logits").chmod(0o700)
        read, write = os.pipe()
        child = os.fork()
        if not child:  # no Python of another user's need be there
            os.setgroups([])
            os.setgid(54321)
            os.setuid(54321)
            try:
                open_cache(path)
                said = "opened"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            os.write(write, said.encode())
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        said = os.read(read, 2**16).decode()
        os.close(read)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    assert said.startswith(f"AccessError: {path}/logits/")
    assert ": you may not read it (Permission denied); check the permissions drwx------ " in said
    assert f"of the folder {path}/logits, which belongs to root: ask root to call `chmod -R o+rX {path}/logits`" in said


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
def test_manifests_weights_and_students_are_neither_missing_nor_damaged(
    finished_project: Path, tmp_path: Path, number: int
) -> None:
    project, student = open_project(finished_project / "params.yaml", TINY), tiny_student(tmp_path / "student.safetensors")
    reads: list[tuple[Path, Callable[[], object]]] = [
        (project.manifest, lambda: read_manifest(project.manifest, project.base)),
        (project.base / project.params.data.root, lambda: read_manifest(project.manifest, project.base)),
        (student, lambda: read_state_dict(student)),
        (student, lambda: read_metadata(student)),
    ]
    for path, read in reads:
        with failing(path, number), pytest.raises(AccessError) as caught:
            read()
        said = str(caught.value)
        assert said.startswith(str(path)) and REFUSALS[number] in said and not any(word in said for word in DESTROYS), said


def test_images_of_a_disk_that_is_away_are_not_left_out(project: Project) -> None:
    """--on-error skip is for images that cannot be used; one that may not be read is one of these, where a person says so."""
    row = read_manifest(project.manifest, project.base).training[0]
    path = project.base / project.params.data.root / row.image_path
    before = file_bytes(project.manifest)
    with failing(path, errno.ESTALE):
        with pytest.raises(AccessError, match="cannot be read now"):
            read_image(path)
        done = call("prepare-data", "--on-error", "skip", "--config", project.base / "params.yaml", *SETS)
    assert done.exit_code == 7 and file_bytes(project.manifest) == before
    with failing(path, errno.EACCES), pytest.raises(DataError, match="you may not read it"):
        read_image(path)


@pytest.mark.parametrize(
    ("status", "said"),
    [(403, "you may not read it"), (503, "cannot be read now"), (0, "cannot be read now")],
)
def test_a_bucket_that_refuses_is_not_missing(status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """403 is what S3 says of a bucket that one may not list; 0 is a server that is not there."""
    pytest.importorskip("obstore", reason="caches at URLs are read where the extra remote is")
    monkeypatch.setattr("mgd_pipeline.caches.remote._WAITS", ())
    with serving(tmp_path) as server:
        server.faults.append(failing_answers(status, 1))
        url = server.url("s3", "wide.zarr", monkeypatch)
        if not status:
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        with pytest.raises(AccessError, match=said) as caught:
            open_cache(url)
    message = str(caught.value)
    assert message.startswith(f"{url}/commit.json: ") and not any(word in message for word in DESTROYS)


NO_CACHES: dict[str, Callable[[Path], object]] = {
    "a file": lambda place: place.write_text("text"),
    "a student.safetensors": tiny_student,
    "an empty folder": lambda place: place.mkdir(),
    "photos": lambda place: (place / "images").mkdir(parents=True),
    "array.zarr": lambda place: zarr.save_array(place, np.zeros((4, 4))),  # pyright: ignore[reportArgumentType]
    "group.zarr": lambda place: zarr.save_group(place, elevation=np.zeros((4, 4))),  # pyright: ignore[reportArgumentType]
}
"""Makes what somebody may take for a cache."""


@pytest.mark.parametrize("kind", NO_CACHES)
def test_what_is_no_cache_is_called_so_and_not_replaced_by_one(tmp_path: Path, kind: str) -> None:
    place = tmp_path / kind
    NO_CACHES[kind](place)
    for command in (("verify", place), ("info", place), ("diff", place, place)):
        done = call("cache", *command)
        assert done.exit_code == 4, done.output
        said = "is not a teacher cache; name a teacher cache, or a folder of them such as data/targets"
        assert lines_of(done) == [f"error: {place}: {said}"]
    if kind != "an empty folder":
        place.rename(tmp_path / "t.zarr")
        message = r"t\.zarr: is not a teacher cache, and a cache is to take its place; move it, or remove it"
        with pytest.raises(CacheError, match=message):
            build(tmp_path, images(5))
        assert (tmp_path / "t.zarr").exists() and not (tmp_path / "work/shards").exists(), "before anything is computed"


def test_a_cache_that_is_not_finished_is_still_called_so(whole: Path, tmp_path: Path) -> None:
    path = shutil.copytree(whole, tmp_path / "it's $HOME `x` 1.zarr")
    (path / "commit.json").unlink()
    (path / ".DS_Store").write_bytes(b"")
    done = call("cache", "verify", path)
    assert done.exit_code == 4 and lines_of(done) == [f"error: {path}: is not finished; run `mgd-pipeline precompute-teachers`"]
    command = shell_command("mgd-pipeline", "cache", "verify", path)
    assert f"`{command}` says more" in call("cache", "list", tmp_path).stdout
    assert (
        subprocess.run(["bash", "-c", f"echo {command}"], capture_output=True, text=True).stdout.split("verify ")[1] == f"{path}\n"
    )
    with pytest.raises(CacheIncomplete, match=r"does not exist"):
        open_cache(tmp_path / "nothing.zarr")


def test_no_message_builds_a_command_of_its_own() -> None:
    """Paths and names in backquoted commands, and in commands with an example, go through `shell_command`."""
    words = ("mgd-pipeline ", "chmod ", "ln -", "ffmpeg ", "hf download {", "mv ", "rm ", "cd ")
    own = []
    for path in (Path(__file__).parents[1]).glob("*/mgd_*/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                spans = [span for span in text.split("`")[1::2] if "\0" in span and span.startswith(words)]
                own += [(path.name, span) for span in spans if not span.startswith("mgd-pipeline \0")]
    assert not own
