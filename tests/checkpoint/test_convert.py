"""A conversion keeps every bit, is never half there, and goes on where it was cut off."""

import io
import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from jaxllm.checkpoint import Rule, open_checkpoint
from jaxllm.checkpoint.benchmark import load_benchmark
from jaxllm.checkpoint.convert import convert, parse_size
from jaxllm.checkpoint.inspect import inspect_checkpoint, render
from jaxllm.checkpoint.load import load_params
from jaxllm.checkpoint.progress import progress_bar
from jaxllm.errors import CheckpointError, UnsupportedError, UsageError

DATA = Path(__file__).parents[1] / "data/pt"


def contents(path, load_format="auto"):
    with open_checkpoint(path, load_format) as checkpoint:
        return {name: (tensor.dtype.name, tensor.shape, tensor.numpy().tobytes()) for name, tensor in checkpoint.items()}


@pytest.mark.parametrize("to", ["safetensors", "npz", "orbax"])
@pytest.mark.parametrize("source", ["llama-bin", "llama-safetensors", "views.pt", "views-legacy.pt"])
def test_every_path_gives_the_same_bits(tmp_path, source, to):
    if to == "orbax" and "views" in source:
        with pytest.raises(UnsupportedError, match=r"tensor empty.* has shape \[0.*orbax cannot hold an empty array"):
            convert(DATA / source, tmp_path / "out", to)
        return
    result = convert(DATA / source, tmp_path / "out", to)
    assert contents(tmp_path / "out") == contents(DATA / source)
    assert result.nbytes > 0 and result.resumed_bytes == 0
    assert convert(tmp_path / "out", tmp_path / "back", "safetensors").tensors == len(contents(DATA / source))
    assert contents(tmp_path / "back") == contents(DATA / source)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["back", "out"]  # nothing temporary is left


@pytest.mark.parametrize("to", ["npz", "orbax"])
def test_every_dtype_keeps_its_bits(tmp_path, to):
    with open_checkpoint(DATA / "dtypes.pt") as checkpoint:
        known = {name: tensor.numpy() for name, tensor in checkpoint.items() if to == "npz" or "fnuz" not in name and "e8m0" not in name}
    save_as_npz = tmp_path / "in"
    save_as_npz.mkdir()
    plain = {name: value for name, value in known.items() if value.dtype.kind in "biufc" and not hasattr(ml_dtypes, value.dtype.name)}
    np.savez(save_as_npz / "a.npz", **plain)
    convert(save_as_npz if to == "orbax" else DATA / "dtypes.pt", tmp_path / "out", to)
    wanted = plain if to == "orbax" else known
    assert contents(tmp_path / "out") == {name: (value.dtype.name, value.shape, value.tobytes()) for name, value in wanted.items()}


def test_safetensors_are_what_the_reference_reader_reads(tmp_path):
    convert(DATA / "llama-bin", tmp_path / "out", max_shard_size="3KB")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    with open_checkpoint(DATA / "llama-bin") as checkpoint:
        for name, file in index["weight_map"].items():
            value = load_file(tmp_path / "out" / file)[name]
            assert value.dtype == checkpoint[name].dtype and value.tobytes() == checkpoint[name].numpy().tobytes()
    assert index["metadata"]["total_size"] == sum(checkpoint[name].nbytes for name in index["weight_map"])
    assert all(file.stat().st_size < 3000 + 2000 for file in (tmp_path / "out").glob("*.safetensors"))  # data and header


def test_the_files_of_a_model_folder_go_along_without_the_old_weights(tmp_path):
    convert(DATA / "llama-bin", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "out/config.json").read_bytes() == (DATA / "llama-bin/config.json").read_bytes()


def test_folders_in_the_folder_go_along_and_what_does_not_is_named(tmp_path, monkeypatch):
    source = tmp_path / "model"
    shutil.copytree(DATA / "llama-bin", source)
    monkeypatch.setattr("jaxllm.checkpoint.convert.MAX_SIDE_BYTES", 1 << 20)
    kept = {"additional_chat_templates/tools.jinja": b"{{ tools }}", "a/b/c.txt": b"c", "vocab.json": b"{}", "default/note": b"n"}
    others = ("adapter_model.safetensors", "onnx/model.onnx", "optimizer.pt", "training_args.bin", "deep/model.safetensors")
    left = {**dict.fromkeys(others, "other weights or training state"), ".git/config": "hidden", "huge.jsonl": "more than 1 MiB",
            "conversion.json": "its name is taken"}
    for name, content in {**kept, **dict.fromkeys(left, b"x")}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content * (2 << 20) if name == "huge.jsonl" else content)
    (source / "loop").symlink_to(source)
    done = convert(source, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in kept} == kept
    assert set(done.left_out) == {f"{name} ({reason})" for name, reason in left.items() if name != ".git/config"} | {
        ".git/ (hidden)", "loop/ (a link to a folder)"}
    assert not [name for name in left if (tmp_path / "out" / name).exists()]
    assert contents(tmp_path / "out") == contents(source)
    done = convert(source, tmp_path / "tree", "orbax")
    assert "default/ (its name is taken)" in done.left_out and contents(tmp_path / "tree") == contents(source)
    done = convert(tmp_path / "tree", tmp_path / "back")
    assert not (tmp_path / "back/default").exists() and done.left_out == () and (tmp_path / "back/a/b/c.txt").read_bytes() == b"c"


