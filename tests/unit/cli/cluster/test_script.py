"""The batch script: what a shell and Slurm make of it, whatever the values hold."""

import subprocess
from pathlib import Path

import pytest

from dsv2_train.cli.cluster.script import Job
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.load import check
from dsv2_train.config.run import RunConfig
from tests.helpers.tiny import tiny_config

SLURM = "cluster.slurm={partition:train,time_limit_minutes:60}"

# Each would leave a file behind if a shell read it as anything but a word.
NASTY = [
    "a b",
    "it's",
    'say "hi"',
    "$(touch injected)",
    "`touch injected`",
    "; touch injected #",
    "' ; touch injected ; '",
    "x\ntouch injected",
    "x\n#SBATCH --output=injected",
    "\\",
    "$HOME",
    "{{ 1 + 1 }}",
    "*",
    "-rf",
]

# Stands in for Slurm's programs: writes down its words, and the variables that it is given.
RECORDER = """\
#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> words
printf '%s' "${NASTY-}" > variable
exit ${STATUS-0}
"""
SHOW_JOB = """\
#!/usr/bin/env bash
if [[ "$*" == "--oneliner show job 7" ]]; then
  echo "JobId=7 JobName=x JobState=${STATE} Requeue=1 Restarts=${RESTARTS} BatchFlag=1"
  exit
fi
"""


def script_of(config: RunConfig, config_path: str = "/c.yaml", command: str = "submit") -> str:
    assert config.cluster.slurm is not None
    return Job(
        config, config.cluster.slurm, Path(config_path), ["launch/submit.py", command]
    ).script()


def run_script(
    folder: Path,
    script: str,
    status: int = 0,
    requeue: int = 1,
    *,
    restarts: int = 0,
    state: str = "RUNNING",
    node: str = "",
) -> tuple[int, list[str]]:
    """Run a script where srun and scontrol are recorders; its status, and all words they got.

    Slurm has begun the job `restarts` times again; the script is of its first run. `node` is more
    that srun does.
    """
    programs = folder / "programs"
    programs.mkdir(parents=True)
    show_job = SHOW_JOB.replace("${RESTARTS}", str(restarts)).replace("${STATE}", state)
    for name, begin, ends_with in (
        ("srun", f"#!/usr/bin/env bash\n{node}\n", status),
        ("scontrol", show_job, requeue),
    ):
        (programs / name).write_text(begin + RECORDER.replace("${STATUS-0}", str(ends_with)))
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "HOME": "/nowhere"}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, timeout=30)
    return done.returncode, (folder / "words").read_text().split("\0")[:-1]


@pytest.mark.parametrize("nasty", NASTY)
def test_every_value_reaches_srun_as_one_word(tmp_path: Path, nasty: str) -> None:
    slurm = {"partition": "train", "time_limit_minutes": 60, "python": f"/p/{nasty}"}
    config = tiny_config().model_copy()
    values = config.model_dump(mode="json")
    values["cluster"] |= {"slurm": slurm}
    variable = {"name": "NASTY", "value": nasty, "reason": f"because {nasty}"}
    if nasty.isprintable():
        values["cluster"]["environment"] = [variable]
        values["cluster"]["slurm"]["container"] = nasty
    else:
        values["cluster"]["slurm"]["python"] = "/p"
    config, problems = check(values)
    assert [str(one) for one in problems if one.path != "data.path"] == []
    script = script_of(config, f"/run/{nasty}/c.yaml", f"run.dir={nasty}")
    status, words = run_script(tmp_path, script)
    assert status == 0
    assert not (tmp_path / "injected").exists()
    assert words[words.index("--config") + 1] == f"/run/{nasty}/c.yaml"
    command = words[words.index("--command") + 1]
    assert subprocess.check_output(["bash", "-c", f"printf %s, {command}"], text=True) == (
        f"launch/submit.py,run.dir={nasty},"
    )
    if nasty.isprintable():
        assert (tmp_path / "variable").read_text() == nasty
        assert f"/p/{nasty}" in words and f"--container-image={nasty}" in words
    read_by_slurm = script.split("\nset -u\n")[0]
    assert "injected" not in read_by_slurm
    assert all(line.startswith("#") for line in read_by_slurm.splitlines() if line)


def test_an_unquoted_template_would_be_caught(tmp_path: Path) -> None:
    """The negative control: the same words without quotes do harm."""
    run_script(tmp_path, "srun --config $(touch injected)")
    assert (tmp_path / "injected").exists()


@pytest.mark.parametrize("word", ["a b", "gpu\n#SBATCH -x", "gpu;x", "$(x)", "'gpu'", "", "--x"])
@pytest.mark.parametrize("key", ["partition", "account", "qos"])
def test_what_slurm_reads_is_a_plain_word(key: str, word: str) -> None:
    values = tiny_config(SLURM).model_dump(mode="json")
    values["cluster"]["slurm"][key] = word
    assert f"cluster.slurm.{key}" in [one.path for one in check(values)[1]]


