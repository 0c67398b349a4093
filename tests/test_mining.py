"""Hard negatives against a search by hand, against sentence-transformers, and through Ray."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives
from tiny import recipe, save_tiny_model, words, write_jsonl

import gist_dist.data.mining
from gist_dist.common.errors import UserError
from gist_dist.config import BatchConfig
from gist_dist.data.corpus import Corpus, prepare
from gist_dist.data.mining import Mined, MineOptions, mine_block, nearest, plan_search, same_texts
from gist_dist.models.encoder import Guide, Student
from gist_dist.recipe import parse_config

WIDTH = 24
SHARED_OPTIONS = {
    "top 3": {},
    "relative margin": {"relative_margin": 0.05},
    "absolute margin, rank range": {"absolute_margin": 0.02, "range_min": 2, "range_max": 40, "num_negatives": 5},
    "scores": {"max_score": 0.72, "min_score": 0.6, "num_negatives": 4},
}
OUR_NAMES = {"range_min": "min_rank", "range_max": "max_rank", "num_negatives": "negatives"}


class Rows:
    """Random rows in which anchors and positives recur, some texts are equal and some embeddings are."""

    def __init__(self, seed: int, num_rows: int = 180, num_texts: int = 150) -> None:
        rng = np.random.default_rng(seed)
        self.anchors = rng.integers(0, num_texts, num_rows)
        self.positives = rng.integers(num_texts // 3, num_texts, num_rows)
        self.negatives = [rng.integers(0, num_texts, n).tolist() for n in rng.integers(0, 3, num_rows)]
        self.same = np.arange(num_texts)
        self.same[rng.integers(0, num_texts, 20)] = self.same[rng.integers(0, num_texts, 20)]
        topics = rng.normal(size=(12, WIDTH))
        vectors = topics[rng.integers(0, 12, num_texts)] + 0.6 * rng.normal(size=(num_texts, WIDTH))
        vectors[rng.integers(0, num_texts, 30)] = vectors[rng.integers(0, num_texts, 30)]  # exact ties
        self.vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)

    def search(self, options: MineOptions):
        joined = np.array([n for row in self.negatives for n in row], dtype=np.int64)
        counts = np.array([len(row) for row in self.negatives])
        return plan_search(self.anchors, self.positives, joined, counts, self.same, options)

    def mine(self, options: MineOptions, block: int = 1000, seed: int = 0, memory_gb: float = 0.5) -> list[Mined]:
        search = self.search(options)
        starts = range(0, len(search.anchors), block)
        blocks = [slice(start, min(start + block, len(search.anchors))) for start in starts]
        return [mine_block(search, b, self.vectors.__getitem__, options, seed, memory_gb) for b in blocks]


def by_hand(rows: Rows, options: MineOptions) -> dict[int, tuple[list[int], list[float]]]:
    """Anchor → every candidate in the rank range, nearest first, and their scores; the whole matrix, in Python."""
    same, sources = (
        rows.same.tolist(),
        list(zip(rows.anchors.tolist(), rows.positives.tolist(), rows.negatives, strict=True)),
    )
    texts = {p for _, p, _ in sources}
    if options.pool == "all":
        texts |= {n for *_, negatives in sources for n in negatives}
    pool = [t for t in sorted(texts) if not any(same[t] == same[u] for u in texts if u < t)]
    most = max(sum(same[a] == same[b] for b, *_ in sources) for a, *_ in sources)
    filtered = any(x is not None for x in (options.absolute_margin, options.relative_margin, options.max_score))
    last = options.max_rank
    if last is None:
        last = options.min_rank + options.negatives * (10 if filtered else 1) + most
    vectors = rows.vectors.astype(np.float64)
    found = {}
    for anchor in sorted({a for a, *_ in sources}):
        group = [(p, negatives) for a, p, negatives in sources if same[a] == same[anchor]]
        own = {same[anchor]} | {same[t] for p, negatives in group for t in (p, *negatives)}
        positive = min(float(vectors[anchor] @ vectors[p]) for p, _ in group)
        ranked = sorted((-float(vectors[anchor] @ vectors[t]), t) for t in pool)
        looked_at = ranked[: last + max(most, sum(same[t] in own for t in pool))]
        kept = []
        for negated, text in looked_at:
            score = -negated
            if same[text] in own:
                continue
            if options.absolute_margin is not None and score + options.absolute_margin > positive:
                continue
            if options.relative_margin is not None and score > positive - abs(positive) * options.relative_margin:
                continue
            if options.max_score is not None and score > options.max_score:
                continue
            if options.min_score is not None and score < options.min_score:
                continue
            kept.append((text, score))
        kept = kept[options.min_rank : last]
        found[anchor] = [t for t, _ in kept], [s for _, s in kept]
    return found


CASES = {
    "plain": MineOptions(negatives=3),
    "absolute margin": MineOptions(negatives=4, absolute_margin=0.1),
    "margin 0": MineOptions(negatives=2, absolute_margin=0.0, pool="all"),
    "relative margin": MineOptions(negatives=3, relative_margin=0.05),
    "both margins": MineOptions(negatives=3, relative_margin=0.3, absolute_margin=0.2, pool="all"),
    "rank range": MineOptions(negatives=5, min_rank=4, max_rank=11),
    "rank range after a margin": MineOptions(negatives=2, min_rank=3, max_rank=9, absolute_margin=-0.2),
    "scores": MineOptions(negatives=3, min_score=0.35, max_score=0.6),
    "more than there are": MineOptions(negatives=500, pool="all"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_negatives_are_those_of_a_search_by_hand(case, seed):
    rows, options = Rows(seed), CASES[case]
    expected = by_hand(rows, options)
    (mined,) = rows.mine(options)
    search = rows.search(options)
    num_short = 0
    for anchor, texts, scores in zip(search.anchors.tolist(), mined.texts, mined.scores, strict=True):
        wanted, wanted_scores = (values[: options.negatives] for values in expected[anchor])
        assert texts[texts >= 0].tolist() == wanted
        np.testing.assert_allclose(scores[: len(wanted)], wanted_scores, rtol=0, atol=1e-12)
        assert np.isnan(scores[len(wanted) :]).all() and (texts[len(wanted) :] == -1).all()
        num_short += len(wanted) < options.negatives
    assert (mined.shortage >= 0).sum() == num_short < len(expected) + (case == "more than there are")
    assert mined.refused[0] and (case not in ("both margins", "scores") or num_short)


def equal(one: list[Mined], other: list[Mined]) -> bool:
    fields = ("texts", "scores", "positive_scores", "shortage")
    joined = [[np.concatenate([getattr(m, name) for m in blocks]) for name in fields] for blocks in (one, other)]
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(*joined, strict=True))


@pytest.mark.parametrize("case", ["both margins", "rank range"])
@pytest.mark.parametrize("sampling", ["top", "random"])
def test_blocks_do_not_change_the_result(case, sampling):
    rows, options = Rows(3), replace(CASES[case], sampling=sampling)
    whole = rows.mine(options)
    for block, memory_gb in [(1, 0.5), (7, 2e-6), (37, 3e-5), (50, 1e-9)]:  # 1e-9: one text of the pool at a time
        assert equal(whole, rows.mine(options, block, memory_gb=memory_gb))
    assert (whole[0].texts >= 0).any()


def test_random_draws_from_the_rank_range_by_seed():
    rows = Rows(4)
    options = MineOptions(negatives=3, min_rank=2, max_rank=12, absolute_margin=-0.3, sampling="random")
    candidates = by_hand(rows, options)
    (one,), (again,), (other,) = (rows.mine(options, seed=seed) for seed in (5, 5, 6))
    assert equal([one], [again]) and not np.array_equal(one.texts, other.texts)
    places = []
    for anchor, texts in zip(rows.search(options).anchors.tolist(), one.texts, strict=True):
        found = [candidates[anchor][0].index(t) for t in texts[texts >= 0].tolist()]
        assert found == sorted(set(found)) and len(found) == min(3, len(candidates[anchor][0]))
        places += found
    assert set(places) == set(range(10))  # the whole range is drawn from


def test_scores_are_exact_where_fp32_can_not_tell_them_apart():
    """Neighbors that differ by less than fp32 resolves are in exact order, and none is lost at the cut."""
    rng = np.random.default_rng(0)
    close = np.repeat(rng.normal(size=(1, 64)), 400, axis=0) / 6
    close[:, 32:] = rng.normal(size=(400, 32)) * 2.0**-12  # products of 2^-24
    pool = np.concatenate([close, rng.normal(size=(200, 64)) / 16]).astype(np.float16)
    vectors = close[:3].astype(np.float16)
    exact = vectors.astype(np.float64) @ pool.astype(np.float64).T
    expected = np.lexsort((np.broadcast_to(np.arange(600), exact.shape), -exact), axis=1)[:, :50]
    rounded = (vectors.astype(np.float32) @ pool.astype(np.float32).T).argsort(axis=1)[:, ::-1][:, :50]
    assert not np.array_equal(np.sort(rounded), np.sort(expected))  # what fp32 alone would keep
    for memory_gb in (0.5, 1e-5):
        scores, indices = nearest(vectors, pool, 50, memory_gb)
        assert np.array_equal(indices, expected)
        assert np.array_equal(scores, np.take_along_axis(exact, expected, axis=1))


def test_reads_memory_mapped_embeddings(tmp_path):
    rows = Rows(6)
    np.save(tmp_path / "vectors.npy", rows.vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    for mine, memory in zip(nearest(mapped[:9], mapped, 5), nearest(rows.vectors[:9], rows.vectors, 5), strict=True):
        assert np.array_equal(mine, memory)


def test_same_texts_join_what_agrees_in_any_feature():
    identity, keys = np.array([1, 2, 2, 3, 4, 5]), np.array([7, 8, 9, 9, 7, 6])
    same = same_texts(identity, keys)
    assert same[0] == same[4] and same[1] == same[2] == same[3] and len({same[0], same[1], same[5]}) == 3


def test_an_anchor_with_many_positives_still_finds_others():
    """Its own texts, all nearer than anything else, use up no ranks."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, WIDTH))
    vectors[:200] = vectors[0] + 0.01 * vectors[:200]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    anchors, positives = np.zeros(299, dtype=np.int64), np.arange(1, 300)
    anchors[199:] = positives[199:] - 1
    options = MineOptions(negatives=4)
    search = plan_search(anchors, positives, anchors[:0], np.zeros(299, dtype=np.int64), np.arange(300), options)
    (mined,) = [mine_block(search, block, vectors.__getitem__, options, 0) for block in search.blocks()]
    assert search.most_positives == gist_dist.data.mining.MOST_POSITIVES and (mined.texts[0] >= 200).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negatives": 0}, r"negatives = 0"),
        ({"min_rank": -1}, r"min-rank = -1.* 0"),
        ({"min_rank": 5, "max_rank": 7}, r"max-rank = 7 .*2.* min-rank = 5.* 3"),
        ({"min_score": 0.9, "max_score": 0.1}, r"min-score = 0\.9 .*max-score = 0\.1"),
    ],
)
def test_impossible_options_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        MineOptions(**changes)


