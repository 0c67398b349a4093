"""Scores while a run trains: rows held out, students kept, the best step, an early end, going on after a kill."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import Row, reference_loss
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny import prepared, recipe, save_tiny_model, words, write_jsonl
from tiny_runs import STEPS, Runs, assert_same_run, run_dir

from gist_dist.common.errors import UserError
from gist_dist.config import RunConfig
from gist_dist.core.collectives import World
from gist_dist.core.plan import plan_batch
from gist_dist.data.corpus import Corpus, prepare
from gist_dist.data.held_out import held_out_rows, row_clusters, write_evaluation_set
from gist_dist.data.sampler import Sampler
from gist_dist.models.encoder import Guide, Student
from gist_dist.on_ray.driver import Stopped, train_and_evaluate
from gist_dist.on_ray.tasks.scores import ScoresWhileTraining, Share
from gist_dist.on_ray.train.worker import RunInputs
from gist_dist.recipe import parse_config
from gist_dist.runs.evaluations import (
    Evaluation,
    Verdict,
    adopt_best,
    folder_of,
    is_done,
    judge,
    model_of,
    read_evaluations,
    unscored,
    write_evaluation,
)
from gist_dist.runs.metrics_file import METRICS, evaluation_lines, last_step, read_metrics
from gist_dist.training.held_out_loss import held_out_loss
from gist_dist.training.snapshots import evaluation_steps
from gist_dist.training.trainer import train

# Which step is best, and when training ends


def evaluated(*values: float | None) -> list[Evaluation]:
    """At steps 0, 10, 20, …; None: its task failed."""
    return [
        Evaluation(10 * number, {} if value is None else {"A": value / 100}, failed={} if value else {"A": "no data"})
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "options", "best", "stop"),
    [
        ((50, 60, 61, 60.5), {}, 20, None),
        ((50, 60, 60), {}, 10, None),
        ((90, 60, 61), {}, 20, None),
        ((50, 60, 59, 58, 70), {"stop_after": 2}, 10, 30),
        ((50, 60, 60.4, 60.8, 70), {"stop_after": 2, "least_gain": 1.0}, 30, 30),
        ((50, 60, 60.4, 61.5, 70), {"stop_after": 2, "least_gain": 1.0}, 40, None),
        ((50, 49, 48), {"stop_after": 2}, 10, 20),
        ((50, 60, None, 59, 61), {"stop_after": 2}, 40, None),
        ((50, None, None), {"stop_after": 2}, None, None),
        ((), {"stop_after": 2}, None, None),
    ],
)
def test_the_best_step_and_an_early_end(values, options, best, stop):
    assert judge(evaluated(*values), "mean", **options) == judge(evaluated(*values), "A", **options)
    assert judge(evaluated(*values), "mean", **options) == Verdict(best, stop)
    assert judge(evaluated(*values), None, **options) == Verdict()


def test_the_verdict_is_the_same_however_far_training_went_on():
    seen = evaluated(50, 60, 59, 58)
    later = evaluated(50, 60, 59, 58, 90, 95)
    assert judge(seen, "mean", 2) == judge(later, "mean", 2) == Verdict(10, 30)


def test_a_loss_is_best_where_it_is_lowest():
    losses = [Evaluation(step, {}, loss) for step, loss in ((0, 0.1), (10, 2.0), (20, 1.5), (30, math.nan), (40, 1.6))]
    assert judge(losses, "loss") == Verdict(20)
    assert Evaluation(1, {"A": math.nan, "B": 0.5}).value("mean") is None


def test_scores_are_read_as_they_were_written(tmp_path):
    written = Evaluation(20, {"A": 0.25, "B": math.nan}, 1.5, 2.0, {"C": "no data"})
    write_evaluation(tmp_path, written)
    (found,) = read_evaluations(tmp_path)
    assert found.scores["A"] == 0.25 and math.isnan(found.scores["B"])
    assert (found.step, found.loss, found.seconds, found.failed) == (20, 1.5, 2.0, {"C": "no data"})
    for damaged in ("", "[]", '{"step": 30, "scores": {}}', '{"step": 20, "scores": {"A": "high"}}'):
        (folder_of(tmp_path, 20) / "scores.json").write_text(damaged)
        assert read_evaluations(tmp_path) == []


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (3, [0, 3, 6, 9, 10]),
        (10, [0, 10]),
        (99, [0, 10]),
        ([2, 7], [0, 2, 7, 10]),
        (0.5, [0, 2, 4, 6, 8, 10]),
        ("50%", [0, 2, 4, 6, 8, 10]),
        (0.01, [*range(11)]),
        (None, [0, 10]),
    ],
)
def test_steps_of_evaluation(tmp_path, every, expected):
    config = parse_config(
        recipe(tmp_path, tmp_path, None, tmp_path / "rows.jsonl", evaluate={"every_steps": every, "during": ["A"]})
    )
    assert evaluation_steps(config, num_steps=10, steps_per_epoch=4) == expected


def test_a_step_that_the_run_does_not_have_is_named(tmp_path):
    tree = recipe(tmp_path, tmp_path, None, tmp_path / "rows.jsonl", evaluate={"every_steps": [2, 11], "during": ["A"]})
    with pytest.raises(UserError, match=r"step 11.* 10 steps"):
        evaluation_steps(parse_config(tree), num_steps=10, steps_per_epoch=4)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"evaluate": {"every_steps": 0}}, ["every_steps", "0"]),
        ({"evaluate": {"every_steps": 1.5, "during": ["A"]}}, ["every_steps", "1.5"]),
        ({"evaluate": {"every_steps": "often", "during": ["A"]}}, ["every_steps", "often"]),
        ({"evaluate": {"every_steps": [3, 0], "during": ["A"]}}, ["every_steps"]),
        ({"evaluate": {"every_steps": []}}, ["every_steps"]),
        ({"evaluate": {"every_steps": 5}}, ["every_steps", "evaluate.during", "data.hold_out"]),
        ({"evaluate": {"every_steps": 5, "during": ["held_out"]}}, ["evaluate.during", "data.hold_out"]),
        ({"evaluate": {"tasks": ["held_out"]}, "data": {"hold_out": 0.1}}, ["evaluate.tasks", "evaluate.during"]),
        ({"evaluate": {"during": ["A"], "keep_best": "A"}}, ["keep_best", "every_steps"]),
        ({"evaluate": {"every_steps": 5, "during": ["A"], "keep_best": "B"}}, ["keep_best", "'B'", "A"]),
        ({"evaluate": {"every_steps": 5, "during": ["A"], "keep_best": "loss"}}, ["keep_best", "loss"]),
        ({"evaluate": {"every_steps": 5, "during": ["A"], "stop_after": 2}}, ["stop_after", "keep_best"]),
        ({"evaluate": {"every_steps": 5, "during": ["A"], "keep_best": "A", "stop_after": 0}}, ["stop_after"]),
        ({"evaluate": {"least_gain": -1}}, ["least_gain"]),
        ({"data": {"hold_out": 0.5}}, ["hold_out", "0.5"]),
        ({"data": {"hold_out": "one in ten"}}, ["hold_out"]),
        ({"data": {"hold_out": 0}}, ["hold_out"]),
    ],
)
def test_what_can_not_be_is_refused_with_its_field(tmp_path, sections, named):
    with pytest.raises(UserError) as refused:
        parse_config(recipe(tmp_path, tmp_path, None, tmp_path / "rows.jsonl", **sections))
    assert all(word in str(refused.value) for word in named), refused.value


# Held-out rows


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_tiny_model(folder / "student"), save_tiny_model(folder / "guide", seed=3)


def clustered_rows() -> list[dict[str, Any]]:
    """60 rows of which many share a text, some over several steps."""
    rng = random.Random(11)
    texts = [words(rng, 3, 9) for _ in range(50)]
    pairs = [(rng.choice(texts), rng.choice(texts)) for _ in range(12)]
    pairs += [(words(rng, 2, 6), words(rng, 4, 9)) for _ in range(48)]
    return [{"anchor": anchor, "positive": positive} for anchor, positive in pairs]


def held_out(folder: Path, models: tuple[Path, Path], share: Any = 0.25, seed: int = 0, **sections: Any):
    rows = write_jsonl(folder / "rows.jsonl", clustered_rows())
    data = {"hold_out": share, "cache_dir": str(folder / "corpora")}
    sections = {"batch": {"global_size": 16}} | sections
    return prepared(recipe(folder, *models, rows, data=data, seed=seed, **sections))


def test_no_text_of_a_held_out_row_is_trained_on(tmp_path, models):
    config, corpus = held_out(tmp_path, models)
    rows, sampler = held_out_rows(config, corpus), Sampler(corpus, config)
    assert 10 <= len(rows) <= 15
    trained = np.unique(np.concatenate([sampler.rows(step) for step in range(1, 2 * sampler.steps_per_epoch + 1)]))
    assert sorted([*rows, *trained]) == list(range(corpus.num_rows)), "each row is trained on or held out"

    def texts(of: np.ndarray) -> set[str]:
        return {corpus.text(int(text)) for text in np.concatenate([corpus.anchors[of], corpus.positives[of]])}

    assert texts(rows).isdisjoint(texts(trained))
    assert len(row_clusters(corpus)[1]) < corpus.num_rows, "some rows are joined"


def test_which_rows_are_held_out_is_a_function_of_corpus_seed_and_share(tmp_path, models):
    config, corpus = held_out(tmp_path, models)
    assert (held_out_rows(config, corpus) == held_out_rows(config, corpus)).all()
    other = config.model_copy(update={"seed": 1})
    assert set(held_out_rows(other, corpus)) != set(held_out_rows(config, corpus))
    assert parse_config(config.model_dump() | {"data": config.data.model_dump() | {"hold_out": "25%"}}) == config


def test_rows_that_all_mean_the_same_can_not_be_held_out(tmp_path, models):
    rows = [{"anchor": "amber", "positive": words(random.Random(number), 3, 6)} for number in range(40)]
    tree = recipe(tmp_path, *models, write_jsonl(tmp_path / "one.jsonl", rows), data={"hold_out": 0.1})
    with pytest.raises(UserError, match=r"data\.hold_out = 0\.1: .*40.* 1 clusters"):
        held_out_rows(*prepared(tree | {"batch": {"global_size": 8}}))


def test_the_evaluation_set_asks_for_the_members_of_the_clusters(tmp_path, models):
    config, corpus = held_out(tmp_path, models)
    write_evaluation_set(corpus, held_out_rows(config, corpus), tmp_path / "held_out")

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "held_out" / f"{name}.jsonl").read_text().splitlines()]

    documents = {row["_id"]: row["text"] for row in read("corpus")}
    queries = {row["_id"]: row["text"] for row in read("queries")}
    rows = held_out_rows(config, corpus)
    cluster = dict(zip(map(corpus.text, corpus.positives[rows].tolist()), row_clusters(corpus)[0][rows], strict=True))
    asked = dict(zip(map(corpus.text, corpus.anchors[rows].tolist()), row_clusters(corpus)[0][rows], strict=True))
    assert set(documents.values()) == set(cluster)
    found = {(queries[row["query-id"]], documents[row["corpus-id"]]) for row in read("qrels")}
    assert found == {(q, d) for q in asked for d in cluster if asked[q] == cluster[d] and q != d}


@pytest.mark.parametrize("guided", [True, False])
def test_the_held_out_loss_is_the_reference_s(tmp_path, models, guided):
    config, corpus = held_out(tmp_path, models, batch={"global_size": 16, "chunk_tokens": 64})
    if not guided:
        config = config.model_copy(update={"guide": None})
    rows = held_out_rows(config, corpus)
    guide = Guide(config.guide_or_student) if guided else None
    loss = held_out_loss(config, corpus, models[0], guide)
    plan = plan_batch(corpus, rows, 0, 64, with_guide=False)
    student = Student(config.student)
    student.model.eval()
    with torch.inference_mode():
        embedded = student.embed(corpus.student_tokens(plan.texts)).double()
        guides = guide.encode(corpus.guide_tokens(plan.texts)).double() if guide else None
    of_batch = [Row(int(anchor), int(positive)) for anchor, positive in zip(plan.anchors, plan.positives, strict=True)]
    table, known = np.concatenate([plan.positives, plan.negatives, plan.anchors]), set[tuple[int, int]]()
    if plan.known is not None:
        known = {(int(row), int(table[place])) for row, place in zip(*plan.known, strict=True)}
    expected, _ = reference_loss(of_batch, embedded, guides, plan.identity.tolist(), config.loss, known)
    assert loss == pytest.approx(float(expected), rel=2e-3)  # embeddings are rounded to fp16


# Students kept while a run trains, which it doesn't notice


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("scores"))


WATCHED = {"every_steps": 2, "during": ["STSBenchmark"]}


@pytest.fixture(scope="module")
def undisturbed(runs) -> dict[str, Any]:
    tree = runs.tree("undisturbed")
    runs.train(tree)
    return tree


def test_a_watched_run_is_bit_for_bit_the_undisturbed_one(runs, undisturbed):
    tree = runs.tree("watched", evaluate=WATCHED, checkpoint={"every_steps": 2, "keep": 9})
    assert runs.train(tree) == "finished"
    assert_same_run(tree, undisturbed)
    folder = run_dir(tree)
    assert unscored(folder) == [0, 2, 4, 6]
    for step in (2, 4, 6):
        kept = load_file(model_of(folder, step) / "model.safetensors")
        checkpoint = load_file(folder / "checkpoints" / f"step-{step:08}" / "model.safetensors")
        assert kept and all(
            torch.equal(tensor, checkpoint[next(key for key in checkpoint if key.endswith(name))])
            for name, tensor in kept.items()
        )
    untrained = SentenceTransformer(str(runs.student), device="cpu").encode(["amber basin"])
    assert (SentenceTransformer(str(model_of(folder, 0)), device="cpu").encode(["amber basin"]) == untrained).all()


def train_watched(world: World, tree: dict[str, Any]) -> list[int]:
    """Steps at which rank 0 waited for scores; every other time they are there."""
    config = parse_config(tree)
    encoders = Student(config.student), Guide(config.guide_or_student)
    corpus = prepare(config, *encoders, progress=lambda line: None)
    asked: list[int] = []

    def is_scored(step: int) -> bool:
        asked.append(step)
        return asked.count(step) == 2

    config.run_dir.mkdir(parents=True, exist_ok=True)
    train(config, Corpus(corpus.folder), *encoders, world, is_scored=is_scored)
    return asked


def test_workers_without_spare_resources_wait_for_the_scores(runs, undisturbed):
    tree = runs.tree("waiting", evaluate=WATCHED)
    assert runs.train_on(2, "waiting", train_watched, tree) == [[0, 0, 2, 2, 4, 4], []], "not for the last step's"
    assert_same_run(tree, undisturbed, 1e-5)  # two workers round otherwise than one


def test_a_run_that_goes_on_keeps_what_is_missing_once(runs, undisturbed):
    tree = runs.tree("resumed", evaluate=WATCHED, checkpoint={"every_steps": 2, "keep": 9})
    runs.train(tree)
    again = runs.from_checkpoint(tree, 4, "resumed-again")
    folder = run_dir(again)
    shutil.rmtree(model_of(folder, 4))  # the checkpoint was written, the student not yet
    shutil.rmtree(model_of(folder, 6))
    write_evaluation(folder, Evaluation(2, {"STSBenchmark": 0.5}))
    shutil.rmtree(model_of(folder, 2))
    assert runs.train(again) == "finished"
    assert unscored(folder) == [0, 4, 6] and not model_of(folder, 2).exists()
    assert_same_run(again, undisturbed)


def test_a_student_that_can_not_be_kept_costs_no_step(runs, undisturbed, monkeypatch, caplog):
    def full(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("gist_dist.training.snapshots.save_model", full)
    tree = runs.tree("full", evaluate=WATCHED)
    assert runs.train(tree) == "finished"
    assert_same_run(tree, undisturbed)
    assert unscored(run_dir(tree)) == [] and caplog.text.count("no space left on device") == 4


def test_scores_that_come_while_it_trains_are_lines_of_their_own(runs):
    tree = runs.tree("told", evaluate=WATCHED)
    folder = run_dir(tree)
    write_evaluation(folder, Evaluation(2, {"STSBenchmark": 0.5}, seconds=1.0))
    runs.train(tree)
    lines = evaluation_lines(folder / METRICS)
    assert lines == [{"step": 2, "evaluation": {"scores": {"STSBenchmark": 0.5}, "seconds": 1.0}}]
    assert [line["step"] for line in read_metrics(folder / METRICS)] == [*range(1, STEPS + 1)]
    assert last_step(folder) == STEPS


# The run's model


def folder_with_models(folder: Path, *steps: int) -> Path:
    for place in [folder / "model", *(model_of(folder, step) for step in steps)]:
        place.mkdir(parents=True)
        (place / "weights").write_text(place.parent.name if place.name == "model" else "")
    (folder / "model" / "weights").write_text("last")
    return folder


def weights_of(folder: Path) -> str:
    return (folder / "weights").read_text()


def test_the_best_model_is_the_run_s_and_the_last_stays_beside_it(tmp_path):
    folder = folder_with_models(tmp_path, 10, 20)
    for _ in range(2):  # ended before the run was marked as trained, and called again
        adopt_best(folder, Verdict(10), last=20)
        assert weights_of(folder / "model") == "step-00000010"
        assert weights_of(folder / "model-last") == "step-00000020"


def test_a_best_last_step_needs_no_second_model(tmp_path):
    folder = folder_with_models(tmp_path, 10, 20)
    adopt_best(folder, Verdict(20), last=20)
    adopt_best(folder, Verdict(), last=20)
    assert weights_of(folder / "model") == "last" and not (folder / "model-last").exists()


def test_a_run_stopped_early_has_no_model_but_those_that_were_kept(tmp_path):
    folder = folder_with_models(tmp_path, 10, 30)
    shutil.rmtree(folder / "model")
    adopt_best(folder, Verdict(10, 30), last=30)
    assert weights_of(folder / "model") == "step-00000010" and weights_of(folder / "model-last") == "step-00000030"


@pytest.mark.parametrize("waits", [True, False])
def test_an_evaluation_that_ends_itself_ends_a_training_that_waits_for_it(tmp_path, models, monkeypatch, caplog, waits):
    """As on a full disk: nobody would say that the step is scored."""
    config = overfitting(tmp_path, models, "full")
    shutil.copytree(models[0], model_of(config.run_dir, 1))
    monkeypatch.setattr("gist_dist.on_ray.tasks.scores.Share", lambda *arguments: FakeShare(waits))
    monkeypatch.setattr(ScoresWhileTraining, "_score", refuse)
    ended: list[bool] = []
    with ScoresWhileTraining(config, RunInputs(""), {}, on_stop=lambda: ended.append(True)) as scores:
        with pytest.raises(UserError, match="OSError: no space left"):
            scores.finish()
    assert ended == [True] * waits and caplog.text.count("no space left") == 1


class FakeShare:
    def __init__(self, waits: bool) -> None:
        self.waits = waits


def refuse(*arguments: Any) -> None:
    raise OSError("no space left")


# On Ray


def overfitting(folder: Path, models: tuple[Path, Path], name: str, **sections: Any) -> RunConfig:
    """Few rows and a learning rate far too high: scores of the held-out rows fall."""
    rng = random.Random(2)
    rows = [{"anchor": words(rng, 4, 8)} for _ in range(64)]
    for row in rows:  # some words in another order
        row["positive"] = " ".join(rng.sample(row["anchor"].split(), len(row["anchor"].split()) - 1))
    tree = {
        "data": {"hold_out": 0.25, "cache_dir": str(folder / "corpora")},
        "batch": {"global_size": 16},
        "optim": {"steps": 30, "learning_rate": 0.5, "schedule": "constant"},
        "checkpoint": {"every_steps": 5},
        "evaluate": {"every_steps": 1, "keep_best": "held_out", "stop_after": 3},
        "tracking": {"tensorboard": False},
    }
    path = write_jsonl(folder / "rows.jsonl", rows)
    return parse_config(recipe(folder, *models, path, name=name, **(tree | sections)))


@pytest.fixture(scope="module")
def stopped_early(ray_session, tmp_path_factory, models) -> RunConfig:
    config = overfitting(tmp_path_factory.mktemp("early"), models, "early")
    train_and_evaluate(config)
    return config


@pytest.mark.ray
def test_a_run_that_overfits_ends_early_with_its_best_model(stopped_early):
    folder = stopped_early.run_dir
    found = read_evaluations(folder)
    verdict = judge(found, "held_out", 3)
    assert verdict.stop is not None and verdict.best is not None and verdict.stop < 30
    values = {evaluation.step: evaluation.scores["held_out"] for evaluation in found}
    assert values[verdict.best] > values[verdict.stop]
    assert all(evaluation.loss is not None for evaluation in found)
    best, last = (load_file(folder / name / "model.safetensors") for name in ("model", "model-last"))
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert json.loads((folder / "state.json").read_text()) == {"state": "trained", "step": verdict.stop}
    assert {line["step"] for line in evaluation_lines(folder / METRICS)} == set(values)
    assert not list(folder.glob("evaluations/*/model")), "they are as large as the model"
    report = json.loads((folder / "report.json").read_text())["evaluations"]
    assert (report["best"], report["last"], report["stopped_early"]) == (verdict.best, verdict.stop, True)
    assert f"step {verdict.best}" in (folder / "report.html").read_text()
    assert f"{verdict.best:,}, the best by held_out" in (folder / "model" / "README.md").read_text()
    assert (folder / "plots" / "scores.png").exists() and (folder / "plots" / "held_out_loss.png").exists()


@pytest.mark.ray
def test_an_early_end_is_found_by_the_next_command_too(stopped_early, models, monkeypatch):
    """Killed after the last scores: nothing is trained any more, and nothing scored twice."""
    folder = stopped_early.run_dir
    verdict = judge(read_evaluations(folder), "held_out", 3)
    assert verdict.best is not None and verdict.stop is not None
    again = parse_config(stopped_early.model_dump() | {"name": "again"})
    shutil.copytree(folder, again.run_dir)
    for step, name in ((verdict.best, "model"), (verdict.stop, "model-last")):
        (again.run_dir / name).rename(model_of(again.run_dir, step))
    (again.run_dir / "state.json").unlink()
    (again.run_dir / "config.yaml").unlink()  # it has the other name

    def trained(*arguments: Any) -> str:
        raise AssertionError("trained again")

    monkeypatch.setattr("gist_dist.on_ray.driver.fit", trained)
    train_and_evaluate(again)
    for name in ("model", "model-last"):
        assert (folder / name / "model.safetensors").read_bytes() == (
            again.run_dir / name / "model.safetensors"
        ).read_bytes()


@pytest.mark.ray
def test_a_kill_within_an_evaluation_costs_only_what_was_not_done(stopped_early, ray_session, tmp_path, models):
    """Models that wait, one with a task's result but not its own end, are scored by the next command, once."""
    config = overfitting(tmp_path, models, "killed", evaluate={"every_steps": 1, "keep_best": "held_out"})
    config.run_dir.mkdir(parents=True)
    shutil.copytree(stopped_early.run_dir / "held_out", config.run_dir / "held_out")
    for step in (0, 1):
        shutil.copytree(models[0], model_of(config.run_dir, step))
    first, _ = inputs_of(config)
    with ScoresWhileTraining(config, first, ray_session, on_stop=lambda: None) as scores:
        scores.finish()
    done = {step: folder_of(config.run_dir, step) / "held_out.json" for step in (0, 1)}
    before = {step: file.stat().st_mtime_ns for step, file in done.items()}
    (folder_of(config.run_dir, 1) / "scores.json").unlink()
    shutil.copytree(models[0], model_of(config.run_dir, 1), dirs_exist_ok=True)
    with ScoresWhileTraining(config, first, ray_session, on_stop=lambda: None) as scores:
        scores.finish()
    assert is_done(config.run_dir, 1) and {step: file.stat().st_mtime_ns for step, file in done.items()} == before