def test_the_files_of_an_orbax_tree_do_not_go_along_as_sides(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "saved", {"a": np.ones(3, np.float32)})
    (tmp_path / "saved/config.json").write_text("{}")
    done = convert(tmp_path / "saved", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"] and done.left_out == ()


def test_dtype_casts_floats_alone_and_config_says_so(tmp_path):
    convert(DATA / "llama-bin", tmp_path / "out", dtype="float32")
    before, after = contents(DATA / "llama-bin"), contents(tmp_path / "out")
    for name, (_, shape, raw) in before.items():
        assert after[name] == ("float32", shape, np.frombuffer(raw, ml_dtypes.bfloat16).astype(np.float32).tobytes())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {"float32"}
    save_file({"n": np.arange(3), "x": np.ones(2, np.float32)}, tmp_path / "mixed.safetensors")
    convert(tmp_path / "mixed.safetensors", tmp_path / "mixed", dtype="bfloat16")
    assert {name: entry[0] for name, entry in contents(tmp_path / "mixed").items()} == {"n": "int64", "x": "bfloat16"}


def test_tied_tensors_stay_tied_unless_the_config_denies_it(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    shutil.copy(DATA / "tied.pt", source / "pytorch_model.pt")
    for says, files_hold in (({}, 1), ({"tie_word_embeddings": True}, 1), ({"tie_word_embeddings": False}, 2)):
        (source / "config.json").write_text(json.dumps(says))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        convert(source, tmp_path / "out")
        assert len(load_file(tmp_path / "out/model.safetensors")) == files_hold
        assert contents(tmp_path / "out") == contents(source)
        with open_checkpoint(tmp_path / "out") as checkpoint:
            assert (checkpoint["embed.weight"].identity == checkpoint["lm_head.weight"].identity) == (files_hold == 1)


class Cut(Exception):
    pass


@pytest.mark.parametrize("to", ["safetensors", "npz"])
def test_a_conversion_cut_off_anywhere_is_hidden_and_goes_on(tmp_path, to):
    whole = convert(DATA / "llama-bin", tmp_path / "whole", to, max_shard_size="2KB")
    assert len(whole.files) > 3
    for stop in range(1, 20, 3):
        calls = 0

        def cut(done, total):
            nonlocal calls
            calls += 1
            if calls == stop:
                raise Cut

        with pytest.raises(Cut):
            convert(DATA / "llama-bin", tmp_path / "out", to, max_shard_size="2KB", progress=cut)
        assert not (tmp_path / "out").exists()
        seen = []
        result = convert(DATA / "llama-bin", tmp_path / "out", to, max_shard_size="2KB", progress=lambda done, total: seen.append((done, total)))
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert (result.resumed_bytes > 0) == (stop > 8) or 4 <= stop <= 8  # the first shard is done by then
        assert seen[-1] == (result.nbytes, result.nbytes) and seen == sorted(seen)
        for file in whole.files:
            assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
        shutil.rmtree(tmp_path / "out")


def test_another_question_does_not_go_on_with_old_shards(tmp_path):
    def cut(done, total):
        if done > total // 2:
            raise Cut

    with pytest.raises(Cut):
        convert(DATA / "llama-bin", tmp_path / "out", max_shard_size="2KB", progress=cut)
    result = convert(DATA / "llama-bin", tmp_path / "out", max_shard_size="2KB", dtype="float32")
    assert result.resumed_bytes == 0 and {entry[0] for entry in contents(tmp_path / "out").values()} == {"float32"}


def test_two_conversions_to_one_place_do_not_mix(tmp_path):
    def second(done, total):
        with pytest.raises(CheckpointError, match="another process is writing"):
            convert(DATA / "llama-bin", tmp_path / "out")

    convert(DATA / "llama-bin", tmp_path / "out", progress=second)
    assert contents(tmp_path / "out") == contents(DATA / "llama-bin")


def test_bad_requests_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    for options, match, kind in (
        ({"dst": tmp_path / "there"}, "exists already", UsageError),
        ({"to": "gguf"}, "allowed are safetensors, orbax, npz", UsageError),
        ({"dtype": "int8"}, "allowed are float32", UsageError),
        ({"max_shard_size": "5 apples"}, "write it as 5GB", UsageError),
        ({"max_shard_size": 0}, "write it as 5GB", UsageError),
        ({"src": tmp_path / "absent"}, "no checkpoint at", CheckpointError),
        ({"src": DATA / "dtypes.pt"}, "complex128, which safetensors cannot hold", UnsupportedError),
    ):
        with pytest.raises(kind, match=match):
            convert(**{"src": DATA / "llama-bin", "dst": tmp_path / "out"} | options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(size) for size in ("5GB", "512MiB", "1.5kb", "100", 7, "2G")] == [5 * 10**9, 512 << 20, 1500, 100, 7, 2 * 10**9]


def test_an_empty_folder_may_be_the_target(tmp_path):
    (tmp_path / "out").mkdir()
    convert(DATA / "tied.pt", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(DATA / "tied.pt")


def test_the_progress_bar_takes_what_convert_gives(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress_bar("convert", console) as progress:
        convert(DATA / "tied.pt", tmp_path / "out", progress=progress)
    assert "80/80 bytes" in console.file.getvalue()


def test_an_inspection_lists_tensors_totals_and_architecture():
    found = inspect_checkpoint(DATA / "llama-bin")
    assert (found.container, found.architecture, found.model_type, len(found.files)) == ("pt-zip", "LlamaForCausalLM", "llama", 2) or found.architecture is None
    assert len(found.tensors) == 21 and found.total_bytes == sum(tensor.nbytes for tensor in found.tensors)
    data = json.loads(found.as_json())
    assert data["tensors"][0].keys() >= {"name", "shape", "dtype", "location", "container", "nbytes"}
    console = Console(file=io.StringIO(), width=200)
    render(found, console)
    assert "model.embed_tokens.weight" in console.file.getvalue() and "bfloat16" in console.file.getvalue()


def test_an_inspection_counts_shared_values_once_and_shows_locations():
    found = inspect_checkpoint(DATA / "tied.pt")
    assert (found.total_bytes, found.stored_bytes, found.parameters) == (160, 80, 20)
    assert [tensor.shared_with for tensor in found.tensors] == [None, "embed.weight"]
    assert {tensor.location for tensor in inspect_checkpoint(DATA / "cuda.pt").tensors} == {"cuda:0", "cuda:1"}


def test_the_load_benchmark_reports_both_speeds(tmp_path):
    found = load_benchmark(DATA / "llama-safetensors", repeats=2)
    assert found.parameter_bytes == inspect_checkpoint(DATA / "llama-safetensors").total_bytes
    assert found.load_bytes_per_s > 0 and found.read_bytes_per_s > 0 and found.ratio > 0 and found.host_peak_bytes >= 0
    with pytest.raises(UsageError, match="repeats"):
        load_benchmark(DATA / "llama-safetensors", repeats=0)


def test_orbax_reads_what_orbax_itself_saved(tmp_path):
    import orbax.checkpoint as ocp

    tree = {"params": {"layers": [{"q": jax.numpy.arange(6.0, dtype="bfloat16").reshape(2, 3)}], "norm": np.ones(3, np.float32)}, "step": 3}
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "saved", tree)
    rules, template = (Rule("layers.{i}.q", "q.{i}"), Rule("norm", "norm")), {"q": [jax.ShapeDtypeStruct((2, 3), jax.numpy.bfloat16)], "norm": jax.ShapeDtypeStruct((3,), np.float32)}
    with open_checkpoint(tmp_path / "saved") as checkpoint:
        assert checkpoint.container == "orbax" and set(checkpoint) == {"params.layers.0.q", "params.norm"}
        params = load_params(checkpoint, rules, template)
    assert np.array_equal(params["q"][0], tree["params"]["layers"][0]["q"])


def test_a_damaged_orbax_folder_is_an_error_of_ours(tmp_path):
    convert(DATA / "tied.pt", tmp_path / "out", "orbax")
    for file in sorted((tmp_path / "out/default").rglob("*")):
        if file.is_file() and file.parent.name == "d":
            os.truncate(file, 10)
    with pytest.raises(CheckpointError):
        contents(tmp_path / "out")
    (tmp_path / "out/default/_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="no whole orbax checkpoint"):
        open_checkpoint(tmp_path / "out")
