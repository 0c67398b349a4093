"""A command in a real pseudo-terminal, and what a person would see there: pyte keeps the screen.

python tests/terminal.py OUT.svg COLUMNS ROWS COMMAND...     the screen two thirds through, as a picture
"""

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path

import pyte


@dataclass
class Session:
    """Screens as they were every fifth of a second, the last one at the end; and the exit status."""

    screens: list[str] = field(default_factory=list)
    scrolled: list[str] = field(default_factory=list)
    """Lines that left the last screen at the top."""
    status: int | None = None

    @property
    def text(self) -> str:
        """All that is left to be read when the command has ended."""
        return "\n".join([*self.scrolled, self.screens[-1]])


def run_in_terminal(
    command: Sequence[str],
    cwd: Path,
    environment: dict[str, str],
    columns: int = 110,
    rows: int = 40,
    limit_s: float = 240,
) -> Session:
    """Run it to its end, or kill it after limit_s."""
    screen = pyte.HistoryScreen(columns, rows, history=5000)
    stream, session = pyte.ByteStream(screen), Session()
    ours, its = pty.openpty()
    ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    streams = {"stdin": its, "stdout": its, "stderr": its}
    process = subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **streams)
    os.close(its)
    deadline = time.monotonic() + limit_s
    try:
        while process.poll() is None and time.monotonic() < deadline:
            _read(ours, stream, 0.2)
            session.screens.append(_text(screen))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    _read(ours, stream, 0.2)
    os.close(ours)
    session.screens.append(_text(screen))
    session.scrolled = ["".join(line[x].data for x in range(columns)).rstrip() for line in screen.history.top]
    session.status = process.returncode
    return session


def _read(terminal: int, stream: pyte.ByteStream, wait_s: float) -> None:
    ended = time.monotonic() + wait_s
    while (left := ended - time.monotonic()) > 0:
        ready, _, _ = select.select([terminal], [], [], left)
        try:
            if not ready or not (told := os.read(terminal, 65536)):
                return
        except OSError:  # how Linux says that the other end is closed
            return
        stream.feed(told)


def _text(screen: pyte.Screen) -> str:
    return "\n".join(line.rstrip() for line in screen.display).rstrip()


def save_picture(text: str, file: Path, columns: int, title: str) -> None:
    from rich.console import Console

    console = Console(record=True, width=columns, file=open(os.devnull, "w"), highlight=False)
    console.print(text, markup=False, soft_wrap=True)
    console.save_svg(str(file), title=title)
    picture = re.sub(r"\s*@font-face \{.*?\}\n", "\n", file.read_text(), flags=re.DOTALL)  # nothing is to be loaded
    file.write_text(picture)


if __name__ == "__main__":
    picture, width, height, *words = sys.argv[1:]
    told = run_in_terminal(words, Path.cwd(), dict(os.environ), int(width), int(height), limit_s=3600)
    training = [screen for screen in told.screens if " s a step" in screen] or told.screens
    save_picture(training[2 * len(training) // 3], Path(picture), int(width), " ".join(words))
    print(told.text)
