"""The published names of Video-LLaMA's weights, and what each of them is called in `transformers_videollama`.

Used by `convert_video_llama_checkpoint.py`, which reads the published files, looks every key up here and writes it
under its new name. A key of a file that holds one part only (the ViT's, ImageBind's, a decoder's) first gets the
prefix which that part has in an archive of the whole model, so that one table serves both.

How to read the table: `{i}` stands for a layer's number. A row names a parameter, or a module whose `weight` and
`bias` keep their names. Three names on the right: the published tensor holds queries, keys and values below one
another.
"""

from collections.abc import Collection

# The frame encoder (EVA-CLIP's ViT-g/14) and BLIP-2's layer norm behind it. Its keys have no bias: the published
# attention has `q_bias` and `v_bias` only.
VISION_TOWER: dict[str, str | tuple[str, ...]] = {
    "visual_encoder.cls_token": "model.vision_tower.embeddings.class_embedding",
    "visual_encoder.pos_embed": "model.vision_tower.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj": "model.vision_tower.embeddings.patch_embedding",
    "visual_encoder.blocks.{i}.norm1": "model.vision_tower.encoder.layers.{i}.layer_norm1",
    "visual_encoder.blocks.{i}.attn.qkv.weight": (
        "model.vision_tower.encoder.layers.{i}.self_attn.q_proj.weight",
        "model.vision_tower.encoder.layers.{i}.self_attn.k_proj.weight",
        "model.vision_tower.encoder.layers.{i}.self_attn.v_proj.weight",
    ),
    "visual_encoder.blocks.{i}.attn.q_bias": "model.vision_tower.encoder.layers.{i}.self_attn.q_proj.bias",
    "visual_encoder.blocks.{i}.attn.v_bias": "model.vision_tower.encoder.layers.{i}.self_attn.v_proj.bias",
    "visual_encoder.blocks.{i}.attn.proj": "model.vision_tower.encoder.layers.{i}.self_attn.out_proj",
    "visual_encoder.blocks.{i}.norm2": "model.vision_tower.encoder.layers.{i}.layer_norm2",
    "visual_encoder.blocks.{i}.mlp.fc1": "model.vision_tower.encoder.layers.{i}.mlp.fc1",
    "visual_encoder.blocks.{i}.mlp.fc2": "model.vision_tower.encoder.layers.{i}.mlp.fc2",
    "ln_vision": "model.vision_tower.post_layernorm",
}

# What each of the three Q-Formers (image, video, audio) holds, after its own prefix on either side.
QFORMER: dict[str, str] = {
    "bert.embeddings.LayerNorm": "layernorm",
    "bert.encoder.layer.{i}.attention.self.query": "encoder.layer.{i}.attention.attention.query",
    "bert.encoder.layer.{i}.attention.self.key": "encoder.layer.{i}.attention.attention.key",
    "bert.encoder.layer.{i}.attention.self.value": "encoder.layer.{i}.attention.attention.value",
    "bert.encoder.layer.{i}.attention.output.dense": "encoder.layer.{i}.attention.output.dense",
    "bert.encoder.layer.{i}.attention.output.LayerNorm": "encoder.layer.{i}.attention.output.LayerNorm",
    "bert.encoder.layer.{i}.crossattention.self.query": "encoder.layer.{i}.crossattention.attention.query",
    "bert.encoder.layer.{i}.crossattention.self.key": "encoder.layer.{i}.crossattention.attention.key",
    "bert.encoder.layer.{i}.crossattention.self.value": "encoder.layer.{i}.crossattention.attention.value",
    "bert.encoder.layer.{i}.crossattention.output.dense": "encoder.layer.{i}.crossattention.output.dense",
    "bert.encoder.layer.{i}.crossattention.output.LayerNorm": "encoder.layer.{i}.crossattention.output.LayerNorm",
    "bert.encoder.layer.{i}.intermediate_query.dense": "encoder.layer.{i}.intermediate_query.dense",
    "bert.encoder.layer.{i}.output_query.dense": "encoder.layer.{i}.output_query.dense",
    "bert.encoder.layer.{i}.output_query.LayerNorm": "encoder.layer.{i}.output_query.LayerNorm",
}
# The text half of the same BERT, which Video-LLaMA never feeds.
QFORMER_UNUSED = (
    "bert.embeddings.position_ids",
    "bert.embeddings.word_embeddings.",
    "bert.embeddings.position_embeddings.",
    "bert.encoder.layer.{i}.intermediate.",
    "bert.encoder.layer.{i}.output.",
    "bert.pooler.",
    "cls.",
)
QFORMER_PREFIXES = {
    "Qformer.": "model.qformer.",
    "video_Qformer.": "model.video_branch.qformer.",
    "audio_Qformer.": "model.audio_branch.qformer.",
}

