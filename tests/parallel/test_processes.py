"""Several processes of this machine: the losses of one, checkpoints by all, and what goes wrong."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from cla_jax.parallel import ProcessConfig
from cla_jax.parallel.processes import _check_port, join
from cla_jax.training.metrics import read_metrics
from tests.experiments.processes import wait_until
from tests.parallel.models import layout_of
from tests.parallel.processes import ROOT, ended, free_port, started

TEXT = "the cat sat on the mat, and the dog lay under it.\n" * 200


def losses(directory):
    return {
        (r["step"], "loss" in r): r.get("loss", r.get("validation_loss"))
        for r in read_metrics(directory / "metrics.jsonl")
    }


def test_a_process_reads_the_rows_that_its_devices_hold():
    layout = layout_of("CLA2", "fsdp=4,tensor=2")
    assert layout is not None
    assert layout.rows(8) == [*range(8)]
    array = np.arange(16).reshape(8, 2)
    placed = layout.batch({"tokens": array}, 8)["tokens"]
    np.testing.assert_array_equal(placed, array)
    assert placed.sharding == layout.of(("batch",))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"processes": 2}, "give coordinator=HOST:PORT too"),
        ({"coordinator": "node0", "processes": 2, "process": 0}, "expected HOST:PORT"),
        ({"coordinator": "node0:99999", "processes": 2, "process": 0}, "expected HOST:PORT"),
        ({"coordinator": "node0:1234", "processes": 2}, "give processes .* and process"),
        ({"coordinator": "node0:1234", "processes": 2, "process": 2}, "expected 0 to 1"),
        ({"coordinator": "slurm", "process": 1}, "leave them out"),
    ],
)
def test_what_is_no_process_is_refused(given, part):
    with pytest.raises(ValueError, match=part):
        ProcessConfig(**given)


def test_slurm_says_which_process_this_is():
    environment = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4",
                   "SLURM_PROCID": "3"}  # fmt: skip
    config = ProcessConfig(coordinator="slurm")
    with pytest.raises(ValueError, match="SLURM_LOCALID is not set: start every process with srun"):
        config.resolved(environment)
    assert config.resolved({**environment, "SLURM_LOCALID": "1"}) == (3, 4)
    assert ProcessConfig().resolved({}) is None


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"cannot listen on port .* choose another port"):
            join(ProcessConfig(coordinator=address, processes=2, process=0))


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_a_machine_without_ipv6_listens_on_ipv4(code, monkeypatch):
    make, taken, free = socket.socket, socket.socket(), free_port()

    def of(family, *rest):
        if family == socket.AF_INET6:
            raise OSError(code, "no IPv6 here")
        return make(family, *rest)

    with taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        monkeypatch.setattr(socket, "socket", of)
        _check_port(f"localhost:{free}")
        with pytest.raises(ValueError, match="give every one a number of its own"):
            _check_port(address)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my.txt").write_text(TEXT)
    return tmp_path


@pytest.mark.slow
def test_two_and_four_processes_have_the_losses_of_one(folder):
    """Also where rows are copied over processes (tensor), and on the way from four to one."""
    more = ("--training.steps", "4", "--training.eval-every", "2")
    with started(1, folder, *more, "--out", "one") as processes:
        assert [code for code, _, _ in ended(processes)] == [0]
    expected = losses(folder / "one")
    assert len(expected) == 6
    for count, devices, mesh in [(2, 2, "data=2,fsdp=2"), (2, 1, "tensor=2"),
                                 (4, 1, "fsdp=2,tensor=2")]:  # fmt: skip
        out = f"{count}-{mesh}"
        with started(count, folder, *more, "--out", out, "--mesh", mesh, devices=devices) as found:
            said = ended(found)
        assert [code for code, _, _ in said] == [0] * count, said
        assert losses(folder / out) == pytest.approx(expected, rel=1e-5)
        assert f"{count} processes" in said[0][2]
        assert "validation perplexity" in said[0][1]
        assert all("perplexity" not in out + error for _, out, error in said[1:])
    # Finished: loaded by one process, or by several.
    with started(1, folder, *more, "--out", "4-fsdp=2,tensor=2", "--resume") as processes:
        assert ended(processes)[0][:2] == (0, said[0][1].splitlines()[-1] + "\n")


@pytest.mark.slow
def test_a_pipeline_whose_stages_are_processes_has_the_losses_of_one(folder):
    """Neither do two or three stages divide the 257 words, nor three the 256 tokens."""
    more = ("--training.steps", "3", "--training.eval-every", "2")
    for model, count, devices, mesh in [
        ("tiny/MQA-CLA3", 2, 1, "stage=2"),
        ("tiny/MQA-CLA3", 2, 2, "stage=2,data=2"),
        ("tiny/MQA-CLA2", 3, 1, "stage=3"),
    ]:
        one = model.partition("/")[2]
        if not (folder / one).exists():
            with started(1, folder, *more, "--out", one, model=model) as processes:
                assert [code for code, _, _ in ended(processes)] == [0]
        out = (*more, "--out", mesh)
        with started(count, folder, *out, "--mesh", mesh, model=model, devices=devices) as found:
            said = ended(found)
        assert [code for code, _, _ in said] == [0] * count, said
        assert losses(folder / mesh) == pytest.approx(losses(folder / one), rel=1e-5)
        assert "bubble" in said[0][2]
        # Written in stages by several processes, restored by one without.
        with started(1, folder, *out, "--resume", model=model) as processes:
            assert ended(processes)[0][:2] == (0, said[0][1].splitlines()[-1] + "\n")


def end_without(processes, killed):
    """Kill one: all others end within a minute and say why. What all said."""
    processes[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    said = ended(processes, 60)
    assert time.monotonic() - began < 60
    for code, _, error in said[:killed] + said[killed + 1 :]:
        assert code != 0
        assert "another process has gone" in error or "another task died" in error, error
        assert "Traceback" not in error
    return said


@pytest.mark.slow
def test_one_is_killed_and_the_run_goes_on_with_fewer(folder):
    more = ("--training.steps", "400", "--training.checkpoint-every", "5")
    with started(4, folder, *more, "--mesh", "fsdp=4") as processes:
        checkpoints = folder / "run/checkpoints"
        wait_until(lambda: any(checkpoints.glob("*/commit_success.txt")), processes[0])
        said = end_without(processes, 2)
    assert any("goes on from its last checkpoint (--resume)" in error for _, _, error in said)

    # A signal to one of two stops both at the same step, with a checkpoint.
    resume = (*more, "--resume")
    with started(2, folder, *resume, "--mesh", "data=2") as processes:
        before = len(losses(folder / "run"))
        wait_until(lambda: len(losses(folder / "run")) > before + 3, processes[0])
        processes[1].send_signal(signal.SIGTERM)
        said = ended(processes)
    assert [code for code, _, _ in said] == [143, 143], said
    stopped = [error.rpartition("saved at step ")[2].split(";")[0] for _, _, error in said]
    assert stopped[0] == stopped[1] != ""
    assert "resumed at step" in said[0][2]
    assert (folder / "run/checkpoints" / stopped[0]).exists()


@pytest.mark.slow
def test_process_0_is_killed_and_all_end(folder):
    """The coordinator goes with it: of the others, some hear of it below Python."""
    more = ("--training.steps", "400", "--training.checkpoint-every", "5")
    with started(3, folder, *more, "--mesh", "data=3", "--training.data.batch-size", "9") as found:
        checkpoints = folder / "run/checkpoints"
        wait_until(lambda: any(checkpoints.glob("*/commit_success.txt")), found[0])
        end_without(found, 0)
    before = len(losses(folder / "run"))
    with started(1, folder, *more, "--training.data.batch-size", "9", "--resume") as alone:
        wait_until(lambda: len(losses(folder / "run")) > before, alone[0])


@pytest.mark.slow
def test_a_number_that_is_given_twice(folder):
    """JAX's runtime ends those that have joined, below Python, and says why."""
    more, port = ("--training.steps", "400", "--mesh", "data=2"), free_port()
    with started(2, folder, *more, port=port) as found:
        wait_until(lambda: (folder / "run/config.json").exists(), found[0])
        with started(2, folder, *more, port=port, numbers=(1,)):
            said = ended(found)
    for code, _, error in said:
        assert code != 0
        assert "1 unexpectedly tried to connect with a different incarnation" in error
        assert "Traceback" not in error


