"""Benchmarks by name, languages and parts of a task: what is scored, what a result is of, and the means of a report."""

import json
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from gist_dist.common.errors import UserError
from gist_dist.config import EvaluateConfig, RunConfig
from gist_dist.evaluation.evaluate import evaluate_task, finished_score, model_identity, read_results
from gist_dist.evaluation.names import parse_task
from gist_dist.evaluation.suites import check_evaluation, expanded, suites_of, with_suites, write_suites
from gist_dist.report import build_report
from gist_dist.report.run import read_run
from gist_dist.report.suites import _means, summarize_languages, summarize_suites
from tests.test_evaluation import classification_rows, sts_rows, write, write_retrieval
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {label: save_tiny_model(folder / label, seed=seed) for seed, label in enumerate(("baseline", "trained"))}


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Three sets of one's own, a task of MTEB's in two languages, and a benchmark of them all."""
    folder = tmp_path / "tasks"
    write(folder / "OurPairs" / "test.csv", sts_rows())
    write_retrieval(folder / "OurSearch")
    for split, first, last in (("train", 0, 4), ("test", 4, 6)):
        write(folder / "OurTopics" / f"{split}.csv", classification_rows(first, last))
    rows = sts_rows()
    both = [row | {"lang": "en-en"} for row in rows] + [row | {"lang": "es-en"} for row in rows[::-1][:5]]
    write(folder / "STS17" / "test.parquet", both)
    write(folder / "MasakhaNEWSClusteringS2S" / "eng" / "test.parquet", [{"sentences": "a", "labels": "b"}])
    (folder / "ours.yaml").write_text("tasks: [OurPairs, OurSearch, OurTopics, 'STS17[en-en, es-en]']\n")
    return folder


def evaluate(sets: Path, **fields: object) -> EvaluateConfig:
    return EvaluateConfig(local_tasks=str(sets), **fields)


def run_of(folder: Path, sets: Path, models: dict[str, Path], wanted: EvaluateConfig) -> Path:
    """A run's folder with results of both models."""
    tree = {"name": "it", "student": {"model": str(models["baseline"])}, "data": {"sources": [{"path": "none.jsonl"}]}}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | {"evaluate": {"tasks": list(expanded(wanted).tasks)}}))
    write_suites(wanted, folder / "mteb")
    for label, model in models.items():
        for task in expanded(wanted).tasks:
            evaluate_task(model, task, wanted, folder / "mteb" / label)
    return folder


