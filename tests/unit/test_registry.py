"""Which model serves which checkpoint, what its config.json means, and how a model's files are found."""

from __future__ import annotations

import copy
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapwood.errors import InvalidRequest, UnsupportedModel
from sapwood.layers.rotary import inv_freq
from sapwood.models import hub, registry
from sapwood.models.config import DecoderConfig, HfConfig, eos_token_ids, generation_defaults
from sapwood.models.registry import ModelFamily
from sapwood.request import SamplingParams

YARN = {"type": "yarn", "factor": 2.0}
LONGROPE = {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
LONGROPE2 = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}


def raw(family: str = "Llama", **fields: Any) -> HfConfig:
    values = {
        "architectures": [f"{family}ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
        "hidden_act": "silu",
        **fields,
    }
    return HfConfig({k: v for k, v in values.items() if v != "absent"}, Path("config.json"))


def configure(family: str = "Llama", **fields: Any) -> DecoderConfig:
    config = raw(family, **fields)
    return registry.resolve(config.architecture).configure(config)


# --- the registry


def test_the_five_families_resolve() -> None:
    assert registry.supported() == [
        "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    ]  # fmt: skip
    for architecture in registry.supported():
        assert isinstance(registry.resolve(architecture), ModelFamily)


def test_unknown_architecture_names_what_is_supported() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM, .*Qwen3ForCausalLM"
    ):
        registry.resolve("GPT2LMHeadModel")


def test_models_from_outside_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(*values: str) -> None:
        points = [importlib.metadata.EntryPoint("MyForCausalLM", v, registry.ENTRY_POINT_GROUP) for v in values]
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda *, group: points if group == registry.ENTRY_POINT_GROUP else []
        )

    installed("sapwood.models.qwen2:MODEL")
    assert registry.resolve("MyForCausalLM").configure(raw()).qkv_bias
    assert "MyForCausalLM" in registry.supported()
    installed("sapwood.models.qwen2:configure")
    with pytest.raises(InvalidRequest, match="must be a sapwood.models.registry.ModelFamily, got function"):
        registry.resolve("MyForCausalLM")
    installed("sapwood.models.qwen2:MODEL", "sapwood.models.qwen3:MODEL")
    with pytest.raises(InvalidRequest, match="claimed by 2"):
        registry.resolve("MyForCausalLM")


# --- families


def test_llama() -> None:
    config = configure()
    assert (config.num_q_heads, config.num_kv_heads, config.head_dim, config.rope.theta) == (8, 2, 8, 5e5)
    assert (config.qkv_bias, config.o_bias, config.qk_norm, config.tied, config.fused_qkv) == (False,) * 5
    assert config.layer_windows == (0,) * 4 and config.context_len == 4096
    assert configure(num_key_value_heads="absent").num_kv_heads == 8
    assert configure(head_dim=20).head_dim == 20
    biased = configure(attention_bias=True, tie_word_embeddings=True)
    assert biased.qkv_bias and biased.o_bias and biased.tied


def test_mistral_window_is_for_every_layer() -> None:
    assert configure("Mistral", sliding_window=128).layer_windows == (128,) * 4
    assert configure("Mistral", sliding_window=None).layer_windows == (0,) * 4
    mixed = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(UnsupportedModel, match="layer_types that mix"):
        configure("Mistral", sliding_window=128, layer_types=mixed)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_qwen_windows(family: str) -> None:
    assert configure(family, sliding_window=64).layer_windows == (0,) * 4  # use_sliding_window is off by default
    assert configure(family, use_sliding_window=False, sliding_window=64, max_window_layers=2).layer_windows == (0,) * 4
    assert configure(family, use_sliding_window=True, sliding_window=64, max_window_layers=3).layer_windows == (
        0,
        0,
        0,
        64,
    )
    assert (
        configure(family, use_sliding_window=True, sliding_window=64).layer_windows == (0,) * 4
    )  # the first 28 layers see all
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert configure(family, use_sliding_window=True, sliding_window=64, layer_types=types).layer_windows == (
        64,
        0,
        0,
        64,
    )
    with pytest.raises(UnsupportedModel, match="'chunked_attention' is not supported; supported: full_attention"):
        configure(family, use_sliding_window=True, sliding_window=64, layer_types=["chunked_attention"] * 4)
    with pytest.raises(InvalidRequest, match="sliding_window is not set"):
        configure(family, use_sliding_window=True, sliding_window=None, layer_types=types)
    with pytest.raises(InvalidRequest, match="must list 4 layers"):
        configure(family, use_sliding_window=True, sliding_window=64, layer_types=types[:3])


