"""`gist-dist merge`: the arithmetic of mergekit, on models that stock sentence-transformers loads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny import save_tiny_model

from gist_dist.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny_model(folder / name, seed=seed) for seed, name in enumerate(("first", "second", "third"))]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def merged(tmp_path: Path, *arguments: object) -> Path:
    assert main(["merge", *map(str, arguments), "--output", str(tmp_path / "merged")]) == 0
    return tmp_path / "merged"


def test_linear_is_the_mean_and_loads_in_stock_sentence_transformers(tmp_path, models, capsys):
    folder = merged(tmp_path, *models)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, sum(weights(model)[name] for model in models) / 3, rtol=1e-5, atol=1e-7)
    assert SentenceTransformer(str(folder), device="cpu").encode(["amber basin"]).shape == (1, 32)
    card = (folder / "README.md").read_text()
    assert "`second`" in card and "linear" in card and str(models[0].parent) not in card
    assert str(folder) in capsys.readouterr().out


def test_weights_and_slerp(tmp_path, models):
    one, other = (weights(model) for model in models[:2])
    folder = merged(tmp_path / "weighted", *models[:2], "--weights", 0.75, 0.25)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, 0.75 * one[name] + 0.25 * other[name], rtol=1e-5, atol=1e-7)
    ends = weights(merged(tmp_path / "slerp", *models[:2], "--method", "slerp", "--set", "t=0.0"))
    assert all(torch.allclose(tensor, one[name], atol=1e-6) for name, tensor in ends.items())


def test_a_run_stands_for_its_model(tmp_path, models):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: run")
    (run / "state.json").write_text("{}")
    (run / "model").symlink_to(models[0])
    folder = merged(tmp_path, run, models[0])
    assert all(torch.allclose(tensor, weights(models[0])[name]) for name, tensor in weights(folder).items())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["first"], ["two models"]),
        (["first", "/no/such/model"], ["/no/such/model"]),
        (["first", "wide"], ["wide", "can't be merged"]),
        (["first", "second", "--weights", "1"], ["--weights", "1 for 2"]),
        (["first", "second", "--method", "slurp"], ["slurp"]),
        (["first", "second", "third", "--method", "slerp"], ["slerp"]),
        (["first", "second", "--method", "ties"], ["ties"]),
        (["first", "second", "--set", "t"], ["--set", "t"]),
        (["first", "second", "--output", "."], ["--output"]),
        (["first", "empty"], ["empty"]),
    ],
)
def test_what_can_not_be_merged_is_named(tmp_path, models, arguments, named, capsys):
    save_tiny_model(tmp_path / "wide", width=64)
    (tmp_path / "empty").mkdir()
    places = {"first": models[0], "second": models[1], "third": models[2], "wide": tmp_path / "wide"}
    places["empty"] = tmp_path / "empty"
    command = ["merge", *(str(places.get(argument, argument)) for argument in arguments)]
    if "--output" not in command:
        command += ["--output", str(tmp_path / "merged")]
    try:
        status = main(command)
    except SystemExit as refused:  # argparse's own
        status = int(refused.code or 0)
    told = capsys.readouterr().err
    assert status and all(word in told for word in named), told
    assert not (tmp_path / "merged").exists()
