"""Videos and cameras, by PyAV: frames as players show them, and new videos whose frames keep these frames' times.

Frames are read and written one at a time: the memory that this takes does not grow with the length of a video.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from mgd_pipeline.durable import replacing
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.words import verb

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer, OutputContainer

VIDEOS = (
    *(
        ".3gp",
        ".avi",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    ),
)
"""Suffixes of files that are read as videos"""
WRITTEN = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""By suffix what FFmpeg calls the format; these keep the time of every frame"""
_ENCODERS = ("libx264", "libopenh264", "mpeg4")
"""The first that PyAV's build has is used: H.264, else MPEG-4"""
_FINEST = 65535
"""Of a second; the MPEG-4 standard allows no finer clock"""
_BITS = 0.2
"""For each pixel of a frame, where the encoder takes a rate and no quality"""
_BACK = Fraction(1, 10)
"""Seconds; damaged times jump back by less"""
_NOTE = "mgd-pipeline: predicted masks over a video"
_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("dshow", "video={}")}
"""By platform FFmpeg's name of what reads cameras, and of a camera"""


class Picture(NamedTuple):
    """A frame as players show it."""

    pixels: np.ndarray
    """(H, W, 3) uint8 RGB, upright"""
    turned: bool
    """Whether the file holds it lying on its side"""
    moment: int
    """In units of the video's `time_base` from the first frame on; larger than the frame's before"""


class Source(NamedTuple):
    """A video file, or a camera."""

    place: str
    """Path, or name of the camera"""
    camera: bool


@dataclass
class Video:
    """An open video or camera."""

    source: Source
    container: InputContainer
    stream: VideoStream
    stopped: set[int] = field(default_factory=set)
    """Signals that ask to end; the frames then end without a fault"""
    fault: str | None = None
    """Why the frames ended before the video did; known when they have ended"""
    _reached: Fraction = Fraction(0)
    """Seconds at which the packets end that have been read, those of sound and subtitles, too"""

    @property
    def time_base(self) -> Fraction:
        """Seconds, in which the times of frames count."""
        return _fraction(self.stream.time_base, Fraction(1, 90_000))

    @property
    def rate(self) -> Fraction:
        """Frames a second, roughly."""
        return _fraction(self.stream.average_rate or self.stream.guessed_rate, Fraction(30))

    @property
    def expected(self) -> int | None:
        """Number of frames as the file's header says it, or as its duration lets one guess it; None of a camera."""
        if self.source.camera:
            return None
        seconds = self._seconds or self._whole
        return self.stream.frames or (None if seconds is None else max(1, round(seconds * self.rate)))

    @property
    def _seconds(self) -> Fraction | None:
        """The length of the pictures that the file's header promises."""
        if self.stream.duration:
            return self.stream.duration * self.time_base
        return self._whole if len(self.container.streams) == 1 else None

    @property
    def _whole(self) -> Fraction | None:
        """The length of the whole file that its header promises; sound or subtitles may last longer than pictures."""
        length = self.container.duration
        return None if length is None else Fraction(length, 1_000_000)

    @property
    def aspect(self) -> Fraction:
        """Width of a pixel of the file by its height."""
        return _fraction(self.stream.sample_aspect_ratio, Fraction(1))

    def frames(self) -> Iterator[Picture]:
        """All frames, each once, in the order in which players show them. Sets `fault` at the end."""
        step = max(1, round(1 / (self.rate * self.time_base)))
        first: int | None = None
        last, end = -1, 0
        for frame in self._decoded():
            if frame.pts is None:
                now = 0 if first is None else last + step
            else:
                first = frame.pts if first is None else first
                now = frame.pts - first
                if (last - now) * self.time_base > _BACK:  # recordings that were joined: the clock begins anew
                    first, now = frame.pts - last - step, last + step
            last = max(now, last + 1)  # damaged files, and some cameras, have a time twice
            end = max(end, last + (frame.duration or step))
            yield Picture(*upright(frame), last)
        promised, reached = self._seconds, end * self.time_base
        if promised is None:
            promised, reached = self._whole, self._reached - Fraction(self.container.start_time or 0, 1_000_000)
        if self.fault is None and not self.stopped and promised is not None and end:
            lacking = promised - reached
            if lacking > max(Fraction(1, 2), 2 * step * self.time_base):
                self.fault = f"the file ends {float(lacking):.1f} s before the end that its header promises"

    def _decoded(self) -> Iterator[VideoFrame]:
        from av.error import BlockingIOError, FFmpegError, InvalidDataError

        damaged = 0
        while not self.stopped:
            try:
                for packet in self.container.demux():
                    if packet.pts is not None and packet.time_base:
                        self._reached = max(self._reached, (packet.pts + (packet.duration or 0)) * packet.time_base)
                    if packet.stream.index != self.stream.index:
                        continue
                    try:
                        frames = cast("list[VideoFrame]", packet.decode())
                    except InvalidDataError:
                        damaged += 1
                        continue
                    yield from frames
                    if self.stopped:
                        return
                break
            except BlockingIOError:  # a camera whose next frame is not there yet
                time.sleep(0.002)
            except FFmpegError as error:
                if not self.stopped:  # a signal interrupts the wait for a camera
                    self.fault = f"reading ends with: {error.strerror}"
                with suppress(FFmpegError):
                    yield from self.stream.codec_context.decode(None)  # frames that wait for their turn
                break
        if damaged and self.fault is None:
            self.fault = f"{damaged} {verb(damaged, 'packet is damaged', 'packets are damaged')}"


