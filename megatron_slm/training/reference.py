"""A frozen reference model beside the model in training: same parallel layout, its own (same or smaller) architecture."""

import dataclasses

from megatron_slm.checkpoint.folder import read_checkpoint_info
from megatron_slm.checkpoint.store import load_weights
from megatron_slm.config.schema import Config
from megatron_slm.model.build import build_model
from megatron_slm.parallel import Groups


def load_reference(config: Config, materials, groups: Groups) -> list | None:
    """The online reference's model chunks, in eval mode without gradients and never in fp8, which would move the choice; None when the config names none.

    ValueError when its vocabulary or tokenizer is another one: its losses would price other tokens.
    """
    checkpoint = config.selection.reference.checkpoint
    if checkpoint is None:
        return None
    info = read_checkpoint_info(checkpoint)
    if info.tokenizer["fingerprint"] != materials.tokenizer.fingerprint:
        raise ValueError(f"selection.reference.checkpoint {checkpoint} was trained with another tokenizer ({info.tokenizer['path']}); its losses price other "
                         "tokens: train a reference with this run's tokenizer")
    reference = build_model(dataclasses.replace(config, model=info.reference_model(), device=dataclasses.replace(config.device, fp8="none")), info.model["vocabulary_size"], groups, trainable=False)
    load_weights(reference, checkpoint, groups)
    return reference
