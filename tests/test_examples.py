"""The example scripts run, as their first lines say, on real files and a small model."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CLIP = Path(__file__).parent / "reference" / "synth" / "clip.mp4"


def run(script: str, *arguments: object) -> str:
    """What a script prints, in a process of its own."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ask_a_video(tiny_folder: Path) -> None:
    lines = run("ask_video.py", CLIP, "What is shown?", "Why?", "--model", tiny_folder, "--max-new-tokens", 4)
    assert [line[:3] for line in lines.splitlines() if line[:3] in ("Q: ", "A: ")] == ["Q: ", "A: "] * 2


def test_finetune_with_lora_then_export_and_serve(tiny_folder: Path, tmp_path: Path) -> None:
    question = "What breaks?"
    content = [{"type": "video", "path": str(CLIP)}, {"type": "text", "text": question}]
    chat = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "The hinge."}]},
    ]
    annotations = tmp_path / "train.jsonl"
    annotations.write_text((json.dumps({"messages": chat}) + "\n") * 4, encoding="utf-8")
    output = tmp_path / "out"
    printed = run(
        "finetune_lora.py", annotations, "--model", tiny_folder, "--output", output, "--steps", 60,
        "--ask", CLIP, question, "--learning_rate", "1e-2", "--warmup_steps", 0, "--use_cpu", "true",
        "--random_resized_crop", "false", "--per_device_train_batch_size", 2, "--report_to", "none",
        "--logging_steps", 5,
    )  # fmt: skip
    said = dict(line.split(": ", 1) for line in printed.splitlines() if line.startswith(("before: ", "after: ")))
    log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] / 2 and said["after"] != said["before"]
    assert (output / "adapter_config.json").is_file() and (output / "trained_part.safetensors").is_file()
    answer = said["after"]

    # What was trained, exported as a whole model and served, answers the same
    served = run("export_and_serve.py", output, tmp_path / "exported", "--model", tiny_folder, "--ask", CLIP, question)
    assert served.splitlines()[-1] == f"A: {answer}"
