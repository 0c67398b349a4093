"""What a model folder is, from its files alone: said before anything of it is loaded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gist_dist.common.files import is_lfs_pointer, json_object

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
FOREIGN = ("*.onnx", "*.gguf", "*.h5", "*.msgpack", "*.tflite", "openvino_model.xml", "*.mlmodel")
LOADED = (".safetensors", ".bin", ".model", ".json", ".txt", ".py")


def what_is_wrong(folder: Path) -> str | None:
    """Why this folder can't be used as a model, and what to do; None where its files look like one."""
    for file in _files(folder):
        if is_lfs_pointer(file):
            return (
                f"{_short(file, folder)} is a Git LFS pointer, not the file itself; run 'git lfs pull' in the folder, "
                "or download the model again"
            )
    inner = transformer_folder(folder)
    if family := other_family(folder):
        return family
    if not _begins_with_a_transformer(folder):
        return None
    weights = _own_weights(inner)
    if (inner / "adapter_config.json").is_file() and not weights:
        base = json_object(inner / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        return (
            f"it holds a PEFT adapter (LoRA) of '{base}' and no whole model; merge it (peft: merge_and_unload(), "
            "unsloth: save_pretrained_merged(), ms-swift: swift export --merge_lora true) and name the merged folder"
        )
    if not (inner / "config.json").is_file():
        return _not_a_model(folder)
    missing = [name for name in _shards(inner) if not (inner / name).is_file()]
    if missing:
        return f"its index names {len(missing)} weight files that are not there ({missing[0]}); download them again"
    if not weights:
        found = [_short(file, folder) for pattern in FOREIGN for file in sorted(folder.rglob(pattern))]
        only = f", only {found[0]}" if found else ""
        return f"it has no PyTorch weights (model.safetensors or pytorch_model.bin){only}; get those of the same model"
    return None


def what_to_say(folder: Path) -> str | None:
    """What a user may not know of a folder that is used all the same."""
    inner = transformer_folder(folder)
    heads = [str(a) for a in json_object(inner / "config.json").get("architectures") or [] if "For" in str(a)]
    is_plain = not (folder / "modules.json").is_file()
    if heads and is_plain and heads[0].endswith("ForCausalLM"):
        return "it has no modules of sentence-transformers (modules.json): the last token of a text is its embedding"
    known = ("ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForConditionalGeneration")
    if heads and is_plain and not heads[0].endswith(known):
        return f"it is a {heads[0]}: its head is left out, and the mean of its tokens is taken"
    return None


def licence_files(folder: Path | None) -> list[Path]:
    """What a model's licence asks to be passed on with it."""
    if folder is None:
        return []
    named = [
        f for f in sorted(folder.iterdir()) if f.name.lower().startswith(("license", "licence", "notice", "copying"))
    ]
    return [file for file in named if file.is_file()]


def stored_dtype(folder: Path) -> str | None:
    """Of the weights as they lie there: float32, bfloat16, …; None where nothing tells."""
    inner = transformer_folder(folder)
    for file in sorted(inner.glob("*.safetensors")):
        kinds = [tensor.get("dtype") for tensor in _header(file).values() if "dtype" in tensor]
        names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        floats = [names[kind] for kind in kinds if kind in names]
        if floats:
            return max(set(floats), key=floats.count)
    settings = json_object(inner / "config.json")
    told = settings.get("dtype") or settings.get("torch_dtype")
    return told if isinstance(told, str) else None


def transformer_folder(folder: Path) -> Path:
    """Where the first module lies: the folder itself, or 0_Transformer in older models."""
    path = _first_module(folder).get("path")
    return folder / path if isinstance(path, str) and (folder / path).is_dir() else folder


def _begins_with_a_transformer(folder: Path) -> bool:
    first = _first_module(folder)
    return "type" not in first or str(first["type"]).endswith(".Transformer")


def _first_module(folder: Path) -> dict[str, Any]:
    """As modules.json describes it; {} where nothing does."""
    try:
        first = json.loads((folder / "modules.json").read_text(encoding="utf-8"))[0]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return first if isinstance(first, dict) else {}


def other_family(folder: Path) -> str | None:
    """Why it can't be used, where it is a model of another kind than those that give a text one embedding."""
    settings = json_object(transformer_folder(folder) / "config.json")
    kind = str(json_object(folder / "config_sentence_transformers.json").get("model_type") or "")
    heads = [str(a) for a in settings.get("architectures") or []]
    is_plain = not (folder / "modules.json").is_file()
    labels = settings.get("id2label")
    is_ranker = is_plain and any(a.endswith("ForSequenceClassification") for a in heads)
    is_ranker = is_ranker and ("sentence_transformers" in settings or (isinstance(labels, dict) and len(labels) == 1))
    if kind == "CrossEncoder" or is_ranker:
        return (
            f"it is a cross-encoder (reranker{', ' + heads[0] if heads else ''}), which scores pairs and embeds no "
            "text; name an embedding model, or the base model that the reranker was made from"
        )
    if kind in ("SparseEncoder", "MultiVectorEncoder"):
        return f"it is a {kind}; only models that give a text one dense embedding are supported"
    return None


def _not_a_model(folder: Path) -> str:
    if (folder / "model" / "modules.json").is_file():
        return "it is the folder of a run; name its model/ in it"
    checkpoints = sorted((f for f in folder.glob("checkpoint-*") if f.is_dir()), key=lambda f: (len(f.name), f.name))
    if checkpoints:
        return f"it has no config.json, but {checkpoints[-1].name}/: name the checkpoint's folder"
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("global_step*")):
        return "it is a DeepSpeed checkpoint; gather its weights with its zero_to_fp32.py and name that folder"
    if foreign := next((f for pattern in FOREIGN for f in sorted(folder.rglob(pattern))), None):
        return f"it has no config.json, only {_short(foreign, folder)}; get the model's PyTorch files"
    if any(_own_weights(folder)):
        return "it has weights and no config.json; copy the config.json of the model that they belong to"
    return "it has no config.json or modules.json; give the folder of a model"


def _own_weights(folder: Path) -> list[Path]:
    """Of a whole model."""
    files = [file for pattern in WEIGHTS for file in folder.glob(pattern) if not file.name.startswith("adapter_")]
    other = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "optimizer.bin", "scaler.pt")
    return [file for file in files if file.name not in other]


def _shards(folder: Path) -> list[str]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file() and not (folder / name).is_file():
            named = json_object(index).get("weight_map")
            return sorted({str(file) for file in named.values()}) if isinstance(named, dict) else []
    return []


def _files(folder: Path) -> Iterator[Path]:
    """Those that are loaded: of the folder, and of its modules."""
    for pattern in ("*", "[0-9]*_*/*"):
        yield from (file for file in sorted(folder.glob(pattern)) if file.suffix in LOADED and file.is_file())


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Of a safetensors file."""
    try:
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            tree = json.loads(content.read(size)) if size < 2**27 else {}
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in tree.items() if isinstance(value, dict)} if isinstance(tree, dict) else {}


def _short(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder))
