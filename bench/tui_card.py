"""The Machine panel of the Train screen beside nvidia-smi. See bench/tui_card.sh; standard library only."""

import fcntl
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time

TUNE = os.path.abspath(sys.argv[1])
COLUMNS, ROWS = 160, 50
FIELDS = ["memory.used", "memory.total", "utilization.gpu", "temperature.gpu", "power.draw", "enforced.power.limit", "clocks.sm"]


class Screen:
    """As much of a terminal as the workbench's own codes need."""

    def __init__(self):
        self.cells = [[" "] * COLUMNS for _ in range(ROWS)]
        self.x = self.y = 0
        self.rest = b""

    def feed(self, data):
        text = (self.rest + data).decode("utf-8", "ignore")
        # A code that was cut in two waits for its other half.
        cut = text.rfind("\x1b")
        self.rest = b""
        if cut >= 0 and not re.match(r"\x1b\[[?0-9;]*[A-Za-z]", text[cut:]):
            text, self.rest = text[:cut], text[cut:].encode()
        for code, final, character in re.findall(r"\x1b\[([?0-9;]*)([A-Za-z])|(.)", text, re.S):
            if character:
                if character >= " " and self.y < ROWS and self.x < COLUMNS:
                    self.cells[self.y][self.x] = character
                    self.x += 1
            elif final == "H":
                row, column = (code.split(";") + ["1", "1"])[:2] if code else ("1", "1")
                self.y, self.x = int(row) - 1, int(column) - 1
            elif final == "G":
                self.x = int(code or 1) - 1
            elif final == "J":
                self.cells = [[" "] * COLUMNS for _ in range(ROWS)]

    def machine(self):
        """The lines of the panel."""
        lines = ["".join(row) for row in self.cells]
        for at, line in enumerate(lines):
            column = line.find("Machine")
            if column >= 0:
                panel = [line[column - 1:].strip(" │|─╮") for line in lines[at + 1:at + 12]]
                return [line for line in panel if line]
        return []


def smi():
    command = ["nvidia-smi", "--query-gpu=" + ",".join(FIELDS), "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def main():
    home = pathlib.Path(tempfile.mkdtemp(prefix="tune-card-"))
    runtime = home / "run"
    runtime.mkdir(mode=0o700)
    environment = dict(os.environ, HOME=str(home), TUNE_HOME=str(home), TERM="xterm-256color", LANG="C.UTF-8",
                       XDG_RUNTIME_DIR=str(runtime))
    train = [TUNE, "train", "--model", "demo", "--data", "demo", "--detach", "--set", "train.steps=1000000",
             "--set", "train.eval_every=0", "--set", "train.save_every=0"]
    run = subprocess.run(train, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit("the run did not start: " + run.stderr)
    run = run.stdout.strip()
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(TUNE, [TUNE, "attach", run], environment)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    screen = Screen()
    try:
        for sample in range(5):
            end = time.monotonic() + 3
            while time.monotonic() < end:
                if select.select([fd], [], [], 0.1)[0]:
                    screen.feed(os.read(fd, 65536))
            theirs = smi()
            print(f"sample {sample + 1}")
            print(f"  nvidia-smi: {theirs or 'not here'}")
            for line in screen.machine():
                print(f"  workbench:  {line}")
        print("events: " + str(sum(1 for _ in open(home / "runs" / run / "events.jsonl"))))
        if not smi():
            print("no card: nothing to compare with")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        subprocess.run([TUNE, "stop", "--now", run], env=environment, capture_output=True)
        shutil.rmtree(home, ignore_errors=True)


main()
