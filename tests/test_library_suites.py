"""How the library's test suites are fetched: once, completely, and with an error that says what to do."""

import io
import tarfile
from pathlib import Path

import library_suites
import pytest


def archive(folder: Path, *names: str) -> Path:
    """A source distribution with files of these names."""
    path = folder / "transformers-0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(f"transformers-0/{name}"), io.BytesIO())
    return path


def test_suites_are_fetched_once(tmp_path, monkeypatch):
    downloads = []

    def download(version: str, folder: Path) -> Path:
        downloads.append(version)
        return archive(folder, "tests/test_common.py", "setup.py")

    monkeypatch.setattr(library_suites, "CACHE", tmp_path)
    monkeypatch.setattr(library_suites, "_download_source", download)
    first = library_suites.fetch_library_tests()
    assert {path.name for path in first.iterdir()} == {"__init__.py", "test_common.py"}
    assert library_suites.fetch_library_tests() == first
    assert len(downloads) == 1


def test_nothing_is_left_of_a_download_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(library_suites, "CACHE", tmp_path)
    monkeypatch.setattr(library_suites.transformers, "__version__", "0.0.0")
    with pytest.raises(RuntimeError, match=r"transformers 0\.0\.0 could not be fetched.*index"):
        library_suites.fetch_library_tests()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] in ([], ["lock"])


def test_members_outside_of_the_folder_are_refused(tmp_path):
    with pytest.raises(tarfile.OutsideDestinationError):
        library_suites._unpack_tests(archive(tmp_path, "tests/../../test_evil.py"), tmp_path / "unpacked")


def test_a_distribution_without_suites_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"transformers-0\.tar\.gz holds no"):
        library_suites._unpack_tests(archive(tmp_path, "tests/README.md"), tmp_path / "unpacked")
