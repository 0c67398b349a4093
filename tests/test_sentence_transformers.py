"""Against sentence-transformers itself: where the rules agree, and where they differ on purpose."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import double, one_step, prepared, recipe, run_group, save_tiny_model, words, write_jsonl
from torch.nn import functional as F

from gist_dist.config import LossConfig, StudentConfig
from gist_dist.core.candidates import BatchIndex
from gist_dist.core.collectives import World
from gist_dist.core.loss import gist_loss
from gist_dist.data.corpus import Corpus
from gist_dist.models.encoder import Student
from gist_dist.recipe import parse_config

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_tiny_model(folder / "student", seed=1), save_tiny_model(folder / "guide", width=16, layers=1, seed=2)


def distinct_rows(num_rows: int, num_negatives: int) -> Rows:
    """No text twice; sentence-transformers wants the same number of negatives in every row."""
    rng = random.Random(num_negatives)
    texts = list({words(rng, 3, 12): None for _ in range(10 * num_rows)})
    per_row = 2 + num_negatives
    groups = [texts[i * per_row : (i + 1) * per_row] for i in range(num_rows)]
    return [{"anchor": a, "positive": p, "negatives": n} for a, p, *n in groups]


def ours(folder: Path, models: tuple[Path, Path], rows: Rows, guided: bool = True, world=None, **loss: Any):
    """train_step in fp64 on all rows, without dropout, and without known positives, which theirs has not."""
    student, guide = models
    source = write_jsonl(folder / "rows.jsonl", rows)
    batch = {"global_size": 2, "chunk_tokens": 100, "loss_gb": 1e-5, "activation_gb": 0.0}
    data = {"known_positives": "off"}
    tree = recipe(folder, student, guide if guided else None, source, loss=loss, batch=batch, data=data)
    config, corpus = prepared(tree)
    if world:
        return run_group(_our_share, world, folder / f"ours-{world}", tree, str(corpus.folder))[0]
    return one_step(World(), config, corpus, double(config.student), double(config.guide) if guided else None)


def _our_share(world: World, tree: dict[str, Any], corpus: str) -> dict[str, Any]:
    config = parse_config(tree)
    return one_step(world, config, Corpus(Path(corpus)), double(config.student), double(config.guide))


def theirs(models: tuple[Path, Path], rows: Rows, gather: bool = False, **options: Any) -> dict[str, Any]:
    """CachedGISTEmbedLoss or, given directions, CachedMultipleNegativesRankingLoss (no guide), in fp64."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    student, guide = (SentenceTransformer(str(folder), device="cpu").double().eval() for folder in models)
    guide.register_forward_hook(_rounded)
    common = {"mini_batch_size": 5, "gather_across_devices": gather}
    if "directions" in options:
        loss = losses.CachedMultipleNegativesRankingLoss(student, **common, **options)
    else:
        loss = losses.CachedGISTEmbedLoss(student, guide, **common, **options)
    columns = [[r["anchor"] for r in rows], [r["positive"] for r in rows]]
    columns += [list(column) for column in zip(*(r["negatives"] for r in rows), strict=True)]
    value = loss([student.preprocess(column) for column in columns], torch.empty(0))
    value.backward()
    gradients = {name: p.grad.numpy() for name, p in student.named_parameters() if p.grad is not None}
    return {"loss": value.item(), "gradients": gradients}


