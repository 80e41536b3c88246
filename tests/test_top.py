"""What a server does, read from its metrics: the numbers, the terminal, the page in a browser."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import browsing
from endpoint import Endpoint, client, running
from metrics_text import COUNTERS, GAUGES, metrics_text, telling
from rich.console import Console
from typer.testing import CliRunner

from specserve.cli import app
from specserve.view import watch as watching
from specserve.view.frame import Attainment, Frame, between
from specserve.view.read import read
from specserve.view.samples import parse
from specserve.view.terminal import render
from specserve.view.watch import Watch


def frame(seconds: float = 2.0) -> Frame:
    """Return what happened in so many seconds at the known rates."""
    return between(
        parse(metrics_text(10.0), 10.0), parse(metrics_text(10.0 + seconds), 10.0 + seconds)
    )


def shown(what: Frame, width: int = 120) -> str:
    """Return a frame as the terminal shows it."""
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(render(what))
    return capture.get()


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_rates_do_not_depend_on_how_long_one_looks(seconds: float) -> None:
    now = frame(seconds)
    assert now.tokens_per_s == pytest.approx(150)
    assert now.steps_per_s == pytest.approx(20)
    assert now.acceptance_length == pytest.approx(3.0), "150 tokens of 50 rows"
    assert now.draft_length == pytest.approx(4.0), "200 tokens for 50 rows"
    assert now.acceptance_rate == pytest.approx(0.8)
    assert now.step_ms == pytest.approx(40)
    assert (now.measured_ms, now.predicted_ms) == (pytest.approx(37), pytest.approx(36))
    assert (now.draft_ms, now.verify_ms) == (pytest.approx(5), pytest.approx(30))
    assert now.outside_share == pytest.approx(1 / 8)
    assert now.kv_used == pytest.approx(0.25)
    assert now.draft_available is True
    assert now.acceptance_by_position == {
        "0": pytest.approx(0.8), "1": pytest.approx(0.5), "10": pytest.approx(0.2)
    }  # fmt: skip
    assert now.requests_per_s == {"finished": pytest.approx(4), "cancelled": pytest.approx(0.5)}
    assert now.decisions_per_s["owed"] == pytest.approx(4)
    assert now.prediction_error == {"verify 0.5": 0.03, "verify 0.95": 0.21}


def test_attainment_is_told_by_class() -> None:
    classes = frame().attainment
    assert classes["interactive"] == Attainment(
        pytest.approx(0.9), pytest.approx(0.9), pytest.approx(0.25)
    )
    assert classes["batch"] == Attainment(pytest.approx(1.0), pytest.approx(1.0), None)


def test_class_without_requests_in_this_time_keeps_its_total() -> None:
    idle = between(parse(metrics_text(10.0), 10.0), parse(metrics_text(10.0), 11.0))
    assert idle.attainment["interactive"] == Attainment(None, pytest.approx(0.9), 0.25)


def test_class_with_nothing_finished_shows_its_slack() -> None:
    text = 'specserve_slo_slack_seconds{class="a"} -0.5\n'
    classes = between(parse("", 0.0), parse(text, 1.0)).attainment
    assert classes == {"a": Attainment(None, None, -0.5)}


def test_server_that_has_restarted_counts_from_zero() -> None:
    after = between(parse(metrics_text(100.0), 10.0), parse(metrics_text(1.0), 11.0))
    assert after.tokens_per_s == pytest.approx(150)


@pytest.mark.parametrize("missing", [*COUNTERS, *GAUGES])
def test_any_metric_may_be_absent(missing: str) -> None:
    """Servers of other versions lack some; what needs them is empty, the rest is there."""
    name = missing.split("{")[0]
    texts = [
        "\n".join(line for line in metrics_text(t).splitlines() if f"specserve_{name}" not in line)
        for t in (1.0, 2.0)
    ]
    now = between(parse(texts[0], 1.0), parse(texts[1], 2.0))
    assert shown(now)
    assert now.as_json()
    assert (now.tokens_per_s is None) == (name == "output_tokens_total")


def test_nothing_known_is_nothing_shown() -> None:
    nothing = between(parse("", 1.0), parse("nv_inference_count 1\n", 2.0))
    assert nothing.tokens_per_s is None
    assert nothing.draft_available is None
    assert not re.search(r"\d", shown(nothing))


def test_value_that_is_no_number_is_left_out() -> None:
    samples = parse("specserve_acceptance_calibration_error NaN\nspecserve_x +Inf\n", 0.0)
    assert not samples.values


# -- the terminal ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120, 200])
def test_terminal_shows_every_number_within_its_width(width: int) -> None:
    text = shown(frame(), width)
    words = ["150 tokens/s", "3.00", "4.00", "80 %", "40.0 ms", "37.0 ms", "36.0 ms", "p95", "21 %"]
    words += ["speculating", "interactive", "90 %", "250.0 ms", "owed", "0.040", "25 %"]
    assert [word for word in words if word not in text] == []
    assert max(map(len, text.splitlines())) <= width
    assert re.findall(r"(\d+) +█+ +\d+ %", text) == ["0", "1", "10"]


def test_top_prints_one_view_of_a_server() -> None:
    started_s = time.monotonic()
    with telling(lambda: metrics_text(time.monotonic() - started_s)) as port:
        arguments = ["top", "--once", "--interval-s", "0.3", "--metrics-port", str(port)]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "speculating" in result.output
    assert "3.00" in result.output


def test_top_without_a_server_says_so() -> None:
    result = CliRunner().invoke(app, ["top", "--once", "--metrics-port", "1"])
    assert result.exit_code == 2
    assert "127.0.0.1:1" in result.output
    assert "is the server up?" in result.output


def test_metrics_that_are_none_are_an_error() -> None:
    with telling(lambda: "{not metrics") as port:
        with pytest.raises(OSError, match="404"):
            read(f"http://127.0.0.1:{port}/elsewhere")
        assert not read(f"http://127.0.0.1:{port}/metrics").values


@pytest.mark.triton
@pytest.mark.openvino
def test_top_and_page_of_a_real_server(endpoint: Endpoint) -> None:
    port = endpoint.server.metrics_port
    with client(endpoint.url) as http:
        http.get("/live/data")
        endpoint.post("completions", prompt="class A:", max_tokens=60, ignore_eos=True)
        arguments = ["top", "--once", "--interval-s", "0.5", "--metrics-port", str(port)]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
        assert result.exit_code == 0, result.output
        assert "speculating" in result.output
        deadline = time.monotonic() + 20
        while not any(one["tokens_per_s"] for one in http.get("/live/data").json()["frames"]):
            assert time.monotonic() < deadline, "the page never sees the tokens"
            time.sleep(0.2)


# -- the history -------------------------------------------------------------------------------


def test_history_grows_while_somebody_looks_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "INTERVAL_S", 0.02)
    monkeypatch.setattr(watching, "LOOK_S", 0.3)
    started_s, num_reads = time.monotonic(), 0

    def text() -> str:
        nonlocal num_reads
        num_reads += 1
        return metrics_text(time.monotonic() - started_s)

    async def look(port: int) -> None:
        watch = Watch(f"http://127.0.0.1:{port}/metrics")
        assert await watch.frames() == []
        while len(frames := await watch.frames()) < 3:
            await asyncio.sleep(0.02)
        assert [one.time_s for one in frames] == sorted(one.time_s for one in frames)
        assert all(one.time_s > frames[1].time_s for one in await watch.frames(frames[1].time_s))
        before = -1
        while num_reads != before:  # nobody looks any more
            before = num_reads
            await asyncio.sleep(0.5)

    with telling(text) as port:
        asyncio.run(asyncio.wait_for(look(port), 20))


def test_gap_of_the_server_is_a_gap_of_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "INTERVAL_S", 0.02)
    watch = Watch("http://127.0.0.1:1/metrics")

    async def look() -> None:
        for _ in range(5):
            assert await watch.frames() == []
            await asyncio.sleep(0.02)

    asyncio.run(look())


# -- the page ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """The address of a page that shows the known rates."""
    started_s = time.monotonic()
    with (
        telling(lambda: metrics_text(time.monotonic() - started_s)) as port,
        running(1, port) as (url, _),
    ):
        yield url


@pytest.mark.slow
def test_page_shows_the_server_in_a_browser(page: str, tmp_path: Path) -> None:
    shown = {
        "acceptance_length": "3.00",
        "draft_length": "4.00",
        "acceptance_rate": "80 %",
        "measured_ms": "37.0",
        "predicted_ms": "36.0",
        "prediction_error": "error of verify: p50 3 %, p95 21 %",
        "draft_available": "on",
        "requests_running": "5",
    }

    async def look() -> None:
        async with browsing(page, tmp_path) as browser:
            await browser.wait_for("status", "serving")
            assert {name: await browser.text(name) for name in shown} == shown
            assert "90 % (now 90 %)" in await browser.text("attainment")
            assert "owed" in await browser.text("decisions")
            assert 100 < int(await browser.text("tokens_per_s")) < 200
            positions = (await browser.text("positions")).split()
            assert positions == ["0", "80", "%", "1", "50", "%", "10", "20", "%"]
            while await browser.value(SHORTEST_LINE) < 2:
                await asyncio.sleep(0.1)
            assert await browser.value("document.body.scrollWidth <= innerWidth")
            assert len(await browser.picture()) > 20_000
            assert browser.complaints == []

    asyncio.run(look())


# How many pieces the shortest of the five lines has.
SHORTEST_LINE = """
Math.min(...[...document.querySelectorAll(".chart path")].map((line) =>
  line.getAttribute("d").split("L").length))