# Query tokens, position tables and projections around the Q-Formers.
BRANCHES: dict[str, str] = {
    "query_tokens": "model.query_tokens",
    "video_query_tokens": "model.video_branch.query_tokens",
    "video_frame_position_embedding.weight": "model.video_branch.position_embedding.weight",
    "llama_proj": "model.video_branch.projector",
    "audio_query_tokens": "model.audio_branch.query_tokens",
    "audio_position_embedding.weight": "model.audio_branch.position_embedding.weight",
    "audio_llama_proj": "model.audio_branch.projector",
}

# ImageBind: its audio tower, and its vision tower, which is needed only to train the audio branch.
IMAGEBIND_TOWERS: dict[str, str] = {
    "audio_encoder.modality_preprocessors.audio.cls_token": "model.audio_tower.embeddings.class_embedding",
    "audio_encoder.modality_preprocessors.audio.pos_embedding_helper.pos_embed": (
        "model.audio_tower.embeddings.position_embedding"
    ),
    "audio_encoder.modality_preprocessors.audio.rgbt_stem.proj": "model.audio_tower.embeddings.patch_embedding",
    "audio_encoder.modality_preprocessors.audio.rgbt_stem.norm_layer": "model.audio_tower.embeddings.layernorm",
    "audio_encoder.modality_heads.audio.0": "model.audio_tower.post_layernorm",
    "audio_encoder.modality_heads.audio.2": "model.audio_tower.projection",
    "audio_encoder.modality_postprocessors.audio.1.log_logit_scale": "model.audio_tower.logit_scale",
    "audio_encoder.modality_preprocessors.vision.cls_token": "model.audio_vision_tower.embeddings.class_embedding",
    "audio_encoder.modality_preprocessors.vision.pos_embedding_helper.pos_embed": (
        "model.audio_vision_tower.embeddings.position_embedding"
    ),
    "audio_encoder.modality_preprocessors.vision.rgbt_stem.proj.1": (
        "model.audio_vision_tower.embeddings.patch_embedding"
    ),
    "audio_encoder.modality_trunks.vision.pre_transformer_layer.0": "model.audio_vision_tower.pre_layernorm",
    "audio_encoder.modality_heads.vision.0": "model.audio_vision_tower.post_layernorm",
    "audio_encoder.modality_heads.vision.2": "model.audio_vision_tower.projection",
}
# A block of either tower, after `audio_encoder.modality_trunks.<modality>.` and our tower's name.
IMAGEBIND_BLOCK: dict[str, str | tuple[str, ...]] = {
    "blocks.{i}.norm_1": "encoder.layers.{i}.layer_norm1",
    "blocks.{i}.attn.in_proj_weight": (
        "encoder.layers.{i}.self_attn.q_proj.weight",
        "encoder.layers.{i}.self_attn.k_proj.weight",
        "encoder.layers.{i}.self_attn.v_proj.weight",
    ),
    "blocks.{i}.attn.in_proj_bias": (
        "encoder.layers.{i}.self_attn.q_proj.bias",
        "encoder.layers.{i}.self_attn.k_proj.bias",
        "encoder.layers.{i}.self_attn.v_proj.bias",
    ),
    "blocks.{i}.attn.bias_k": "encoder.layers.{i}.self_attn.bias_k",
    "blocks.{i}.attn.bias_v": "encoder.layers.{i}.self_attn.bias_v",
    "blocks.{i}.attn.out_proj": "encoder.layers.{i}.self_attn.out_proj",
    "blocks.{i}.norm_2": "encoder.layers.{i}.layer_norm2",
    "blocks.{i}.mlp.fc1": "encoder.layers.{i}.mlp.fc1",
    "blocks.{i}.mlp.fc2": "encoder.layers.{i}.mlp.fc2",
}

