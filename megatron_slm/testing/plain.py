"""The decoder in plain single-process torch, without megatron-core; plain_trainer.py trains it.

Every layout is compared with it. It is written to be read beside the papers, not to be fast.
Weights carry megatron-core's names and shapes, so that a state dict of a one-process run loads as
it is.

B sequences, S tokens, H hidden, n query heads, g key/value heads, d head size, E experts.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_slm.config.schema import ModelConfig
from megatron_slm.testing.plain_rope import rotated

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * x.sigmoid(),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x.clamp(min=0),
}


class PlainDecoder(torch.nn.Module):
    """Grouped-query attention, a feed-forward layer or a mixture of experts, and every part that
    ModelConfig offers.
    """

    def __init__(self, model: ModelConfig, vocabulary_size: int, state: dict[str, Tensor]):
        super().__init__()
        self.model = model
        self.vocabulary_size = vocabulary_size
        self.names = sorted(state)
        self.routed: list[tuple[Tensor, Tensor]] = []
        """Logits and choices of each router in the last forward pass."""
        self.weights = torch.nn.ParameterList(
            [torch.nn.Parameter(state[name].detach().clone().float()) for name in self.names]
        )

    def weight(self, name: str) -> Tensor:
        return self.weights[self.names.index(name)]

    def optional_weight(self, name: str) -> Tensor | None:
        return self.weight(name) if name in self.names else None

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """fp32 [B, S, vocabulary_size]; padded vocabulary rows take no part."""
        self.routed = []
        hidden_BSH = F.embedding(tokens_BS, self.weight("embedding.word_embeddings.weight"))
        if self.model.position_embedding == "learned":
            position_PH = self.weight("embedding.position_embeddings.weight")
            hidden_BSH = hidden_BSH + position_PH[: tokens_BS.shape[1]]
        hidden_BSH = hidden_BSH * self.model.embedding_scale
        for layer in range(self.model.layers):
            hidden_BSH = self._layer(hidden_BSH, layer)
        hidden_BSH = self._norm(hidden_BSH, "decoder.final_layernorm")
        head = self.optional_weight("output_layer.weight")
        if head is None:  # tied
            head = self.weight("embedding.word_embeddings.weight")
        return hidden_BSH @ head[: self.vocabulary_size].T

    def loss(
        self, tokens_BS: Tensor, labels_BS: Tensor, document_start_BS: Tensor | None = None
    ) -> Tensor:
        """-log P(label | tokens up to it), fp32 [B, S].

        Given where documents start, each document is run by itself, from position 0.
        """
        if document_start_BS is None:
            return F.cross_entropy(
                self.logits(tokens_BS).transpose(1, 2), labels_BS, reduction="none"
            )
        rows = []
        for tokens, labels, starts in zip(tokens_BS, labels_BS, document_start_BS, strict=True):
            sizes = starts.unique(return_counts=True)[1].tolist()
            documents = zip(tokens.split(sizes), labels.split(sizes), strict=True)
            losses = [self.loss(document[None], label[None])[0] for document, label in documents]
            rows.append(torch.cat(losses))
        return torch.stack(rows)

    def _layer(self, hidden_BSH: Tensor, layer: int) -> Tensor:
        prefix = f"decoder.layers.{layer}."
        full = layer in self.model.full_attention_layers
        window_tokens = 0 if full else self.model.attention_window_tokens
        before = self.model.norm_placement in ("before", "both")
        after = self.model.norm_placement in ("after", "both")
        read_BSH = self._norm(hidden_BSH, prefix + "input_layernorm") if before else hidden_BSH
        rotates = layer not in self.model.layers_without_rope
        added_BSH = self._attention(read_BSH, prefix + "self_attention.", window_tokens, rotates)
        if after:
            added_BSH = self._norm(added_BSH, prefix + "post_self_attn_layernorm")
        attended_BSH = hidden_BSH + added_BSH
        read_BSH = hidden_BSH if self.model.parallel_residual else attended_BSH
        if before:
            read_BSH = self._norm(read_BSH, prefix + "pre_mlp_layernorm")
        feed_forward = self._mixture if self.model.experts else self._feed_forward
        added_BSH = feed_forward(read_BSH, prefix + "mlp.")
        if after:
            added_BSH = self._norm(added_BSH, prefix + "post_mlp_layernorm")
        return attended_BSH + added_BSH

    def _feed_forward(self, normed_BSH: Tensor, prefix: str) -> Tensor:
        activate = ACTIVATIONS[self.model.activation]
        up = self._linear(normed_BSH, prefix + "linear_fc1")
        if self.model.gated_feed_forward:
            gate, up = up.chunk(2, dim=-1)
            return self._linear(activate(gate) * up, prefix + "linear_fc2")
        return self._linear(activate(up), prefix + "linear_fc2")

    def _linear(self, x: Tensor, place: str) -> Tensor:
        return F.linear(x, self.weight(place + ".weight"), self.optional_weight(place + ".bias"))

    def _mixture(self, normed_BSH: Tensor, prefix: str) -> Tensor:
        """Every expert computes every token; the sum has weight 0 for the experts not chosen."""
        model = self.model
        logits_BSE = normed_BSH @ self.weight(prefix + "router.weight").T
        probability_BSE = logits_BSE.softmax(-1)
        best = logits_BSE.topk(model.experts_per_token, dim=-1).indices
        chosen_BSE = torch.zeros_like(probability_BSE).scatter(-1, best, 1.0)
        weight_BSE = probability_BSE * chosen_BSE
        if model.renormalize_experts:
            weight_BSE = weight_BSE / weight_BSE.sum(-1, keepdim=True)
        self.routed.append((logits_BSE, chosen_BSE))
        sum_BSH = torch.zeros_like(normed_BSH)
        for expert in range(model.experts):
            output_BSH = self._feed_forward(normed_BSH, f"{prefix}experts.local_experts.{expert}.")
            sum_BSH = sum_BSH + weight_BSE[..., expert, None] * output_BSH
        return sum_BSH

    def auxiliary_losses(self, micro_batches: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(load-balancing loss, router z-loss) of the last forward pass.

        Sums over layers, means over micro-batches (lists of rows of the batch). The balance is that
        of the Switch Transformer: experts * sum over experts of (fraction of the choices) * (mean
        probability), which is 1 when even.
        """
        model = self.model
        balance = torch.zeros(())
        z_loss = torch.zeros(())
        for logits_BSE, chosen_BSE in self.routed:
            for rows in micro_batches:
                row_z_loss = logits_BSE[rows].logsumexp(-1).square().mean()
                z_loss = z_loss + row_z_loss / len(micro_batches)
                by_sequence = model.load_balancing == "sequence"
                parts = [[row] for row in rows] if by_sequence else [rows]
                for part in parts:
                    choice_E = chosen_BSE[part].flatten(0, 1).mean(0) / model.experts_per_token
                    probability_E = logits_BSE[part].softmax(-1).flatten(0, 1).mean(0)
                    part_balance = model.experts * (choice_E * probability_E).sum()
                    balance = balance + part_balance / len(parts) / len(micro_batches)
        return balance, z_loss

    def _attention(
        self, normed_BSH: Tensor, prefix: str, window_tokens: int, rotates: bool
    ) -> Tensor:
        """window_tokens: how many tokens a token sees, itself included; 0 = all before it."""
        model = self.model
        groups = model.query_groups or model.attention_heads
        size = model.head_size or model.hidden_size // model.attention_heads
        per_group = model.attention_heads // groups
        mixed = self._linear(normed_BSH, prefix + "linear_qkv")
        mixed = mixed.view(*mixed.shape[:2], groups, per_group + 2, size)
        query = mixed[..., :per_group, :].flatten(2, 3)
        key = mixed[..., -2, :]
        value = mixed[..., -1, :]
        if model.qk_norm:
            query = self._norm_of_heads(query, prefix + "q_layernorm")
            key = self._norm_of_heads(key, prefix + "k_layernorm")
        if rotates:
            query = rotated(query, model, windowed=window_tokens > 0)
            key = rotated(key, model, windowed=window_tokens > 0)
        key = key.repeat_interleave(per_group, dim=2)
        value = value.repeat_interleave(per_group, dim=2)
        scores = torch.einsum("bqnd,bknd->bnqk", query, key)
        scores = scores / math.sqrt(model.attention_scale_size or size)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        if window_tokens:
            hidden = hidden | torch.ones_like(hidden).tril(-window_tokens)
        context = torch.einsum(
            "bnqk,bknd->bqnd", scores.masked_fill(hidden, -math.inf).softmax(-1), value
        )
        return self._linear(context.flatten(2), prefix + "linear_proj")

    def _norm(self, x: Tensor, place: str) -> Tensor:
        centred = self.model.normalization == "layernorm"
        if centred:
            x = x - x.mean(-1, keepdim=True)
        variance = x.pow(2).mean(-1, keepdim=True)
        weight = self.weight(place + ".weight")
        factor = 1 + weight if self.model.zero_centered_norms else weight
        normed = x * torch.rsqrt(variance + self.model.norm_epsilon) * factor
        return normed + self.weight(place + ".bias") if centred else normed

    def _norm_of_heads(self, x_BSnd: Tensor, place: str) -> Tensor:
        if self.model.qk_norm_over == "head":
            return self._norm(x_BSnd, place)
        return self._norm(x_BSnd.flatten(2), place).view(x_BSnd.shape)
