"""MTEB scores: of its own tasks from local folders, of a user's own sets, and side by side on Ray."""

import csv
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from gist_dist.common.errors import UserError
from gist_dist.config import EvaluateConfig, RunConfig
from gist_dist.evaluation.evaluate import Score, evaluate_task, read_results
from gist_dist.evaluation.tasks import check_tasks, load_task

os.environ["HF_HUB_OFFLINE"] = "1"
SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.usefixtures("shared_data")

PAIRS = [
    ("a man plays a guitar", "a man is playing a guitar", 5.0),
    ("a dog runs in the park", "a puppy is running outside", 4.0),
    ("a woman cooks dinner", "someone prepares a meal", 3.5),
    ("children play football", "kids are at school", 1.5),
    ("the stock market fell", "a cat sleeps on the sofa", 0.0),
    ("rain is expected tomorrow", "he bought a new car", 0.2),
]
TOPICS = {
    "cooking": "boil the pasta|bake bread in an oven|chop onions|fry an egg|a recipe for soup|season a stew",
    "sport": "score a goal|win a match|run a marathon|the football team lost|swim laps|a tennis racket",
}


@pytest.fixture(scope="session")
def one_layer(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 without its upper five layers: quick, and good enough to tell texts apart."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu")
    model[0].model.encoder.layer = model[0].model.encoder.layer[:1]
    model[0].model.config.num_hidden_layers = 1
    folder = tmp_path_factory.mktemp("models") / "one_layer"
    model.save(str(folder), create_model_card=False)
    return folder


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


def sts_rows() -> list[dict]:
    return [{"sentence1": a, "sentence2": b, "score": score} for a, b, score in PAIRS]


def classification_rows(first: int, last: int) -> list[dict]:
    return [{"text": t, "label": label} for label, ts in TOPICS.items() for t in ts.split("|")[first:last]]


def write_retrieval(folder: Path, suffix: str = ".jsonl") -> None:
    """Every query has one document, its paraphrase; ids begin with a zero."""
    queries, documents, _ = zip(*PAIRS, strict=True)
    corpus = [{"_id": f"0{i}", "title": "", "text": text} for i, text in enumerate(documents)]
    write(folder / f"corpus{suffix}", corpus)
    write(folder / f"queries{suffix}", [{"_id": f"00{i}", "text": t} for i, t in enumerate(queries[:4])])
    qrels = [{"query-id": f"00{i}", "corpus-id": f"0{i}", "score": 1} for i in range(4)]
    write(folder / ("qrels.tsv" if suffix == ".jsonl" else f"qrels{suffix}"), qrels)


def evaluate_own(model: Path, folder: Path, name: str) -> Score:
    evaluate = EvaluateConfig(tasks=(name,), local_tasks=str(folder))
    check_tasks(evaluate)
    evaluate_task(model, name, evaluate, folder / "results")
    return read_results(folder / "results")[name]


def cosine(model: Path, left: list[str], right: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(model), device="cpu")
    a, b = (encoder.encode(texts, show_progress_bar=False) for texts in (left, right))
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


# ------------------------------------------------------------------------------------------ MTEB's own tasks


@needs_shared
def test_a_registered_task_on_a_local_folder_scores_what_scipy_finds(one_layer: Path, tmp_path: Path) -> None:
    from mteb.results import TaskResult

    evaluate = EvaluateConfig(tasks=("STSBenchmark",), local_tasks=str(SHARED / "mteb"))
    file = evaluate_task(one_layer, "STSBenchmark", evaluate, tmp_path)
    score = read_results(tmp_path)["STSBenchmark"]
    assert (score.kind, score.metric) == ("STS", "cosine_spearman") and score.seconds > 0

    (data,) = (SHARED / "mteb/STSBenchmark/default").glob("test-*.parquet")
    rows = pq.read_table(data).to_pydict()
    ours = cosine(one_layer, rows["sentence1"], rows["sentence2"]).diagonal()
    assert score.main_score == pytest.approx(spearmanr(rows["score"], ours)[0], abs=1e-5)
    # Measured with MTEB alone, to one decimal (../shared/data/README.md).
    assert 100 * score.main_score == pytest.approx(56.7, abs=0.06)
    assert TaskResult.from_disk(file).get_score() == score.main_score


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(("task", "published"), [("STSBenchmark", 82.03), ("STS13", 80.60)])
def test_minilm_has_its_published_score(minilm: Path, tmp_path: Path, task: str, published: float) -> None:
    evaluate_task(minilm, task, EvaluateConfig(local_tasks=str(SHARED / "mteb")), tmp_path)
    assert 100 * read_results(tmp_path)[task].main_score == pytest.approx(published, abs=0.05)


