"""report.html and the comparison of runs, as pages: in a real browser, and on folders of every form."""

import json
import re

import pytest
from browser import Browser, find_browser
from needs import not_here
from test_report import HOSTILE, Page, make_run, metrics_line, report_of, write_result

from gist_dist.cli import main
from gist_dist.common.errors import UserError
from gist_dist.report import build_report
from gist_dist.report.compare import MAX_RUNS, compare_runs

LONG_WORD = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 3
SECTIONS = ("Tasks", "Training", "Negatives and masking", "What the guide took out", "Speed and memory", "Data",
            "Configuration", "Environment")  # fmt: skip


def example(number=0, chosen="closest", **changes):
    """An entry of masked_examples.json."""
    return {
        "chosen": chosen, "source": "qqp", "row": 1000 + number, "block": ("ap", "aa", "pp", "an")[number % 4],
        "anchor": f"how do I learn to play the violin, part {number}?",
        "positive": f"what is the best way of learning the violin, part {number}?",
        "candidate": f"is there a good way to learn the fiddle, part {number}?",
        "threshold": 0.7124, "guide_positive": 0.7124, "guide_candidate": 0.8531,
        "student_positive": 0.6311, "student_candidate": 0.8012,
    } | changes  # fmt: skip


def write_examples(run, examples):
    found = {"step": 240, "num_rows": 256, "num_candidates": 195_840, "num_masked": 4321, "examples": examples}
    (run / "masked_examples.json").write_text(json.dumps(found))


