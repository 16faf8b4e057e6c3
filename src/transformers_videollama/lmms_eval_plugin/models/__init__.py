"""The models of the plugin: their names, which are those of modules here, and the classes in these."""

AVAILABLE_MODELS = {"video_llama": "VideoLlama"}