def _rounded(module: Any, arguments: Any, output: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As ours keeps the guide's embeddings."""
    return output | {"sentence_embedding": F.normalize(output["sentence_embedding"], dim=-1).half().double()}


def assert_equal(mine: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-10) -> None:
    assert mine["loss"] == pytest.approx(other["loss"], abs=tolerance) and mine["loss"] > 0.01
    assert mine["gradients"].keys() == other["gradients"].keys()
    for name, gradient in other["gradients"].items():
        np.testing.assert_allclose(mine["gradients"][name], gradient, rtol=0, atol=tolerance, err_msg=name)
    assert sum(np.abs(gradient).sum() for gradient in mine["gradients"].values()) > 0.1


@pytest.mark.parametrize("num_negatives", [0, 2])
@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("margin", [("absolute", 0.0), ("absolute", 0.02), ("relative", 0.05)])
def test_guided_loss_and_gradients_equal_theirs(tmp_path, models, margin, flags, num_negatives):
    """One process, no text twice, no self-similarity ties."""
    rows, temperature = distinct_rows(17, num_negatives), 0.05
    names = {"contrast_anchors": flags[0], "contrast_positives": flags[1], "temperature": temperature}
    mine = ours(tmp_path, models, rows, margin_kind=margin[0], margin=margin[1], **names)
    assert 0 < mine["counts"]["masked_ap"] < mine["counts"]["candidates_ap"]
    assert_equal(mine, theirs(models, rows, margin_strategy=margin[0], margin=margin[1], **names))


@pytest.mark.parametrize("num_negatives", [0, 2])
def test_unguided_loss_equals_their_infonce(tmp_path, models, num_negatives):
    rows = distinct_rows(17, num_negatives)
    mine = ours(
        tmp_path,
        models,
        rows,
        guided=False,
        temperature=0.05,
        contrast_anchors=False,
        contrast_positives=False,
    )
    assert_equal(mine, theirs(models, rows, scale=20.0, directions=("query_to_doc",)))


def test_unguided_loss_with_contrasts_equals_their_infonce_in_all_directions(tmp_path, models):
    rows = distinct_rows(17, 0)
    mine = ours(tmp_path, models, rows, guided=False, temperature=0.05)
    assert_equal(mine, theirs(models, rows, scale=20.0, directions=("query_to_doc", "query_to_query", "doc_to_doc")))


def test_real_models_give_their_loss_and_gradients(tmp_path, minilm, minilm_l2):
    """All-MiniLM-L6-v2 guides its first two layers."""
    topics = (
        "rain in the mountains",
        "a train to Rome",
        "bread and butter",
        "compilers",
        "violins",
        "tax law",
    )
    rows = [
        {"anchor": f"What about {topic}?", "positive": f"Here is more about {topic} {tail}.", "negatives": []}
        for topic in topics
        for tail in ("today", "as it was long ago and far away")
    ]
    models = minilm_l2, minilm
    mine = ours(tmp_path, models, rows, temperature=0.05, margin=0.05)
    assert mine["counts"]["masked_ap"] > 0
    assert_equal(mine, theirs(models, rows, temperature=0.05, margin=0.05))


# Where we differ on purpose


def loss_of(anchors: list[int], positives: list[int], temperature: float, **flags: bool) -> tuple[float, float]:
    """(ours, theirs) of rows whose texts are orthogonal unit vectors to student and guide alike."""
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss

    table = torch.eye(max(*anchors, *positives) + 1, dtype=torch.float64)
    batch = BatchIndex(
        torch.tensor(anchors),
        torch.tensor(positives),
        torch.empty(0, dtype=torch.long),
        torch.arange(len(table)),
    )
    config = LossConfig(temperature=temperature, **flags)
    mine = gist_loss(table, table, batch, [range(len(anchors))], config).loss.item()
    loss = CachedGISTEmbedLoss.__new__(CachedGISTEmbedLoss)  # only its arithmetic: no model is asked
    torch.nn.Module.__init__(loss)
    loss.similarity_fct, loss.cross_entropy_loss = (
        torch.nn.CosineSimilarity(dim=-1),
        torch.nn.CrossEntropyLoss(),
    )
    loss.temperature, loss.mini_batch_size, loss.show_progress_bar = temperature, 8, False
    loss.margin_strategy, loss.margin, loss.gather_across_devices = "absolute", 0.0, False
    loss.contrast_anchors = flags.get("contrast_anchors", True)
    loss.contrast_positives = flags.get("contrast_positives", True)
    columns = [[table[anchors]], [table[positives]]]
    return mine, loss.calculate_loss(columns, columns).item()


def test_copy_of_the_positive_in_another_row_is_dropped_by_ours_only():
    """A strict σ > t never masks σ = t: theirs pushes the anchor away from its own positive's text."""
    mine, other = loss_of([0, 1, 2], [3, 3, 4], 1.0, contrast_anchors=False, contrast_positives=False)
    # All similarities are 0. Of three candidates each, rows 0 and 1 lose the copy.
    assert other == pytest.approx(math.log(3))
    assert mine == pytest.approx((2 * math.log(2) + math.log(3)) / 3)


def test_anchor_equal_to_its_positive_is_not_contrasted_with_itself_by_ours():
    """Theirs leaves the row's own aa and pp entries: three equal scores of 1, and a loss that can't fall."""
    mine, other = loss_of([0, 1], [0, 1], temperature=0.125)
    assert other == pytest.approx(math.log(3 + 3 * math.exp(-8)))
    assert mine == pytest.approx(math.log(1 + 3 * math.exp(-8))) and mine < 0.0011


def test_duplicate_texts_differ_in_a_whole_step_too(tmp_path, models):
    rows = distinct_rows(12, 0)
    rows[1]["positive"] = rows[0]["positive"]
    rows[2]["positive"] = rows[2]["anchor"]
    mine, other = ours(tmp_path, models, rows, temperature=0.05), theirs(models, rows, temperature=0.05)
    assert mine["counts"]["identical_dropped"] == 4 and other["loss"] > mine["loss"] + 0.01


def test_gathered_loss_changes_with_the_number_of_devices_in_theirs_only(tmp_path, models):
    """Theirs gathers positives but not anchors; without contrast_anchors it agrees with ours on two."""
    rows = distinct_rows(16, 0)
    for contrast_anchors in (True, False):
        folder = tmp_path / str(contrast_anchors)
        folder.mkdir()
        options = {"temperature": 0.05, "contrast_anchors": contrast_anchors}
        alone = theirs(models, rows, **options)["loss"]
        gathered = np.mean(run_group(_their_share, 2, folder / "theirs", models, rows, options))
        mine = [ours(folder, models, rows, world=world, **options)["loss"] for world in (1, 2)]
        assert mine == pytest.approx([alone, alone], abs=1e-10)
        if contrast_anchors:
            assert abs(gathered - alone) > 1e-3
        else:
            assert gathered == pytest.approx(alone, abs=1e-10)


def _their_share(world: World, models: tuple[Path, Path], rows: Rows, options: dict[str, Any]) -> float:
    share = len(rows) // world.size
    return theirs(models, rows[world.rank * share :][:share], gather=True, **options)["loss"]


# The student is a stock SentenceTransformer before, during and after training

MESSY = [
    "plain",
    "  leading and trailing spaces \n",
    "tabs\tand\r\nline breaks",
    "naïve café, Ünïcödé, 東京タワー, Привет, שלום, 👩‍🚀",
    "e\u0301 composed é, full width ＦＵＬＬ, zero\u200bwidth, soft\u00adhyphen",
    "[MASK] and [SEP] as text </s>",
    "long " * 700,
    "?!.,;:-()",
]


@pytest.fixture(scope="module")
def stock(minilm_l2):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm_l2), device="cpu")


