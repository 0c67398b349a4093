"""A run's results as MTEB itself loads them."""

import json
from pathlib import Path

import pytest
from test_evaluation_faults import write_set

from gist_dist.common.errors import UserError
from gist_dist.config import EvaluateConfig
from gist_dist.evaluation.evaluate import evaluate_task, model_identity, read_results
from gist_dist.recipe import parse_config
from gist_dist.report.mteb_export import export_run
from gist_dist.report.publish import HUB_NAME

TASKS = ("OurPairs", "STS13")
COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two models on a set of one's own and on one of MTEB's tasks, evaluated for real."""
    from tiny import save_tiny_model

    folder = tmp_path_factory.mktemp("runs")
    student = save_tiny_model(folder / "student")
    recipe = {
        "name": "my-run",
        "output_dir": str(folder),
        "student": {"model": str(student)},
        "data": {"sources": [{"path": "unused.parquet"}]},
        "evaluate": {"tasks": TASKS, "local_tasks": str(folder / "tasks"), "batch_size": 8},
    }
    config = parse_config(recipe)
    save_tiny_model(config.run_dir / "model", seed=1)
    for task in TASKS:
        write_set(folder / "tasks" / task)
        for label, model in (("trained", config.run_dir / "model"), ("baseline", student)):
            evaluate_task(model, task, config.evaluate, config.run_dir / "mteb" / label)
    return config


def loaded(folder: Path) -> dict:
    """Model name -> its ModelResult, by MTEB's own cache."""
    from mteb import ResultCache

    return {result.model_name: result for result in ResultCache(folder / "mteb").load_results().model_results}


def test_mteb_loads_the_results_with_the_same_main_scores(run):
    export_run(run, run.run_dir)
    results = loaded(run.run_dir)
    assert set(results) == {"local/my-run", "local/student"}
    for label, name in (("trained", "local/my-run"), ("baseline", "local/student")):
        ours = read_results(run.run_dir / "mteb" / label)
        theirs = {result.task_name: result.get_score() for result in results[name].task_results}
        assert theirs == {task: score.main_score for task, score in ours.items()} and set(theirs) == set(TASKS)
    assert read_results(run.run_dir / "mteb" / "trained") != read_results(run.run_dir / "mteb" / "baseline")
    assert results["local/my-run"].model_revision == model_identity(run.run_dir / "model")
    table = results["local/my-run"].to_dataframe()
    assert sorted(table["task_name"]) == sorted(TASKS)


@pytest.mark.filterwarnings("ignore:is_cross_encoder is deprecated:DeprecationWarning")  # what MTEB itself writes
def test_model_meta_is_complete_enough_to_be_submitted(run):
    from mteb.models import ModelMeta

    export_run(run, run.run_dir)
    (folder,) = (run.run_dir / "mteb" / "results" / "local__my-run").iterdir()
    meta = ModelMeta.model_validate_json_resolved((folder / "model_meta.json").read_text())
    assert (meta.name, meta.revision) == ("local/my-run", folder.name)
    assert meta.embed_dim == 32 and meta.max_tokens == 64 and meta.n_parameters > 1000 and meta.loader is not None
    assert meta.use_instructions is False and meta.similarity_fn_name == "cosine"
    settings = [json.loads(line) for line in (folder / "run_settings.jsonl").read_text().splitlines()]
    assert {entry["task"] for entry in settings} == set(TASKS)
    assert all(entry["encode_kwargs"] == {"batch_size": 8} for entry in settings)


def test_a_pushed_model_has_its_name_and_commit(run):
    hub = run.tracking.hub.model_copy(update={"repo_id": "me/my-model"})
    pushed = run.model_copy(update={"tracking": run.tracking.model_copy(update={"hub": hub})})
    file = run.run_dir / HUB_NAME
    file.write_text(json.dumps({"repo_id": "me/my-model", "commit": COMMIT, "url": "http://hub/me/my-model"}))
    try:
        export_run(pushed, run.run_dir)
    finally:
        file.unlink()
    results = loaded(run.run_dir)
    assert set(results) == {"me/my-model", "local/student"}
    assert results["me/my-model"].model_revision == COMMIT


def test_a_damaged_result_is_named(run, tmp_path):
    other = run.model_copy(update={"output_dir": str(tmp_path)})
    evaluate = EvaluateConfig(local_tasks=run.evaluate.local_tasks)
    file = evaluate_task(run.run_dir / "model", "OurPairs", evaluate, other.run_dir / "mteb" / "trained")
    file.write_text('{"task_name": "OurPairs"}')
    with pytest.raises(UserError, match=r"mteb/trained: not as an evaluation leaves it \(.*\); delete it and evaluate"):
        export_run(other, other.run_dir)
