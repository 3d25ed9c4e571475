"""stages/submit.slurm around a run_all.sh that takes a while to clean up; SLURM's own commands are stand-ins."""

import os
import shutil
import signal
import subprocess
import time

from tests.helpers import ROOT

RUN_ALL = """trap 'sleep 0.5; echo cleaned up; exit 143' TERM
echo "$TRAIN_LAUNCHER"
sleep 30 & wait
"""


def test_a_job_that_is_told_to_end_waits_for_the_cleanup(tmp_path):
    (tmp_path / "stages").mkdir()
    shutil.copy(ROOT / "stages" / "submit.slurm", tmp_path / "stages")
    (tmp_path / "run_all.sh").write_text(RUN_ALL)
    hosts = tmp_path / "scontrol"
    hosts.write_text("#!/bin/sh\necho first\necho second\n")
    hosts.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "8"}
    environment = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    log = tmp_path / "out"
    with open(log, "w") as stream:
        process = subprocess.Popen(["bash", "stages/submit.slurm"], cwd=tmp_path, env=environment, stdout=stream)
        deadline = time.monotonic() + 30
        while "torchrun" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    said = log.read_text()
    assert "--nodelist=second" in said and "--cpus-per-task=8 --cpu-bind=none" in said
    assert said.endswith("cleaned up\n")
