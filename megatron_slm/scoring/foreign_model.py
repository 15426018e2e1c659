"""A Hugging Face model as the reference: its identity, read without torch, and a runner for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.files.hashing import file_sha256
from megatron_slm.tokenization import load_tokenizer, tokenizer_differences

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import torch
    from torch import Tensor

    from megatron_slm.data.batch import Batch
    from megatron_slm.scoring.corpus import ReferenceRunner, TokenStream
    from megatron_slm.scoring.windows import WindowPlan


def huggingface_fingerprint(folder: str | Path) -> str:
    """The identity of a local model folder: its weights and its config."""
    listed = "\n".join(f"{path.name} {file_sha256(path)}" for path in _model_files(Path(folder)))
    return "sha256:" + hashlib.sha256(listed.encode()).hexdigest()


def _model_files(folder: Path) -> list[Path]:
    """The config and the files of weights, by name. ValueError where one of the two is missing."""
    files = sorted(
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json"
    )
    has_weights = any(path.suffix != ".json" for path in files)
    if not has_weights or not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is no local Hugging Face model: it needs config.json and its weights "
            "(*.safetensors or *.bin)"
        )
    return files


def stored_precision(folder: str | Path) -> str:
    """The precision that config.json names for the weights; fp32 where it names none of ours.

    ValueError where the folder holds no model.
    """
    _model_files(Path(folder))
    content = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    named = content.get("dtype", content.get("torch_dtype"))
    return {"bfloat16": "bf16", "float16": "fp16"}.get(named, "fp32")


def tokenizer_problem(folder: str | Path, corpus_tokenizer: Mapping[str, Any]) -> str:
    """Why the model in a folder cannot read a corpus of this tokenizer; "" when it can, or when the
    folder holds no tokenizer to compare.

    A folder may hold one vocabulary in several files; the corpus may have been made with any.
    """
    folder = Path(folder)
    files = [folder / "tokenizer.json", *sorted(folder.glob("*.model"))]
    found = []
    for path in filter(Path.is_file, files):
        try:
            entry = load_tokenizer(path).entry
        except ValueError:  # a .model that is no vocabulary
            continue
        differences = tokenizer_differences(entry, corpus_tokenizer)
        if not differences:
            return ""
        found.append(f"{path.name}: {'; '.join(differences)}")
    if not found:
        return ""
    return (
        f"{folder} has another tokenizer than {corpus_tokenizer['path']}, which the corpus was "
        f"made with ({'. '.join(found)}): the same ids mean other text. Preprocess the text with "
        f"--tokenizer {folder}."
    )


def transformers_columns(
    folder: str | Path,
    columns: tuple[str, ...],
    *,
    vocabulary_size: int,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """The per-token columns of any causal model that transformers can open from a local folder.

    Gives a function of (tokens_BS, labels_BS), int64, that returns fp32 [B, S] by column, in nats,
    on the device. The model's own logits are taken to fp32. At precision bf16 the logits themselves
    are rounded, which moves 0.4 to 4 % of the selection (docs/method.md#point-16): use fp32 where
    memory allows, or import the model into this project and score with it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, trust_remote_code=False, local_files_only=True
    )
    model = model.eval().to(torch.device(device))
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < vocabulary_size:
        raise ValueError(
            f"{folder} knows {rows} tokens, the corpus's tokenizer has {vocabulary_size}: they do "
            "not belong together"
        )

    @torch.no_grad()
    def columns_of(tokens_BS: Tensor, labels_BS: Tensor) -> dict[str, Tensor]:
        logits_BSV = model(input_ids=tokens_BS.to(device), use_cache=False).logits
        # Over all rows, as the model was trained and as it is when it is imported: rows beyond the
        # tokenizer's ids have probability too.
        return _columns(columns, logits_BSV, labels_BS)

    return columns_of


def transformers_runner(
    folder: str | Path,
    stream: TokenStream,
    plan: WindowPlan,
    columns: tuple[str, ...],
    *,
    micro_batch_size: int = 1,
    vocabulary_size: int,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> ReferenceRunner:
    """Runs `transformers_columns` over windows of a corpus, in this process."""
    from megatron_slm.scoring.corpus import ReferenceRunner

    columns_of = transformers_columns(
        folder, columns, vocabulary_size=vocabulary_size, precision=precision, device=device
    )

    def forward(batches: Sequence[Batch]) -> list[dict[str, np.ndarray]]:
        outputs = []
        for batch in batches:
            values = columns_of(batch.tokens_BS, batch.labels_BS)
            outputs.append({name: value_BS.cpu().numpy() for name, value_BS in values.items()})
        return outputs

    return ReferenceRunner(stream, plan, columns, micro_batch_size, forward)


def _columns(columns: tuple[str, ...], logits_BSV: Tensor, labels_BS: Tensor) -> dict[str, Tensor]:
    """The columns of one batch, [B, S] each.

    One sequence at a time: its probabilities in fp32 are the largest thing that is held.
    """
    import torch

    rows: dict[str, list[Tensor]] = {name: [] for name in columns}
    for logits_SV, labels_S in zip(logits_BSV, labels_BS.to(logits_BSV.device), strict=True):
        log_p_SV = logits_SV.float().log_softmax(-1)
        for name in columns:
            rows[name].append(_column(name, log_p_SV, labels_S))
    return {name: torch.stack(values) for name, values in rows.items()}


def _column(name: str, log_p_SV: Tensor, labels_S: Tensor) -> Tensor:
    """A column of one sequence [S], fp32, in nats: the loss of its labels, or the entropy."""
    import torch

    if name == "loss":
        return -log_p_SV.gather(-1, labels_S[:, None])[:, 0]
    return torch.special.entr(log_p_SV.exp()).sum(-1)
