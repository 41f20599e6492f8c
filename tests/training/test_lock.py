"""One run per folder."""

import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from rlmod.training.lock import hold_folder
from tests.config.composing import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from rlmod.training.lock import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_by_name_and_a_killed_one_holds_nothing(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"is in use by another run") as refused, hold_folder(tmp_path):
            pass
        assert f"process {holder.pid} on {socket.gethostname()}, since 20" in str(refused.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with hold_folder(tmp_path):
        pass
    with hold_folder(tmp_path):  # released at its end
        pass


def test_a_holder_without_a_name_is_still_respected(tmp_path):
    with hold_folder(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(ValueError, match="which has just started"), hold_folder(tmp_path):
            pass