class Compared:
    """Real pairs, some of whose anchors recur, mined by sentence-transformers on fp16 embeddings in a folder."""

    def __init__(self, data: Path, model_folder: Path, folder: Path) -> None:
        self.model = SentenceTransformer(str(model_folder), device="cpu", similarity_fn_name="dot")
        table = pq.read_table(data / "train" / "squad_question_sentence.parquet").slice(0, 800)
        pairs = list(zip(*(table[role].to_pylist() for role in ("anchor", "positive")), strict=True))
        some = range(0, 760, 30)
        pairs += [(pairs[i][0], pairs[i + 9][1]) for i in some]  # second positives
        pairs += [(pairs[i][0], pairs[i - 1][0]) for i in some]  # anchors among the positives
        pairs += [(pairs[i + 1][0], pairs[i][1].upper()) for i in some]  # equal to an uncased model
        self.pairs, self.folder = pairs, folder
        self.anchors, self.pool = ([*dict.fromkeys(pair[role] for pair in pairs)] for role in (0, 1))
        tokens = [tuple(ids) for ids in self.model.tokenizer(self.anchors + self.pool).input_ids]
        number = {ids: place for place, ids in enumerate(dict.fromkeys(tokens))}
        self.same = np.array([number[ids] for ids in tokens])
        self.theirs({})
        for file in folder.glob("*.npy"):
            np.save(file, np.load(file).astype(np.float16).astype(np.float32))

    def tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.model.tokenizer(text).input_ids)

    def positives_of(self, anchor: str) -> list[str]:
        return [p for a, p in self.pairs if a == anchor]

    def theirs(self, options: dict[str, Any]) -> dict[str, list[str]]:
        """Anchor → negatives. Rows that get none are not returned."""
        columns = dict(zip(("anchor", "positive"), map(list, zip(*self.pairs, strict=True)), strict=True))
        mined = mine_hard_negatives(
            Dataset.from_dict(columns), self.model, cache_folder=str(self.folder), output_format="labeled-list",
            batch_size=64, verbose=False, **options,
        )  # fmt: skip
        return {row["anchor"]: row["positive"][1:] for row in mined}

    def ours(self, options: dict[str, Any], by_tokens: bool) -> dict[str, list[str]]:
        wanted = MineOptions(**{OUR_NAMES.get(name, name): value for name, value in options.items()})
        anchor, positive = ({t: n for n, t in enumerate(texts)} for texts in (self.anchors, self.pool))
        rows = np.array([(anchor[a], len(anchor) + positive[p]) for a, p in self.pairs])
        none = np.zeros(0, dtype=np.int64)
        same = self.same if by_tokens else np.arange(len(self.same))
        search = plan_search(rows[:, 0], rows[:, 1], none, np.zeros(len(rows), dtype=np.int64), same, wanted)
        vectors = np.concatenate([np.load(next(self.folder.glob(f"{kind}_*.npy"))) for kind in ("query", "corpus")])
        vectors, texts = vectors.astype(np.float16), self.anchors + self.pool
        blocks = [mine_block(search, block, vectors.__getitem__, wanted, seed=0) for block in search.blocks()]
        found = (row for mined in blocks for row in mined.texts)
        return {a: [texts[t] for t in row if t >= 0] for a, row in zip(self.anchors, found, strict=True)}


