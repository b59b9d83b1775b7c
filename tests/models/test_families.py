"""Every family and feature against stored answers of transformers (tools/oracle/make_families.py made them)."""
import json
from pathlib import Path

import numpy as np
import pytest
from families import TOLERANCE, greedy, load, logits_of, through_the_engine

FOLDERS = sorted(folder for folder in (Path(__file__).parents[1] / "data" / "families").iterdir() if folder.is_dir())
CASES = {folder.name: json.loads((folder / "case.json").read_text()) for folder in FOLDERS}


def golden(folder):
    """prompt, logits and tokens of transformers."""
    with np.load(folder / "expected.npz") as file:
        return file["prompt"], file["logits"], file["tokens"].tolist()


def test_every_family_has_goldens():
    from jaxllm.models.registry import FAMILIES
    found = {json.loads((folder / "config.json").read_text())["architectures"][0] for folder in FOLDERS}
    assert found == set(FAMILIES)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_logits_equal_those_of_transformers(folder):
    prompt, expected, _ = golden(folder)
    logits = logits_of(load(folder, max_model_len=len(prompt)), prompt)
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    assert abs(logits - expected).max() <= TOLERANCE


@pytest.mark.parametrize("folder", [f for f in FOLDERS if CASES[f.name]["greedy"]], ids=lambda f: f.name)
def test_greedy_tokens_equal_those_of_transformers(folder):
    prompt, _, expected = golden(folder)
    assert len(expected) == 64
    assert greedy(load(folder), prompt) == expected


@pytest.mark.parametrize("folder", [f for f in FOLDERS if CASES[f.name]["without"]], ids=lambda f: f.name)
def test_goldens_would_show_a_missing_feature(folder):
    prompt, expected, _ = golden(folder)
    without = load(folder, overrides=CASES[folder.name]["without"], max_model_len=len(prompt))
    assert abs(logits_of(without, prompt) - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "qwen2-upper-windows", "qwen3"])
def test_the_engine_says_what_transformers_says(name):
    folder = next(f for f in FOLDERS if f.name == name)
    prompt, logits, expected = golden(folder)
    tokens, logprobs = through_the_engine(folder, prompt)
    assert tokens == expected
    shifted = logits[-1] - logits[-1].max()
    assert logprobs[0] == pytest.approx(shifted.max() - np.log(np.exp(shifted).sum()), abs=TOLERANCE)