@needs_shared
def test_a_multilingual_task_runs_the_subsets_that_the_folder_holds(one_layer: Path, tmp_path: Path) -> None:
    task = "MasakhaNEWSClusteringS2S"
    file = evaluate_task(one_layer, task, EvaluateConfig(local_tasks=str(SHARED / "mteb")), tmp_path)
    entries = json.loads(file.read_text())["scores"]["test"]
    assert [entry["hf_subset"] for entry in entries] == ["eng"]
    assert read_results(tmp_path)[task].kind == "Clustering"


@needs_shared
def test_every_task_of_the_pack_passes_the_checks() -> None:
    for folder in (SHARED / "mteb", SHARED / "extra"):
        names = tuple(f.name for f in folder.iterdir())
        assert names
        check_tasks(EvaluateConfig(tasks=names, local_tasks=str(folder)))


def sts13(folder: Path, rows: list[dict]) -> None:
    write(folder / "STS13" / "test.parquet", rows)


def test_changed_data_under_the_same_file_names_are_read_anew(tmp_path: Path) -> None:
    sts13(tmp_path, sts_rows())
    task = load_task("STS13", str(tmp_path))
    task.load_data()
    assert task.dataset["test"]["sentence1"][0] == PAIRS[0][0]
    task.unload_data()
    task.load_data()  # not from the Hub
    assert len(task.dataset["test"]) == len(PAIRS)

    sts13(tmp_path, [{**row, "sentence1": "changed"} for row in sts_rows()])
    task = load_task("STS13", str(tmp_path))
    task.load_data()
    assert task.dataset["test"]["sentence1"][0] == "changed"


def test_local_tasks_need_no_writable_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    sts13(tmp_path, sts_rows())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/no-such-home/datasets"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    task = load_task("STS13", str(tmp_path))
    task.load_data()
    assert len(task.dataset["test"]) == len(PAIRS)
    assert Path("/proc/no-such-home/datasets") == datasets.config.HF_DATASETS_CACHE


# ----------------------------------------------------------------------------------------- a user's own sets


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_own_sts_set(one_layer: Path, tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "OurPairs" / f"test{suffix}", sts_rows())
    score = evaluate_own(one_layer, tmp_path, "OurPairs")
    left, right, truth = zip(*PAIRS, strict=True)
    expected = spearmanr(truth, cosine(one_layer, list(left), list(right)).diagonal())[0]
    assert score.kind == "STS" and score.main_score == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_own_retrieval_set(one_layer: Path, tmp_path: Path, suffix: str) -> None:
    write_retrieval(tmp_path / "OurSearch", suffix)
    score = evaluate_own(one_layer, tmp_path, "OurSearch")
    similarity = cosine(one_layer, [a for a, _, _ in PAIRS[:4]], [b for _, b, _ in PAIRS])
    ranks = [int((row > row[i]).sum()) for i, row in enumerate(similarity)]
    assert (score.kind, score.metric) == ("Retrieval", "ndcg_at_10")
    assert score.main_score == pytest.approx(np.mean([1 / np.log2(rank + 2) for rank in ranks]), abs=1e-5)
    assert score.main_score > 0.5


