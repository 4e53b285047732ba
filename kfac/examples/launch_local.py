"""Starts the workers of a multi-worker program as processes of this machine.

    python -m kfac.examples.launch_local --num_workers=2 -- \\
        python -m kfac.examples.classifier_mnist_tpu_strategy --strategy=multi_worker

Every worker finds its place in the environment variable TF_CONFIG.  If one of them
fails, or is killed, the others are stopped, and all start again (`--max_restarts`): a
collective cannot go on without a member, so recovery is from the last checkpoint.

Lines that a worker prints follow its number.  TensorFlow's own log is not shown, but
for its last warnings and errors if the worker fails, and with `--show_log`.

TensorFlow's server knows no authentication and listens on all network interfaces.
Where Linux allows it, the workers therefore run in a network namespace of their own,
which holds nothing but a loopback interface.
"""

from __future__ import annotations

import collections
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_integer("num_workers", 2, "Number of processes.", lower_bound=1)
flags.DEFINE_integer(
    "max_restarts", 0, "How often all start again after a failure.", lower_bound=0
)
flags.DEFINE_float(
    "timeout", None, "Seconds after which everything is stopped.", lower_bound=0
)
flags.DEFINE_bool("show_log", False, "Show TensorFlow's own log, too.")
flags.DEFINE_bool("private_network", True, "Use a network namespace if possible.")

_INSIDE = "KFAC_PRIVATE_NETWORK"
_SIGNAL_ON_PARENT_DEATH = 1  # PR_SET_PDEATHSIG
# A line of TensorFlow's log: "I0000 00:00:17..." or what precedes the first of them.
_LOGGED = re.compile(r"[IWEF]\d{4} \d\d:|WARNING: All log messages before absl")
_IS_INFORMATION = re.compile(r"I\d{4}|WARNING: All")
_LOGGED_LINES = 20  # The others that are kept of a worker, to be shown if it fails.
_GET_FLAGS, _SET_FLAGS, _IS_UP = 0x8913, 0x8914, 1  # SIOC[GS]IFFLAGS, IFF_UP


class WorkersFailed(RuntimeError):
    """A worker failed more often than restarts were allowed, or all took too long."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def tf_config(ports: Sequence[int], index: int) -> str:
    """The value of TF_CONFIG for worker `index` of a cluster on loopback."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    return json.dumps(
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    )


def run_workers(
    command: Sequence[str],
    num_workers: int,
    max_restarts: int = 0,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    write: Callable[[str], None] = lambda line: print(line, flush=True),
    show_log: bool = False,
) -> int:
    """Runs a command as `num_workers` workers until all have succeeded.

    Args:
      command: program and arguments, the same for all.
      num_workers: size of the cluster.
      max_restarts: how often all may start again.
      timeout: seconds for everything; None for no limit.
      environment: variables besides those of this process.
      write: gets every line that a worker prints, with the worker's number before it.
      show_log: whether that includes TensorFlow's own log if nothing fails.

    Returns:
      The number of restarts.

    Raises:
      ValueError: there is no such program, or nonsense numbers.
      WorkersFailed: see there; no process is left.
    """
    _check(command, num_workers, max_restarts, timeout)
    deadline = None if timeout is None else time.monotonic() + timeout
    for restarts in range(max_restarts + 1):
        workers = _start(command, num_workers, {**os.environ, **(environment or {})})
        outputs = [_Output(i, w, write, show_log) for i, w in enumerate(workers)]
        try:
            failure, failed = _first_failure(workers, deadline)
        finally:
            _stop(workers)
            for output in outputs:
                output.join()
        if failure is None:
            return restarts
        for index in failed:
            outputs[index].show_log()
        write(f"[launcher] {failure}; all were stopped")
        if deadline is not None and time.monotonic() >= deadline:
            break
        if restarts < max_restarts:
            write(f"[launcher] starting all again ({restarts + 1} of {max_restarts})")
    raise WorkersFailed(failure)


def _check(command, num_workers, max_restarts, timeout) -> None:
    if not command or shutil.which(command[0]) is None:
        raise ValueError(
            f"The command to run is {list(command)}, but there is no such program."
        )
    if num_workers < 1 or max_restarts < 0 or (timeout is not None and timeout <= 0):
        raise ValueError(
            f"num_workers={num_workers}, max_restarts={max_restarts}, timeout="
            f"{timeout}; expected at least 1, at least 0, and seconds or None."
        )


