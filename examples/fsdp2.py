"""Selective language modeling under FSDP2 (torch.distributed.fsdp.fully_shard).

    torchrun --nproc-per-node 2 examples/fsdp2.py --model FOLDER --corpus CORPUS --scores STORE

In your own trainer (torchtitan's is one) give select_top the group over which gradients are
reduced: the tokens of its ranks compete, and `kept` counts them all. FSDP2 takes the mean of the
ranks' gradients, which is therefore multiplied by their number.
"""

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megatron_slm.data.loader import TrainingLoader
from megatron_slm.data.scored_dataset import ScoredDataset, open_corpora
from megatron_slm.selection import excess_loss, select_top

KEEP_FRACTION = 0.6
SIZES = {"steps": 100, "sequence_length": 256, "micro_batch_size": 4, "global_batch_size": 8}


def train_step(model, optimizer, micro_batches, mesh) -> dict[str, float]:
    group = mesh.get_group()
    loss_sum = torch.zeros((), device=mesh.device_type)
    selected_tokens = 0
    for batch in micro_batches:
        logits_BVS = model(batch.tokens_BS).logits.float().transpose(1, 2)
        loss_BS = cross_entropy(logits_BVS, batch.labels_BS, reduction="none")
        score_BS = excess_loss(loss_BS, batch.columns["reference_loss"])
        chosen = select_top(score_BS, batch.loss_mask_BS > 0, KEEP_FRACTION, group=group)
        loss_BS[chosen.mask].sum().backward()
        loss_sum += loss_BS.detach()[chosen.mask].sum()
        selected_tokens += chosen.kept
    divisor = max(selected_tokens, 1)
    for parameter in model.parameters():
        parameter.grad *= mesh.size() / divisor
    norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # a DTensor
    grad_norm = norm.full_tensor().item()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss_sum, group=group)
    return {"loss": loss_sum.item() / divisor, "selected": selected_tokens, "grad_norm": grad_norm}


def main(argv=None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("--model", "--corpus", "--scores"):
        parser.add_argument(name, required=True)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = dist.init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    model = AutoModelForCausalLM.from_pretrained(args.model)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)
    corpus = open_corpora([args.corpus], [args.scores])[0]
    dataset = ScoredDataset(corpus, sequence_length=args.sequence_length, seed=1234)
    sizes = {"global_batch_size": args.global_batch_size, "micro_batch_size": args.micro_batch_size}
    loader = TrainingLoader(dataset, **sizes, dp_rank=mesh.get_local_rank(), dp_size=mesh.size())
    records = []
    for _ in range(args.steps):
        micro_batches = [batch.to(device) for batch in loader.next_step()]
        records.append(train_step(model, optimizer, micro_batches, mesh))
        print(records[-1])
    loader.close()
    dist.destroy_process_group()
    return records


if __name__ == "__main__":
    main()
