"""Hugging Face folders: config.json and safetensors, out of and into ModelConfig and our tensors.

Which architecture a model becomes: qk_norm -> Qwen3, qkv_bias -> Qwen2, otherwise Llama; with experts, qk_norm -> Qwen3-MoE, otherwise Mixtral.
Mistral folders are read as Llama.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_slm.checkpoint.folder import CheckpointInfo, sync_folder
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.hf_tokenizer import write_tokenizer
from megatron_slm.convert.names import Geometry, to_huggingface
from megatron_slm.tokenization import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LARGEST_SHARD_BYTES = 5 * 10**9
# Written last: a folder that has it is a complete export.
LAST_FILE = "config.json"
MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")


def export(
    state: Mapping[str, Tensor],
    info: CheckpointInfo,
    tokenizer: Tokenizer | None,
    output: str | Path,
    *,
    dtype: str = "fp32",
    overwrite: bool = False,
    largest_shard_bytes: int = LARGEST_SHARD_BYTES,
) -> Path:
    """Write `state` (whole tensors under our names, read one at a time) as a Hugging Face model folder `output`.

    Everything is written beside `output` and renamed, so `output` is either absent, what it was, or complete. tokenizer=None leaves the
    tokenizer out. ValueError when `output` holds something and `overwrite` is off, or is on but `output` is not an export.
    """
    output = Path(os.path.abspath(output))
    check_output(output, overwrite)
    model = ModelConfig(**info.model)
    config = huggingface_config(model, info.sequence_length, tokenizer, dtype)
    writing = output.with_name(f".writing_{output.name}")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    if tokenizer is not None:
        write_tokenizer(tokenizer, writing, info.sequence_length)
    tensors = ((name, tensor.to(DTYPES[dtype])) for name, tensor in to_huggingface(state, Geometry.from_model(model)))
    write_safetensors(tensors, writing, largest_shard_bytes)
    write_json(writing / "generation_config.json", special_ids(tokenizer) | {"do_sample": False, "_from_model_config": True})
    write_json(writing / LAST_FILE, config)
    _replace(writing, output)
    return output


def check_output(output: Path, overwrite: bool) -> None:
    """ValueError unless `output` is free, or is an earlier export that may be replaced."""
    if not output.exists():
        return
    content = [path.name for path in output.iterdir()] if output.is_dir() else [output.name]
    if content and not overwrite:
        raise ValueError(f"{output} already holds {', '.join(sorted(content)[:3])}; give another --output, or --overwrite to replace an earlier export")
    if content and LAST_FILE not in content:
        raise ValueError(f"{output} is not a model folder (no {LAST_FILE} in it), so --overwrite will not remove it; give another --output")


def _replace(writing: Path, output: Path) -> None:
    """Rename into place; an earlier export is removed only after the new one stands."""
    for path in writing.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(writing)
    old = output.with_name(f".replaced_{output.name}")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    writing.rename(output)
    sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_safetensors(tensors: Iterable[tuple[str, Tensor]], folder: Path, largest_shard_bytes: int = LARGEST_SHARD_BYTES) -> None:
    """model.safetensors, or numbered shards with model.safetensors.index.json; holds one shard in memory."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0
    for name, tensor in tensors:
        if shard and held_bytes + tensor.nbytes > largest_shard_bytes:
            shards.append(_write_shard(shard, folder, len(shards)))
            shard, held_bytes = {}, 0
        shard[name] = tensor.contiguous()
        held_bytes, total_bytes = held_bytes + tensor.nbytes, total_bytes + tensor.nbytes
    shards.append(_write_shard(shard, folder, len(shards)))
    if len(shards) == 1:
        (folder / _part(0)).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part(number)).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _part(number: int) -> str:
    return f"part_{number}.safetensors"


