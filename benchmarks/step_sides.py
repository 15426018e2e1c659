"""The contenders of the step benchmark: our trainer's step and megatron-core's own.

Both have the same weights, batch, layers and optimizer. Ours is what `megatron_slm.train` runs:
training.step.train_step on model.build's Decoder. The peer is an unmodified megatron-core GPTModel
of the same layer spec, with its materialised vocab_parallel_cross_entropy, in the same schedule,
DistributedDataParallel and AdamW.

Legend: B sequences of the micro-batch, S tokens of a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.measure import Unavailable, release_memory
from megatron_slm.accelerations import fp8_problem
from megatron_slm.config.schema import Config
from megatron_slm.data.batch import Batch
from megatron_slm.parallel import Groups
from megatron_slm.selection import TrainingProgress

Side = Callable[[], object]
LEARNING_RATE = 1e-5
PROGRESS = TrainingProgress(0, 0)


@dataclass(frozen=True)
class Shape:
    """A model and a micro-batch. Every step is one micro-batch of one process."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    query_groups: int
    vocabulary: int
    sequence_tokens: int
    sequences: int
    precision: str
    keep_fraction: float = 0.6

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_tokens

    def config(self) -> Config:
        config = Config()
        config.device.precision = self.precision
        config.model.layers = self.layers
        config.model.hidden_size = self.hidden
        config.model.ffn_hidden_size = self.feed_forward
        config.model.attention_heads = self.heads
        config.model.query_groups = self.query_groups
        config.data.sequence_length = self.sequence_tokens
        config.data.micro_batch_size = self.sequences
        config.data.global_batch_size = self.sequences
        config.selection.scorer = "excess_loss"
        config.selection.keep_fraction = self.keep_fraction
        config.selection.reference.scores = ["columns of the batch"]
        return config


class Bench:
    """Builds each side when first asked for: a case pays only for its own two."""

    def __init__(self, shape: Shape, groups: Groups):
        self.shape = shape
        self.groups = groups
        self.config = shape.config()
        self.sides: dict[str, Side] = {}
        self.batch = random_batch(shape, groups.device)

    @property
    def layers(self) -> str:
        """torch or transformer_engine."""
        from megatron_slm.model.build import resolve_layers

        return resolve_layers(self.config, self.groups.device.type == "cuda")

    def keep_only(self, names: set[str]) -> None:
        """Free every other side: its weights, gradients and optimizer state."""
        self.sides = {name: side for name, side in self.sides.items() if name in names}
        release_memory(self.groups.device)

    def side(self, name: str) -> Side:
        if name not in self.sides:
            self.sides[name] = getattr(self, "_" + name.replace("-", "_"))()
        return self.sides[name]

    # ---- ours

    def _precomputed(self) -> Side:
        return self._step(self.trainer(self.config))

    def _online(self) -> Side:
        from megatron_slm.model.build import build_model

        ours = (
            self.side("precomputed").trainer
            if "precomputed" in self.sides
            else self.trainer(self.config)
        )
        return self._step(
            replace(
                ours,
                reference=build_model(
                    self.config, self.shape.vocabulary, self.groups, trainable=False
                ),
            )
        )

    def _known(self) -> Side:
        """A static scorer: stored columns decide, and the head computes the chosen rows only."""
        config = self.shape.config()
        config.selection.scorer = "reference_loss"
        config.selection.head_rows = "selected"
        return self._step(self.trainer(config))

    def _fp8(self) -> Side:
        """As precomputed, with fp8 products in Transformer Engine's layers."""
        config = self.shape.config()
        config.device.fp8 = "hybrid"
        if problem := fp8_problem(self.layers, config.device.fp8_recipe):
            raise Unavailable(problem)
        return self._step(self.trainer(config))

    def _torch_layers(self) -> Side:
        """As precomputed, without Transformer Engine's layers, which cannot leave rows out."""
        return self._step(self.trainer(self._with_backward_rows("all")))

    def _last_layer(self) -> Side:
        return self._step(self.trainer(self._with_backward_rows("last_layer")))

    def _every_layer(self) -> Side:
        return self._step(self.trainer(self._with_backward_rows("every_layer_approximate")))

    def _with_backward_rows(self, rows: str) -> Config:
        config = self.shape.config()
        config.device.layers = "torch"
        config.selection.backward_rows = rows
        return config

    def _score(self) -> Side:
        from megatron_slm.model.build import build_model
        from megatron_slm.model.forward_backward import forward_losses

        models = build_model(self.config, self.shape.vocabulary, self.groups, trainable=False)
        return lambda: forward_losses(models, [self.batch], self.groups)[0]["loss"]

    def trainer(self, config: Config):
        from megatron_slm.model.build import build_model
        from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel
        from megatron_slm.training.step import Trainer
        from megatron_slm.training.token_selector import TokenSelector

        models = wrap_data_parallel(build_model(config, self.shape.vocabulary, self.groups), config)
        selector = TokenSelector(
            config.selection, self.groups, sequence_length=self.shape.sequence_tokens, corpora=1
        )
        return Trainer(models, build_optimizer(models, config), selector, self.groups)

    def _step(self, trainer) -> Side:
        from megatron_slm.training.step import train_step

        def step():
            return train_step(trainer, [self.own_batch()], PROGRESS, LEARNING_RATE)

        step.trainer = trainer
        return step

    def own_batch(self) -> Batch:
        """The batch with columns of its own: an online reference writes its losses there."""
        return replace(self.batch, columns=dict(self.batch.columns))

    # ---- megatron-core

    def _clm(self) -> Side:
        return Stock(self, fused_loss=False).step

    def _clm_fused(self) -> Side:
        return Stock(self, fused_loss=True).step

    def _forward(self) -> Side:
        return Stock(self, fused_loss=False, trainable=False).forward


