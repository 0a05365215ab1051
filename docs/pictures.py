"""Makes the pictures of the README: drives the real program in tmux, with the embedded model, and writes what its screen
shows as SVG. Needs tmux and a release build; run from the repository's root: python3 docs/pictures.py"""

import html
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

COLUMNS, ROWS = 110, 32
WIDTH, HEIGHT = 8.43, 17
BACKGROUND, TEXT = "#12151c", "#c8d0e0"
NAMED = ["#1b1f2a", "#f07f7f", "#9ad08b", "#f0c36d", "#6c9fe8", "#d59bf0", "#7fd1c7", "#c8d0e0", "#6b7489", "#ff9a9a",
         "#b4e6a5", "#ffd98a", "#8db7f5", "#e6b8ff", "#9ce8df", "#ffffff"]
TUNE = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "target/release/tune")
PLAIN = [None, None, False, False, False]
DOCS = pathlib.Path(__file__).resolve().parent
SOCKET = f"tune-pictures-{os.getpid()}"


def tmux(*arguments):
    return subprocess.run(["tmux", "-L", SOCKET, "-f", "/dev/null", *arguments], capture_output=True, text=True, check=True).stdout


def screen():
    return tmux("capture-pane", "-p", "-t", "tune")


def until(text, seconds=120):
    end = time.time() + seconds
    while text not in screen():
        if time.time() > end:
            sys.exit(f'no "{text}" on the screen:\n{screen()}')
        time.sleep(0.05)
    time.sleep(0.7)


def press(*keys):
    for key in keys:
        tmux("send-keys", "-t", "tune", *(["-l", key[1:]] if key.startswith("=") else [key]))
        time.sleep(0.15)


def cells(line, style):
    """(character, (foreground, background, bold, underlined, reversed)) along a line with SGR codes. `style` is the pen, which goes
    on from line to line."""
    for code, character in re.findall(r"\x1b\[([0-9;]*)m|([^\x1b])", line):
        if character:
            yield character, tuple(style)
            continue
        numbers = [int(number or 0) for number in code.split(";")]
        while numbers:
            number = numbers.pop(0)
            if number == 0:
                style[:] = PLAIN
            elif number in (1, 4, 7):
                style[{1: 2, 4: 3, 7: 4}[number]] = True
            elif number in (38, 48):
                kind = numbers.pop(0)
                if kind == 2:
                    color = "#%02x%02x%02x" % tuple(numbers[:3])
                    del numbers[:3]
                else:
                    color = NAMED[numbers.pop(0) % 16]
                style[0 if number == 38 else 1] = color
            elif number in (39, 49):
                style[0 if number == 39 else 1] = None
            elif 30 <= number <= 37 or 40 <= number <= 47:
                style[0 if number < 40 else 1] = NAMED[number % 10]
            elif 90 <= number <= 97:
                style[0] = NAMED[8 + number - 90]


# Box drawing: to the left, right, up, down.
LINES = {"─": "lr", "│": "ud", "╭": "rd", "╮": "ld", "╰": "ru", "╯": "lu", "├": "udr", "┤": "udl", "┬": "lrd", "┴": "lru"}
EIGHTHS = {character: part for part, character in enumerate("▏▎▍▌▋▊▉█", 1)}
RISING = {character: part for part, character in enumerate("▁▂▃▄▅▆▇", 1)}
SHADES = {"░": 0.25, "▒": 0.5, "▓": 0.75}


def shape(character, x, y, color):
    """Characters that must meet their neighbours, or that fonts lack, as shapes; None for all others."""
    middle, centre = x + WIDTH / 2, y + HEIGHT / 2
    if "\u2800" <= character <= "\u28ff":
        bits = ord(character) - 0x2800
        places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
        dots = [place for bit, place in enumerate(places) if bits >> bit & 1]
        return "".join(f'<circle cx="{x + WIDTH * (0.27 + 0.46 * a):.1f}" cy="{y + HEIGHT * (0.125 + 0.25 * b):.1f}" r="1.3" fill="{color}"/>'
                       for a, b in dots)
    if character in LINES:
        ends = {"l": (x, centre), "r": (x + WIDTH, centre), "u": (middle, y), "d": (middle, y + HEIGHT)}
        path = "".join(f"M{middle:.1f} {centre:.1f}L{ends[way][0]:.1f} {ends[way][1]:.1f}" for way in LINES[character])
        if character in "╭╮╰╯":
            (x1, y1), (x2, y2) = (ends[way] for way in LINES[character])
            path = f"M{x1:.1f} {y1:.1f}Q{middle:.1f} {centre:.1f} {x2:.1f} {y2:.1f}"
        return f'<path d="{path}" stroke="{color}" fill="none"/>'
    if character in EIGHTHS:
        return f'<rect x="{x:.1f}" y="{y}" width="{WIDTH * EIGHTHS[character] / 8 + 0.3:.1f}" height="{HEIGHT}" fill="{color}"/>'
    if character in RISING:
        high = HEIGHT * RISING[character] / 8
        return f'<rect x="{x:.1f}" y="{y + HEIGHT - high:.1f}" width="{WIDTH + 0.3:.1f}" height="{high:.1f}" fill="{color}"/>'
    if character in SHADES:
        return f'<rect x="{x:.1f}" y="{y}" width="{WIDTH + 0.3:.1f}" height="{HEIGHT}" fill="{color}" opacity="{SHADES[character]}"/>'
    return None