def test_own_reranking_set_in_the_layout_of_mteb(one_layer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "OurRanking"
    write_retrieval(folder, ".parquet")
    for part, place in (("corpus", "corpus"), ("queries", "queries"), ("qrels", "default")):
        (folder / place).mkdir()
        (folder / f"{part}.parquet").rename(folder / place / "test-0123abcd.parquet")
    write(folder / "default" / "dev.parquet", [{"query-id": "x", "corpus-id": "y", "score": 1}])
    ranked = [{"query-id": f"00{i}", "corpus-ids": ["04", "05", f"0{i}"]} for i in range(4)]
    write(folder / "top_ranked" / "test.parquet", ranked)
    score = evaluate_own(one_layer, tmp_path, "OurRanking")
    assert (score.kind, score.metric) == ("Reranking", "map_at_1000")
    assert score.main_score == 1  # among three, of which two are about something else


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_own_classification_set_with_labels_in_words(one_layer: Path, tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "OurTopics" / f"train{suffix}", classification_rows(0, 4))
    write(tmp_path / "OurTopics" / f"test{suffix}", classification_rows(4, 6))
    score = evaluate_own(one_layer, tmp_path, "OurTopics")
    assert (score.kind, score.metric) == ("Classification", "accuracy")
    assert score.main_score >= 0.75


def test_another_prompt_is_encoded_and_makes_another_result(one_layer: Path, tmp_path: Path) -> None:
    write_retrieval(tmp_path / "OurSearch")
    evaluate = EvaluateConfig(local_tasks=str(tmp_path))
    mains = []
    for prompts in (None, {"query": 3 * "a cat sleeps on the sofa, "}):
        evaluate_task(one_layer, "OurSearch", evaluate, tmp_path / "results", prompts)
        mains.append(read_results(tmp_path / "results")["OurSearch"].main_score)
    assert mains[1] < mains[0]


# ----------------------------------------------------------------------------------------------- idempotence


def test_a_finished_task_is_not_evaluated_again(one_layer: Path, tmp_path: Path) -> None:
    write(tmp_path / "OurPairs" / "test.csv", sts_rows())
    evaluate, results = EvaluateConfig(local_tasks=str(tmp_path)), tmp_path / "results"
    file = evaluate_task(one_layer, "OurPairs", evaluate, results)
    written, first = file.stat().st_mtime_ns, read_results(results)["OurPairs"]

    start = time.perf_counter()
    assert evaluate_task(one_layer, "OurPairs", evaluate, results) == file
    assert time.perf_counter() - start < 1
    assert file.stat().st_mtime_ns == written

    file.write_text(file.read_text()[:100])  # torn by something else than us
    with pytest.raises(UserError, match=r"OurPairs.json: not an MTEB result"):
        read_results(results)
    evaluate_task(one_layer, "OurPairs", evaluate, results)
    assert read_results(results)["OurPairs"].main_score == first.main_score  # and MTEB is deterministic
    assert sorted(f.name for f in results.iterdir()) == ["OurPairs.json", "details", "model_meta.json"]


def test_another_precision_is_evaluated_anew_and_scores_nearly_the_same(one_layer: Path, tmp_path: Path) -> None:
    write(tmp_path / "OurPairs" / "test.csv", sts_rows())
    results, scores = tmp_path / "results", []
    for precision in ("fp32", "bf16"):
        evaluate = EvaluateConfig(local_tasks=str(tmp_path), precision=precision)
        file = evaluate_task(one_layer, "OurPairs", evaluate, results)
        details = json.loads((results / "details" / "OurPairs.json").read_text())
        assert details["precision"] == precision
        (entry,) = json.loads(file.read_text())["scores"]["test"]
        scores.append(entry["cosine_pearson"])
    assert 1e-9 < abs(scores[1] - scores[0]) < 0.02


def test_other_data_or_another_model_are_evaluated_anew(one_layer: Path, tmp_path: Path) -> None:
    write(tmp_path / "OurPairs" / "test.csv", sts_rows())
    evaluate, results = EvaluateConfig(local_tasks=str(tmp_path)), tmp_path / "results"
    file = evaluate_task(one_layer, "OurPairs", evaluate, results)
    before, first = read_results(results)["OurPairs"].main_score, file.stat().st_mtime_ns

    worse = [{**row, "score": 5 - row["score"]} for row in sts_rows()]
    write(tmp_path / "OurPairs" / "test.csv", worse)
    evaluate_task(one_layer, "OurPairs", evaluate, results)
    assert read_results(results)["OurPairs"].main_score == pytest.approx(-before, abs=1e-6)

    shutil.copytree(one_layer, tmp_path / "other")
    second = file.stat().st_mtime_ns
    (tmp_path / "other" / "README.md").write_text("A model card does not change a model.")
    evaluate_task(tmp_path / "other", "OurPairs", evaluate, results)
    assert file.stat().st_mtime_ns == second > first
    config = tmp_path / "other" / "config_sentence_transformers.json"
    config.write_text(config.read_text() + " ")
    evaluate_task(tmp_path / "other", "OurPairs", evaluate, results)
    assert file.stat().st_mtime_ns > second


# --------------------------------------------------------------------------------------------- hostile input


def check(folder: Path, *tasks: str) -> None:
    check_tasks(EvaluateConfig(tasks=tasks, local_tasks=str(folder)))


def test_an_unknown_task_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'STSBenchmrk'.*did you mean .*STSBenchmark"):
        check_tasks(EvaluateConfig(tasks=("STSBenchmrk",)))
    write(tmp_path / "OurPairs" / "test.csv", sts_rows())
    with pytest.raises(UserError, match=r"did you mean OurPairs"):
        check(tmp_path, "ourpair")
    with pytest.raises(UserError, match=r"'\.\./OurPairs': MTEB has no task"):
        check(tmp_path / "OurPairs", "../OurPairs")
    with pytest.raises(UserError, match=r"evaluate.local_tasks: no folder '.*nowhere'"):
        check(tmp_path / "nowhere", "STS12")
    with pytest.raises(UserError, match=r"is about .*image.*; only tasks on text"):
        check_tasks(EvaluateConfig(tasks=("CIFAR10",)))
    check_tasks(EvaluateConfig())


def wrong_sets(folder: Path) -> dict[str, str]:
    """Broken sets, each with what its error must say."""
    rows = sts_rows()
    write(folder / "NoScore" / "test.csv", [{"sentence1": "a", "sentence2": "b"}])
    write(folder / "Word" / "test.csv", [*rows, {**rows[0], "score": "high"}])
    write(folder / "Constant" / "test.jsonl", [{**row, "score": 1} for row in rows])
    write(folder / "Missing" / "test.jsonl", [*rows, {"sentence1": "a", "score": 1}])
    write(folder / "Other" / "test.csv", [{"question": "a", "answer": "b"}])
    write(folder / "NoTrain" / "test.csv", classification_rows(4, 6))
    write(folder / "NewLabel" / "train.csv", classification_rows(0, 4))
    write(folder / "NewLabel" / "test.csv", [{"text": "vote", "label": "politics"}])
    write_retrieval(folder / "NoQrels")
    (folder / "NoQrels" / "qrels.tsv").unlink()
    write_retrieval(folder / "Strangers")
    write(folder / "Strangers" / "qrels.tsv", [{"query-id": "000", "corpus-id": "unknown", "score": 1}])
    write_retrieval(folder / "Twice")
    write(folder / "Twice" / "corpus.jsonl", [{"_id": "00", "text": "a"}, {"_id": "00", "text": "b"}])
    write_retrieval(folder / "NoText")
    write(folder / "NoText" / "queries.jsonl", [{"_id": "000", "words": "a"}])
    write(folder / "Both" / "test.csv", rows)
    write(folder / "Both" / "test.jsonl", rows)
    (folder / "Ragged").mkdir()
    (folder / "Ragged" / "test.csv").write_text("sentence1,sentence2,score\na,b,1\na,b\n")
    (folder / "Damaged").mkdir()
    (folder / "Damaged" / "test.parquet").write_bytes(b"PAR1 no more")
    (folder / "Empty").mkdir()
    # Registered at MTEB, with other columns or splits than its task has.
    write(folder / "STS12" / "test.parquet", [{"sentence1": "a", "sentence_2": "b", "score": 1.0}])
    write(folder / "STS14" / "validation.parquet", rows)
    write(folder / "MasakhaNEWSClusteringS2S" / "test.parquet", [{"sentences": ["a"], "labels": [1]}])
    (folder / "STS15").mkdir()
    return {
        "NoScore": r"NoScore.test\.csv: no column 'score' \(has: 'sentence1', 'sentence2'\)",
        "Word": r"Word.test\.csv: row 7: column 'score' is 'high', not a number",
        "Constant": r"Constant.test\.jsonl: column 'score' is 1.0 in all rows",
        "Missing": r"Missing.test\.jsonl: row 7: column 'sentence2' is None, not a text",
        "Other": r"Other.test\.csv: columns 'answer', 'question' are neither",
        "NoTrain": r"NoTrain: no train\.\*",
        "NewLabel": r"NewLabel: test\.\* has labels that train\.\* lacks: 'politics'",
        "NoQrels": r"NoQrels: no qrels\.\*",
        "Strangers": r"Strangers.qrels\.tsv: no row joins",
        "Twice": r"Twice.corpus\.jsonl: row 2: id '00' is there twice",
        "NoText": r"NoText.queries\.jsonl: no column 'text' or 'query' or 'question' \(has: '_id', 'words'\)",
        "Both": r"Both: both test\.csv and test\.jsonl; keep one",
        "Ragged": r"Ragged.test\.csv: line 3 has 2 fields, the header 3",
        "Damaged": r"Damaged.test\.parquet: can't be read",
        "Empty": r"Empty: not a task of MTEB's, and no evaluation set",
        "STS12": r"STS12.test\.parquet: no column 'sentence2' \(has: 'score', 'sentence1', 'sentence_2'\)",
        "STS14": r"STS14: 'default' has no split 'test' \(has: 'validation'\)",
        "MasakhaNEWSClusteringS2S": r"has none of MasakhaNEWSClusteringS2S's subsets .* \(has: default\)",
        "STS15": r"STS15: ",
    }


def test_wrong_sets_are_refused_with_their_file_and_column(tmp_path: Path) -> None:
    for name, message in wrong_sets(tmp_path).items():
        with pytest.raises(UserError, match=message) as refused:
            check(tmp_path, name)
        assert "\n" not in str(refused.value)


def test_results_of_a_folder_that_is_not_there_are_none(tmp_path: Path) -> None:
    assert read_results(tmp_path / "nothing") == {}


def test_reading_results_imports_neither_mteb_nor_torch() -> None:
    import subprocess
    import sys

    code = "import sys, gist_dist.evaluation.evaluate; print({'mteb', 'torch', 'datasets', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------------------------------------------- on Ray


@pytest.mark.ray
def test_one_failing_task_does_not_lose_the_others(
    ray_session: None, one_layer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from gist_dist.on_ray.tasks.evaluation import evaluate_models

    tasks = tmp_path / "tasks"
    write(tasks / "OurPairs" / "test.csv", sts_rows())
    write_retrieval(tasks / "OurSearch")
    write(tasks / "Broken" / "test.csv", [{"sentence1": "a", "sentence2": "b"}])
    config = RunConfig.model_validate(
        {
            "name": "test",
            "output_dir": str(tmp_path),
            "student": {"model": str(one_layer)},
            "data": {"sources": [{"path": "unused.parquet"}]},
            # SICK-R is one of MTEB's, but its data can't be loaded: there is no Hub here.
            "evaluate": {"tasks": ["OurPairs", "Broken", "OurSearch", "SICK-R"], "local_tasks": str(tasks)},
        }
    )
    models = {"baseline": str(one_layer), "trained": str(one_layer)}
    seen: list[tuple] = []
    caplog.set_level("INFO", logger="gist_dist")
    failures = evaluate_models(models, config, tmp_path / "mteb", lambda *event: seen.append(event))

    assert {label: sorted(errors) for label, errors in failures.items()} == {
        "baseline": ["Broken", "SICK-R"],
        "trained": ["Broken", "SICK-R"],
    }
    assert "no column 'score'" in failures["trained"]["Broken"]
    assert all("\n" not in error for errors in failures.values() for error in errors.values())
    assert json.loads((tmp_path / "mteb" / "failures.json").read_text()) == failures
    assert [event[3:] for event in seen] == [(done, 8) for done in range(1, 9)]
    assert isinstance(next(event[2] for event in seen if event[1] == "OurPairs"), Score)
    assert sum("evaluated" in line for line in caplog.messages) == 4
    for label in models:
        assert sorted(read_results(tmp_path / "mteb" / label)) == ["OurPairs", "OurSearch"]

    # Once more with the set repaired and the unreachable task dropped: only what is missing is run.
    write(tasks / "Broken" / "test.csv", sts_rows())
    wanted = config.evaluate.model_copy(update={"tasks": ("OurPairs", "Broken", "OurSearch")})
    config = config.model_copy(update={"evaluate": wanted})
    kept = tmp_path / "mteb" / "trained" / "OurPairs.json"
    written, seen = kept.stat().st_mtime_ns, []
    assert evaluate_models(models, config, tmp_path / "mteb", lambda *event: seen.append(event)) == {}
    assert {event[1] for event in seen} == {"Broken"} and [event[3:] for event in seen] == [(5, 6), (6, 6)]
    assert kept.stat().st_mtime_ns == written
    assert not (tmp_path / "mteb" / "failures.json").exists()
