"""vLLM's plugin: tells vLLM which class runs the architecture that saved folders name.

vLLM calls `register` in each of its processes, by the entry point `video_llama` of its group `vllm.general_plugins`
(`pyproject.toml`). The class, `vllm_model.VideoLlamaForVllm`, is imported when such a model is served. See
`docs/serving-vllm.md`.
"""

ARCHITECTURE = "VideoLlamaForConditionalGeneration"
MODEL_CLASS = f"{__package__}.vllm_model:VideoLlamaForVllm"


def register() -> None:
    """
    Registers Video-LLaMA with vLLM, by name only. Doing it again changes nothing. `transformers` knows the model
    already, because this package was imported.
    """
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)


__all__ = ["register"]