def test_a_benchmark_of_ones_own_is_scored_offline_with_its_means_in_the_report(
    sets: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    wanted = evaluate(sets, benchmark="ours")
    check_evaluation(wanted)
    folder = run_of(tmp_path / "run", sets, models, wanted)
    build_report(folder)
    (suite,) = json.loads((folder / "report.json").read_text())["benchmarks"]
    scores = {label: read_results(folder / "mteb" / label) for label in models}
    assert [task.main_score for task in scores["baseline"].values()] != [
        task.main_score for task in scores["trained"].values()
    ]
    rows = {row["mean"]: row for row in suite["rows"]}
    for label, side in (("baseline", "before"), ("trained", "after")):
        of = {task: 100 * score.main_score for task, score in scores[label].items()}
        assert rows["Mean (Task)"][side] == pytest.approx(fmean(of.values()), abs=0.006)
        sts = (of["OurPairs"] + of["STS17"]) / 2
        assert rows["STS"][side] == pytest.approx(sts, abs=0.006)
        by_type = fmean([sts, of["OurSearch"], of["OurTopics"]])
        assert rows["Mean (TaskType)"][side] == pytest.approx(by_type, abs=0.006)
    first = rows["Mean (Task)"]
    assert first["change"] == pytest.approx(first["after"] - first["before"], abs=0.006)
    assert "ours: the mean over 4 tasks is" in (folder / "report.html").read_text()

    (folder / "mteb" / "trained" / "OurPairs.json").unlink()
    (suite,) = summarize_suites(read_run(folder))
    assert suite["num_scored"] == 3 and all(row["after"] is None for row in suite["rows"])


def test_means_are_those_of_mteb() -> None:
    import mteb
    from mteb.benchmarks.benchmark import BenchmarkAggregation
    from mteb.results import TaskResult

    from gist_dist.evaluation.evaluate import Score

    tasks = [mteb.get_task(name) for name in ("STS12", "STS13", "SciFact", "Banking77Classification")]
    values = [0.31, 0.47, 0.62, 0.85]
    results = [
        TaskResult.from_task_results(
            task, {"test": {"default": {"main_score": value}}}, evaluation_time=1.0, kg_co2_emissions=None
        )
        for task, value in zip(tasks, values, strict=True)
    ]
    expected = {}
    for each in (BenchmarkAggregation.MEAN_TASK, BenchmarkAggregation.MEAN_TASK_TYPE, BenchmarkAggregation.TASK_TYPES):
        expected |= each.aggregate(results)
    ours = _means([Score(t.metadata.name, t.metadata.type, v, "", 1.0) for t, v in zip(tasks, values, strict=True)])
    assert {title.replace(" (", "("): value for title, value in ours.items()} == pytest.approx(expected)


def test_a_part_is_never_taken_for_the_whole(sets: Path, models: dict[str, Path], tmp_path: Path) -> None:
    wanted, model = evaluate(sets), models["trained"]
    identity = model_identity(model)
    file = evaluate_task(model, "STS17[es-en]", wanted, tmp_path)
    assert file.name == "STS17.json"
    (entry,) = json.loads(file.read_text())["scores"]["test"]
    assert entry["hf_subset"] == "es-en"
    assert read_results(tmp_path)["STS17"].languages.keys() == {"eng", "spa"}
    assert finished_score(tmp_path, "STS17[es-en]", wanted, identity)
    assert finished_score(tmp_path, "STS17", wanted, identity) is None
    assert finished_score(tmp_path, "STS17[en-en, es-en]", wanted, identity) is None
    evaluate_task(model, "STS17[es-en, en-en]", wanted, tmp_path)
    assert len(json.loads(file.read_text())["scores"]["test"]) == 2
    assert finished_score(tmp_path, "STS17[en-en, es-en]", wanted, identity)
    assert finished_score(tmp_path, "STS17[es-en]", wanted, identity) is None


def test_scores_by_language_are_in_the_report(sets: Path, models: dict[str, Path], tmp_path: Path) -> None:
    wanted = evaluate(sets, tasks=["STS17[en-en, es-en]", "OurPairs"])
    folder = run_of(tmp_path / "run", sets, models, wanted)
    rows = {row["language"]: row for row in summarize_languages(read_run(folder))}
    assert rows.keys() == {"eng", "spa"}
    entries = json.loads((folder / "mteb" / "trained" / "STS17.json").read_text())["scores"]["test"]
    of = {entry["hf_subset"]: 100 * entry["main_score"] for entry in entries}
    assert rows["spa"]["after"] == pytest.approx(of["es-en"], abs=0.006)
    assert rows["eng"]["after"] == pytest.approx(fmean(of.values()), abs=0.006)


def test_benchmarks_of_mteb_are_expanded_to_what_they_score() -> None:
    wanted = EvaluateConfig(benchmark="MTEB(eng, v2)", tasks=("SICK-R",))
    tasks = expanded(wanted).tasks
    assert len(tasks) == 41 and "STS17[en-en]" in tasks and "MassiveIntentClassification[en]@test" in tasks
    assert expanded(expanded(wanted)) == expanded(wanted)
    (suite,) = suites_of(EvaluateConfig(benchmark="RTEB(beta)"))
    assert suite.private and not set(suite.private) & {parse_task(task).name for task in suite.tasks}
    (suite,) = suites_of(EvaluateConfig(benchmark="MTEB(Multilingual, v2)", languages=("deu", "fra")))
    assert len(suite.tasks) + len(suite.left_out) == 131 and "BUCC.v2[de-en, fr-en]" in suite.tasks


def test_languages_hold_for_what_is_scored_while_the_run_trains() -> None:
    recipe = {"name": "x", "student": {"model": "m"}, "data": {"sources": [{"path": "x.jsonl"}]}}
    during = {"tasks": ["Tatoeba"], "benchmark": "NanoBEIR", "every_steps": 5, "keep_best": "Tatoeba"}
    config = with_suites(RunConfig.model_validate(recipe | {"evaluate": during | {"languages": ["deu", "fra", "eng"]}}))
    assert len(config.watched) == 1 and config.watched == (config.evaluate.keep_best,)
    config = RunConfig.model_validate(
        recipe | {"evaluate": during | {"tasks": ["Tatoeba[deu-eng]"], "keep_best": None}}
    )
    assert with_suites(config).watched == ("Tatoeba[deu-eng]",) and len(with_suites(config).evaluate.tasks) == 14


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"benchmark": "MTEB(en, v2)"}, r"no benchmark of that name.*did you mean MTEB\(eng, v2\)"),
        ({"benchmark": "our"}, r"our.yaml; did you mean ours"),
        ({"benchmark": "NanoBEIR"}, "HF_HUB_OFFLINE is set, and data of 13 of its 13 tasks .*'NanoArguAnaRetrieval'"),
        ({"benchmark": "MIEB(eng)"}, "is about image"),
        ({"benchmark": "NanoBEIR", "languages": ["deu"]}, "NanoBEIR has no task in deu"),
        ({"benchmark": "ours", "tasks": ["STS17"]}, "a task has one result"),
        ({"tasks": ["Tatoeba[deu-english]"]}, "Tatoeba has no part 'deu-english'; did you mean deu-eng"),
        ({"tasks": ["Tatoeba@dev"]}, "Tatoeba has no split 'dev'"),
        ({"tasks": ["Tatoeba[]"]}, "no name of a task"),
        ({"tasks": ["OurPairs[deu]"]}, "has no parts"),
        ({"tasks": ["MasakhaNEWSClusteringS2S[amh]"]}, "has no data of MasakhaNEWSClusteringS2S's part 'amh'"),
        ({"tasks": ["SciFact"], "languages": ["deu"]}, "SciFact is not in deu"),
        ({"tasks": ["Tatoeba"], "languages": ["german"]}, "no code of a language .* did you mean deu"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    sets: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], told: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=told):
        check_evaluation(evaluate(sets, **fields))


@pytest.mark.parametrize("text", ["tasks: []", "tasks: OurPairs", "- OurPairs", "tasks: [{a: 1}]", "tasks: ["])
def test_a_benchmark_of_ones_own_that_is_none_is_refused_with_its_file(sets: Path, text: str) -> None:
    (sets / "ours.yaml").write_text(text)
    with pytest.raises(UserError, match=r"ours\.yaml: "):
        check_evaluation(evaluate(sets, benchmark="ours"))
