"""A loss or gradient that is not finite: named with its rows, the state before it kept, or skipped and counted."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_runs import STEPS, Runs, assert_same_run, checkpoints, complaint, curve, run_dir, weights

from gist_dist.common.errors import UserError
from gist_dist.data.corpus import prepare
from gist_dist.models.encoder import Guide, Student
from gist_dist.recipe import parse_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("non-finite"))


@pytest.fixture(scope="module")
def undisturbed(runs) -> dict[str, Any]:
    tree = runs.tree("undisturbed")
    runs.train(tree)
    return tree


class BadEmbedding(Student):
    """One text of step 3 has an embedding of NaN: the longest."""

    steps = (3,)

    def encode(self, texts, dropout_seed):
        embeddings = super().encode(texts, dropout_seed)
        if dropout_seed[1] not in self.steps or dropout_seed[2] != 0:
            return embeddings
        return embeddings * torch.ones_like(embeddings).index_fill(0, torch.tensor([0]), torch.nan)


class BadTwice(BadEmbedding):
    steps = (2, 3, 5)


class BadGradient(Student):
    """The backward pass of step 3 overflows, though the loss is fine."""

    def encode(self, texts, dropout_seed):
        embeddings = super().encode(texts, dropout_seed)
        if dropout_seed[1] == 3 and embeddings.requires_grad:
            embeddings.register_hook(lambda gradient: gradient * torch.inf)
        return embeddings


def rows_of_step_3(tree: dict[str, Any]) -> dict[str, Any]:
    return json.loads((run_dir(tree) / "non_finite" / "step-00000003.json").read_text())


def test_stop_names_the_step_and_its_rows_on_every_rank(runs, undisturbed):
    tree = runs.tree("loss")
    told = runs.train_on(2, "loss", complaint, tree, BadEmbedding)
    assert told[0] == told[1] and told[0].startswith("UserError: step 3: the loss is nan; ")
    facts = rows_of_step_3(tree)
    assert facts["what"] == "loss" and facts["blamed_for"] == "the student's embedding is not finite"
    # Which row has the longest text of the batch: found by other means.
    config = parse_config(tree)
    corpus = prepare(config, Student(config.student), Guide(config.guide), progress=lambda line: None)
    numbers = np.array([row["row"] for row in facts["rows"]])
    assert len(numbers) == curve(undisturbed)[2]["rows"]
    at = np.array([np.flatnonzero(corpus.number == number)[0] for number in numbers])
    lengths = [
        max(corpus.student_lengths[[corpus.anchors[i], corpus.positives[i], *corpus.negatives_of(np.array([i]))]])
        for i in at
    ]
    (blamed,) = (row["row"] for row in facts["rows"] if row["blamed"])
    assert blamed in numbers[np.array(lengths) == max(lengths)]
    assert f"the student's embedding is not finite of rows row {blamed} (counting from 0; all its rows" in told[0]
    assert "the state before it is kept in" in told[0] and "optim.non_finite=skip" in told[0]
    # It is kept: the step was not taken, and a student that is fixed goes on from there.
    assert checkpoints(tree) == [2] and [line["step"] for line in curve(tree)] == [1, 2]
    assert runs.train(tree) == "finished"
    assert_same_run(tree, undisturbed, 1e-5)


def test_a_gradient_that_is_not_finite_stops_too(runs, undisturbed):
    tree = runs.tree("gradient", checkpoint={"every_steps": None})
    told = (
        r"step 3: the gradient norm is (nan|inf) in a batch of rows row \d+, .* and 11 more .*; all embeddings and the "
    )
    told += (
        r"loss are finite, and the backward pass begins to overflow at '0\.model\..*'; .*; lower optim.learning_rate"
    )
    with pytest.raises(UserError, match=told):
        runs.train(tree, student=BadGradient)
    facts = rows_of_step_3(tree)
    assert facts["what"] == "gradient" and not any(row["blamed"] for row in facts["rows"])
    assert checkpoints(tree) == [2]  # which no schedule asked for
    assert runs.train(tree) == "finished"
    assert_same_run(tree, undisturbed)


@pytest.mark.parametrize(("student", "what"), [(BadEmbedding, "loss"), (BadGradient, "gradient")])
def test_a_skipped_step_changes_nothing(runs, undisturbed, student, what, caplog):
    tree = runs.tree(f"skip-{what}", optim={"non_finite": "skip"}, checkpoint={"every_steps": 1, "keep": 9})
    assert runs.train(tree, student=student) == "finished"
    lines = curve(tree)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["skipped"] for line in lines] == [None, None, what, None, None, None]
    assert lines[2]["grad_norm"] is None and (lines[2]["loss"] is None) == (what == "loss")
    assert rows_of_step_3(tree)["rows"]
    for file in ("model", "optimizer"):
        before, after = (
            load_file(run_dir(tree) / "checkpoints" / f"step-0000000{step}" / f"{file}.safetensors") for step in (2, 3)
        )
        assert all(np.array_equal(tensor, after[name]) for name, tensor in before.items())
    assert lines[:2] == curve(undisturbed)[:2] and lines[3]["loss"] != curve(undisturbed)[3]["loss"]
    assert all(np.isfinite(weight).all() for weight in weights(tree).values())
    assert [r.message for r in caplog.records if "skipped, as 1 of at most 10 steps" in r.message]
    # The same with an interruption right after it.
    resumed = runs.from_checkpoint(tree, 3, f"skip-{what}-resumed")
    assert runs.train(resumed, student=student) == "finished"
    assert_same_run(resumed, tree)


def test_skips_are_bounded_over_resumes(runs):
    tree = runs.tree("bounded", optim={"non_finite": "skip", "max_skipped": 2}, checkpoint={"every_steps": 4})
    told = r"step 5.*loss is nan.*optim\.max_skipped = 2 .*skipped.*kept"
    with pytest.raises(UserError, match=told):
        runs.train(tree, student=BadTwice)
    with pytest.raises(UserError, match=told):
        runs.train(tree, student=BadTwice)  # from step 4: what was skipped is remembered
    more = tree | {"optim": tree["optim"] | {"max_skipped": 3}}
    assert runs.train(more, student=BadTwice) == "finished"
    assert [line["step"] for line in curve(tree) if line["skipped"]] == [2, 3, 5]


def test_the_first_step_has_no_state_before_it(runs):
    tree = runs.tree("first", student={"dropout": 0.1}, loss={"temperature": 1e-45})
    with pytest.raises(UserError, match=r"step 1.*loss is (nan|inf).*untrained student"):
        runs.train(tree)


def test_rows_whose_own_loss_is_not_finite(runs):
    """Embeddings are fine; the temperature makes every row's loss overflow."""
    tree = runs.tree("own", loss={"temperature": 1e-45})
    told = (
        r"the loss is not finite of rows row \d+, \d+, \d+, \d+, \d+ and \d+ more .*; all embeddings are finite, and "
    )
    with pytest.raises(UserError, match=told + r"scores overflow at loss.temperature = 1e-45; .*; raise it"):
        runs.train(tree)