@pytest.fixture(scope="module")
def compared(shared_data, minilm_l2, tmp_path_factory):
    return Compared(shared_data, minilm_l2, tmp_path_factory.mktemp("embeddings"))


@pytest.mark.parametrize("case", SHARED_OPTIONS)
def test_negatives_are_those_of_sentence_transformers(compared, case):
    """On the same fp16 embeddings all are; but texts of the same tokens we leave out, and take the next."""
    theirs = {a: list(map(compared.tokens, texts)) for a, texts in compared.theirs(SHARED_OPTIONS[case]).items()}
    ours = {a: list(map(compared.tokens, texts)) for a, texts in compared.ours(SHARED_OPTIONS[case], False).items()}
    different = [a for a in compared.anchors if ours[a] != theirs.get(a, [])]
    assert sum(map(len, ours.values())) > len(ours) / 2 and len(ours) < len(compared.pairs)
    assert not different, f"{len(different)} of {len(ours)}: {different[:5]}"

    if "rank range" in case:  # texts that are left out move the ranks of those after them
        return
    num_left_out = 0
    for anchor, texts in compared.ours(SHARED_OPTIONS[case], True).items():
        own = {compared.tokens(text) for text in (anchor, *compared.positives_of(anchor))}
        kept = [ids for ids in dict.fromkeys(theirs.get(anchor, [])) if ids not in own]
        assert list(map(compared.tokens, texts))[: len(kept)] == kept
        num_left_out += len(theirs.get(anchor, [])) - len(kept)
    assert num_left_out


