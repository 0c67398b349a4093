"""The scaling model's volumes and counts are those of the code that it stands for."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from gist_dist.cli import main
from gist_dist.common.errors import UserError
from gist_dist.config import LossConfig
from gist_dist.core.budgets import GRAPH_BYTES
from gist_dist.core.candidates import BatchIndex, row_blocks
from gist_dist.core.loss import gist_loss
from gist_dist.core.plan import assign_chunks, cut_chunks, plan_batch
from gist_dist.models.encoder import Student
from gist_dist.planning.cost_model import GPUS, Workload, busiest_rows, check_gpus, estimate, estimate_lines, workload
from gist_dist.planning.model_shape import ModelShape, model_shape
from gist_dist.recipe import parse_config

BASE = ModelShape("base", 109_000_000, 85_600_000, 768, 768, 12)
LARGE = ModelShape("large", 335_000_000, 303_000_000, 1024, 1024, 24)


def work(rows: float = 16384, online: bool = False, **changes) -> Workload:
    """Triplets of 80 tokens a text."""
    texts = 3.0 * rows
    made = Workload(
        rows=rows, texts=texts, negatives=rows, student_tokens=80 * texts, guide_tokens=80 * texts * online,
        chunk_tokens=16384, largest_chunk=min(16384, 80 * texts), student=BASE, guide=LARGE, student_bf16=True,
        guide_bf16=True, contrast_anchors=True, contrast_positives=True, gather_bytes=4,
        activation_bytes_per_token=3e5, activation_budget=1e9, loss_budget=0.25e9,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("scaling")
    texts = [f"{a} {b} {'cold ' * (i % 9)}" for i, a in enumerate(tiny.WORDS) for b in tiny.WORDS[:8]]
    rows = [{"anchor": texts[i], "positive": texts[i + 80], "negatives": [texts[i + 160]]} for i in range(61)]
    return tiny.recipe(
        folder, tiny.save_tiny_model(folder / "student"), tiny.save_tiny_model(folder / "guide", width=16, layers=1),
        tiny.write_jsonl(folder / "rows.jsonl", rows), batch={"global_size": 61, "chunk_tokens": 100},
    )  # fmt: skip


def received_by(world, recipe) -> dict[str, float]:
    """Bytes that a real step receives, by kind of collective; numbers for the log excepted."""
    received = {"gather": 0.0, "scatter": 0.0, "reduce": 0.0}
    others = (world.size - 1) / world.size
    gather, scatter, reduce = dist.all_gather_into_tensor, dist.reduce_scatter_tensor, dist.all_reduce

    def counting(kind, real, share, tensor_of):
        def counted(*tensors, **options):
            tensor = tensor_of(tensors)
            if tensor.numel() > 1000:
                received[kind] += share * tensor.numel() * tensor.element_size()
            return real(*tensors, **options)

        return counted

    dist.all_gather_into_tensor = counting("gather", gather, others, lambda tensors: tensors[0])
    dist.reduce_scatter_tensor = counting("scatter", scatter, others, lambda tensors: tensors[1])
    dist.all_reduce = counting("reduce", reduce, 2 * others, lambda tensors: tensors[0])
    config, corpus = tiny.prepared(recipe)
    tiny.one_step(world, config, corpus, Student(config.student), None)
    return received


def test_network_volumes_are_those_of_a_step(tmp_path, recipe):
    recipe = recipe | {"guide": None}
    config, corpus = tiny.prepared(recipe)
    plan = plan_batch(corpus, np.arange(corpus.num_rows), 1, config.batch.tokens_at_once, False)
    student = Student(config.student)
    parameters = sum(p.numel() for p in student.parameters())
    told = estimate(
        work(
            rows=len(plan.rows), texts=len(plan.texts), guide=None, guide_tokens=0,
            student=dataclasses.replace(BASE, num_parameters=parameters, width=student.width),
        ), 2, GPUS["cpu"],
    )  # fmt: skip
    counts = [sum(len(plan.student_chunks[c].texts) for c in own) for own in assign_chunks(plan.student_chunks, 2)]
    padding = 2 * max(counts) / len(plan.texts)  # shares are padded to equal numbers of rows
    assert 1 <= padding < 1.3
    for received in tiny.run_group(received_by, 2, tmp_path, recipe):
        assert received["gather"] == pytest.approx(padding * told.network["gather"])
        assert received["scatter"] == pytest.approx(padding * told.network["scatter"])
        # Of the token table only the rows that the batch touches.
        table = sum(module.weight.numel() for module in student.model.modules() if getattr(module, "sparse", False))
        assert told.network["reduce"] - 2 * 0.5 * 8 * table <= received["reduce"] <= told.network["reduce"]


def test_loss_does_as_many_products_as_the_model_counts():
    g, n, d, e = 300, 150, 24, 40
    random = torch.Generator().manual_seed(0)
    student = torch.nn.functional.normalize(torch.randn(2 * g + n, d, generator=random), dim=1)
    guide = torch.nn.functional.normalize(torch.randn(2 * g + n, e, generator=random), dim=1)
    texts = torch.arange(2 * g + n)
    batch = BatchIndex(texts[:g], texts[g : 2 * g], texts[2 * g :], texts)
    for with_positives in (False, True):
        config = LossConfig(contrast_positives=with_positives)
        with FlopCounterMode(display=False) as counter:
            gist_loss(student, guide, batch, row_blocks(batch, config, 1e9), config, kernel=False)
        candidates = work(rows=g, negatives=n, contrast_positives=with_positives).candidates
        assert candidates == (2 + with_positives) * g + n
        not_counted = 2 * g * g * d * with_positives  # addmm_, which the counter does not know
        assert counter.get_total_flops() == g * candidates * (6 * d + 2 * e) - not_counted


def test_encoder_does_as_many_products_as_the_model_counts(minilm_l2):
    from gist_dist.config import StudentConfig

    shape, student = model_shape(str(minilm_l2)), Student(StudentConfig(model=str(minilm_l2), attention="eager"))
    sizes = [p.numel() for p in student.parameters()]
    assert shape.num_parameters == sum(sizes) and shape.width == student.width == 384 and shape.num_layers == 2
    tokens = [np.arange(1000, 1000 + 60, dtype=np.int32)] * 5
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student.encode(tokens, dropout_seed=(0, 0, 0))
    # Less the pooler, which is loaded and not used.
    assert counter.get_total_flops() == pytest.approx(shape.forward_flops(5 * 60, 60), rel=0.06)


@pytest.mark.parametrize("rows", [100, 1000, 8192, 65536, 300_000])
@pytest.mark.parametrize("negatives", [0, 1, 4])
@pytest.mark.parametrize("workers", [1, 7, 64, 1024])
def test_busiest_worker_scores_as_many_rows_as_the_model_says(rows, negatives, workers):
    texts = torch.arange(rows)
    batch = BatchIndex(texts, texts, texts.repeat(negatives), texts)
    blocks = row_blocks(batch, LossConfig(), 0.25e9)
    busiest = max(sum(len(block) for block in blocks[rank::workers]) for rank in range(min(workers, len(blocks))))
    assert busiest_rows(work(rows=rows, negatives=rows * negatives), workers) == pytest.approx(busiest, rel=0.01)


@pytest.mark.parametrize("workers", [1, 8, 64, 500])
def test_busiest_worker_encodes_as_many_tokens_as_the_model_says(workers):
    lengths = np.clip(np.random.default_rng(0).lognormal(3.9, 0.7, 20000), 4, 512).astype(np.int64)
    chunks = cut_chunks(lengths, 16384)
    padded = sum(chunk.padded_tokens for chunk in chunks)
    busiest = max(sum(chunks[c].padded_tokens for c in own) for own in assign_chunks(chunks, workers))
    batch = work(
        student_tokens=padded, chunk_tokens=padded / len(chunks), texts=len(lengths),
        largest_chunk=max(chunk.padded_tokens for chunk in chunks), activation_budget=0,
    )  # fmt: skip
    tokens_of = estimate(batch, workers, GPUS["cpu"]).seconds["encode"] / (
        BASE.forward_flops(1, padded / len(lengths)) / (GPUS["cpu"].bf16_flops * GPUS["cpu"].bf16_mfu)
    )
    assert tokens_of == pytest.approx(busiest, rel=0.15)


def test_peak_memory_grows_with_the_batch_as_measured():
    """benchmarks/results/batch_memory.json: what a text adds to the peak of a CPU worker's step."""
    results = Path(__file__).parent.parent / "benchmarks" / "results" / "batch_memory.json"
    measured = {r["rows"]: r for r in json.loads(results.read_text())["results"]}
    small, large = measured[16384], measured[65536]
    per_text = (large["peak_bytes"] - large["before_bytes"] - small["peak_bytes"] + small["before_bytes"]) / (
        large["texts"] - small["texts"]
    )
    narrow = dataclasses.replace(BASE, width=large["width"])

    def of_batch(result):
        batch = work(rows=result["rows"], texts=result["texts"], student=narrow, guide=narrow, activation_budget=0)
        memory = estimate(batch, 1, GPUS["cpu"]).memory
        return memory["embeddings"] + memory["their gradients"]

    modelled = (of_batch(large) - of_batch(small)) / (large["texts"] - small["texts"])
    assert 0.7 < modelled / per_text < 1.1, (modelled, per_text)


