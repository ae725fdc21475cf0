"""What ptxas said is read right; what cannot be built says why, with the command."""

import json
import shutil
import stat
import sys
from pathlib import Path

import pytest

from dsv2_kernels.native import build
from dsv2_kernels.native.build import BuildError
from dsv2_kernels.native.usage import Usage, parse_usage, table

# nvcc 13.0 on a kernel of swiglu_gate.cu, and on one that holds 96 values in 64 registers.
GOOD = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4dsv211swiglu_gate8backwardI6__halfEEvPKT_S5_\
PKfPS3_PfS8_i' for 'sm_80'
ptxas info    : Function properties for _ZN4dsv211swiglu_gate8backwardI6__halfEEvPKT_S5_\
PKfPS3_PfS8_i
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 59 registers, used 1 barriers, 128 bytes smem, 404 bytes cmem[0]
ptxas info    : Compile time = 19.220 ms
"""
SPILLING = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z8spillingPf' for 'sm_90a'
ptxas info    : Function properties for _Z8spillingPf
    1096 bytes stack frame, 1684 bytes spill stores, 2708 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 1096 bytes cumulative stack size, \
360 bytes cmem[0]
ptxas info    : Compile time = 150.135 ms
"""
SPILLING_CALLEE = (
    SPILLING.replace("1684", "0")
    .replace("2708", "0")
    .replace(
        "ptxas info    : Used",
        "ptxas info    : Function properties for _Z6calleef\n"
        "    8 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\nptxas info    : Used",
    )
)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def nvcc_that_says(folder: Path, said: str) -> Path:
    """It leaves a file where the real one would, whatever it is given."""
    text = f"""
[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88" && exit
cat {folder / "said"} >&2
while [ $# -gt 1 ]; do shift; [ "$1" = -o ] && : > "$2"; done
exit 0"""
    nvcc = program(folder / "bin" / "nvcc", text)
    (folder / "said").write_text(said)
    return nvcc


@pytest.fixture
def no_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)


def test_usage_is_read() -> None:
    good, spilling = parse_usage("x.cu", GOOD + SPILLING)
    assert (good.architecture, good.registers, good.spill_bytes) == ("80", 59, 0)
    assert good.shared_bytes == 128
    assert spilling == Usage("x.cu", "_Z8spillingPf", "90a", 64, 1684 + 2708, 1096, 0)
    assert parse_usage("x.cu", SPILLING_CALLEE)[0].spill_bytes == 24
    assert parse_usage("x.cu", "ptxas info    : 0 bytes gmem\n") == []


def test_usage_that_reads_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    otherwise = GOOD.replace("Used 59 registers", "Using 59 registers")
    with pytest.raises(ValueError, match=r"x\.cu: what ptxas says of a kernel cannot be read"):
        parse_usage("x.cu", otherwise)
    nvcc = nvcc_that_says(tmp_path, otherwise)
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=":")
    with pytest.raises(BuildError, match="what ptxas says of a kernel cannot be read"):
        build.build_cuda(tmp_path / "cuda.so")


def test_the_table_has_names_of_people(monkeypatch: pytest.MonkeyPatch) -> None:
    usages = parse_usage("x.cu", GOOD + SPILLING)
    head, *rows = [line.split() for line in table(usages).splitlines()]
    assert head[:4] == ["source", "kernel", "sm", "registers"]
    assert rows == [
        ["x.cu", "backward<__half>", "80", "59", "128", "0", "0"],
        ["x.cu", "spilling", "90a", "64", "0", "1096", "4392"],
    ]
    monkeypatch.setenv("PATH", "/nowhere")
    assert "_Z8spillingPf" in table(usages)
    assert table([]).split()[0] == "source"


@pytest.mark.parametrize(
    "bad", [SPILLING, SPILLING.replace("1684", "0").replace("2708", "0")], ids=["spills", "indexes"]
)
def test_a_kernel_that_spills_leaves_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    nvcc = nvcc_that_says(tmp_path, GOOD + bad)
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=":")
    with pytest.raises(BuildError, match="kernels spill registers") as told:
        build.build_cuda(tmp_path / "out" / "cuda.so")
    assert "spilling" in str(told.value) and "backward" not in str(told.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_was_built_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = nvcc_that_says(tmp_path, GOOD)
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=":")
    usages = build.build_cuda(tmp_path / "cuda.so", debug=True)
    sources = {path.name for path in build.SOURCES.rglob("*.cu")}
    assert {usage.source for usage in usages} == sources
    facts = json.loads((tmp_path / "cuda.json").read_text())
    assert facts["nvcc"] == "13.0" and facts["debug"] is True
    assert facts["sources"] == build.source_hash()
    assert len(facts["kernels"]) == len(sources)
    assert not list(tmp_path.glob("*.o")) and not list(tmp_path.glob("*.partial"))


def test_nvcc_is_also_found_where_pypi_puts_it(
    no_compilers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = nvcc_that_says(tmp_path / "nvidia" / "cu13", GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    assert build.find_nvcc() == str(expected)


def test_no_nvcc_is_one_line_with_what_to_install(
    no_compilers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["build", "cuda"])
    assert build.main() == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("no nvcc on PATH")
    for package in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-cccl", "cuda-runtime"):
        assert f"nvidia-{package}" in said


def test_no_host_compiler(no_compilers: None, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no g\+\+ on PATH; install it, or set CXX"):
        build.build_emulated(tmp_path / "x.so")


def test_an_error_of_the_compiler_comes_with_its_command(tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES / "emulation", sources / "emulation")
    (sources / "bad.cu").write_text("int f() { return nothing; }\n")
    with pytest.raises(BuildError) as told:
        build.build_emulated(tmp_path / "out" / "x.so", sources=sources)
    said = str(told.value)
    assert f"-c {sources / 'bad.cu'} -o" in said
    assert "ended with status 1" in said and "nothing" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_the_hash_is_of_every_file_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    first, second = tmp_path / "a.cu", tmp_path / "common" / "b.cuh"
    first.write_text("a")
    second.write_text("b")
    hashes = [build.source_hash(tmp_path)]
    second.write_text("c")
    hashes.append(build.source_hash(tmp_path))
    second.rename(tmp_path / "common" / "c.cuh")
    hashes.append(build.source_hash(tmp_path))
    (tmp_path / "common" / "c.cuh").unlink()
    hashes.append(build.source_hash(tmp_path))
    assert len(set(hashes)) == 4
    assert build.source_hash(tmp_path) == hashes[-1]


@pytest.mark.parametrize(("said", "version"), [("release 12.8, V12", "12.8"), ("nothing", None)])
def test_the_version_of_nvcc(tmp_path: Path, said: str, version: str | None) -> None:
    nvcc = str(program(tmp_path / "nvcc", f"echo '{said}'"))
    if version:
        assert build.nvcc_version(nvcc) == version
    else:
        with pytest.raises(BuildError, match="names no release: 'nothing"):
            build.nvcc_version(nvcc)
