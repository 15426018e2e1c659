"""Selective language modeling in a plain torch loop: torch, transformers and this library.

    python examples/plain_torch.py --model FOLDER --corpus CORPUS --scores STORE

FOLDER is a model of transformers, as megatron_slm.export_hf writes it; CORPUS and STORE are what
data_tools.preprocess and megatron_slm.score have made.

In your own loop change `train_step` alone: take the loss of every token instead of the mean,
choose, sum the chosen losses, and divide by how many were chosen in the whole optimizer step.
"""

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_slm.data.loader import TrainingLoader
from megatron_slm.data.scored_dataset import ScoredDataset, open_corpora
from megatron_slm.ops import linear_cross_entropy
from megatron_slm.selection import excess_loss, select_top

KEEP_FRACTION = 0.6
SIZES = {"steps": 100, "sequence_length": 256, "micro_batch_size": 4, "global_batch_size": 8}


def train_step(model, optimizer, micro_batches) -> dict[str, float]:
    loss_sum = 0.0
    selected_tokens = 0
    for batch in micro_batches:
        hidden_BSH = model.model(batch.tokens_BS).last_hidden_state
        loss_BS: Any = linear_cross_entropy(hidden_BSH, model.lm_head.weight, batch.labels_BS)
        score_BS = excess_loss(loss_BS, batch.columns["reference_loss"])
        chosen = select_top(score_BS, batch.loss_mask_BS > 0, KEEP_FRACTION)
        loss = loss_BS[chosen.mask].sum()
        loss.backward()
        loss_sum += loss.item()
        selected_tokens += chosen.kept
    divisor = max(selected_tokens, 1)
    for parameter in model.parameters():
        parameter.grad /= divisor
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss_sum / divisor, "selected": selected_tokens, "grad_norm": grad_norm}


def main(argv=None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("--model", "--corpus", "--scores"):
        parser.add_argument(name, required=True)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(args.model)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)
    corpus = open_corpora([args.corpus], [args.scores])[0]  # refuses scores of another corpus
    loader = TrainingLoader(
        ScoredDataset(corpus, sequence_length=args.sequence_length, seed=1234),
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        dp_rank=0,
        dp_size=1,
    )
    records = []
    for _ in range(args.steps):
        micro_batches = [batch.to(device) for batch in loader.next_step()]
        records.append(train_step(model, optimizer, micro_batches))
        print(records[-1])
    loader.close()
    return records


if __name__ == "__main__":
    main()