def _write_shard(shard: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    path = folder / _part(number)
    path.touch()
    mode = path.stat().st_mode
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors makes its files readable by their owner only
    return list(shard)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """ValueError when the file is missing or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error}); expected the config.json of a Hugging Face model") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def special_ids(tokenizer: Tokenizer | None) -> dict:
    """bos, eos and pad ids as config.json names them. Generation stops at the token that closes documents in the corpora."""
    if tokenizer is None:
        return {}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id, "pad_token_id": tokenizer.pad_id}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def architecture(model: ModelConfig) -> tuple[str, str]:
    """(class, model_type) of the Hugging Face model that computes the same. ValueError when there is none."""
    if model.qk_norm and model.qkv_bias:
        raise ValueError("model.qk_norm together with model.qkv_bias has no Hugging Face architecture to export to; train with one of them")
    if model.experts and model.qkv_bias:
        raise ValueError("model.qkv_bias together with model.experts has no Hugging Face architecture to export to (Qwen2-MoE also has a shared expert)")
    if model.experts and not model.qk_norm and not model.renormalize_experts:
        raise ValueError("model.experts with renormalize_experts: false has no Hugging Face architecture to export to without model.qk_norm (Qwen3-MoE)")
    if model.experts:
        return ("Qwen3MoeForCausalLM", "qwen3_moe") if model.qk_norm else ("MixtralForCausalLM", "mixtral")
    if model.qk_norm:
        return "Qwen3ForCausalLM", "qwen3"
    return ("Qwen2ForCausalLM", "qwen2") if model.qkv_bias else ("LlamaForCausalLM", "llama")


def huggingface_config(model: ModelConfig, sequence_length: int, tokenizer: Tokenizer | None, dtype: str) -> dict:
    """config.json of an exported model, in the field names that transformers 4 and 5 both read."""
    geometry = Geometry.from_model(model)
    name, model_type = architecture(model)
    config = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": geometry.vocabulary_size,
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.ffn_hidden_size,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.groups,
        "head_dim": geometry.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "rope_scaling": rope_scaling(model),
        "attention_dropout": model.dropout,
        "initializer_range": model.initialization_std,
        "tie_word_embeddings": geometry.tied,
        "use_cache": True,
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
    }
    if model_type == "mixtral":
        config |= {"num_local_experts": model.experts, "num_experts_per_tok": model.experts_per_token, "sliding_window": None}
    elif model_type == "qwen3_moe":
        config |= {"num_experts": model.experts, "num_experts_per_tok": model.experts_per_token, "moe_intermediate_size": geometry.ffn_hidden_size,
                   "norm_topk_prob": model.renormalize_experts, "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False,
                   "use_sliding_window": False}
    elif model_type == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    elif model_type == "qwen3":
        config |= {"attention_bias": False, "use_sliding_window": False}
    else:
        config |= {"use_sliding_window": False}
    return config | special_ids(tokenizer)


def rope_scaling(model: ModelConfig) -> dict | None:
    """config.json's rope_scaling of our settings."""
    if model.rope_scaling == "none":
        return None
    scaling = {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
    if model.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": model.rope_low_frequency_factor, "high_freq_factor": model.rope_high_frequency_factor,
                    "original_max_position_embeddings": model.rope_original_sequence_length}
    return scaling


def rope_settings(config: dict) -> dict:
    """The rope_* fields of ModelConfig that a config.json describes; ValueError for a kind of scaling that is not implemented."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    settings = {"rope_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return settings
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rotary scaling {kind!r} (config.json says {rope}); implemented are linear and llama3")
    settings |= {"rope_scaling": kind, "rope_scaling_factor": float(rope["factor"])}
    if kind == "llama3":
        settings |= {"rope_low_frequency_factor": float(rope["low_freq_factor"]), "rope_high_frequency_factor": float(rope["high_freq_factor"]),
                     "rope_original_sequence_length": int(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])}
    return settings


def expert_settings(config: dict) -> dict:
    """The fields of ModelConfig about experts that a config.json describes."""
    if config.get("model_type") == "mixtral":
        return {"experts": config["num_local_experts"], "experts_per_token": config["num_experts_per_tok"]}
    if config.get("model_type") == "qwen3_moe":
        return {"experts": config["num_experts"], "experts_per_token": config["num_experts_per_tok"],
                "renormalize_experts": config.get("norm_topk_prob", False)}
    return {}


def model_config(config: dict) -> tuple[ModelConfig, int]:
    """(ModelConfig, sequence length) that compute what a config.json describes. ValueError naming every setting we have no place for."""
    model_type = config.get("model_type")
    problems = []
    if model_type not in MODEL_TYPES:
        problems.append(f"model_type {model_type!r}; expected one of {', '.join(MODEL_TYPES)}")
    if model_type == "qwen3_moe" and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        problems.append("dense layers among those of experts (mlp_only_layers or decoder_sparse_step)")
    rope = {}
    try:
        rope = rope_settings(config)
    except ValueError as error:
        problems.append(str(error))
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {config['hidden_act']!r}; expected silu")
    if config.get("mlp_bias") or config.get("attention_bias"):
        problems.append("biases on the attention output or feed-forward layers (attention_bias or mlp_bias true)")
    if problems:
        raise ValueError("this Hugging Face model cannot be expressed here: " + "; ".join(problems))
    windowed = config.get("use_sliding_window", model_type == "mistral") and config.get("sliding_window")
    # Within its window, sliding attention is full attention: sequences up to that length are computed exactly.
    sequence_length = min(config["max_position_embeddings"], windowed or config["max_position_embeddings"])
    model = ModelConfig(
        layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size"],
        attention_heads=config["num_attention_heads"],
        query_groups=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_size=config.get("head_dim") or (128 if model_type == "qwen3" else config["hidden_size"] // config["num_attention_heads"]),
        vocabulary_size=config["vocab_size"],
        **rope,
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        tied_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        **expert_settings(config),
        initialization_std=config.get("initializer_range", 0.02),
    )
    return model, sequence_length


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder, one file or sharded; each is read when asked for. ValueError when there are none."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        index = folder / "model.safetensors.index.json"
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: {', '.join(missing)} not found; expected model.safetensors, or its shards with {index.name}")
        opened = [safe_open(folder / name, framework="pt") for name in files]
        self._places = {name: file for file in opened for name in file.keys()}

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
