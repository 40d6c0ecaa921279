"""The batch scripts, run for real with stand-ins for SLURM's commands and for what they start; and exit codes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimo_megatron.errors import HUNG_EXIT_CODE, EngineLostError, Interrupted, NonFiniteError

SCRIPTS = Path(__file__).parents[2] / "examples/slurm"
PRETRAIN, MORL = SCRIPTS / "pretrain.sbatch", SCRIPTS / "morl.sbatch"
LAUNCHER = SCRIPTS.parent / "torchrun.py"
COMMANDS = {
    "scontrol": (
        'if [ "$1" != show ]; then echo "scontrol $*" >> "$LOG"; exit; fi\n'
        "for number in $(seq $(tr -dc 0-9 <<< ${3%-*}) $(tr -dc 0-9 <<< ${3#*-})); do echo node$number; done"
    ),
    # As the real one: a signal of its own kills the tasks at once; what scancel sends reaches the tasks alone.
    "srun": (
        'echo "srun $*" >> "$LOG"; part=\n'
        'while [ "${1#--}" != "$1" ]; do case $1 in --het-group=*) part=+${1#*=};; esac; shift; done\n'
        '"$@" & task=$!; echo $task > "$LOG.123456$part"; trap "kill -KILL $task" TERM\n'
        "code=0; wait $task || code=$?; exit $code"
    ),
    "scancel": 'echo "scancel $*" >> "$LOG"; kill -TERM $(cat "$LOG.$2")',
    "sleep": "exec /bin/sleep 0.05",
    # Fails the first time that it is asked for a verb.
    "mimo-megatron": 'echo "mimo-megatron $*" >> "$LOG"; [ -e "$LOG.$1" ] || { touch "$LOG.$1"; exit 1; }',
    "python": (
        'trap \'echo "ranks stopped" >> "$LOG"; exit $CODE\' TERM\n'
        'echo "python $* CUDA_DEVICE_MAX_CONNECTIONS=$CUDA_DEVICE_MAX_CONNECTIONS" >> "$LOG"\n'
        "for _ in $(seq $TICKS); do sleep 0.05; done; exit $CODE"
    ),
}


class Cluster:
    """A folder with a virtual environment and a PATH on which SLURM's commands write what they were asked to do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / ".venv/bin/activate").write_text("")
        (folder / "examples").mkdir()
        (folder / "examples/slurm").symlink_to(SCRIPTS)
        (folder / "bin").mkdir()
        self.log.write_text("")
        for name, body in COMMANDS.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (folder / "bin" / name).chmod(0o755)

    def submit(
        self, *arguments: str, script: Path = PRETRAIN, ticks: int = 0, code: int = 0, **more: str
    ) -> subprocess.Popen[str]:
        environment = {
            **os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "LOG": str(self.log),
            "TICKS": str(ticks), "CODE": str(code), "SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NODELIST_HET_GROUP_0": "node[7-8]",
            "SLURM_JOB_NODELIST_HET_GROUP_1": "node[1-3]", "SLURM_GPUS_ON_NODE": "8", **more,
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(script), *arguments], cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + 20
        while words not in self.log.read_text():
            assert time.monotonic() < deadline, f"{words!r} not in {self.log.read_text()!r}"
            time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize("name", ["pretrain.sbatch", "morl.sbatch", "ranks.sh"])
def test_a_script_is_valid_bash(name: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)


def test_torchrun_meets_on_the_first_node_with_the_recipe_and_its_overrides(cluster: Cluster) -> None:
    assert cluster.submit("r.yaml", "train.steps=3").wait(20) == 0
    log = cluster.log.read_text()
    assert "--nnodes=2 --nproc-per-node=8" in log and "--rdzv-endpoint=node7:23456" in log
    assert "examples/pretrain_vlm.py r.yaml train.steps=3" in log and "CUDA_DEVICE_MAX_CONNECTIONS=1" in log
    assert "requeue" not in log


def test_a_warned_job_stops_its_ranks_and_goes_back_to_the_queue(cluster: Cluster) -> None:
    job = cluster.submit("r.yaml", ticks=400, code=143)
    cluster.wait_for("r.yaml CUDA_DEVICE_MAX_CONNECTIONS")
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 0
    log = cluster.log.read_text()
    assert log.index("ranks stopped") < log.index("scontrol requeue 123456")


def test_ranks_that_were_stopped_by_a_signal_of_their_own_are_requeued(cluster: Cluster) -> None:
    assert cluster.submit("r.yaml", code=Interrupted.exit_code).wait(20) == 0
    assert "scontrol requeue 123456" in cluster.log.read_text()


