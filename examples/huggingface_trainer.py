"""Selective language modeling with the Trainer of transformers, which needs accelerate.

    python examples/huggingface_trainer.py --model FOLDER --corpus CORPUS --scores STORE \
        --output_dir runs/hf --max_steps 100    (and any other field of TrainingArguments)

Under torchrun the tokens of all processes compete. In your own Trainer take over the two methods of
SelectiveTrainer, and a dataset, a collator and arguments that keep the stored scores.
"""

from typing import Any

import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments

from megatron_slm.data.scored_dataset import ScoredDataset, open_corpora
from megatron_slm.selection import excess_loss, kept_tokens, select_top

KEEP_FRACTION = 0.6


def collate(samples):
    """labels[i] is the token after input_ids[i]; a model's own loss would shift them once more."""
    batch = default_collate(samples)
    batch["input_ids"] = batch.pop("tokens")
    batch["labels"][batch["loss_mask"] == 0] = -100
    return batch


class SelectiveTrainer(Trainer):
    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of all micro-batches

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and how many tokens all processes will choose in them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        selected = 0
        for batch in batches:
            eligible_BS = (batch["labels"] != -100) & batch["reference_loss"].isfinite()
            eligible = self.accelerator.reduce(eligible_BS.sum().to(device), "sum")
            selected += kept_tokens(KEEP_FRACTION, int(eligible))
        return batches, max(selected, 1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        labels_BS = inputs["labels"]
        logits_BVS = outputs.logits.float().transpose(1, 2)
        loss_BS = cross_entropy(logits_BVS, labels_BS, reduction="none")
        eligible_BS = labels_BS != -100
        if model.training:
            score_BS = excess_loss(loss_BS, inputs["reference_loss"])
            group = dist.group.WORLD if dist.is_initialized() else None
            chosen = select_top(score_BS, eligible_BS, KEEP_FRACTION, group=group)
            # DistributedDataParallel takes the mean over processes; this makes it their sum.
            loss = loss_BS[chosen.mask].sum() / num_items_in_batch * self.accelerator.num_processes
        else:
            loss = loss_BS[eligible_BS].mean()  # evaluation is over all tokens
        return (loss, outputs) if return_outputs else loss


def main(argv=None) -> list[dict[str, float]]:
    fields: Any = TrainingArguments  # not of the type that transformers declares
    parser = HfArgumentParser(fields, description=__doc__.split("\n\n")[0])
    for name in ("--model", "--corpus", "--scores"):
        parser.add_argument(name, required=True)
    parser.add_argument("--sequence_length", type=int, default=256)
    args, options = parser.parse_args_into_dataclasses(argv)
    args.remove_unused_columns = False
    args.train_sampling_strategy = "sequential"  # the dataset is in random order already
    corpus = open_corpora([options.corpus], [options.scores])[0]
    dataset = ScoredDataset(corpus, sequence_length=options.sequence_length, seed=args.seed)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    trainer = SelectiveTrainer(model, args, train_dataset=dataset, data_collator=collate)
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
