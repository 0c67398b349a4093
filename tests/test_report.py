"""The report of a run, on folders of the form that a run leaves, complete and not."""

import json
import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from gist_dist.common.errors import UserError
from gist_dist.report import TaskRow, build_report, judge, read_run, summarize
from gist_dist.report.model_card import write_model_card

os.environ["HF_HUB_OFFLINE"] = "1"
HOSTILE = "<script>alert('x')</script>"
SCORES = {  # task: (type, metric, baseline, trained, guide)
    "STS12": ("STS", "cosine_spearman", 0.4330, 0.6390, 0.7237),
    "STSBenchmark": ("STS", "cosine_spearman", 0.5610, 0.7260, 0.8203),
    "Banking77Classification": ("Classification", "accuracy", 0.5160, 0.7340, 0.8004),
    "EmotionClassification": ("Classification", "accuracy", 0.2790, 0.4110, 0.4083),
    "SciFact": ("Retrieval", "ndcg_at_10", 0.4120, 0.3507, 0.6451),
    "MLQuestions": ("Retrieval", "ndcg_at_10", 0.3011, 0.3300, 0.5733),
}


def write_result(folder, task, score, kind="STS", metric="cosine_spearman"):
    """One task's result as MTEB's TaskResult.to_disk writes it, and evaluation.py's details beside it."""
    (folder / "details").mkdir(parents=True, exist_ok=True)
    result = {
        "dataset_revision": "a0d554a64d88156834ff5ae9920b964011b16384",
        "task_name": task,
        "mteb_version": "2.26.24",
        "scores": {"test": [{metric: score, "main_score": score, "hf_subset": "default", "languages": ["eng-Latn"]}]},
        "evaluation_time": 12.5,
        "kg_co2_emissions": None,
    }
    (folder / f"{task}.json").write_text(json.dumps(result))
    details = {"kind": kind, "metric": metric, "model": "0123456789abcdef"}
    (folder / "details" / f"{task}.json").write_text(json.dumps(details))


def metrics_line(step, steps, guide=True, **changes):
    """A step of a run whose loss falls and whose guide masks a few per cent."""
    progress = step / steps
    line = {
        "step": step, "epoch": 2 * progress, "world_size": 2, "rows": 256,
        "sources": {"qqp": 200, "snli": 56},
        "loss": 2.2 * math.exp(-3 * progress) + 0.35 + 0.08 * math.sin(7.3 * step),
        "grad_norm": 0.55 + 0.6 * math.exp(-4 * progress) + 0.15 * math.sin(3.1 * step),
        "learning_rate": 1e-4 * (progress / 0.1 if progress < 0.1 else (1 - progress) / 0.9),
        "pairs_per_second": 61 + 4 * math.sin(step), "tokens_per_second": 4100 + 300 * math.sin(step),
        "padding_fraction": 0.08, "peak_memory_bytes": 1_350_000_000,
        "masked_fraction": 0.031 if guide else 0.0,
        "masked_fraction_ap": 0.021 + 0.01 * math.sin(step / 9) if guide else 0.0,
        "masked_fraction_aa": 0.034 if guide else 0.0, "masked_fraction_pp": 0.038 if guide else 0.0,
        "masked_weight": 0.12 if guide else 0.0, "masked_weight_ap": 0.1 if guide else 0.0,
        "masked_weight_aa": 0.14 if guide else 0.0, "masked_weight_pp": 0.13 if guide else 0.0,
        "masked_weight_an": None, "identical_weight": 0.001, "known_weight": 0.02, "known_dropped": 5, "promoted": 0,
        "masked_fraction_an": None, "identical_dropped": 3, "rows_without_negatives": int(step % 40 == 0),
        "positive_similarity": 0.5 + 0.3 * progress,
        "guide_positive_similarity": 0.74 + 0.02 * math.sin(step) if guide else None,
        "seconds": {"plan": 0.02, "encode": 1.1, "guide": 1.3 if guide else 0.0, "gather": 0.05, "loss": 0.09,
                    "scatter": 0.04, "backward": 1.6, "reduce": 0.12, "optimizer": 0.06, "step": 4.5},
    }  # fmt: skip
    return json.dumps(line | changes)


