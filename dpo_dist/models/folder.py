"""A model's folder: what its config.json says, and what its weight files hold. Where it is: resolve.py."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from dpo_dist.config.errors import UserError
from dpo_dist.config.safetensors_header import read_header
from dpo_dist.models.text import empty_lm, output_head, setting, text_config
from dpo_dist.runtime.json_files import needed_object

_BLOCK_BYTES = 1 << 24


# --------------------------------------------------------------------------------------------------------- config.json


def read_config(folder: Path) -> Any:
    """The transformers config in a model's folder, which says of tied embeddings what the weight files hold. UserError
    where transformers does not know what it is."""
    config = _as_written(folder)
    tied = tied_embeddings(folder).in_files
    for part in {id(c): c for c in (config, text_config(config))}.values():
        if getattr(part, "tie_word_embeddings", tied) != tied:
            part.tie_word_embeddings = tied
    return config


def truthful_json(folder: Path) -> dict[str, Any]:
    """config.json as it is, but for a flag of tied embeddings that the weight files contradict."""
    written = settings_json(folder)
    tied = tied_embeddings(folder)
    if tied.flag != tied.in_files:
        for part in (written, *(p for p in written.values() if isinstance(p, dict) and "tie_word_embeddings" in p)):
            part["tie_word_embeddings"] = tied.in_files
    return written


def settings_json(folder: Path) -> dict[str, Any]:
    """config.json as it is. UserError where it is no JSON object."""
    return needed_object(folder / "config.json", "copy the model again")


def _as_written(folder: Path) -> Any:
    written = settings_json(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:                           # of whatever kind: a damaged value may be of any type
        if "auto_map" in written:
            raise UserError(f"{folder}/config.json is a model with code of its own (auto_map), which is never run; "
                            f"transformers itself knows no model_type={written.get('model_type')}. Convert it to a "
                            "family that transformers has, or take a newer transformers") from error
        raise UserError(f"{folder}/config.json is not a model that transformers knows: "
                        f"{next(iter(str(error).splitlines()), type(error).__name__)}") from error
    for part in {id(c): c for c in (config, text_config(config))}.values():
        if "/" in str(name := getattr(part, "_attn_implementation", None)):
            raise UserError(f"{folder}/config.json asks for attention code of the hub (attn_implementation={name}), "
                            "which is never run; take that entry out")
    if config.is_encoder_decoder:
        raise UserError(f"{folder} is an encoder-decoder ({config.model_type}); preferences are trained on causal "
                        "language models here: give one of those")
    return config


def quantization(config: Any) -> str | None:
    """How a model's weights are quantized ("bitsandbytes, 4 bits"), or None; from config.json's quantization_config."""
    how = getattr(config, "quantization_config", None)
    if how is None:
        return None
    how = how if isinstance(how, dict) else how.to_dict()
    bits = how.get("bits") or (4 if how.get("load_in_4bit") else 8 if how.get("load_in_8bit") else None)
    return f"{how.get('quant_method', 'unnamed method')}, {f'{bits} bits' if bits else 'see config.json'}"


def check_quantized(config: Any, key: str) -> None:
    """UserError where what a quantized model needs (a library, a GPU) is not here."""
    from transformers.quantizers import AutoHfQuantizer

    try:
        AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True).validate_environment()
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"{key} is quantized ({quantization(config)}) and cannot be computed here: "
                        f"{str(error).splitlines()[0]}") from error


# --------------------------------------------------------------------------------------------------------- weight files


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    shape: tuple[int, ...]
    start: int                             # of its bytes in the file, and behind the last
    end: int

    def blocks(self) -> Iterator[bytes]:
        with self.file.open("rb") as f:
            f.seek(self.start)
            for place in range(self.start, self.end, _BLOCK_BYTES):
                yield f.read(min(_BLOCK_BYTES, self.end - place))


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from. UserError where there are none, or one is missing."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
        if others := [file.name for file in files if file.suffix != ".safetensors"]:
            raise UserError(f"{index} names {others[0]}, which is no safetensors file; convert the weights "
                            "(save_pretrained writes safetensors)")
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{folder} lacks {', '.join(missing[:3])} ({len(missing)} of {len(files)} files that "
                            f"{index.name} names); copy the model again")
        return files
    pickled = next((file.name for file in folder.glob("*.bin")), None)
    raise UserError(f"{folder} holds no *.safetensors"
                    + (f", and {pickled} is a pickle, which may run code and is never read" if pickled else "")
                    + "; convert the weights (save_pretrained writes safetensors)")


def _weight_map(index: Path) -> dict[str, str]:
    found = needed_object(index, "copy the model again").get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} has no weight_map; copy the model again")
    return found


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """What the headers of the weight files name."""
    found = {}
    for file in weight_files(folder):
        data, tensors = read_header(file)
        for name, entry in tensors.items():
            start, end = entry["data_offsets"]
            found[name] = Stored(file, tuple(entry["shape"]), data + start, data + end)
    return found


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most weights in a model's files. Loaded in it, weights stay in the files, mapped page by page."""
    bytes_of: dict[torch.dtype, int] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as f:
            names = f.keys()
            for tensor in map(f.get_tensor, names):
                bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.nbytes
    return max(bytes_of, key=lambda dtype: bytes_of[dtype])


