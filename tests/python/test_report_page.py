"""The report in headless Chromium: nothing is logged or loaded, nothing runs over the edge, no section is empty, and
pictures and print show something."""

from __future__ import annotations

import io
import json
import re
import tempfile
import unittest
from pathlib import Path
from typing import Any

import numpy as np
from headless_browser import Browser, find_browser
from sample_records import document, full_run, lossless, trace, trained_cells
from support import ToolTest  # lets the tools be imported

# isort: split
from tools.report import report

WIDTHS = (400, 1400)
TILE = 100  # pixels
PICTURED = 0.3  # of the tiles have more than one colour at least
# What is wrong in the page, as texts.
PROBLEMS = """
(() => {
  const shown = (element) => element.getClientRects().length > 0;
  const said = (element) => element.innerText.trim();
  const found = [];
  if (document.documentElement.scrollWidth > innerWidth) {
    found.push(`the page is ${document.documentElement.scrollWidth} wide in a window of ${innerWidth}`);
    for (const element of document.querySelectorAll('body *')) {
      const box = element.getBoundingClientRect();
      const past = box.right > innerWidth + 1 && !element.closest('.scroll');
      if (past) found.push(`${element.tagName}.${element.className}`);
    }
  }
  for (const section of document.querySelectorAll('section')) {
    const rest = [...section.children].filter((child) => child.tagName !== 'H2' && shown(child));
    if (!rest.some((child) => said(child) || child.querySelector('svg'))) found.push(`empty: ${said(section)}`);
  }
  for (const table of document.querySelectorAll('table')) {
    if (!table.tBodies[0] || !table.tBodies[0].rows.length) found.push(`empty table: ${said(table)}`);
  }
  for (const figure of document.querySelectorAll('figure')) {
    const drawn = [...figure.querySelectorAll('svg')].filter((svg) => !svg.closest('details details') && shown(svg));
    const open = !figure.parentElement.closest('details:not([open])');
    if (open && drawn.length !== 1) found.push(`${drawn.length} charts in ${said(figure)}`);
    if (!figure.querySelector('details table')) found.push(`a chart without a table: ${said(figure)}`);
  }
  for (const element of document.querySelectorAll('svg text')) {
    const box = element.getBoundingClientRect(), whole = element.ownerSVGElement.getBoundingClientRect();
    const cut = box.width && (box.right > whole.right + 2 || box.left < whole.left - 2);
    if (cut) found.push(`cut: ${element.textContent}`);
  }
  return found;
})()
"""


def pages() -> dict[str, list[dict[str, Any]]]:
    return {
        "a whole run": [document(full_run()), trace()],
        "trained cells": [document(trained_cells())],
        "one record": [document([lossless("minilm", "sample-faq", 0.9)])],
        "nothing": [document([])],
    }


class PageTest(ToolTest):
    browser: Browser
    pages: dict[str, Path]

    @classmethod
    def setUpClass(cls) -> None:
        program = find_browser()
        if program is None:
            raise unittest.SkipTest("no Chromium is installed: apt-get install chromium, or set LLMCACHE_CHROMIUM")
        cls.browser = Browser(program)
        cls.addClassCleanup(cls.browser.close)
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.pages = {name: cls.written(documents, Path(folder.name) / name) for name, documents in pages().items()}

    @classmethod
    def written(cls, documents: list[dict[str, Any]], folder: Path) -> Path:
        folder.mkdir()
        files = [folder / f"{number}.json" for number in range(len(documents))]
        for file, made in zip(files, documents, strict=True):
            file.write_text(json.dumps(made), encoding="utf-8")
        page = folder / "report.html"
        status, _, err = cls.run_tool(report, *files, "-o", page)
        if status:
            raise RuntimeError(err)
        return page

    def setUp(self) -> None:
        super().setUp()
        self.browser.errors.clear()
        self.browser.requests.clear()

    def test_nothing_is_wrong_at_any_width(self) -> None:
        for name, page in self.pages.items():
            self.browser.open(page, WIDTHS[0])
            for folds in ("closed", "open"):
                for width in (*WIDTHS, 320, 800):
                    with self.subTest(name, width=width, folds=folds):
                        self.browser.resize(width)
                        self.assertEqual(self.browser.evaluate("innerWidth"), width)
                        self.assertEqual(self.browser.evaluate(PROBLEMS), [])
                self.browser.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
            self.assertEqual(self.browser.errors, [])
            self.assertEqual(set(self.browser.requests), {page.resolve().as_uri()}, "it needs nothing beside itself")
            self.browser.requests.clear()

    def test_what_is_wrong_is_seen(self) -> None:
        page = self.folder / "wrong.html"
        page.write_text(
            '<!doctype html><meta name="viewport" content="width=device-width"><section><h2>Alone</h2></section>'
            "<table><tbody></tbody></table><figure><svg></svg></figure><p style='width: 2000px'>wide</p>"
            "<img src='not-there.png'><script>console.error('said'); throw new Error('thrown')</script>",
            encoding="utf-8",
        )
        self.browser.open(page, 1400)
        problems = "; ".join(self.browser.evaluate(PROBLEMS))
        for wrong in ("wide in a window of 1400", "P.", "empty: Alone", "empty table", "a chart without a table"):
            self.assertIn(wrong, problems)
        self.assertIn("said", self.browser.errors)
        self.assertTrue(any("Uncaught" in error for error in self.browser.errors), self.browser.errors)
        self.assertTrue(any("not-there.png" in address for address in self.browser.requests))

    def test_pictures_show_something(self) -> None:
        for width in WIDTHS:
            with self.subTest(width=width):
                self.browser.open(self.pages["a whole run"], width)
                self.assert_pictured(self.browser.picture(), width)

    def test_print(self) -> None:
        self.browser.open(self.pages["a whole run"], 1000)
        pdf = self.browser.pdf()
        self.assertTrue(pdf.startswith(b"%PDF"))
        self.assertGreater(len(re.findall(rb"/Type\s*/Page\b", pdf)), 3)
        self.browser.media("print")
        self.addCleanup(self.browser.media, "")
        self.assert_pictured(self.browser.picture(), 1000)
        closed = (
            "[...document.querySelectorAll('details table')].filter((one) => !one.offsetHeight)"
            ".map((one) => one.innerText)"
        )
        folded = self.browser.evaluate(closed)
        self.assertLessEqual(len(folded), 1, "but for the first chart's table, whose figures stand in others")

    def assert_pictured(self, png: bytes, width: int) -> None:
        """More than one colour in many places."""
        from PIL import Image

        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
        self.assertEqual(pixels.shape[1], width)
        self.assertGreater(pixels.shape[0], 2000)
        tiles = [
            pixels[y : y + TILE, x : x + TILE].reshape(-1, 3)
            for y in range(0, pixels.shape[0] - TILE, TILE)
            for x in range(0, width - TILE + 1, TILE)
        ]
        several = sum(bool((tile != tile[0]).any()) for tile in tiles)
        self.assertGreater(several, PICTURED * len(tiles))


if __name__ == "__main__":
    unittest.main()
