"""To the Hub and back: the whole model, the trained part and an adapter, by processes that share nothing but a Hub.

The Hub is a server on this machine (`local_hub.py`), the client is the real one. Each process has an empty cache.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from local_hub import LocalHub
from test_remote_code import check_self_contained, run, start
from tiny_model import tiny_config
from transformers import LlamaConfig

from transformers_videollama import VideoLlamaForConditionalGeneration

TESTS = Path(__file__).parent
CLIP = TESTS / "reference" / "synth" / "clip.mp4"
TOKEN = "hf_me"
MEBIBYTE = 1 << 20

pytestmark = pytest.mark.xdist_group("hub")  # what `pushed` uploads is uploaded once


def digest(model: torch.nn.Module) -> str:
    """A hash of a model's weights and their names."""
    hash = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hash.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return hash.hexdigest()


DIGEST = f"import hashlib, json, sys, torch\n{inspect.getsource(digest)}"

PUSH = (
    DIGEST
    + """
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from convert_video_llama_checkpoint import push_to_hub
from huggingface_hub import HfApi
from peft import LoraConfig
from safetensors.torch import save_file
from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor, push_trained_part_to_hub

folder, work = map(Path, sys.argv[1:3])
api, digests, processor = HfApi(), {}, VideoLlamaProcessor.from_pretrained(folder)

def load(name, **kwargs):
    return VideoLlamaForConditionalGeneration.from_pretrained(name, **kwargs)

def change(model):
    with torch.no_grad():
        model.model.video_branch.projector.bias.add_(1.0)
    return model

def add_adapter(model):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model

# The whole, its processor before it, at several revisions
model = load(folder)
processor.push_to_hub("me/model")
model.push_to_hub("me/model", tags=["mine"])
digests["v1"] = digest(model)
api.create_tag("me/model", tag="v1")
processor.video_processor.num_frames = 4
processor.push_to_hub("me/model")
change(model).push_to_hub("me/model")
digests["main"] = digest(model)
change(model).push_to_hub("me/model", revision="experiment/1")
digests["experiment/1"] = digest(model)
digests[model.push_to_hub("me/model", create_pr=True).oid] = digest(model)

# The trained part, of the model at another revision than the newest
part = change(change(change(load("me/model", revision="v1"))))
push_trained_part_to_hub(part, "me/part", parts=["video_branch"], base_revision="v1", processor=processor)
digests["part"] = digest(part)
change(part)
push_trained_part_to_hub(part, "me/part", parts=["video_branch"], base_revision="v1", revision="longer")
digests["longer"] = digest(part)

# An adapter
adapted = add_adapter(load("me/model"))
adapted.push_to_hub("me/adapter")
processor.push_to_hub("me/adapter")
digests["adapter"] = digest(adapted)

# What nobody else may see
model.push_to_hub("me/secret", private=True)
processor.push_to_hub("me/secret")
digests["secret"] = digest(model)
part = change(load("me/secret"))
push_trained_part_to_hub(part, "me/secret-part", parts=["video_branch"], private=True)
digests["secret-part"] = digest(part)

# A model whose decoder is in another repository, and an adapter of that
whole, without, decoder = load(folder), {}, {}
for name, tensor in whole.state_dict().items():
    if name.startswith("model.language_model.") or name == "lm_head.weight":
        decoder[name.replace("model.language_model.", "model.")] = tensor.clone()
    else:
        without[name] = tensor
whole.config.text_model = "me/decoder"
whole.save_pretrained(work / "no-decoder")
(work / "decoder").mkdir()
save_file(without, work / "no-decoder" / "model.safetensors", metadata={"format": "pt"})
save_file(decoder, work / "decoder" / "model.safetensors", metadata={"format": "pt"})
for name in ("decoder", "no-decoder"):
    api.create_repo(f"me/{name}")
    api.upload_folder(repo_id=f"me/{name}", folder_path=work / name)
whole = load("me/no-decoder")
digests["no-decoder"] = digest(whole)
add_adapter(whole).push_to_hub("me/no-decoder-adapter")
digests["no-decoder-adapter"] = digest(whole)

# What conversion uploads
push_to_hub(folder, "me/converted")
print(json.dumps(digests))
"""
)


@dataclass
class Pushed:
    hub: LocalHub
    digests: dict[str, str]  # of the weights, by what they were pushed as


@pytest.fixture(scope="module")
def pushed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    """A Hub to which a process has pushed everything that can be pushed."""
    work = tmp_path_factory.mktemp("push")
    with LocalHub() as hub:
        digests = run(
            PUSH, tiny_folder, work, TESTS.parent / "conversion",
            tmp_path=work, package=True, HF_TOKEN=TOKEN, **hub.environment,
        )  # fmt: skip
        yield Pushed(hub, digests)


