"""Our loss inside sentence-transformers' own trainer, beside theirs."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from tiny import run_group, save_tiny_model, words

from gist_dist.core.collectives import World
from gist_dist.drop_in import CachedGISTEmbedLoss

Columns = list[list[str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_tiny_model(folder / "student", seed=1), save_tiny_model(folder / "guide", width=16, layers=1, seed=2)


def columns(num_rows: int = 17, num_negatives: int = 1) -> Columns:
    """No text twice."""
    rng = random.Random(5)
    texts = list({words(rng, 3, 12): None for _ in range(10 * num_rows)})
    return [texts[i * num_rows : (i + 1) * num_rows] for i in range(2 + num_negatives)]


def load(models: tuple[Path, Path]) -> tuple[SentenceTransformer, SentenceTransformer]:
    student, guide = (SentenceTransformer(str(folder), device="cpu").double().eval() for folder in models)
    return student, guide


def gradients(loss: torch.nn.Module, model: SentenceTransformer, texts: Columns) -> tuple[float, dict[str, Any]]:
    value = loss([model.preprocess(column) for column in texts], torch.empty(0))
    value.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert sum(g.abs().sum() for g in found.values()) > 0.1
    return value.item(), found


def assert_close(one: tuple[float, dict[str, Any]], other: tuple[float, dict[str, Any]], tolerance: float) -> None:
    assert one[0] == pytest.approx(other[0], abs=tolerance) and one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "options",
    [{"margin": 0.02}, {"margin": 0.05, "margin_strategy": "relative", "contrast_anchors": False}],
    ids=["absolute", "relative"],
)
def test_equals_theirs_where_no_text_comes_twice(models, options):
    texts, (student, guide) = columns(), load(models)
    mine = gradients(CachedGISTEmbedLoss(student, guide, 0.05, chunk_tokens=60, **options), student, texts)
    student, guide = load(models)
    assert_close(mine, gradients(losses.CachedGISTEmbedLoss(student, guide, 0.05, 5, **options), student, texts), 1e-9)


def test_a_guide_that_can_not_read_the_token_ids_is_given_the_decoded_texts(models):
    texts, (student, guide) = columns(), load(models)
    guide.max_seq_length = 6
    mine = CachedGISTEmbedLoss(student, guide, 0.05, margin=0.02)
    assert not mine.guide_reads_ids
    found = gradients(mine, student, texts)
    student, guide = load(models)
    guide.max_seq_length = 6
    theirs = losses.CachedGISTEmbedLoss(student, guide, 0.05, 5, margin=0.02)
    assert_close(found, gradients(theirs, student, texts), 1e-9)


@pytest.mark.parametrize(
    "options", [{"mini_batch_size": 3}, {"mini_batch_num_tokens": 30}, {"show_progress_bar": True}]
)
def test_takes_their_options(models, options):
    texts, (student, guide) = columns(), load(models)
    sizes, forward = [], student[0].forward
    student[0].forward = lambda features, **kwargs: (
        sizes.append(features["input_ids"].shape), forward(features, **kwargs))[1]  # fmt: skip
    mine = gradients(CachedGISTEmbedLoss(student, guide, 0.05, **options), student, texts)
    assert max(rows for rows, _ in sizes) <= options.get("mini_batch_size", 1000)
    assert max(rows * length for rows, length in sizes) <= options.get("mini_batch_num_tokens", 10_000)
    student, guide = load(models)
    assert_close(mine, gradients(losses.CachedGISTEmbedLoss(student, guide, 0.05, **options), student, texts), 1e-9)


@pytest.mark.parametrize("weights", [None, [1.0, 0.3]])
def test_equals_theirs_within_matryoshka_loss(models, weights):
    texts, found = columns(), []
    for kind in (CachedGISTEmbedLoss, losses.CachedGISTEmbedLoss):
        student, guide = load(models)
        wrapped = losses.MatryoshkaLoss(student, kind(student, guide, 0.05, margin=0.02), [32, 8], weights)
        found.append(gradients(wrapped, student, texts))
        with torch.no_grad():
            assert wrapped([student.preprocess(column) for column in texts], torch.empty(0)).item() == pytest.approx(
                found[-1][0], abs=1e-9
            )
    assert_close(*found, 1e-9)


@pytest.mark.parametrize("guide_reads", ["token ids", "texts"])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_equals_theirs_with_prompts(models, include_prompt, guide_reads):
    texts, found = columns(), []
    prompts = ["amber basin: ", "candle: ", "candle: "]
    for kind in (CachedGISTEmbedLoss, losses.CachedGISTEmbedLoss):
        student, guide = load(models)
        student[1].include_prompt = guide[1].include_prompt = include_prompt
        if guide_reads == "texts":
            guide.max_seq_length = student.max_seq_length - 1
        features = [student.preprocess(column, prompt=prompt) for column, prompt in zip(texts, prompts, strict=True)]
        assert all("prompt_length" in column for column in features)
        value = kind(student, guide, 0.05, margin=0.02)(features, torch.empty(0))
        value.backward()
        found.append((value.item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}))
    assert_close(*found, 1e-9)


def test_equals_theirs_where_most_weights_are_frozen(models):
    """As with an adapter."""
    texts, found = columns(), []
    for kind in (CachedGISTEmbedLoss, losses.CachedGISTEmbedLoss):
        student, guide = load(models)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_("query" in name)
        found.append(gradients(kind(student, guide, 0.05), student, texts))
        assert all("query" in name for name in found[-1][1])
    assert_close(*found, 1e-9)


def test_the_second_encode_is_under_the_same_autocast(models):
    """Backward is outside of it: graphs that are kept and chunks that are encoded again have the same gradients."""
    found, texts = [], columns()
    for activation_gb in (0.0, 1.0):
        student, guide = (SentenceTransformer(str(folder), device="cpu").eval() for folder in models)
        loss = CachedGISTEmbedLoss(student, guide, 0.05, chunk_tokens=60, activation_gb=activation_gb)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss([student.preprocess(column) for column in texts])
        value.backward()
        found.append((value.item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}))
    assert_close(*found, 1e-7)


def _under_ddp(world: World, models: tuple[Path, Path], texts: Columns, gather: bool) -> tuple[float, dict[str, Any]]:
    student, guide = load(models)
    own = [column[world.rank :: world.size] for column in texts]
    # Devices with 3 and 8 chunks, and two batches, the first of which is not sent.
    loss = CachedGISTEmbedLoss(
        student, guide, 0.05, margin=0.02, chunk_tokens=200 if world.rank else 60, gather_across_devices=gather,
        activation_gb=0.1 * world.rank,
    )  # fmt: skip
    loss.model = torch.nn.parallel.DistributedDataParallel(student, find_unused_parameters=True)
    features = [student.preprocess(column) for column in own]
    with loss.model.no_sync():
        (loss(features) / 2).backward()
    value = loss(features)
    (value / 2).backward()
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    total = value.detach().clone()
    dist.all_reduce(total)
    return total.item() / world.size, found


@pytest.mark.parametrize("gather", [True, False])
def test_ddp_sends_gradients_once_whatever_the_chunks_of_the_devices(tmp_path, models, gather):
    texts = columns(num_rows=16)
    parts = [texts] if gather else [[column[rank::2] for column in texts] for rank in range(2)]
    alone = []
    for part in parts:
        student, guide = load(models)
        alone.append(gradients(CachedGISTEmbedLoss(student, guide, 0.05, margin=0.02), student, part))
    mean = {name: sum(found[name] for _, found in alone) / len(alone) for name in alone[0][1]}
    expected = sum(value for value, _ in alone) / len(alone), mean
    for found in run_group(_under_ddp, 2, tmp_path, models, texts, gather):
        assert_close(found, expected, 1e-9)


def test_copies_of_the_positive_are_no_negatives(models):
    student, guide = load(models)
    anchors, positives = columns(num_rows=4, num_negatives=0)
    copied = [anchors, [positives[0]] * 4]
    options = {"contrast_anchors": False, "contrast_positives": False}
    mine = CachedGISTEmbedLoss(student, guide, 0.05, **options)
    with torch.no_grad():
        assert mine([student.preprocess(column) for column in copied]).item() == 0
        theirs = losses.CachedGISTEmbedLoss(student, guide, 0.05, 5, **options)
        assert theirs([student.preprocess(column) for column in copied], torch.empty(0)).item() > 1


def test_dropout_is_replayed_whatever_is_kept(models):
    """Both passes draw alike: a step that keeps all graphs, and so encodes once, has the same gradients."""
    found, texts = [], columns()
    for activation_gb in (0.0, 1.0):
        student, guide = load(models)
        student.train()
        torch.manual_seed(7)
        loss = CachedGISTEmbedLoss(student, guide, 0.05, chunk_tokens=60, activation_gb=activation_gb)
        found.append(gradients(loss, student, texts))
        after = torch.rand(3)
    torch.manual_seed(8)
    student, guide = load(models)
    student.train()
    other = gradients(CachedGISTEmbedLoss(student, guide, 0.05, chunk_tokens=60), student, texts)
    assert_close(found[0], found[1], 1e-12)
    assert abs(other[0] - found[0][0]) > 1e-6, "dropout was off"
    torch.manual_seed(7)
    torch.randint(2**62, ())
    assert torch.equal(after, torch.rand(3)), "the loss disturbed the trainer's random numbers"


def _share(world: World, models: tuple[Path, Path], texts: Columns) -> tuple[float, dict[str, Any]]:
    student, guide = load(models)
    own = [column[world.rank :: world.size] for column in texts]  # 9 and 8 rows
    loss = CachedGISTEmbedLoss(student, guide, 0.05, margin=0.02, chunk_tokens=60, gather_across_devices=True)
    value, found = gradients(loss, student, own)
    for gradient in found.values():  # as DDP does it
        dist.all_reduce(gradient)
        gradient /= world.size
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / world.size, found


def test_two_devices_have_the_gradient_of_one_big_batch(tmp_path, models):
    texts, (student, guide) = columns(), load(models)
    alone = gradients(CachedGISTEmbedLoss(student, guide, 0.05, margin=0.02), student, texts)
    assert_close(run_group(_share, 2, tmp_path, models, texts)[0], alone, 1e-10)


def test_trains_in_their_trainer(tmp_path, models):
    from datasets import Dataset

    student, guide = (SentenceTransformer(str(folder), device="cpu") for folder in models)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    anchors, positives = columns(num_rows=32, num_negatives=0)
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, gradient_accumulation_steps=2, num_train_epochs=2,
        learning_rate=1e-3, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=student,
        args=arguments,
        train_dataset=Dataset.from_dict({"anchor": anchors, "positive": positives}),
        loss=CachedGISTEmbedLoss(student, guide, temperature=0.05, chunk_tokens=100),
    )
    result = trainer.train()
    assert result.global_step == 2 and 0 < result.training_loss < 10
    moved = [name for name, p in student.named_parameters() if not torch.equal(before[name], p)]
    assert len(moved) > 10 and not any(p.requires_grad for p in guide.parameters())


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"prompts": {"anchor": "amber: ", "positive": "basin: "}}])
def test_logs_what_theirs_logs(tmp_path, models, options):
    """Training and evaluation losses, over steps of two batches."""
    from datasets import Dataset

    anchors, positives = columns(num_rows=32, num_negatives=0)
    rows = Dataset.from_dict({"anchor": anchors, "positive": positives})
    found = []
    for kind in (CachedGISTEmbedLoss, losses.CachedGISTEmbedLoss):
        student, guide = (SentenceTransformer(str(folder), device="cpu") for folder in models)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path), per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=2, logging_steps=1,
            eval_strategy="steps", eval_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no",
            use_cpu=True, disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=student, args=arguments, train_dataset=rows, eval_dataset=rows, loss=kind(student, guide, 0.05)
        )
        trainer.train()
        assert all(p.grad is None or not p.grad.any() for p in student.parameters()), "evaluation left a gradient"
        history = trainer.state.log_history
        found.append([line[name] for name in ("loss", "eval_loss") for line in history if name in line])
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1], rel=0.01 if "bf16" in options else 1e-4)


def with_adapter(student: SentenceTransformer) -> None:
    """A real one, whose second half isn't the zeros that it begins with: all of its weights then have a gradient."""
    from peft import LoraConfig, TaskType

    torch.manual_seed(0)
    student.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, target_modules=["query", "value"]))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("matryoshka", [False, True])
