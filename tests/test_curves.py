"""The drawing is well-formed XML, stands alone, and puts every number where it belongs."""

import xml.etree.ElementTree as ET

import pytest

from gemma_cot import curves, metrics

SVG = "{http://www.w3.org/2000/svg}"
TITLES = [panel.title for panel in curves.PANELS] + [curves.STAGE_TITLE]
GRPO = (
    "reward_format", "reward_process", "reward_outcome", "kl", "completion_tokens",
    "truncated_rate", "signal_share",
)  # fmt: skip


def stage(n, rate):
    keys = ("full_format_accuracy", "answer_accuracy", "process_score")
    rates = {key: rate for key in keys}
    return {"n": n} | rates | {f"{key}_interval": [rate - 0.1, rate + 0.05] for key in keys}


SUMMARY = {"stages": {"base": stage(849, 0.25), "sft": stage(849, 0.5), "grpo": stage(849, 0.75)}}


def rows_of(steps):
    rows = [{"stage": "sft", "step": s, "loss": 4.0 / s} for s in range(1, steps + 1)]
    values = {name: 0.5 for name in GRPO}
    return rows + [{"stage": "grpo", "step": s, **values} for s in range(1, steps + 1)]


def panels_of(svg):
    root = ET.fromstring(svg)
    return root, dict(zip(TITLES, root.findall(f"{SVG}g"), strict=True))


def texts(element):
    return [text.text for text in element.iter(f"{SVG}text")]