def test_everything_is_there_with_a_card_of_its_own(pushed: Pushed, tmp_path: Path) -> None:
    hub = pushed.hub
    uploads = ["Upload VideoLlamaForConditionalGeneration", "Upload processor"]
    assert hub.titles("me/model") == [*uploads, *uploads, "initial commit"]
    files = hub.files("me/model")
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "video-text-to-text" and "mine" in card.data.tags
    assert 'model="me/model"' in card.text
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    check_self_contained(tmp_path)
    assert {"processor_config.json", "tokenizer.json", "chat_template.jinja"} <= set(files)

    part = hub.files("me/part")
    assert {"trained_part.safetensors", "trained_part.json", "processor_config.json"} <= set(part)
    assert "model.safetensors" not in part
    description = json.loads(part["trained_part.json"])
    assert (description["base_model"], description["base_revision"]) == ("me/model", "v1")
    assert ModelCard(part["README.md"].decode()).data.base_model == "me/model"
    assert hub.titles("me/part", "longer")[1:] == hub.titles("me/part")

    adapter = hub.files("me/adapter")
    assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json"} <= set(adapter)
    assert not {"config.json", "model.safetensors"} & set(adapter)
    assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] == "me/model"
    card = ModelCard(adapter["README.md"].decode())
    assert card.data.base_model == "me/model" and "A LoRA adapter of the decoder" in card.text

    assert hub.repositories["me/secret"].private and hub.repositories["me/secret-part"].private
    assert {"README.md", "audio_vision_tower/model.safetensors"} <= set(hub.files("me/converted"))


WITHOUT_PACKAGE = (
    DIGEST
    + """
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

clip, *revisions = sys.argv[1:]
trust = {"trust_remote_code": True}
digests, frames = {}, {}

def load(name, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(name, **trust, **kwargs)

for revision in revisions:
    digests[revision] = digest(load("me/model", revision=revision))
    processor = AutoProcessor.from_pretrained("me/model", revision=revision, **trust)
    frames[revision] = processor.video_processor.num_frames
for name in ("adapter", "no-decoder", "no-decoder-adapter"):
    digests[name] = digest(load(f"me/{name}"))
digests["secret"] = digest(load("me/secret", token="hf_me"))

refused = {}
for token in (None, "hf_other"):
    try:
        load("me/secret", token=token)
    except OSError as error:
        refused[str(token)] = str(error)

greedy = {"text": "What is shown?", "do_sample": False, "max_new_tokens": 8, "return_tensors": True}
tokens = {}
for name, kwargs in {"model": {}, "adapter": {}, "secret": {"token": "hf_me"}}.items():
    pipe = pipeline("video-text-to-text", model=f"me/{name}", device="cpu", **trust, **kwargs)
    assert any("lora" in key for key in pipe.model.state_dict()) == (name == "adapter")
    tokens[name] = pipe(clip, **greedy)[0]["generated_token_ids"].tolist()
inferred = type(pipeline(model="me/model", device="cpu", **trust)).__name__
assert not [name for name in sys.modules if name.partition(".")[0] == "transformers_videollama"]
print(json.dumps({"digests": digests, "frames": frames, "refused": refused, "tokens": tokens, "inferred": inferred}))
"""
)


def test_a_process_without_the_package_gets_what_was_pushed(pushed: Pushed, tmp_path: Path) -> None:
    pull_request = pushed.hub.repositories["me/model"].refs["refs/pr/1"]
    revisions = ("v1", "main", "experiment/1", pull_request)
    found = run(WITHOUT_PACKAGE, CLIP, *revisions, tmp_path=tmp_path / "home", **pushed.hub.environment)
    names = (*revisions, "adapter", "no-decoder", "no-decoder-adapter", "secret")
    assert found["digests"] == {name: pushed.digests[name] for name in names}
    assert found["frames"] == {"v1": 8, "main": 4, "experiment/1": 4, pull_request: 4}
    assert found["inferred"] == "VideoTextToTextPipeline"
    assert all(found["tokens"].values())
    assert set(found["refused"]) == {"None", "hf_other"}
    assert all("me/secret" in message and "token" in message for message in found["refused"].values())


