"""Clustered batches: neighbours to the guide, every row once an epoch, a function of data, guide, seed and step."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny_runs import assert_same_run, curve

from gist_dist.common.errors import UserError
from gist_dist.core.collectives import World
from gist_dist.data import clusters as module
from gist_dist.data.clusters import cluster_source, neighbours_together, read_clusters
from gist_dist.data.corpus import Corpus
from gist_dist.data.kept_arrays import keep_array
from gist_dist.data.sampler import Sampler
from gist_dist.data.statistics import repeated_texts
from gist_dist.models.encoder import Guide, Student
from gist_dist.on_ray.driver import prepare
from gist_dist.on_ray.tasks import clusters as tasks
from gist_dist.planning.preview import preview
from gist_dist.recipe import parse_config
from gist_dist.training.trainer import train

SIZE, TOPICS = 16, 6


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """96 rows on 6 topics, which the guide tells apart by their words, and a source too small to be clustered."""
    folder, rng = tmp_path_factory.mktemp("clusters"), random.Random(2)

    def text(topic):
        return " ".join(rng.choice(tiny.WORDS[3 * topic : 3 * topic + 3]) for _ in range(6))

    rows = [{"anchor": text(i % TOPICS), "positive": text(i % TOPICS)} for i in range(96)]
    few = [{"anchor": tiny.words(rng, 2, 5), "positive": tiny.words(rng, 2, 5)} for _ in range(20)]
    return tiny.recipe(
        folder, tiny.save_tiny_model(folder / "student"), tiny.save_tiny_model(folder / "guide", seed=1),
        tiny.write_jsonl(folder / "topics.jsonl", rows), tiny.write_jsonl(folder / "few.jsonl", few),
        data={"mixing": "clustered"}, batch={"global_size": SIZE, "chunk_tokens": 128},
        optim={"steps": 10, "learning_rate": 1e-3}, checkpoint={"every_steps": 3, "keep": 9, "retry_seconds": 0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tree):
    return prepare(parse_config(tree))


def sampler_of(tree, corpus, **data):
    return Sampler(corpus, parse_config(tree | {"data": tree["data"] | data}))


def in_one_topic(sampler):
    """Share of a batch's rows that are of its commonest topic; of the batches of the first source alone."""
    corpus, shares = sampler.corpus, []
    for batch in (batch for epoch in range(8) for batch in sampler.epoch(epoch).batches):
        if (corpus.source[batch] == 0).all() and len(batch) == SIZE:
            shares.append(np.bincount(corpus.number[batch] % TOPICS).max() / SIZE)
    return np.mean(shares)


def test_every_row_comes_once_an_epoch_and_no_text_twice_in_a_batch(tree, prepared):
    sampler = sampler_of(tree, prepared.corpus)
    for epoch in range(3):
        batches = sampler.epoch(epoch).batches
        assert sorted(np.concatenate(batches).tolist()) == list(range(116))
        assert [repeated_texts(prepared.corpus, batch) for batch in batches] == [0] * len(batches)
    assert len(batches) == sampler.steps_per_epoch


def test_hardness_leads_from_random_batches_to_neighbours(tree, prepared):
    told = [in_one_topic(sampler_of(tree, prepared.corpus, clustering={"hardness": h})) for h in (0, 0.5, 1)]
    alone = in_one_topic(sampler_of(tree, prepared.corpus, mixing="homogeneous"))
    assert abs(told[0] - alone) < 0.15
    assert told[0] < told[1] < told[2]
    assert told[2] > 0.5  # a batch is a cluster and a piece of its neighbour


def test_batches_are_drawn_anew_each_epoch_and_equally_each_time(tree, prepared):
    first, again = (sampler_of(tree, prepared.corpus) for _ in range(2))
    for epoch in (1, 0):  # whichever is drawn first
        for a, b in zip(first.epoch(epoch).batches, again.epoch(epoch).batches, strict=True):
            assert np.array_equal(a, b)
    together = [{frozenset(batch.tolist()) for batch in first.epoch(e).batches} for e in (0, 1)]
    assert not together[0] & together[1]
    other_seed = Sampler(prepared.corpus, parse_config(tree | {"seed": 1}))
    assert not np.array_equal(first.rows(1), other_seed.rows(1))