def test_qwen_biases_and_norms() -> None:
    two, three = configure("Qwen2"), configure("Qwen3", head_dim=32)
    assert (two.qkv_bias, two.o_bias, two.qk_norm) == (True, False, False)
    assert (three.qkv_bias, three.o_bias, three.qk_norm, three.head_dim) == (False, False, True, 32)
    assert configure("Qwen3").head_dim == 128
    assert configure("Qwen3", attention_bias=True).o_bias


def test_phi3() -> None:
    factors = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    scaling = {"type": "su", **factors}
    config = configure(
        "Phi3",
        partial_rotary_factor=0.75,
        original_max_position_embeddings=1024,
        rope_scaling=scaling,
        sliding_window=512,
    )
    assert config.fused_qkv and config.fused_gate_up and config.layer_windows == (512,) * 4
    assert (config.rope.kind, config.rope.rotary_dim, config.rope.factor, config.rope.original_max_position) == (
        "longrope",
        6,
        4.0,
        1024,
    )
    assert config.rope_mode(1024) == 0 and config.rope_mode(1025) == 1
    old = configure("Phi3", partial_rotary_factor=0.75, rope_scaling={"type": "yarn", **factors})
    assert old.rope.kind == "longrope"
    with pytest.raises(InvalidRequest, match="short_factor must list 4 positive numbers, got 3 entries"):
        configure("Phi3", rope_scaling=scaling)


# --- rope layouts


def test_both_rope_layouts_mean_the_same() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
    old = configure(rope_scaling={"rope_type": "llama3", **llama3})
    oldest = configure(rope_scaling={"type": "llama3", **llama3})
    new = configure(rope_theta="absent", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    by_layer = configure(
        rope_theta="absent", rope_parameters={"full_attention": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}}
    )
    assert old == new == oldest == by_layer
    assert old.rope.kind == "llama3" and old.rope.original_max_position == 1024
    assert (
        configure(rope_scaling=None).rope.kind
        == configure(rope_scaling={"rope_type": "default"}).rope.kind
        == "default"
    )
    assert configure(rope_theta="absent").rope.theta == 10000.0