WITH_PACKAGE = (
    DIGEST
    + """
from transformers import AutoProcessor
from transformers_videollama import VideoLlamaForConditionalGeneration, from_trained_part, load_trained_part

def load(name, **kwargs):
    return VideoLlamaForConditionalGeneration.from_pretrained(name, **kwargs)

# First without a token, because what was fetched with one is in the cache
refused = []
for call in (
    lambda: from_trained_part("me/secret-part"),
    lambda: load("me/secret"),
    lambda: load_trained_part(None, "me/secret-part"),
    lambda: load("me/model", revision="v2"),
):
    try:
        call()
    except OSError as error:
        refused.append(str(error))

digests = {"part": digest(from_trained_part("me/part"))}
model = load("me/model", revision="v1")
load_trained_part(model, "me/part", revision="longer")
digests["longer"] = digest(model)
for name in ("adapter", "no-decoder", "no-decoder-adapter"):
    digests[name] = digest(load(f"me/{name}"))
model = load("me/model")
model.load_adapter("me/adapter")
digests["loaded adapter"] = digest(model)
digests["secret-part"] = digest(from_trained_part("me/secret-part", token="hf_me"))

processors = [type(AutoProcessor.from_pretrained(f"me/{name}")).__name__ for name in ("model", "part", "adapter")]
model = load("me/converted")
model.load_audio_vision_tower()
print(json.dumps({"digests": digests, "refused": refused, "processors": processors,
                  "tower": type(model.model.audio_vision_tower).__name__}))
"""
)


def test_a_process_with_the_package_gets_what_was_pushed(pushed: Pushed, tmp_path: Path) -> None:
    found = run(WITH_PACKAGE, tmp_path=tmp_path / "home", package=True, **pushed.hub.environment)
    names = ("part", "longer", "adapter", "no-decoder", "no-decoder-adapter", "secret-part")
    expected = {name: pushed.digests[name] for name in names}
    assert found["digests"] == {**expected, "loaded adapter": pushed.digests["adapter"]}
    assert found["processors"] == ["VideoLlamaProcessor"] * 3
    assert found["tower"] == "VideoLlamaAudioVisionModel"
    for name, message in zip(
        ("me/secret-part", "me/secret", "me/secret-part", "me/model"), found["refused"], strict=True
    ):
        assert name in message
    assert "v2" in found["refused"][-1]


LOAD = (
    DIGEST
    + """
from transformers import AutoModelForImageTextToText
print(json.dumps(digest(AutoModelForImageTextToText.from_pretrained("me/large", trust_remote_code=True))))
"""
)


def large_model(folder: Path, **kwargs: Any) -> tuple[dict[str, bytes], str]:
    """The files and the digest of a model of 20 MiB, of which the client writes down 10 MiB at a time."""
    config = tiny_config()
    config.text_config = LlamaConfig(**{**config.text_config.to_dict(), "vocab_size": 80_000})
    model = VideoLlamaForConditionalGeneration(config)
    model.save_pretrained(folder, **kwargs)
    return {path.name: path.read_bytes() for path in folder.iterdir()}, digest(model)


def test_a_download_that_breaks_off_goes_on_where_it_was(tmp_path: Path) -> None:
    files, expected = large_model(tmp_path / "large")
    with LocalHub() as hub:
        hub.create("me/large", files)
        hub.break_off("model.safetensors", 15 * MEBIBYTE)
        assert run(LOAD, tmp_path=tmp_path / "home", **hub.environment) == expected
        first, second = [download for download in hub.downloads if download.path == "model.safetensors"]
    size = len(files["model.safetensors"])
    assert (first.first_byte, first.num_bytes) == (0, 15 * MEBIBYTE)
    assert 0 < second.first_byte <= 15 * MEBIBYTE and second.first_byte + second.num_bytes == size


def test_a_process_that_was_killed_in_a_download_leaves_what_it_has(tmp_path: Path) -> None:
    files, expected = large_model(tmp_path / "large", max_shard_size="5MB")
    largest = max(files, key=lambda name: len(files[name]))
    assert sum(name.endswith(".safetensors") for name in files) > 2
    with LocalHub() as hub:
        hub.create("me/large", files)
        process = start(LOAD, tmp_path=tmp_path / "home", **hub.environment)
        hub.break_off(largest, MEBIBYTE, lambda: process.kill())
        process.communicate()
        assert process.returncode == -9
        (snapshot,) = (tmp_path / "home" / "home" / "hf" / "hub" / "models--me--large" / "snapshots").iterdir()
        complete = {path.name for path in snapshot.iterdir()}
        assert "config.json" in complete and largest not in complete
        assert all((snapshot / name).read_bytes() == files[name] for name in complete)

        hub.downloads.clear()
        assert run(LOAD, tmp_path=tmp_path / "home", **hub.environment) == expected
        fetched = {download.path for download in hub.downloads}
        assert largest in fetched and not fetched & complete
