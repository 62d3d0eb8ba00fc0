"""The report opens from disk with the network off, and every control works, in a real Chromium."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fxpass.hallway.dry_run import DryRun, dry_run
from fxpass.report import build
from fxpass.report.build import report_data

from . import targets
from .helpers import fx

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
MISSING = [n for n, path in (("chromium", CHROMIUM), ("chromium-driver", DRIVER)) if path is None]


@pytest.fixture(scope="module")
def run() -> DryRun:
    return dry_run(lambda: (*targets.mlp(), {}), {"max_norm": 1.0})


@pytest.fixture(scope="module")
def page(run: DryRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(build("mlp </script>", run))
    return path


def test_the_data_is_that_of_the_run(run: DryRun) -> None:
    data = report_data("mlp", run, run.memory)
    assert [n["name"] for n in data["nodes"]] == [n.name for n in run.final.nodes]
    assert [d["point"] for d in data["diffs"]] == [p.name for p in run.record.passes]
    assert max(data["memory"]["totals"]) == run.memory.peak.bytes
    for moment, total in enumerate(data["memory"]["totals"]):
        assert sum(role["bytes"][moment] for role in data["memory"]["roles"]) == total


def test_the_file_refers_to_nothing_outside(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)\s*=\s*["']?https?:""", text)
    assert "@import" not in text


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.html"
    found = fx(capsys, "report", "@mlp", "--of", "graph", "-o", str(path), "--json")
    assert found.code == 0, found.err
    assert found.json()["bytes"] == len(path.read_text())


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Any]:
    """Chromium with the page open and the network off."""
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)} (Debian packages of these names)")
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # selenium leaves sockets to the garbage collector
        driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
        conditions = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)
        driver.set_script_timeout(60)
        driver.get(page.as_uri())
        yield Page(driver)
        driver.quit()


