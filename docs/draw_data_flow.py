"""Draws `data_flow.svg`, the picture of how a video becomes an answer, with the sizes of the published 7B model.

    python docs/draw_data_flow.py

The sizes are read from the default configuration, so that the picture says what the code does.
"""

from html import escape
from pathlib import Path

from transformers_videollama import VideoLlamaConfig

OUTPUT = Path(__file__).with_name("data_flow.svg")
WIDTH, HEIGHT = 150, 62  # of a box
FROZEN, TRAINED, DATA = "#dbe7f5", "#fde3c8", "#f4f4f4"


def box(column: int, row: float, title: str, lines: list[str], colour: str) -> str:
    """A labelled box; columns and rows are those of the grid on which all boxes stand."""
    left, top = 20 + column * (WIDTH + 34), 50 + row * (HEIGHT + 46)
    middle = left + WIDTH / 2
    shape = f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{colour}" stroke="#555"/>'
    words = [f'<text x="{middle}" y="{top + 20}" font-weight="bold">{escape(title)}</text>']
    words += [f'<text x="{middle}" y="{top + 37 + 15 * i}">{escape(line)}</text>' for i, line in enumerate(lines)]
    return shape + "".join(words)


def arrow(start: tuple[int, float], end: tuple[int, float]) -> str:
    """From the right side of one box to the left side of another."""
    x1, y1 = 20 + start[0] * (WIDTH + 34) + WIDTH, 50 + start[1] * (HEIGHT + 46) + HEIGHT / 2
    x2, y2 = 20 + end[0] * (WIDTH + 34), 50 + end[1] * (HEIGHT + 46) + HEIGHT / 2
    return f'<line x1="{x1}" y1="{y1}" x2="{x2 - 3}" y2="{y2}" stroke="#555" marker-end="url(#tip)"/>'


def draw(config: VideoLlamaConfig) -> str:
    vision, audio, width = config.vision_config, config.audio_config, config.text_config.hidden_size
    sight = [
        ("frames", ["T × 3 × 224 × 224"], DATA),
        ("ViT-g", [f"{vision.num_hidden_layers} layers,", f"257 × {vision.hidden_size}"], FROZEN),
        ("image Q-Former", [f"{config.num_query_tokens} × {config.qformer_config.hidden_size}", "a frame"], FROZEN),
        ("video Q-Former", ["+ frame positions,", "linear layer"], TRAINED),
    ]
    sound = [
        ("sound", ["S clips of 2 s,", "128 mel × 204"], DATA),
        ("ImageBind", [f"{audio.num_hidden_layers} layers,", f"{audio.projection_dim} a clip"], FROZEN),
        ("audio Q-Former", ["+ clip positions,", "linear layer"], TRAINED),
    ]
    parts = [box(i, 0, title, lines, colour) for i, (title, lines, colour) in enumerate(sight)]
    parts += [box(i, 1, *sound[i]) for i in (0, 1)] + [box(3, 1, *sound[2])]
    parts += [box(4, 0, "soft tokens", [f"{config.num_video_query_tokens} × {width}"], DATA)]
    parts += [box(4, 1, "soft tokens", [f"{config.num_audio_query_tokens} × {width}"], DATA)]
    parts += [box(0, 2, "question", ["chat template,", "tokenizer"], DATA)]
    parts += [box(4, 2, "prompt", ["soft tokens in place", "of their placeholders"], DATA)]
    parts += [box(5, 1, "LLaMA", [f"{config.text_config.num_hidden_layers} layers", f"of width {width}"], FROZEN)]
    parts += [box(6, 1, "answer", [], DATA)]
    joins = [
        *(((column, 0), (column + 1, 0)) for column in range(4)),
        *[((0, 1), (1, 1)), ((1, 1), (3, 1)), ((3, 1), (4, 1)), ((0, 2), (4, 2))],
        *(((4, row), (5, 1)) for row in range(3)),
        ((5, 1), (6, 1)),
    ]
    parts += [arrow(*join) for join in joins]
    legend = [(FROZEN, "frozen"), (TRAINED, "trained"), (DATA, "data")]
    for i, (colour, name) in enumerate(legend):
        left = 20 + 110 * i
        parts.append(f'<rect x="{left}" y="14" width="18" height="14" fill="{colour}" stroke="#555"/>')
        parts.append(f'<text x="{left + 24}" y="26" style="text-anchor: start">{name}</text>')
    size = f'viewBox="0 0 {40 + 7 * WIDTH + 6 * 34} {60 + 3 * HEIGHT + 2 * 46 + 10}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        "<style>text { text-anchor: middle }</style>"
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker></defs>'
        '<rect width="100%" height="100%" fill="white"/>' + "\n".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    OUTPUT.write_text(draw(VideoLlamaConfig()), encoding="utf-8")