@pytest.mark.ray
def test_a_set_that_fails_is_told_and_ends_nothing(ray_session, tmp_path, models, caplog):
    config = overfitting(tmp_path, models, "fails", evaluate={"every_steps": 1, "during": ["STSBenchmark", "held_out"]})
    inputs, corpus = inputs_of(config)
    write_evaluation_set(corpus, held_out_rows(config, corpus), config.run_dir / "held_out")
    shutil.copytree(models[0], model_of(config.run_dir, 3))
    with ScoresWhileTraining(config, inputs, ray_session, on_stop=lambda: None) as scores:
        scores.finish()
    (found,) = read_evaluations(config.run_dir)
    assert list(found.scores) == ["held_out"] and list(found.failed) == ["STSBenchmark"]
    assert found.value("mean") is None and "after step 3: STSBenchmark" in caplog.text


@pytest.mark.ray
def test_a_command_that_is_stopped_while_it_scores_goes_on_later(ray_session, tmp_path, models):
    config = overfitting(tmp_path, models, "stopped")
    inputs, _ = inputs_of(config)
    shutil.copytree(models[0], model_of(config.run_dir, 3))

    def check() -> None:
        raise Stopped("asked to")

    with pytest.raises(Stopped), ScoresWhileTraining(config, inputs, ray_session, on_stop=lambda: None) as scores:
        scores.finish(check)
    assert unscored(config.run_dir) == [3]


@pytest.mark.ray
@pytest.mark.parametrize(("workers", "waits"), [(1, False), (2, True), ([1, 2], True)])
def test_training_waits_only_where_nothing_is_spare(ray_session, tmp_path, models, workers, waits):
    config = overfitting(tmp_path, models, "share", cluster={"num_workers": workers})
    share = Share(config.cluster, {"CPU": 2.0})
    assert share.waits == waits
    options, gpu = share.options()
    assert (options["num_cpus"] == 0) == waits and gpu is None


def inputs_of(config: RunConfig) -> tuple[RunInputs, Corpus]:
    corpus = prepare(config, Student(config.student), Guide(config.guide_or_student), progress=lambda line: None)
    return RunInputs(corpus.place), corpus