# ------------------------------------------------------------------------------------------------------ tied embeddings


@dataclass(frozen=True)
class Tied:
    """Whether a model's output head is its embedding: as config.json says, and as its weight files hold it.

    Loaders differ where the two do: transformers keeps two matrices that differ, its sharded load for ZeRO-3 and other
    programs follow the flag. Here the files hold for all of them.
    """

    flag: bool
    in_files: bool


def tied_embeddings(folder: Path) -> Tied:
    """Flag and files compared. Names and shapes tell; bytes are read only where both matrices are in the files.
    UserError where the files hold no head and config.json says that there is one."""
    files = [folder / "config.json", *weight_files(folder)]
    return _compare(folder, tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@lru_cache(maxsize=32)
def _compare(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> Tied:
    config = _as_written(folder)
    lm = empty_lm(config)
    embedding, head = lm.get_input_embeddings(), output_head(lm)
    if getattr(head, "weight", None) is None or getattr(embedding, "weight", None) is None:
        flag = bool(setting(config, "tie_word_embeddings"))
        return Tied(flag, flag)                          # ScoredModel says what is missing
    flag = head.weight is embedding.weight
    matrices = {name: t for name, t in stored_tensors(folder).items() if _may_be_either(name, t)}
    of_embedding, of_head = (_named_as(lm, module, matrices) for module in (embedding, head))
    if of_embedding is None:
        return Tied(flag, flag)
    known = {_end(name) for name, p in lm.named_parameters(remove_duplicate=False)
             if p is not embedding.weight and p is not head.weight}
    others = [name for name, t in matrices.items() if name != of_embedding and _end(name) not in known
              and t.shape == matrices[of_embedding].shape]
    if of_head is None and len(others) == 1:
        of_head = others[0]                              # renamed when it is loaded, as GPT-NeoX's embed_out is
    for name, module in ((of_embedding, embedding), (of_head, head)):
        if name and matrices[name].shape[0] != len(module.weight):
            raise UserError(f"{folder}/config.json has a vocabulary of {len(module.weight)}, but {name} in the weight "
                            f"files has {matrices[name].shape[0]} rows; set vocab_size to {matrices[name].shape[0]} "
                            "in config.json")
    if of_head is not None:
        return Tied(flag, flag and _same_bytes(matrices[of_embedding], matrices[of_head]))
    if not flag and not others and head.weight.shape == embedding.weight.shape:
        raise UserError(f"{folder}/config.json says tie_word_embeddings=false, but the weight files hold no output "
                        f"head beside the embedding ({of_embedding}). If the embedding is the head, set "
                        "tie_word_embeddings to true in config.json; otherwise the files are incomplete: copy them "
                        "again")
    return Tied(flag, flag)


def _named_as(lm: Any, module: Any, matrices: dict[str, Stored]) -> str | None:
    """What a module's weight is called in the files, where prefixes may be others than in the model."""
    wanted = next(name for name, m in lm.named_modules() if m is module).rpartition(".")[2] + ".weight"
    found = [name for name, matrix in matrices.items()
             if f".{name}".endswith(f".{wanted}") and matrix.shape[1] == module.weight.shape[1]]
    return found[0] if len(found) == 1 else None


def _end(name: str) -> str:
    """The last parts of a weight's name, which prefixes do not change."""
    return ".".join(name.split(".")[-2:])


def _may_be_either(name: str, tensor: Stored) -> bool:
    """Layers that predict further tokens ahead may have copies of both matrices; positions have an embedding too."""
    parts = name.split(".")
    return len(tensor.shape) == 2 and not any(part.isdigit() or "pos" in part or part == "wpe" for part in parts)


def _same_bytes(one: Stored, other: Stored) -> bool:
    return one.shape == other.shape and all(a == b for a, b in zip_longest(one.blocks(), other.blocks()))