def test_every_panel_is_drawn_with_axes_legend_and_lines(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        for row in rows_of(40):
            values = {name: v for name, v in row.items() if name not in ("stage", "step")}
            writer.write(row["stage"], row["step"], values)
    out = tmp_path / "curves.svg"
    curves.draw_curves(tmp_path / "metrics.jsonl", SUMMARY, out)
    root, panels = panels_of(out.read_text())
    background = root.find(f"{SVG}rect")
    assert background.get("fill") == "#ffffff"
    assert (background.get("width"), background.get("height")) == ("1200", "580")
    for title, panel in panels.items():
        assert texts(panel)[0] == title
    for panel in curves.PANELS:
        drawn = panels[panel.title]
        assert {line.label for line in panel.lines} < set(texts(drawn))
        assert curves.X_TITLE in texts(drawn) and "20" in texts(drawn)  # a tick of 1 to 40
        lines = drawn.findall(f"{SVG}polyline")
        # Each metric twice: pale as it is, then strong and smoothed, in the colour of its legend.
        assert [line.get("stroke") for line in lines] == [
            line.colour for line in panel.lines for _ in range(2)
        ]
        assert [line.get("opacity") for line in lines] == ["0.3", None] * len(panel.lines)


def test_the_stage_panel_shows_rates_and_whiskers():
    _, panels = panels_of(curves.curves_svg([], SUMMARY))
    drawn = panels[curves.STAGE_TITLE]
    assert [t for t in texts(drawn) if "n = 849" in t] == [
        "base, n = 849",
        "sft, n = 849",
        "grpo, n = 849",
    ]
    circles = drawn.findall(f"{SVG}circle")
    # The plot spans y = 290 - 44 = 246 (0 %) up to 62 (100 %): 184 units; 25 % is at 246 - 46.
    assert [circle.get("cy") for circle in circles] == ["200.0"] * 3 + ["154.0"] * 3 + ["108.0"] * 3
    assert [t for t in texts(drawn) if t == "25.0"] == ["25.0"] * 3
    (whisker, *_) = [p for p in drawn.findall(f"{SVG}path") if p.get("stroke") == curves.BLUE]
    # 0.25 + 0.05 is at 246 - 0.30 * 184 = 190.8, 0.25 - 0.1 at 246 - 0.15 * 184 = 218.4.
    assert " 190.8V218.4M" in whisker.get("d")


def legend_of(drawn):
    """Return {colour of a mark: the name to its right}."""
    names = {float(text.get("x")): text.text for text in drawn.iter(f"{SVG}text")
             if text.get("y") == "43.0"}  # fmt: skip
    return {mark.get("fill"): names[float(mark.get("x")) + 17] for mark in drawn.iter(f"{SVG}rect")}


def test_every_name_of_a_legend_has_the_heights_of_its_metric():
    rates = {"full_format_accuracy": 0.75, "answer_accuracy": 0.5, "process_score": 0.25}
    rewards = {"reward_format": 0.75, "reward_process": 0.25, "reward_outcome": 0.5}
    rows = [{"stage": "grpo", "step": step, **rewards} for step in (1, 2)]
    _, panels = panels_of(curves.curves_svg(rows, {"stages": {"base": {"n": 4} | rates}}))
    height = {"75.0": "108.0", "50.0": "154.0", "25.0": "200.0"}  # 246 - 184 * rate
    drawn = panels["GRPO reward parts (unweighted)"]
    lines = {line.get("stroke"): line.get("points").split(",")[-1]
             for line in drawn.iter(f"{SVG}polyline")}  # fmt: skip
    assert {name: lines[colour] for colour, name in legend_of(drawn).items()} == {
        "format": height["75.0"], "process": height["25.0"], "outcome": height["50.0"],
    }  # fmt: skip
    drawn = panels[curves.STAGE_TITLE]
    points = {point.get("fill"): point.get("cy") for point in drawn.iter(f"{SVG}circle")}
    numbers = {text.get("fill"): text.text for text in drawn.iter(f"{SVG}text")}
    legend = legend_of(drawn)
    assert {name: numbers[colour] for colour, name in legend.items()} == {
        "full format": "75.0", "answer": "50.0", "process": "25.0",
    }  # fmt: skip
    assert all(points[colour] == height[numbers[colour]] for colour in legend)


def test_lines_pass_through_their_values():
    rows = [{"stage": "sft", "step": s, "loss": loss} for s, loss in ((0, 1.0), (5, 3.0), (10, 5))]
    _, panels = panels_of(curves.curves_svg(rows, None))
    raw = panels["SFT loss (nats a token)"].find(f"{SVG}polyline")
    # y axis 0 to 5 on 184 units from 246 up; x axis 0 to 10 on 400 - 56 - 18 = 326 units from 56.
    assert raw.get("points") == "56.0,209.2 219.0,135.6 382.0,62.0"


def test_smoothing_keeps_slopes_and_averages_noise():
    slope = [(s, 2.0 * s) for s in range(100)]
    smooth = dict(curves._smooth(slope))
    assert all(smooth[s] == pytest.approx(value) for s, value in slope[5:95])
    noise = [(s, float(s % 2)) for s in range(100)]  # half = 5: 11 points, 5 or 6 of them are 1
    inner = [value for _, value in curves._smooth(noise)[5:95]]
    assert set(inner) == {5 / 11, 6 / 11}
    assert curves._smooth(noise)[0] == (0, 0.5)  # steps 0 to 5: 0 1 0 1 0 1
    assert curves._smooth([(1, 7.0)]) == [(1, 7.0)] and curves._smooth([]) == []


def test_gaps_and_missing_parts_leave_the_rest_standing():
    rows = [{"stage": "sft", "step": s, "loss": None if s == 2 else 1.0} for s in (1, 2, 3)]
    summary = {"stages": {"base": stage(10, 0.5), "sft": None}}
    _, panels = panels_of(curves.curves_svg(rows, summary))
    raw = panels["SFT loss (nats a token)"].find(f"{SVG}polyline")
    assert len(raw.get("points").split()) == 2
    for panel in curves.PANELS[1:]:
        assert "no grpo steps in metrics.jsonl" in texts(panels[panel.title])
    words = texts(panels[curves.STAGE_TITLE])
    assert "base, n = 10" in words and "sft: not evaluated" in words
    _, panels = panels_of(curves.curves_svg([], {"stages": {}}))
    assert "no evaluation in summary.json" in texts(panels[curves.STAGE_TITLE])


def test_a_run_that_has_not_begun_is_drawn_too(tmp_path):
    curves.draw_curves(tmp_path / "absent.jsonl", None, tmp_path / "out.svg")
    root, panels = panels_of((tmp_path / "out.svg").read_text())
    assert len(panels) == 6 and not list(root.iter(f"{SVG}polyline"))


def test_one_step_and_one_value_do_not_divide_by_zero():
    rows = [{"stage": "sft", "step": 7, "loss": 0.0}]
    _, panels = panels_of(curves.curves_svg(rows, None))
    dots = panels["SFT loss (nats a token)"].findall(f"{SVG}circle")
    assert {(dot.get("cx"), dot.get("cy")) for dot in dots} == {("56.0", "246.0")}


def test_a_long_run_is_thinned_and_keeps_its_last_step():
    rows = [{"stage": "sft", "step": s, "loss": float(s < 19_999)} for s in range(20_000)]
    svg = curves.curves_svg(rows, None)
    _, panels = panels_of(svg)
    points = panels["SFT loss (nats a token)"].find(f"{SVG}polyline").get("points").split()
    assert 600 <= len(points) <= 1200 and points[-1] == "382.0,246.0"
    assert len(svg) < 60_000


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 0.037, [0, 0.01, 0.02, 0.03]),
        (1, 500, [100, 200, 300, 400, 500]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_inside(low, high, want):
    assert curves._ticks(low, high) == pytest.approx(want)


def test_step_ticks_are_whole_and_numbers_are_written_out():
    assert curves._ticks(1, 3, whole=True) == [1, 2, 3]
    assert [curves._number(v) for v in (1500.0, 0.1 + 0.2, 0.0)] == ["1500", "0.3", "0"]
    assert curves._y_range([0.2, 0.37]) == (0.0, pytest.approx(0.4))
    assert curves._y_range([-0.4, 2.0])[0] == pytest.approx(-0.5)


def test_text_is_escaped_and_nothing_is_loaded_from_outside():
    evil = {"stages": {"base": stage('<b>&"</b>', 0.5)}}
    svg = curves.curves_svg(rows_of(3), evil)
    assert "<b>" not in svg
    assert 'base, n = <b>&"</b>' in texts(ET.fromstring(svg))
    assert svg.count("http") == 1 and "href" not in svg and "<script" not in svg  # the namespace
