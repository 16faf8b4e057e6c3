"""The feature cache holds what the encoders compute, whole or interrupted, by one process or two."""

import base64
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from media_files import cut, moving_noise, tone, write_media
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from transformers_videollama.media import MediaError
from transformers_videollama.training.cache_features import find_media, main
from transformers_videollama.training.collator import VideoLlamaDataCollator
from transformers_videollama.training.feature_cache import FeatureCache
from transformers_videollama.training.feature_cache_writer import cache_features
from transformers_videollama.training.samples import SampleBuilder

COMMAND = Path(__file__).parent.parent / "examples" / "training" / "cache_features.py"
NUM_FRAMES = 4


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> VideoLlamaForConditionalGeneration:
    model = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder).eval()
    model.load_audio_vision_tower()
    return model


@pytest.fixture(scope="module")
def processor(tiny_folder: Path) -> VideoLlamaProcessor:
    return VideoLlamaProcessor.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video with sound, one without, one of fewer frames than are sampled, a picture, and a file cut in half."""
    folder = tmp_path_factory.mktemp("media")
    write_media(folder / "loud.mp4", pictures=moving_noise(12, 48, 64), audio=tone(1.2))
    write_media(folder / "silent.mp4", pictures=moving_noise(20, 48, 64))
    write_media(folder / "short.mp4", num_frames=3)
    cut(write_media(folder / "broken.mp4"), 0.5)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


def write(model: Any, processor: Any, folder: Path, directory: Path, **options: Any) -> FeatureCache:
    options = {"kinds": ("frames", "clips", "sound"), "num_frames": NUM_FRAMES, "num_workers": 0} | options
    return cache_features(model, processor, find_media([], [folder]), directory, **options)


@pytest.fixture(scope="module")
def cache(model: Any, processor: Any, media_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return write(model, processor, media_folder, tmp_path_factory.mktemp("cache"), batch_size=5, media_per_shard=2)


def tensors_of(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(directory.glob("*.safetensors"))}


def assert_same_cache(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert list(first) == list(second)
    for name, tensors in first.items():
        assert list(tensors) == list(second[name])
        for kind, tensor in tensors.items():
            assert tensor.dtype == second[name][kind].dtype
            assert torch.equal(tensor.nan_to_num(-1), second[name][kind].nan_to_num(-1))
    for path in one.glob("*.jsonl"):
        assert path.read_text() == (other / path.name).read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What is in it


@pytest.mark.parametrize("name", ["loud.mp4", "silent.mp4", "short.mp4", "picture.png"])
def test_features_are_those_of_the_encoders(cache, model, processor, media_folder, name):
    path = media_folder / name
    timestamps = None
    if path.suffix == ".png":
        pixels = processor.image_processor(Image.open(path), return_tensors="pt")["pixel_values"]
    else:
        video = processor.video_processor([path], num_frames=NUM_FRAMES, return_metadata=True, return_tensors="pt")
        pixels, metadata = video["pixel_values_videos"][0], video["video_metadata"][0]
        timestamps = [round(i / metadata.fps, 1) for i in metadata.frames_indices]
    with torch.no_grad():
        frames = model.model.get_frame_features(pixels).last_hidden_state
        clips = model.model.get_clip_features(pixel_values_videos=pixels[None]).last_hidden_state[0]
    for kind, expected in (("frames", frames), ("clips", clips)):
        got = cache.get(path, kind, is_image=path.suffix == ".png")
        torch.testing.assert_close(got["features"], expected, atol=1e-5, rtol=1e-5)
        assert got["timestamps"] == timestamps
        assert got["has_audio"] == (name == "loud.mp4")


def test_sound_is_imagebinds(cache, model, processor, media_folder):
    clips = processor.feature_extractor(media_folder / "loud.mp4", return_tensors="pt")["input_features"]
    with torch.no_grad():
        expected = model.model.get_clip_features(input_features=clips).last_hidden_state[0]
    torch.testing.assert_close(
        cache.get(media_folder / "loud.mp4", "sound")["features"], expected, atol=1e-5, rtol=1e-5
    )
    silent = cache.get(media_folder / "silent.mp4", "sound")
    assert silent["features"].shape == (0, expected.shape[1]) and not silent["has_audio"]


def test_features_keep_every_bit_of_their_dtype(processor, media_folder, tiny_folder, tmp_path):
    model = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.bfloat16).eval()
    path = media_folder / "silent.mp4"
    cache = cache_features(model, processor, [(str(path), "video")], tmp_path / "cache", num_workers=0)
    pixels = processor.video_processor([path], return_tensors="pt")["pixel_values_videos"][0]
    with torch.no_grad():
        expected = model.model.get_frame_features(pixels).last_hidden_state
    got = cache.get(path, "frames")["features"]
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


def test_headtail_draws_by_seed_and_medium_alone(model, processor, media_folder, tmp_path):
    options = {"kinds": ("frames",), "sampling": "headtail"}
    first = write(model, processor, media_folder, tmp_path / "first", **options)
    again = write(model, processor, media_folder, tmp_path / "again", **options, media_per_shard=1)
    other = write(model, processor, media_folder, tmp_path / "other", **options, seed=1)
    seconds = [cache.get(media_folder / "silent.mp4", "frames")["timestamps"] for cache in (first, again, other)]
    assert seconds[0] == seconds[1] != seconds[2]
    assert sorted(seconds[0]) == seconds[0] and len(seconds[0]) == NUM_FRAMES


def chat(*media: tuple[str, str | Path]) -> dict[str, Any]:
    """A conversation about media, each given as its type and its file."""
    question = [{"type": kind, "path": str(path)} for kind, path in media] + [
        {"type": "text", "text": "What is this?"}
    ]
    answer = [{"type": "text", "text": "A grey picture with a red corner."}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("branch", ["video", "audio"])
def test_loss_and_gradients_are_those_of_training_on_the_media(cache, model, processor, media_folder, branch):
    rows = [
        chat(("video", media_folder / "silent.mp4"), ("image", media_folder / "picture.png")),
        chat(("video", media_folder / "short.mp4")),
        chat(("image", media_folder / "picture.png")),
    ]
    collate = VideoLlamaDataCollator(processor.tokenizer.pad_token_id)
    model.set_trainable(branch)
    results = []
    for feature_cache in (None, cache):
        builder = SampleBuilder(
            processor, branch, num_frames=NUM_FRAMES, random_resized_crop=False, feature_cache=feature_cache
        )
        samples = [builder({**row, "source": "here"}, torch.Generator()) for row in rows]
        model.zero_grad()
        loss = model(**collate(samples), skip_logits=True).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (loss, gradients), (cached_loss, cached_gradients) = results
    torch.testing.assert_close(cached_loss, loss, atol=1e-4, rtol=0)
    assert gradients.keys() == cached_gradients.keys() != set()
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_unreadable_media_are_named_and_leave_the_others_alone(cache, media_folder):
    assert len(cache) == 4
    assert media_folder / "loud.mp4" in cache and media_folder / "broken.mp4" not in cache
    with pytest.raises(MediaError, match="broken.mp4"):
        cache.get(media_folder / "broken.mp4", "frames")
    assert "broken.mp4" in (cache.directory / "unreadable.txt").read_text()


def test_of_a_moving_picture_the_image_and_the_video_are_kept_apart(model, processor, tmp_path):
    path = tmp_path / "moving.gif"
    first, *others = (Image.fromarray(frame) for frame in moving_noise(6, 48, 64))
    first.save(path, save_all=True, append_images=others, duration=100)
    options = {"kinds": ("frames",), "num_frames": NUM_FRAMES, "num_workers": 0}
    media = [(str(path), "image"), (str(path), "video")]
    for known in (media[:1], media):  # the one before is no reason not to encode the other
        cache = cache_features(model, processor, known, tmp_path / "cache", **options)
    image, video = (cache.get(path, "frames", is_image=is_image) for is_image in (True, False))
    assert len(image["features"]) == 1 and image["timestamps"] is None
    assert len(video["features"]) == NUM_FRAMES == len(video["timestamps"])
    only_image = cache_features(model, processor, media[:1], tmp_path / "other", **options)
    assert path in only_image
    with pytest.raises(MediaError, match="moving.gif is not in the feature cache .* as a video"):
        only_image.get(path, "frames")


def test_pictures_in_their_own_addresses_are_encoded(model, processor, media_folder, tmp_path):
    path = media_folder / "picture.png"
    address = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    options = {"kinds": ("frames",), "num_workers": 0}
    cache = cache_features(model, processor, [(address, "image"), (str(path), "image")], tmp_path / "c", **options)
    assert not cache.unreadable
    features = (cache.get(source, "frames", is_image=True)["features"] for source in (address, path))
    assert torch.equal(*features)


def test_media_that_are_not_in_it_or_were_replaced_are_refused(model, processor, media_folder, tmp_path):
    path = write_media(tmp_path / "clip.mp4", num_frames=5)
    options = {"kinds": ("frames",)}
    cache = write(model, processor, path, tmp_path / "cache", **options)
    with pytest.raises(MediaError, match="silent.mp4 is not in the feature cache"):
        cache.get(media_folder / "silent.mp4", "frames")
    with pytest.raises(ValueError, match="--kinds clips"):
        cache.get(path, "clips")
    before = cache.get(path, "frames")["features"]
    write_media(path, pictures=moving_noise(9, 48, 64))
    with pytest.raises(MediaError, match="another size"):
        cache.get(path, "frames")
    after = write(model, processor, path, tmp_path / "cache", **options).get(path, "frames")["features"]
    assert len(FeatureCache(cache.directory)) == 1 and not torch.equal(before, after)


def test_features_outlive_the_media_and_a_moved_folder_is_found(model, processor, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    write_media(old / "clip.mp4", num_frames=5)
    cache = write(model, processor, old, tmp_path / "cache", kinds=("frames",))
    expected = cache.get(old / "clip.mp4", "frames")["features"]
    old.rename(tmp_path / "new")
    cache_features(
        model, processor, [(str(old / "clip.mp4"), "video")], cache.directory, num_frames=NUM_FRAMES, num_workers=0
    )
    assert torch.equal(FeatureCache(cache.directory).get(old / "clip.mp4", "frames")["features"], expected)
    meta = cache.directory / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "media_root": str(tmp_path / "new")}))
    assert torch.equal(FeatureCache(cache.directory).get(tmp_path / "new/clip.mp4", "frames")["features"], expected)


class _Features(torch.utils.data.Dataset):
    def __init__(self, cache: FeatureCache, paths: list[Path]):
        self.cache, self.paths = cache, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.cache.get(self.paths[index], "frames")["features"]


def test_workers_read_what_the_process_reads(cache, media_folder):
    paths = [media_folder / name for name in ("loud.mp4", "silent.mp4", "short.mp4")]
    expected = [cache.get(path, "frames")["features"] for path in paths]  # the files are open when workers start
    loader = DataLoader(_Features(cache, paths), batch_size=None, num_workers=2)
    for got, features in zip(loader, expected, strict=True):
        assert torch.equal(got, features)
    assert torch.equal(pickle.loads(pickle.dumps(cache)).get(paths[0], "frames")["features"], expected[0])


def test_other_encoders_and_settings_are_refused(cache, model, processor, tiny_folder):
    cache.check_model(model)
    cache.check_model(VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.bfloat16))
    other = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder)
    with torch.no_grad():
        other.model.qformer.layernorm.bias[0] += 1
    with pytest.raises(ValueError, match="made by other encoders"):
        cache.check_model(other)
    same_weights = VideoLlamaForConditionalGeneration.from_pretrained(tiny_folder)
    same_weights.config.vision_config.layer_norm_eps *= 10
    with pytest.raises(ValueError, match="made by other encoders"):
        cache.check_model(same_weights)
    cache.check_processor(processor, num_frames=NUM_FRAMES, sampling="uniform")
    with pytest.raises(ValueError, match="num_frames was 4 and is 8; .*sampling|sampling.*num_frames was 4 and is 8"):
        cache.check_processor(processor, num_frames=8, sampling="headtail")
    other_processor = VideoLlamaProcessor.from_pretrained(tiny_folder)
    other_processor.video_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="video_processor.image_mean"):
        cache.check_processor(other_processor, num_frames=NUM_FRAMES, sampling="uniform")


def test_a_folder_that_is_no_cache_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is no feature cache"):
        FeatureCache(tmp_path)


def test_a_damaged_shard_is_named_and_can_be_made_again(model, processor, media_folder, tmp_path):
    path = media_folder / "short.mp4"
    expected = write(model, processor, path, tmp_path, kinds=("frames",)).get(path, "frames")["features"]
    shard = tmp_path / "shard-00000.safetensors"
    cut(shard, 0.5)
    with pytest.raises(ValueError, match="shard-00000.safetensors is damaged"):
        FeatureCache(tmp_path).get(path, "frames")
    shard.unlink()
    (tmp_path / "shard-00000.jsonl").unlink()
    again = write(model, processor, path, tmp_path, kinds=("frames",))
    assert torch.equal(again.get(path, "frames")["features"], expected)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_an_existing_cache_is_completed_and_not_mixed_with_another(model, processor, media_folder, tmp_path):
    write(model, processor, media_folder / "loud.mp4", tmp_path, kinds=("frames",))
    shard = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    meta = json.loads((tmp_path / "meta.json").read_text())
    cache = write(model, processor, media_folder, tmp_path, kinds=("frames",))
    assert len(cache) == 4 and (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == shard
    assert json.loads((tmp_path / "meta.json").read_text()) == meta
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        write(model, processor, media_folder, tmp_path, kinds=("frames",), seed=1)
    with pytest.raises(ValueError, match="kinds was"):
        write(model, processor, media_folder, tmp_path)


@pytest.fixture(scope="module")
def many_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(12):
        write_media(folder / f"{number:02d}.mp4", num_frames=4 + number)
    return folder


def arguments(tiny_folder: Path, media: Path, directory: Path) -> list[str]:
    options = {"model": tiny_folder, "media": media, "feature_cache": directory, "dataloader_num_workers": 1,
               "media_per_shard": 2, "num_frames": NUM_FRAMES}  # fmt: skip
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def test_what_could_not_be_read_is_tried_again_when_asked(model, processor, tmp_path):
    path = tmp_path / "clip.mp4"
    write_media(path, num_frames=9)
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))  # as it is while it is being copied
    write_media(tmp_path / "other.mp4", num_frames=9)
    media = [(path, "video"), (tmp_path / "other.mp4", "video")]
    settings = {"num_workers": 0, "directory": tmp_path / "cache"}
    assert len(cache_features(model, processor, media, **settings)) == 1
    path.write_bytes(whole)
    assert len(cache_features(model, processor, media, **settings)) == 1
    again = cache_features(model, processor, media, **settings, retry_errors=True)
    assert len(again) == 2 and not again.unreadable
    assert len(list((tmp_path / "cache").glob("shard-*.jsonl"))) == 2  # nothing else was encoded again


def test_others_may_read_the_files(cache, tmp_path):
    (tmp_path / "plain").touch()
    for path in cache.directory.glob("shard-*"):
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, path


def test_only_one_run_writes_a_cache(model, processor, tmp_path):
    write_media(tmp_path / "clip.mp4", num_frames=9)
    (tmp_path / "cache").mkdir()
    settings = {"directory": tmp_path / "cache", "num_workers": 0}
    with FileLock(tmp_path / "cache" / ".lock"), pytest.raises(ValueError, match="Another run is writing"):
        cache_features(model, processor, [(tmp_path / "clip.mp4", "video")], **settings)
    assert len(cache_features(model, processor, [(tmp_path / "clip.mp4", "video")], **settings)) == 1


def test_a_folder_of_media_is_found_by_endings(tmp_path):
    for name in ("a.mkv", "b.ts", "c.m4v", "d.webp", "e.flac", "f.3gp", "g.txt"):
        (tmp_path / name).touch()
    found = {Path(path).name: kind for path, kind in find_media([], [tmp_path])}
    assert found == {name: "image" if name == "d.webp" else "video" for name in sorted(found)} and "g.txt" not in found
    assert len(found) == 6


def test_killed_and_resumed_is_uninterrupted_and_two_processes_are_one(tiny_folder, many_videos, tmp_path):
    whole, killed, shared = tmp_path / "whole", tmp_path / "killed", tmp_path / "shared"
    main(arguments(tiny_folder, many_videos, whole))
    assert len(FeatureCache(whole)) == 12

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the tests themselves
    command = [sys.executable, str(COMMAND), *arguments(tiny_folder, many_videos, killed)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        while not (killed / "shard-00001.jsonl").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (killed / "shard-00005.jsonl").exists()  # it was in the middle of its work
    (killed / "shard-00005.safetensors.1.tmp").write_bytes(b"half")
    main(arguments(tiny_folder, many_videos, killed))
    assert_same_cache(whole, killed)
    assert not list(killed.glob("*.tmp"))

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(COMMAND)]
    subprocess.run([*launch, *arguments(tiny_folder, many_videos, shared)], check=True, env=environment)
    assert_same_cache(whole, shared)


def test_command_takes_a_stages_file(tiny_folder, media_folder, tmp_path, capsys):
    annotations = media_folder / "chats.jsonl"
    chats = [chat(("video", "silent.mp4")), chat(("audio", "loud.mp4")), chat(("image", "picture.png"))]
    annotations.write_text("".join(json.dumps(row) + "\n" for row in chats))
    config = tmp_path / "stage.yaml"
    config.write_text(
        f"model: {tiny_folder}\nbranch: audio\nlearning_rate: 3e-5\nnum_frames: 4\ndataloader_num_workers: 0\n"
        f"datasets:\n- format: chat\n  annotations: {annotations}\n  weight: 2\n"
    )
    main([str(config), "--feature_cache", str(tmp_path / "cache"), "--num_frames", "2", "--use_cpu", "true"])
    assert "clips of 3 media, 0 unreadable" in capsys.readouterr().out
    cache = FeatureCache(tmp_path / "cache")
    assert len(cache.get(media_folder / "loud.mp4", "clips")["features"]) == 2
    with pytest.raises(ValueError, match="--feature_cache"):
        main([str(config)])
    with pytest.raises(ValueError, match="`--datasets` must be a JSON list, but is 'train.jsonl'"):
        main([str(config), "--feature_cache", str(tmp_path / "cache"), "--datasets", "train.jsonl"])
