"""Workers on this machine: all run, or none does."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from absl import app

from kfac.examples import launch_local
from kfac.tests.examples import example_runs

ROOT = pathlib.Path(__file__).parents[3]


def python(code: str) -> list[str]:
    """A command; its code knows the worker's number `index`."""
    start = (
        "import json, os, sys, time\n"
        "index = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
    )
    return [sys.executable, "-S", "-c", start + code]


@pytest.fixture
def lines():
    return []


def run(lines, code, num_workers=2, **options):
    return launch_local.run_workers(
        python(code), num_workers, write=lines.append, **options
    )


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_worker_knows_its_place_and_its_lines_carry_its_number(lines):
    code = "print(os.environ['TF_CONFIG'])\nprint('to stderr', file=sys.stderr)"
    assert run(lines, code, num_workers=3) == 0
    configs = {}
    for index in range(3):
        prefix = f"[worker {index}] "
        printed = [line[len(prefix) :] for line in lines if line.startswith(prefix)]
        assert "to stderr" in printed
        configs[index] = json.loads(next(p for p in printed if p.startswith("{")))
        assert configs[index]["task"] == {"type": "worker", "index": index}
    addresses = configs[0]["cluster"]["worker"]
    assert len(set(addresses)) == 3
    assert all(address.startswith("127.0.0.1:") for address in addresses)
    assert all(
        config["cluster"] == configs[0]["cluster"] for config in configs.values()
    )


def test_variables_of_the_environment_are_passed_on(lines):
    run(lines, "print(os.environ['A'])", 1, environment={"A": "b"})
    assert lines == ["[worker 0] b"]


def test_a_failure_stops_all_and_all_start_again(lines, tmp_path):
    mark = tmp_path / "failed"
    # Worker 0 would wait for ever the first time.
    code = f"""
print("pid", os.getpid(), flush=True)
first = not os.path.exists({str(mark)!r})
if index == 1 and first:
    while not os.path.exists({str(tmp_path / "waiting")!r}):
        time.sleep(0.01)
    open({str(mark)!r}, "w").close()
    sys.exit(3)
open({str(tmp_path / "waiting")!r}, "w").close()
time.sleep(60 * first)
"""
    assert run(lines, code, max_restarts=2) == 1
    assert [line for line in lines if "launcher" in line] == [
        "[launcher] worker 1 exited 3; all were stopped",
        "[launcher] starting all again (1 of 2)",
    ]
    pids = [int(line.split("pid ")[1]) for line in lines if "pid" in line]
    assert len(pids) == 4 and not any(map(is_alive, pids))


def test_it_gives_up_after_the_last_restart(lines):
    with pytest.raises(launch_local.WorkersFailed, match="worker 0 exited 5"):
        run(lines, "sys.exit(5 if index == 0 else 0)", max_restarts=2)
    assert sum("worker 0 exited 5" in line for line in lines) == 3
    assert sum("starting all again" in line for line in lines) == 2


def test_a_killed_worker_is_told_with_its_signal(lines):
    code = "os.kill(os.getpid(), 9) if index else time.sleep(60)"
    with pytest.raises(
        launch_local.WorkersFailed, match="worker 1.*killed by signal 9"
    ):
        run(lines, code)


def test_out_of_time_means_all_of_it(lines):
    code = "print(os.getpid(), flush=True)\ntime.sleep(60)"
    began = time.monotonic()
    with pytest.raises(launch_local.WorkersFailed, match=r"\[0, 1\] still running"):
        run(lines, code, timeout=1.0, max_restarts=5)
    assert time.monotonic() - began < 30
    assert not any("starting" in line for line in lines)
    pids = [int(line.split("] ")[1]) for line in lines if "[worker" in line]
    assert not any(map(is_alive, pids))


