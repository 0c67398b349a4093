"""Folders that people name as a model: loaded with what they bring, or named for what they are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from facts import assert_tells
from zoo import Kind

from gist_dist.common.errors import UserError
from gist_dist.config import GuideConfig, StudentConfig
from gist_dist.models.encoder import Guide, Student
from gist_dist.models.folder import stored_dtype, what_is_wrong

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 90868376\n"
WEIGHTS = "model.safetensors"


def student_of(folder: Path, **options) -> Student:
    return Student(StudentConfig(model=str(folder), **options))


def refusal(folder: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        student_of(folder, **options)
    told = str(caught.value)
    assert told.startswith("student.") and "\n" not in told
    return told.replace(str(folder), "M")


@pytest.fixture
def plain(tmp_path) -> Path:
    return zoo.save_plain(tmp_path / "plain")


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_are_fp32_whatever_they_are_stored_in(tmp_path, dtype):
    folder = zoo.save(tmp_path / "model", Kind(extra="dense", dtype=dtype))
    student, guide = student_of(folder), Guide(GuideConfig(model=str(folder)))
    for encoder in (student, guide):
        assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    assert student.loaded.stored_dtype == dtype == stored_dtype(folder)
    narrow = Guide(GuideConfig(model=str(folder), precision="bf16"))
    assert {p.dtype for p in narrow.model.parameters()} == {torch.bfloat16}


def test_a_guide_in_bf16_keeps_its_rotary_angles(tmp_path):
    folder = zoo.save(tmp_path / "model", Kind("qwen3"))
    guide = Guide(GuideConfig(model=str(folder), precision="bf16"))
    assert {b.dtype for b in guide.model.buffers() if b.is_floating_point()} == {torch.float32}
    assert bool(torch.isfinite(guide.encode(split(guide, ["amber river", "old"]))).all())


@pytest.mark.parametrize(
    ("asked", "dtype"), [("fp32", "float32"), ("checkpoint", "bfloat16"), ("bf16", "bfloat16"), ("fp16", "float16")]
)
def test_saved_weights_have_the_type_that_the_recipe_asks_for(tmp_path, asked, dtype):
    student = student_of(zoo.save(tmp_path / "model", Kind(extra="dense", dtype="bfloat16")), save_dtype=asked)
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    student.save(tmp_path / "saved")
    assert stored_dtype(tmp_path / "saved") == dtype
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == dtype
    for name, parameter in student.model.named_parameters():  # what is trained on is as it was
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])


# --------------------------------------------------------------------------------------------- tokenizers and positions


@pytest.mark.parametrize(
    ("architecture", "limit"),
    [("roberta", 64), ("xlm-roberta", 64), ("mpnet", 64), ("bert", 64), ("gpt2", 64), ("qwen3", 128), ("t5", None)],
)
def test_the_limit_is_what_the_positions_allow(tmp_path, architecture, limit):
    folder = zoo.save_plain(tmp_path / "model", Kind(architecture))  # its tokenizer has none
    student = student_of(folder)
    assert student.max_tokens == limit == student.tokenizer.max_tokens
    _, lengths = student.tokenize(["amber " * 500])
    assert lengths[0] == (limit or 502)
    with torch.no_grad():
        assert bool(torch.isfinite(student.embed(split(student, ["amber " * 500, "old"]))).all())
    if limit:
        assert f"student.max_tokens = {limit + 1}: M has positions for {limit} tokens; lower it" == refusal(
            folder, max_tokens=limit + 1
        )
        student_of(folder, max_tokens=limit)
    student.save(tmp_path / "saved")
    assert student_of(tmp_path / "saved").max_tokens == limit


def test_a_limit_beyond_the_positions_is_lowered_and_saved_so(tmp_path):
    folder = zoo.save(tmp_path / "model", Kind())
    zoo.with_settings(folder, "sentence_bert_config.json", max_seq_length=4000)
    zoo.with_settings(folder, "tokenizer_config.json", model_max_length=4000)
    student = student_of(folder)
    assert student.max_tokens == 64
    student.save(tmp_path / "saved")
    from sentence_transformers import SentenceTransformer

    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert saved.max_seq_length == 64 and np.isfinite(saved.encode("amber " * 500)).all()


@pytest.mark.parametrize(("architecture", "own"), [("bert", 20), ("t5", None)])
@pytest.mark.parametrize("asked", [None, 12, 40])
def test_the_saved_limit_is_the_models_own_unless_training_took_longer_texts(tmp_path, architecture, own, asked):
    from sentence_transformers import SentenceTransformer

    folder = zoo.save(tmp_path / "model", Kind(architecture))
    if own:
        zoo.with_settings(folder, "tokenizer_config.json", model_max_length=own)
    student_of(folder, max_tokens=asked).save(tmp_path / "saved")
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    expected = max(own, asked or 0) if own else 302  # all that there is
    assert saved.preprocess(["amber " * 300])["input_ids"].shape[1] == expected


def test_a_padding_token_that_is_missing_is_the_end_of_text(tmp_path, caplog):
    folder = zoo.save_plain(tmp_path / "model", Kind("gpt2"), pad=False)
    student = student_of(folder)
    assert "no padding token; its eos_token '</s>' pads" in caplog.text
    student.save(tmp_path / "saved")
    from sentence_transformers import SentenceTransformer

    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = ["amber", "old red river summit"]
    expected = np.concatenate([saved.encode([text], normalize_embeddings=True) for text in texts])
    np.testing.assert_allclose(saved.encode(texts, normalize_embeddings=True), expected, atol=1e-5)
    student.model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(student.embed(split(student, texts)), expected, atol=1e-5)


def test_tokens_without_an_embedding_are_refused(plain):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(plain)
    assert_tells(refusal(plain), "2 tokens … no embedding … '<new>'")


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2"])
def test_embeddings_that_depend_on_the_padding_are_refused(tmp_path, architecture):
    folder = zoo.save(tmp_path / "model", Kind(architecture, side="left"))
    told = refusal(folder)
    assert "depends on which texts are padded with it" in told and "set padding_side: right" in told
    zoo.with_settings(folder, "tokenizer_config.json", padding_side="right")
    student_of(folder)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = zoo.save(tmp_path / "model", Kind())
    weights = load_file(folder / WEIGHTS)
    weights["embeddings.word_embeddings.weight"][:] = torch.nan
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert "embeddings that are not finite" in refusal(folder)


# ------------------------------------------------------------------------------------------- folders of something else


def test_an_adapter_is_named_with_its_base(plain):
    (plain / WEIGHTS).rename(plain / "adapter_model.safetensors")
    (plain / "config.json").unlink()
    (plain / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "the/base"}')
    told = refusal(plain)
    assert_tells(told, "PEFT … LoRA … 'the/base' … merge it")


@pytest.mark.parametrize(
    "name", ["model.onnx", "onnx/model.onnx", "model-Q4.gguf", "tf_model.h5", "openvino_model.xml"]
)
def test_weights_of_another_framework_only(plain, name):
    (plain / name).parent.mkdir(exist_ok=True)
    (plain / WEIGHTS).rename(plain / name)
    assert_tells(refusal(plain), f"no PyTorch weights … model.safetensors … pytorch_model.bin … {name}")


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json"])
def test_git_lfs_pointers(plain, name):
    (plain / name).write_text(POINTER)
    assert_tells(refusal(plain), f"{name} … Git LFS … git lfs pull")


def test_a_pointer_in_a_module_of_its_own(tmp_path):
    folder = zoo.save(tmp_path / "model", Kind(extra="dense"))
    (folder / "2_Dense" / WEIGHTS).write_text(POINTER)
    assert_tells(refusal(folder), "2_Dense/model.safetensors … Git LFS")


def test_a_shard_that_is_missing(plain):
    names = {
        "embeddings.word_embeddings.weight": "model-00001-of-00002.safetensors",
        "x": "model-00002-of-00002.safetensors",
    }
    (plain / WEIGHTS).rename(plain / "model-00001-of-00002.safetensors")
    (plain / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    assert_tells(refusal(plain), "1 … not there … model-00002-of-00002.safetensors")


def test_sharded_weights_and_a_state_dict_are_loaded(tmp_path, plain):
    from safetensors.torch import load_file
    from transformers import AutoModel

    expected = student_of(plain).model.encode("amber")
    shutil.copytree(plain, tmp_path / "sharded")
    (tmp_path / "sharded" / WEIGHTS).unlink()
    AutoModel.from_pretrained(plain).save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert (tmp_path / "sharded" / f"{WEIGHTS}.index.json").exists()
    torch.save(load_file(plain / WEIGHTS), plain / "pytorch_model.bin")
    (plain / WEIGHTS).unlink()
    for folder in (plain, tmp_path / "sharded"):
        np.testing.assert_allclose(student_of(folder).model.encode("amber"), expected, atol=1e-6)


@pytest.mark.parametrize("kept", [0, 5, 9000])
def test_weights_that_are_cut_off(plain, kept):
    content = (plain / WEIGHTS).read_bytes()
    (plain / WEIGHTS).write_bytes(content[:kept])
    told = refusal(plain)
    expected = f"model.safetensors is cut off: it has 9,000 of {len(content):,} bytes; download it again"
    assert (expected if kept == 9000 else "model.safetensors is damaged or cut off: it does not begin as") in told


def test_a_state_dict_or_a_module_that_is_cut_off(tmp_path, plain):
    from safetensors.torch import load_file

    torch.save(load_file(plain / WEIGHTS), plain / "pytorch_model.bin")
    (plain / WEIGHTS).unlink()
    (plain / "pytorch_model.bin").write_bytes((plain / "pytorch_model.bin").read_bytes()[:9000])
    assert "pytorch_model.bin is damaged or cut off: its 9,000 bytes are no whole archive" in refusal(plain)
    folder = zoo.save(tmp_path / "model", Kind(extra="dense"))
    (folder / "2_Dense" / WEIGHTS).write_bytes((folder / "2_Dense" / WEIGHTS).read_bytes()[:-4])
    assert "2_Dense/model.safetensors is cut off: it has" in refusal(folder)


def test_shards_without_their_index(plain):
    (plain / WEIGHTS).rename(plain / "model-00001-of-00002.safetensors")
    assert "shards (model-00001-of-00002.safetensors) without the index that says what is in them" in refusal(plain)


@pytest.mark.parametrize("other", ["names", "layers"])
def test_weights_that_would_be_random_are_refused(tmp_path, other):
    from safetensors.torch import load_file, save_file

    folder = zoo.save(tmp_path / "model", Kind())
    weights = load_file(folder / WEIGHTS)
    without_pooler = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(without_pooler) < len(weights)
    save_file(without_pooler, folder / WEIGHTS, metadata={"format": "pt"})
    student_of(folder)  # what nothing uses may be missing
    if other == "names":
        kept = {f"other.{name}": tensor for name, tensor in without_pooler.items()}
    else:
        kept = {name: tensor for name, tensor in without_pooler.items() if "layer.1." not in name}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    told = refusal(folder)
    assert (
        f"of {len(weights)} weights of 'M' are not in its files (" in told and "would be random; get the whole" in told
    )


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_whole_models_lack_no_weight(tmp_path, architecture):
    """Whatever transformers ties, renames or leaves out."""
    student_of(zoo.save_plain(tmp_path / "model", Kind(architecture)))


def test_a_module_whose_folder_is_missing(tmp_path):
    folder = zoo.save(tmp_path / "model", Kind(extra="normalize"))
    for empty in folder.glob("2_*"):  # Git keeps no empty folder
        shutil.rmtree(empty)
    student_of(folder)
    shutil.rmtree(folder / "1_Pooling")
    assert "modules.json names a Pooling in 1_Pooling/, and there is no such folder" in refusal(folder)
    folder = zoo.save(tmp_path / "other", Kind(extra="dense"))
    (folder / "2_Dense" / WEIGHTS).unlink()
    assert "the Dense in 2_Dense/ has no weights" in refusal(folder)


def test_an_adapter_beside_a_whole_model(plain):
    (plain / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "the/base"}')
    assert "a whole model and beside it a PEFT adapter of 'the/base', which would be loaded in its" in refusal(plain)


def test_quantized_weights(plain):
    zoo.with_settings(plain, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "its weights are quantized (bitsandbytes), which can't be trained" in refusal(plain)


@pytest.mark.parametrize("names", [("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json")])
def test_a_model_without_a_vocabulary(tmp_path, names):
    folder = zoo.save(tmp_path / "model", Kind())
    for name in names:
        (folder / name).unlink()
    assert "has no vocabulary (tokenizer.json, vocab.txt, …); copy the tokenizer files" in refusal(folder)


def test_code_of_its_own_that_does_not_run(plain):
    classes = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    zoo.with_settings(plain, "config.json", model_type="own", auto_map=classes)
    assert "it has code of its own (own.OwnConfig), which runs only where you trust it" in refusal(plain)
    elsewhere = {key: f"other/repo--{value}" for key, value in classes.items()}
    zoo.with_settings(plain, "config.json", auto_map=elsewhere)
    told = refusal(plain, trust_remote_code=True)
    assert "its code lies in 'other/repo' on the Hub, which can't be loaded; copy the .py files" in told


def test_a_module_that_asks_for_more_than_tokens(tmp_path, plain):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import LSTM, Pooling, Transformer

    modules = [Transformer(str(plain)), LSTM(32, 16), Pooling(32)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"))
    assert "can't embed two texts: one of its modules asks for 'sentence_lengths', which" in refusal(tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}, "it is a cross-encoder (reranker"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "it is a SparseEncoder; only"),
        ("config.json", {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}, "reranker"),
    ],
)
def test_models_of_another_family(plain, file, values, told):
    zoo.with_settings(plain, file, **values)
    assert told in refusal(plain)


def test_a_classifier_is_used_and_its_head_is_spoken_of(plain, caplog):
    labels = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}}
    zoo.with_settings(plain, "config.json", **labels)
    student_of(plain)
    assert (
        "it is a BertForSequenceClassification: its head is left out, and the mean of its tokens is taken"
        in caplog.text
    )


def test_a_plain_decoder_is_spoken_of_and_licence_files_are_passed_on(tmp_path, caplog):
    folder = zoo.save_plain(tmp_path / "model", Kind("qwen3"))
    zoo.with_settings(folder, "config.json", architectures=["Qwen3ForCausalLM"])
    for name in ("LICENSE", "NOTICE.txt"):
        (folder / name).write_text("terms")
    student = student_of(folder)
    assert "no modules of sentence-transformers (modules.json): the last token of a text" in caplog.text
    student.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "LICENSE").read_text() == "terms" and (tmp_path / "saved" / "NOTICE.txt").exists()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: (folder / "checkpoint-20").mkdir(), "but checkpoint-20/: name the checkpoint's folder"),
        (lambda folder: (folder / "zero_to_fp32.py").write_text(""), "it is a DeepSpeed checkpoint"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 2000), "weights and no config.json"),
        (lambda folder: (folder / "m.gguf").write_bytes(b""), "no config.json, only m.gguf"),
        (
            lambda folder: zoo.save_plain(folder / "v0-2025" / "checkpoint-5"),
            "but v0-2025/checkpoint-5/ has: name that",
        ),
        (lambda folder: zoo.save_plain(folder / "snapshots" / "abc"), "but snapshots/abc/ has: name that folder"),
        (lambda folder: None, "it has no config.json or modules.json"),
    ],
)
def test_folders_that_are_no_model(tmp_path, make, told):
    make(tmp_path)
    assert told in str(what_is_wrong(tmp_path))


def test_the_folder_of_a_run(tmp_path):
    zoo.save(tmp_path / "model", Kind())
    assert_tells(what_is_wrong(tmp_path), "folder of a run … model/")
    assert what_is_wrong(tmp_path / "model") is None


def test_models_that_are_not_fed_by_a_transformer(tmp_path, plain):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Router, StaticEmbedding, Transformer
    from tokenizers import Tokenizer

    static = StaticEmbedding(Tokenizer.from_file(str(plain / "tokenizer.json")), embedding_dim=16)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    assert_tells(refusal(tmp_path / "static"), "StaticEmbedding … transformer")
    ways = [[Transformer(str(plain)), Pooling(32)] for _ in range(2)]
    router = Router.for_query_document(*ways)
    SentenceTransformer(modules=[router], device="cpu").save(str(tmp_path / "router"))
    assert "begins with a Router" in refusal(tmp_path / "router")


def test_a_router_behind_the_transformer_is_refused_where_it_makes_a_difference(tmp_path, plain):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Router, Transformer

    modules = [Transformer(str(plain)), Pooling(32), Router.for_query_document([Dense(32, 32)], [Dense(32, 32)])]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"))
    told = refusal(tmp_path / "model")
    assert "embeds otherwise" in told or "can't embed" in told


def split(encoder, texts: list[str]) -> list[np.ndarray]:
    ids, lengths = encoder.tokenize(texts)
    return np.split(ids, np.cumsum(lengths)[:-1])
