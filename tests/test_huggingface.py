"""Hugging Face's format: parity with transformers both ways, and what is refused."""

import dataclasses
import json
import os
import pickle
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from toolkit.config import GPT2Config
from toolkit.errors import UserError
from toolkit.model.gpt2 import GPT2, canonical_shapes, canonical_tensors
from toolkit.model.huggingface import (
    config_json,
    export,
    load_model,
    load_weights,
    read_config,
    read_eot_id,
    save_weights,
)

CONFIG = GPT2Config(n_layer=2, n_head=4, n_embd=32, context_length=24, vocab_size=257)
IDS = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(0))


def checkpoint(folder: Path, config: GPT2Config = CONFIG, *, seed: int = 3) -> GPT2:
    """A folder as a checkpoint of this toolkit is, as far as this format goes; returns its model."""
    model = GPT2(config, seed=seed).eval()
    with torch.no_grad():
        for parameter in (
            model.ln_f.bias,
            model.ln_f.weight,
        ):  # biases and gains are no longer what a loader would fill in
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "model.safetensors", canonical_tensors(model))
    (folder / "config.json").write_text(json.dumps(config_json(config, eot_id=256)))
    return model


def theirs(**settings: Any) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    settings = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 24, "vocab_size": 257} | settings
    # Wide enough that activations reach where GELU's tanh and erf forms differ visibly.
    settings |= {"bos_token_id": 256, "eos_token_id": 256, "initializer_range": 0.2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint(tmp_path / "model")
    return tmp_path / "model"


# --- parity -----------------------------------------------------------------------------------------------------------


def test_transformers_loads_what_we_write(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert (loaded.eval()(IDS).logits - model.logits(IDS)).abs().max() < 1e-4
    # transformers shifts labels itself: position t is scored against label t + 1.
    ours = model(IDS[:, :-1], IDS[:, 1:])
    assert loaded(IDS, labels=IDS).loss.item() == pytest.approx(ours.item(), rel=1e-6)
    assert loaded.config.eos_token_id == 256


def test_we_load_what_transformers_writes(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    assert read_config(str(tmp_path)) == CONFIG
    ours = load_model(tmp_path)
    assert not ours.training
    assert (ours.logits(IDS) - model(IDS).logits).abs().max() < 1e-4
    assert ours(IDS[:, :-1], IDS[:, 1:]).item() == pytest.approx(model(IDS, labels=IDS).loss.item(), rel=1e-6)


def test_shards_and_half_precision_are_read(tmp_path: Path) -> None:
    model = theirs().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    tensors = load_weights(str(tmp_path), CONFIG)
    assert list(tensors) == list(canonical_shapes(CONFIG))
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert torch.equal(tensors["h.1.mlp.c_fc.weight"], model.transformer.h[1].mlp.c_fc.weight.float())


def test_prefixes_mask_buffers_and_an_equal_head_are_accepted(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    old = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    old["lm_head.weight"] = tensors["wte.weight"].clone()
    old["transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    old["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old, folder / "model.safetensors")
    loaded = load_weights(str(folder), CONFIG)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_weights_that_are_written_follow_the_umask_and_leave_nothing_behind(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        save_weights(folder / "again.safetensors", load_file(folder / "model.safetensors"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "again.safetensors").stat().st_mode) == 0o640
    assert sorted(path.name for path in folder.iterdir()) == ["again.safetensors", "config.json", "model.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setenv("TOOLKIT_FAILPOINTS", "huggingface.before-rename=fail")
    with pytest.raises(OSError, match="No space left"):
        save_weights(folder / "model.safetensors", {"a": torch.zeros(1)})
    assert (folder / "model.safetensors").read_bytes() == before
    assert len(list(folder.iterdir())) == 2


# --- export -----------------------------------------------------------------------------------------------------------


def test_export_is_a_folder_for_transformers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "exported"
    export(folder, out)
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert (loaded.eval()(IDS).logits - load_model(folder).logits(IDS)).abs().max() < 1e-4
    assert loaded.generation_config.pad_token_id == 256
    assert read_eot_id(str(out)) == 256
    with pytest.raises(UserError, match="already exists and is not an empty folder"):
        export(folder, out)


# --- configurations ---------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 64),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
        ("quantization_config", {"bits": 4}),
        ("n_layer", "2"),
        ("n_layer", 10**12),
        ("vocab_size", None),
        ("n_embd", -32),
        ("n_positions", True),
    ],
)
def test_options_that_our_model_lacks_are_refused_by_name(folder: Path, field: str, value: object) -> None:
    edit_config(folder, **{field: value})
    with pytest.raises(UserError, match=f"config.json: .*{field}=") as caught:
        read_config(str(folder))
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_equivalent_options_and_dropout_are_accepted(folder: Path) -> None:
    edit_config(folder, n_inner=128, activation_function="gelu_pytorch_tanh", resid_pdrop=0.3, n_ctx=24)
    assert read_config(str(folder)) == CONFIG


def test_another_shape_names_the_flags_that_fit(folder: Path) -> None:
    config = dataclasses.replace(CONFIG, n_layer=3, context_length=48)
    with pytest.raises(UserError, match=r"pass --model.n-layer 2 --model.context-length 24"):
        load_weights(str(folder), config)
    with pytest.raises(UserError, match=r"pass --model.n-head 4"):  # the tensors' shapes would not show it
        load_weights(str(folder), dataclasses.replace(CONFIG, n_head=2))


# --- weights that are not as they should be ---------------------------------------------------------------------------


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("h.1.ln_2.bias"), "h.1.ln_2.bias is missing"),
        (lambda t: t.clear(), "wte.weight is missing, and 27 more"),
        (lambda t: t.update({"../../etc/x": torch.zeros(1)}), "'../../etc/x' is unknown"),
        (lambda t: t.update({"wpe.weight": torch.zeros(23, 32)}), r"wpe.weight is F32 \(23, 32\) instead of"),
        (lambda t: t.update({"wpe.weight": torch.zeros(24, 32).double()}), r"wpe.weight is F64 \(24, 32\) instead of"),
        (lambda t: t.update({"transformer.wpe.weight": torch.zeros(24, 32)}), "is there twice"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(257, 32)}), "lm_head.weight differs from wte.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(UserError, match=message):
        load_weights(str(folder), CONFIG)


def with_header(header: bytes, payload: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + payload


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"1234567", "not a safetensors file"),
        (pickle.dumps({"wte.weight": [1.0] * 100}), "not a safetensors file"),
        (with_header(b"{}", length=2**63), "not a safetensors file"),
        (with_header(b" " * 2_000_000 + b"{}"), "header would be 2000002 bytes"),
        (with_header(b"[" * 900_000), "not valid JSON"),
        (with_header(b"[]"), "does not hold a JSON object"),
        (with_header(b"\xff\xfe"), "is not UTF-8"),
        (with_header(b'{"a": 1, "a": 2}'), "holds a key twice"),
        (with_header(b'{"a": 1}'), "the entry of 'a' is not a tensor's"),
        (with_header(b'{"a": {"dtype": "F32", "shape": [1e3]}}'), "the entry of 'a' is not a tensor's"),
        (
            with_header(b'{"a": {"dtype": "F32", "shape": [0, 1099511627776], "data_offsets": [0, 0]}}'),
            "'a' is unknown",
        ),
    ],
)
def test_hostile_weight_files_are_refused_in_one_line(folder: Path, content: bytes, message: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(str(folder), CONFIG)
    assert "\n" not in str(caught.value)


def test_a_truncated_or_lengthened_weight_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-4], whole + b"1234", whole[:2000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors is "):
            load_weights(str(folder), CONFIG)


def test_pickled_weights_are_refused_and_the_way_out_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained\(NEW\)"):
        load_weights(str(folder), CONFIG)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        load_weights(str(folder), CONFIG)


@pytest.mark.parametrize("name", ["../model/other.safetensors", "/etc/passwd", "gone.safetensors", 7, ".h.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(folder: Path, name: object) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    shutil.copy(folder / "model.safetensors", folder / ".h.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(UserError, match="is no safetensors file beside it"):
        load_weights(str(folder), CONFIG)


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"config.json is missing"):
        read_config(str(tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        read_config(str(tmp_path / "file"))
    with pytest.raises(UserError, match="there is no folder"):
        read_config(str(tmp_path / "gone"))
    (tmp_path / "config.json").write_text(" " * 2_000_000)
    with pytest.raises(UserError, match="larger than 1000000 bytes"):
        read_config(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="nobody/nothing is neither a folder here nor could it be fetched") as caught:
        read_config("nobody/nothing")
    assert "\n" not in str(caught.value)
