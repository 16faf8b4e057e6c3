"""Fixtures that several test files share: the reference files, and the model converted from them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent
REFERENCE = TESTS / "reference"
sys.path.insert(0, str(TESTS.parent / "conversion"))

REFERENCE_FLAGS = {
    "--eva-vit": "eva_vit_g.pth",
    "--blip2": "blip2_pretrained_flant5xxl.pth",
    "--minigpt4": "pretrained_minigpt4.pth",
    "--imagebind": "imagebind_huge.pth",
    "--llama": "llama",
    "--vl-checkpoint": "finetune_vl.pth",
    "--al-checkpoint": "finetune_al.pth",
}


def pytest_configure() -> None:
    # Two workers on two cores: threads of their own would only get into each other's way.
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test runs: on the CPU, and on a GPU where there is one, there with all bits of float32."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield torch.device(request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference set of published files, converted: a folder that `from_pretrained` loads."""
    from convert_video_llama_checkpoint import main

    folder = tmp_path_factory.mktemp("converted") / "tiny"
    files = [part for flag, name in REFERENCE_FLAGS.items() for part in (flag, str(REFERENCE / "tiny" / name))]
    assert main([*files, "--output-dir", str(folder)]) in (None, 0)
    return folder


@pytest.fixture(scope="session")
def expected() -> dict[str, torch.Tensor]:
    """What the published computation gives on the reference set, in float32 on a CPU, in eval mode."""
    return load_file(REFERENCE / "tiny" / "expected.safetensors")
