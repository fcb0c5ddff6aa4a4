"""The page in a real browser, against a real pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from ray_pipeline.config import load_settings
from tests.conftest import Running, wait_for

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def urls(pipeline: Running) -> dict[str, str]:
    found = dict(pipeline.info()["urls"])
    wait_for("two windows", lambda: len(get(found, "/metrics/history")["windows"]) > 1, 90)
    return found


def get(urls: dict[str, str], path: str) -> Any:
    return httpx.get(urls["api"] + path, timeout=20).json()


@pytest.fixture
def board(page: Page, urls: dict[str, str]) -> Iterator[Page]:
    """The page, open; fails when it asked any other host for anything, or its console shows an error."""
    strangers: list[str] = []
    errors: list[str] = []
    page.on(
        "request",
        lambda r: strangers.append(r.url) if not re.match(r"(http://127\.0\.0\.1:|data:|blob:)", r.url) else None,
    )
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.goto(urls["ui"])
    expect(page.locator(".rp-tiles")).to_be_visible(timeout=30_000)
    yield page
    assert strangers == []
    assert errors == []


def tile(page: Page, label: str) -> str:
    return (
        page.locator(".rp-tile", has=page.locator("span", has_text=re.compile(f"^{label}$"))).locator("b").inner_text()
    )


def number(text: str) -> float:
    found = re.sub(r"[^\d.]", "", text)
    return float(found) if found else -1.0


def wait_until_it_has_refreshed(page: Page) -> None:
    """What the page sets by itself when it is opened, it has set then."""
    first = page.locator(".rp-tiles").inner_text()
    wait_for("a refresh", lambda: page.locator(".rp-tiles").inner_text() != first, 30)


def test_it_shows_the_stream_live(board: Page) -> None:
    expect(board.locator(".rp-health")).to_contain_text("healthy", timeout=60_000)
    wait_for("a delivered rate", lambda: 150 < number(tile(board, "Delivered")) < 250)
    before = number(tile(board, "Counted"))
    wait_for("more counted", lambda: number(tile(board, "Counted")) > before > 0)
    for label in (
        "Target",
        "Ratings a minute",
        "Mean rating",
        "Latency p50",
        "Lag",
        "Batch",
        "Watermark delay",
        "Dropped as late",
    ):
        wait_for(label, lambda label=label: re.search(r"\d", tile(board, label)))
    expect(board.locator("#rp-movies tbody tr")).to_have_count(10)
    expect(board.locator("#rp-tail tbody tr")).to_have_count(8)
    expect(board.locator("#rp-actors tbody tr")).to_have_count(4)
    assert board.locator("#rp-count canvas, #rp-count svg").count() >= 1


def test_top_movies_are_those_of_the_api(board: Page, urls: dict[str, str]) -> None:
    def same() -> bool:
        shown = board.locator("#rp-movies tbody tr td:nth-child(2)").all_inner_texts()
        movies = get(urls, "/metrics/topn?limit=10")["movies"]
        return shown[:3] == [f"{m['title']} {m['movieId']}" for m in movies[:3]]

    wait_for("the same movies", same, 30)


def test_rate_pause_and_resume_act_on_the_generator(board: Page, urls: dict[str, str]) -> None:
    def generator() -> Any:
        return get(urls, "/metrics/summary")["generator"]

    field, slider = board.locator("#rp-rate input"), board.locator("#rp-slider input[type=range]")
    expect(field).to_have_value(f"{generator()['target_rate']:g}", timeout=10_000)
    slider.press("ArrowRight")
    expect(field).to_have_value("220", timeout=10_000)
    expect(board.locator("#rp-said")).to_contain_text("rate 220/s", timeout=15_000)
    wait_for("the target", lambda: generator()["target_rate"] == 220, 15)
    board.click("#rp-pause")
    wait_for("paused", lambda: generator()["state"] == "paused", 15)
    wait_for("nothing delivered", lambda: number(tile(board, "Delivered")) == 0, 15)
    expect(board.locator(".rp-head")).to_contain_text("paused")
    # rates between and beyond the positions of the slider; nothing is sent in a pause
    for rate in ("0.25", "2500000", "200"):
        field.fill(rate)
        field.press("Enter")
        wait_for("the target", lambda rate=rate: generator()["target_rate"] == float(rate), 15)
        expect(field).to_have_value(rate)
    board.click("#rp-resume")
    wait_for("running", lambda: generator()["state"] == "running", 15)
    field.fill("0")
    field.press("Enter")
    expect(board.locator("#rp-said")).to_contain_text("not a number above 0", timeout=10_000)
    expect(field).to_have_value("200")


def test_the_rate_follows_whoever_changes_it_but_not_under_the_fingers_of_who_types(
    board: Page, urls: dict[str, str]
) -> None:
    field, slider = board.locator("#rp-rate input"), board.locator("#rp-slider input[type=range]")

    def told(rate: float) -> None:
        httpx.post(urls["api"] + "/control/rate", json={"rate": rate}, timeout=20)

    told(250)
    expect(field).to_have_value("250", timeout=15_000)
    at_250 = slider.input_value()
    field.click()
    field.press("End")
    field.press_sequentially("0")
    told(180)
    wait_for("it was heard of", lambda: number(tile(board, "Target")) == 180, 15)
    expect(field).to_have_value("2500")
    field.press("Backspace")
    board.locator("h1").click()  # left as it was found: nothing is sent
    expect(field).to_have_value("180", timeout=10_000)
    assert float(slider.input_value()) < float(at_250)
    told(200)
    expect(field).to_have_value("200", timeout=15_000)


def test_a_burst_is_dragged_into_the_plan_and_the_stream_follows(board: Page, urls: dict[str, str]) -> None:
    def plan() -> Any:
        return get(urls, "/metrics/plan")["plan"]

    wait_until_it_has_refreshed(board)
    field, said = board.locator("#rp-plan textarea"), board.locator("#rp-plan-said")
    expect(field).to_have_value("200", timeout=10_000)
    box = field.bounding_box()
    assert box is not None
    end = {"x": box["width"] - 20, "y": box["height"] / 2}
    board.locator("[data-rp-piece]", has_text="burst").drag_to(field, target_position=end)
    expect(field).to_have_value("200 + burst(500 for 5s every 30s)", timeout=10_000)
    assert plan() is None  # not yet
    board.click("#rp-follow")
    expect(board.locator("#rp-said")).to_contain_text("plan: done", timeout=10_000)
    wait_for("the plan", lambda: plan() == "200 + burst(500 for 5s every 30s)", 10)
    wait_for("the burst", lambda: number(tile(board, "Delivered")) > 500)  # this one or the next
    assert board.locator("#rp-curve canvas, #rp-curve svg").count() >= 1
    field.fill("200 then 3")
    expect(said).to_contain_text("character 5", timeout=10_000)
    board.click("#rp-follow")
    expect(board.locator("#rp-said")).to_contain_text("character 5", timeout=10_000)
    field.fill("200")
    expect(said).not_to_contain_text("character", timeout=10_000)
    board.click("#rp-follow")
    wait_for("the plan", lambda: plan() == "200", 10)
    httpx.post(urls["api"] + "/control/rate", json={"rate": 210}, timeout=20)
    expect(field).to_have_value("210", timeout=15_000)  # whoever changed it, while nobody writes here
    httpx.post(urls["api"] + "/control/rate", json={"rate": 200}, timeout=20)
    wait_for("the rate", lambda: plan() is None, 10)


def test_windows_are_shown_with_what_they_must_hold(board: Page) -> None:
    expect(board.locator("#rp-windows tbody tr").last).to_contain_text("verified", timeout=60_000)
    assert number(tile(board, "Windows verified")) > 0 and number(tile(board, "Windows wrong")) == 0


def test_a_click_on_a_rating_tells_where_it_comes_from(board: Page) -> None:
    board.locator("#rp-tail tbody tr").first.click()
    expect(board.locator("#rp-explained")).to_contain_text("byte for byte the same", timeout=60_000)
    expect(board.locator("#rp-explained")).to_contain_text("noise")


def test_choices_of_window_and_refresh(board: Page, urls: dict[str, str]) -> None:
    sliding = get(urls, "/metrics/summary")["windows"]["sliding_30s_10s"]["count"]
    assert sliding > 2_500  # far more than a tumbling window can hold
    board.locator("#rp-window label", has_text="sliding").click()

    def top_of_sliding() -> bool:
        shown = board.locator("#rp-movies tbody tr td:nth-child(3)").first.inner_text()
        movies = get(urls, "/metrics/topn?limit=1&window_type=sliding_30s_10s")["movies"]
        return abs(number(shown) - movies[0]["count"]) < 0.2 * movies[0]["count"]

    wait_for("sliding windows", top_of_sliding, 20)
    board.locator("#rp-every label", has_text="1 s").click()
    before = number(tile(board, "Counted"))
    wait_for("still refreshed", lambda: number(tile(board, "Counted")) > before, 10)


def test_another_stream_is_put_together_and_shown_beside_the_one_that_runs(board: Page, urls: dict[str, str]) -> None:
    wait_until_it_has_refreshed(board)
    told, preview = board.locator("#rp-told"), board.locator("#rp-preview")
    expect(board.locator("#rp-preview")).to_be_hidden()
    board.get_by_text("Workload: put another stream together").click()
    expect(told).to_contain_text("values of the stream in force", timeout=20_000)
    expect(board.locator("#rp-set-rate input")).to_have_value(
        f"{get(urls, '/metrics/summary')['generator']['target_rate']:g}"
    )
    groups = board.locator("#rp-groups")
    groups.get_by_role("tab", name="Late and broken data").click()
    late = board.locator("#rp-set-late_share input[type=number]")
    late.fill("0.25")
    late.press("Enter")
    expect(told).to_contain_text("late share 0 → 0.25", timeout=20_000)
    row = preview.locator("tr", has_text="at another time than due").locator("td")
    expect(row.nth(1)).to_have_text("0.0 %", timeout=20_000)
    expect(row.nth(2)).to_have_text(re.compile(r"2[3-7]\.\d %"))
    command, file = board.locator("#rp-command pre").inner_text(), board.locator("#rp-file pre").inner_text()
    assert re.search(r"ray-pipeline run .*--late-share 0.25 .*--state-dir ", command) and "late_share = 0.25" in file
    with board.expect_download() as downloaded:
        board.locator("#rp-file a").click()
    assert load_settings(downloaded.value.path()).late_share == 0.25
    # what is no value, and values that are none together: the settings model says what is wrong
    late.fill("3")
    expect(told.get_by_role("alert")).to_contain_text("setting late_share", timeout=20_000)
    late.fill("0.25")
    expect(told).to_contain_text("late share 0 → 0.25", timeout=20_000)
    groups.get_by_role("tab", name="Users and movies").click()
    bias = board.locator("#rp-set-user_bias_share input[type=number]")
    bias.fill("0.9")
    bias.press("Enter")
    expect(told.get_by_role("alert")).to_contain_text(
        "user_bias_share + movie_bias_share + factor_share is more than 1", timeout=20_000
    )
    expect(board.locator("#rp-command")).to_have_count(0)
    # a preset fills the controls, also those of groups that nobody has looked at
    board.locator("#rp-preset input").click()
    board.get_by_role("option", name="review-bomb").click()
    expect(board.locator("#rp-command")).to_contain_text("--preset review-bomb", timeout=20_000)
    expect(told).to_contain_text("attack")
    groups.get_by_role("tab", name="How people behave").click()
    expect(board.locator("#rp-set-attack textarea")).to_have_value(re.compile("review-bomb movie=318"))
    board.click("#rp-as-in-force")
    expect(told).to_contain_text("values of the stream in force", timeout=20_000)
    assert get(urls, "/metrics/summary")["generator"]["state"] == "running"  # nothing of it touched the stream


_WATCH = """() => {
  const parts = [...document.querySelectorAll("svg.marks, .rp-tiles, .rp-table")].map((part) => part.closest("[id]"));
  const plots = [...document.querySelectorAll("svg.marks")];
  const seen = (window.seen = {parts: parts.length, plots: plots.length, frames: 0, refreshes: 0, shifted: 0, faults: {}});
  const look = () => {
    seen.frames += 1;
    for (const plot of plots) if (!plot.isConnected) seen.faults["a plot was replaced"] = true;
    for (const part of parts) {
      const inside = part.querySelector("svg.marks, .rp-tiles, .rp-table");
      if (!part.isConnected || !inside?.getClientRects()[0]?.height) seen.faults[`${part.id} was empty`] = true;
    }
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
  const tiles = document.querySelector(".rp-tiles").closest("[id]");
  new MutationObserver(() => (seen.refreshes += 1)).observe(tiles, {childList: true, characterData: true, subtree: true});
  const shifts = new PerformanceObserver((list) => list.getEntries().forEach((entry) => (seen.shifted += entry.value)));
  shifts.observe({type: "layout-shift"});
}"""


def test_left_open_it_neither_flickers_nor_grows(board: Page, urls: dict[str, str]) -> None:
    board.locator("#rp-every label", has_text="1 s").click()
    port = urlsplit(urls["ui"]).port
    listening = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port)
    server = psutil.Process(next(listening).pid)
    browser = board.context.new_cdp_session(board)
    browser.send("Performance.enable")

    def grown() -> dict[str, float]:
        """Megabytes of the page's live objects and of the process that serves it; nodes, detached ones too."""
        browser.send("HeapProfiler.collectGarbage")
        found = {metric["name"]: metric["value"] for metric in browser.send("Performance.getMetrics")["metrics"]}
        heap, nodes = found["JSHeapUsedSize"] / 1e6, found["Nodes"]
        return {"heap": heap, "nodes": nodes, "served": server.memory_info().rss / 1e6}

    def refreshed(times: int) -> Any:
        board.evaluate(_WATCH)
        wait_for("refreshes", lambda: board.evaluate("seen.refreshes") >= times, 60)
        return board.evaluate("seen")

    refreshed(5)
    before = grown()
    seen = refreshed(15)
    assert seen["plots"] == 5 and seen["parts"] >= 9 and seen["frames"] > 100
    assert seen["faults"] == {} and seen["shifted"] < 0.01
    most = {"heap": before["heap"] + 10, "nodes": 1.1 * before["nodes"], "served": before["served"] + 30}
    # it goes up and down by some megabytes; what leaks does not come down
    wait_for(f"it to be no more than {most}", lambda: all(n <= most[name] for name, n in grown().items()), 60)


_NOTHING_CUT_OFF = """() => {
  const plots = [...document.querySelectorAll("svg.marks")];
  const within = (text, plot) => text.getBoundingClientRect().left >= plot.getBoundingClientRect().left - 1;
  return plots.length >= 5 && plots.every((plot) => [...plot.querySelectorAll("text")].every((text) => within(text, plot)));
}"""
"""Numbers of charts, whatever they were when the page was opened."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 420])
def test_it_fits_wide_and_narrow_light_and_dark(
    browser: Browser, urls: dict[str, str], scheme: Any, width: int, tmp_path: Any
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(urls["ui"])
    expect(page.locator("#rp-movies tbody tr")).to_have_count(10, timeout=30_000)
    page.get_by_text("Workload: put another stream together").click()
    expect(page.locator("#rp-preview svg").first).to_be_visible(timeout=30_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width + 1
    page.wait_for_function(_NOTHING_CUT_OFF, timeout=30_000)
    background, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.rp-tile b')).color]"
    )
    brightness: Callable[[str], float] = lambda c: sum(map(float, re.findall(r"[\d.]+", c)[:3])) / 3  # noqa: E731
    difference = brightness(ink) - brightness(background)
    assert difference > 100 if scheme == "dark" else difference < -100
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    page.set_viewport_size({"width": 390, "height": 900})  # and when the window is made smaller
    page.wait_for_function("document.documentElement.scrollWidth <= 391", timeout=30_000)
    page.close()


def test_the_api_docs_open_offline(page: Page, urls: dict[str, str]) -> None:
    strangers: list[str] = []
    page.on(
        "request", lambda r: strangers.append(r.url) if not r.url.startswith(("http://127.0.0.1", "data:")) else None
    )
    page.goto(urls["api"] + "/docs")
    expect(page.locator("#swagger-ui")).to_contain_text("/metrics/summary", timeout=30_000)
    assert strangers == []
