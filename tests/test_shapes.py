"""R2 and R5 over shapes that real models have, kept small: heads and kv heads in every ratio, odd widths, three dtypes."""
import random

import jaxllm
import pytest
from jaxllm import LLM, SamplingParams
from tests.test_reproducible import bits
from tests.tiny import make_folder

# heads, kv heads, head_dim, width, mlp width, vocabulary: as in GPT-2 and Llama 2, Phi-3-mini, SmolLM2, Gemma, and none at all
SHAPES = {
    "1:1 of 16": (4, 4, 16, 64, 100, 300), "1:1 of 96": (3, 3, 96, 288, 700, 300), "3:1 of 80": (3, 1, 80, 576, 600, 300),
    "8:1 of 64": (8, 1, 64, 896, 500, 515), "9:3 of 64": (9, 3, 64, 576, 1536, 49152), "one head of 256": (1, 1, 256, 2100, 300, 300),
    "2:2 of 128": (2, 2, 128, 320, 2100, 151936)}
LIMITS = dict(load_format="dummy", max_model_len=192, max_num_batched_tokens=32)


def folder_of(tmp_path, name):
    heads, kv_heads, head_dim, width, mlp, vocab = SHAPES[name]
    folder = make_folder(tmp_path / "m")
    overrides = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "hidden_size": width,
                 "intermediate_size": mlp, "vocab_size": vocab, "num_hidden_layers": 1, "tie_word_embeddings": vocab % 2 == 0}
    return folder, overrides


@pytest.mark.parametrize("name, dtype", [
    ("1:1 of 16", "float32"), ("1:1 of 96", "float32"), ("1:1 of 96", "bfloat16"),
    *(pytest.param(*at, marks=pytest.mark.slow) for at in (("1:1 of 16", "bfloat16"), ("1:1 of 96", "float16"), ("3:1 of 80", "bfloat16"))),
    ("3:1 of 80", "float32"), ("8:1 of 64", "bfloat16"), ("9:3 of 64", "float32"), ("one head of 256", "float16"), ("2:2 of 128", "bfloat16")])
def test_whole_rows_of_logits_do_not_depend_on_the_schedule(tmp_path, name, dtype):
    folder, overrides = folder_of(tmp_path, name)
    rng = random.Random(name)
    prompts = [{"prompt_token_ids": [rng.randrange(300) for _ in range(n)]} for n in (1, 17, 140, 5, 33)]
    params = [SamplingParams(max_tokens=3, temperature=t, seed=i, logprobs=0, logits_digest=True, ignore_eos=True, detokenize=False)
              for i, t in enumerate((0, 1.0, 0, 0.8, 0))]
    rows = lambda outputs: [(bits(o), o.outputs[0].logits_digests) for o in outputs]
    with LLM(folder, dtype=dtype, hf_overrides=overrides, max_num_seqs=5, **LIMITS) as llm:
        together = rows(llm.generate(prompts, params))
        order = rng.sample(range(5), 5)
        again = dict(zip(order, rows(llm.generate([prompts[i] for i in order], [params[i] for i in order]))))  # a warm cache
        assert llm.unproven == [] and [again[i] for i in range(5)] == together
        tokens = together[0][0][1][0][1]
        plain = jaxllm.logprobs(llm, prompts[0]["prompt_token_ids"] + tokens)
        assert [float(x) for x in plain[-3:]] == [row[0][1] for row in together[0][0][1][0][2]]
        weights = llm.params
    with LLM(folder, params=weights, hf_overrides=overrides, max_num_seqs=2, enable_prefix_caching=False, **LIMITS) as llm:
        assert rows(o for i in range(5) for o in llm.generate(prompts[i], params[i])) == together