def test_a_worker_that_does_not_listen_is_killed():
    code = (
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(1, flush=True)\n"
        "time.sleep(60)"
    )
    worker = subprocess.Popen(
        python(code),
        stdout=subprocess.PIPE,
        env={**os.environ, "TF_CONFIG": launch_local.tf_config([1], 0)},
    )
    worker.stdout.readline()
    launch_local._stop([worker], patience=0.2)
    assert worker.returncode == -signal.SIGKILL


LOG = "print('I0000 00:00:1 cudart.cc] no GPU', flush=True)\n"


def test_the_log_of_tensorflow_is_not_shown(lines):
    run(lines, LOG + "print('step 1')", 1)
    assert lines == ["[worker 0] step 1"]


def test_the_log_of_tensorflow_is_shown_on_demand(lines):
    run(lines, LOG + "print('step 1')", 1, show_log=True)
    assert lines == ["[worker 0] I0000 00:00:1 cudart.cc] no GPU", "[worker 0] step 1"]


def test_the_last_errors_in_the_log_of_a_worker_that_failed_are_shown(lines):
    code = LOG + "for i in range(50):\n    print(f'E0000 00:00:{i} bad')\n"
    with pytest.raises(launch_local.WorkersFailed):
        run(lines, code + "sys.exit(1 - index)")
    shown = [line for line in lines if "0000 00" in line]
    assert shown == [f"[worker 0] E0000 00:00:{i} bad" for i in range(30, 50)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"command": ["no-such-program", "x"]}, "no-such-program.*no such program"),
        ({"command": []}, "no such program"),
        ({"num_workers": 0}, "num_workers=0.*at least 1"),
        ({"max_restarts": -1}, "max_restarts=-1.*at least 0"),
        ({"timeout": 0.0}, "timeout=0.0"),
    ],
)
def test_nonsense_is_refused_before_anything_starts(options, message, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    given = {"command": python(""), "num_workers": 1, **options}
    with pytest.raises(ValueError, match=message):
        launch_local.run_workers(**given)


def test_ports_are_free_and_different():
    ports = launch_local.free_ports(20)
    assert len(set(ports)) == 20
    assert all(1024 <= port < 65536 for port in ports)


def call_main(command, **flags):
    with example_runs.with_flags(
        launch_local, **{"private_network": False, "num_workers": 1, **flags}
    ):
        launch_local.main(["launch_local", *command])


def test_the_program_needs_a_command():
    with pytest.raises(app.UsageError, match="after `--`"):
        call_main([])


def test_the_program_says_how_it_ended(capfd):
    call_main(python("print('hello')"))
    out = capfd.readouterr().out.splitlines()
    assert out == ["[worker 0] hello", "[launcher] all workers are done; restarts: 0"]
    # `sys.exit` with words: status 1.
    with pytest.raises(SystemExit, match="gave up: worker 0 exited 7"):
        call_main(python("sys.exit(7)"))
    with pytest.raises(SystemExit, match="gave up.*no such program"):
        call_main(["no-such-program"])


def test_an_interrupt_is_no_traceback(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch_local, "run_workers", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        call_main(["true"])


def test_without_a_namespace_it_is_said_that_servers_listen(monkeypatch, capfd):
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name: None if name == "unshare" else which(name)
    )
    monkeypatch.delenv(launch_local._INSIDE, raising=False)
    assert not launch_local.enter_private_network()
    call_main(python(""), private_network=True)
    assert "listen on all interfaces" in capfd.readouterr().out


def test_the_process_exits_with_a_status_and_refuses_bad_flags():
    def exit_of(*arguments):
        finished = subprocess.run(
            [sys.executable, "-m", "kfac.examples.launch_local", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=200,
        )
        return finished.returncode, finished.stdout + finished.stderr

    status, output = exit_of("--num_workers=2", "--", *python("sys.exit(4 * index)"))
    assert status == 1 and "[launcher] gave up: worker 1 exited 4" in output
    status, output = exit_of("--num_workers=0", "--", "true")
    assert status != 0 and "--num_workers=0" in output
