"""mgd-pipeline predict on videos and cameras: overlay videos whose frames are the video's own, in order, at their times."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import tiny_student
from mgd_pipeline.pictures.overlays import blend
from mgd_pipeline.students.student import Student, load_student
from mgd_stages.cli import app
from mgd_stages.tools import video as videos
from test_predict import files_below, photo, save

av = pytest.importorskip("av", reason="PyAV is the extra `video`")
Disposition = pytest.importorskip("av.stream").Disposition
TIMES = (0, 40, 55, 300, 310, 900, 2000)
"""Milliseconds; no two steps are alike."""


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["predict", *map(str, arguments), "--device", "cpu"], catch_exceptions=False)


def write_video(path: Path, frames: Any, times: Any, *, clock: int = 1000, codec: str = "png", **options: str) -> Path:
    """A video of (H, W, 3) uint8 frames; without loss if the codec is png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = None
        for pixels, moment in zip(frames, times, strict=True):
            if stream is None:
                stream = container.add_stream(codec, rate=25)
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
                stream.codec_context.time_base = Fraction(1, clock)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, clock)
            container.mux(stream.encode(frame))
        assert stream is not None
        container.mux(stream.encode(None))
    return path


def lasting(path: Path, seconds: int) -> Path:
    """The video, remuxed so that its last frame lasts `seconds`, as that of a screen where nothing moves any more."""
    longer = path.with_name(f"long-{path.name}")
    with av.open(str(path)) as given, av.open(str(longer), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        packets = [packet for packet in given.demux(video=0) if packet.dts is not None]
        packets[-1].duration = int(seconds / packets[-1].time_base)
        for packet in packets:
            packet.stream = stream
            container.mux(packet)
    return longer


def read_video(path: Path) -> tuple[list[np.ndarray], list[Fraction]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in frames], [frame.pts * frame.time_base for frame in frames]


def turned(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """The video with another display matrix (a, b, c, d), as phones write it into the track's header."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    values = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    data[place : place + 36] = np.array(values, ">i4").tobytes()
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def student_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_student(tmp_path_factory.mktemp("student") / "student.safetensors")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every image that a student sees in this process, with its mask."""
    predict, pairs = Student.predict, []

    def noted(self: Student, image: Any, **options: Any) -> np.ndarray:
        mask = predict(self, image, **options)
        pairs.append((image, mask))
        return mask

    monkeypatch.setattr(Student, "predict", noted)
    return pairs


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_each_frame_once_in_order_at_its_time(
    tmp_path: Path, student_file: Path, seen: list[tuple[np.ndarray, np.ndarray]], suffix: str
) -> None:
    """The masks are those of `predict` on the decoded frames; an odd side is made even by one more row or column."""
    frames = [photo(45, 63, seed) for seed in range(len(TIMES))]
    source, out = write_video(tmp_path / "drive.mov", frames, TIMES), tmp_path / f"out{suffix}"
    result = run(student_file, source, "--output", out)
    assert result.exit_code == 0, result.stderr
    assert "7/7 frames" in result.stdout and "frames/s" in result.stdout
    assert f"{out}: 7 frames, the last one at 2.00 s" in result.stdout
    assert len(seen) == len(frames) and all(np.array_equal(image, frame) for (image, _), frame in zip(seen, frames, strict=True))
    student = load_student(student_file)
    written, times = read_video(out)
    assert [round(1000 * moment) for moment in times] == list(TIMES)
    for frame, (_, mask), overlay in zip(frames, seen[: len(TIMES)], written, strict=True):
        assert np.array_equal(mask, student.predict(frame))
        expected = blend(frame, mask, student.palette).astype(int)
        assert overlay.shape == (46, 64, 3)
        assert np.abs(overlay[:45, :63] - expected).mean() < 10 < np.abs(overlay[:45, :63][::-1] - expected).mean()
    assert files_below(tmp_path) == {"drive.mov", out.name}
    with av.open(str(out)) as container:
        context = container.streams.video[0].codec_context
        assert context.name == "h264" and (context.colorspace, context.color_range, context.pix_fmt) == (1, 1, "yuv420p")


def test_joined_recordings_follow_each_other(tmp_path: Path, student_file: Path) -> None:
    """Their clock begins anew in the middle, as in what `cat a.ts b.ts` makes; players show all at its speed."""
    parts = [
        write_video(tmp_path / f"{k}.ts", [photo(32, 40, seed) for seed in range(k, 9)], range(0, 40 * (9 - k), 40), codec="mpeg4")
        for k in range(2)
    ]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    result = run(student_file, joined, "--output", tmp_path / "out.mp4")
    assert result.exit_code == 0, result.stderr
    assert read_video(tmp_path / "out.mp4")[1] == [Fraction(40 * k, 1000) for k in range(17)]


def test_a_long_last_frame_is_no_damage(tmp_path: Path, student_file: Path) -> None:
    source = lasting(write_video(tmp_path / "screen.mov", [photo(32, 40)] * 5, range(0, 200, 40)), 9)
    with av.open(str(source)) as container:
        assert container.streams.video[0].duration * container.streams.video[0].time_base > 9
    result = run(student_file, source, "--output", tmp_path / "out.mp4")
    assert result.exit_code == 0 and "5 frames, the last one at 0.16 s" in result.stdout, result.stderr


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_colours_are_kept(tmp_path: Path, student_file: Path, monkeypatch: pytest.MonkeyPatch, encoder: str) -> None:
    """Also where PyAV's build has no encoder of H.264, and where the clock is finer than MPEG-4 allows."""
    monkeypatch.setattr(videos, "_ENCODERS", (encoder,))
    monkeypatch.setattr("mgd_stages.tools.predict.blend", lambda pixels, mask, palette: pixels)
    colours = [(200, 30, 40), (20, 180, 60), (30, 60, 220), (250, 250, 250), (5, 5, 5)]
    frames = [np.full((48, 64, 3), colour, np.uint8) for colour in colours]
    source = write_video(tmp_path / "in.mov", frames, range(0, 90_000, 18_000), clock=90_000)
    assert run(student_file, source, "--output", tmp_path / "out.mp4").exit_code == 0
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].codec_context.name == {"libx264": "h264", "mpeg4": "mpeg4"}[encoder]
    written, times = read_video(tmp_path / "out.mp4")
    assert np.allclose(np.array(times, float), np.arange(5) / 5, atol=1e-4)
    for frame, colour in zip(written, colours, strict=True):
        assert np.abs(frame.reshape(-1, 3).mean(0) - colour).max() < 8


@pytest.mark.parametrize(
    "matrix",
    [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)],
)
def test_frames_are_turned_as_players_turn_them(
    tmp_path: Path, student_file: Path, seen: list[tuple[np.ndarray, np.ndarray]], matrix: tuple[int, int, int, int]
) -> None:
    """A pixel (x, y) is shown at (a x + c y, b x + d y); the overlay needs no turning any more."""
    pixels = photo(24, 40)
    source = turned(write_video(tmp_path / "phone.mov", [pixels], [0]), matrix)
    assert run(student_file, source, "--output", tmp_path / "out.mp4").exit_code == 0
    a, b, c, d = matrix
    y, x = np.mgrid[:24, :40]
    across, down = a * x + c * y, b * x + d * y
    expected = np.zeros((np.ptp(down) + 1, np.ptp(across) + 1, 3), np.uint8)
    expected[down - down.min(), across - across.min()] = pixels
    assert np.array_equal(seen[0][0], expected)
    assert read_video(tmp_path / "out.mp4")[0][0].shape == expected.shape
    assert np.array((1 << 16, 0, 0, 0, 1 << 16), ">i4").tobytes() in (tmp_path / "out.mp4").read_bytes()