def _start(command, num_workers, environment) -> list[subprocess.Popen]:
    ports = free_ports(num_workers)
    return [
        subprocess.Popen(
            list(command),
            env={**environment, "TF_CONFIG": tf_config(ports, index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        for index in range(num_workers)
    ]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_SIGNAL_ON_PARENT_DEATH, signal.SIGKILL)


class _Output:
    """Passes on what a worker prints, in a thread; keeps the last lines of its log."""

    def __init__(
        self,
        index: int,
        worker: subprocess.Popen,
        write: Callable[[str], None],
        show_log: bool,
    ):
        self._prefix = f"[worker {index}] "
        self._lines = worker.stdout
        self._write = write
        self._shows_log = show_log
        self._log: collections.deque[str] = collections.deque(maxlen=_LOGGED_LINES)
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def _forward(self) -> None:
        for line in self._lines:
            line = line.rstrip()
            if self._shows_log or not _LOGGED.match(line):
                self._write(self._prefix + line)
            elif not _IS_INFORMATION.match(line):
                self._log.append(self._prefix + line)

    def join(self) -> None:
        self._thread.join()

    def show_log(self) -> None:
        for line in self._log:
            self._write(line)


def _first_failure(
    workers: Sequence[subprocess.Popen], deadline: float | None
) -> tuple[str | None, list[int]]:
    """Waits for all to succeed; else what went wrong first, and with which workers."""
    while True:
        codes = [worker.poll() for worker in workers]
        for index, code in enumerate(codes):
            if code not in (None, 0):
                end = f"was killed by signal {-code}" if code < 0 else f"exited {code}"
                return f"worker {index} {end}", [index]
        if all(code == 0 for code in codes):
            return None, []
        if deadline is not None and time.monotonic() >= deadline:
            running = [index for index, code in enumerate(codes) if code is None]
            return f"out of time with workers {running} still running", running
        time.sleep(0.05)


def _stop(workers, patience: float = 5.0) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    for worker in workers:
        try:
            worker.wait(patience)
        except subprocess.TimeoutExpired:
            worker.kill()  # Also a stopped process, which does not hear of the rest.
            worker.wait()


def enter_private_network() -> bool:
    """Whether this process is in, or by returning never again was replaced by one in,
    a network namespace with nothing but loopback.
    """
    if os.environ.get(_INSIDE):
        _bring_up_loopback()
        return True
    unshare = shutil.which("unshare")
    flags_ = ["--user", "--map-root-user", "--net"]
    if unshare is None or subprocess.call([unshare, *flags_, "true"], stderr=-3) != 0:
        return False
    os.environ[_INSIDE] = "1"
    os.execv(unshare, [unshare, *flags_, *sys.orig_argv])


def _bring_up_loopback() -> None:
    import fcntl  # Not on Windows.

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = fcntl.ioctl(any_socket, _GET_FLAGS, struct.pack("16sH14x", b"lo", 0))
        (state,) = struct.unpack_from("H", request, 16)
        fcntl.ioctl(
            any_socket, _SET_FLAGS, struct.pack("16sH14x", b"lo", state | _IS_UP)
        )


def main(argv: list[str]) -> None:
    """Runs the command after `--`."""
    command = argv[1:]
    if not command:
        raise app.UsageError(
            "Give the command to run after `--`, for instance\n  python -m "
            "kfac.examples.launch_local --num_workers=2 -- python my_program.py"
        )
    if FLAGS.private_network and not enter_private_network():
        print(
            "[launcher] No network namespace: TensorFlow's servers, which know no "
            "authentication, listen on all interfaces of this machine.",
            flush=True,
        )
    try:
        restarts = run_workers(
            command,
            FLAGS.num_workers,
            FLAGS.max_restarts,
            FLAGS.timeout,
            show_log=FLAGS.show_log,
        )
    except (WorkersFailed, ValueError) as failure:
        sys.exit(f"[launcher] gave up: {failure}")
    except KeyboardInterrupt:
        sys.exit("[launcher] interrupted; all workers were stopped")
    print(f"[launcher] all workers are done; restarts: {restarts}", flush=True)


if __name__ == "__main__":
    app.run(main)
