"""The machine's own headless Chromium, for tests and for the README's picture."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "chrome", "google-chrome")


def found() -> str | None:
    """Its path, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """Running, until the end of the block."""
    # Root, as in containers, has no sandbox; the pages are our own.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as play:
        # A busy machine is no failure: playwright would wait for 30 seconds.
        start = play.chromium.launch(executable_path=found(), args=arguments, timeout=300_000)
        with start as browser:
            yield browser