"""


@pytest.mark.slow
def test_page_says_when_there_is_no_server(tmp_path: Path) -> None:
    async def look(url: str) -> None:
        async with browsing(url, tmp_path) as browser:
            await browser.wait_for("status", "no reading for")
            assert await browser.text("tokens_per_s") == "\u2013"
            assert browser.complaints == []

    with running(1, 1) as (url, _):
        asyncio.run(look(url))


def test_page_takes_a_key_from_its_address(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a key/of ours", encoding="utf-8")
    started_s = time.monotonic()

    async def look(url: str) -> None:
        async with browsing(url, tmp_path / "without") as browser:
            await browser.wait_for("status", "asks for a key")
        async with browsing(f"{url}/#a%20key%2Fof%20ours", tmp_path / "with") as browser:
            await browser.wait_for("acceptance_rate", "80 %")

    with (
        telling(lambda: metrics_text(time.monotonic() - started_s)) as port,
        running(1, port, [f"openai.api_key_file={keys}"]) as (url, _),
    ):
        asyncio.run(look(url))


def test_page_loads_nothing_from_elsewhere(page: str) -> None:
    with client(page) as http:
        for path in ("/", "/live.css", "/live.js"):
            answer = http.get(path)
            assert answer.status_code == 200
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            outside = re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", answer.text)
            assert set(outside) <= {"http://www.w3.org/2000/svg"}
