"""A folder gives the files that belong to the checkpoint, or an error that says what is missing and what is there."""

import json

import numpy as np
import pytest
from pickle_files import tensor, zip_file
from safetensors.numpy import save_file

from jaxllm.checkpoint import open_checkpoint
from jaxllm.errors import CheckpointError, UnsupportedError, UsageError

ONE = {"a": np.zeros(2, np.float32)}


def refused(path, match, kind=CheckpointError, **options):
    with pytest.raises(kind, match=match) as caught:
        open_checkpoint(path, **options)
    assert "\n" not in str(caught.value)


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def torch_file(path):
    return zip_file(path, {"a": tensor(numel=2, size=(2,))}, {"0": b"\0" * 8})


def test_safetensors_win_over_torch_files_and_a_named_format_is_strict(tmp_path):
    save_file(ONE, tmp_path / "model.safetensors")
    torch_file(tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.container == "safetensors" and [file.name for file in checkpoint.files] == ["model.safetensors"]
    with open_checkpoint(tmp_path, load_format="pt") as checkpoint:
        assert checkpoint.container == "pt-zip"
    refused(tmp_path, r"load_format=npz; try load_format=auto", load_format="npz")


def test_bin_wins_over_pt(tmp_path):
    torch_file(tmp_path / "pytorch_model.bin")
    torch_file(tmp_path / "model.pt")
    with open_checkpoint(tmp_path) as checkpoint:
        assert [file.name for file in checkpoint.files] == ["pytorch_model.bin"]


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth"])
def test_what_trainers_leave_beside_the_weights_is_skipped(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a checkpoint at all")
    refused(tmp_path, "no weights in")
    torch_file(tmp_path / "pytorch_model.bin")
    assert len(open_checkpoint(tmp_path)) == 1


def test_an_index_decides_which_files_count(tmp_path):
    save_file(ONE, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": ONE["a"]}, tmp_path / "model-00002-of-00002.safetensors")
    save_file(ONE, tmp_path / "stray.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == {"a", "b"} and len(checkpoint.files) == 2


def test_absent_shards_are_named(tmp_path):
    save_file(ONE, tmp_path / "model-00001-of-00002.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    refused(tmp_path, "1 of the 2 shards .* not there: model-00002-of-00002.safetensors")


def test_a_folder_that_lacks_shards_is_half_written_also_without_an_index(tmp_path):
    save_file(ONE, tmp_path / "model-00002-of-00007.safetensors")
    refused(tmp_path, "half-written: 1 of the 7 shards")


def test_an_index_that_places_a_tensor_elsewhere_is_refused(tmp_path):
    save_file(ONE, tmp_path / "x.safetensors")
    save_file({"b": ONE["a"]}, tmp_path / "y.safetensors")
    write_index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"})
    refused(tmp_path, "places tensor 'b' in x.safetensors, and it is in y.safetensors")
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"})
    refused(tmp_path, "'c' in y.safetensors, and it is in none")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None, "a\\b"])
def test_an_index_that_leads_outside_its_folder_is_refused(tmp_path, shard):
    write_index(tmp_path, {"a": shard})
    refused(tmp_path, "a shard is a file beside the index")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}', "[" * 100_000, '{"weight_map": {}}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "index")


def test_the_same_tensor_in_two_files_is_refused(tmp_path):
    save_file(ONE, tmp_path / "x.safetensors")
    save_file(ONE, tmp_path / "y.safetensors")
    refused(tmp_path, "tensor 'a' is in .*x.safetensors and in .*y.safetensors")


def test_mistral_files_beside_hugging_face_files_are_left_out(tmp_path):
    save_file(ONE, tmp_path / "model.safetensors")
    save_file(ONE, tmp_path / "consolidated.safetensors")
    assert [file.name for file in open_checkpoint(tmp_path).files] == ["model.safetensors"]


OTHERS = ("adapter_model.safetensors", "value_head.safetensors", "model.fp16.safetensors", "consolidated.00.pth", "rank_0.safetensors",
          "tf_model.h5", "model.gguf", "model.fp16.safetensors.index.json", "optimizer.pt")


@pytest.mark.parametrize("order", [
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"],
    ["model.safetensors.index.json", "pytorch_model.bin"], ["pytorch_model.bin", "pytorch_model.bin.index.json"],
    ["pytorch_model.bin.index.json"]])
def test_the_names_that_transformers_takes_go_first_in_its_order(tmp_path, order, caplog):
    """transformers 5.24, _get_resolved_checkpoint_files; whatever else looks like weights is left out and named."""
    for name in order:
        if name.endswith(".index.json"):
            shard = f"shard.{name.split('.')[1]}"
            write_index(tmp_path, {"a": shard}, name)
            (save_file(ONE, tmp_path / shard) if shard.endswith("safetensors") else torch_file(tmp_path / shard))
        elif name.endswith(".safetensors"):
            save_file(ONE, tmp_path / name)
        else:
            torch_file(tmp_path / name)
    for name in OTHERS:
        (tmp_path / name).write_bytes(b"not the weights of this model")
    first = order[0] if not order[0].endswith(".index.json") else f"shard.{order[0].split('.')[1]}"
    with caplog.at_level("INFO", "jaxllm.checkpoint"), open_checkpoint(tmp_path) as checkpoint:
        assert [file.name for file in checkpoint.files] == [first]
        assert set(OTHERS) | set(order[1:]) <= set(checkpoint.left_out) and order[0] not in checkpoint.left_out
    assert "adapter_model.safetensors" in caplog.text and "an adapter is not applied" in caplog.text


def test_the_canonical_file_goes_before_an_orbax_tree_beside_it(tmp_path):
    (tmp_path / "default").mkdir()
    (tmp_path / "default/_METADATA").write_text("{}")
    save_file(ONE, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).load_format == "safetensors"


def test_a_stale_index_without_its_shards_is_not_read_beside_the_whole_file(tmp_path):
    save_file(ONE, tmp_path / "model.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors"})
    assert [file.name for file in open_checkpoint(tmp_path).files] == ["model.safetensors"]


