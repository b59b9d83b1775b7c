"""Every family and feature against transformers on torch, on random checkpoints made for this run."""
import json
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from families import TOLERANCE, greedy, load, logits_of, through_the_engine

sys.path.insert(0, str(ROOT / "tools" / "oracle"))
from cases import cases  # noqa: E402

CASES = cases("small")


@pytest.fixture(scope="module")
def made(oracle, tmp_path_factory):
    """A folder with a checkpoint for each case, and what the oracle, asked in a process of its own, says of it."""
    folder = tmp_path_factory.mktemp("families")
    print(oracle("make_families.py", folder, "--size", "small"))
    triples = {0: [], 64: []}
    for name, case in CASES.items():
        triples[case["greedy"]] += [folder / name, folder / name / "prompts.json", folder / name / "answers.npz"]
    for count, named in triples.items():
        oracle("run_oracle.py", *named, "--tokens", count)
    return folder


def asked(folder):
    """The prompt and the oracle's logits and tokens."""
    with np.load(folder / "answers.npz") as answers:
        return json.loads((folder / "prompts.json").read_text())[0], answers["logits_0"], \
            answers["tokens_0"].tolist() if "tokens_0" in answers else None


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_the_oracle(made, name, record_property):
    prompt, expected, _ = asked(made / name)
    difference = abs(logits_of(load(made / name, max_model_len=len(prompt)), prompt) - expected).max()
    print(f"{name}: max |difference| {difference:.2e} of logits up to {abs(expected).max():.1f}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["greedy"]])
def test_greedy_tokens_equal_those_of_the_oracle(made, name):
    prompt, _, expected = asked(made / name)
    assert len(expected) == 64
    assert greedy(load(made / name), prompt) == expected


@pytest.mark.parametrize("name", ["llama-yarn", "llama-partial-rotary", "mistral-window", "qwen2-layer-types", "qwen3-biases-windows"])
def test_the_engine_gives_the_oracle_s_tokens(made, name):
    prompt, _, expected = asked(made / name)
    assert through_the_engine(made / name, prompt)[0] == expected


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["without"]])
def test_the_oracle_s_logits_would_show_a_missing_feature(made, name):
    prompt, expected, _ = asked(made / name)
    without = load(made / name, overrides=CASES[name]["without"], max_model_len=len(prompt))
    assert abs(logits_of(without, prompt) - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize("container", ["sharded", "bin", "sharded-bin"])
def test_every_container_holds_the_same_weights(made, container):
    one, other = load(made / "llama"), load(made / f"llama-{container}")
    assert one.cfg == other.cfg
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), one.params, other.params))
