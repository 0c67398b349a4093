"""The card of a trained model: read by the Hub's library, run as it says, pushed to a Hub of our own on loopback."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml

from gist_dist.common.errors import UserError
from gist_dist.common.hub import go_offline_if_unreachable
from gist_dist.config import HubConfig, RunConfig
from gist_dist.recipe import parse_config
from gist_dist.report.model_card import write_model_card
from gist_dist.report.publish import check_hub, push_model, pushed_commit

REVISION = "0123456789abcdef0123456789abcdef01234567"
COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
SCORES = {
    "SciFact": ("Retrieval", "ndcg_at_10", [0.41204, 0.35071]),
    "OurPairs": ("STS", "cosine_spearman", [0.5, 0.6]),
}


def write_result(folder: Path, task: str, score: float, kind: str, metric: str) -> None:
    """As MTEB's TaskResult.to_disk writes it, with evaluation.py's details beside it."""
    (folder / "details").mkdir(parents=True, exist_ok=True)
    entry = {metric: score, "main_score": score, "hf_subset": "default", "languages": ["eng-Latn"]}
    revision = REVISION if task == "SciFact" else "local-0123456789abcdef"
    result = {"dataset_revision": revision, "task_name": task, "mteb_version": "2.26.24", "scores": {"test": [entry]}}
    (folder / f"{task}.json").write_text(json.dumps(result | {"evaluation_time": 1.0, "kg_co2_emissions": None}))
    details = {"kind": kind, "metric": metric, "model": "0123456789abcdef"}
    (folder / "details" / f"{task}.json").write_text(json.dumps(details))


def make_run(folder: Path, **sections) -> tuple[RunConfig, Path]:
    """A finished run with a real model; two sources and two tasks, of which one got worse."""
    from tiny import save_tiny_model

    sources = [
        {"path": "sentence-transformers/quora-duplicates", "name": "qqp"},
        {"path": "/data/of-ann/tickets.jsonl", "license": "cc-by-4.0"},
    ]
    tree = {
        "name": "my-model",
        "output_dir": str(folder),
        "student": {"model": "prajjwal1/bert-mini"},
        "guide": {"model": "/home/ann/guides/our-guide"},
        "data": {"sources": sources, "root": "/data/of-ann"},
        "evaluate": {"tasks": list(SCORES)},
        "tracking": {"hub": {"license": "apache-2.0", "language": "en"}},
    }
    config = parse_config(tree | {name: tree[name] | values for name, values in sections.items()})
    run = config.run_dir
    run.mkdir(parents=True)
    environment = {"gist_dist": "0.1.0", "torch": "2.13.0"}
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json") | {"environment": environment}))
    accounts = [
        {"name": name, "path": source["path"], "rows_used": rows, "rows_read": rows, "dropped": {}, "recipe_source": i}
        for i, (name, source, rows) in enumerate(zip(("qqp", "tickets"), sources, (24100, 620), strict=True))
    ]
    (run / "data.json").write_text(json.dumps({"sources": accounts, "num_rows": 24720, "steps": 10}))
    for task, (kind, metric, scores) in SCORES.items():
        for label, score in zip(("baseline", "trained"), scores, strict=True):
            write_result(run / "mteb" / label, task, score, kind, metric)
    save_tiny_model(run / "model")
    return config, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[RunConfig, Path]:
    config, run = make_run(tmp_path_factory.mktemp("runs"))
    write_model_card(run)
    return config, run


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


def test_the_front_matter_is_what_the_hub_and_sentence_transformers_read(finished):
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
    from sentence_transformers.base.model_card import YAML_FIELDS

    _, run = finished
    card = ModelCard.load(run / "model" / "README.md")
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card.content, flags=re.DOTALL)[1])
    assert set(front) <= set(YAML_FIELDS)
    assert front["library_name"] == "sentence-transformers" and front["pipeline_tag"] == "sentence-similarity"
    assert front["base_model"] == "prajjwal1/bert-mini" and front["license"] == "apache-2.0"
    assert front["language"] == ["en"] and front["datasets"] == ["sentence-transformers/quora-duplicates"]
    assert {"sentence-transformers", "gist_dist", "mteb", "dataset_size:24720"} <= set(front["tags"])
    assert front["metrics"] == ["ndcg_at_10", "cosine_spearman"]

    results = {result.dataset_name: result for result in card.data.eval_results}
    scifact, ours = results["MTEB SciFact"], results["MTEB OurPairs"]
    assert (scifact.dataset_type, scifact.dataset_config) == ("mteb/scifact", "default")
    assert (scifact.dataset_revision, scifact.dataset_split) == (REVISION, "test")
    assert (scifact.task_type, scifact.metric_type, scifact.metric_value) == ("Retrieval", "ndcg_at_10", 35.07)
    assert (ours.dataset_type, ours.dataset_revision, ours.metric_value) == ("OurPairs", None, 60.0)
    # There and back by the Hub's own reader and writer.
    name, read = model_index_to_eval_results(front["model-index"])
    assert name == "my-model" and eval_results_to_model_index(name, read) == front["model-index"]
    assert ModelCardData(**front).to_dict() == front


def test_the_card_says_what_a_stranger_has_to_know(finished):
    _, run = finished
    text = (run / "model" / "README.md").read_text()
    assert "| SciFact | Retrieval | ndcg_at_10 | 41.20 | 35.07 | −6.13 |" in text
    assert "- Retrieval lost: SciFact 41.20 → 35.07 (−6.13)." in text
    assert "| qqp | `sentence-transformers/quora-duplicates` | not stated | 24,100 |" in text  # no Hub to ask here
    assert "| tickets | local files | cc-by-4.0 | 620 |" in text
    assert "- **Base model:** `prajjwal1/bert-mini` (licence: not stated)" in text
    assert "- **Embedding:** 32 numbers" in text and "- **Maximum length:** 64 tokens" in text
    assert "2402.16829" in text and "1908.10084" in text and "- torch: 2.13.0" in text
    recipe = yaml.safe_load(blocks(text, "yaml")[0])
    assert recipe["guide"]["model"] == "our-guide" and recipe["data"]["sources"][1]["path"] == "tickets.jsonl"
    assert recipe["optim"]["learning_rate"] == 2e-5
    assert "/home/ann" not in text and "of-ann" not in text and str(run.parent) not in text


def test_both_ways_of_use_run_as_written_and_agree(finished):
    from sentence_transformers import SentenceTransformer

    _, run = finished
    with_library, without = blocks((run / "model" / "README.md").read_text(), "python")
    embeddings = []
    for code in (with_library, without):
        names: dict = {}
        exec(code.replace("path/or/hub-id/of/this/model", str(run / "model")), names)
        embeddings.append(np.asarray(names["embeddings"], dtype=np.float64))
    ours, theirs = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in embeddings)
    assert ours.shape == (2, 32) and abs(ours[0] - ours[1]).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, atol=1e-6)

    saved = run.parent / "saved again"
    SentenceTransformer(str(run / "model"), device="cpu").save(str(saved))
    assert (saved / "README.md").read_text() == (run / "model" / "README.md").read_text()


def test_prompts_are_used_and_a_model_without_pooling_gets_no_transformers_snippet(tmp_path):
    _, run = make_run(tmp_path, student={"prompts": {"anchor": "query: ", "positive": "passage: "}})
    modules = json.loads((run / "model" / "modules.json").read_text())
    (run / "model" / "modules.json").write_text(
        json.dumps([*modules, {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    )
    write_model_card(run)
    text = (run / "model" / "README.md").read_text()
    assert "model.encode_query(" in text and 'every anchor began with `"query: "`' in text
    assert "AutoModel" not in text


@pytest.mark.parametrize("trusted", [True, False])
def test_code_of_the_model_is_run_by_the_snippet_only_where_the_recipe_ran_it(tmp_path, trusted):
    """Of the student: what the guide brings is no part of the model."""
    student = {"model": "prajjwal1/bert-mini", "trust_remote_code": trusted}
    _, run = make_run(tmp_path, student=student, guide={"model": "our-guide", "trust_remote_code": not trusted})
    write_model_card(run)
    text = (run / "model" / "README.md").read_text()
    loads = [line for code in blocks(text, "python") for line in code.splitlines() if "this/model" in line]
    assert len(loads) == 2 and all(line.count(", trust_remote_code=True)") == line.count("this/model") * trusted
                                   for line in loads)  # fmt: skip
    assert ("comes with code of its own" in text) == trusted


# --------------------------------------------------------------------------------------------------- the Hub


class FakeHub(BaseHTTPRequestHandler):
    """The Hub's API as far as a push and a card need it; it keeps what it was sent."""

    calls: list
    private = True
    refuse = False

    def answer(self, content, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0123"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.calls.append((self.command, self.path, None, self.headers.get("Authorization")))
        if self.path.endswith("/README.md"):
            self.answer(b"---\nlicense: odbl\n---\n" if "/datasets/" in self.path else b"---\nlicense: [mit]\n---\n")
        else:
            self.answer({"id": "me/my-model", "private": self.private, "sha": COMMIT, "siblings": [], "tags": []})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.calls.append((self.command, self.path, body, self.headers.get("Authorization")))
        if self.refuse:
            self.answer({"error": "You don't have the rights, token hf_abcdefghijklmnopqrstuvwxyzabcdefgh"}, 403)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/me/my-model", "id": "me/my-model"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        else:
            url = f"http://{self.headers['Host']}/me/my-model/commit/{COMMIT}"
            self.answer({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    handler = type("Hub", (FakeHub,), {"calls": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    go_offline_if_unreachable.cache_clear()
    yield handler
    server.shutdown()
    server.server_close()
    go_offline_if_unreachable.cache_clear()


def hub_recipe(**hub) -> dict:
    return {"tracking": {"hub": {"repo_id": "me/my-model", **hub}}}


def test_the_model_is_pushed_to_a_private_repository_with_the_token_of_the_environment(hub, tmp_path):
    config, run = make_run(tmp_path, **hub_recipe())
    write_model_card(run)
    assert push_model(config, run).endswith("/me/my-model")

    created, *_ = (json.loads(body) for _, path, body, _ in hub.calls if path == "/api/repos/create")
    assert (created.get("private") or created["visibility"] == "private") and {
        created.get("organization"),
        created["name"],
    } == {"me", "my-model"}
    (commit,) = (body for _, path, body, _ in hub.calls if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    for name in ("README.md", "model.safetensors", "modules.json", "1_Pooling/config.json"):
        assert files[name] == (run / "model" / name).read_bytes()
    assert 'SentenceTransformer("me/my-model")' in files["README.md"].decode()
    assert {token for *_, token in hub.calls if token} == {"Bearer hf_of_the_environment"}
    assert any(path == "/api/validate-yaml" for _, path, _, _ in hub.calls)
    assert pushed_commit(run, "me/my-model") == COMMIT and pushed_commit(run, "me/other") is None
    assert all("hf_of_the" not in f.read_text() for f in run.glob("*.*") if f.is_file())


def test_a_public_repository_is_refused_unless_the_recipe_says_so(hub, tmp_path, caplog):
    hub.private = False
    config, run = make_run(tmp_path, **hub_recipe())
    assert push_model(config, run) is None
    assert "it is public already, and tracking.hub.private is true" in caplog.text
    assert not any("/commit/" in path for _, path, _, _ in hub.calls)
    config, run = make_run(tmp_path / "public", **hub_recipe(private=False))
    assert push_model(config, run)


def test_a_push_that_fails_says_how_to_push_by_hand(hub, tmp_path, caplog):
    hub.refuse = True
    config, run = make_run(tmp_path, **hub_recipe())
    assert push_model(config, run) is None and pushed_commit(run, "me/my-model") is None
    (message,) = (record.getMessage() for record in caplog.records if record.name == "gist_dist.report.publish")
    assert message.startswith("the model was not pushed to me/my-model (") and "\n" not in message
    assert message.endswith(f"; to push it by hand: hf upload me/my-model {run / 'model'} . --private")
    assert "hf_abc" not in message


def test_a_missing_token_is_found_before_anything_is_trained(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"repo_id = me/my-model.*token.*set HF_TOKEN"):
        check_hub(HubConfig(repo_id="me/my-model"))
    check_hub(HubConfig())


def test_licences_come_from_the_hubs_cards_where_the_recipe_states_none(hub, tmp_path):
    _, run = make_run(tmp_path)
    write_model_card(run)
    text = (run / "model" / "README.md").read_text()
    assert "| qqp | `sentence-transformers/quora-duplicates` | odbl | 24,100 |" in text
    assert "| tickets | local files | cc-by-4.0 | 620 |" in text
    assert "- **Base model:** `prajjwal1/bert-mini` (licence: mit)" in text


def test_a_licence_or_repository_that_the_hub_would_refuse_is_refused_at_once():
    for wrong in (
        {"repo_id": "my-model"},
        {"repo_id": "me/my model"},
        {"license": "Apache 2"},
        {"language": "English"},
    ):
        with pytest.raises(ValueError, match="should match pattern"):
            HubConfig(**wrong)
