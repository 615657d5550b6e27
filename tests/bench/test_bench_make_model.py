"""bench/make_model.py: the shapes are those of the public models, the files load, the tokenizer works."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import make_model
import numpy as np
import pytest
from tokenizers import Tokenizer

from sapwood.engine.tokenizer import Tokenizer as OurTokenizer

# Parameters in millions, as the models' cards give them (embeddings included, tied ones once).
PARAMETERS = {
    "qwen3-0.6b": 596, "qwen3-1.7b": 1721, "qwen3-4b": 4022, "qwen3-8b": 8191, "qwen3-14b": 14768,
    "qwen3-32b": 32762, "qwen2.5-0.5b": 494, "qwen2.5-1.5b": 1544, "qwen2.5-3b": 3086, "qwen2.5-7b": 7616,
    "llama-2-7b": 6738, "llama-3.1-8b": 8030, "llama-3.1-70b": 70554, "llama-3.2-1b": 1236, "llama-3.2-3b": 3213,
    "mistral-7b-v0.3": 7248, "phi-3-mini-4k": 3821,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_public_shapes_have_their_size(name: str) -> None:
    size = make_model.num_weight_bytes(make_model.tensor_shapes(make_model.SHAPES[name]))
    assert round(size / 2e6) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen2.5-7b", "llama-3.2-1b", "mistral-7b-v0.3", "phi-3-mini-4k"])
def test_tensors_are_those_transformers_expects(name: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shape = {**make_model.SHAPES[name], "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(**shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if shape["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    assert make_model.tensor_shapes(shape) == expected


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model.make_model("tiny", folder, shard_bytes=100_000)
    return folder


def test_weights_are_written_in_shards(tiny: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")  # numpy has no bf16
    index = json.loads((tiny / "model.safetensors.index.json").read_text())
    files = sorted(tiny.glob("*.safetensors"))
    assert len(files) > 2 and {f.name for f in files} == set(index["weight_map"].values())
    shapes = make_model.tensor_shapes(make_model.SHAPES["tiny"])
    assert list(index["weight_map"]) == list(shapes)
    tensors = {}
    for file in files:
        assert file.stat().st_size < 140_000  # the largest tensor is 128 KiB
        tensors |= safetensors.load_file(file)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert (tensors["model.norm.weight"] == 1).all()
    embedding = tensors["model.embed_tokens.weight"].float().numpy()
    assert abs(embedding.mean()) < 1e-3 and embedding.std() == pytest.approx(0.02, rel=0.02)


def test_biases_are_no_norms(tmp_path: Path) -> None:
    shapes = {"a.bias": (5000,), "input_layernorm.weight": (3,)}
    make_model.write_shard(tmp_path / "x.safetensors", shapes, np.random.default_rng(0))
    data = (tmp_path / "x.safetensors").read_bytes()[-2 * 5003 :]
    values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    assert values[:5000].std() == pytest.approx(0.02, rel=0.05) and (values[5000:] == 1).all()


def test_one_file_where_one_is_enough(tmp_path: Path) -> None:
    num_bytes = make_model.make_model("tiny", tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert 0 < (tmp_path / "model.safetensors").stat().st_size - num_bytes < 10_000
    with pytest.raises(FileExistsError, match="has weights already"):
        make_model.make_model("tiny", tmp_path)


def test_it_generates(tiny: Path) -> None:
    pytest.importorskip("sapwood._core", reason="the native core is not built", exc_type=ImportError)
    from sapwood import Engine

    with Engine(str(tiny), max_total_tokens=512) as engine:
        out = engine.generate("bababe bibobu", {"max_new_tokens": 8, "ignore_eos": True, "temperature": 0})
        assert len(out.token_ids) == 8 and out.text
        chat = engine.generate([{"role": "user", "content": "Hi!"}], {"max_new_tokens": 4, "ignore_eos": True})
        assert len(chat.token_ids) == 4


@pytest.mark.parametrize("vocab_size", [258, 300, 1024, 4096, 40_000])
def test_every_word_is_one_token(vocab_size: int) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(make_model.word_tokenizer(vocab_size)))
    assert tokenizer.get_vocab_size() == vocab_size
    ids = list(range(258, vocab_size))
    texts = [tokenizer.decode([i]) for i in ids]
    assert [encoding.ids for encoding in tokenizer.encode_batch(texts)] == [[i] for i in ids]
    words = [i for i, text in zip(ids, texts, strict=True) if text.startswith(" ")]
    mixed = np.random.default_rng(0).permutation(words).tolist()
    assert tokenizer.encode(tokenizer.decode(mixed)).ids == mixed
    for text in ("Hello, Wörld! 日本 \U0001f600\n\t\x00", "", " ", "a  b"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_too_few_tokens() -> None:
    with pytest.raises(ValueError, match="at least 258"):
        make_model.word_tokenizer(257)


def test_chat_template(tiny: Path) -> None:
    tokenizer = OurTokenizer.load(tiny)
    text = tokenizer.apply_chat_template([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    assert text == "<|system|>\ns</s>\n<|user|>\nu</s>\n<|assistant|>\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (256, (257,))


@pytest.mark.parametrize("shape", make_model.OWN_TOKENIZERS)
def test_the_models_own_tokenizer(shape: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPWOOD_DATA", str(data_dir))
    bos, eos = make_model.write_tokenizer(shape, tmp_path)
    tokenizer = OurTokenizer.load(tmp_path)
    assert tokenizer.vocab_size <= make_model.SHAPES[shape]["vocab_size"]
    assert tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode("Once upon a time")).endswith("Once upon a time")
    assert (bos, eos) == (1, {"llama-2-7b": 2, "phi-3-mini-4k": 32000}[shape])
    monkeypatch.setenv("SAPWOOD_DATA", str(tmp_path))  # no tokenizers there: one is made
    assert make_model.write_tokenizer(shape, tmp_path) == (256, 257)
    assert OurTokenizer.load(tmp_path).vocab_size == make_model.SHAPES[shape]["vocab_size"]


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["make_model.py", "--list"])
    assert make_model.main() == 0
    assert "llama-3.1-8b" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["make_model.py", "tiny", str(tmp_path / "m")])
    assert make_model.main() == 0
    assert "0.00 GB of weights" in capsys.readouterr().out
    for wrong in (["tiny"], ["tiny", str(tmp_path / "m")], ["tiny", "x", "--shard-gb", "0"], ["no-such", "x"]):
        monkeypatch.setattr(sys, "argv", ["make_model.py", *wrong])
        with pytest.raises(SystemExit):
            make_model.main()
