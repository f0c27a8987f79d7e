"""config.json: what is read, and what is refused rather than computed wrongly."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from plain_forward import PAGE_SIZE, make_mesh
from tiny_models import CONFIGS

from jaxserve.errors import UnsupportedModel
from jaxserve.models import Architecture, KVGroup, ModelConfig
from jaxserve.models.parameters import Parameter
from jaxserve.pallas_kernels import AttentionMetadata, Shards, layer_kv_shape


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**CONFIGS[name], **fields}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (changed("llama", architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel is not supported. Supported: LlamaForCausalLM, Mistral"),
    (changed("llama", architectures=None), "architecture none is not supported"),
    (changed("llama", architectures=[["LlamaForCausalLM"]]), "is not supported"),
    (changed("llama", quantization_config={"quant_method": "aqlm"}), "'aqlm' is not supported"),
    (changed("llama", hidden_act="gelu"), "hidden_act 'gelu'"),
    (changed("llama", rope_scaling={"rope_type": "longrope", "factor": 2.0}), "rope_type 'longrope'"),
    (changed("llama", rope_scaling={"type": "linear"}), "factor is missing"),
    (changed("llama", rope_scaling=["linear"]), "rope_parameters"),
    (changed("llama", rope_parameters={"full_attention": {"rope_theta": 1.0}}), "differ between layers"),
    (
        changed("llama-rope-llama3", rope_scaling={**CONFIGS["llama-rope-llama3"]["rope_scaling"], "high_freq_factor": 1.0}),
        "high_freq_factor",
    ),
    (changed("llama", partial_rotary_factor=0.5), "partial_rotary_factor"),
    (changed("llama", head_dim=9), "even head_dim"),
    (changed("llama", head_dim=2**30), "head_dim 1073741824 is not supported"),
    (changed("llama", num_key_value_heads=3), "8 attention heads cannot share 3 KV heads"),
    (changed("llama", hidden_size=None), "hidden_size is missing"),
    (changed("llama", hidden_size="64"), "hidden_size must be a whole number"),
    (changed("llama", num_hidden_layers=0), "num_hidden_layers"),
    (changed("llama", num_hidden_layers=True), "num_hidden_layers"),
    (changed("llama", vocab_size=2**40), "vocab_size"),
    (changed("llama", rms_norm_eps=float("nan")), "rms_norm_eps"),
    (changed("llama", rope_theta=float("inf")), "rope_theta"),
    (changed("llama", rope_theta=10**400), "rope_theta"),
    (changed("llama", tie_word_embeddings="yes"), "tie_word_embeddings"),
    (changed("llama", eos_token_id="<end>"), "eos_token_id"),
    (changed("mistral", layer_types=["full_attention"] * 2), "layer_types"),
    (changed("qwen2-windows", layer_types=["sliding_attention"]), "layer_types"),
    (changed("qwen2-windows", layer_types=["chunked_attention"] * 2), "layer_types"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_refuses_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        ModelConfig.from_hf(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reads_old_and_new_rope_fields_alike() -> None:
    old = ModelConfig.from_hf(CONFIGS["llama-rope-llama3"])
    scaling = {**CONFIGS["llama-rope-llama3"]["rope_scaling"], "rope_theta": CONFIGS["llama"]["rope_theta"]}
    assert ModelConfig.from_hf({**changed("llama", rope_parameters=scaling), "rope_theta": None}) == old
    assert old.rope != ModelConfig.from_hf(CONFIGS["llama"]).rope


def test_scaling_lengthens_the_context() -> None:
    assert ModelConfig.from_hf(CONFIGS["llama-rope-linear"]).max_position_embeddings == 4 * 512
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert ModelConfig.from_hf(changed("qwen2", rope_scaling=yarn)).max_position_embeddings == 4 * 512
    assert ModelConfig.from_hf(CONFIGS["llama-rope-dynamic"]).max_position_embeddings == 512


def test_defaults_are_those_of_transformers() -> None:
    bare = {
        k: v for k, v in CONFIGS["llama"].items() if k not in ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    }
    config = ModelConfig.from_hf(bare)
    assert (config.num_kv_heads, config.norm_eps, config.tie_embeddings, config.rope.frequencies[0]) == (8, 1e-6, False, 1.0)
    assert config.rope.frequencies[1] == pytest.approx(10000 ** (-2 / 8))
    assert ModelConfig.from_hf({k: v for k, v in CONFIGS["qwen3"].items() if k != "head_dim"}).head_dim == 128


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (CONFIGS["llama"], (KVGroup((0, 1), None),)),
        (CONFIGS["mistral"], (KVGroup((0, 1), 24),)),
        (changed("mistral", sliding_window=None), (KVGroup((0, 1), None),)),
        ({k: v for k, v in CONFIGS["mistral"].items() if k != "sliding_window"}, (KVGroup((0, 1), 4096),)),
        (CONFIGS["qwen2-windows"], (KVGroup((0,), None), KVGroup((1,), 24))),
        (changed("qwen2-windows", use_sliding_window=False), (KVGroup((0, 1), None),)),
        (changed("qwen3", use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
         (KVGroup((0,), 8), KVGroup((1,), None))),
    ],
)  # fmt: skip
def test_layers_are_grouped_by_window(config: dict[str, Any], groups: tuple[KVGroup, ...]) -> None:
    read = ModelConfig.from_hf(config)
    assert read.kv_groups == groups
    assert [read.kv_groups[g].window for g in read.group_of_layer] == [next(g.window for g in groups if i in g.layers) for i in range(2)]


def test_generation_config_is_honoured() -> None:
    generation = {"eos_token_id": [7, 9], "temperature": 0.6, "top_p": 0.9, "top_k": 50, "do_sample": True, "max_length": 4096}
    config = ModelConfig.from_hf(changed("llama", eos_token_id=[9, 3]), generation)
    assert config.eos_token_ids == (7, 9, 3)
    assert dict(config.defaults) == {"temperature": 0.6, "top_p": 0.9, "top_k": 50}
    assert ModelConfig.from_hf(CONFIGS["llama"]).defaults == ()
    with pytest.raises(UnsupportedModel, match=r"generation_config\.json: temperature"):
        ModelConfig.from_hf(CONFIGS["llama"], {"temperature": "hot"})


@pytest.mark.parametrize(("name", "kinds"), [("llama", 1), ("qwen2-windows", 2)])
def test_each_kind_of_layer_is_traced_once(name: str, kinds: int) -> None:
    config = ModelConfig.from_hf(changed(name, num_hidden_layers=6))
    architecture, mesh = Architecture.of(config), make_mesh(1)
    leaves = tuple(jax.ShapeDtypeStruct(parameter.shape(1), jnp.float32) for parameter in architecture.parameters)
    cache = jax.ShapeDtypeStruct(layer_kv_shape(4, PAGE_SIZE, config.num_kv_heads, config.head_dim), jnp.float32)
    zeros = jnp.zeros(8, jnp.int32)
    metadata = AttentionMetadata(
        page_table=zeros[None, :4], kv_lens=zeros[:1], query_starts=zeros[:2], write_pages=zeros, write_offsets=zeros, decode_only=False
    )
    apply = functools.partial(architecture.apply, shards=Shards())
    step = jax.shard_map(apply, mesh=mesh, in_specs=(architecture.specs, *[P()] * 5), out_specs=P(), check_vma=False)
    kv = ((cache, cache),) * 6
    jaxpr = jax.make_jaxpr(step)(leaves, zeros, zeros, kv, (metadata,) * len(config.kv_groups), zeros[:1])
    (sharded,) = (equation.params["jaxpr"] for equation in jaxpr.eqns if equation.primitive.name == "shard_map")
    layers = [equation.params["jaxpr"] for equation in sharded.eqns if equation.params.get("name") == "_call_layer"]
    assert len(layers) == 6
    assert len({id(layer) for layer in layers}) == kinds


def test_padded_vocabulary_rows_never_win() -> None:
    """320 entries on 6 shards are 54 a shard, so 4 rows of padding; logits are cut to the vocabulary."""
    config = ModelConfig.from_hf(changed("llama", num_attention_heads=6, num_key_value_heads=6, hidden_size=48))
    architecture = Architecture.of(config)
    (embedding,) = (p for p in architecture.parameters if p.sources[0].name == "model.embed_tokens.weight")
    assert isinstance(embedding, Parameter) and embedding.shape(6) == (324, 48)
    table = np.arange(320 * 48, dtype=np.float32).reshape(320, 48)
    shard = embedding.read(lambda name, index: table[index], 5, 6, np.dtype(np.float32))
    np.testing.assert_array_equal(shard[:50], table[270:])
    assert not shard[50:].any()
