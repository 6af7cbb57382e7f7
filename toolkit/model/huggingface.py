"""GPT-2 in Hugging Face's format: a folder with config.json and model.safetensors <-> our model.

What is written loads in `transformers.GPT2LMHeadModel.from_pretrained(folder)` as it is. What is read is checked whole
before any of it is used: the configuration field by field, the safetensors header against the exact names, shapes and
dtypes of the model. Pickled weights are never opened. Tokenizer files are not this module's business.
"""

import json
import logging
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from toolkit.config import MAX_DIMENSION, MAX_LAYERS, GPT2Config
from toolkit.disk import replace_file, sync_folder
from toolkit.errors import UserError
from toolkit.failpoint import failpoint
from toolkit.model.gpt2 import GPT2, LAYER_NORM_EPSILON, TOKEN_EMBEDDING, canonical_shapes, load_canonical
from toolkit.strict_json import parse_object

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HUB_FILES = (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors")

# A header names every tensor in about 120 bytes; GPT-2 1558M has 580, so that 1 MB is ample and 100 MB an attack.
MAX_HEADER_BYTES = 1_000_000
MAX_CONFIG_BYTES = 1_000_000
PADDED_TO = (64, 128)  # a vocabulary is rounded up to a multiple of one of these
WEIGHT_DTYPES = ("F32", "F16", "BF16")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that older files carry

# GPT2Config field -> its name in a config.json.
_SHAPE_FIELDS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "context_length": "n_positions",
    "vocab_size": "vocab_size",
}


