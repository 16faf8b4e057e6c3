"""A saved folder served by vLLM itself, on a CPU: the tokens are those of `generate`, and its server sees a video.

Run by hand, in the environment that `set_up.sh` beside this file makes:

    tests/with_vllm/set_up.sh && .venv-vllm/bin/python -m pytest -m vllm -n 0 tests/with_vllm
"""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlamaConfig

from transformers_videollama import VideoLlamaConfig, VideoLlamaForConditionalGeneration

CLIP = Path(__file__).parents[1] / "reference" / "synth" / "clip.mp4"
NUM_TOKENS = 16
PROMPTS = {
    "text": "What is it?",
    "video": "<video> What do you see?",
    "video and sound": "<audio> <video> What do you see and hear?",
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


def media() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    return frames, random.standard_normal(48000).astype(np.float32) * 0.1


def generate(folder: Path) -> dict[str, list[int]]:
    """The greedy tokens of each prompt, by `generate`."""
    processor = AutoProcessor.from_pretrained(folder)
    model = VideoLlamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    frames, sound = media()
    tokens = {}
    for name, prompt in PROMPTS.items():
        given = {"videos": [frames], "do_sample_frames": False} if "<video>" in prompt else {}
        given |= {"audio": [sound]} if "<audio>" in prompt else {}
        inputs = processor(text=prompt, return_tensors="pt", **given)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NUM_TOKENS)
        tokens[name] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


VLLM = """
import json, sys
import numpy as np
from vllm import LLM, SamplingParams

folder, media, by, num_tokens, prompts = sys.argv[1:]
frames, sound = np.load(media).values()
metadata = {"fps": 4.0, "duration": 2.0, "total_num_frames": len(frames), "frames_indices": list(range(len(frames))),
            "video_backend": "opencv", "do_sample_frames": False}
llm = LLM(model=folder, trust_remote_code=by == "auto_map", dtype="float32", enforce_eager=True,
          max_model_len=512, max_num_seqs=4, limit_mm_per_prompt={"image": 1, "video": 1, "audio": 1})
greedy = SamplingParams(temperature=0, max_tokens=int(num_tokens), ignore_eos=True)
tokens = {}
for name, prompt in json.loads(prompts).items():
    given = {"video": [(frames, metadata)]} if "<video>" in prompt else {}
    given |= {"audio": [(sound, 16000)]} if "<audio>" in prompt else {}
    output = llm.generate({"prompt": prompt, **({"multi_modal_data": given} if given else {})}, greedy)
    tokens[name] = list(output[0].outputs[0].token_ids)
assert ("transformers_videollama" in sys.modules) == (by == "plugin")
print(json.dumps(tokens))
"""


def environment(plugin: bool) -> dict[str, str]:
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **settings, **({} if plugin else {"VLLM_PLUGINS": ""})}


@pytest.mark.parametrize("by", ["plugin", "auto_map"])
def test_greedy_tokens_are_those_of_generate(folder: Path, by: str, tmp_path: Path) -> None:
    expected = generate(folder)
    assert len({tuple(tokens) for tokens in expected.values()}) == len(PROMPTS)
    np.savez(tmp_path / "media.npz", *media())
    arguments = [str(folder), str(tmp_path / "media.npz"), by, str(NUM_TOKENS), json.dumps(PROMPTS)]
    result = subprocess.run(
        [sys.executable, "-c", VLLM, *arguments], env=environment(by == "plugin"), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-8000:]
    assert json.loads(result.stdout.splitlines()[-1]) == expected


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


def test_the_server_answers_about_a_video(folder: Path, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log.txt"
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4",
    ]  # fmt: skip
    video = f"data:video/mp4;base64,{base64.b64encode(CLIP.read_bytes()).decode()}"
    content = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": "What do you see?"}]
    request: dict[str, Any] = {
        "model": str(folder),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "add_special_tokens": True,
        "ignore_eos": True,
    }
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment(True), stdout=output, stderr=subprocess.STDOUT)
        try:
            endpoint = f"http://127.0.0.1:{port}"
            wait_until_healthy(endpoint, server, log)
            call = urllib.request.Request(
                f"{endpoint}/v1/chat/completions",
                data=json.dumps(request).encode(),
                headers={"Content-Type": "application/json"},
            )
            answer = json.load(urllib.request.urlopen(call))
        finally:
            server.terminate()
            server.wait(60)
    num_video_tokens = VideoLlamaConfig.from_pretrained(folder).num_video_query_tokens
    assert answer["usage"]["completion_tokens"] == NUM_TOKENS
    assert answer["usage"]["prompt_tokens"] > num_video_tokens
    assert isinstance(answer["choices"][0]["message"]["content"], str)