def save(name):
    lines = tmux("capture-pane", "-e", "-p", "-t", "tune").split("\n")[:ROWS]
    width, height = COLUMNS * WIDTH + 24, ROWS * HEIGHT + 24
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-size="14" '
           "font-family=\"'DejaVu Sans Mono', Menlo, Consolas, monospace\">",
           f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>']
    pen = list(PLAIN)
    for row, line in enumerate(lines):
        runs = []
        for column, (character, style) in enumerate(cells(line, pen)):
            if runs and runs[-1][1] == style:
                runs[-1][2] += character
            else:
                runs.append([column, style, character])
        for column, (front, back, bold, underlined, reverse), text in runs:
            if reverse:
                front, back = back or BACKGROUND, front or TEXT
            x, y, length = 12 + column * WIDTH, 12 + row * HEIGHT, len(text) * WIDTH
            if back:
                out.append(f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{HEIGHT}" fill="{back}"/>')
            for at, character in enumerate(text):
                drawn = shape(character, x + at * WIDTH, y, front or TEXT)
                if drawn:
                    out.append(drawn)
                    text = text[:at] + " " + text[at + 1:]
            if text.strip():
                more = (' font-weight="bold"' if bold else "") + (' text-decoration="underline"' if underlined else "")
                out.append(f'<text x="{x:.1f}" y="{y + 13}" fill="{front or TEXT}" textLength="{length:.1f}" '
                           f'lengthAdjust="spacingAndGlyphs" xml:space="preserve"{more}>{html.escape(text)}</text>')
    out.append("</svg>\n")
    (DOCS / f"{name}.svg").write_text("\n".join(out))
    print(f"docs/{name}.svg", flush=True)


# What `tune demo` trains, with evaluations on the way. The learning rate and the epochs suit a tiny model and are warned of.
RUN = """
[model]
id = "demo"
[data]
train = "demo"
eval = "demo"
max_length = 256
[method]
rank = 16
alpha = 32
[train]
epochs = 28
batch = 16
learning_rate = 5e-3
[sample]
prompts = ["Can I use tune without a GPU?"]
"""
QUESTION = "What programming language is tune written in?"


def main(home):
    (pathlib.Path(home) / "RUN.toml").write_text(RUN)
    environment = " ".join([f"TUNE_HOME={home}", f"TUNE_CONFIG={home}", f"HF_HOME={home}", "TUNE_THEME=dark",
                            "COLORTERM=truecolor", "LANG=C.UTF-8"])
    tmux("new-session", "-d", "-s", "tune", "-x", str(COLUMNS), "-y", str(ROWS), "-c", home, f"env {environment} {TUNE}")
    until("fits:")
    save("model")
    press("Enter")
    until("Files")
    press("Enter")
    until("What is tune?")
    save("data")
    press("v", "o", "=RUN.toml", "Enter")
    until("loaded RUN.toml")
    press("3")
    until("is high for lora")
    until("(estimates)")
    until("updates")
    press("/", "=learning_rate", "Enter")
    press("/", "C-u", "Enter")
    save("tune")
    press("s")
    until("step 238: evaluation", 300)
    save("train")
    until("finished", 300)
    press("Enter")
    until("held-out loss")
    save("result")
    press("c", "=" + QUESTION, "Enter")
    time.sleep(12)
    save("chat")
    press("Escape", "6")
    until("Runs 1")
    tmux("kill-server")


if __name__ == "__main__":
    folder = tempfile.mkdtemp(prefix="tune-pictures-")
    try:
        main(folder)
    finally:
        subprocess.run(["tmux", "-L", SOCKET, "kill-server"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