def make_run(folder, steps=240, guide=True, labels=("baseline", "trained", "guide"), done=None, config=None):
    """A complete run folder; done: steps that it got to."""
    folder.mkdir(parents=True)
    sources = [
        {"name": "qqp", "path": "sentence-transformers/quora-duplicates"},
        {"name": "snli", "path": "/data/snli/*.jsonl"},
    ]
    recipe = {
        "name": folder.name, "seed": 0, "output_dir": str(folder.parent),
        "student": {"model": "prajjwal1/bert-mini", "precision": "fp32", "trust_remote_code": False},
        "guide": {"model": "sentence-transformers/all-MiniLM-L6-v2", "mode": "online"} if guide else None,
        "data": {"sources": sources}, "batch": {"global_size": 256},
        "loss": {"temperature": 0.05, "margin": 0.0},
        "optim": {"learning_rate": 1e-4, "max_grad_norm": 1.0, "epochs": 2.0},
        "evaluate": {"tasks": list(SCORES) if labels else [], "baseline": "baseline" in labels},
        "cluster": {"num_workers": 2, "runtime_env": {}},
        "environment": {"gist_dist": "0.1.0", "git_commit": "1a2b3c4", "python": "3.11.2", "torch": "2.13.0",
                        "ray": "2.60.0", "platform": "Linux-6.1-x86_64", "cores": 2,
                        "started": "2026-03-01T10:00:00+00:00", "finished": "2026-03-01T10:31:00+00:00"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe | (config or {}), sort_keys=False))
    lines = [metrics_line(step, steps, guide) for step in range(1, (steps if done is None else done) + 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    first_dropped = ["snli.jsonl row 17: positive is empty", "snli.jsonl row 40: positive is empty"]
    snli_drops = {"dropped": {"positive is empty": 61, "no negative": 19}, "first_dropped": first_dropped}
    data = {
        "sources": [
            sources[0] | {"rows_read": 24_100, "rows_used": 24_100, "dropped": {}, "first_dropped": []},
            sources[1] | {"rows_read": 6700, "rows_used": 6620} | snli_drops,
        ],
        "num_rows": 30_720, "num_texts": 52_113, "steps_per_epoch": 120, "steps": steps,
        "duplicates_admitted": 4,
    }  # fmt: skip
    (folder / "data.json").write_text(json.dumps(data))
    for place, label in enumerate(("baseline", "trained", "guide")):
        for task, (kind, metric, *scores) in SCORES.items():
            if label in labels:
                write_result(folder / "mteb" / label, task, scores[place], kind, metric)
    (folder / "model").mkdir()
    (folder / "model" / "modules.json").write_text("[]")
    return folder


def report_of(run):
    """report.json as a strict parser reads it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((run / "report.json").read_text(), parse_constant=refuse)


def codes(run):
    return {warning["code"] for warning in summarize(read_run(run))["warnings"]}


def row(task, before, after, kind="STS", guide=None):
    change = None if before is None or after is None else round(after - before, 2)
    return TaskRow(task, kind, "cosine_spearman", before, after, guide, change)


class Page(HTMLParser):
    """Tags, addresses and visible text of a page, or of a run's report."""

    def __init__(self, run):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed((run if run.suffix == ".html" else run / "report.html").read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href", "xlink:href", "data", "srcset")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A complete run, its report and its card; only read by tests."""
    run = make_run(tmp_path_factory.mktemp("runs") / "complete")
    summary = build_report(run)
    write_model_card(run)
    return run, summary


def test_complete_run_leaves_page_numbers_and_plots(complete):
    run, _ = complete
    report = report_of(run)
    assert {
        "name",
        "verdict",
        "tasks",
        "benchmarks",
        "languages",
        "training",
        "evaluations",
        "data",
        "warnings",
        "failures",
        "config",
        "environment",
    } == set(report)
    assert report["verdict"]["overall"] == {
        "num_tasks": 6, "before": 41.70, "after": 53.18, "change": 11.48, "guide": 66.19, "up": 5, "down": 1,
    }  # fmt: skip
    assert [t["task"] for t in report["tasks"]][:3] == [
        "Banking77Classification",
        "EmotionClassification",
        "MLQuestions",
    ]
    assert report["training"]["steps"] == 240 and report["training"]["rows"] == 240 * 256
    assert report["training"]["source_rows"] == {"qqp": 240 * 200, "snli": 240 * 56}
    assert report["training"]["masked_fraction"]["an"] is None
    assert math.isclose(report["training"]["seconds"]["other"], 240 * 0.12, rel_tol=1e-6)
    assert report["environment"]["git_commit"] == "1a2b3c4"
    assert report["warnings"] == []
    plots = {p.stem: p.read_bytes() for p in (run / "plots").iterdir()}
    assert all(content.startswith(b"\x89PNG") for content in plots.values())
    assert {"loss", "grad_norm", "learning_rate", "masked_fraction", "phases", "tasks", "peak_memory"} <= set(plots)
    text = Page(run).text
    for shown in (
        "41.70",
        "53.18",
        "+11.48",
        "cosine_spearman",
        "240 of 240",
        "61 × positive is empty",
        "snli.jsonl row 17",
    ):
        assert shown in text


def test_page_loads_nothing_and_runs_nothing(complete):
    page = Page(complete[0])
    assert page.tags.count("svg") > 8
    assert all(address.startswith("#") for address in page.addresses)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)


def test_report_is_a_function_of_the_run(complete):
    run, _ = complete
    before = (run / "report.html").read_bytes(), (run / "report.json").read_bytes()
    build_report(run)
    assert before == ((run / "report.html").read_bytes(), (run / "report.json").read_bytes())


def test_retrieval_loss_is_named_although_the_mean_rose(complete):
    run, summary = complete
    assert summary.headline == "The mean over 6 tasks rose from 41.70 to 53.18 (+11.48)."
    loss = "Retrieval lost: SciFact 41.20 → 35.07 (−6.13)."
    assert loss in summary.details and loss in Page(run).text
    assert "The mean of Retrieval fell by 1.63 although the mean over all tasks did not." in summary.details
    assert [t["task"] for t in report_of(run)["verdict"]["retrieval_losses"]] == ["SciFact"]


def test_summary_is_a_plain_table(complete):
    run, summary = complete
    lines = summary.lines()
    assert all(line.isascii() for line in lines)
    table = lines[:8]
    assert table[0].split() == ["task", "type", "before", "after", "change", "guide"]
    assert table[4].split() == ["SciFact", "Retrieval", "41.20", "35.07", "-6.13", "64.51"]
    assert table[7].split() == ["mean", "of", "6", "41.70", "53.18", "+11.48", "66.19"]
    assert len({len(line) for line in table}) == 1
    assert "5 tasks went up, 1 down." in lines
    assert lines[-4:] == [
        f"model    {run / 'model'}", f"report   {run / 'report.html'}",
        f"metrics  {run / 'metrics.jsonl'}", f"scores   {run / 'mteb'}",
    ]  # fmt: skip


def test_means_compare_only_tasks_with_both_scores():
    rows = [
        row("A", 50.0, 60.0),
        row("B", 70.0, None),
        row("C", 40.0, 40.0, "Clustering"),
        row("D", None, 10.0),
    ]
    verdict = judge(rows, wanted=("A", "B", "C", "D"))
    assert verdict["overall"] | {"guide": None} == {
        "num_tasks": 2, "before": 45.0, "after": 50.0, "change": 5.0, "guide": None, "up": 1, "down": 0,
    }  # fmt: skip
    assert verdict["not_compared"] == ["B", "D"] and verdict["not_evaluated"] == ["B"]
    assert "1 task went up, 0 down, 1 unchanged." in [detail["text"] for detail in verdict["details"]]


def test_types_weigh_the_same_in_the_mean_of_types():
    verdict = judge([row("A", 10.0, 20.0), row("B", 10.0, 20.0), row("C", 50.0, 40.0, "Retrieval")])
    assert (verdict["overall"]["change"], verdict["mean_of_types"]["change"]) == (3.34, 0.0)


def test_guide_mean_needs_every_compared_task():
    assert judge([row("A", 1.0, 2.0, guide=90.0), row("B", 1.0, 2.0)])["overall"]["guide"] is None
    assert judge([row("A", 1.0, 2.0, guide=90.0), row("B", 1.0, 2.0, guide=80.0)])["overall"]["guide"] == 85.0


def test_many_losses_are_counted_and_the_worst_named_first():
    verdict = judge([row(f"T{i:02d}", 50.0, 49.0 - i) for i in range(12)])
    (lost,) = [detail["text"] for detail in verdict["details"] if detail["text"].startswith("Lost")]
    assert lost.startswith("Lost: T11 50.00 → 38.00 (−12.00)") and lost.endswith("and 4 more, below.")
    assert verdict["headline"].startswith("The mean over 12 tasks fell from 50.00")


@pytest.mark.parametrize(
    ("form", "headline"),
    [
        ({"labels": (), "guide": False}, "No MTEB task was evaluated."),
        ({"labels": ("trained",)}, "The mean over 6 tasks is 53.18; the untrained student was not evaluated"),
        ({"labels": ("baseline",), "done": 7}, "The mean over 6 tasks is 41.70 before training"),
        ({"done": 1}, "The mean over 6 tasks rose"),
    ],
)
def test_incomplete_run_is_reported_as_such(tmp_path, form, headline):
    run = make_run(tmp_path / "run", steps=20, **form)
    summary = build_report(run)
    assert summary.headline.startswith(headline)
    assert headline in Page(run).text
    assert ("unfinished" in codes(run)) == ("done" in form)
    assert (run / "plots" / "masked_fraction.png").exists() == form.get("guide", True)


def test_run_that_only_has_its_config(tmp_path):
    run = make_run(tmp_path / "run", done=0, labels=())
    for file in ("metrics.jsonl", "data.json", "model/modules.json"):
        (run / file).unlink()
    (run / "model").rmdir()
    summary = build_report(run)
    assert summary.model is None
    assert "No step has been trained yet." in Page(run).text
    assert list((run / "plots").iterdir()) == []


def test_plot_without_data_does_not_stay_from_before(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    build_report(run)
    assert (run / "plots" / "loss.png").exists()
    (run / "metrics.jsonl").write_text("")
    build_report(run)
    assert not (run / "plots" / "loss.png").exists()


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"no config.yaml in {tmp_path}"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["config.yaml", "data.json", "mteb/failures.json", "mteb/trained/STS12.json"])
def test_damaged_file_is_named(tmp_path, file):
    run = make_run(tmp_path / "run", steps=2)
    (run / file).write_text("[1, 2")
    with pytest.raises(UserError, match=file):
        build_report(run)


def test_torn_line_and_repeated_steps_of_a_killed_writer(tmp_path):
    run = make_run(tmp_path / "run", steps=10)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(metrics_line(10, 10, loss=0.125) + "\n" + '{"step": 11, "lo')
    assert "metrics_damaged" in codes(run)
    training = summarize(read_run(run))["training"]
    assert training["steps"] == 10 and training["rows"] == 10 * 256
    assert training["loss_last"] == 0.125


def test_hostile_text_stays_text(tmp_path):
    run = make_run(tmp_path / "run", steps=3, config={"name": HOSTILE, "student": {"model": HOSTILE}})
    data = json.loads((run / "data.json").read_text())
    data["sources"][1] |= {
        "name": HOSTILE,
        "path": HOSTILE,
        "dropped": {HOSTILE: 61},
        "first_dropped": [HOSTILE],
    }
    (run / "data.json").write_text(json.dumps(data))
    (run / "mteb" / "failures.json").write_text(json.dumps({"trained": {HOSTILE: f"{HOSTILE} $x_1$ {{{{ 7*7 }}}}"}}))
    write_result(run / "mteb" / "trained", "own", 0.5, kind=HOSTILE, metric=HOSTILE)
    for label in ("baseline", "trained"):
        write_result(run / "mteb" / label, "own", 0.5 + 0.1 * (label == "trained"), kind=HOSTILE)
    result = json.loads((run / "mteb/trained/own.json").read_text())
    for label in ("baseline", "trained"):
        (run / "mteb" / label / "own.json").write_text(json.dumps(result | {"task_name": f"$\\frac$ {HOSTILE}"}))
    build_report(run)
    page = Page(run)
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) > 8 and "{{ 7*7 }}" in page.text


def test_secrets_of_the_recipe_are_not_shown(tmp_path):
    sources = [{"path": "https://me:hunter2@data.example/pairs.jsonl"}]
    cluster = {"num_workers": 2, "runtime_env": {"env_vars": {"HF_TOKEN": "hf_secret"}}}
    run = make_run(tmp_path / "run", steps=2, config={"data": {"sources": sources}, "cluster": cluster})
    data = json.loads((run / "data.json").read_text())
    data["sources"][0]["path"] = sources[0]["path"]
    (run / "data.json").write_text(json.dumps(data))
    build_report(run)
    write_model_card(run)
    for file in ("report.html", "report.json", "model/README.md"):
        assert "hunter2" not in (run / file).read_text() and "hf_secret" not in (run / file).read_text()
    assert "HF_TOKEN" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("code", "changes", "config"),
    [
        ("non_finite_loss", {"loss": float("nan")}, {}),
        ("loss_not_falling", {"loss": 2.0}, {}),
        ("nothing_masked", {"masked_fraction": 0.0, "masked_fraction_ap": 0.0}, {}),
        ("little_masked", {"masked_weight": 0.001}, {}),
        ("much_masked", {"masked_weight": 0.95}, {}),
        ("much_masked", {"masked_fraction": 0.7, "masked_weight": None}, {}),  # of before the weight was measured
        ("guide_ranks_positives_low", {"masked_fraction_ap": 0.6}, {}),
        ("rows_without_negatives", {"rows_without_negatives": 12}, {}),
        ("padding", {"padding_fraction": 0.45}, {}),
        ("remote_code", {}, {"student": {"model": "x/y", "trust_remote_code": True}}),
    ],
)
def test_warning(tmp_path, code, changes, config):
    run = make_run(tmp_path / "run", steps=45, labels=(), config=config)
    (run / "metrics.jsonl").write_text("".join(metrics_line(step, 45, **changes) + "\n" for step in range(1, 46)))
    assert codes(run) == {code}