class Page:
    """The open page: elements by CSS selector, JavaScript, clicks."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        driver.implicitly_wait(10)

    def js(self, code: str, *args: Any) -> Any:
        return self.driver.execute_script(code, *args)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def write(self, selector: str, text: str) -> None:
        self.one(selector).clear()
        self.one(selector).send_keys(text or " \b")

    def choose(self, selector: str, value: str) -> None:
        from selenium.webdriver.support.select import Select

        Select(self.one(selector)).select_by_value(value)

    def lines(self) -> list[str]:
        visible = "[...document.querySelectorAll('#lines div')].filter(d => !d.hidden)"
        return self.js(f"return {visible}.map(d => d.textContent)")

    def click(self, element: Any) -> None:
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()


def test_it_is_ready_without_an_error(browser: Page) -> None:
    assert browser.js("return document.documentElement.dataset.ready") == "yes"
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.one("h1").text == "fxpass: mlp </script>"
    assert browser.js("return performance.getEntriesByType('resource').map(e => e.name)") == []


def test_search_filters_the_graph(browser: Page, run: DryRun) -> None:
    assert len(browser.lines()) == len(run.final.nodes)
    browser.write("#search", "addmm")
    expected = [n.line() for n in run.final.nodes if "addmm" in n.line()]
    assert browser.lines() == expected
    assert browser.one("#count").text == f"{len(expected)} of {len(run.final.nodes)}"
    browser.write("#search", "(")
    assert "wrong" in browser.one("#search").get_attribute("class")
    browser.write("#search", "")
    assert len(browser.lines()) == len(run.final.nodes)


def test_filters_by_pass_phase_and_dtype(browser: Page, run: DryRun) -> None:
    browser.choose("#filter-pass", "cast")
    browser.choose("#filter-phase", "backward")
    browser.choose("#filter-dtype", "float16")
    expected = [
        n.line() for n in run.final.nodes if (n.made_by, n.phase, n.dtype) == ("cast", "backward", "float16")
    ]
    assert browser.lines() == expected != []
    for name in ("pass", "phase", "dtype"):
        browser.choose(f"#filter-{name}", "")
    assert len(browser.lines()) == len(run.final.nodes)


def test_a_click_on_a_line_explains_the_node(browser: Page, run: DryRun) -> None:
    browser.write("#search", "^addmm:")
    browser.click(browser.one("#lines div:not([hidden])"))
    detail = browser.one("#detail").text
    addmm = run.final.by_name["addmm"]
    assert addmm.where in detail
    assert "policy low: float16 operands" in detail
    reader = run.final.readers["addmm"][0]
    browser.click(next(a for a in browser.all("#detail a") if a.text == reader))
    assert f"{reader}: " in browser.one("#detail code").text
    assert len(browser.lines()) == len(run.final.nodes)  # the search was cleared to show it


def test_a_click_on_a_pass_shows_what_it_inserted(browser: Page, run: DryRun) -> None:
    browser.click(next(r for r in browser.all("#pass-table tr.link") if r.text.startswith("skip")))
    assert browser.lines() == [n.line() for n in run.final.nodes if n.made_by == "skip"]
    browser.choose("#filter-pass", "")


def test_the_diff_follows_its_controls(browser: Page) -> None:
    browser.choose("#diff-point", "scale_loss")
    assert browser.one("#diff-count").text == "2 added, 1 removed"
    browser.write("#diff-search", "scaler.scale")
    assert [line.text[0] for line in browser.all("#changes div")] == ["+"]
    browser.write("#diff-search", "")
    browser.choose("#diff-point", "")


def test_the_timeline_zooms_tells_and_leads_to_the_node(browser: Page, run: DryRun) -> None:
    traces = browser.js("return document.getElementById('timeline').data.map(t => t.name)")
    assert "parameter" in traces
    browser.js("Plotly.relayout('timeline', {'xaxis.range[0]': 2, 'xaxis.range[1]': 9})")
    ranges = "document.getElementById('lifetimes').layout.xaxis.range"
    wait = f"const done = arguments[0]; setTimeout(() => done({ranges}), 500)"
    assert browser.driver.execute_async_script(wait) == [2, 9]
    browser.js("Plotly.relayout('timeline', {'xaxis.autorange': true})")
    hover = browser.js("return document.getElementById('lifetimes').data.flatMap(t => t.customdata || [])")
    sizes = {t.name: t for t in run.memory.tensors}
    assert any(name in sizes and sizes[name].dtype in text for name, text, *_ in hover)
    assert any(where.startswith("targets.py:") for *_, where, _ in hover)
    _click_a_bar(browser)
    chosen = browser.js("return document.querySelector('#lines .chosen').textContent")
    assert chosen.partition(":")[0] in {h[4] for h in hover} | {h[0] for h in hover}


def _click_a_bar(browser: Page) -> None:
    """A real mouse click in the middle of the first bar of the lifetimes."""
    from selenium.webdriver import ActionChains

    bar = browser.one("#lifetimes .bars .point path")
    browser.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", bar)
    drag = browser.one("#lifetimes .nsewdrag")
    box, area = bar.rect, drag.rect
    x = box["x"] + box["width"] / 2 - area["x"] - area["width"] / 2
    y = box["y"] + box["height"] / 2 - area["y"] - area["height"] / 2
    ActionChains(browser.driver).move_to_element_with_offset(drag, x, y).pause(0.3).click().perform()


def test_a_row_of_the_peak_leads_to_the_node(browser: Page) -> None:
    browser.click(browser.one("#peak tr.link"))
    assert browser.js("return document.querySelector('#lines .chosen') !== null")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(browser: Page, scheme: str, tmp_path: Path) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    colours = browser.js(
        "return ['body', 'section', '#lines .note', 'th', '#changes .plus', '#changes .minus'].map(s => {"
        "  const e = document.querySelector(s);"
        "  let b = e; while (getComputedStyle(b).backgroundColor === 'rgba(0, 0, 0, 0)') b = b.parentElement;"
        "  return [s, getComputedStyle(e).color, getComputedStyle(b).backgroundColor]; })"
    )
    for selector, text, back in colours:
        contrast = _contrast(_rgb(text), _rgb(back))
        assert contrast >= 4.5, f"{selector} in {scheme}: {text} on {back}"
    is_dark = sum(_rgb(colours[0][2])) < 3 * 128
    assert is_dark == (scheme == "dark")
    assert browser.driver.save_screenshot(str(tmp_path / f"{scheme}.png"))


def _rgb(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"[\d.]+", text)[:3]]


def _contrast(a: list[float], b: list[float]) -> float:
    """The contrast ratio of WCAG 2.2, section 1.4.3; 4.5 is its level AA for text."""

    def luminance(rgb: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