# 143: what the other nodes' launchers end with when one node's ranks have ended for any reason.
@pytest.mark.parametrize("code", [1, 2, NonFiniteError.exit_code, HUNG_EXIT_CODE, 137, 143])
def test_a_failed_run_fails_the_job_and_is_not_requeued(code: int, cluster: Cluster) -> None:
    assert cluster.submit("r.yaml", code=code).wait(20) == code
    assert "requeue" not in cluster.log.read_text()


@pytest.mark.parametrize(("code", "is_requeued"), [(0, False), (2, False), (137, True)])
def test_a_warned_job_is_requeued_unless_it_is_done_or_would_fail_again(
    code: int, is_requeued: bool, cluster: Cluster
) -> None:
    job = cluster.submit("r.yaml", ticks=400, code=code)
    cluster.wait_for("r.yaml CUDA_DEVICE_MAX_CONNECTIONS")
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == (0 if is_requeued else code)
    assert ("scontrol requeue 123456" in cluster.log.read_text()) == is_requeued


def test_an_image_runs_in_a_container_that_sees_the_working_directory(cluster: Cluster) -> None:
    job = cluster.submit("r.yaml", CONTAINER_IMAGE="/images/a.sqsh", CONTAINER_MOUNTS="/data:/data")
    assert job.wait(20) == 0
    folder = cluster.folder
    assert (
        f"--container-image=/images/a.sqsh --container-mounts={folder}:{folder},/data:/data" in cluster.log.read_text()
    )


def test_reinforcement_learning_starts_trainers_engines_and_rewards_that_look_for_each_other_in_one_folder(
    cluster: Cluster,
) -> None:
    (cluster.folder / "runs/services-123456").mkdir(parents=True)
    (cluster.folder / "runs/services-123456/engine-of-an-attempt-before.json").touch()
    job = cluster.submit("r.yaml", "seed=3", script=MORL, ticks=40)
    cluster.wait_for("mimo-megatron serve-rl-engine")
    cluster.wait_for("mimo-megatron serve-rl-rewards")
    assert job.wait(20) == 0
    log = cluster.log.read_text()
    told = (
        "r.yaml seed=3 rl.rollout.engine=vllm rl.vllm.engines=24 rl.vllm.folder=runs/services-123456 "
        "rl.reward.folder=runs/services-123456"
    )
    host = os.uname().nodename
    assert f"examples/rl_vlm.py {told}" in log
    for group, verb in ((1, "serve-rl-engine"), (2, "serve-rl-rewards")):
        assert f"srun --het-group={group} --kill-on-bad-exit=0 bash" in log
        assert log.count(f"mimo-megatron {verb} {told} --host {host}") == 2  # it failed once, and was begun again
    assert "--nnodes=2 --nproc-per-node=8" in log and "--rdzv-endpoint=node7:23456" in log
    assert list((cluster.folder / "runs/services-123456").iterdir()) == []


def test_a_warning_reaches_the_trainers_alone_and_requeues_the_job(cluster: Cluster) -> None:
    job = cluster.submit("r.yaml", script=MORL, ticks=400, code=143)
    cluster.wait_for("CUDA_DEVICE_MAX_CONNECTIONS")
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 0
    log = cluster.log.read_text()
    assert "scancel --signal=TERM 123456+0" in log
    assert log.index("ranks stopped") < log.index("scontrol requeue 123456")


@pytest.mark.parametrize(("restarts", "is_requeued"), [("0", True), ("10", False)])
def test_a_run_whose_engines_were_all_lost_is_requeued_ten_times(
    restarts: str, is_requeued: bool, cluster: Cluster
) -> None:
    code = EngineLostError.exit_code
    job = cluster.submit("r.yaml", script=MORL, code=code, SLURM_RESTART_COUNT=restarts)
    assert job.wait(20) == (0 if is_requeued else code)
    assert ("scontrol requeue 123456" in cluster.log.read_text()) == is_requeued


@pytest.mark.parametrize("script", [PRETRAIN, MORL])
def test_without_a_recipe_it_says_how_to_use_it(cluster: Cluster, script: Path) -> None:
    job = cluster.submit(script=script)
    assert job.wait(20) == 2 and job.stderr is not None and "usage: sbatch" in job.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "code"), [("raise SystemExit(75)", 75), ("os.kill(os.getpid(), 9)", 137), ("pass", 0)]
)
def test_the_launcher_ends_with_its_ranks_exit_code(body: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(f"import os\n{body}\n")
    command = [sys.executable, str(LAUNCHER), "--standalone", "--nproc-per-node=1", str(tmp_path / "rank.py")]
    assert subprocess.run(command, cwd=tmp_path, timeout=120).returncode == code