def test_yarn_lengthens_the_context() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    config = configure("Qwen3", rope_scaling=yarn)
    assert config.context_len == 16384 and config.rope.factor == 4.0
    assert configure("Qwen3", rope_scaling={**yarn, "original_max_position_embeddings": 512}).context_len == 4096


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic' is not supported.*supported: default, linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": "mrope"}}, "'mrope' is not supported"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}},
            "differ by layer type",
        ),
        ({"head_dim": 9}, "turns 9 dimensions"),
        ({"head_dim": 2**17}, "head_dim 131072 is not supported; supported: at most 65536"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
            "partial_rotary_factor 0.5 with rope type 'linear' is not supported for LlamaForCausalLM",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: 'silu'"),
        ({"mlp_bias": True}, "mlp_bias true is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\) is not supported"),
    ],
)
def test_unsupported_features_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        configure(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "absent"}, "config.json: hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be an integer >= 1, got '64'"),
        ({"hidden_size": 0}, "hidden_size must be an integer >= 1, got 0"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        ({"num_key_value_heads": 3}, "8 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": 60}, "60 is no multiple of num_attention_heads 8; set head_dim"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"architectures": []}, "architectures must be a list of one name"),
        ({"vocab_size": 2**31}, "vocab_size must be an integer <= 2147483647, got 2147483648"),
        ({"hidden_size": 1e300}, "hidden_size must be an integer <= 2147483647"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number, got 1000"),
        ({"rope_theta": 1.0}, "rope_theta must be above 1, got 1.0"),
        ({"rope_scaling": {**YARN, "beta_fast": -3}}, "beta_fast must be a positive number, got -3"),
        ({"rope_scaling": {**YARN, "beta_slow": "x"}}, "beta_slow must be a positive number, got 'x'"),
        ({"rope_scaling": {**YARN, "mscale": [1]}}, "mscale must be a positive number"),
        ({"rope_scaling": {**YARN, "beta_fast": 1e308}}, "yarn rope's fields give no finite frequencies.*beta_fast"),
        ({"rope_scaling": {**YARN, "factor": 1e300}}, "yarn's factor 1e\\+300 .*at most 2147483647 tokens"),
        (
            {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 1}},
            "original_max_position_embeddings must be at least 2 for longrope, got 1",
        ),
        (
            {"rope_scaling": {**LONGROPE, "short_factor": [10**400] * 4}},
            "short_factor must list 4 positive numbers, got 4 entries",
        ),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        configure(**fields)


FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3")
MINIMAL = {"hidden_size": 512, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 32,
           "vocab_size": 40000}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window": None},
        {"use_sliding_window": True, "max_window_layers": 1},
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": None},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_have_the_defaults_of_transformers(family: str, fields: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{family}Config")(**MINIMAL, **copy.deepcopy(fields))
    values = {"architectures": [f"{family}ForCausalLM"], **MINIMAL, **fields}
    ours = registry.resolve(f"{family}ForCausalLM").configure(HfConfig(values, Path("config.json")))
    assert ours.norm_eps == theirs.rms_norm_eps and theirs.hidden_act == "silu"
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.context_len == theirs.max_position_embeddings
    assert ours.num_kv_heads == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.o_bias == getattr(theirs, "attention_bias", False)
    assert ours.qkv_bias == (family == "Qwen2" or getattr(theirs, "attention_bias", False))
    assert ours.rope.kind == theirs.rope_parameters["rope_type"] == "default"
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    rotary = getattr(transformers.models, family.lower())
    rotary = getattr(getattr(rotary, f"modeling_{family.lower()}"), f"{family}RotaryEmbedding")
    np.testing.assert_allclose(inv_freq(ours.rope), rotary(theirs).inv_freq.numpy(), rtol=1e-5)
    window = getattr(theirs, "sliding_window", None) or 0
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 3
    assert ours.layer_windows == tuple(window if t == "sliding_attention" else 0 for t in types)


def test_longrope_of_phi3_has_the_defaults_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    fields = {"max_position_embeddings": 16384, "rope_parameters": {"rope_theta": 1e4, **LONGROPE2}}
    theirs = transformers.Phi3Config(**MINIMAL, **copy.deepcopy(fields))
    ours = registry.resolve("Phi3ForCausalLM").configure(
        HfConfig({"architectures": ["Phi3ForCausalLM"], **MINIMAL, **fields}, Path("config.json"))
    )
    assert ours.rope.original_max_position == theirs.rope_parameters["original_max_position_embeddings"] == 4096
    assert ours.rope.factor == 4.0


# --- generation_config.json and files


def test_eos_ids_come_from_both_files() -> None:
    def ids(config: Any, generation: Any) -> tuple[int, ...]:
        return eos_token_ids(
            HfConfig({"eos_token_id": config}, Path("c")), HfConfig({"eos_token_id": generation}, Path("g"))
        )

    assert ids(2, None) == (2,) and ids(None, [9, 3]) == (3, 9) and ids([2, 5], 5) == (2, 5) and ids(None, None) == ()
    with pytest.raises(InvalidRequest, match="g: eos_token_id must be token ids"):
        ids(2, ["</s>"])
    assert ids(2.0, [-1, 3.0]) == (2, 3) and ids(-1, None) == ()
    for bad in (-2, 2.5, True, 2**31, 10**400, float("nan")):
        with pytest.raises(InvalidRequest, match="c: eos_token_id must be token ids"):
            ids(bad, None)


