"""A Hugging Face model as the reference: its identity, read without torch, and a runner for it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.files.hashing import file_sha256

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from megatron_slm.data.batch import Batch
    from megatron_slm.scoring.corpus import ReferenceRunner, TokenStream
    from megatron_slm.scoring.windows import WindowPlan


def huggingface_fingerprint(folder: str | Path) -> str:
    """The identity of a local model folder: its weights and its config."""
    folder = Path(folder)
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json"
    )
    has_weights = any(path.suffix != ".json" for path in files)
    if not has_weights or not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is no local Hugging Face model: it needs config.json and its weights "
            "(*.safetensors or *.bin)"
        )
    listed = "\n".join(f"{path.name} {file_sha256(path)}" for path in files)
    return "sha256:" + hashlib.sha256(listed.encode()).hexdigest()


def transformers_runner(
    folder: str | Path,
    stream: TokenStream,
    plan: WindowPlan,
    columns: tuple[str, ...],
    *,
    micro_batch_size: int = 1,
    vocabulary_size: int,
    precision: str = "fp32",
    device: str = "cpu",
) -> ReferenceRunner:
    """Runs any causal model that transformers can open from a local folder, in this process.

    The model's own logits are taken to fp32. At precision bf16 the logits themselves are rounded,
    which moves 0.5 to 4 % of the selection (docs/method.md#point-16): use fp32 where memory allows,
    or import the model into this project and score with it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_slm.scoring.corpus import ReferenceRunner

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
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
    def forward(batches: Sequence[Batch]) -> list[dict[str, np.ndarray]]:
        outputs = []
        for batch in batches:
            logits_BSV = model(input_ids=batch.tokens_BS.to(device), use_cache=False).logits
            # Over all rows, as the model was trained and as it is when it is imported: rows beyond
            # the tokenizer's ids have probability too.
            outputs.append(_columns(columns, logits_BSV, batch.labels_BS))
        return outputs

    return ReferenceRunner(stream, plan, columns, micro_batch_size, forward)


def _columns(
    columns: tuple[str, ...], logits_BSV: Tensor, labels_BS: Tensor
) -> dict[str, np.ndarray]:
    """The columns of one batch, [B, S] each.

    One sequence at a time: its probabilities in fp32 are the largest thing that is held.
    """
    import torch

    rows: dict[str, list[Tensor]] = {name: [] for name in columns}
    for logits_SV, labels_S in zip(logits_BSV, labels_BS.to(logits_BSV.device), strict=True):
        log_p_SV = logits_SV.float().log_softmax(-1)
        for name in columns:
            rows[name].append(_column(name, log_p_SV, labels_S))
    return {name: torch.stack(values).cpu().numpy() for name, values in rows.items()}


def _column(name: str, log_p_SV: Tensor, labels_S: Tensor) -> Tensor:
    """A column of one sequence [S], fp32, in nats: the loss of its labels, or the entropy."""
    import torch

    if name == "loss":
        return -log_p_SV.gather(-1, labels_S[:, None])[:, 0]
    return torch.special.entr(log_p_SV.exp()).sum(-1)
