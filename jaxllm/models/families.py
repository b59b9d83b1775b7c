"""What the families of decoders share: how their config.json is read and how their weights are named."""
from jaxllm.checkpoint.rules import Ignore, Rule
from jaxllm.config import LayerSpec, ModelConfig
from jaxllm.errors import UnsupportedError
from jaxllm.layers.rope import rope_spec

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "relu": "relu"}

LLAMA_RULES = (
    Rule("model.embed_tokens.weight", "embedding"),
    Rule("model.norm.weight", "norm"),
    Rule("lm_head.weight", "head", optional=True),  # some tied checkpoints carry a copy of the embedding
    Rule("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention_norm"),
    Rule("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp_norm"),
    *(Rule(f"model.layers.{{i}}.self_attn.{name}_proj.{leaf}", f"layers.{{i}}.{name}.{leaf}")
      for name in "qkvo" for leaf in ("weight", "bias")),
    *(Rule(f"model.layers.{{i}}.mlp.{name}_proj.{leaf}", f"layers.{{i}}.{name}.{leaf}")
      for name in ("gate", "up", "down") for leaf in ("weight", "bias")),
    Rule("model.layers.{i}.self_attn.q_norm.weight", "layers.{i}.q_norm"),
    Rule("model.layers.{i}.self_attn.k_norm.weight", "layers.{i}.k_norm"),
    Ignore("v_head.**"),  # a reward model's, which trainers save in the same file
)


def field(config: dict, name: str, default=None):
    """config[name], or an error that names the field; a null counts as absent."""
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise UnsupportedError(f"config.json of {config.get('architectures')} has no {name!r}, which this architecture needs")
    return value


def rope_parameters(config: dict) -> dict:
    """The rope settings of both published layouts: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling`."""
    stated = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if config.get("original_max_position_embeddings"):  # goes before the entry of the same name, as in transformers
        stated["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return {"rope_theta": config.get("rope_theta") or 10000.0,
            "partial_rotary_factor": config.get("partial_rotary_factor") or 1.0,
            **{name: value for name, value in stated.items() if value is not None}}


def llama_like(config: dict, max_model_len: int | None, *, windows: tuple[int | None, ...] | None = None,
               **family) -> ModelConfig:
    """The ModelConfig of a family with Llama's structure; `family` says what its config.json leaves unsaid."""
    width, heads = field(config, "hidden_size"), field(config, "num_attention_heads")
    head_dim = config.get("head_dim") or width // heads
    count, max_position = field(config, "num_hidden_layers"), field(config, "max_position_embeddings")
    act = config.get("hidden_act", "silu")
    if act not in ACTIVATIONS:
        raise UnsupportedError(f"activation {act!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    rope = rope_spec(head_dim, max_position, rope_parameters(config), max_model_len)
    kv_heads = field(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UnsupportedError(f"{heads} query heads cannot share {kv_heads} key/value heads: the one must divide the other")
    eos = config.get("eos_token_id")
    return ModelConfig(
        architecture=config["architectures"][0], vocab_size=field(config, "vocab_size"), width=width,
        mlp_width=field(config, "intermediate_size"), num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        norm_eps=field(config, "rms_norm_eps", 1e-6), max_position=max_position,
        layers=tuple(LayerSpec(rope, window) for window in windows or (None,) * count),
        activation=ACTIVATIONS[act], tied=config.get("tie_word_embeddings", False), bos_token_id=config.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,), **family)


def windows_by_type(config: dict) -> tuple[int | None, ...]:
    """The window of each layer from `layer_types`, or from the older `use_sliding_window` and `max_window_layers`."""
    count, window = field(config, "num_hidden_layers"), config.get("sliding_window", 4096)
    if not config.get("use_sliding_window", False) or window is None:
        return (None,) * count
    types = config.get("layer_types") or [
        "sliding_attention" if i >= config.get("max_window_layers", 28) else "full_attention" for i in range(count)]
    allowed = {"sliding_attention": window, "full_attention": None}
    unknown = sorted(set(types) - set(allowed))
    if unknown or len(types) != count:
        raise UnsupportedError(f"layer_types has {len(types)} entries for {count} layers, unknown: {unknown}; "
                               f"supported: {', '.join(allowed)}")
    return tuple(allowed[t] for t in types)