def tree(folder: Path, models: Path) -> dict[str, Any]:
    """Two sources: one with negatives, prompts and a weight; the other with recurring anchors, split by a column."""
    rng = random.Random(0)
    one = [{"q": words(rng, 3, 6), "p": words(rng, 3, 9), "n": [words(rng, 3, 9)] * (i % 2)} for i in range(60)]
    other = [{"anchor": words(rng, 3, 4), "positive": words(rng, 3, 9), "kind": "ab"[i % 2]} for i in range(50)]
    other += [{**row, "positive": words(rng, 3, 9)} for row in other[:10]] + [
        {"anchor": "", "positive": "x", "kind": "a"}
    ]
    sources = (write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in (("one", one), ("other", other)))
    recipe_tree = recipe(folder, models / "student", models / "guide", *sources)
    first, second = recipe_tree["data"]["sources"]
    first |= {"columns": {"anchor": "q", "positive": "p", "negatives": "n"}, "weight": 2.0}
    first |= {"prompts": {"guide": {"anchor": "cold ", "positive": "", "negatives": ""}}}
    second["split_by"] = "kind"
    return recipe_tree


def texts_of(corpus: Corpus) -> list[tuple[str, str, list[str]]]:
    """Anchor, positive and negatives of every row."""
    ends = np.cumsum(corpus.num_negatives)[:-1]
    negatives = np.split(corpus.negatives_of(np.arange(corpus.num_rows)), ends)
    numbers = zip(corpus.anchors.tolist(), corpus.positives.tolist(), negatives, strict=True)
    return [(corpus.text(a), corpus.text(p), [corpus.text(n) for n in row.tolist()]) for a, p, row in numbers]