def test_bottleneck_moves_from_the_encoder_to_the_loss():
    """The encoder's work grows with the batch, the loss's with its square; both divide among the GPUs."""
    assert estimate(work(4096), 8, GPUS["h100"]).bottleneck == "backward"
    assert estimate(work(1_000_000), 64, GPUS["h100"]).bottleneck == "loss"
    one, many = (estimate(work(65536), gpus, GPUS["h100"]) for gpus in (1, 64))
    assert 30 < one.step_seconds / many.step_seconds < 64
    assert sum(one.network.values()) == 0 < many.network["scatter"] == 2 * many.network["gather"]
    halved = estimate(work(65536, gather_bytes=2), 64, GPUS["h100"])
    assert halved.network["gather"] == many.network["gather"] / 2 and halved.step_seconds < many.step_seconds


def test_a_step_takes_about_what_an_h200_took():
    """benchmarks/results/gpu.json; the model is a little too fast everywhere."""
    import sides

    results = Path(__file__).parent.parent / "benchmarks" / "results" / "gpu.json"
    steps = [r for r in json.loads(results.read_text())["results"] if r["case"] == "step"]
    assert len(steps) == 7
    for step in steps:
        shape = sides.SHAPES[step["student"]]
        encoding = shape.flops_per_token // 2
        model = ModelShape("", encoding + 30_000 * shape.width, encoding, shape.width, shape.width, shape.layers)
        tokens, per_token = float(step["tokens"]), float(GRAPH_BYTES * shape.width * shape.layers)
        batch = work(
            step["rows"], texts=2 * step["rows"], negatives=0, student=model, guide=model, student_tokens=tokens,
            guide_tokens=tokens, chunk_tokens=tokens / step["chunks"], largest_chunk=tokens / step["chunks"],
            activation_bytes_per_token=per_token, activation_budget=step["kept"] * tokens * per_token, loss_budget=2e9,
        )  # fmt: skip
        seconds = step["rows"] / step["rows_per_second"]
        assert 0.55 < estimate(batch, 1, GPUS["h200"]).step_seconds / seconds < 1.05, step