# Parts of the published files that Video-LLaMA does not use: everything that starts like this.
UNUSED = (
    # the ViT's final norm and classification head
    "visual_encoder.norm.",
    "visual_encoder.fc_norm.",
    "visual_encoder.head.",
    # BLIP-2's projection to its own language model
    "t5_proj.",
    "opt_proj.",
    # ImageBind's other towers
    *(
        f"audio_encoder.modality_{part}.{modality}."
        for part in ("preprocessors", "trunks", "heads", "postprocessors")
        for modality in ("text", "depth", "thermal", "imu")
    ),
    *(prefix + unused for prefix in QFORMER_PREFIXES for unused in QFORMER_UNUSED),
)

TABLE: dict[str, str | tuple[str, ...]] = {**VISION_TOWER, **BRANCHES, **IMAGEBIND_TOWERS}
for _published, _ours in QFORMER_PREFIXES.items():
    TABLE |= {_published + row: _ours + name for row, name in QFORMER.items()}
for _modality, _tower in {"audio": "model.audio_tower.", "vision": "model.audio_vision_tower."}.items():
    for _row, _name in IMAGEBIND_BLOCK.items():
        TABLE[f"audio_encoder.modality_trunks.{_modality}.{_row}"] = (
            _tower + _name if isinstance(_name, str) else tuple(_tower + third for third in _name)
        )


def translate(key: str) -> tuple[str, ...] | None:
    """
    The parameters that a published tensor becomes.

    Args:
        key (`str`): Name of the tensor in an archive of the whole model, as `"visual_encoder.blocks.3.norm1.weight"`.

    Returns:
        `tuple[str, ...]` or `None`: one name of ours; three if the tensor is split in thirds along its first
        dimension; none if the published model does not use the tensor; `None` if there is no such tensor in the
        published model.
    """
    if key.startswith("llama_model."):
        return _translate_decoder(key.removeprefix("llama_model."))
    row, layer = _split_layer_number(key)
    module, _, parameter = row.rpartition(".")
    names = TABLE.get(row)
    if names is None and module in TABLE and parameter in ("weight", "bias"):
        names = f"{TABLE[module]}.{parameter}"
    if names is None:
        return () if row.startswith(UNUSED) else None
    if isinstance(names, str):
        names = (names,)
    return tuple(name.replace("{i}", layer) for name in names)


def _translate_decoder(key: str) -> tuple[str, ...] | None:
    """A decoder keeps `transformers`' own names; ours holds its body as `model.language_model`."""
    if key.endswith("rotary_emb.inv_freq"):  # a table that old versions of the library saved with the weights
        return ()
    if key.startswith("model."):
        return ("model.language_model." + key.removeprefix("model."),)
    return (key,) if key.startswith("lm_head.") else None


def _split_layer_number(key: str) -> tuple[str, str]:
    """`"a.blocks.3.norm1.weight"` -> (`"a.blocks.{i}.norm1.weight"`, `"3"`)."""
    parts = key.split(".")
    for position, part in enumerate(parts[:-1]):
        if part in ("blocks", "layer") and parts[position + 1].isdigit():
            layer = parts[position + 1]
            parts[position + 1] = "{i}"
            return ".".join(parts), layer
    return key, ""


# The kinds of published files: the keys that tell them apart (all on the left are there, and none starts as on the
# right), and the prefix that their keys have in an archive of the whole model.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "an archive of the whole model": (("visual_encoder.cls_token", "video_query_tokens"), (), ""),
    "a video-branch file": (("video_query_tokens",), ("visual_encoder.cls_token",), ""),
    "an audio-branch file": (("audio_query_tokens",), ("video_query_tokens", "visual_encoder.cls_token"), ""),
    "BLIP-2's file": (("query_tokens",), ("video_query_tokens", "audio_query_tokens", "visual_encoder.cls_token"), ""),
    "MiniGPT-4's projection": (("llama_proj.weight",), ("video_", "audio_", "query_tokens", "visual_encoder."), ""),
    "EVA-CLIP's ViT": (("cls_token", "patch_embed.proj.weight"), (), "visual_encoder."),
    "ImageBind": (("modality_preprocessors.audio.cls_token",), (), "audio_encoder."),
    "a decoder": (("model.embed_tokens.weight",), (), "llama_model."),
}


def identify(keys: Collection[str]) -> str | None:
    """The kind of published file (a name in `KINDS`) that holds these keys, or `None` if it is none of them."""
    for kind, (required, forbidden, _) in KINDS.items():
        if all(key in keys for key in required) and not any(key.startswith(forbidden) for key in keys if forbidden):
            return kind
    return None
