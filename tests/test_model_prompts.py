"""Prompts: of the model, of the recipe and of a source, resolved once, and what the saved model makes of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from sentence_transformers import SentenceTransformer
from tiny import recipe, write_jsonl
from zoo import Kind

from gist_dist.common.errors import UserError
from gist_dist.config import GuideConfig, RolePrompts, RunConfig, StudentConfig
from gist_dist.data.corpus import prepare
from gist_dist.data.sampler import Sampler
from gist_dist.models.encoder import Guide, Student, kept_prompts, save_model
from gist_dist.models.guide_cache import embedding_fingerprint, open_guide_cache
from gist_dist.on_ray.tasks.precompute import _Actor, precompute
from gist_dist.planning.outline import outline
from gist_dist.recipe import parse_config

BY_ROLE = {"prompts": {"query": "old : ", "document": "new : ", "other": "red : "}, "default_prompt_name": None}
BY_DEFAULT = {"prompts": {"task": "wide : ", "other": "red : "}, "default_prompt_name": "task"}
QUERY_BY_DEFAULT = {"prompts": {"query": "old : ", "document": ""}, "default_prompt_name": "query"}
NONE = {"prompts": {"query": "", "document": ""}, "default_prompt_name": None}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return zoo.save(tmp_path_factory.mktemp("prompts") / "model", Kind())


def model_with(plain: Path, folder: Path, settings: dict) -> Path:
    import shutil

    shutil.copytree(plain, folder)
    zoo.with_settings(folder, "config_sentence_transformers.json", **settings)
    return folder


def run_of(folder: Path, model: Path, of_recipe: dict, *of_sources: dict | None) -> RunConfig:
    rows = [{"anchor": f"amber {word}", "positive": f"river {word}"} for word in ("old", "new", "red", "wide")]
    sources = []
    for number, prompts in enumerate(of_sources or (None,)):
        path = str(write_jsonl(folder / f"{number}.jsonl", rows))
        sources.append({"path": path} | ({"prompts": {"student": prompts}} if prompts is not None else {}))
    sections = {"student": {"prompts": of_recipe}, "data": {"sources": sources}, "batch": {"global_size": 2}}
    return parse_config(recipe(folder, model, None, **sections))


@pytest.mark.parametrize(
    ("own", "given", "expected", "default"),
    [
        (NONE, {}, ("", "", ""), None),
        (BY_ROLE, {}, ("old : ", "new : ", "new : "), None),
        (BY_ROLE, {"anchor": ""}, ("", "new : ", "new : "), None),
        (BY_ROLE, {"positive": "cold : "}, ("old : ", "cold : ", "cold : "), None),
        (BY_ROLE, {"negatives": ""}, ("old : ", "new : ", ""), None),
        (
            {"prompts": {"query": "old : ", "passage": "new : "}, "default_prompt_name": None},
            {},
            ("old : ", "new : ", "new : "),
            None,
        ),
        ({"prompts": {"corpus": "new : "}, "default_prompt_name": None}, {"positive": ""}, ("", "", ""), None),
        (BY_DEFAULT, {}, ("wide : ", "wide : ", "wide : "), "task"),
        (BY_DEFAULT, {"anchor": "cold : ", "positive": "loud : "}, ("cold : ", "loud : ", "loud : "), "task"),
        (BY_DEFAULT, {"anchor": "cold : ", "positive": "cold : "}, ("cold : ", "cold : ", "cold : "), "query"),
        (BY_DEFAULT, {"anchor": "", "positive": ""}, ("", "", ""), None),
        (QUERY_BY_DEFAULT, {}, ("old : ", "", ""), "query"),
        (NONE, {"anchor": "cold : ", "positive": "cold : "}, ("cold : ", "cold : ", "cold : "), "query"),
    ],
)
def test_what_texts_of_each_role_begin_with_and_what_is_saved(tmp_path, plain, own, given, expected, default):
    model = model_with(plain, tmp_path / "model", own)
    student = Student(StudentConfig(model=str(model), prompts=RolePrompts(**given)))
    assert tuple(student.prompts.values()) == expected
    save_model(student, tmp_path / "saved")  # which loads it again and compares
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (saved.prompts["query"], saved.prompts["document"]) == expected[:2]
    assert saved.default_prompt_name == default
    others = {name: text for name, text in own["prompts"].items() if name not in ("query", "document")}
    assert others.items() <= saved.prompts.items()
    # What it brought is as it was: the next save of the same student starts from it.
    assert student.model.default_prompt_name == own["default_prompt_name"]


def test_prompts_that_all_sources_share_are_those_of_the_saved_model(tmp_path, plain):
    config = run_of(tmp_path, plain, {}, {"anchor": "cold : "}, {"anchor": "cold : "})
    student = Student(config.student)
    assert kept_prompts(student, config).prompts == {"query": "cold : ", "document": ""}


def test_a_source_with_its_own_prompts_has_them_under_its_name(tmp_path, plain):
    config = run_of(tmp_path, plain, {"anchor": "old : "}, None, {"anchor": "cold : ", "positive": "loud : "})
    kept = kept_prompts(Student(config.student), config)
    assert kept.prompts == {"query": "old : ", "document": "", "1-query": "cold : ", "1-document": "loud : "}
    assert kept.note and kept.note.startswith("encode() alone takes no prompt")


def test_prompts_are_told_before_training(tmp_path, plain):
    model = model_with(plain, tmp_path / "model", BY_ROLE)
    config = run_of(tmp_path, model, {}, None, {"anchor": "cold : "})
    student = Student(config.student)
    corpus = prepare(config, student, None, progress=lambda line: None)
    lines = outline(config, student, None, corpus, Sampler(corpus, config))
    assert "prompts  student: anchor 'old : ', positive 'new : ', negatives 'new : '; 1 source has its own" in lines
    assert any("call encode_query() and encode_document()" in line for line in lines)
    bare = run_of(tmp_path, plain, {})
    student = Student(bare.student)
    corpus = prepare(bare, student, None, progress=lambda line: None)
    assert not any(line.startswith("prompts") for line in outline(bare, student, None, corpus, Sampler(corpus, bare)))


@pytest.mark.parametrize("where", ["recipe", "source"])
def test_a_prompt_that_leaves_no_room_is_refused(tmp_path, plain, where):
    long = {"anchor": "amber " * 62}
    config = run_of(tmp_path, plain, *(({}, long) if where == "source" else (long,)))
    with pytest.raises(UserError, match=r"student\.prompts: 'amber .*…' .*64 tokens"):
        prepare(config, Student(config.student), None, progress=lambda line: None)


@pytest.mark.parametrize("kind", [Kind(), Kind("qwen3", "left"), Kind("modernbert", "left", "weightedmean")], ids=str)
def test_a_guide_that_pools_without_its_prompt_scores_as_it_embeds(tmp_path, plain, kind):
    """Online and in the cache, on this process and on an actor: with the recipe's prompt, a source's, and none."""
    folder = zoo.save(tmp_path / "guide", replace(kind, with_prompt=False))
    tree = run_of(tmp_path, plain, {}, None, None).model_dump(mode="json")
    tree["guide"] = {"model": str(folder), "prompts": {"anchor": "old : "}}
    tree["data"]["sources"][1]["prompts"] = {"guide": {"anchor": "cold river : ", "positive": ""}}
    config = parse_config(tree)
    guide = Guide.of_run(config)
    corpus = prepare(config, Student(config.student), guide, progress=lambda line: None)
    stock = SentenceTransformer(str(folder), device="cpu")
    actor = _Actor(config, guide.config, guide.skipped, embedding_fingerprint(guide), {"CPU": 1.0})
    again = actor._load()
    precompute(config, corpus, guide, lambda line: None)
    cache = open_guide_cache(config, guide)
    for source, prompts in enumerate((("old : ", ""), ("cold river : ", ""))):
        rows = np.flatnonzero(corpus.source == source)
        for prompt, numbers in zip(prompts, (corpus.anchors[rows], corpus.positives[rows]), strict=True):
            texts = [corpus.text(number) for number in numbers.tolist()]
            expected = stock.encode(texts, prompt=prompt, normalize_embeddings=True)
            if prompt:
                stock[1].include_prompt = True
                other = stock.encode(texts, prompt=prompt, normalize_embeddings=True)
                stock[1].include_prompt = False
                assert np.abs(other - expected).max() > 0.01, "the prompt makes no difference"
            for encoder in (guide, again):
                found = encoder.encode(corpus.guide_tokens(numbers)).numpy()
                np.testing.assert_allclose(found, expected, atol=1e-3)
            found = cache.embeddings(cache.find(corpus.guide_keys[numbers]))
            np.testing.assert_allclose(found, expected, atol=1e-3)


def test_embeddings_pooled_without_other_prompts_are_not_taken_from_the_cache(tmp_path):
    folder = zoo.save(tmp_path / "guide", Kind(with_prompt=False))
    alone, other = (
        embedding_fingerprint(Guide(GuideConfig(model=str(folder), prompts=RolePrompts(anchor=prompt))))
        for prompt in ("old : ", "new : ")
    )
    assert alone != other
    whole = zoo.save(tmp_path / "whole", Kind())
    alone, other = (
        embedding_fingerprint(Guide(GuideConfig(model=str(whole), prompts=RolePrompts(anchor=prompt))))
        for prompt in ("old : ", "new : ")
    )
    assert alone == other, "its embeddings are those of the tokens, whatever the prompts"


def test_a_model_that_pools_without_its_prompt_is_not_packed(tmp_path):
    packed = []
    for number, with_prompt in enumerate((True, False)):
        folder = zoo.save(tmp_path / str(number), Kind(with_prompt=with_prompt))
        student = Student(StudentConfig(model=str(folder), prompts=RolePrompts(anchor="old : ")))
        student.get_ready(packing=True)
        packed.append(student.packs)
    assert packed == [True, False]


def test_a_saved_model_that_embeds_otherwise_is_not_kept(tmp_path, plain, monkeypatch):
    student = Student(StudentConfig(model=str(plain)))
    save = student.model.save

    def damaged(path: str, **options) -> None:
        with torch.no_grad():
            weight = next(p for name, p in student.model.named_parameters() if name.endswith("query.weight"))
            kept = weight.clone()
            weight.zero_()
            save(path, **options)
            weight.copy_(kept)

    monkeypatch.setattr(student.model, "save", damaged)
    with pytest.raises(UserError, match=r"saved model.*encode_query\(\)"):
        save_model(student, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    monkeypatch.setattr(student.model, "save", lambda path, **options: Path(path).mkdir())
    with pytest.raises(UserError, match="can't be loaded"):
        save_model(student, tmp_path / "saved")


def test_a_text_that_nothing_cuts_is_spoken_of(tmp_path):
    model = zoo.save(tmp_path / "model", Kind("t5"))
    config = run_of(tmp_path, model, {})
    write_jsonl(tmp_path / "0.jsonl", [{"anchor": "old", "positive": f"{n} " + "amber " * 5000} for n in "abcd"])
    student = Student(config.student)
    corpus = prepare(config, student, None, progress=lambda line: None)
    lines = outline(config, student, None, corpus, Sampler(corpus, config))
    assert any("5,003 tokens" in x and "set student.max_tokens" in x for x in lines)
    assert any("no limit of tokens" in line for line in lines) and "00000000" not in "".join(lines)


def test_the_last_token_without_an_end_is_spoken_of(tmp_path, caplog):
    folder = zoo.save(tmp_path / "model", Kind("qwen3", "left", "lasttoken"))
    Student(StudentConfig(model=str(folder)))
    assert "puts no end token" not in caplog.text
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    Student(StudentConfig(model=str(folder)))
    assert "pools the last token, and its tokenizer puts no end token behind a text" in caplog.text


def test_a_prompt_that_is_no_text_is_refused(tmp_path, plain):
    model = model_with(plain, tmp_path / "model", {"prompts": {"query": ["old"]}})
    with pytest.raises(UserError, match=r"prompt .*'query' .*config_sentence_transformers\.json"):
        Student(StudentConfig(model=str(model)))