def test_guide_costs_what_it_does_online_and_little_from_the_cache():
    cached, online, none = (
        estimate(batch, 8, GPUS["a100"]).seconds["guide"]
        for batch in (work(), work(online=True), work(guide=None))
    )  # fmt: skip
    assert none == 0 < 20 * cached < online
    memory = [sum(estimate(batch, 8, GPUS["a100"]).memory.values()) for batch in (work(), work(online=True))]
    assert memory[1] - memory[0] == pytest.approx(2 * LARGE.num_parameters)


@pytest.mark.parametrize("kind", GPUS)
@pytest.mark.parametrize("gpus", [1, 2, 8, 9, 333, 1024])
@pytest.mark.parametrize("rows", [2, 5000, 1_000_000])
def test_every_estimate_is_finite_and_adds_up(kind, gpus, rows):
    told = estimate(work(rows, online=True), gpus, GPUS[kind])
    numbers = [*told.seconds.values(), *told.network.values(), *told.memory.values()]
    assert all(np.isfinite(number) and number >= 0 for number in numbers)
    assert 0 <= told.kept_share <= 1 and all(0 < share <= 1 for share in told.busy.values())
    lines = "\n".join(estimate_lines(work(rows), 100, 1e9, gpus, kind))
    assert f"{gpus:,} × {kind} (a model, not a measurement" in lines and told.bottleneck in lines


