"""The small random checkpoints that stand for every family and feature: what each config.json says.

A case is a config class of transformers, its settings, and:
  older    config.json is rewritten to the layout before transformers 5: rope_theta beside rope_scaling
  drop     keys taken out of config.json, so that what the reader takes for absent ones is tested
  without  overrides of config.json that undo the feature: a reader that missed it would give these logits
  greedy   0 where transformers changes the rule during generation, so that there is nothing to compare with
  tensors  written although the model has no place for them, as some published checkpoints do
"""
SIZES = {
    # goldens, kept in the repository: as small as can be
    "tiny": {"width": 32, "heads": 4, "mlp": 48, "vocab": 128, "layers": 2, "wide": 16, "prompt": 40, "trained": 32, "dtype": "bfloat16"},
    # made anew for each parity run; prompts longer than a split of attention (128) and than several tiles of queries
    "small": {"width": 96, "heads": 6, "mlp": 160, "vocab": 384, "layers": 3, "wide": 32, "prompt": 200, "trained": 128, "dtype": "float32"},
}


def cases(size: str) -> dict[str, dict]:
    """{name: case} at a size."""
    s = SIZES[size]
    base = {"vocab_size": s["vocab"], "hidden_size": s["width"], "intermediate_size": s["mlp"], "num_hidden_layers": s["layers"],
            "num_attention_heads": s["heads"], "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    wide, trained, window = {"head_dim": s["wide"]}, s["trained"], s["prompt"] // 4 + 1
    every = {"num_hidden_layers": s["layers"] + 1}

    def case(family, *, older=False, drop=(), without=None, greedy=64, tensors=(), rope=None, **settings):
        config = {**base, **settings}
        if rope is not None:
            config["rope_parameters"] = {"rope_theta": 10000.0, **rope}
        return {"family": family, "config": config, "older": older, "drop": drop, "without": without, "greedy": greedy,
                "tensors": tensors}

    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": None}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": trained}
    return {
        "llama": case("Llama"),
        "llama-multi-head-tied": case("Llama", num_key_value_heads=s["heads"], tie_word_embeddings=True, tensors=("lm_head.weight",)),
        "llama-multi-query-wide-heads": case("Llama", **wide, num_key_value_heads=1, hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-5),
        "llama-biases": case("Llama", attention_bias=True, mlp_bias=True, hidden_act="gelu"),
        "llama-theta": case("Llama", rope={"rope_type": "default", "rope_theta": 500.0}, older=True,
                            without={"rope_theta": 10000.0}),
        "llama-linear": case("Llama", rope={"rope_type": "linear", "factor": 4.0}, older=True, without=plain),
        "llama-dynamic": case("Llama", rope={"rope_type": "dynamic", "factor": 2.0}, older=True),
        "llama-dynamic-beyond": case("Llama", rope={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=trained,
                                     greedy=0, without=plain),
        "llama-llama3": case("Llama", **wide, rope={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                    "original_max_position_embeddings": 2 * trained}, without=plain),
        "llama-yarn": case("Llama", **wide, rope=yarn, max_position_embeddings=4 * trained, without=plain),
        "llama-yarn-no-truncate": case("Llama", **wide, rope={**yarn, "truncate": False}, older=True,
                                       without={"rope_scaling": {**yarn, "truncate": True}}),
        "llama-yarn-mscale": case("Llama", **wide, rope={**yarn, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 4.0, "beta_slow": 0.5},
                                  without={"rope_parameters": {"rope_theta": 10000.0, **yarn}}),
        "llama-yarn-attention-factor": case("Llama", **wide, rope={**yarn, "attention_factor": 0.8},
                                            without={"rope_parameters": {"rope_theta": 10000.0, **yarn}}),
        "llama-partial-rotary": case("Llama", **wide, rope={"rope_type": "default", "partial_rotary_factor": 0.5}, without=plain),
        "llama-partial-rotary-linear": case("Llama", **wide, rope={"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25},
                                            older=True, without={"partial_rotary_factor": 1.0}),
        "mistral-window": case("Mistral", **wide, sliding_window=window, without={"sliding_window": None}),
        "mistral-full": case("Mistral", sliding_window=None, older=True),
        "qwen2": case("Qwen2", tie_word_embeddings=True, rope={"rope_type": "default", "rope_theta": 1000000.0}, older=True,
                      drop=("layer_types", "sliding_window", "max_window_layers", "use_sliding_window")),
        "qwen2-upper-windows": case("Qwen2", **every, use_sliding_window=True, sliding_window=window, max_window_layers=1,
                                    drop=("layer_types",), without={"use_sliding_window": False}),
        "qwen2-layer-types": case("Qwen2", **every, use_sliding_window=True, sliding_window=window, max_window_layers=0,
                                  layer_types=(["sliding_attention", "full_attention"] * 3)[:s["layers"] + 1],
                                  without={"layer_types": ["full_attention"] * (s["layers"] + 1)}),
        "qwen3": case("Qwen3", **wide, tie_word_embeddings=True),
        "qwen3-biases-windows": case("Qwen3", **wide, attention_bias=True, use_sliding_window=True, sliding_window=window,
                                     max_window_layers=1, without={"sliding_window": None}),
    }
