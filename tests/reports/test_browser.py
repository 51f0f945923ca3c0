"""The report of a run, opened in a real browser: nothing is asked for, nothing goes wrong, and it can be read everywhere."""

import base64
import json
import os
import random
import select
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from command_line_helpers import WORDS

from lens_unlearn.experiments import report_content
from lens_unlearn.experiments.experiment import carry_out
from lens_unlearn.experiments.plan import Plan

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if BROWSER is None:
    pytest.skip("there is no chromium or chrome to open reports in", allow_module_level=True)

LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
"""The browser's DevTools pipe is read at descriptor 3 and written at 4."""
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
)
FLAGS += " --disable-sync --disable-default-apps --no-pings --hide-scrollbars --remote-debugging-pipe"
PATIENCE = 90
PHONE = 390


class Browser:
    """A headless Chromium that reaches no address, driven over its DevTools pipe."""

    def __init__(self, profile: Path) -> None:
        (self.answers, theirs_out), (theirs_in, self.orders) = os.pipe(), os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(theirs_in), str(theirs_out), str(BROWSER), *FLAGS.split()]
        command += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.unread, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Give an order, and return its result; events on the way are noted."""
        self.number += 1
        order = {"id": self.number, "method": method, "params": parameters}
        order |= {"sessionId": self.session} if self.session else {}
        data = json.dumps(order).encode() + b"\0"
        while data:
            data = data[os.write(self.orders, data) :]
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.unread:
            if not select.select([self.answers], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self.answers, 1 << 20)
            if not part:
                raise EOFError("the browser ended")
            self.unread += part
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Open a page, open what is folded away in it, and wait until every figure is drawn."""
        self.events.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.scheme(dark)
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        self.ask("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        self.wait(
            "!window.Plotly || document.documentElement.dataset.drawn == document.querySelectorAll('[data-figure]').length"
        )

    def scheme(self, dark: bool) -> None:
        """Prefer dark or light."""
        options = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[options])

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + PATIENCE
        while not self.ask(expression):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """Return what the console was told, and what was thrown."""
        options = [event["params"] for event in self.events if event["method"] == "Runtime.consoleAPICalled"]
        said = [" ".join(str(part.get("value")) for part in one["args"]) for one in options]
        said += [e["params"]["entry"]["text"] for e in self.events if e["method"] == "Log.entryAdded"]
        return said + [str(e["params"]) for e in self.events if e["method"] == "Runtime.exceptionThrown"]

    def requests(self) -> list[str]:
        """Return the addresses asked for; data inside the page is no address."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [url for one in sent if not (url := one["request"]["url"]).startswith(("data:", "blob:"))]

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait(20)
        os.close(self.answers)
        os.close(self.orders)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        made = Browser(tmp_path_factory.mktemp("profile"))
    except (EOFError, TimeoutError) as error:
        pytest.skip(f"the browser does not run here: {error}")
    yield made
    made.close()


@pytest.fixture(scope="module")
def report(model_dir: Path, loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small run with three methods, their controls and a sweep; and of a second one below it."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("forget", "retain"):
        draw = random.Random(name)
        known = [word[::-1] for word in WORDS] if name == "forget" else WORDS
        rows = [{"text": " ".join(draw.choices(known, k=30))} for _ in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plan = Plan(
        model=str(model_dir), forget=f"{folder / 'forget.jsonl'}:text", retain=(f"{folder / 'retain.jsonl'}:text",),
        methods=("selective-pruning", "neuron-adjust", "key-space-detection"), tokens=200, window=32, controls=1,
        settings={"fraction": 0.1, "false_alarms": 0.2}, fractions=(0.2, 0.4), false_alarms=(0.1,),
    )  # fmt: skip
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_content, "WRITTEN", 3)
        warnings.simplefilter("ignore", RuntimeWarning)  # too few texts for figures of the key space
        done = carry_out(plan, folder / "out", progress=False, model=loaded)
    assert done is not None
    tiny.used.add("loaded")
    whole = replace(done[1], title="Words backwards", parts=(replace(done[1], title="Once more", figures={}),))
    whole.to_html(folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def at_desk(browser: Browser, report: Path) -> Browser:
    if browser.ask("document.body.dataset.at") != "desk":
        browser.open(report)
        browser.ask("document.body.dataset.at = 'desk'")
    browser.scheme(dark=False)
    return browser


@pytest.fixture
def on_phone(browser: Browser, report: Path) -> Browser:
    if browser.ask("document.body.dataset.at") != "phone":
        browser.open(report, width=PHONE)
        browser.ask("document.body.dataset.at = 'phone'")
    return browser


def test_what_goes_wrong_in_a_page_is_seen(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!DOCTYPE html><title>A</title><img src='http://example.invalid/x.png'><script>console.warn('so so');"
        "setTimeout(() => { throw new Error('bad') }, 0)</script><p style='width: 1000px'>wide</p>"
    )
    browser.open(page, width=PHONE)
    browser.wait("performance.getEntriesByType('resource').length == 1")
    assert browser.requests() == [page.as_uri(), "http://example.invalid/x.png"]
    assert "so so" in browser.complaints()
    assert any("bad" in options for options in browser.complaints())
    assert browser.ask("document.documentElement.scrollWidth") > PHONE


def test_it_asks_for_nothing_and_has_nothing_to_complain(at_desk: Browser, report: Path) -> None:
    assert at_desk.complaints() == []
    assert at_desk.requests() == [report.as_uri()]


def test_every_figure_is_drawn(at_desk: Browser) -> None:
    drawn = at_desk.ask(
        "[...document.querySelectorAll('[data-figure]')].map(source => document.getElementById(source.dataset.figure))"
        ".map(one => one.querySelectorAll('.main-svg path, .main-svg image, canvas').length)"
    )
    assert len(drawn) > 10
    assert min(drawn) > 5
    bare = at_desk.ask("[...document.querySelectorAll('.js-plotly-plot')].filter(one => !one.ariaLabel).length")
    assert bare == 0


def test_what_is_folded_away_is_drawn_when_it_is_opened(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.call("Page.reload")
    browser.wait("document.documentElement?.dataset.drawn > 0")
    counts = "[document.querySelectorAll('.js-plotly-plot').length, document.querySelectorAll('[data-figure]').length]"
    shown, there = browser.ask(counts)
    assert shown < there
    browser.ask("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    browser.wait(f"document.documentElement.dataset.drawn == {there}")


def test_a_phone_need_not_scroll_sideways(on_phone: Browser) -> None:
    assert on_phone.ask("document.documentElement.scrollWidth") <= PHONE
    wide = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth + 1)"
    assert on_phone.ask(f"{wide}.length") > 0, "tables scroll in themselves"
    assert on_phone.ask(f"{wide}.filter(one => one.tabIndex < 0).length") == 0, "and with the keyboard"
    assert on_phone.complaints() == []


def test_a_legend_of_many_lines_takes_no_room_from_the_figure(on_phone: Browser) -> None:
    figure = on_phone.ask(
        "['.plotclip rect', '.legend .bg'].map(one => Number(document.querySelector('#figure-0 ' + one).getAttribute('height')))"
    )
    assert figure[1] > 80, "a line for each of several methods"
    assert figure[0] > 350, "the axes are as tall as on a desk"


LOOKS = """(() => { const ink = one => getComputedStyle(one).fill;
  return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
    ink(document.querySelector('.xtick text')), ink(document.querySelector('.legendtext'))]; })()"""


def test_dark_and_light_differ_and_follow_the_reader(at_desk: Browser) -> None:
    light = at_desk.ask(LOOKS)
    at_desk.scheme(dark=True)
    at_desk.wait(f"{LOOKS}.at(-1) != '{light[-1]}'")
    dark = at_desk.ask(LOOKS)
    assert all(one != other for one, other in zip(light, dark, strict=True)), (light, dark)


CONTRAST = """(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => { const [r, g, b] = rgb.slice(0, 3).map(c => { c /= 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = one => { for (; one; one = one.parentElement) {
    const found = parse(getComputedStyle(one).backgroundColor); if (found.length < 4 || found[3] == 1) return found; }
    return document.documentElement.dataset.dark ? [0, 0, 0] : [255, 255, 255]; };
  const low = [];
  for (const one of document.querySelectorAll('h1,h2,h3,h4,p,li,b,i,small,span,th,td,a,summary,pre,mark')) {
    if (one.closest('.js-plotly-plot') || one.closest('[style*="opacity"]')) continue;
    if (![...one.childNodes].some(node => node.nodeType == 3 && node.textContent.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push(one.tagName + '.' + one.className + ' ' + ratio.toFixed(2) + ' ' + one.textContent.slice(0, 40));
  }
  return low; })()"""


def test_the_text_contrasts_with_its_ground(at_desk: Browser) -> None:
    assert at_desk.ask(CONTRAST) == []
    at_desk.scheme(dark=True)
    dark = at_desk.ask(CONTRAST)
    at_desk.ask("document.querySelector('.lead, p').style.color = '#555'")
    found = at_desk.ask(CONTRAST)
    at_desk.ask("document.querySelector('.lead, p').style.color = ''")
    assert dark == []
    assert found, "what is too faint is found"


def test_headings_come_in_order(at_desk: Browser) -> None:
    levels = at_desk.ask("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(one => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False)), levels
    assert at_desk.ask("document.querySelector('nav a').hash.slice(1)") in at_desk.ask(
        "[...document.querySelectorAll('[id]')].map(one => one.id)"
    )


def test_the_table_can_be_taken_from_the_page(at_desk: Browser, report: Path) -> None:
    link = at_desk.ask("(() => { const a = document.querySelector('a[download]'); return [a.download, a.href]; })()")
    assert link[0] == "metrics.csv"
    assert base64.b64decode(link[1].partition("base64,")[2]) == (report.parent / "out" / "metrics.csv").read_bytes()


def test_on_paper_figures_fit_in_dark_ink_and_come_back(at_desk: Browser) -> None:
    widths = "[...document.querySelectorAll('.js-plotly-plot .main-svg')].map(one => one.getBoundingClientRect().width)"
    before, light = at_desk.ask(widths), at_desk.ask(LOOKS)
    at_desk.scheme(dark=True)
    at_desk.ask("window.dispatchEvent(new Event('beforeprint'))")
    at_desk.wait(f"Math.max(...{widths}) < 700")
    at_desk.wait(f"{LOOKS}.at(-1) == '{light[-1]}'")
    at_desk.scheme(dark=False)
    at_desk.ask("window.dispatchEvent(new Event('afterprint'))")
    at_desk.wait(f"Math.max(...{widths}) >= {max(before) - 2}")
    assert len(base64.b64decode(at_desk.call("Page.printToPDF")["data"])) > 10_000