def many_examples():
    return [example(i) for i in range(16)] + [example(20 + i, "random") for i in range(16)]


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs with reports: complete, unguided with a larger batch, and one with everything that can be wrong."""
    folder = tmp_path_factory.mktemp("pages")
    complete, unguided, troubled = folder / "complete", folder / "unguided", folder / "troubled"
    make_run(complete)
    write_examples(complete, many_examples())
    make_run(unguided, guide=False, labels=("baseline", "trained"), config={"batch": {"global_size": 512}})
    for task in ("STS12", "SciFact"):
        kind, metric = ("STS", "cosine_spearman") if task == "STS12" else ("Retrieval", "ndcg_at_10")
        write_result(unguided / "mteb" / "trained", task, 0.5, kind, metric)
    make_run(troubled, done=0, config={"student": {"model": LONG_WORD}, "optim": {"non_finite": "skip"}})
    sizes = [2] * 10 + [1] * 10 + [2] * 5
    lines = [metrics_line(step, 40, world_size=size) for step, size in enumerate(sizes, 1)]
    lines[6] = metrics_line(7, 40, loss=None, grad_norm=None, positive_similarity=None)
    (troubled / "metrics.jsonl").write_text("\n".join(lines))
    write_examples(troubled, [example(i, anchor=LONG_WORD, candidate=HOSTILE, source=LONG_WORD) for i in range(3)])
    rewrite(troubled / "data.json", lambda data: data["sources"][0].update(name=LONG_WORD, path=LONG_WORD))
    errors = {"trained": {f"Task{i}": f"OSError: {LONG_WORD}" for i in range(3)}}
    (troubled / "mteb" / "failures.json").write_text(json.dumps(errors))
    for run in (complete, unguided, troubled):
        build_report(run)
    page = compare_runs([complete, unguided, troubled]).page
    return {"complete": complete, "unguided": unguided, "troubled": troubled, "comparison": page}


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    executable = find_browser()
    if executable is None:
        not_here("no Chromium or Chrome is on the PATH: apt-get install chromium, or name one in $CHROMIUM")
    browser = Browser(executable)
    yield browser
    browser.close()


def page_of(runs, name):
    return runs[name] if name == "comparison" else runs[name] / "report.html"


# Contrast as WCAG 2 defines it, of every visible text with what is behind it.
FAINT_TEXTS = """(() => {
  const rgb = colour => (colour.match(/[0-9.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = rgb(getComputedStyle(element).backgroundColor);
      if (colour.length == 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const colour = rgb(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(colour), light(behind(element))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5)
      faint.push([element.tagName, element.textContent.trim().slice(0, 40), ((a + 0.05) / (b + 0.05)).toFixed(2)]);
  }
  return faint;
})()"""
CUT_LABELS = """[...document.querySelectorAll("figure svg")].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map(text => [svg.getAttribute("aria-label"), text.textContent]);
})"""
PAPER = "getComputedStyle(document.documentElement).backgroundColor.match(/[0-9]+/g).slice(0, 3).map(Number)"


BAD_PAGE = """<body style="background: #fff">
<p style="color: #aaa">faint</p><p>plain</p><div style="width: 900px"></div>
<figure>
<svg width="100" height="20" overflow="visible" aria-label="Loss"><text x="95" y="15">label</text></svg></figure>
<script>console.error("broken"); undefined.property</script></body>"""


def test_the_checks_of_pages_find_what_is_wrong(browser, tmp_path):
    (tmp_path / "bad.html").write_text(BAD_PAGE)
    browser.complaints.clear()
    browser.show(tmp_path / "bad.html", width=420)
    assert [text for _, text, _ in browser.evaluate(FAINT_TEXTS)] == ["faint"]
    assert browser.evaluate(CUT_LABELS) == [["Loss", "label"]]
    assert browser.evaluate("document.documentElement.scrollWidth") > 420
    assert len(browser.complaints) == 2 and "broken" in browser.complaints[0]


@pytest.mark.parametrize("name", ["complete", "unguided", "troubled", "comparison"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_on_a_screen(browser, runs, name, dark):
    """Nothing is wider than the window, hard to read or cut off, and the browser has no complaint."""
    browser.complaints.clear()
    for width in (1280, 420):
        browser.show(page_of(runs, name), width=width, dark=dark)
        assert browser.evaluate("innerWidth") == width
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(FAINT_TEXTS) == []
        assert browser.evaluate(CUT_LABELS) == []
        paper = browser.evaluate(PAPER)
        assert max(paper) < 60 if dark else min(paper) > 230
    assert browser.complaints == []


def test_all_sections_are_visible_and_linked(browser, runs):
    browser.show(page_of(runs, "complete"))
    heads = browser.evaluate(
        "[...document.querySelectorAll('h2')].filter(e => e.checkVisibility()).map(e => e.innerText)"
    )
    assert tuple(heads) == SECTIONS
    dead = browser.evaluate(
        "[...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.hash)).map(a => a.href)"
    )
    assert dead == [] and browser.evaluate("document.querySelectorAll('nav a').length") >= 7
    assert browser.evaluate("document.querySelectorAll('figure svg').length") >= 9
    # The verdict, with the loss that a mean would hide, is on the first screen.
    assert browser.evaluate("document.querySelector('p.loss').getBoundingClientRect().bottom < innerHeight")


@pytest.mark.parametrize("name", ["troubled", "comparison"])
def test_nothing_is_wider_than_paper(browser, runs, name):
    browser.show(page_of(runs, name), width=720, media="print")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 720


def test_page_on_paper(browser, runs):
    """Dark or not, paper is white; what a click would show is there without one."""
    browser.show(page_of(runs, "complete"), width=720, dark=True, media="print")
    assert browser.evaluate(PAPER) == [255, 255, 255]
    assert browser.evaluate(FAINT_TEXTS) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= 720
    assert not browser.evaluate("document.querySelector('nav').checkVisibility()")
    shown = "[...document.querySelectorAll('article')].filter(e => e.getBoundingClientRect().height > 0).length"
    assert browser.evaluate(shown) == 32
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF") and 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12


# ---- examples of masked candidates ---------------------------------------------------------------


def test_examples_show_texts_scores_and_what_they_are(runs):
    text = " ".join(Page(runs["complete"]).text.split())
    assert "dropped 4,321 of 195,840 candidates of 256 rows" in text
    for shown in (
        "is there a good way to learn the fiddle, part 7?",
        "0.853",
        "0.801",
        "Another row’s positive, compared with the positive (positive–positive) · row 1,002 of qqp",
        "Another row’s anchor (anchor–anchor)",
        "A hard negative (anchor–negative)",
        "Drawn at random from all dropped",
        "10 more",
    ):
        assert shown in text, shown


def test_hostile_examples_stay_text(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    keys = ("anchor", "positive", "candidate", "source")
    write_examples(run, [example(i, **dict.fromkeys(keys, HOSTILE), block=HOSTILE) for i in range(8)])
    build_report(run)
    page = Page(run)
    assert "script" not in page.tags and page.text.count(HOSTILE) >= 32


def test_damaged_examples_are_named(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    write_examples(run, [{"anchor": "alone"}])
    with pytest.raises(UserError, match=r"masked_examples\.json: is damaged"):
        build_report(run)


def test_no_example_without_a_masked_candidate(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    write_examples(run, [])
    build_report(run)
    assert "Closest to the student" not in Page(run).text


# ---- runs of every form --------------------------------------------------------------------------


def test_skipped_steps_and_changing_workers_are_told(runs):
    text = " ".join(Page(runs["troubled"]).text.split())
    assert "not finite at 1 step (7): skipped, the weights stayed as they were." in text
    assert "2 → 1 (step 11) → 2 (step 21)" in text
    report = report_of(runs["troubled"])
    assert report["training"]["non_finite_steps"] == [7]
    assert (runs["troubled"] / "plots" / "workers.png").exists()
    assert not (runs["complete"] / "plots" / "workers.png").exists()


def test_damaged_checkpoints_are_warned_about(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    (run / "logs").mkdir()
    damaged = "checkpoint /runs/x/checkpoints/step-00000100 is damaged (model.safetensors is missing); trying"
    event = json.dumps({"message": f"{damaged} {HOSTILE}", "problem": "checkpoint"})
    (run / "logs" / "events.jsonl").write_text(f'{{"message": "step 1/3 loss 2"}}\n{event}\n{event}\n')
    (warning,) = build_report(run).warnings
    assert damaged in warning and "script" not in Page(run).tags


@pytest.mark.parametrize("gone", ["data.json", "metrics.jsonl", "mteb", "model"])
def test_a_part_that_is_missing_leaves_the_rest(tmp_path, gone):
    run = make_run(tmp_path / "run", steps=5)
    path = run / gone
    if path.is_dir():
        path.rename(tmp_path / "elsewhere")
    else:
        path.unlink()
    build_report(run)
    assert Page(run).tags.count("h2") >= 4
    compare_runs([run, make_run(tmp_path / "other", steps=5)])


def test_all_losses_null(tmp_path):
    run = make_run(tmp_path / "run", steps=3, labels=())
    lines = [metrics_line(step, 3, loss=None, grad_norm=None, positive_similarity=None) for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    build_report(run)
    assert report_of(run)["training"]["loss_last"] is None
    assert not (run / "plots" / "loss.png").exists()


def test_guide_weaker_than_the_untrained_student_is_warned_about(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    for task in ("STS12", "STSBenchmark", "Banking77Classification", "EmotionClassification", "SciFact", "MLQuestions"):
        write_result(run / "mteb" / "guide", task, 0.2)
    build_report(run)
    (warning,) = report_of(run)["warnings"]
    assert warning["code"] == "guide_weaker" and "20.00" in warning["text"] and "41.70" in warning["text"]


# ---- several runs --------------------------------------------------------------------------------


def test_comparison_has_differences_to_the_first_run(runs):
    found = compare_runs([runs["complete"], runs["unguided"]])
    contents = json.loads(found.page.with_suffix(".json").read_text())
    tasks = {task["task"]: task for task in contents["tasks"]}
    assert tasks["STS12"] | {"type": ""} == {
        "task": "STS12", "type": "", "metric": "cosine_spearman", "before": 43.3,
        "after": [63.9, 50.0], "change": [0.0, -13.9],
    }  # fmt: skip
    assert tasks["SciFact"]["change"] == [0.0, 14.93]
    mean = contents["mean"]
    assert (mean["num_tasks"], mean["after"], mean["change"]) == (6, [53.18, 53.35], [0.0, 0.17])
    assert (mean["up"], mean["down"]) == ([0, 1], [0, 1])
    assert contents["headline"].startswith("unguided has the best mean over 6 tasks that all runs share: 53.35")
    settings = {setting["key"]: setting["values"] for setting in contents["settings"]}
    assert settings["batch.global_size"] == [256, 512]
    assert settings["guide.model"] == ["sentence-transformers/all-MiniLM-L6-v2", None]
    assert "name" not in settings and "student.model" not in settings
    assert not contents["same_loss"]
    numbers = {number["key"]: number["values"] for number in contents["numbers"]}
    assert numbers["rows"] == [240 * 256] * 2 and numbers["masked_fraction.all"][1] is None


def test_comparison_prints_a_compact_table(runs, capsys):
    assert main(["report", str(runs["complete"]), str(runs["unguided"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isascii() and len(line) < 200 for line in lines)
    assert lines[0].split() == ["task", "complete", "unguided"]
    (scifact,) = [line.split() for line in lines if line.startswith("SciFact")]
    assert scifact == ["SciFact", "35.07", "50.00", "(+14.93)"]
    assert ["batch.global_size", "256", "512"] in [line.split() for line in lines]
    assert lines[-1] == f"report   {runs['complete'].parent / 'compare-complete-unguided.html'}"


def test_means_of_a_comparison_are_over_tasks_that_all_runs_have(tmp_path):
    first, second = make_run(tmp_path / "a", steps=2), make_run(tmp_path / "b", steps=2)
    (second / "mteb" / "trained" / "SciFact.json").unlink()
    contents = compare_runs([first, second]).contents
    assert contents["mean"]["num_tasks"] == 5 and contents["mean"]["change"] == [0.0, 0.0]
    assert {kind["type"]: kind["num_tasks"] for kind in contents["by_type"]}["Retrieval"] == 1
    assert next(task for task in contents["tasks"] if task["task"] == "SciFact")["after"] == [35.07, None]


def test_runs_of_one_name_are_told_apart(tmp_path):
    for place in ("x", "y"):
        make_run(tmp_path / place / "same", steps=2)
    found = compare_runs([tmp_path / "x" / "same", tmp_path / "y" / "same"], tmp_path / "out" / "page.html")
    assert [run["label"] for run in found.contents["runs"]] == ["x/same", "y/same"]
    assert found.page == tmp_path / "out" / "page.html" and found.page.exists()


def test_hostile_runs_stay_text_in_a_comparison(tmp_path):
    name = HOSTILE.replace("/", "")
    hostile = make_run(tmp_path / "run", steps=2, config={"name": name, "student": {"model": HOSTILE}})
    write_result(hostile / "mteb" / "trained", "own", 0.5, kind=HOSTILE, metric=HOSTILE)
    rewrite(hostile / "mteb" / "trained" / "own.json", lambda result: result.update(task_name=HOSTILE))
    rewrite(hostile / "data.json", lambda data: data.update(content=HOSTILE))
    page = Page(compare_runs([make_run(tmp_path / "plain", steps=2), hostile]).page)
    assert "script" not in page.tags and page.text.count(HOSTILE) >= 3 and page.text.count(name) >= 3
    assert all(address.startswith("#") for address in page.addresses)


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        (("a", "a"), (), "named twice"),
        (("a", "absent"), (), "no config.yaml in"),
        (("a",), ("--out", "x.html"), "--out is for a comparison"),
        ([f"r{i}" for i in range(MAX_RUNS + 1)], (), f"at most {MAX_RUNS} fit one page"),
        (("a", "b"), ("--out", "/proc/nowhere/x.html"), "can't be written"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_sentence(tmp_path, capsys, names, arguments, message):
    for name in {"a", "b"} & set(names):
        make_run(tmp_path / name, steps=2)
    assert main(["report", *(str(tmp_path / name) for name in names), *arguments]) == 1
    assert message in capsys.readouterr().err