def test_a_variant_counts_only_where_nothing_else_does(tmp_path):
    save_file(ONE, tmp_path / "model.fp16.safetensors")
    assert [file.name for file in open_checkpoint(tmp_path).files] == ["model.fp16.safetensors"]
    save_file(ONE, tmp_path / "weights.safetensors")
    assert [file.name for file in open_checkpoint(tmp_path).files] == ["weights.safetensors"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_without_its_model_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"lora")
    refused(tmp_path, f"an adapter .{name}. and no model.*merge", UnsupportedError)


def test_missing_empty_and_foreign_things_are_named(tmp_path):
    refused(tmp_path / "absent", "there is no such file or folder")
    refused(tmp_path, "no weights in .*it holds nothing")
    (tmp_path / "readme.md").write_text("hello")
    refused(tmp_path, "it holds readme.md; wanted .*safetensors or .*bin")
    refused(tmp_path / "readme.md", "no checkpoint that jaxllm knows")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "empty")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refused(tmp_path, "git lfs pull")


def test_formats_that_are_none_list_those_that_are(tmp_path):
    refused(tmp_path, "allowed are auto, safetensors, pt, npz, orbax", UsageError, load_format="gguf")
    refused(tmp_path, "dummy_params", UsageError, load_format="dummy")
    refused(tmp_path, "not an orbax checkpoint", load_format="orbax")


def test_a_single_file_is_known_by_its_bytes(tmp_path):
    save_file(ONE, tmp_path / "weights")
    torch_file(tmp_path / "model.ckpt")
    np.savez(tmp_path / "arrays.npz", **ONE)
    assert [open_checkpoint(tmp_path / name).container for name in ("weights", "model.ckpt", "arrays.npz")] == ["safetensors", "pt-zip", "npz"]
