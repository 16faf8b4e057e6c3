"""A saved folder served by vLLM itself, on a CPU: the tokens are those of `generate`, also of what its server is sent.

Run by hand, in the environment that `set_up.sh` beside this file makes:

    tests/with_vllm/set_up.sh && .venv-vllm/bin/python -m pytest -m vllm -n 0 tests/with_vllm
"""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlamaConfig

from transformers_videollama import VideoLlamaConfig, VideoLlamaForConditionalGeneration

CLIP = Path(__file__).parents[1] / "reference" / "synth" / "clip.mp4"
SAMPLING_RATE = 16000
NUM_FRAMES = 8
NUM_TOKENS = 16
PROMPTS = {
    "text": "What is it?",
    "image": "<image> What is it?",
    "video": "<video> What do you see?",
    "video and sound": "<audio> <video> What do you see and hear?",
}
ENGINES: dict[str, dict[str, Any]] = {
    "plugin": {},
    "auto_map": {"trust_remote_code": True},
    "compiled": {"enforce_eager": False},
    "bfloat16": {"dtype": "bfloat16"},
    "tensor_parallel": {"tensor_parallel_size": 2},
    # On CPUs it needs the compiler's warm-up, which makes its buffers
    "pipeline_parallel": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},
    },
}

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, large enough that its answers depend on what it is shown, with heads as vLLM's
    attention on CPUs needs them."""
    folder = tmp_path_factory.mktemp("vllm") / "toy"
    config = VideoLlamaConfig.from_pretrained(tiny_folder)
    text = config.text_config.to_dict()
    text |= {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    config.text_config = LlamaConfig(**{**text, "head_dim": 64, "dtype": "float32"})
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.initializer_range = 0.2
    torch.manual_seed(0)
    model = VideoLlamaForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=None, stop_strings=None)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def media() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "image": random.integers(0, 256, (48, 64, 3), dtype=np.uint8),
        "video": random.integers(0, 256, (NUM_FRAMES, 64, 64, 3), dtype=np.uint8),
        "audio": random.standard_normal(3 * SAMPLING_RATE).astype(np.float32) * 0.1,
    }


def generate(folder: Path, prompt: str, media: dict[str, np.ndarray]) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and the greedy ones that `generate` adds."""
    processor = AutoProcessor.from_pretrained(folder)
    model = VideoLlamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    arguments = {"image": "images", "video": "videos", "audio": "audio"}
    given = {argument: [media[name]] for name, argument in arguments.items() if f"<{name}>" in prompt}
    frames_are_sampled = {"do_sample_frames": False} if "videos" in given else {}
    inputs = processor(text=prompt, return_tensors="pt", **given, **frames_are_sampled)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NUM_TOKENS)[0].tolist()
    num_prompt_tokens = inputs["input_ids"].shape[1]
    return output[:num_prompt_tokens], output[num_prompt_tokens:]


VLLM = """
import json, sys
import numpy as np
from PIL import Image
from vllm import LLM, SamplingParams

folder, media, tokens, engine, num_tokens, prompts = sys.argv[1:]
media, engine = dict(np.load(media)), json.loads(engine)
indices = list(range(len(media["video"])))
metadata = {"fps": 4.0, "duration": 2.0, "total_num_frames": len(indices), "frames_indices": indices,
            "video_backend": "opencv", "do_sample_frames": False}
media = {"image": Image.fromarray(media["image"]), "video": [(media["video"], metadata)],
         "audio": [(media["audio"], 16000)]}
llm = LLM(model=folder, max_model_len=512, max_num_seqs=4, limit_mm_per_prompt={"image": 1, "video": 1, "audio": 1},
          **{"dtype": "float32", "enforce_eager": True, **engine})
requests = []
for prompt in json.loads(prompts):
    given = {name: medium for name, medium in media.items() if f"<{name}>" in prompt}
    requests.append({"prompt": prompt, **({"multi_modal_data": given} if given else {})})
outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=int(num_tokens), ignore_eos=True))
assert ("transformers_videollama" in sys.modules) == (not engine.get("trust_remote_code"))
with open(tokens, "w") as file:
    json.dump([list(output.outputs[0].token_ids) for output in outputs], file)
"""


def environment(plugin: bool) -> dict[str, str]:
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        # Two processes also on a machine that has not as many cores as vLLM would set aside for them
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **settings, **({} if plugin else {"VLLM_PLUGINS": ""})}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_greedy_tokens_are_those_of_generate(
    folder: Path, media: dict[str, np.ndarray], engine: dict[str, Any], tmp_path: Path
) -> None:
    # Rounded to half precision, answers part ways at the first token that hangs on it
    num_compared = 2 if "dtype" in engine else NUM_TOKENS
    expected = [generate(folder, prompt, media)[1][:num_compared] for prompt in PROMPTS.values()]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    np.savez(tmp_path / "media.npz", **media)
    files = [folder, tmp_path / "media.npz", tmp_path / "tokens.json"]
    settings = [json.dumps(engine), NUM_TOKENS, json.dumps(list(PROMPTS.values()))]
    result = subprocess.run(
        [sys.executable, "-c", VLLM, *map(str, [*files, *settings])],
        env=environment(plugin=not engine.get("trust_remote_code")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:]
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    assert [answer[:num_compared] for answer in tokens] == expected


# The server


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_healthy(endpoint: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{endpoint}/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise AssertionError(f"The server has ended:\n{log.read_text()[-8000:]}")


@pytest.fixture(scope="module")
def endpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4",
        "--media-io-kwargs", json.dumps({"video": {"num_frames": NUM_FRAMES}}),
    ]  # fmt: skip
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment(plugin=True), stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def clip_frames() -> np.ndarray:
    """The frames of the clip that vLLM takes, as it decodes them."""
    import cv2

    capture, frames = cv2.VideoCapture(str(CLIP)), []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return np.stack([frames[index] for index in np.linspace(0, len(frames) - 1, NUM_FRAMES, dtype=int)])


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("shown", [["image"], ["video"], ["video", "audio"]], ids=" and ".join)
def test_the_server_answers_as_generate(
    folder: Path, media: dict[str, np.ndarray], endpoint: str, shown: list[str]
) -> None:
    import soundfile

    image, sound = io.BytesIO(), io.BytesIO()
    Image.fromarray(media["image"]).save(image, "PNG")
    soundfile.write(sound, media["audio"], SAMPLING_RATE, format="WAV", subtype="FLOAT")
    urls = {
        "image": data_url("image/png", image.getvalue()),
        "video": data_url("video/mp4", CLIP.read_bytes()),
        "audio": data_url("audio/wav", sound.getvalue()),
    }
    question = {"type": "text", "text": "What is it?"}
    entries: list[dict[str, Any]] = [{"type": f"{name}_url", f"{name}_url": {"url": urls[name]}} for name in shown]
    request = {
        "model": str(folder),
        "messages": [{"role": "user", "content": [*entries, question]}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "add_special_tokens": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    call = urllib.request.Request(
        f"{endpoint}/v1/chat/completions",
        data=json.dumps(request).encode(),
        headers={"Content-Type": "application/json"},
    )
    answer = json.load(urllib.request.urlopen(call))

    chat = [{"role": "user", "content": [*({"type": name} for name in shown), question]}]
    prompt = AutoProcessor.from_pretrained(folder).apply_chat_template(chat, add_generation_prompt=True)
    prompt_tokens, tokens = generate(folder, prompt, {**media, "video": clip_frames()})
    assert answer["prompt_token_ids"] == prompt_tokens
    assert answer["choices"][0]["token_ids"] == tokens
