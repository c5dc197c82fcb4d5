"""The file of a report: everything inside, nothing executable but its own script, small enough."""

import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from commands import refused_line
from report_browser import ATTACK

from gemma_cot.config import PRESETS, TrainConfig
from gemma_cot.report.gather import gather
from gemma_cot.report.page import embed, report_html, step_html
from gemma_cot.report.panels import figures, panels_of
from gemma_cot.report.sections import record_html, side_by_side


@pytest.fixture(scope="module")
def html(small_run) -> str:
    return report_html(gather(small_run))


def test_nothing_that_a_run_says_is_markup(html):
    assert html.count("<script") == html.count("</script>") == 2  # the data, and page.js
    assert "<img" not in html and "onerror='window" not in html.split('id="data">')[0]
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1]
    assert "<" not in data
    trace = json.loads(data)["steps"][0]["groups"][0]
    assert trace["prompt"] == f"What is 4 * 2 + 0? {ATTACK}"  # whole, as text


def test_nothing_is_asked_of_the_network(html):
    addresses = set(re.findall(r"[a-z]+://[^\s\"'<)]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of SVG, which is no address
    assert not re.search(r"<link(?! rel=\"icon\" href=\"data:,\")|@import|url\(", html)


def test_no_script_may_run_but_the_one_of_the_page(html):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1]
    script = re.search(r"<script>(.*?)</script>", html, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy


def test_data_survive_the_way_into_the_page():
    data = {"text": f"{ATTACK} é \u2029", "number": [1, None, -0.5]}
    text = embed(data)
    assert json.loads(text) == data and not re.search("[<\u2028\u2029]", text)


def test_the_table_has_rates_intervals_and_paired_tests(html):
    assert '<th scope="row">grpo</th><td>100.0 % <small>(91.2 to 100.0)</small></td>' in html
    assert "<td>50.0 % <small>(35.2 to 64.8)</small></td>" in html  # Wilson, 20 of 40
    row = '<th scope="row">sft -&gt; grpo, answer</th><td>16</td><td>4</td><td>0.012</td>'
    assert row + "<td>better</td>" in html


def test_every_metric_of_the_brief_has_a_curve(small_run):
    drawn = {line.metric for panel in panels_of(gather(small_run)) for line in panel.lines}
    assert drawn >= {
        "reward", "reward_format", "reward_process", "reward_outcome", "reward_short", "kl",
        "entropy", "completion_tokens", "truncated_rate", "signal_share", "seconds_rollout",
        "seconds_reward", "seconds_update", "memory_gib", "loss",
    }  # fmt: skip


def test_completions_stand_side_by_side_by_what_became_of_the_answer(small_run):
    text = side_by_side(gather(small_run))
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles == [
        "lost by grpo: 4 prompts", "gained by grpo: 16 prompts, 8 of them here",
        "gained by sft: 4 prompts", "wrong at every stage: 16 prompts, 8 of them here",
    ]  # fmt: skip
    first = text.split("</details>")[0]
    assert [first.index(f"<h4>{stage}</h4>") for stage in ("base", "sft", "grpo")] == sorted(
        first.index(f"<h4>{stage}</h4>") for stage in ("base", "sft", "grpo")
    )


def test_settings_versions_and_data_card_are_there(html):
    assert "<code>--grpo_steps</code></th><td><code>40</code>" in html
    assert '<th scope="row">jax</th><td>0.10.2</td>' in html
    assert "data card: " in html and "# Data card" in html


def test_a_preset_is_named_only_where_all_of_it_holds(small_run):
    run = gather(small_run)
    words = "Every setting of the preset tiny holds."
    cfg = dataclasses.asdict(TrainConfig(**PRESETS["tiny"]))
    assert words in record_html(dataclasses.replace(run, config=cfg))
    changed = dataclasses.replace(run, config=cfg | {"micro_batch": 8})
    assert "Every setting" not in record_html(changed)


def test_a_caption_has_first_last_least_and_most(small_run):
    rows = [{"stage": "sft", "step": s, "loss": x} for s, x in enumerate((4.0, 1.0, 8.0, 2.5), 1)]
    html = figures(dataclasses.replace(gather(small_run), metrics=rows))
    heads = "".join(f'<th scope="col">{word}</th>' for word in ("first", "last", "least", "most"))
    assert heads in html
    cells = "<td>4</td><td>2.5</td><td>1</td><td>8</td>"
    assert f'<th scope="row">loss</th>{cells}' in html


def test_an_evaluation_under_way_may_end_in_half_a_line(small_run, tmp_path):
    path = shutil.copytree(small_run, tmp_path / "run") / "eval" / "sft.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert [row["id"] for row in gather(tmp_path / "run").results["sft"]] == [1, 2, 3]


def test_a_run_that_goes_on_shows_how_far_it_is(small_run):
    run = gather(small_run)
    going = dataclasses.replace(run, summary={}, metrics=run.metrics[:40])
    html = report_html(going, live=True)
    assert "Not finished: sft 20 of 20 steps, grpo 20 of 40 steps." in html
    assert 'id="reload"' in html and 'value="0.667"' in html
    assert 'id="reload"' not in report_html(going)
    begun = dataclasses.replace(going, metrics=[], stages={}, results={}, comparisons={}, traced=[])
    html = report_html(begun, live=True)
    assert "No evaluation has ended yet." in html and "No step was traced" in html


def test_a_single_step_has_all_its_groups(small_run):
    html = step_html(gather(small_run), 20)
    data = re.search(r'id="data">(.*?)</script>', html, re.S)[1]
    (step,) = json.loads(data)["steps"]
    assert step["step"] == 20 and [g["number"] for g in step["groups"]] == [1, 2, 3]
    with pytest.raises(ValueError, match="must be one of the 3 traced GRPO steps .* take 20, or"):
        step_html(gather(small_run), 21)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gemma_cot.report", *arguments], capture_output=True, text=True,
        timeout=300, env=os.environ,
    )  # fmt: skip


def test_a_folder_for_the_report_gets_a_file_in_it(small_run, tmp_path):
    for folder in (tmp_path, f"{tmp_path}/new/"):
        done = command(f"--run={small_run}", f"--output={folder}")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").is_file() and (tmp_path / "new/report.html").is_file()


def test_watching_a_run_ends_with_it(small_run, tmp_path):
    output = tmp_path / "live.html"
    done = command(f"--run={small_run}", f"--output={output}", "--watch")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.endswith(f"grpo 40  {output}") and last.startswith(f"{output}: ")
    assert 'id="reload"' not in output.read_text()  # it is finished: nothing to wait for


def test_watching_a_run_that_goes_on_writes_the_report_anew(small_run, tmp_path):
    """The run's files as they were at half of its steps, then the rest, then its end."""
    run = shutil.copytree(small_run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    half = len(lines) // 2
    (run / "metrics.jsonl").write_text("".join(lines[:half]))
    summary, ending = (run / "summary.json").read_text(), run / "summary.json"
    ending.unlink()
    output = tmp_path / "live.html"
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "gemma_cot.report", f"--run={run}", f"--output={output}",
         "--watch"], stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            step = json.loads(lines[half - 1])["step"]
            assert process.stdout.readline().strip().endswith(f"grpo {step}  {output}")
            assert 'id="reload"' in output.read_text()
            (run / "metrics.jsonl").write_text("".join(lines))
            assert process.stdout.readline().strip().endswith(f"grpo 40  {output}")
            ending.write_text(summary)
            assert process.stdout.readline().strip().endswith(f"grpo 40  {output}")
            assert process.wait(300) == 0
        finally:
            process.kill()
    assert 'id="reload"' not in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--run: must name the folder of a run"),
        (("--run=nowhere",), "--run: must be the folder of a run, got nowhere without config.json"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, words, capsys):
    assert words in refused_line("gemma_cot.report", *arguments, capsys=capsys)
