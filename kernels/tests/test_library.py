"""A library that does not fit is refused, with the reason and what to do."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv2_kernels.native import library
from dsv2_kernels.native.build import source_hash

FACTS = {"nvcc": "13.0", "architectures": ["80", "90a"]}


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
@pytest.mark.parametrize("torch_cuda", ["13.0", "13.2"])
def test_what_fits(torch_cuda: str, capability: tuple[int, int]) -> None:
    assert library.why_unfit(FACTS, torch_cuda, capability) is None


@pytest.mark.parametrize(
    ("changed", "torch_cuda", "capability", "words"),
    [
        ({}, "12.8", (9, 0), "built by nvcc 13.0, torch is for CUDA 12.8; put the nvcc of"),
        ({}, None, (9, 0), "torch is for CUDA None"),
        ({"nvcc": "12.8"}, "13.0", (9, 0), "built by nvcc 12.8, torch is for CUDA 13.0"),
        ({}, "13.0", (10, 0), "built for sm_80, sm_90a, this GPU is sm_100"),
        ({}, "13.0", (12, 0), "this GPU is sm_120"),
        ({}, "13.0", (7, 5), "this GPU is sm_75"),
        ({"architectures": ["80"]}, "13.0", (9, 0), "built for sm_80, this GPU is sm_90"),
        ({"architectures": ["86"]}, "13.0", (8, 0), "this GPU is sm_80"),
        ({"architectures": ["90a"]}, "13.0", (8, 0), "built for sm_90a, this GPU is sm_80"),
    ],
)
def test_what_does_not_fit(
    changed: dict[str, Any], torch_cuda: str | None, capability: tuple[int, int], words: str
) -> None:
    told = library.why_unfit(FACTS | changed, torch_cuda, capability)
    assert told is not None and words in told


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with a Hopper GPU whose library is in a folder of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(library, "BUILT", tmp_path)
    library.why_missing.cache_clear()
    yield tmp_path
    library.why_missing.cache_clear()


def built(folder: Path, sources: str) -> None:
    (folder / "cuda.so").touch()
    (folder / "cuda.json").write_text(json.dumps(FACTS | {"sources": sources}))


def test_a_library_of_these_sources_serves(gpu: Path) -> None:
    built(gpu, source_hash())
    assert library.why_missing() is None


def test_no_library(gpu: Path) -> None:
    assert library.why_missing() == "the kernels are not built; `make kernels` builds them"


def test_a_library_without_its_facts(gpu: Path) -> None:
    (gpu / "cuda.so").touch()
    assert library.why_missing() == "the kernels are not built; `make kernels` builds them"


def test_a_stale_library(gpu: Path) -> None:
    built(gpu, "of other sources")
    told = library.why_missing()
    assert told is not None and told.startswith("the kernels were built from other sources")


def test_an_installed_library_needs_no_sources(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(gpu, "of other sources")
    monkeypatch.setattr(library, "SOURCES", gpu / "no such folder")
    assert library.why_missing() is None


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    library.why_missing.cache_clear()
    assert library.why_missing() == "no CUDA device"
    library.why_missing.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_process_says_why_there_are_none() -> None:
    command = [sys.executable, "-m", "dsv2_kernels.native.library"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "no CUDA device\n")


def test_tensors_of_a_cpu_are_for_the_emulation_alone(emulated_library: Path) -> None:
    assert not library.is_emulating()
    with pytest.raises(library.LaunchError, match="swiglu_gate_forward: kernels take tensors of"):
        library.launch("swiglu_gate_forward", torch.empty(1))
    with library.emulated(emulated_library):
        assert library.is_emulating()
    assert not library.is_emulating()


def test_what_a_launch_is_refused_for_is_told(emulated_library: Path) -> None:
    with (
        library.emulated(emulated_library),
        pytest.raises(library.LaunchError, match=r"swiglu_gate_forward: invalid argument \(s"),
    ):
        no_dtype, x = 9, torch.zeros(2, 8)
        library.launch("swiglu_gate_forward", x, None, x[:1], 1, 4, no_dtype)
