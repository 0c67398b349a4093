"""What a model folder is, from its files alone: said before anything of it is loaded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from gist_dist.common.files import is_lfs_pointer, json_object

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
FOREIGN = ("*.onnx", "*.gguf", "*.h5", "*.msgpack", "*.tflite", "openvino_model.xml", "*.mlmodel")
NO_VOCABULARY = (
    "it has no vocabulary (tokenizer.json, vocab.txt, …); copy the tokenizer files of the model that it was made from"
)
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
    if (inner / "adapter_config.json").is_file():
        base = json_object(inner / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        if weights:
            return (
                f"it holds a whole model and beside it a PEFT adapter of '{base}', which would be loaded in its place; "
                "if the model has it merged in, remove adapter_config.json and adapter_model.*"
            )
        return (
            f"it holds a PEFT adapter (LoRA) of '{base}' and no whole model; merge it (peft: merge_and_unload(), "
            "unsloth: save_pretrained_merged(), ms-swift: swift export --merge_lora true) and name the merged folder"
        )
    if not (inner / "config.json").is_file():
        return _not_a_model(folder)
    if kind := _quantized(inner):
        return (
            f"its weights are quantized ({kind}), which can't be trained or scored with here; name the same model in "
            "16 bits (unsloth: save_pretrained_merged(save_method='merged_16bit'))"
        )
    if alone := sorted(file.name for file in inner.glob("*-0*-of-0*.*") if file in weights and not _index(inner)):
        return f"it has shards ({alone[0]}) without the index that says what is in them (model.safetensors.index.json)"
    missing = [name for name in _shards(inner) if not (inner / name).is_file()]
    if missing:
        return f"its index names {len(missing)} weight files that are not there ({missing[0]}); download them again"
    if not weights:
        found = [_short(file, folder) for pattern in FOREIGN for file in sorted(folder.rglob(pattern))]
        only = f", only {found[0]}" if found else ""
        return f"it has no PyTorch weights (model.safetensors or pytorch_model.bin){only}; get those of the same model"
    for file in _files(folder):
        if problem := _is_cut(file):
            return f"{_short(file, folder)} {problem}; download it again"
    return _missing_module(folder)


def why_it_failed(folder: Path, is_trusted: bool) -> str | None:
    """Why a model could not be loaded: other senses than text, code of its own that does not run, no vocabulary."""
    settings = json_object(transformer_folder(folder) / "config.json")
    if sense := next((sense for sense in ("vision", "audio") if f"{sense}_config" in settings), None):
        return f"it is multimodal ({settings.get('model_type')}, with {sense}); only text models are supported"
    classes = settings.get("auto_map")
    named = [name for name in classes.values() if isinstance(name, str)] if isinstance(classes, dict) else []
    if not named:
        return None if _has_vocabulary(folder) else NO_VOCABULARY
    if not is_trusted:
        return (
            f"it has code of its own ({named[0]}), which runs only where you trust it; read it, and set "
            "trust_remote_code: true"
        )
    if elsewhere := next((name for name in named if "--" in name), None):
        repository, _, name = elsewhere.partition("--")
        return (
            f"its code lies in '{repository}' on the Hub, which can't be loaded; copy the .py files from there into "
            f"the folder, and write {name} in auto_map of its config.json"
        )
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
    """Type of the weights as they lie there: float32, bfloat16, …; None where nothing tells."""
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


def _has_vocabulary(folder: Path) -> bool:
    inner = transformer_folder(folder)
    names = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "*.spm")
    return any(file.is_file() for place in {folder, inner} for name in names for file in place.glob(name))


def _quantized(inner: Path) -> str | None:
    """The method."""
    settings = json_object(inner / "config.json").get("quantization_config")
    return str(settings.get("quant_method") or "unknown method") if isinstance(settings, dict) else None


def _missing_module(folder: Path) -> str | None:
    """A missing folder that modules.json names; a module without settings, such as Normalize, needs none."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for module in modules if isinstance(modules, list) else ():
        path, kind = (str(module.get(key) or "") for key in ("path", "type")) if isinstance(module, dict) else ("", "")
        kind = kind.rsplit(".", 1)[-1]
        if path and kind != "Normalize" and not (folder / path).is_dir():
            return f"modules.json names a {kind} in {path}/, and there is no such folder; get the whole model"
        if kind == "Dense" and path and not _own_weights(folder / path):
            return f"the {kind} in {path}/ has no weights; get the whole model"
    return None


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
    checkpoints = [
        f for f in folder.glob("checkpoint-*") if f.is_dir() and f.name.removeprefix("checkpoint-").isdigit()
    ]
    checkpoints.sort(key=lambda f: int(f.name.removeprefix("checkpoint-")))
    if checkpoints:
        return f"it has no config.json, but {checkpoints[-1].name}/: name the checkpoint's folder"
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("global_step*")):
        return "it is a DeepSpeed checkpoint; gather its weights with its zero_to_fp32.py and name that folder"
    if foreign := next((f for pattern in FOREIGN for f in sorted(folder.rglob(pattern))), None):
        return f"it has no config.json, only {_short(foreign, folder)}; get the model's PyTorch files"
    if any(_own_weights(folder)):
        return "it has weights and no config.json; copy the config.json of the model that they belong to"
    if within := sorted(folder.glob("*/config.json")) or sorted(folder.glob("*/*/config.json")):
        return f"it has no config.json, but {_short(within[-1].parent, folder)}/ has: name that folder"
    return "it has no config.json or modules.json; give the folder of a model"


def _own_weights(folder: Path) -> list[Path]:
    """Files with the weights of a whole model."""
    files = [file for pattern in WEIGHTS for file in folder.glob(pattern) if not file.name.startswith("adapter_")]
    other = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "optimizer.bin", "scaler.pt")
    return [file for file in files if file.name not in other]


def _index(folder: Path) -> bool:
    return any((folder / f"{name}.index.json").is_file() for name in ("model.safetensors", "pytorch_model.bin"))


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


def _is_cut(file: Path) -> str | None:
    """Whether weights end before they should, as after a download or a copy that was broken off."""
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        ends = [tensor["data_offsets"][1] for tensor in _header(file).values() if "data_offsets" in tensor]
        if not ends:
            return "is damaged or cut off: it does not begin as safetensors do"
        with file.open("rb") as content:
            whole = 8 + int.from_bytes(content.read(8), "little") + max(ends)
        return f"is cut off: it has {size:,} of {whole:,} bytes" if size < whole else None
    if file.suffix == ".bin" and file.name.startswith("pytorch_model"):
        with file.open("rb") as content:
            is_old = content.read(2) == b"\x80\x02"  # of torch before 1.6
        return None if is_old or is_zipfile(file) else f"is damaged or cut off: its {size:,} bytes are no whole archive"
    return None


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file."""
    try:
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            tree = json.loads(content.read(size)) if size < 2**27 else {}
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in tree.items() if isinstance(value, dict)} if isinstance(tree, dict) else {}


def _short(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder))