def config_json(config: GPT2Config, *, eot_id: int) -> dict[str, Any]:
    """What config.json holds for `transformers`: the configuration of a GPT2LMHeadModel without padding."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in _SHAPE_FIELDS.items()},
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "initializer_range": 0.02,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "dtype": "float32",
        "use_cache": True,
    }


def read_config(source: str) -> GPT2Config:
    """The shape of the model in a folder or on the Hub; dropout, which belongs to a training run, is left at 0.

    Raises: UserError if it is not a GPT-2, or one with options that this toolkit's model does not have.
    """
    folder = _local_folder(source)
    return _parse_config(_read_json(folder / CONFIG_FILE, MAX_CONFIG_BYTES), folder / CONFIG_FILE)


def _parse_config(values: dict[str, Any], path: Path) -> GPT2Config:
    if values.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type={values.get('model_type')!r} is not gpt2; give the folder of a GPT-2")
    required = {  # field -> (what our model does, other spellings of the same); absent means transformers' default
        "activation_function": ("gelu_new", ("gelu_pytorch_tanh",)),
        "layer_norm_epsilon": (LAYER_NORM_EPSILON, ()),
        "n_inner": (None, (4 * values["n_embd"],) if type(values.get("n_embd")) is int else ()),
        "scale_attn_weights": (True, ()),
        "scale_attn_by_inverse_layer_idx": (False, ()),
        "tie_word_embeddings": (True, ()),
        "add_cross_attention": (False, ()),
        "quantization_config": (None, ()),
    }
    lacking = [
        f"{name}={values[name]!r} (must be {ours!r})"
        for name, (ours, others) in required.items()
        if name in values and values[name] != ours and values[name] not in others
    ]
    if lacking:
        raise UserError(f"{path}: this toolkit's GPT-2 has no {', '.join(lacking)}; use plain GPT-2 weights")
    shape: dict[str, Any] = {ours: values.get(theirs) for ours, theirs in _SHAPE_FIELDS.items()}
    for ours, value in shape.items():
        limit = MAX_LAYERS if ours == "n_layer" else MAX_DIMENSION
        if type(value) is not int or not 0 < value <= limit:
            raise UserError(f"{path}: {_SHAPE_FIELDS[ours]}={value!r} must be a whole number from 1 to {limit}")
    return GPT2Config(**shape)


def read_eot_id(source: str) -> int | None:
    """The end-of-text id that a folder's (or Hub model's) config.json names as eos_token_id, or None."""
    value = _read_json(_local_folder(source) / CONFIG_FILE, MAX_CONFIG_BYTES).get("eos_token_id")
    return value if type(value) is int else None


def load_weights(source: str, config: GPT2Config) -> dict[str, Tensor]:
    """The weights of a folder or a Hub model under our names, in fp32, checked against the configuration.

    Rows of the token embedding that are padding, as the configuration's smaller vocabulary says, are left out.
    Raises: UserError if the shape differs (naming the flags that fit), a tensor is missing, unknown or of another shape
    or dtype, the head is not the token embedding, or there are only pickled weights.
    """
    folder = _local_folder(source)
    theirs = read_config(str(folder))
    _check_same_shape(source, theirs, config)
    tensors: dict[str, Tensor] = {}
    head = None
    for path, names in _find_weights(folder, canonical_shapes(theirs)).items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for stored, name in names.items():
                    tensor = file.get_tensor(stored).float()
                    if not tensor.isfinite().all():
                        raise UserError(f"{path}: {stored} has values that are no finite numbers; use other weights")
                    if name == "lm_head.weight":
                        head = tensor
                    else:
                        tensors[name] = tensor
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); fetch or copy it again") from None
    if head is not None and not torch.equal(head, tensors[TOKEN_EMBEDDING]):
        raise UserError(
            f"{source}: lm_head.weight differs from wte.weight, but GPT-2's head is its token embedding; use tied weights"
        )
    tensors[TOKEN_EMBEDDING] = tensors[TOKEN_EMBEDDING][: config.vocab_size]
    return {name: tensors[name] for name in canonical_shapes(config)}


def is_padded(model_ids: int, tokenizer_ids: int) -> bool:
    """True for a model with its tokenizer's ids rounded up, as nanoGPT and llm.c make them: 50304 for GPT-2's 50257."""
    rounded_up = [math.ceil(tokenizer_ids / multiple) * multiple for multiple in PADDED_TO]
    return model_ids > tokenizer_ids and model_ids in rounded_up


def _check_same_shape(source: str, theirs: GPT2Config, ours: GPT2Config) -> None:
    different = [name for name in _SHAPE_FIELDS if getattr(theirs, name) != getattr(ours, name)]
    if is_padded(theirs.vocab_size, ours.vocab_size):
        different.remove("vocab_size")
    if different:
        has = ", ".join(f"{name}={getattr(theirs, name)}" for name in different)
        asked = ", ".join(f"{name}={getattr(ours, name)}" for name in different)
        flags = " ".join(f"--model.{name.replace('_', '-')} {getattr(theirs, name)}" for name in different)
        raise UserError(f"{source} has {has}, but the configuration says {asked}; pass {flags}")


def _find_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[Path, dict[str, str]]:
    """For each weight file, stored name -> our name; raises UserError unless all of them together are exactly the model."""
    found: dict[str, Path] = {}
    files: dict[Path, dict[str, str]] = {}
    problems = []
    for path in _weight_files(folder):
        names = files[path] = {}
        for stored, (dtype, shape) in _read_header(path).items():
            name = stored.removeprefix("transformer.")
            if _MASK_BUFFER.fullmatch(name):
                continue
            expected = shapes.get(TOKEN_EMBEDDING if name == "lm_head.weight" else name)
            if expected is None or name in found:
                problems.append(f"{stored[:80]!r} is {'unknown' if expected is None else 'there twice'}")
            elif shape != expected or dtype not in WEIGHT_DTYPES:
                problems.append(f"{stored} is {dtype} {shape} instead of {' or '.join(WEIGHT_DTYPES)} {expected}")
            names[stored], found[name] = name, path
    missing = [name for name in shapes if name not in found]
    if missing:
        problems.append(f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(problems[:3])}{more}")
    return files


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        weight_map = _read_json(folder / INDEX_FILE, MAX_CONFIG_BYTES).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        for name in names:
            if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or not (folder / name).is_file():
                raise UserError(f"{folder / INDEX_FILE} names {name!r}, which is no safetensors file beside it")
        if names:
            return [folder / name for name in sorted(names)]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise UserError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when they are opened; convert them where "
            "you trust them: GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(NEW) writes model.safetensors"
        )
    raise UserError(f"{folder} has no {WEIGHTS_FILE}; give a folder that transformers' save_pretrained wrote")


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of a safetensors file, bounded before anything is parsed."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise UserError(
                f"{path} is not a safetensors file of a GPT-2: its header would be {length} bytes, which must be 2 to "
                f"{MAX_HEADER_BYTES}; fetch or copy it again"
            )
        header = _parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or any(type(size) is not int for size in shape):
            raise UserError(f"{path}: the entry of {name[:80]!r} is not a tensor's; fetch or copy the file again")
        entries[name] = (str(entry.get("dtype")), tuple(shape))
    return entries


def _read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing; give a folder that transformers' save_pretrained or this toolkit wrote")
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UserError(f"{path} is larger than {max_bytes} bytes, which no {path.name} of a GPT-2 is")
    return _parse_json(data, path)


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        return parse_object(data)
    except ValueError as error:
        raise UserError(f"{path} {error}; fetch or copy it again") from None


def _local_folder(source: str) -> Path:
    """The folder itself, or where the Hub's files of that name lie after fetching them."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{source} is not a folder; give one with {CONFIG_FILE} and {WEIGHTS_FILE}, or a Hub name")
    if not _HUB_NAME.fullmatch(source):
        raise UserError(f"there is no folder {source}; give one with {CONFIG_FILE} and {WEIGHTS_FILE}, or a Hub name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # whatever it is, the source could not be had: HTTP, network, cache, name, rights
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source} is neither a folder here nor could it be fetched from the Hugging Face Hub ({reason}); "
            "check the name and the network, or give a local folder"
        ) from None


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file that `transformers` reads: complete and on the disk, or absent."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        temporary.touch(exist_ok=True)
        mode = temporary.stat().st_mode  # the umask's; safetensors' own is 0600 whatever the umask
        try:
            save_file(contiguous, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # an operating system error in disguise: no space, no permission
            raise UserError(
                f"{path} could not be written ({error}); free some space or choose another folder"
            ) from None
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        failpoint("huggingface.before-rename")
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    replace_file(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def load_model(folder: Path, *, device: str | torch.device = "cpu") -> GPT2:
    """The model in a checkpoint or export folder, ready to evaluate or generate.

    Raises: UserError as `read_config` and `load_weights` do.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a checkpoint or an exported model")
    config = read_config(str(folder))
    model = GPT2(config)
    load_canonical(model, load_weights(str(folder), config))
    return model.to(device).eval()


def export(checkpoint: Path, out: Path) -> None:
    """Writes a checkpoint's model as a folder for `transformers`: weights, configuration, generation defaults.

    Raises: UserError if the checkpoint is damaged or `out` already holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not an empty folder; choose another or remove it")
    config = read_config(str(checkpoint))
    tensors = load_weights(str(checkpoint), config)
    eot_id = read_eot_id(str(checkpoint))
    if eot_id is None:
        raise UserError(f"{checkpoint / CONFIG_FILE} has no eos_token_id; give a checkpoint that this toolkit wrote")
    out.mkdir(parents=True, exist_ok=True)
    save_weights(out / WEIGHTS_FILE, tensors)
    # Padding with end-of-text is what transformers would choose by itself, with a warning each time.
    _write_json(out / GENERATION_CONFIG_FILE, {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id})
    _write_json(out / CONFIG_FILE, config_json(config, eot_id=eot_id))