class MaskedWhole(Student):
    """The last layer's attention sees a row that is masked whole, as some kernels do with left padding."""

    def __init__(self, config, device="cpu"):
        super().__init__(config, device)
        self.model[0].model.encoder.layer[-1].attention.self.register_forward_hook(self.mask)

    def mask(self, module, given, output):
        weights = torch.full_like(output[0], -torch.inf).softmax(dim=-1)
        return (output[0] + weights, *output[1:])


class Overflow(Student):
    """One layer's numbers are beyond the type's."""

    def __init__(self, config, device="cpu"):
        super().__init__(config, device)
        inner = self.model[0].model.encoder.layer[0].intermediate.dense
        inner.register_forward_hook(lambda module, given, output: output * 1e38 * 1e38)


@pytest.mark.parametrize(
    ("student", "module", "remedy"),
    [
        (MaskedWhole, r"1\.attention\.self' \(\w+Attention\) is the first to give nan", "masked whole"),
        (Overflow, r"0\.intermediate\.dense' \(Linear\) is the first to give (inf|nan)", "precision=fp32"),
    ],
)
def test_a_forward_pass_that_is_not_finite_is_not_put_on_the_learning_rate(runs, student, module, remedy):
    tree = runs.tree(f"forward-{student.__name__}")
    told = rf"step 1: the loss is nan; .*; in the forward pass '0\.model\.encoder\.layer\.{module}, .*{remedy}"
    with pytest.raises(UserError, match=told) as found:
        runs.train(tree, student=student)
    assert "no learning rate changes that" in str(found.value) and "lower optim" not in str(found.value)
    facts = json.loads((run_dir(tree) / "non_finite" / "step-00000001.json").read_text())
    assert "is the first to give" in facts["began"]


def test_a_learning_rate_that_is_too_high_is_named(runs):
    tree = runs.tree("too-high", optim={"learning_rate": 1e12, "warmup_ratio": 0.0, "max_grad_norm": None})
    with pytest.raises(UserError, match=r"step [2-6]: .*the weights have grown too large: lower optim\.learning_rate"):
        runs.train(tree)
