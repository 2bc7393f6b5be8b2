"""Take the README's picture of the report anew, from the published runs alone.

    python tests/shoot_report.py

The claims that it shows are written into the file, where ``test_readme`` holds them against the
runs. Needs Chromium.
"""

from __future__ import annotations

import io
import os
import tempfile

import chromium
import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from opentrans_lab.files import atomic_path
from opentrans_lab.records import PROJECT
from opentrans_lab.report import build_report
from opentrans_lab.runs import run_notebook

CLAIMS = "claims"
WIDE = 960  # pixels
COLOURS = 128


def main() -> None:
    with tempfile.TemporaryDirectory() as runs:
        os.environ |= {"OPENTRANS_RUNS": runs, "OPENTRANS_RESULTS": str(PROJECT / "results")}
        done = run_notebook(PROJECT / "notebooks" / "05_paper_tables.ipynb")
        (page,) = build_report().parent.glob("05_paper_tables/*/index.html")
        claims = pd.read_csv(done.folder / "claims.csv").to_csv(index=False)
        with chromium.launched() as browser:
            tab = browser.new_page(viewport={"width": WIDE, "height": 900})
            tab.goto(page.as_uri())
            head, figure = tab.locator("table.words").first, tab.locator("img").first
            top, low = head.bounding_box(), figure.bounding_box()
            part = {"x": 0, "y": top["y"] - 10, "width": WIDE}
            part["height"] = low["y"] + low["height"] + 10 - part["y"]
            picture = Image.open(io.BytesIO(tab.screenshot(clip=part, full_page=True)))
    about = PngInfo()
    about.add_text(CLAIMS, claims)
    with atomic_path(PROJECT / "docs" / "report.png") as out:
        picture.convert("RGB").quantize(COLOURS).save(out, optimize=True, pnginfo=about)


if __name__ == "__main__":
    main()
