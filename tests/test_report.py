"""The page about runs that needs no server."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
import report
from conftest import command
from PIL import Image
from runs import main as list_runs

HOSTILE = "</script><script>document.title = 'taken'</script><!-- <b>&amp;"


@pytest.fixture
def runs(tiny_run, tmp_path):
    """Two runs that differ in --ns; the second has notes, a suffix and a command of a villain."""
    for name, ns in (("one", 5), ("two", 9)):
        shutil.copytree(tiny_run, tmp_path / name)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        config["flags"] |= {"ns": ns}
        if name == "two":
            config["flags"] |= {"notes": HOSTILE, "suffix": HOSTILE, "data_val": HOSTILE}
            config["command"] = HOSTILE
        path.write_text(json.dumps(config))
    return tmp_path


def read(path):
    """What a page shows, and the tags that it has outside of its data."""
    text, tags = path.read_text(), []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(text)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]
    return json.loads(data), tags


def test_a_report_is_one_file_with_the_runs_differences_curves_pictures_and_commands(runs):
    out = runs / "report.html"
    command(runs, "--out", out, program=(sys.executable, "scripts/report.py"))
    page, tags = read(out)
    one, two = sorted(page["runs"], key=lambda run: run["differing"]["ns"])
    assert one["differing"]["ns"] == "5" and two["differing"]["ns"] == "9"
    assert set(page["differing"]) == {"ns", "data_val"}
    assert two["notes"] == two["command"] == HOSTILE and json.loads(two["config"])
    losses = one["points"]["pretrain/loss_te"]
    assert [step for step, _ in losses] == [0, 2, 4, 6, 8] and len(one["cells"]) == 11
    assert [step for step, _ in one["pictures"]["images/pretrain_test"]] == [0, 2, 4, 6, 8]
    assert not re.search(r"""(src|href)=["']?\w""", out.read_text()), "it asks for another file"
    assert "https:" not in out.read_text()
    assert sum(tag == "script" for tag, _ in tags) == 2, "a text of a run became a script"
    assert sum(tag == "b" for tag, _ in tags) == 1, "nor a tag"


def test_a_report_keeps_its_size_and_says_what_it_left_out(runs, monkeypatch, capsys):
    report.report([runs], whole := runs / "whole.html")
    limit = (whole.stat().st_size + len(report.filled(json.loads("{}")))) // 2
    monkeypatch.setattr(report, "LARGEST_PAGE", limit)
    report.report([runs], out := runs / "report.html")
    assert out.stat().st_size <= limit
    page = read(out)[0]
    steps = [[step for step, _ in run["pictures"]["images/pretrain_test"]] for run in page["runs"]]
    assert 1 <= len(steps[0]) < 5 and steps[0][-1] == 8, "the last grid is always there"
    assert "pictures were left out" in page["about"] and page["about"] in capsys.readouterr().out
    monkeypatch.setattr(report, "LARGEST_PAGE", 0)
    report.report([runs], out)
    assert not any(run["pictures"] for run in read(out)[0]["runs"])


def test_a_report_reads_damaged_runs(runs):
    (runs / "one/config.json").write_text("[")
    for path in (runs / "one/images").glob("pretrain_test_0*"):
        path.write_bytes(b"no picture")
    secret = runs / "secret.png"
    Image.new("RGB", (9, 9)).save(secret)
    with open(runs / "one/metrics.jsonl", "a") as file:
        file.write('{"pretrain/step": 9, "pretrain/loss_te": NaN, "mine/x": 1e999}\n7\n')
        file.write('{"pretrain/step": 9, "images/mine": "../../secret.png"}\n{"cut')
    report.report([runs], out := runs / "report.html")
    page = read(out)[0]
    assert "6 pictures can't be read" in page["about"], "five, and the one outside of the run"
    one = page["runs"][[run["config"] for run in page["runs"]].index("{}")]
    assert one["pictures"]["images/pretrain_test"] == [] != one["pictures"]["images/pretrain_train"]


@pytest.mark.parametrize("place", ["nothing", "unwritable"])
def test_a_report_refuses_in_one_line(tiny_run, tmp_path, place, capsys):
    runs = tmp_path if place == "nothing" else tiny_run
    with pytest.raises(SystemExit) as ended:
        report.main([str(runs), "--out", str(tmp_path / "no/report.html")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1
    assert ("no run in" if place == "nothing" else "--out") in said


def test_the_list_of_runs_names_the_report(tiny_run, capsys):
    list_runs([str(tiny_run)])
    assert f"scripts/report.py {tiny_run}" in capsys.readouterr().err


def test_a_long_curve_keeps_its_shape_and_its_end():
    records = [{"pretrain/step": i, "x": i**2} for i in range(9999)]
    points = report.curve(records, "x")
    assert len(points) == report.POINTS and points[0][0] == 0 and points[-1][0] == 9998
    assert report.thinned([1, 2, 3], 1) == [3] and report.thinned([1, 2, 3], 2) == [1, 3]


@pytest.mark.slow
def test_a_report_in_a_browser_shows_values_and_steps_and_runs_no_text(runs, browser):
    report.report([runs], out := runs / "report.html")
    browser.get(out.as_uri())
    assert browser.title == "IMLE-SSL: report of runs"
    assert HOSTILE in browser.find_element("id", "configs").get_attribute("textContent")
    plot = browser.find_element("css selector", ".panel > svg")
    move = browser.execute_script
    move(
        "const box = arguments[0].getBoundingClientRect(); arguments[0].dispatchEvent("
        "new PointerEvent('pointermove', {clientX: box.right - 5, clientY: box.top + 50}))",
        plot,
    )
    tip = browser.find_element("css selector", ".tip:not([hidden])").text
    records = [json.loads(line) for line in (runs / "one/metrics.jsonl").read_text().splitlines()]
    last = [record["pretrain/loss_te"] for record in records if "pretrain/loss_te" in record][-1]
    assert f"{last:.4g} at 8" in tip and len(tip.splitlines()) == 10
    shown = []
    for place in range(5):
        move(f"byId('slider').value = {place}; byId('slider').oninput()")
        images = browser.find_elements("css selector", "#grids img")
        assert len(images) == 2
        shown.append(images[0].get_attribute("src"))
    assert len(set(shown)) == 5
    assert not browser.get_log("browser")
    assert {host for host in browser.hosts() if host} == set()