@pytest.mark.ray
def test_mined_sources_load_with_their_negatives(ray_session, tmp_path, monkeypatch):
    from gist_dist.on_ray.tasks import mine as module

    monkeypatch.setattr(gist_dist.data.mining, "ANCHORS_AT_ONCE", 40)  # several Ray tasks
    save_tiny_model(tmp_path / "student")
    save_tiny_model(tmp_path / "guide", seed=1)
    config, options = parse_config(tree(tmp_path, tmp_path)), MineOptions(negatives=3, min_rank=1, max_rank=30)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_write_sources", interrupted)
        module.mine(config, options, tmp_path / "mined")
    blocks = {file: file.stat().st_mtime_ns for file in (tmp_path / "mined").glob(".blocks-*/*.npz")}
    assert len(blocks) > 1
    monkeypatch.setattr(module, "_mine_block", lambda *arguments: pytest.fail("nothing was left to search for"))
    report = module.mine(config, options, tmp_path / "mined")
    counts = report.counts
    assert counts["rows"] == 120 and counts["anchors"] == 110 and counts["mined"] == 360 and not counts["short"]
    assert {path.name for path in report.folder.iterdir()} == {
        "one.parquet",
        "other.parquet",
        "sources.yaml",
        "mining.json",
    }
    assert "360 negatives for 120 rows (110 distinct anchors)" in report.lines()[0]

    # What is written is a source: the same rows, each with its own negatives first.
    listed = yaml.safe_load((report.folder / "sources.yaml").read_text())
    again = parse_config(tree(tmp_path, tmp_path) | {"data": listed})
    first, second = again.data.sources
    assert (first.name, first.weight, first.prompts.guide.anchor, second.split_by) == ("one", 2.0, "cold ", "kind")
    student, guide = Student(config.student), Guide(config.guide)
    fits = {"batch": BatchConfig(global_size=2)}
    before, after = (prepare(c.model_copy(update=fits), student, guide, print) for c in (config, again))
    assert before.num_rows == after.num_rows == 120 and before.source_names == after.source_names
    all_positives = {positive for _, positive, _ in texts_of(before)}
    own_of: dict[str, set[str]] = {}
    for anchor, positive, negatives in texts_of(before):
        own_of.setdefault(anchor, set()).update([positive, *negatives])
    for (anchor, positive, own), (*same, negatives) in zip(texts_of(before), texts_of(after), strict=True):
        mined = negatives[len(own) :]
        assert same == [anchor, positive] and negatives[: len(own)] == own
        assert len(set(mined)) == 3 and set(mined) <= all_positives - own_of[anchor]

    # Finished work is left alone, and never replaced by other work.
    written = (report.folder / "one.parquet").stat().st_mtime_ns
    assert module.mine(config, options, tmp_path / "mined").counts == counts
    assert (report.folder / "one.parquet").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"mined .*other inputs .*options.*; name another"):
        module.mine(config, replace(options, negatives=2), tmp_path / "mined")

    # Another model scores in place of the guide, without the guide's prompts, which the sources keep.
    monkeypatch.undo()
    other = module.mine(config, replace(options, model=str(tmp_path / "student")), tmp_path / "other")
    assert other.counts["mined"] == 360 and other.counts["positive_similarity"] != counts["positive_similarity"]
    of_other = yaml.safe_load((other.folder / "sources.yaml").read_text())["sources"]
    assert [source | {"path": ""} for source in of_other] == [source | {"path": ""} for source in listed["sources"]]
    with pytest.raises(UserError, match=r"holds other files"):
        module.mine(config, options, tmp_path)


def test_report_says_who_got_fewer_and_why(tmp_path):
    from gist_dist.on_ray.tasks.mine import MiningReport

    counts = {"mined": 5, "rows": 3, "anchors": 3, "pool": 9, "negatives": 2, "seconds": {"search": 0.5}}
    counts |= {"positive_similarity": 0.75, "negative_similarity": 0.5, "short": {"relative_margin": 1200, "rank": 2}}
    lines = MiningReport(tmp_path, counts).lines()
    assert "positives 0.7500, negatives 0.5000" in lines[1]
    wanted = "1,202 rows got fewer than 2: 1,200 because of relative_margin, 2 because no more are near enough in rank"
    assert lines[2] == wanted
    nothing = counts | {"mined": 0, "negative_similarity": None, "short": {}}
    assert len(MiningReport(tmp_path, nothing).lines()) == 2


def test_mining_needs_a_model_and_rows_with_positives(tmp_path):
    from gist_dist.on_ray.tasks.mine import mine

    without = parse_config(recipe(tmp_path, save_tiny_model(tmp_path / "student"), None, tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match=r"set guide\.model .*--model"):
        mine(without, MineOptions(), tmp_path / "mined")
    with pytest.raises(UserError, match=r"no folder '/nowhere/model'"):
        mine(without, MineOptions(model="/nowhere/model"), tmp_path / "mined")
    labelled = recipe(tmp_path, tmp_path / "student", tmp_path / "guide", tmp_path / "rows.jsonl")
    labelled["data"]["sources"][0]["columns"] = {"text": "text", "label": "label"}
    with pytest.raises(UserError, match=r"classification sets"):
        mine(parse_config(labelled), MineOptions(), tmp_path / "mined")