def embeddings(student: Student, tokens: list[np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return student.embed(tokens).numpy()


@pytest.mark.parametrize("max_tokens", [None, 12])
def test_token_ids_embed_as_the_stock_model_encodes(minilm_l2, stock, max_tokens):
    student = Student(StudentConfig(model=str(minilm_l2), max_tokens=max_tokens, dropout=0.0))
    ids, lengths = student.tokenize(MESSY)
    limit = max_tokens or stock.max_seq_length
    assert lengths.max() == limit and ids.shape == (lengths.sum(),)
    tokens = np.split(ids, np.cumsum(lengths)[:-1])
    own_limit, stock.max_seq_length = stock.max_seq_length, limit
    expected = stock.encode(MESSY, normalize_embeddings=True)
    stock.max_seq_length = own_limit
    np.testing.assert_allclose(embeddings(student, tokens), expected, rtol=0, atol=1e-6)


def test_prepared_tokens_with_prompts_embed_as_the_stock_model_encodes(tmp_path, minilm_l2, stock):
    """Through the prepared corpus: prompts by role, the guide's own tokens and prompt beside them."""
    texts = [text for text in MESSY if text.strip()]
    source = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"anchor": a, "positive": p} for a, p in zip(texts, texts[::-1], strict=True)],
    )
    prompts = {"anchor": "query: ", "positive": "passage: "}
    config, corpus = prepared(
        recipe(
            tmp_path,
            minilm_l2,
            minilm_l2,
            source,
            batch={"global_size": 2},
            student={"prompts": prompts},
            guide={"prompts": {"anchor": "guided "}, "max_tokens": 9},
        )
    )
    student = Student(config.student)
    for role, numbers, raw in (
        ("anchor", corpus.anchors, texts),
        ("positive", corpus.positives, texts[::-1]),
    ):
        assert [corpus.text(number) for number in numbers.tolist()] == raw
        expected = stock.encode(raw, prompt=prompts[role], normalize_embeddings=True)
        np.testing.assert_allclose(embeddings(student, corpus.student_tokens(numbers)), expected, rtol=0, atol=1e-6)
    own_limit, stock.max_seq_length = stock.max_seq_length, 9
    expected = stock.encode(texts, prompt="guided ", normalize_embeddings=True)
    stock.max_seq_length = own_limit
    np.testing.assert_allclose(embeddings(student, corpus.guide_tokens(corpus.anchors)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["real", "tiny"])
def test_saved_student_loads_as_a_stock_model(tmp_path, minilm_l2, models, kind):
    """With its own limit of tokens, its prompts and the weights that training moved."""
    from sentence_transformers import SentenceTransformer

    prompts = {"anchor": "query: ", "positive": "passage: "}
    model = minilm_l2 if kind == "real" else models[0]
    student = Student(StudentConfig(model=str(model), max_tokens=16, prompts=prompts, dropout=0.2))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    ids, lengths = student.tokenize(MESSY)
    tokens = np.split(ids, np.cumsum(lengths)[:-1])
    before = embeddings(student, tokens)
    student.save(tmp_path / "model")
    assert student.model.training and student.model.max_seq_length == 16
    assert not np.allclose(before, embeddings(student, tokens), atol=1e-3)  # dropout is still on
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert loaded.max_seq_length == SentenceTransformer(str(model), device="cpu").max_seq_length
    assert loaded.prompts == {"query": "query: ", "document": "passage: "}
    student.model.eval()
    student.model.max_seq_length = loaded.max_seq_length
    expected = student.model.encode(MESSY, normalize_embeddings=True)
    np.testing.assert_allclose(loaded.encode(MESSY, normalize_embeddings=True), expected, rtol=0, atol=1e-6)
    stock = SentenceTransformer(str(model), device="cpu").encode(MESSY, normalize_embeddings=True)
    assert not np.allclose(expected, stock, atol=1e-3)
    query = loaded.encode_query("rain")  # with the prompt that it was trained with, as MTEB will call it
    np.testing.assert_allclose(query, loaded.encode("query: rain"), rtol=0, atol=1e-6)
