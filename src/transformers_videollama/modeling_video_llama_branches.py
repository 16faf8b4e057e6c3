"""What is trained of Video-LLaMA: the video branch and the audio branch, two of one kind.

Between the frozen encoders (`modeling_video_llama_towers.py`) and the decoder's prompt; `modeling_video_llama.py` puts
them together. The image Q-Former, which is frozen, is of the same class as the branches' own.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2QFormerLayer,
    Blip2QFormerModel,
    Blip2QFormerMultiHeadAttention,
)
from transformers.utils.output_capturing import OutputRecorder

from .configuration_video_llama import VideoLlamaQFormerConfig


class VideoLlamaQFormerModel(Blip2QFormerModel):
    """A Q-Former: learned queries that attend to themselves and, in some layers, to a memory."""

    config: VideoLlamaQFormerConfig
    # Run in the model's own dtype, unlike BLIP-2's.
    _keep_in_fp32_modules = None
    _can_record_outputs = {
        "hidden_states": Blip2QFormerLayer,
        "attentions": OutputRecorder(Blip2QFormerMultiHeadAttention, index=1, layer_name=".attention"),
        "cross_attentions": OutputRecorder(Blip2QFormerMultiHeadAttention, index=1, layer_name=".crossattention"),
    }

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        # The library's flash-attention call takes one padding mask for queries and keys alike, so it cannot hide
        # padded frames from the queries. PyTorch's own attention can, and runs its flash kernel where nothing is
        # padded.
        if attn_implementation is not None and "flash" in attn_implementation:
            attn_implementation = "sdpa"
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


class VideoLlamaBranch(nn.Module):
    """
    The trainable half of a modality: positions in time are added to a memory of frames or clips, a Q-Former reads it
    into a fixed number of tokens, and a linear layer takes those to the decoder's width (paper, section 2.1).

    Args:
        config (`VideoLlamaQFormerConfig`): The Q-Former; `encoder_hidden_size` is the memory's width.
        num_query_tokens (`int`): Soft tokens of one medium.
        num_positions (`int`): Rows of the position table.
        output_size (`int`): The decoder's width.
        interpolate_positions (`bool`, *optional*, defaults to `False`):
            Whether longer media are accepted, by stretching the position table over them.
    """

    def __init__(
        self,
        config: VideoLlamaQFormerConfig,
        num_query_tokens: int,
        num_positions: int,
        output_size: int,
        interpolate_positions: bool = False,
    ):
        super().__init__()
        self.interpolate_positions = interpolate_positions
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, config.hidden_size))
        self.position_embedding = nn.Embedding(num_positions, config.encoder_hidden_size)
        self.qformer = VideoLlamaQFormerModel._from_config(config)
        self.projector = nn.Linear(config.hidden_size, output_size)

    def check_length(self, length: int, what: str) -> None:
        """Refuses a medium of more steps than positions, unless they may be interpolated. `what` names the steps."""
        num_positions = self.position_embedding.num_embeddings
        if length > num_positions and not self.interpolate_positions:
            raise ValueError(
                f"Got {length} {what}, but the model has positions for {num_positions}. Give at most {num_positions} "
                f"{what}; for videos, `interpolate_frame_positions=True` in the configuration stretches the positions "
                "over longer ones."
            )

    def get_positions(self, length: int, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """
        Position embeddings of shape `(1 or N, length, encoder_hidden_size)`. A medium of n steps, of which there are
        at most as many as table rows, takes the first n rows; a longer one takes the table linearly interpolated to n
        rows (each medium by its own length, so that a batch gives what its members give alone).
        """
        # The table is read by calling the module, because offloaded weights are on their device only during a call.
        num_positions = self.position_embedding.num_embeddings
        device = self.query_tokens.device
        table = self.position_embedding(torch.arange(min(length, num_positions), device=device))
        if length <= num_positions:
            return table.unsqueeze(0)
        steps = torch.arange(length, device=table.device, dtype=torch.float32)[None]
        if padding_mask is None:
            lengths = torch.full((1, 1), length, device=table.device, dtype=torch.float32)
        else:
            lengths = padding_mask.sum(dim=1, keepdim=True).to(table.device, torch.float32)
        stretched = ((steps + 0.5) * num_positions / lengths - 0.5).clamp(0, num_positions - 1)
        rows = torch.where(lengths > num_positions, stretched, steps.clamp(max=num_positions - 1))
        lower = rows.floor().long()
        upper = (lower + 1).clamp(max=num_positions - 1)
        return torch.lerp(table[lower], table[upper], (rows - lower).unsqueeze(-1).to(table.dtype))

    def forward(self, memory: torch.Tensor, padding_mask: torch.Tensor | None = None) -> BaseModelOutputWithPooling:
        r"""
        Args:
            memory (`torch.Tensor` of shape `(N, length, tokens, encoder_hidden_size)`):
                `tokens` vectors a frame or clip.
            padding_mask (`torch.Tensor` of shape `(N, length)`, *optional*): 1 for frames, 0 for padding.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(N, num_query_tokens, hidden_size)` and
            `pooler_output` of shape `(N, num_query_tokens, output_size)`.
        """
        num_media, length, tokens_per_step, _ = memory.shape
        memory = (memory + self.get_positions(length, padding_mask).unsqueeze(2)).flatten(1, 2)
        memory_mask = None
        if padding_mask is not None:
            memory_mask = padding_mask.to(memory.device).repeat_interleave(tokens_per_step, dim=1)
        hidden_states = self.qformer(
            query_embeds=self.query_tokens.expand(num_media, -1, -1),
            encoder_hidden_states=memory,
            encoder_attention_mask=memory_mask,
            return_dict=True,
        ).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=self.projector(hidden_states))
