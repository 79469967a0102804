"""Opens reports in headless Chromium, at a phone's and a desktop's width, light and dark, and checks what a reader
would miss: python benchmarks/report_pictures.py OUT report.html [...]

Needs `pip install playwright` and a Chromium (Debian's package, or CHROMIUM=path). Checked of each page: nothing on
the console, no request but the file itself, every plot has marks, nothing wider than the window, Tab reaches every
plot, the arrow keys read its points, and its numbers open as a table. Pictures go to OUT. Exit code 1 where something
fails.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
WINDOWS = {"phone": {"width": 360, "height": 800}, "desktop": {"width": 1280, "height": 900}}
MARKS = ".points path, .js-line, .bars path"
DRAWN = "document.documentElement.dataset.drawn === 'yes'"


def main(words: list[str]) -> int:
    out, reports = Path(words[0]), [Path(word).resolve() for word in words[1:]]
    out.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for report in reports:
            for window in WINDOWS:
                for colours in ("light", "dark"):
                    name = f"{report.parent.name}-{report.stem}-{window}-{colours}"
                    found = list(look(browser, report, window, colours, out / name))
                    faults += [f"{name}: {fault}" for fault in found]
            paper(browser, report, out / f"{report.parent.name}-{report.stem}.pdf")
        browser.close()
    print("\n".join(faults) or f"{len(reports)} reports in 4 windows each: nothing amiss; pictures in {out}")
    return 1 if faults else 0


def look(browser: Browser, report: Path, window: str, colours: str, picture: Path) -> Iterator[str]:
    """What is wrong with the page in such a window."""
    said: list[str] = []
    context = browser.new_context(viewport=WINDOWS[window], color_scheme=colours, has_touch=window == "phone",
                                  is_mobile=window == "phone", device_scale_factor=1)
    page = context.new_page()
    page.on("console", lambda message: said.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: said.append(f"request: {request.url}") if request.url != report.as_uri()
            and not request.url.startswith("data:") else None)
    page.goto(report.as_uri())
    page.wait_for_function(DRAWN, timeout=60_000)
    yield from without_marks(page)
    if (width := page.evaluate("document.documentElement.scrollWidth")) > WINDOWS[window]["width"]:
        yield f"{width} pixels wide"
    yield from unreached(page)
    yield from unread(page)
    if page.evaluate("typeof window.broken") != "undefined":
        yield "text of a file was run as a script"
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.screenshot(path=f"{picture}.png", full_page=True)
    yield from said
    context.close()


def without_marks(page: Page) -> Iterator[str]:
    for plot in page.query_selector_all(".plot"):
        if not plot.query_selector_all(MARKS):
            yield f"plot {plot.get_attribute('id')} shows nothing"


def unreached(page: Page) -> Iterator[str]:
    """Plots that the Tab key does not come to."""
    wanted = {plot.get_attribute("id") for plot in page.query_selector_all(".plot")}
    page.evaluate("document.body.tabIndex = -1; document.body.focus()")
    first = True
    for _ in range(600):
        page.keyboard.press("Tab")
        key = page.evaluate("document.activeElement.id || document.activeElement.className")
        if first and key != "skip":
            yield f"the first Tab reaches {key!r}, not the way past the navigation"
        first = False
        wanted.discard(key)
        if not wanted:
            return
    yield f"Tab does not reach {sorted(map(str, wanted))}"


def unread(page: Page) -> Iterator[str]:
    """Plots whose points or numbers cannot be read."""
    for plot in page.query_selector_all(".plot"):
        key = plot.get_attribute("id")
        plot.focus()
        page.keyboard.press("ArrowRight")
        frame = page.query_selector(f"figure:has(#{key})")
        assert frame is not None
        reading, numbers = frame.query_selector(".reading"), frame.query_selector("details.numbers summary")
        assert reading is not None and numbers is not None
        if not reading.text_content():
            yield f"the arrow keys read nothing of {key}"
        numbers.focus()
        page.keyboard.press("Enter")
        page.wait_for_timeout(50)
        if not frame.query_selector_all("details.numbers td"):
            yield f"the numbers of {key} are no table"
        page.keyboard.press("Enter")


def paper(browser: Browser, report: Path, picture: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(report.as_uri())
    page.wait_for_function(DRAWN, timeout=60_000)
    page.pdf(path=picture, format="A4", margin={side: "12mm" for side in ("top", "bottom", "left", "right")})
    page.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
