"""What the keys of config.json and generation_config.json may hold, and which would change an answer that does without them.

transformers checks the types of these fields as well, and takes all other keys without using them; so do we.
"""
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxllm.checkpoint.mapped import brief
from jaxllm.errors import CheckpointError, JaxllmError, UnsupportedError

log = logging.getLogger("jaxllm")


@dataclass(frozen=True)
class Kind:
    """What a key may hold, in words and as a test."""

    text: str
    holds: Callable[[object], bool]


def _number(value) -> bool:
    # NaN compares false, and an integer beyond this is one that no float holds.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _list_of(holds) -> Callable[[object], bool]:
    return lambda value: type(value) is list and all(map(holds, value))


def whole(low: int, high: int) -> Kind:
    """The kind of an integer in a range; the upper end keeps a damaged file from asking for all memory there is."""
    return Kind(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("a text", lambda value: type(value) is str)
TEXTS = Kind("a list of texts", _list_of(TEXT.holds))
OBJECT = Kind("an object", lambda value: type(value) is dict)
NUMBER = Kind("a number", _number)
INTEGER = Kind("an integer", lambda value: type(value) is int and abs(value) < 1 << 63)
POSITIVE = Kind("a number more than 0", lambda value: _number(value) and value > 0)
NUMBERS = Kind("a list of numbers more than 0", _list_of(POSITIVE.holds))
TOKEN = Kind("a token id, an integer", lambda value: type(value) is int)
TOKENS = Kind("a token id or a list of them, integers", lambda value: TOKEN.holds(value) or _list_of(TOKEN.holds)(value))
WIDTH, LENGTH = whole(1, 1 << 24), whole(1, 1 << 40)

ROPE_FIELDS: Mapping[str, Kind] = MappingProxyType({
    "rope_type": TEXT, "type": TEXT, "rope_theta": POSITIVE, "factor": POSITIVE, "original_max_position_embeddings": LENGTH,
    "partial_rotary_factor": Kind("a number more than 0, at most 1", lambda value: POSITIVE.holds(value) and value <= 1),
    "attention_factor": NUMBER, "mscale": NUMBER, "mscale_all_dim": NUMBER, "beta_fast": NUMBER, "beta_slow": NUMBER, "truncate": FLAG,
    "low_freq_factor": POSITIVE, "high_freq_factor": POSITIVE, "short_factor": NUMBERS, "long_factor": NUMBERS,
})
FIELDS: Mapping[str, Kind] = MappingProxyType({
    "architectures": TEXTS, "model_type": TEXT, "dtype": TEXT, "torch_dtype": TEXT, "quantization_config": OBJECT,
    "vocab_size": WIDTH, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": whole(1, 4096),
    "num_attention_heads": whole(1, 1 << 16), "num_key_value_heads": whole(1, 1 << 16), "head_dim": whole(1, 1 << 14),
    "hidden_act": TEXT, "rms_norm_eps": Kind("a number of at least 0", lambda value: _number(value) and value >= 0),
    "max_position_embeddings": LENGTH, "tie_word_embeddings": FLAG, "attention_bias": FLAG, "mlp_bias": FLAG,
    "rope_parameters": OBJECT, "rope_scaling": OBJECT,
    **{name: ROPE_FIELDS[name] for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")},
    "sliding_window": LENGTH, "use_sliding_window": FLAG, "max_window_layers": whole(0, 1 << 24), "layer_types": TEXTS,
    "bos_token_id": TOKEN, "eos_token_id": TOKENS, "pad_token_id": TOKEN,
})
OFF = (False, [], {}, "")  # with null, what leaves a key without effect; 0 is False
# Keys that would change the answer of these architectures, here or in vLLM, and are not honoured: key -> without effect.
CHANGING: Mapping[str, tuple] = MappingProxyType({
    **dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "scale_emb", "scale_depth",
                     "num_experts", "num_local_experts", "n_routed_experts"), (*OFF, 1)),
    **dict.fromkeys(("attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "no_rope_layers",
                     "no_rope_layer_interval", "interleaved_sliding_window", "attention_chunk_size", "per_layer_config",
                     "use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention", "alibi", "use_qk_norm", "qk_layernorm",
                     "clip_qkv", "parallel_attn", "compression_config", "transformers_weights"), OFF),
    "is_causal": (True,),
})
# The keys of generation_config.json that say how to draw, and what SamplingParams calls them: those that vLLM honours.
SAMPLING: Mapping[str, str] = MappingProxyType({
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
})
GENERATION_FIELDS: Mapping[str, Kind] = MappingProxyType({
    **dict.fromkeys(SAMPLING, NUMBER), "top_k": INTEGER, "max_new_tokens": INTEGER, "do_sample": FLAG,
    "eos_token_id": TOKENS, "bos_token_id": TOKEN, "pad_token_id": TOKEN,
})
# transformers draws otherwise under these; they are refused where the file's own sampling is asked for.
GENERATION_CHANGING: Mapping[str, tuple] = MappingProxyType({
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p", "guidance_scale", "encoder_repetition_penalty"), (*OFF, 1)),
    **dict.fromkeys(("penalty_alpha", "epsilon_cutoff", "eta_cutoff", "top_h", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias",
                     "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "watermarking_config",
                     "exponential_decay_length_penalty", "min_length", "min_new_tokens", "stop_strings", "token_healing", "dola_layers"), OFF),
})


def check_fields(given: Mapping, fields: Mapping[str, Kind], where: str = "", error: type[JaxllmError] = CheckpointError) -> None:
    """None; `error` names the first key whose value is not of its kind. A null counts as absent."""
    for name, kind in fields.items():
        value = given.get(name)
        if value is not None and not kind.holds(value):
            raise error(f"{where}{name} is {brief(value)}; it must be {kind.text}; correct it")


def changing(given: Mapping, table: Mapping[str, tuple]) -> list[str]:
    """The keys of `table` that hold something which would change the answer."""
    return [name for name, neutral in table.items() if given.get(name) is not None and given[name] not in neutral]


def refuse_changing(given: Mapping, table: Mapping[str, tuple], where: str = "") -> None:
    """None; UnsupportedError names the keys of `table` that would change the answer and are not honoured."""
    if names := changing(given, table):
        told = ", ".join(f"{name} ({brief(given[name])})" for name in names)
        raise UnsupportedError(f"{where}{told} would change the answer and is not supported; take it out if it is not meant")


def known_ids(value: int | list[int] | None, name: str, vocab_size: int, where: str) -> tuple[int, ...]:
    """The token ids of a key that check_fields has passed; those outside the vocabulary, never drawn, are left out with a warning."""
    ids = tuple(dict.fromkeys(value if isinstance(value, list) else () if value is None else (value,)))
    if outside := [token for token in ids if not 0 <= token < vocab_size]:
        log.warning("%s: %s names the token %s; the vocabulary has 0 to %d, so it counts for nothing", where, name, brief(outside), vocab_size - 1)
    return tuple(token for token in ids if 0 <= token < vocab_size)
