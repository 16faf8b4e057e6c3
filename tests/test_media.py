"""Reading media: the same frames as the published system's, from every form of source, and clear errors for bad files.

Every property is tested with decord (where it is installed) and with PyAV alone.
"""

import base64
import contextlib
import http.server
import io
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import (
    NUM_LEVELS,
    cut,
    damage_packet,
    frame_numbers,
    moving_noise,
    set_avi_length,
    tone,
    trim_start,
    write_media,
)
from safetensors.numpy import load_file

from transformers_videollama import media
from transformers_videollama.media import (
    MediaError,
    has_audio,
    headtail_frame_indices,
    open_media,
    read_audio,
    read_video,
    read_video_metadata,
    time_limit,
    uniform_frame_indices,
)

SYNTH = Path(__file__).parent / "reference" / "synth"
SIZE = (48, 64)


@pytest.fixture(params=["with decord", "without decord"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which decoder `read_video` finds by itself."""
    if request.param == "without decord":
        monkeypatch.setattr(media, "_is_decord_available", lambda: False)
        return "pyav"
    pytest.importorskip("decord", reason="decord has no wheels for this platform")
    return "decord"


def choose(*indices: int):
    return lambda metadata: list(indices)


# ---------------------------------------------------------------------------------------------------------------------
# The published system's frames


@pytest.mark.parametrize("name", ["clip", "clip_short", "clip_silent"])
def test_frames_are_those_of_the_published_system(name: str, backend: str):
    frames, metadata = read_video(SYNTH / f"{name}.mp4", num_frames=8)
    notes = json.loads((SYNTH / f"{name}.json").read_text())
    expected = load_file(SYNTH / f"{name}.safetensors")["frames_uint8"]
    stride = notes["frame_stride_kept"]
    assert metadata.video_backend == backend
    assert frames.dtype == torch.uint8 and frames.shape == (len(expected), 3, 224, 224)
    difference = np.abs(frames.permute(0, 2, 3, 1)[:, ::stride, ::stride].numpy().astype(int) - expected)
    if backend == "decord":
        assert difference.max() == 0
    else:
        assert difference.mean() < 0.5
    seconds = ", ".join(str(round(index / metadata.fps, 1)) for index in metadata.frames_indices)
    assert f"sampled at {seconds} seconds" in notes["msg"]


@pytest.mark.parametrize("length", [1, 5, 7, 8, 9, 100, 125, 170, 100_001])
def test_uniform_frames_are_spread_over_the_video(length: int):
    indices = uniform_frame_indices(length, 8)
    assert len(indices) == min(8, length)
    assert indices[0] == 0 and indices[-1] < length
    steps = np.diff(indices)
    assert len(steps) == 0 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 100])
@pytest.mark.parametrize("num_frames", [1, 2, 7, 8])
def test_headtail_frames_come_from_both_halves(length: int, num_frames: int):
    indices = headtail_frame_indices(length, num_frames, torch.Generator().manual_seed(0))
    count = min(num_frames, length)
    assert indices == sorted(set(indices)) and len(indices) == count
    assert sum(index < length // 2 for index in indices) == count // 2
    assert indices[0] >= 0 and indices[-1] < length


def test_headtail_frames_are_random_and_repeatable():
    draws = {tuple(headtail_frame_indices(100, 8)) for _ in range(5)}
    assert len(draws) == 5
    seeded = [headtail_frame_indices(100, 8, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert seeded[0] == seeded[1]
    torch.manual_seed(2)
    first = headtail_frame_indices(100, 8)
    torch.manual_seed(2)
    assert headtail_frame_indices(100, 8) == first


@pytest.mark.parametrize("function", [uniform_frame_indices, headtail_frame_indices])
@pytest.mark.parametrize(("length", "num_frames"), [(10, 0), (0, 8), (10, -1)])
def test_frames_cannot_be_chosen_from_nothing(function, length: int, num_frames: int):
    with pytest.raises(ValueError, match="positive"):
        function(length, num_frames)


# ---------------------------------------------------------------------------------------------------------------------
# Sources


@contextlib.contextmanager
def serve(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def address() -> Iterator[str]:
    """A web server: the clips under /clip.mp4 …, and pages that go wrong."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.split("?")[0].strip("/")
            if name == "moved":
                self.redirect("/clip.mp4")
            elif name == "to_file":
                self.redirect(f"file://{SYNTH / 'clip.mp4'}")
            elif name == "to_ftp":
                self.redirect("ftp://127.0.0.1/clip.mp4")
            elif name == "round_and_round":
                self.redirect("/round_and_round")
            elif name == "breaks_off":
                self.answer((SYNTH / "clip.mp4").read_bytes()[:1000], length=5000)
            elif name == "page":
                self.answer(b"<html>Not a video</html>" * 100)
            elif (SYNTH / name).is_file():
                self.answer((SYNTH / name).read_bytes())
            else:
                self.send_error(404)

        def redirect(self, target: str):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()

        def answer(self, data: bytes, length: int | None = None):
            self.send_response(200)
            self.send_header("Content-Length", str(length or len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with serve(Handler) as url:
        yield url


def test_every_form_of_source_gives_the_same(address: str, backend: str):
    path = SYNTH / "clip.mp4"
    data = path.read_bytes()
    frames, metadata = read_video(str(path), 8)
    samples, rate = read_audio(str(path))
    sources = {
        "path": path,
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "file object": io.BytesIO(data),
        "data URI": f"data:video/mp4;base64,{base64.b64encode(data).decode()}",
        "address": f"{address}/clip.mp4?version=2",
        "redirected address": f"{address}/moved",
    }
    for name, source in sources.items():
        with open_media(source) as opened:
            assert torch.equal(read_video(opened, 8)[0], frames), name
            assert read_video(opened, 8)[1] == metadata, name
            assert np.array_equal(read_audio(opened)[0], samples), name


def test_a_title_in_an_unknown_encoding_is_no_reason_not_to_read(tmp_path: Path):
    path = write_media(tmp_path / "clip.mp4", title="né")
    data = path.read_bytes()
    assert data.count("né".encode()) == 1
    path.write_bytes(data.replace("né".encode(), "né\xff".encode("latin-1")))
    assert len(read_video(path, 8)[0]) == 8


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "100% %d.mp4", "with space.mp4", "ünïcode.mp4", "-dash.mp4", "pipe|x.mp4"]
)
def test_file_names_are_taken_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, backend: str):
    (tmp_path / name).write_bytes((SYNTH / "clip_short.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(read_video(name, 8)[0]) == 5
    assert read_audio(name) is not None


def test_downloads_leave_nothing_behind(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    read_video(f"{address}/clip.mp4", 8)
    with pytest.raises(MediaError):
        read_video(f"{address}/page", 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("missing.mp4", "Not Found"),
        ("page", "no media file"),
        ("breaks_off", "1000 of 5000 bytes"),
        ("to_file", "not allowed"),
        ("to_ftp", "unknown url type: ftp"),
        ("round_and_round", "cannot be fetched"),
    ],
)
def test_failed_downloads_are_named(address: str, page: str, reason: str):
    with pytest.raises(MediaError, match=reason) as error:
        read_video(f"{address}/{page}", 8)
    assert f"{address}/{page}" in str(error.value)


def test_downloads_have_a_limit(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(media, "MAX_DOWNLOAD_BYTES", 2000)
    with pytest.raises(MediaError, match="larger than"):
        read_video(f"{address}/clip.mp4", 8)


def test_silent_servers_time_out(monkeypatch: pytest.MonkeyPatch):
    finished = threading.Event()

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            finished.wait(10)

    monkeypatch.setattr(media, "DOWNLOAD_TIMEOUT_SECONDS", 0.2)
    with serve(Silent) as url:
        with pytest.raises(MediaError, match="timed out"):
            read_video(f"{url}/clip.mp4")
        finished.set()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (f"file://{SYNTH / 'clip.mp4'}", "not file://"),
        ("ftp://127.0.0.1/clip.mp4", "not ftp://"),
        ("http://127.0.0.1:1/clip.mp4", "refused"),
        ("http://[bad/clip.mp4", "clip.mp4"),
        ("data:video/mp4;base64,!!!", "base64"),
        ("data:video/mp4", "comma"),
        (b"", "no bytes"),
        ("/no/such/file.mp4", "does not exist"),
        (os.path.dirname(__file__), "is a folder"),
    ],
)
def test_unusable_sources_are_named(source, reason: str):
    for read in (read_video, read_audio, has_audio, read_video_metadata):
        with pytest.raises(MediaError, match=reason):
            read(source)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="int"):
        read_video(3)


def test_playlists_are_not_followed(tmp_path: Path):
    clip = tmp_path / "clip.ts"
    write_media(clip)
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2,\n{clip.name}\n#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError, match="no media file"):
        read_video(playlist)
    playlist.write_text(f"ffconcat version 1.0\nfile {clip.name}\n")
    with pytest.raises(MediaError, match="no media file"):
        read_video(playlist)


# ---------------------------------------------------------------------------------------------------------------------
# Videos of all kinds

KINDS = {
    "mp4": {},
    "b_frames.mp4": {"num_frames": 100, "b_frames": 2, "gop": 12},
    "one_key_frame.mp4": {"num_frames": 100, "b_frames": 3, "gop": 100},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "with_sound.mp4": {"audio": tone(2)},
    "mkv": {"b_frames": 2, "gop": 12, "num_frames": 40},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9", "codec_options": {"lossless": "1"}},
    "hevc.mp4": {"codec": "libx265", "codec_options": {"x265-params": "log-level=none:crf=1"}},
    "avi": {"codec": "mpeg4", "codec_options": {"qscale": "1", "flags": "qscale"}},
    "flv": {},
    "ts": {"b_frames": 2, "gop": 12, "num_frames": 40, "audio": tone(4)},
    "mpg": {"codec": "mpeg2video", "fps": 25, "codec_options": {"b": "4M"}},
    "gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "raw.h264": {"container_format": "h264", "b_frames": 2, "gop": 12, "num_frames": 40},  # no times at all
    "ten_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "odd_size.mp4": {"height": 17, "width": 33, "pix_fmt": "yuv444p"},
    "full_range.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "codec_options": {"qscale": "1", "flags": "qscale"}},
    "one_frame.mp4": {"num_frames": 1},
    "huge.mp4": {"num_frames": 3, "height": 2160, "width": 4096, "codec_options": {"preset": "ultrafast"}},
    "variable_rate.mp4": {"num_frames": 10, "frame_times": [0, 100, 150, 160, 500, 1000, 1010, 1500, 2500, 2600]},
    "variable_rate.mkv": {"num_frames": 10, "frame_times": [0, 100, 150, 160, 500, 1000, 1010, 1500, 2500, 2600]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_videos_of_all_kinds_give_the_right_frames(kind: str, tmp_path: Path, backend: str):
    path = write_media(tmp_path / f"video.{kind}", **KINDS[kind])
    num_frames = KINDS[kind].get("num_frames", 20)
    frames, metadata = read_video(path, 8, SIZE)
    assert metadata.total_num_frames == num_frames
    assert metadata.frames_indices == uniform_frame_indices(num_frames, 8)
    assert frames.shape == (len(metadata.frames_indices), 3, *SIZE)
    assert frame_numbers(frames) == [index % NUM_LEVELS for index in metadata.frames_indices]
    assert read_video_metadata(path).fps == metadata.fps > 0
    if "frame_times" not in KINDS[kind]:
        assert metadata.fps == KINDS[kind].get("fps", 10)


@pytest.mark.parametrize("kind", ["b_frames.mp4", "one_key_frame.mp4", "mkv", "ts", "raw.h264", "vp9.webm"])
def test_any_frames_can_be_asked_for(kind: str, tmp_path: Path, backend: str):
    path = write_media(tmp_path / f"video.{kind}", **KINDS[kind])
    num_frames = KINDS[kind].get("num_frames", 20)
    everything, _ = read_video(path, None, SIZE)
    assert frame_numbers(everything) == [index % NUM_LEVELS for index in range(num_frames)]
    generator = np.random.default_rng(0)
    for count in (1, 2, 5):
        indices = generator.integers(0, num_frames, count).tolist()  # unordered, and some of them twice
        frames, metadata = read_video(path, size=SIZE, sample_indices_fn=choose(*indices))
        assert metadata.frames_indices == indices
        assert torch.equal(frames, everything[indices])


def test_far_frames_are_found_by_seeking(tmp_path: Path, backend: str):
    path = write_media(tmp_path / "long.mp4", num_frames=600, gop=30, b_frames=2)
    for indices in ([599], [0, 300, 599], [150, 151, 420], [29, 30, 31, 59, 60, 61]):
        frames, _ = read_video(path, size=SIZE, sample_indices_fn=choose(*indices))
        assert frame_numbers(frames) == [index % NUM_LEVELS for index in indices]


def test_own_size_is_kept_on_request(tmp_path: Path, backend: str):
    path = write_media(tmp_path / "video.mp4", height=40, width=72)
    frames, metadata = read_video(path, 4, size=None)
    assert frames.shape == (4, 3, 40, 72)
    assert (metadata.height, metadata.width) == (40, 72)


@pytest.mark.parametrize(("rotation", "corner"), [(0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (270, (0, 1))])
def test_rotated_videos_are_turned_upright(rotation: int, corner: tuple[int, int], tmp_path: Path, backend: str):
    # The red corner is at the upper left of the recorded picture, which a player turns counter-clockwise
    path = write_media(tmp_path / "video.mp4", rotation=rotation)
    for size in (SIZE, None):
        frames, _ = read_video(path, 3, size)
        height, width = frames.shape[-2:]
        if size is None:
            assert (height, width) == ((64, 48) if rotation in (90, 270) else (48, 64))
        redness = (frames[:, 0].float() - frames[:, 1].float()).unflatten(1, (2, -1)).unflatten(3, (2, -1))
        redness = redness.mean((0, 2, 4))
        assert divmod(int(redness.argmax()), 2) == corner
        assert redness.max() > 200 and redness.flatten().sort().values[-2] < 20


def test_frames_before_the_start_of_an_edit_list_do_not_count(tmp_path: Path, backend: str):
    path = trim_start(write_media(tmp_path / "video.mp4", num_frames=30, b_frames=2, gop=10), seconds=0.5)
    frames, metadata = read_video(path, None, SIZE)
    assert metadata.total_num_frames == 25
    assert frame_numbers(frames) == list(range(5, 30))


@pytest.mark.parametrize("stated", [7, 35])
def test_wrong_frame_counts_in_the_header_do_not_matter(stated: int, tmp_path: Path, backend: str):
    path = set_avi_length(write_media(tmp_path / "video.avi", **KINDS["avi"]), stated)
    frames, metadata = read_video(path, 8, SIZE)
    assert metadata.total_num_frames == 20
    assert frame_numbers(frames) == metadata.frames_indices


def test_recordings_that_start_between_key_frames_work(tmp_path: Path, backend: str):
    path = write_media(tmp_path / "video.ts", num_frames=40, gop=12)
    data = path.read_bytes()
    path.write_bytes(data[188 * 8 :])  # the first packets of the stream are gone
    frames, metadata = read_video(path, None, SIZE)
    numbers = frame_numbers(frames)
    assert metadata.total_num_frames == len(numbers) < 40
    assert numbers == [number % NUM_LEVELS for number in range(40 - len(numbers), 40)]


def test_only_wanted_frames_are_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scaled = []
    scale = media._Scaler.__call__
    monkeypatch.setattr(media._Scaler, "__call__", lambda self, frame: scaled.append(frame.pts) or scale(self, frame))
    path = write_media(tmp_path / "video.mp4", num_frames=100, gop=10)
    read_video(path, 8, SIZE, backend="pyav")
    assert len(scaled) == 8


def test_frames_out_of_range_are_refused():
    for indices in ([125], [-1], []):
        with pytest.raises(ValueError, match="0 to 124"):
            read_video(SYNTH / "clip.mp4", sample_indices_fn=choose(*indices))


# ---------------------------------------------------------------------------------------------------------------------
# Which decoder


def test_backend_can_be_chosen(tmp_path: Path):
    pytest.importorskip("decord", reason="decord has no wheels for this platform")
    clip = SYNTH / "clip.mp4"
    by_decord, decord_metadata = read_video(clip, 8, backend="decord")
    by_pyav, pyav_metadata = read_video(clip, 8, backend="pyav")
    assert (decord_metadata.video_backend, pyav_metadata.video_backend) == ("decord", "pyav")
    assert (by_decord.float() - by_pyav.float()).abs().mean() < 0.5
    with pytest.raises(ValueError, match="opencv"):
        read_video(clip, 8, backend="opencv")
    # decord gives wrong frames for this kind of file
    stream = write_media(tmp_path / "video.ts", b_frames=2, gop=12, num_frames=40)
    assert read_video(stream, 8)[1].video_backend == "pyav"
    with pytest.raises(MediaError, match="pyav"):
        read_video(stream, 8, backend="decord")


def test_missing_decord_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(media, "_is_decord_available", lambda: False)
    with pytest.raises(ImportError, match="pip install decord"):
        read_video(SYNTH / "clip.mp4", 8, backend="decord")


# ---------------------------------------------------------------------------------------------------------------------
# Bad files


def bad_file(kind: str, folder: Path) -> tuple[Path, str]:
    """A file with something wrong, and what its error message has to say."""
    path = folder / "video.mp4"
    front = {"container_options": {"movflags": "faststart"}}  # the header before the frames
    if kind == "text":
        path.write_text("This is not a video.\n" * 100)
        return path, "no media file"
    if kind == "empty":
        path.touch()
        return path, "0 bytes"
    if kind == "image":
        path = folder / "picture.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 100)
        return path, "no media file"
    if kind == "no frames":
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            container.start_encoding()
        return path, "no video track|without a frame"
    if kind == "sound only":
        return write_media(folder / "sound.m4a", num_frames=0, audio=tone(1)), "has sound but no video"
    if kind == "cut frames":
        return cut(write_media(path, pictures=moving_noise(40, 48, 64), **front), 0.6), "cut off: frame 25"
    if kind == "cut header":
        return cut(write_media(path, pictures=moving_noise(40, 48, 64)), 0.6), "header is missing"
    if kind == "cut mkv":
        return cut(
            write_media(folder / "video.mkv", pictures=moving_noise(40, 48, 64)), 0.6
        ), "cut off: it ends after 2"
    if kind == "damaged packet":
        return damage_packet(
            write_media(path, pictures=moving_noise(40, 48, 64), gop=40), 18
        ), "damaged: frame 20 of 40"
    raise AssertionError(kind)


BAD_KINDS = [
    "text",
    "empty",
    "image",
    "no frames",
    "sound only",
    "cut frames",
    "cut header",
    "cut mkv",
    "damaged packet",
]


@pytest.mark.parametrize("kind", BAD_KINDS)
def test_bad_files_are_named_with_the_cause(kind: str, tmp_path: Path, backend: str):
    path, reason = bad_file(kind, tmp_path)
    with pytest.raises(MediaError, match=reason) as error:
        read_video(path, 8, SIZE)
    assert str(path) in str(error.value)


def test_damage_elsewhere_does_not_matter(tmp_path: Path, backend: str):
    path = write_media(tmp_path / "video.mp4", pictures=moving_noise(40, 48, 64), gop=10)
    intact, _ = read_video(path, None, SIZE)
    damage_packet(path, 12)  # in the second of four groups of pictures
    for indices in ([0, 5, 9], [20, 29, 39], [0, 11, 30]):
        frames, _ = read_video(path, size=SIZE, sample_indices_fn=choose(*indices))
        assert torch.equal(frames, intact[indices])
    for index in (12, 13, 19):
        with pytest.raises(MediaError, match=f"frame {index} of 40"):
            read_video(path, size=SIZE, sample_indices_fn=choose(0, index))


def test_missing_end_does_not_matter_where_it_is_not_wanted(tmp_path: Path, backend: str):
    path = write_media(
        tmp_path / "video.mp4",
        pictures=moving_noise(40, 48, 64),
        b_frames=2,
        container_options={"movflags": "faststart"},
    )
    intact, metadata = read_video(path, 8, SIZE)
    cut(path, 0.98)
    frames, cut_metadata = read_video(path, 8, SIZE)
    assert torch.equal(frames, intact)
    assert cut_metadata.total_num_frames == metadata.total_num_frames == 40


@pytest.mark.parametrize("b_frames", [0, 2])
def test_no_cut_passes_silently(b_frames: int, tmp_path: Path, backend: str):
    path = write_media(
        tmp_path / "video.mp4",
        pictures=moving_noise(20, 48, 64),
        b_frames=b_frames,
        container_options={"movflags": "faststart"},
    )
    data = path.read_bytes()
    intact, _ = read_video(path, None, SIZE)
    for end in range(len(data) - 4000, len(data), 250):
        path.write_bytes(data[:end])
        for index in range(12, 20):
            try:
                frames, metadata = read_video(path, size=SIZE, sample_indices_fn=choose(index))
            except MediaError as error:
                assert "cut off" in str(error) or "damaged" in str(error)
            else:
                assert metadata.total_num_frames == 20
                assert torch.equal(frames[0], intact[index])
        with pytest.raises(MediaError):
            read_video(path, None, SIZE)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_random_damage_is_never_worse_than_an_error(suffix: str, tmp_path: Path, backend: str):
    path = write_media(
        tmp_path / f"video.{suffix}",
        pictures=moving_noise(20, 48, 64),
        **({"codec": "mpeg4"} if suffix == "avi" else {}),
    )
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(8):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 5):
            damaged[place] ^= 0xFF
        with contextlib.suppress(MediaError):
            frames, metadata = read_video(bytes(damaged), 8, SIZE)
            assert frames.shape == (len(metadata.frames_indices), 3, *SIZE)
        with contextlib.suppress(MediaError):
            frames, metadata = read_video(data[: int(generator.integers(1, len(data)))], 8, SIZE)
            assert frames.shape == (len(metadata.frames_indices), 3, *SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# Sound


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("sound.wav", "pcm_s16le"),
        ("float.wav", "pcm_f32le"),
        ("sound.flac", "flac"),
        ("sound.mp3", "libmp3lame"),
        ("sound.m4a", "aac"),
        ("sound.ogg", "libopus"),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_files_give_their_samples(name: str, codec: str, channels: int, tmp_path: Path):
    expected = tone(1, 48000, channels)
    path = write_media(tmp_path / name, num_frames=0, audio=expected, sampling_rate=48000, audio_codec=codec)
    samples, rate = read_audio(path)
    assert rate == 48000 and samples.dtype == np.float32 and samples.shape[0] == channels
    assert has_audio(path)
    if codec.startswith("pcm") or codec == "flac":
        assert samples.shape == expected.shape
        assert np.abs(samples - expected).max() < 1e-4
    else:
        assert abs(samples.shape[1] - expected.shape[1]) < 0.1 * rate
        spectrum = np.abs(np.fft.rfft(samples[0]))
        assert abs(spectrum.argmax() * rate / samples.shape[1] - 440) < 2


def test_a_video_has_its_own_sound():
    samples, rate = read_audio(SYNTH / "clip.mp4")
    notes = json.loads((SYNTH / "clip.json").read_text())
    assert (rate, samples.shape) == (notes["sr"], (notes["channels"], notes["samples"]))
    assert np.abs(samples).max() <= 1


def test_silent_videos_have_no_sound(tmp_path: Path):
    for path in (SYNTH / "clip_silent.mp4", write_media(tmp_path / "video.gif", **KINDS["gif"])):
        assert read_audio(path) is None
        assert not has_audio(path)


@pytest.mark.parametrize("kind", ["text", "empty", "image", "no frames", "cut header"])
def test_bad_files_have_no_sound_either(kind: str, tmp_path: Path):
    path, _ = bad_file(kind, tmp_path)
    with pytest.raises(MediaError) as error:
        read_audio(path)
    assert str(path) in str(error.value)


def test_cut_sound_is_named(tmp_path: Path):
    path = tmp_path / "sound.m4a"
    write_media(path, num_frames=0, audio=tone(4), container_options={"movflags": "faststart"})
    cut(path, 0.5)
    with pytest.raises(MediaError, match="damaged audio track: .* of 4.0 s") as error:
        read_audio(path)
    assert str(path) in str(error.value)


def test_decoding_ends_with_its_time() -> None:
    path = str(SYNTH / "clip.mp4")
    for read in (lambda: read_video(path, 8), lambda: read_audio(path)):
        with time_limit(0), pytest.raises(MediaError, match="clip.mp4 takes longer to be decoded than the 0 seconds"):
            read()
        with time_limit(600):
            read()