def upright(frame: VideoFrame) -> tuple[np.ndarray, bool]:
    """(H, W, 3) uint8 RGB of a frame, turned and mirrored as its display matrix says; and whether it was lying on its side."""
    pixels = frame.to_ndarray(format="rgb24")
    notes: Any = frame.side_data
    matrix = notes.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels, False
    # x' = a x + c y, y' = b x + d y
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if turned := abs(a) < abs(c):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]), turned


def _fraction(value: Fraction | None, instead: Fraction) -> Fraction:
    """What PyAV says, which is None, or 0 since version 19, where nobody knows it."""
    return Fraction(value.numerator, value.denominator) if value else instead


def require_av() -> None:
    """Raises ParamsError without PyAV."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ParamsError(f"videos and cameras need PyAV ({error}): pip install 'mgd-pipeline[video]'") from None


def is_video(path: Path) -> bool:
    """Whether a path is a video, by its suffix, or the device of a camera."""
    if path.suffix.lower() in VIDEOS:
        return path.is_file()
    try:
        return stat.S_ISCHR(path.stat().st_mode)
    except OSError:
        return False


def is_overlay(path: Path) -> bool:
    """Whether `written` made a file."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(_file(path), options={"protocol_whitelist": "file"}) as container:
            return _NOTE in container.metadata.values()
    except FFmpegError:
        return False


def _file(path: Path | str) -> str:
    """FFmpeg takes what stands before a colon for a protocol."""
    return f"file:{os.fspath(path)}"


@contextmanager
def opened(source: Source) -> Iterator[Video]:
    """Raises DataError for what is no video, and for a camera that cannot be opened."""
    import av
    from av.error import FFmpegError
    from av.stream import Disposition

    try:
        if source.camera:
            kind, pattern = _CAMERAS[sys.platform]
            name = pattern.format(source.place) if source.place.isdigit() or sys.platform == "win32" else source.place
            # macOS's own default, 29.97 frames a second, is refused by its cameras.
            container = av.open(name, format=kind, options={"framerate": "30"} if kind == "avfoundation" else {})
        else:
            container = av.open(_file(source.place), options={"protocol_whitelist": "file"})
    except (FFmpegError, ValueError) as error:
        what = "is not a camera that can be opened" if source.camera else "is not a video that can be read"
        reason = error.strerror if isinstance(error, FFmpegError) else str(error)
        told = "; `ls /dev/video*` shows the cameras" if source.camera and sys.platform == "linux" else ""
        raise DataError(f"{source.place}: {what} ({reason}){told}") from None
    with container:
        stream = cast("VideoStream | None", container.streams.best("video"))  # the first may be the cover of a sound track
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise DataError(f"{source.place}: has no video")
        stream.codec_context.thread_type = "AUTO"
        yield Video(source, container, stream)


class Writer:
    """Writes the frames of one video; made by `written`."""

    def __init__(self, container: OutputContainer, video: Video) -> None:
        self._container, self._video = container, video
        self._stream: VideoStream | None = None

    def add(self, picture: Picture) -> None:
        """H.264 stores colours for blocks of 2 x 2 pixels: the last row or column of an odd size is written twice."""
        from av import VideoFrame

        height, width = picture.pixels.shape[:2]
        pixels = np.pad(picture.pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        stream = self._stream = self._stream or self._begin(height + height % 2, width + width % 2, picture.turned)
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame = frame.reformat(stream.width, stream.height, "yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts, frame.time_base = picture.moment, self._video.time_base
        self._container.mux(stream.encode(frame))

    def end(self) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))

    def _begin(self, height: int, width: int, turned: bool) -> VideoStream:
        encoder = next(name for name in _ENCODERS if _encodes(name))
        clock, rate, aspect = self._video.time_base, self._video.rate, self._video.aspect
        if encoder == "mpeg4" and clock.denominator > _FINEST:
            clock = Fraction(1, _FINEST)
        stream = cast("VideoStream", self._container.add_stream(encoder, rate=rate.limit_denominator(1001)))
        context = stream.codec_context
        context.width, context.height, context.pix_fmt, context.time_base = width, height, "yuv420p", clock
        context.sample_aspect_ratio = 1 / aspect if turned else aspect
        # BT.709 and the range of broadcasts: players guess where a video does not say it.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        if encoder == "libx264":
            context.options = {"crf": "20"}
        else:
            context.bit_rate = max(500_000, round(width * height * float(rate) * _BITS))
        return stream


def _encodes(name: str) -> bool:
    from av.codec import Codec
    from av.codec.codec import UnknownCodecError

    try:
        Codec(name, "w")
    except UnknownCodecError:
        return False
    return True


@contextmanager
def written(output: Path, video: Video) -> Iterator[Writer]:
    """What the block adds becomes the video `output`; after an error, or Ctrl-C, `output` stays what it was."""
    import av
    from av.error import FFmpegError

    with replacing(output) as beside:
        try:
            with av.open(_file(beside), "w", format=WRITTEN[output.suffix.lower()]) as container:
                container.metadata["comment"] = _NOTE
                writer = Writer(container, video)
                yield writer
                writer.end()
        except FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise DataError(f"{output}: cannot be written ({error.strerror})") from None
        descriptor = os.open(beside, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
