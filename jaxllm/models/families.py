"""What the families of decoders share: how their config.json is read and how their weights are named."""
import logging

from jaxllm.checkpoint.mapped import brief
from jaxllm.checkpoint.rules import Ignore, Rule
from jaxllm.config import LayerSpec, ModelConfig
from jaxllm.errors import UnsupportedError
from jaxllm.fields import known_ids
from jaxllm.layers.rope import rope_spec
from jaxllm.models.registry import architecture

log = logging.getLogger("jaxllm")

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


ROPE_KEYS = ("rope_scaling", "rope_parameters")
BESIDE_ROPE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")  # which may also stand inside it


def field(config: dict, name: str, default=None):
    """config[name], or an error that names the field; a null counts as absent."""
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise UnsupportedError(f"config.json of {architecture(config)} has no {name!r}, which this architecture needs")
    return value


def overridden(config: dict, overrides: dict) -> dict:
    """`config` with `overrides` over it, those of the rope over both of its published layouts.

    A new rope entry replaces both old ones and keeps the base that the file says, unless it says its own.
    """
    merged, asked = {**config, **overrides}, [key for key in ROPE_KEYS if key in overrides]
    inner = {key: config[key] for key in ROPE_KEYS if isinstance(config.get(key), dict)}
    for key in ROPE_KEYS:
        if asked and key not in asked:
            merged.pop(key, None)
        elif not asked and key in inner:
            merged[key] = {name: value for name, value in inner[key].items() if name not in BESIDE_ROPE or name not in overrides}
    base = (inner.get("rope_scaling") or inner.get("rope_parameters") or {}).get("rope_theta")
    return merged | {"rope_theta": base} if asked and base is not None and "rope_theta" not in overrides else merged


def rope_parameters(config: dict) -> dict:
    """The rope settings of both published layouts: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling`.

    As in transformers, a `rope_scaling` replaces the `rope_parameters` beside it, with what they say of the base.
    """
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in stated.values()):
        raise UnsupportedError(f"rope settings for each layer type ({', '.join(map(brief, stated))}) are not supported; one for all is")
    stated = {name: value for name, value in stated.items() if value is not None}
    beside = {name: config[name] for name in BESIDE_ROPE if config.get(name) is not None}
    found = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **beside, **stated}
    if "original_max_position_embeddings" in beside:  # goes before the entry of the same name, as in transformers
        found["original_max_position_embeddings"] = beside["original_max_position_embeddings"]
    return found


def reach(config: dict, cfg: ModelConfig) -> float:
    """The longest context that the positions are meant for: the trained one, stretched where the scaling says so (as vLLM counts)."""
    p = rope_parameters(config)
    factor = p.get("factor", 1.0)
    stretched = {"linear": cfg.max_position * factor, "dynamic": cfg.max_position * factor,
                 "yarn": p.get("original_max_position_embeddings", cfg.max_position) * factor}
    return max(cfg.max_position, stretched.get(p.get("rope_type") or p.get("type"), 0))


def silent(config: dict, kv_heads: int | None = None, **usual) -> dict:
    """`config` with what transformers takes where it says nothing (a null says something): `usual`, and these key/value heads
    where they divide the query heads; elsewhere no model was ever made so, and each head has its own."""
    heads = field(config, "num_attention_heads")
    return {"num_key_value_heads": kv_heads if kv_heads and heads % kv_heads == 0 else heads, **usual, **config}


def llama_like(config: dict, max_model_len: int | None, *, windows: tuple[int | None, ...], unread: tuple[str, ...] = (),
               **family) -> ModelConfig:
    """The ModelConfig of a family with Llama's structure; `family` says what its config.json leaves unsaid.

    `unread`: flags that transformers does not read for this family and vLLM does, refused where they are on.
    """
    if on := [name for name in unread if config.get(name)]:
        raise UnsupportedError(f"{', '.join(on)} is on, which {architecture(config)} does not have in transformers; correct config.json")
    width, heads = field(config, "hidden_size"), field(config, "num_attention_heads")
    head_dim = config.get("head_dim") or width // heads
    max_position = field(config, "max_position_embeddings")
    act = config.get("hidden_act") or "silu"
    if act not in ACTIVATIONS:
        raise UnsupportedError(f"activation {brief(act)} is not supported; supported: {', '.join(ACTIVATIONS)}")
    kv_heads = field(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UnsupportedError(f"{heads} query heads cannot share {kv_heads} key/value heads: the one must divide the other")
    parameters, said = rope_parameters(config), (config.get("rope_parameters") or {}).get("rope_theta")
    rope = rope_spec(head_dim, max_position, parameters, max_model_len)
    if said is not None and said != parameters["rope_theta"]:
        log.warning("config.json: rope_scaling replaces rope_parameters, as in transformers, so rope_theta is %s and not %s",
                    parameters["rope_theta"], brief(said))
    vocab_size = field(config, "vocab_size")
    ids = {name: known_ids(config.get(f"{name}_token_id"), f"{name}_token_id", vocab_size, "config.json") for name in ("bos", "eos", "pad")}
    return ModelConfig(
        architecture=architecture(config), vocab_size=vocab_size, width=width,
        mlp_width=field(config, "intermediate_size"), num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        norm_eps=field(config, "rms_norm_eps", 1e-6), max_position=max_position,
        layers=tuple(LayerSpec(rope, window) for window in windows),
        activation=ACTIVATIONS[act], tied=bool(config.get("tie_word_embeddings")), bos_token_id=next(iter(ids["bos"]), None),
        eos_token_ids=ids["eos"], **family)


def windows_by_type(config: dict, window: int | None, usual) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types`, or by `usual(layer)` where it is silent. No window: all layers see all."""
    count = field(config, "num_hidden_layers")
    types = config.get("layer_types") or [usual(i) for i in range(count)]
    allowed = {"sliding_attention": window, "full_attention": None, "attention": None}
    unknown = sorted(set(types) - set(allowed))
    if unknown or len(types) != count:
        raise UnsupportedError(f"layer_types has {len(types)} entries for {count} layers, unknown: {', '.join(map(brief, unknown[:4])) or 'none'}; "
                               f"supported: {', '.join(allowed)}")
    return tuple(allowed[t] for t in types)


def qwen_windows(config: dict) -> tuple[int | None, ...]:
    """The window of each layer of a Qwen: on the upper ones or where `layer_types` says, if `use_sliding_window` is on."""
    window, used, upper = config["sliding_window"], config.get("use_sliding_window"), config.get("max_window_layers")
    upper = 28 if upper is None else upper
    if window is not None and not used and "sliding_attention" in (config.get("layer_types") or ()):
        raise UnsupportedError("layer_types names sliding_attention and use_sliding_window is not true; correct one of them")
    return windows_by_type(config, window if used else None, lambda layer: "sliding_attention" if layer >= upper else "full_attention")


def refuse_window(config: dict, max_model_len: int | None, reason: str) -> None:
    """None; UnsupportedError for a sliding window that contexts can outgrow, where transformers and vLLM differ about it."""
    window = config.get("sliding_window")
    if window is not None and window < max(max_model_len or 0, field(config, "max_position_embeddings")):
        raise UnsupportedError(f"sliding_window is {window} and {reason}, which transformers and vLLM read differently; set sliding_window to null "
                               "for attention to all tokens")