def test_tables_of_the_documentation_are_the_models():
    import scaling_table

    page = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
    for table in (scaling_table.speed_table(), scaling_table.phase_table(), scaling_table.kind_table()):
        assert "\n".join(table) in page, "python benchmarks/scaling_table.py prints them anew"


def test_too_large_a_batch_and_idle_gpus_are_told():
    lines = "\n".join(estimate_lines(work(1_000_000), 100, 0, 8, "l4"))
    assert "MORE THAN THE 24 GB IT HAS" in lines
    lines = "\n".join(estimate_lines(work(1024), 100, 0, 256, "h100"))
    assert "too few chunks to go round" in lines and "too few row blocks to go round" in lines
    assert "note" not in "\n".join(estimate_lines(work(65536), 100, 0, 8, "h100"))


def test_workload_is_that_of_the_plan(recipe):
    from gist_dist.on_ray.driver import prepare
    from gist_dist.planning.preview import preview

    config = parse_config(recipe)
    planned = preview(config, *prepare(config))
    batch = workload(planned)
    plans = planned.plans
    assert batch.rows == np.mean([len(plan.rows) for plan in plans]) and batch.negatives == batch.rows
    assert batch.texts == np.mean([len(plan.texts) for plan in plans])
    assert batch.student_tokens == planned.plans[0].padded_tokens and batch.guide_tokens > 0
    assert batch.student.num_layers == 2 and batch.student.width == 32 and batch.guide.width == 16
    assert batch.student.num_parameters == planned.student.num_parameters


def test_plan_prints_the_estimate(recipe, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--gpus", "64", "--gpu-kind", "a100"]) == 0
    told = capsys.readouterr().out
    assert "Estimate for 64 × a100 (a model, not a measurement" in told
    for what in ("step ", "the run ", "network ", "memory ", "backward ", "bottleneck"):
        assert what in told
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 0
    assert "Estimate for" not in capsys.readouterr().out


@pytest.mark.parametrize(("gpus", "kind"), [(0, "h100"), (1025, "h100"), (8, "b999")])
def test_unknown_kinds_and_numbers_are_refused(gpus, kind):
    with pytest.raises(UserError, match=r"--gpus|--gpu-kind"):
        check_gpus(gpus, kind)
    assert main(["plan", "quickstart", "--gpus", str(gpus), "--gpu-kind", kind]) == 1


def test_shapes_are_read_from_files_or_said_to_be_assumed(tmp_path, monkeypatch, minilm_l2):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for absent in ("some/model", "/no/such folder/x", "not a name: at all"):
        shape = model_shape(absent)
        assert shape.is_assumed and shape.model == absent and shape.num_parameters == 335_000_000
    (tmp_path / "m").mkdir()
    settings = json.loads((minilm_l2 / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(settings))
    known, guessed = model_shape(str(minilm_l2)), model_shape(str(tmp_path / "m"))
    assert not guessed.is_assumed and guessed.hidden == 384
    assert guessed.num_parameters == pytest.approx(known.num_parameters, rel=0.05)
    (tmp_path / "m" / "config.json").write_text("{broken")
    assert model_shape(str(tmp_path / "m")).is_assumed
