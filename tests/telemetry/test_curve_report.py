"""The text curve and the HTML report show the values they are given."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from hpc_rl.telemetry.curve import curve, sparkline
from hpc_rl.telemetry.metrics import MetricsLog
from hpc_rl.telemetry.report import write_report


def test_a_rising_curve_rises() -> None:
    text = curve([(0, 0.1), (10, 0.5), (20, 0.9)], title="eval/accuracy", width=20, height=5, low=0, high=1)
    lines = text.splitlines()
    assert lines[0] == "eval/accuracy  0.100 -> 0.900"
    columns = [row.index("•") for row in lines[1:6] if "•" in row]
    assert columns == sorted(columns, reverse=True)  # the highest row holds the right end
    assert lines[1].startswith("   1.000")
    assert lines[5].startswith("   0.000")
    assert lines[-1].split() == ["0", "20"]


def test_odd_inputs_draw() -> None:
    assert curve([], title="x") == "x: no values yet"
    assert "0.500 -> 0.500" in curve([(1, 0.5)])
    assert curve([(0, float("nan"))]) == "no values yet"
    assert curve([(0, 1.0), (1, 1.0)], ascii_only=True).isascii()
    assert sparkline([0, 1]) == "▁█"
    assert sparkline([]) == ""


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "polyline", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_whole_page_without_network(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    for step in range(4):
        log.append(step, {"rollout/reward_mean": step / 3, "time/step_s": 2.0, "train/loss": float("nan")})
    path = write_report(
        log.path,
        tmp_path / "report.html",
        name="a <b> run",
        facts={"state": "COMPLETED"},
        attempts=[{"attempt": 1}],
    )
    page = path.read_text()
    parser = _Tags()
    parser.feed(page)
    assert parser.open == []
    lines = [attrs["points"] for tag, attrs in parser.seen if tag == "polyline"]
    assert len(lines) == 2
    assert all(len((points or "").split()) == 4 for points in lines)
    assert "a &lt;b&gt; run" in page
    assert "COMPLETED" in page
    assert "http" not in page
    assert "<script" not in page
    assert "src=" not in page


def test_a_report_of_a_run_without_steps(tmp_path: Path) -> None:
    assert (
        "No step was finished" in write_report(tmp_path / "none", tmp_path / "r.html", name="x").read_text()
    )
