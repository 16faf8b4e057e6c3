"""The common test suites of `transformers`, fetched for the installed version: what the `test_*_suite.py` files
inherit.

Importing this module downloads the source distribution of the installed `transformers` with pip, once, and unpacks its
`tests/` folder into `.cache/` of the repository. Importing `transformers_tests.test_modeling_common` and its
neighbours then works, and the suites are names of this module: `from library_suites import ModelTesterMixin`.

Only the files directly in `tests/` are part of the source distribution. What they import from elsewhere is stood in
for by `STAND_INS`, in each case only if the distribution has no file of that name.
"""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import transformers.testing_utils
from filelock import FileLock

PACKAGE = "transformers_tests"
CACHE = Path(__file__).resolve().parents[1] / ".cache"


def fetch_library_tests() -> Path:
    """
    The package of the `tests/test_*.py` files of the installed version of `transformers`, fetched if need be.

    pip fetches them, from the index that it is configured for. Processes that ask at the same time wait for the first.

    Raises:
        RuntimeError: if pip cannot fetch the source distribution; the message holds what pip said.
    """
    version = transformers.__version__
    package = CACHE / f"transformers-{version}" / PACKAGE
    package.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(package.parent / "lock"):
        if not package.is_dir():
            with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
                unpacked = _unpack_tests(_download_source(version, Path(scratch)), Path(scratch) / PACKAGE)
                unpacked.rename(package)
    return package


def _download_source(version: str, folder: Path) -> Path:
    """The archive of the source distribution, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"transformers=={version}"]
    result = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if result.returncode or not archives:
        raise RuntimeError(
            f"The test suites of transformers {version} could not be fetched. They come with its source distribution, "
            f"so pip must reach a package index; `{' '.join(command)}` said:\n{result.stderr or result.stdout}"
        )
    return archives[0]


def _unpack_tests(archive: Path, folder: Path) -> Path:
    """Unpacks the `tests/` folder of a source distribution into `folder`, as a package."""
    with tarfile.open(archive) as source:
        members = [member for member in source.getmembers() if member.name.split("/")[1:2] == ["tests"]]
        for member in members:
            member.name = "/".join(member.name.split("/")[2:])
        source.extractall(folder, [member for member in members if member.name], filter="data")
    if not any(folder.glob("test_*.py")):
        raise RuntimeError(f"{archive.name} holds no `tests/test_*.py`: this version of transformers ships no suites.")
    (folder / "__init__.py").touch()
    return folder


def run_distributed(world_size: int) -> Callable:
    """
    Stands in for the library's helper of the same name: `run_distributed(n)(function)(*args)` runs
    `function(rank, *args)` in n processes joined in a `gloo` group.
    """

    def bind(function: Callable) -> Callable:
        def run(*args) -> None:
            with tempfile.TemporaryDirectory() as folder:
                rendezvous = f"file://{folder}/rendezvous"
                target = (function.__module__, function.__name__)
                torch.multiprocessing.spawn(_run_rank, (world_size, rendezvous, target, args), nprocs=world_size)

        return run

    return bind


def _run_rank(rank: int, world_size: int, rendezvous: str, target: tuple[str, str], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    module, name = target
    getattr(importlib.import_module(module), name)(rank, *args)
    dist.barrier()
    dist.destroy_process_group()


# Modules that the suites import but that are not in the source distribution, with what is imported from them.
STAND_INS: dict[str, dict[str, object]] = {
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    f"{PACKAGE}.utils.test_configuration_utils": {
        "config_common_kwargs": {"return_dict": False, "output_hidden_states": True, "dtype": "float16"}
    },
    f"{PACKAGE}.distributed_testing_utils": {"run_distributed": run_distributed},
    # On the library's own machines media lie on disk; elsewhere their URL is what this function gives.
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: url},
}


def _pipeline_tests(package: Path) -> dict[str, dict[str, object]]:
    """Stand-ins for the tests of single tasks, which some versions of the pipeline tests import."""
    source = (package / "test_pipeline_mixin.py").read_text(encoding="utf-8")
    imports = re.findall(r"^from \.(pipelines\.\w+) import (\w+)$", source, re.MULTILINE)
    return {f"{PACKAGE}.{module}": {name: type(name, (), {})} for module, name in imports}


def _install() -> None:
    """Makes the package of the fetched files importable, with the stand-ins in place."""
    package = fetch_library_tests()
    sys.path.append(str(package.parent))
    for name, members in {**_pipeline_tests(package), **STAND_INS}.items():
        path = package.parent / name.replace(".", "/")
        if path.with_suffix(".py").is_file():
            continue
        parent = name.rpartition(".")[0]
        if parent and parent not in sys.modules and not path.parent.is_dir():
            sys.modules[parent] = types.ModuleType(parent)
        module = types.ModuleType(name, "Stands in for a file that is not in the source distribution.")
        module.__dict__.update(members)
        sys.modules[name] = module


_install()

_REPORTS = tempfile.TemporaryDirectory()
Path(_REPORTS.name, "reports").mkdir()
Path(_REPORTS.name, "reports", "tiny_model_summary.json").write_text("{}", encoding="utf-8")

with (
    _REPORTS,
    warnings.catch_warnings(),
    # The pipeline tests read a list of models and the library's own source, neither of which is there. Those of this
    # package put their model into the (empty) list.
    patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=_REPORTS.name),
    patch.object(transformers.utils, "direct_transformers_import", return_value=transformers),
    # Tests of media in chats require torchcodec, with which the library decodes them. This package decodes by itself.
    patch.object(transformers.testing_utils, "is_torchcodec_available", return_value=True),
):
    # The marks by which the library's own continuous integration sorts its tests.
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    from transformers_tests import test_pipeline_mixin, test_processing_common, test_tensor_parallel_mixin
    from transformers_tests.generation.test_utils import GenerationTesterMixin
    from transformers_tests.test_configuration_common import ConfigTester
    from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
    from transformers_tests.test_pipeline_mixin import PipelineTesterMixin
    from transformers_tests.test_processing_common import ProcessorTesterMixin
    from transformers_tests.test_sequence_feature_extraction_common import SequenceFeatureExtractionTestMixin
    from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
    from transformers_tests.test_training_mixin import TrainingTesterMixin
    from transformers_tests.test_video_processing_common import VideoProcessingTestMixin, prepare_video_inputs

# The library runs these tests for the models of a list only.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = {"video_llama"}

__all__ = [
    "ConfigTester",
    "GenerationTesterMixin",
    "ModelTesterMixin",
    "PipelineTesterMixin",
    "ProcessorTesterMixin",
    "SequenceFeatureExtractionTestMixin",
    "TensorParallelTesterMixin",
    "TrainingTesterMixin",
    "VideoProcessingTestMixin",
    "floats_tensor",
    "ids_tensor",
    "prepare_video_inputs",
    "test_pipeline_mixin",
    "test_processing_common",
]
