"""Exports what a training wrote as a whole model, serves it as the OpenAI API does, and asks it over HTTP.

    python examples/export_and_serve.py runs/mine exported --model video-llama-2-7b --ask clip.mp4 "What breaks?"

`runs/mine` is the output of a training: a trained part, with or without a LoRA adapter, which is merged. The folder
`exported` loads like any other model, by `from_pretrained` or as `--model` of the command `videollama`, and can be
pushed to the Hub. Without `--ask` the server runs until Ctrl-C.
"""

import argparse
import base64
import subprocess
import sys
from pathlib import Path

from openai import OpenAI

from transformers_videollama import VideoLlamaProcessor
from transformers_videollama.training.run import save_merged


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", help="folder with what was trained")
    parser.add_argument("output", type=Path, help="folder to write the whole model to")
    parser.add_argument("--model", required=True, help="the model that it was trained on: a folder or Hub id")
    parser.add_argument("--ask", nargs=2, metavar=("VIDEO", "QUESTION"), help="what to ask the server")
    args = parser.parse_args(argv)

    if not args.output.exists():
        save_merged(args.trained, args.output, args.model, VideoLlamaProcessor.from_pretrained(args.model))
    command = [sys.executable, "-m", "transformers_videollama", "serve", "--model", str(args.output), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()  # "… is served at http://…", once the model is loaded
            print(line, end="", flush=True)
            if args.ask:
                print("A:", ask(line.split()[-1], *args.ask))
            else:
                server.wait()
        finally:
            server.terminate()


def ask(address: str, video: str, question: str) -> str:
    """The answer of a server to a question about a file, which is sent with it."""
    client = OpenAI(base_url=address, api_key="none")
    data = base64.b64encode(Path(video).read_bytes()).decode()
    content = [
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}},
        {"type": "text", "text": question},
    ]
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": content}]
    done = client.chat.completions.create(model=model, messages=messages, max_tokens=64)
    return done.choices[0].message.content


if __name__ == "__main__":
    main()