def test_memory_does_not_grow_with_the_length(tmp_path: Path, student_file: Path) -> None:
    """A process has the same peak after a short video, for which the encoder holds as many frames as ever, and after one whose
    further frames have 74 MB."""
    frames = [photo(240, 320, seed) for seed in range(4)]
    for name, count in (("short", 100), ("long", 420)):
        write_video(tmp_path / f"{name}.mp4", (frames[k % 4] for k in range(count)), range(count), clock=25, codec="mpeg4")
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from mgd_stages.tools.device_processes import _memory\n"
        "from mgd_stages.tools.predict import Source, predict_video\n"
        "torch.set_num_threads(1)\n"
        "student, folder = map(Path, sys.argv[1:])\n"
        "for name in ('short', 'long'):\n"
        "    source = Source(str(folder / f'{name}.mp4'), False)\n"
        "    predict_video(student, source, folder / f'{name}-out.mp4', window=None, device=torch.device('cpu'))\n"
        "    print('peak', _memory())\n"
    )
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # else the C library keeps what was freed
    command = [sys.executable, "-c", program, student_file, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=given_back)
    short, long = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak"))
    assert len(read_video(tmp_path / "long-out.mp4")[1]) == 420
    assert long - short < 30e6


@pytest.mark.parametrize("place", ["end", "middle"])
def test_of_a_damaged_video_what_can_be_read_is_written(tmp_path: Path, student_file: Path, place: str) -> None:
    frames = [photo(48, 64, seed) for seed in range(50)]
    source, out = write_video(tmp_path / "drive.mov", frames, range(0, 2000, 40), movflags="+faststart"), tmp_path / "out.mp4"
    size, data = source.stat().st_size, bytearray(source.read_bytes())
    if place == "end":
        os.truncate(source, size // 2)
    else:
        data[size // 2 : size // 2 + 3000] = bytes(3000)
        source.write_bytes(data)
    result = run(student_file, source, "--output", out)
    written, times = read_video(out)
    assert result.exit_code == 1 and 15 < len(written) < 50
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {source}: ")
    last = f"{out} has what can be read: {len(written)} frames, the last one at {float(times[-1]):.2f} s\n"
    assert result.stderr.endswith(last)
    assert (times[-1] == Fraction(196, 100)) == (place == "middle")


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_video_with_sound_that_lacks_its_end_is_told_of(tmp_path: Path, student_file: Path, suffix: str) -> None:
    """Matroska promises the length of the whole file alone, which may be its sound's."""
    frames = [photo(48, 64, seed) for seed in range(50)]
    source, out = tmp_path / f"drive{suffix}", tmp_path / "out.mp4"
    with av.open(str(source), "w", options={"movflags": "+faststart"} if suffix == ".mp4" else {}) as container:
        pictures, sound = container.add_stream("mpeg4", rate=25), container.add_stream("aac", rate=8000)
        pictures.height, pictures.width, pictures.pix_fmt = 48, 64, "yuv420p"
        for pixels in frames:
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for start in range(0, 4 * 8000, 1024):  # twice as long as the pictures
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, start
            container.mux(sound.encode(frame))
        container.mux(pictures.encode(None))
        container.mux(sound.encode(None))
    result = run(student_file, source, "--output", out)
    assert result.exit_code == 0 and f"{out}: 50 frames" in result.stdout, result.stderr
    assert re.search(r"predict: 0/\d+ frames", result.stdout), "how many may be known from the length alone"
    os.truncate(source, source.stat().st_size * 4 // 10)
    result = run(student_file, source, "--output", out)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert f"{source}: the file ends " in result.stderr and 5 < len(read_video(out)[1]) < 50


def test_a_moving_gif_is_a_video(tmp_path: Path, student_file: Path, seen: list[tuple[np.ndarray, np.ndarray]]) -> None:
    frames = [photo(48, 64, seed) for seed in range(5)]
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / "moving.gif", save_all=True, append_images=pictures[1:], duration=[100, 40, 300, 200, 100])
    result = run(student_file, tmp_path / "moving.gif", "--output", tmp_path / "out.mp4")
    assert result.exit_code == 0, result.stderr
    assert read_video(tmp_path / "out.mp4")[1] == [Fraction(k, 100) for k in (0, 10, 14, 44, 64)]
    for (image, _), frame in zip(seen, frames, strict=True):
        assert np.abs(image.astype(int) - frame).mean() < 20, "256 colours"


def test_what_is_no_video(tmp_path: Path, student_file: Path) -> None:
    out = tmp_path / "out.mp4"
    frames = [photo(48, 64, seed) for seed in range(9)]
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mkv").write_text("not a video\n" * 100)
    unfinished = write_video(tmp_path / "unfinished.mov", frames, range(0, 360, 40))
    os.truncate(unfinished, unfinished.stat().st_size // 2)  # its table of frames was at the end
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        sound, cover = container.add_stream("aac", rate=8000), container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt, cover.disposition = 32, 48, "yuvj420p", Disposition.attached_pic
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
        container.mux(cover.encode(av.VideoFrame.from_ndarray(frames[0], format="rgb24").reformat(48, 32, "yuvj420p")))
        container.mux(cover.encode(None))
    for name, said in (
        ("song.mp4", "has no video"),
        ("empty.mp4", "is not a video that can be read ("),
        ("text.mkv", "is not a video that can be read ("),
        ("unfinished.mov", "is not a video that can be read ("),
        ("sound.mp4", "has no video"),
    ):
        result = run(student_file, tmp_path / name, "--output", out)
        assert result.exit_code == 1 and result.stderr.startswith(f"error: {tmp_path / name}: {said}"), result.stderr
        assert len(result.stderr.splitlines()) == 1 and not out.exists()


def test_an_interrupted_call_leaves_the_old_video(tmp_path: Path, student_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second call replaces it, because predict made it; a video of somebody else stays."""
    frames = [photo(48, 64, seed) for seed in range(9)]
    source, out = write_video(tmp_path / "in.mov", frames, range(0, 360, 40)), tmp_path / "out.mp4"
    assert run(student_file, source, "--output", out).exit_code == 0
    before, calls = out.read_bytes(), iter(range(9))
    predict = Student.predict

    def interrupted(self: Student, image: Any, **options: Any) -> np.ndarray:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return predict(self, image, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Student, "predict", interrupted)
        result = run(student_file, source, "--output", out)
    assert result.exit_code == 130 and "the same command begins again" in result.stderr
    assert out.read_bytes() == before and files_below(tmp_path) == {"in.mov", "out.mp4"}
    assert run(student_file, source, "--output", out).exit_code == 0
    for name in ("in.mov", "out.mp4"):
        refused = run(student_file, source if name == "in.mov" else out, "--output", source)
        assert refused.exit_code == 2 and len(refused.stderr.splitlines()) == 1
    assert len(read_video(source)[0]) == 9


def test_a_camera_ends_with_ctrl_c(tmp_path: Path, student_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg's test picture stands in for the camera; what was seen is a whole video."""
    monkeypatch.setitem(videos._CAMERAS, sys.platform, ("lavfi", "testsrc=size=64x48:rate=10"))
    predict, count = Student.predict, 0

    def pressed(self: Student, image: Any, **options: Any) -> np.ndarray:
        nonlocal count
        count += 1
        if count == 5:
            signal.raise_signal(signal.SIGINT)
        return predict(self, image, **options)

    monkeypatch.setattr(Student, "predict", pressed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started with it ignored
    result = run(student_file, "--camera", "0", "--output", tmp_path / "out.mp4")
    assert result.exit_code == 0, result.stderr
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler, "the handlers are as before"
    assert "predict: 0 frames\n" in result.stdout and "5 frames, the last one at 0.40 s" in result.stdout
    written, times = read_video(tmp_path / "out.mp4")
    assert len(written) == 5 and times == [Fraction(k, 10) for k in range(5)] and files_below(tmp_path) == {"out.mp4"}
    monkeypatch.setitem(videos._CAMERAS, sys.platform, ("lavfi", "no such picture"))
    gone = run(student_file, "--camera", "0", "--output", tmp_path / "gone.mp4")
    assert gone.exit_code == 1 and gone.stderr.startswith("error: 0: is not a camera that can be opened (")


def test_options_that_do_not_go_with_videos(tmp_path: Path, student_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, out = save(tmp_path / "a.png", photo(32, 32)), tmp_path / "out.mp4"
    source = write_video(tmp_path / "in.mov", [photo(32, 32)], [0])
    for arguments, said in (
        ([source, "--output", tmp_path / "out"], f"--output {tmp_path}/out: the overlays of a video are a video; name a file"),
        ([source, "--output", "-"], "--output -: the overlays of a video are a video; name a file"),
        ([source, "--output", out, "--json"], "--json: is for images; a video becomes one video"),
        ([source, "--output", out, "--overlays"], "--overlays: is for images; a video becomes one video"),
        ([source, image, "--output", out], f"{source}: is a video, which excludes all other inputs"),
        ([image, "--camera", "0", "--output", out], "0: is a camera, which excludes all other inputs"),
        ([tmp_path / "gone.mp4", "--output", out], f"{tmp_path}/gone.mp4: no such file or folder"),
        (["--camera", "", "--output", out], "--camera '': is not the name of a camera"),
        (["--camera", "0\n", "--output", out], r"--camera '0\n': is not the name of a camera"),
        ([image, "--output", out], f"--output {out}: is the name of a video, and no input is a video; name a folder"),
        (["--output", out], "INPUT: name images, folders or a video; or a camera, such as --camera 0"),
        ([source, "--output", source / "out.mp4"], f"{source}: is not a folder"),
    ):
        result = run(student_file, *arguments)
        assert result.exit_code == 2, (arguments, result.stderr)
        assert result.stderr.startswith(f"error: {said}") and len(result.stderr.splitlines()) == 1, result.stderr
    monkeypatch.setitem(sys.modules, "av", None)
    result = run(student_file, source, "--output", out)
    assert result.exit_code == 2 and result.stderr.endswith("pip install 'mgd-pipeline[video]'\n")
    assert files_below(tmp_path) == {"a.png", "in.mov"}