@pytest.mark.slow
def test_what_processes_refuse_they_refuse_together(folder):
    with started(2, folder, "--training.steps", "2") as processes:  # no mesh
        for code, _, error in ended(processes):
            assert code == 1
            assert "mesh none is 1 device, and 2 processes have 2" in error
            assert "Traceback" not in error
    # A path with a word that JAX's runtime says when a process has gone.
    (folder / "nccl").mkdir()
    (folder / "nccl/mine.txt").write_text("mine")
    more = "--training.steps", "2", "--mesh", "data=2"
    with started(2, folder, *more, "--out", "nccl") as processes:
        for code, _, error in ended(processes):
            assert code == 1
            assert "is not empty and holds no run" in error
            assert "another process has gone" not in error
    with started(2, folder, *more, of_each=[(), ("--training.eval-every", "1")]) as processes:
        for code, _, error in ended(processes):
            assert code == 1
            assert "process 1 has another model, recipe, data, mesh" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "part"),
    [(1, "nothing has answered at 127.0.0.1"), (0, "not all of 2 processes have come within 3 s")],
)
def test_alone(process, part, tmp_path):
    program = (
        "from cla_jax.parallel import ProcessConfig, join\n"
        f"join(ProcessConfig(coordinator='127.0.0.1:{free_port()}', processes=2, "
        f"process={process}), seconds=3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert done.returncode == 1
    assert part in done.stderr
    assert f"process {process} of 2" in done.stderr
    assert "Traceback" not in done.stderr