@pytest.mark.parametrize("option", ["exclusive", "--mem 0", "--x=a b", "--x=$(y)", "-N9", "--a\n"])
def test_more_options_are_plain_too(option: str) -> None:
    values = tiny_config(SLURM).model_dump(mode="json")
    values["cluster"]["slurm"]["options"] = [option]
    assert "cluster.slurm.options.0" in [one.path for one in check(values)[1]]


@pytest.mark.parametrize("name", ["A B", "A=B", "$(x)", "1A", ""])
def test_a_variable_has_a_name_of_a_shell(name: str) -> None:
    values = tiny_config().model_dump(mode="json")
    values["cluster"]["environment"] = [{"name": name, "value": "1", "reason": "a test"}]
    assert "cluster.environment.0.name" in [one.path for one in check(values)[1]]


@pytest.mark.parametrize(
    ("requeue", "status", "asks", "refuses", "ends_with"),
    [
        ("false", 0, False, 1, 0),
        ("false", 3, False, 1, 0),
        ("false", 2, False, 1, 2),
        ("false", 1, False, 1, 1),
        ("true", 0, False, 1, 0),
        ("true", 2, False, 1, 2),
        ("true", 126, False, 1, 126),
        ("true", 127, False, 1, 127),
        ("true", 3, True, 1, 0),
        ("true", 1, True, 1, 1),
        ("true", 137, True, 1, 137),
    ],
)
def test_what_a_status_of_the_nodes_comes_to(
    tmp_path: Path, requeue: str, status: int, asks: bool, refuses: int, ends_with: int
) -> None:
    """Where Slurm refuses to run a job again, the job ends as the run did."""
    script = script_of(tiny_config(SLURM, f"cluster.slurm.requeue={requeue}"))
    done, words = run_script(tmp_path, script, status, refuses)
    assert (done, "scontrol" in words) == (ends_with, asks)
    assert not asks or words[words.index("scontrol") :] == ["scontrol", "requeue", "7"]


def test_a_script_that_outlives_its_run_does_not_disturb_the_next(tmp_path: Path) -> None:
    """Its node was lost to Slurm, which has begun the job again on others."""
    script = script_of(tiny_config(SLURM, "cluster.slurm.requeue=true"))
    status, words = run_script(tmp_path, script, 1, restarts=1)
    assert status == 1 and "scontrol" not in words


def test_a_job_that_its_user_ended_is_not_begun_again(tmp_path: Path) -> None:
    """Slurm would requeue it: it is there until its processes have ended."""
    script = script_of(tiny_config(SLURM, "cluster.slurm.requeue=true"))
    status, words = run_script(tmp_path, script, 3, state="COMPLETING")
    assert status == 0 and "scontrol" not in words


def test_where_slurm_does_not_answer_the_job_fails(tmp_path: Path) -> None:
    script = script_of(tiny_config(SLURM, "cluster.slurm.requeue=true"))
    script = script.replace("sleep 10", "true").replace("show job", "show nothing")
    status, words = run_script(tmp_path, script, 3)
    assert status == 1 and words.count("nothing") == 30 and "requeue" not in words


def test_what_slurm_is_to_know_it_is_told() -> None:
    options = {
        "account": ("acct", "#SBATCH --account=acct\n"),
        "qos": ("high", "#SBATCH --qos=high\n"),
        "cpus_per_task": ("6", "#SBATCH --cpus-per-task=6\n"),
        "options": ("[--exclusive]", "#SBATCH --exclusive\n"),
        "signal_before_end_s": ("77", "#SBATCH --signal=USR1@77\n"),
    }
    given = [f"cluster.slurm.{key}={value}" for key, (value, _) in options.items()]
    more = ["cluster.slurm.container=image", "cluster.slurm.container_mounts=[/a:/b]"]
    script = script_of(tiny_config(SLURM, *given, *more))
    for _, line in options.values():
        assert line in script
    assert "#SBATCH --open-mode=append\n" in script
    (srun,) = (line for line in script.splitlines() if line.startswith("srun "))
    for word in ("--label", "--wait=60", "--cpus-per-task=6", "--container-image=image"):
        assert word in srun.split()
    assert f"--container-mounts={Path.cwd()}:{Path.cwd()},/a:/b" in srun


def test_where_a_node_refuses_the_job_ends_whatever_becomes_of_the_others(tmp_path: Path) -> None:
    """srun ends with the highest status: that of tasks that waited, and were killed."""
    config = tiny_config(SLURM, "cluster.slurm.requeue=true", f"run.dir={tmp_path}/$HOME")
    (config.run.folder / "logs").mkdir(parents=True)
    status, words = run_script(tmp_path, script_of(config), 137, node='touch "$DSV2_REFUSED"')
    assert status == 2 and "scontrol" not in words
    assert (config.run.folder / "logs" / "refused_7_0").exists()


def test_the_nodes_and_their_parts_are_asked_for() -> None:
    line = ["experiment=dsv2_236b_pretrain", "parallel.world_size=2048"]
    script = script_of(resolve(line, need_data=False))
    for option in ("--nodes=256", "--gpus-per-node=8", "--ntasks-per-node=1", "--time=1440"):
        assert f"#SBATCH {option}\n" in script
    assert "export NCCL_IB_HCA=mlx5\n" in script