def test_equals_theirs_with_a_peft_adapter(models, matryoshka):
    texts, found = columns(), []
    for kind in (CachedGISTEmbedLoss, losses.CachedGISTEmbedLoss):
        student, guide = load(models)
        with_adapter(student)
        student.double().eval()
        loss = kind(student, guide, 0.05, margin=0.02)
        loss = losses.MatryoshkaLoss(student, loss, [32, 8]) if matryoshka else loss
        found.append(gradients(loss, student, texts))
        assert found[-1][1] and all("lora_" in name for name in found[-1][1])
    assert_close(*found, 1e-9)


def trained(models, folder: Path, kind: Any, options: dict[str, Any], matryoshka: bool, adapter: bool) -> Any:
    """Logged losses, and the weights that their own trainer has changed."""
    from datasets import Dataset

    student, guide = (SentenceTransformer(str(path), device="cpu") for path in models)
    if adapter:
        with_adapter(student)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    rows = Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), columns(num_rows=32), strict=True)))
    loss = kind(student, guide, 0.05, margin=0.02)
    arguments = SentenceTransformerTrainingArguments(
        str(folder), per_device_train_batch_size=8, max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, optim="sgd", warmup_steps=0, **options,
    )  # fmt: skip
    loss = losses.MatryoshkaLoss(student, loss, [32, 8]) if matryoshka else loss
    trainer = SentenceTransformerTrainer(model=student, args=arguments, train_dataset=rows, loss=loss)
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    moved = {n: (p - before[n]).detach() for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    return logged, moved


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("matryoshka", [False, True], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_their_trainer_moves_the_same_weights(tmp_path, models, precision, accumulated, matryoshka, adapter):
    """Steps of plain gradient descent: what a weight moves is the sum of its gradients."""
    rough, options = precision == "bf16", {"bf16": precision == "bf16", "gradient_accumulation_steps": accumulated}
    kinds = (CachedGISTEmbedLoss, losses.CachedGISTEmbedLoss)
    (mine, moved), (theirs, expected) = (trained(models, tmp_path, k, options, matryoshka, adapter) for k in kinds)
    assert len(mine) == 3 and moved.keys() == expected.keys() and len(moved) > 5
    assert adapter == all("lora_" in name for name in moved)
    assert mine == pytest.approx(theirs, rel=0.02 if rough else 1e-4)
    whole, difference = (
        torch.cat([t.flatten() for t in tensors]).norm().item()
        for tensors in (expected.values(), [moved[name] - expected[name] for name in moved])
    )
    assert difference < (0.1 if rough else 1e-3) * whole


def test_a_model_that_guides_itself_is_trained(models):
    texts, found = columns(), []
    for kind in (CachedGISTEmbedLoss, losses.CachedGISTEmbedLoss):
        student, _ = load(models)
        found.append(gradients(kind(student, student, 0.05, margin=0.02), student, texts))
    assert_close(*found, 1e-9)
    student.train()
    loss = CachedGISTEmbedLoss(student, student, 0.05)
    gradients(loss, student, texts)
    assert student.training


def test_says_what_it_can_not_use(models):
    student, guide = load(models)
    loss = CachedGISTEmbedLoss(student, guide)
    with pytest.warns(UserWarning, match="not compatible"):
        adaptive = losses.AdaptiveLayerLoss(student, loss, n_layers_per_step=1)
    with pytest.raises(ValueError, match="can't be within AdaptiveLayerLoss or Matryoshka2dLoss"):
        adaptive([student.preprocess(["a"]), student.preprocess(["b"])], torch.empty(0))
    for name in ("mini_batch_size", "mini_batch_num_tokens"):
        with pytest.raises(ValueError, match=f"{name} = 0: at least 1"):
            CachedGISTEmbedLoss(student, guide, **{name: 0})
    with pytest.raises(ValueError, match="needs input_ids"):
        loss([{"sentence_embedding": torch.zeros(1, 2)}] * 2)