def test_a_row_that_comes_twice_comes_in_different_batches(tree, prepared):
    source = tree["data"]["sources"][0] | {"weight": 2}
    sampler = sampler_of(tree, prepared.corpus, sources=[source, tree["data"]["sources"][1]])
    batches = sampler.epoch(0).batches
    assert all(len(set(batch.tolist())) == len(batch) for batch in batches)
    counts = np.bincount(np.concatenate(batches))
    assert set(counts[prepared.corpus.source == 0].tolist()) == {2}


def test_clusters_are_made_once_and_found_by_their_content(tree, prepared, monkeypatch):
    config = parse_config(tree)
    made = prepared.corpus.clusters
    monkeypatch.setattr(module, "cluster_source", None)  # would fail if asked again
    again = prepare(config).corpus.clusters
    assert again.name == made.name and np.array_equal(again.of_row, made.of_row)
    assert len(np.unique(made.of_row[prepared.corpus.source == 0])) == TOPICS
    assert set(made.of_row[prepared.corpus.source == 1].tolist()) == {0}


@pytest.mark.ray
@pytest.mark.slow
def test_rows_find_their_centres_in_ray_tasks_as_in_this_process(ray_session, tree, prepared, tmp_path, monkeypatch):
    config = parse_config(tree | {"seed": 3})
    monkeypatch.setattr(tasks, "IN_PROCESS_FLOPS", 0)
    monkeypatch.setattr(tasks, "ROWS_OF_TASK", 20)
    made = tasks.cluster_on_ray(config, prepared.corpus, prepared.guide)
    (file,) = (file for file in (Path(config.corpora_dir) / "clusters").iterdir() if file.name == made.name)
    file.unlink()
    monkeypatch.setattr(tasks, "IN_PROCESS_FLOPS", 1e13)
    again = tasks.cluster_on_ray(config, prepared.corpus, prepared.guide)
    assert again.name == made.name and np.array_equal(again.of_row, made.of_row) and len(np.unique(made.of_row)) > 1


def test_damaged_clusters_are_refused(tree, tmp_path):
    config = parse_config(tree | {"output_dir": str(tmp_path)})
    corpus = prepare(config).corpus
    (file,) = (tmp_path / "corpora" / "clusters").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match="is damaged; remove it, and it is made again"):
        read_clusters(config, corpus.clusters.name)
    file.unlink()
    with pytest.raises(UserError, match="clusters can't be read there"):
        read_clusters(config, corpus.clusters.name)


def test_tour_goes_from_neighbour_to_neighbour():
    """Points on a line, shuffled, are walked along from one end."""
    line = np.random.default_rng(0).permutation(np.arange(50, dtype=np.float32))[:, None]
    steps = np.abs(np.diff(module.tour(np.concatenate([line, line], axis=1))[:, 0]))
    assert (steps == 1).all()


def test_rows_like_each_other_share_a_cluster_and_many_rows_are_sampled(monkeypatch):
    rng = np.random.default_rng(1)
    centres = np.eye(8, dtype=np.float32)
    topic = rng.integers(8, size=4000)
    points = centres[topic] + rng.normal(0, 0.02, (4000, 8)).astype(np.float32)
    monkeypatch.setattr(module, "FITTED_ROWS", 500)  # of 4,000: the others only go to the nearest centre
    cluster = cluster_source(np.arange(4000), lambda rows: points[rows], 500, 0)
    pairs = {(int(t), int(c)) for t, c in zip(topic, cluster, strict=True)}
    assert len(pairs) == 8 == len(set(cluster.tolist()))