class Stock:
    """megatron-core's GPTModel and its plain CLM step."""

    def __init__(self, bench: Bench, *, fused_loss: bool, trainable: bool = True):
        from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel

        self.bench = bench
        self.models = [
            stock_model(bench.config, bench.shape.vocabulary, bench.groups, fused_loss=fused_loss)
        ]
        if trainable:
            self.models = wrap_data_parallel(self.models, bench.config)
            self.optimizer = build_optimizer(self.models, bench.config)

    def step(self) -> float:
        from megatron_slm.model.optimizer import update_weights

        self.backward(self.bench.batch.loss_mask_BS)
        _, grad_norm = update_weights(self.optimizer, LEARNING_RATE)
        return grad_norm

    def backward(self, weight_BS: torch.Tensor) -> None:
        """Gradient of the mean loss under token weights, in main_grad; plain CLM: the loss mask."""
        from megatron_slm.model.forward_backward import forward_backward

        def masked(index, batch, output):
            loss_sum = (output.loss_BS.float() * weight_BS).sum()
            return loss_sum, weight_BS.sum(dtype=torch.float64), {}

        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        forward_backward(self.models, [self.bench.batch], masked, self.bench.groups)

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        batch = self.bench.batch
        return self.models[0](batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_BS)


def stock_model(
    config: Config, vocabulary: int, groups: Groups, *, fused_loss: bool
) -> torch.nn.Module:
    """GPTModel as model.build makes Decoder, with the same initial weights."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module

    from megatron_slm.config.sizes import padded_vocabulary_size
    from megatron_slm.model.build import fuse_layers, resolve_layers
    from megatron_slm.model.initialization import initialize_weights
    from megatron_slm.model.layers import layer_spec
    from megatron_slm.model.transformer_config import transformer_config

    on_gpu = groups.device.type == "cuda"
    layers = resolve_layers(config, on_gpu)
    core_config = transformer_config(config, on_gpu=on_gpu, layers=layers)
    core_config.cross_entropy_loss_fusion = fused_loss
    layers = resolve_layers(config, on_gpu)
    model = GPTModel(
        core_config,
        layer_spec(core_config, config.model, layers, None),
        padded_vocabulary_size(config, vocabulary),
        config.data.sequence_length,
        position_embedding_type="rope",
        rotary_base=config.model.rope_base,
        share_embeddings_and_output_weights=config.model.tied_embeddings,
    ).to(groups.device)
    fuse_layers(model, config, layers, groups)
    initialize_weights([model], config.run.seed, config.model)
    return model if config.device.precision == "fp32" else Float16Module(core_config, model)


def random_batch(shape: Shape, device: torch.device) -> Batch:
    """Random tokens.

    The stored reference losses spread around those of a fresh model, so that excess losses of all
    sizes occur.
    """
    generator = torch.Generator().manual_seed(0)
    size = (shape.sequences, shape.sequence_tokens)
    text_BS = torch.randint(0, shape.vocabulary, (size[0], size[1] + 1), generator=generator)
    return Batch(
        tokens_BS=text_BS[:, :-1].contiguous(),
        labels_BS=text_BS[:, 1:].contiguous(),
        loss_mask_BS=torch.ones(size),
        position_ids_BS=torch.arange(size[1]).expand(size).contiguous(),
        token_id_BS=torch.arange(shape.tokens).view(size),
        corpus_id_B=torch.zeros(size[0], dtype=torch.int64),
        columns={"reference_loss": 10.0 + torch.randn(size, generator=generator)},
    ).to(device)


def differences(bench: Bench) -> dict[str, float]:
    """Our first step against megatron-core's materialised head, from the same fresh weights.

    loss       largest relative difference of a token's loss
    selected   tokens chosen by one side only
    gradient   largest relative difference, over parameters, of the gradient of the chosen tokens'
               mean loss
    """
    from megatron_slm.model.forward_backward import forward_backward, forward_losses
    from megatron_slm.training.step import selected_loss

    trainer = bench.trainer(bench.config)
    stock = Stock(bench, fused_loss=False)
    loss_BS = forward_losses(trainer.models, [bench.batch], bench.groups)[0]["loss"]
    stock_loss_BS = stock.forward().float()
    (selection,) = trainer.selector.choose_step([bench.own_batch()], [{"loss": loss_BS}], PROGRESS)
    chosen_BS = plainly_chosen(stock_loss_BS, bench)
    for model in trainer.models:
        model.zero_grad_buffer()
    forward_backward(
        trainer.models,
        [bench.own_batch()],
        selected_loss(trainer.selector, None, PROGRESS),
        bench.groups,
    )
    stock.backward(
        selection.mask.float()
    )  # of our choice: a bf16 peer's own differs by the noise of its losses
    ours, theirs = (dict(side.models[0].module.named_parameters()) for side in (trainer, stock))
    assert ours.keys() == theirs.keys(), "the two models do not have the same parameters"
    return {
        "loss": ((loss_BS - stock_loss_BS).abs() / stock_loss_BS).max().item(),
        "selected": (selection.mask != chosen_BS).sum().item(),
        "gradient": max(_relative(ours[name].main_grad, theirs[name].main_grad) for name in ours),
    }


def plainly_chosen(loss_BS: torch.Tensor, bench: Bench) -> torch.Tensor:
    """The k tokens of highest excess loss, by sorting."""
    excess_N = (loss_BS - bench.batch.columns["reference_loss"]).flatten()
    kept = -(-round(bench.shape.keep_fraction * excess_N.numel() * 1000) // 1000)
    chosen_N = torch.zeros_like(excess_N, dtype=torch.bool)
    chosen_N[excess_N.argsort(descending=True, stable=True)[:kept]] = True
    return chosen_N.view_as(loss_BS)


def _relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()
