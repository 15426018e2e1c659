"""The loaders of a run: its training batches, and the batches of every validation corpus."""

from megatron_slm.config.schema import Config
from megatron_slm.data.loader import TrainingLoader, ValidationLoader
from megatron_slm.data.position import DataPosition
from megatron_slm.data.scored_dataset import training_dataset, validation_dataset
from megatron_slm.parallel import Groups
from megatron_slm.training.setup import RunInputs, index_cache
from megatron_slm.training.signals import CHECK_STEPS


def training_loader(
    config: Config, run_inputs: RunInputs, groups: Groups, position: DataPosition, samples: int
) -> TrainingLoader:
    """This rank's micro-batches of the next `samples` samples after `position`.

    Their order is one that a longer run only extends.
    """
    data = config.data
    dataset = training_dataset(
        run_inputs.corpora,
        sequence_length=position.sequence_length,
        seed=position.seed,
        samples=position.samples + samples,
        weights=position.weights,
        pasts=position.pasts,
        index_cache=index_cache(config),
        isolate_documents=data.document_policy == "isolated",
    )
    return TrainingLoader(
        dataset,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        start_sample=position.samples,
        prefetch_steps=CHECK_STEPS,
    )


def validation_loaders(
    config: Config, run_inputs: RunInputs, groups: Groups
) -> dict[str, ValidationLoader]:
    """One loader per validation corpus: the same global batches at every validation."""
    data = config.data
    return {
        name: ValidationLoader(
            validation_dataset(
                corpus,
                sequence_length=data.sequence_length,
                index_cache=index_cache(config),
                isolate_documents=data.document_policy == "isolated",
            ),
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            global_batches=config.monitoring.validation_batches,
        )
        for name, corpus in run_inputs.validation.items()
    }
