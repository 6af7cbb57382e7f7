"""Stop requests and the watchdog, in processes without torch: signals at bad moments, dead launchers, hangs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support import environment

PRELUDE = """
import ctypes, os, signal, sys, threading, time
from toolkit.training.supervision import StopRequests, Watchdog
requests = StopRequests()
requests.listen()
libc = ctypes.CDLL(None)

def in_c(seconds):
    '''A call that no signal interrupts and in which no handler of Python's runs.'''
    mutex = ctypes.create_string_buffer(128)
    libc.pthread_mutex_lock(mutex)
    threading.Timer(seconds, libc.pthread_mutex_unlock, [mutex]).start()
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
"""


def start(code: str, **variables: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n" + PRELUDE + code],
        env=environment(**variables),  # above: the tests themselves may run below nohup
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_one_request_that_arrives_twice_in_a_long_call_is_one() -> None:
    process = start("in_c(4)\nprint(requests.asked(), requests.reason)")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)  # a launcher passes on what the terminal has sent to all
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error) == (0, "True received SIGINT\n", "")


def test_a_second_request_is_answered_while_the_main_thread_is_stuck() -> None:
    process = start("in_c(60)")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.8)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert error == "\nreceived SIGTERM again: leaving at once; what was saved before is intact\n"
    assert time.monotonic() - began < 10


def test_a_closed_terminal_is_a_request_but_not_below_nohup() -> None:
    code = "print('ready', flush=True)\ntime.sleep(60)\n"
    closed = start("in_c(3)\nprint(requests.reason)")
    closed.send_signal(signal.SIGHUP)
    output, _ = closed.communicate(timeout=60)
    assert output == "received SIGHUP\n"
    ignoring = subprocess.Popen(
        ["nohup", sys.executable, "-c", PRELUDE + code], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert ignoring.stdout is not None
    assert ignoring.stdout.readline() == "ready\n"
    ignoring.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert ignoring.poll() is None
    ignoring.kill()
    ignoring.communicate()


def test_a_signal_to_a_forked_child_is_for_the_child() -> None:
    code = """
child = os.fork()
if child == 0:
    time.sleep(60)
time.sleep(0.3)
os.kill(child, signal.SIGTERM)
status = os.waitpid(child, 0)[1]
time.sleep(0.3)
print("ready", os.waitstatus_to_exitcode(status), requests.asked())
requests.stop_listening()
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.set_wakeup_fd(-1))
"""
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], env=environment(), capture_output=True, text=True, timeout=30
    )
    assert result.stdout == "ready -15 False\nTrue -1\n", result.stderr


def test_a_process_whose_launcher_dies_before_it_listens_dies_too() -> None:
    """The launcher is killed while its process still imports torch, as in the first seconds of every start."""
    inner = (
        "import os, sys, time\n"
        "from toolkit.training.supervision import StopRequests\n"
        "StopRequests().follow_launcher()\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)"
    )
    outer = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {inner!r}])"
    launcher = subprocess.Popen(
        [sys.executable, "-c", outer],
        env=environment(ACCELERATE_MIXED_PRECISION="no"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    child = int(launcher.stdout.readline())
    launcher.kill()
    launcher.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_the_watchdog_prints_the_line_that_hangs_and_ends_the_process() -> None:
    process = start("watchdog = Watchdog(0.01)\nwatchdog.feed()\nin_c(60)  # here")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Timeout (0:00:00.6" in error
    assert "in in_c" in error


def test_a_wakeup_descriptor_that_was_closed_meanwhile_is_not_put_back() -> None:
    """As of an event loop in which a trainer was made and that has ended since."""
    code = """
requests.stop_listening()
reading, writing = os.pipe()
os.set_blocking(writing, False)
signal.set_wakeup_fd(writing)
again = StopRequests()
again.listen()
os.close(writing)
os.close(reading)
again.stop_listening()
print("ready", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.set_wakeup_fd(-1))
"""
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "ready True -1\n", result.stderr


def test_two_listeners_both_hear_and_the_last_puts_things_back() -> None:
    """As two runs in one program do; one of them listens twice."""
    code = """
other = StopRequests()
assert other.listen() and other.listen()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.2)
print("ready", requests.reason, other.reason)
requests.stop_listening()
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
other.stop_listening()
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.set_wakeup_fd(-1))
again = StopRequests()
again.listen()
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.2)
print(again.reason, other.reason)
again.stop_listening()
os.kill(os.getpid(), signal.SIGTERM)
"""
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], env=environment(), capture_output=True, text=True, timeout=30
    )
    expected = "ready received SIGTERM received SIGTERM\nFalse\nTrue -1\nreceived SIGINT received SIGTERM\n"
    assert (result.stdout, result.returncode) == (expected, -signal.SIGTERM), result.stderr


def test_a_thread_gets_no_signals_and_takes_none_away() -> None:
    code = """
heard = []
thread = threading.Thread(target=lambda: heard.append(StopRequests().listen()))
thread.start()
thread.join()
threading.Thread(target=requests.stop_listening).start()
time.sleep(0.2)
print("ready", heard, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(30)
"""
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], env=environment(), capture_output=True, text=True, timeout=20
    )
    assert (result.stdout, result.returncode) == ("ready [False]\n", 128 + signal.SIGTERM), result.stderr
