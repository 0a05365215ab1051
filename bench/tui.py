"""Measures the workbench through a PTY. See bench/tui.sh; standard library only."""

import fcntl
import json
import os
import pathlib
import pty
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time

TUNE = os.path.abspath(sys.argv[1])
missed = []


def report(name, value, unit, bound):
    ok = value <= bound
    print(f"{name:44} {value:12.1f} {unit:10} at most {bound:g}{'' if ok else '   MISSED'}", flush=True)
    if not ok:
        missed.append(name)


class Terminal:
    """A program on a PTY of 80x24."""

    def __init__(self, arguments, environment):
        self.started = time.perf_counter()
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(TUNE, [TUNE, *arguments], environment)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.bytes = 0
        self.seen = b""

    def read(self, seconds):
        """Reads for a while; the time of each read and its bytes."""
        reads = []
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            if select.select([self.fd], [], [], left)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:
                    break
                if not data:
                    break
                reads.append((time.perf_counter(), data))
                self.bytes += len(data)
                self.seen = (self.seen + data)[-65536:]
        return reads

    def until(self, text, seconds, times=1):
        """Reads until `text` came that often; the seconds it took, or None."""
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            if self.seen.count(text) >= times:
                return time.perf_counter() - start
            self.read(0.002)
        return None

    def press(self, keys):
        os.write(self.fd, keys)

    def memory(self):
        for line in open(f"/proc/{self.pid}/status"):
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024

    def peak_memory(self):
        for line in open(f"/proc/{self.pid}/status"):
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024

    def close(self):
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(self.pid, 0)
        os.close(self.fd)


def long_run(home, steps):
    """A run of that many updates, as its worker would have written it."""
    folder = home / "runs" / "261122-000000-long"
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text('[model]\nid = "demo"\n[data]\ntrain = "demo"\n')
    time_of = "2026-11-22T10:00:00.000Z"
    with open(folder / "events.jsonl", "w") as file:
        started = {
            "time": time_of, "event": "started", "run": folder.name, "model": "demo", "device": "CPU",
            "reason": "", "version": "0", "process": 1, "rows": 1000, "eval_rows": 10, "steps": steps, "epochs": 1.0,
            "trainable_parameters": 1, "parameters": 1,
        }
        file.write(json.dumps(started, separators=(",", ":")) + "\n")
        for step in range(1, steps + 1):
            loss = 1.0 + 2.0 * 0.99999**step + (step * 7919 % 101) / 500
            file.write(
                f'{{"time":"{time_of}","event":"step","step":{step},"epoch":{step / steps},"loss":{loss},'
                f'"grad_norm":{0.5 + loss / 9},"learning_rate":0.0002,"tokens":1434,"label_tokens":800,"padding":102,'
                '"tokens_per_second":22400.5,"seconds":0.064,"vram_bytes":0}\n'
            )
        finished = {
            "time": time_of, "event": "finished", "steps": steps, "seconds": 64000.0, "train_loss": 1.1,
            "eval_loss": 1.2, "path": str(folder / "adapter"),
        }
        file.write(json.dumps(finished, separators=(",", ":")) + "\n")
    return folder.name


def main():
    home = pathlib.Path(tempfile.mkdtemp(prefix="tune-bench-"))
    work = home / "work"
    work.mkdir()
    os.chdir(work)
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "TUNE_HOME": str(home), "TERM": "xterm-256color",
        "LANG": "C.UTF-8", "HF_HOME": str(home / "hf"),
    }
    try:
        measure(home, environment)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if missed:
        print("missed: " + ", ".join(missed))
        sys.exit(1)


def measure(home, environment):
    launches = []
    for _ in range(10):
        terminal = Terminal([], environment)
        seen = terminal.until(b"Models", 5)
        launches.append(1000 * (time.perf_counter() - terminal.started) if seen is not None else 5000)
        terminal.close()
    report("launch to first frame, slowest of 10", max(launches), "ms", 100)

    terminal = Terminal([], environment)
    terminal.read(6)
    before = terminal.bytes
    terminal.read(5)
    report("bytes in 5 s when nothing changes", terminal.bytes - before, "bytes", 0)
    report("memory on the Model screen", terminal.memory(), "MiB", 60)
    terminal.close()

    steps = 1_000_000
    name = long_run(home, steps)
    glances, opened = [], []
    for _ in range(3):
        terminal = Terminal(["attach", name], environment)
        seen = terminal.until(b"1,000,000", 30)
        glances.append(1000 * (time.perf_counter() - terminal.started) if seen is not None else 30000)
        # The state says "opening" until every update has been read; "finished" stands in the log before.
        seen = terminal.until(b"finished", 30, times=2)
        opened.append(1000 * (time.perf_counter() - terminal.started) if seen is not None else 30000)
        terminal.read(0.5)
        peak = terminal.peak_memory()
        terminal.close()
    report("a run of 1,000,000 updates: its ends after", statistics.median(glances), "ms", 1000)
    report("and the whole of it after", statistics.median(opened), "ms", 1000)
    report("memory with it, at its peak", peak, "MiB", 60)

    train = [TUNE, "train", "--model", "demo", "--data", "demo", "--detach", "--set", "train.steps=100000",
             "--set", "train.batch=4", "--set", "train.eval_every=0", "--set", "train.save_every=0"]
    run = subprocess.run(train, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        print("the worker did not start: " + run.stderr)
        sys.exit(1)
    run = run.stdout.strip()
    try:
        terminal = Terminal(["attach", run], environment)
        terminal.until(b"tok/s", 20)
        terminal.read(10)
        before = terminal.bytes
        terminal.read(30)
        report("bytes a second on the Train screen, live", (terminal.bytes - before) / 30, "bytes/s", 1500)
        latencies = []
        for number in range(200):
            terminal.read(0.02 + number % 7 * 0.01)
            # Another curve: the frame that shows it is the answer.
            start = time.perf_counter()
            terminal.press(b"c")
            while True:
                reads = terminal.read(0.001)
                if reads and b"\x1b[?2026l" in b"".join(data for _, data in reads):
                    latencies.append(1000 * (reads[0][0] - start))
                    break
                if time.perf_counter() - start > 2:
                    latencies.append(2000)
                    break
        latencies.sort()
        report("key to frame while training, median", statistics.median(latencies), "ms", 30)
        report("key to frame while training, p99", latencies[int(len(latencies) * 0.99) - 1], "ms", 30)
        report("memory on the Train screen", terminal.memory(), "MiB", 60)
        terminal.close()
    finally:
        subprocess.run([TUNE, "stop", run], env=environment, capture_output=True)
        subprocess.run([TUNE, "wait", run], env=environment, capture_output=True, timeout=120)


main()