def test_generation_defaults() -> None:
    def defaults(**values: Any) -> dict[str, Any]:
        return generation_defaults(HfConfig(values, Path("g")))

    assert defaults(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, bos_token_id=1) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
    }
    assert defaults(do_sample=False) == {"temperature": 0.0}
    assert defaults() == {} and defaults(temperature=None, top_k="x") == {}


def test_generation_defaults_no_request_could_have_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def defaults(**values: Any) -> dict[str, Any]:
        caplog.clear()
        return generation_defaults(HfConfig(values, Path("g")))

    assert defaults(top_k=50.0, temperature=0, min_p=0, top_p=1) == {
        "top_k": 50,
        "temperature": 0,
        "min_p": 0,
        "top_p": 1,
    }
    assert type(defaults(top_k=50.0)["top_k"]) is int and not caplog.records
    for name, value in (
        ("top_p", 0.0), ("top_p", 1.1), ("temperature", -1.0), ("temperature", float("nan")), ("temperature", 10**400),
        ("top_k", 2**31), ("top_k", 0.5), ("top_k", True), ("min_p", -0.1), ("min_p", "x"),
    ):  # fmt: skip
        assert defaults(**{name: value}) == {}
        assert f"g: {name} must be" in caplog.text
    # What is kept is what a request can have.
    SamplingParams(**defaults(top_k=-1, temperature=5, min_p=1))


def test_config_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not found: a model directory holds config.json"):
        HfConfig.read(tmp_path / "config.json")
    for content in (b"{", b"\xff\xfe", b"[]", b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(InvalidRequest, match="config.json"):
            HfConfig.read(tmp_path / "config.json")


def test_local_directories_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve_model_dir(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_model_dir("org/name") == Path("org/name")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="is a file; expected a directory"):
        hub.resolve_model_dir("file")
    for missing in ("/no/such/dir", "./nothing", "a/b/c", "~/no-such-model-dir"):
        with pytest.raises(InvalidRequest, match="does not exist"):
            hub.resolve_model_dir(missing)


def test_hub_failures_are_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    import httpx
    from huggingface_hub import errors

    monkeypatch.chdir(tmp_path)
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    asked: dict[str, Any] = {}
    for error, message in (
        (errors.RepositoryNotFoundError("x", response=response), "the hub has no model 'org/name'"),
        (errors.GatedRepoError("x", response=response), "is gated: accept its licence"),
        (errors.RevisionNotFoundError("x", response=response), "no revision 'v9'"),
        (errors.LocalEntryNotFoundError("x"), "not in the download cache"),
        (
            errors.HfHubHTTPError("502 bad gateway", response=response),
            "downloading 'org/name' at revision 'v9' failed: 502 bad gateway",
        ),
        (httpx.ConnectError("name resolution failed"), "failed: name resolution failed"),
        (OSError("disk full"), "failed: disk full"),
    ):

        def snapshot(model: str, error: Exception = error, **kwargs: Any) -> str:
            asked.update(kwargs)
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        with pytest.raises(InvalidRequest, match=message) as caught:
            hub.resolve_model_dir("org/name", "v9")
        assert caught.value.__suppress_context__ and "There is no directory" in str(caught.value)
    assert (
        asked["revision"] == "v9"
        and "*.safetensors" in asked["allow_patterns"]
        and "original/*" in asked["ignore_patterns"]
    )
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda model, **kwargs: asked.update(kwargs) or str(tmp_path)
    )
    assert hub.resolve_model_dir("org/name", weights=False) == tmp_path
    assert "*.safetensors" not in asked["allow_patterns"]