def test_no_masking_without_guide_is_no_warning(tmp_path):
    assert codes(make_run(tmp_path / "run", steps=3, guide=False, labels=())) == set()


def test_failed_task_and_dropped_rows_are_warned_about(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    (run / "mteb" / "trained" / "STS12.json").unlink()
    (run / "mteb" / "failures.json").write_text(json.dumps({"trained": {"STS12": "OSError: disk\nfull"}}))
    data = json.loads((run / "data.json").read_text())
    data["sources"][1] |= {"rows_used": 3000}
    (run / "data.json").write_text(json.dumps(data))
    summary = build_report(run)
    assert summary.warnings == [
        "55 % of the rows of snli were dropped as unusable.",
        "MTEB task STS12 failed (trained): OSError: disk full",
    ]  # fmt: skip
    assert summary.overall["num_tasks"] == 5
    assert all(warning in Page(run).text for warning in summary.warnings)
    assert "Scored on one side only and left out of the means: STS12." in summary.details


def test_score_that_is_not_finite_counts_as_missing(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    write_result(run / "mteb" / "trained", "STS12", float("nan"))
    (task,) = [task for task in read_run(run).tasks if task.task == "STS12"]
    assert (task.before, task.after, task.change) == (43.3, None, None)


def test_lost_checkpoints_are_found_in_what_the_log_says_of_them(tmp_path, caplog):
    """One that is damaged, and one that can't be written: as checkpoint.py itself tells it."""
    import torch
    from tiny import recipe

    from gist_dist.common.events import EventFormatter
    from gist_dist.recipe import parse_config
    from gist_dist.training.checkpoint import CheckpointStore, CheckpointWriter, Snapshot

    run = make_run(tmp_path / "run", steps=3)
    store = CheckpointStore(parse_config(recipe(tmp_path / "out", tmp_path, None, tmp_path / "rows.jsonl")))
    tensors, place = {"model": {"weight": torch.ones(2)}}, Path(store.place)
    store.write(Snapshot(1, tensors, {}))
    (place / "step-00000001" / "model.safetensors").unlink()
    assert store.newest_intact() is None
    place.rename(tmp_path / "away")
    place.write_text("in the way")
    writer = CheckpointWriter(store, retry_seconds=0.0)
    writer.save(2, tensors, {})
    assert writer.finish()
    writer.close()
    (run / "logs").mkdir()
    events = [EventFormatter().format(record) for record in caplog.records]
    (run / "logs" / "events.jsonl").write_text("\n".join(['{"message": "step 1/3"}', *events, '{"message": "step']))
    damaged, unwritten = read_run(run).logged
    assert "step-00000001 is damaged (" in damaged and "model.safetensors is missing" in damaged
    assert "the checkpoint of step 2 can't be written to" in unwritten
    assert codes(run) == {"checkpoint"}


def test_long_run_makes_no_larger_page(tmp_path):
    run = make_run(tmp_path / "run", steps=5000, labels=())
    build_report(run)
    assert (run / "report.html").stat().st_size < 300_000
    assert report_of(run)["training"]["steps"] == 5000


def test_report_needs_neither_torch_nor_ray_nor_mteb():
    code = (
        "import sys, gist_dist.report, gist_dist.report.model_card\n"
        "print(sorted({'torch', 'ray', 'mteb', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_model_card_is_read_back_by_the_hub_library(complete):
    from huggingface_hub import ModelCard

    run, _ = complete
    card = ModelCard.load(run / "model" / "README.md")
    assert card.data.library_name == "sentence-transformers" and card.data.pipeline_tag == "sentence-similarity"
    assert card.data.base_model == "prajjwal1/bert-mini"
    assert card.data.datasets == ["sentence-transformers/quora-duplicates"]
    results = {result.dataset_name: result for result in card.data.eval_results}
    assert len(results) == 6
    scifact = results["MTEB SciFact"]
    assert (scifact.dataset_type, scifact.task_type, scifact.dataset_split) == (
        "mteb/scifact",
        "Retrieval",
        "test",
    )
    assert (scifact.metric_type, scifact.metric_value) == ("ndcg_at_10", 35.07)
    assert "| SciFact | Retrieval | ndcg_at_10 | 41.20 | 35.07 | −6.13 | 64.51 |" in card.text
    assert "- Retrieval lost: SciFact 41.20 → 35.07 (−6.13)." in card.text
    assert "2402.16829" in card.text
    assert "/data/snli" not in card.content and str(run.parent) not in card.content


def test_model_card_of_local_models_names_no_path(tmp_path):
    local = {"student": {"model": "/home/ann/secret-project/student"}, "guide": {"model": "/home/ann/guide"}}
    run = make_run(tmp_path / "run", steps=2, labels=(), config=local)
    write_model_card(run)
    card = (run / "model" / "README.md").read_text()
    assert "/home/ann" not in card and "`student`" in card and "base_model" not in card
    assert "has not been evaluated on MTEB" in card and "model-index" not in card


def test_model_card_needs_a_model(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    (run / "model" / "modules.json").unlink()
    (run / "model").rmdir()
    with pytest.raises(UserError, match="there is no model/"):
        write_model_card(run)