def test_the_order_keeps_every_row_and_mixes_the_free_ones_evenly():
    rows, rng = np.random.default_rng(0).permutation(1000), np.random.default_rng(3)
    clusters = rows // 100
    order = neighbours_together(rows, clusters, 0.5, rng)
    assert sorted(order.tolist()) == list(range(1000))
    kinds = [len(set((order[i : i + 50] // 100).tolist())) for i in range(0, 1000, 50)]
    assert min(kinds) > 4  # half of each stretch comes from anywhere
    assert (neighbours_together(rows, clusters, 0.0, rng) == rows).all()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"guide": None},
            r"clustered .*guide.* set guide\.model",
        ),
        ({"guide": {"mode": "self"}}, r"student is its own.* set guide\.model"),
        ({"data": {"mixing": "mixed", "clustering": {"hardness": 0.5}}}, "clustering .*mixing.* mixed"),
        ({"data": {"clustering": {"hardness": 1.5}}}, r"data\.clustering\.hardness = 1\.5.* 1$"),
    ],
)
def test_bad_input_is_named_before_anything_is_read(tree, changes, complaint):
    changed = {key: tree[key] | value if key == "data" else value for key, value in changes.items()}
    with pytest.raises(UserError, match=complaint):
        parse_config(tree | changed)


def test_sources_without_two_batches_are_named_before_the_guide_encodes(tree, tmp_path):
    config = parse_config(tree | {"output_dir": str(tmp_path), "batch": {"global_size": 64}})
    with pytest.raises(UserError, match=r"two batches .*batch\.global_size = 64.*96, 20"):
        prepare(config)
    assert not (tmp_path / "guide_cache").exists()


def test_plan_tells_how_hard_batches_are(tree, prepared):
    seen = preview(parse_config(tree), *prepared)
    assert seen.similarity > seen.similarity_at_random + 0.01
    page = "\n".join(seen.lines())
    assert re.search(
        r"hardness +similarity of an anchor to other rows' positives 0\.\d+, to the guide; 0\.\d+ were", page
    )
    assert "mixing      clustered: 100% of a batch's rows are neighbours" in page


def run(world: World, tree, place: str, name: str, requests=lambda: None, dtype=torch.float32) -> str:
    """With the clusters of that name, as a worker reads them."""
    config = parse_config(tree)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    corpus, encoders = Corpus(Path(place)), (Student(config.student), Guide(config.guide))
    corpus.clusters = read_clusters(config, name)
    for encoder in encoders:
        encoder.model.to(dtype)
    return train(config, corpus, *encoders, world, requests)


def run_in_fp64(world: World, *arguments) -> str:
    return run(world, *arguments, dtype=torch.float64)


def test_curves_do_not_depend_on_the_number_of_workers(tree, prepared, tmp_path):
    one, two = tree | {"name": "one"}, tree | {"name": "two"}
    made = prepared.corpus.place, prepared.corpus.clusters.name
    assert run_in_fp64(World(), one, *made) == "finished"
    assert tiny.run_group(run_in_fp64, 2, tmp_path / "two", two, *made) == ["finished", "finished"]
    assert_same_run(one, two, tolerance=1e-9)
    assert all(line["guide_candidate_similarity"] for line in curve(one))


def test_a_resumed_run_is_the_run_and_needs_the_same_clusters(tree, prepared):
    whole, cut, place = tree | {"name": "whole"}, tree | {"name": "cut"}, prepared.corpus.place
    made, requests = prepared.corpus.clusters, iter([None] * 4 + ["stop"])
    assert run(World(), whole, place, made.name) == "finished"
    assert run(World(), cut, place, made.name, lambda: next(requests)) == "stopped"
    other = keep_array(parse_config(tree), "clusters", {}, made.of_row[::-1])
    with pytest.raises(UserError, match=r"clusters was .* and is now"):
        run(World(), cut, place, other)
    assert run(World(), cut, place, made.name) == "finished"
    assert_same_run(whole, cut)
