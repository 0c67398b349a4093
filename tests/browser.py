"""A real browser for tests: the system's Chromium or Chrome without a window, driven by Playwright."""

import os
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import ConsoleMessage, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
"""Containers run as root, and with little shared memory."""


def find_browser() -> str | None:
    """The one that $CHROMIUM names, else the first that is on the PATH."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page at a time of one browser; what it complains about is in ``complaints``."""

    def __init__(self, executable: str) -> None:
        self.complaints: list[str] = []
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        self._page: Page | None = None

    def show(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False, media: str = "screen") -> None:
        """Load a file as a window of this size shows it, or a printer."""
        if self._page is not None:
            self._page.context.close()
        self._page = self._browser.new_page(
            viewport={"width": width, "height": height},
            is_mobile=width < 600,
            color_scheme="dark" if dark else "light",
        )
        self._page.on("console", self._note)
        self._page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self._page.emulate_media(media=media)
        self._page.goto(page.absolute().as_uri(), wait_until="load")

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        return self._page.evaluate(script)

    def pdf(self) -> bytes:
        return self._page.pdf(format="A4", prefer_css_page_size=True)

    def close(self) -> None:
        self._browser.close()
        self._playwright.stop()

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)
