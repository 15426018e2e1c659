"""Whether documents begin with the begin token: compared between corpora, and between corpora and
what a checkpoint was trained on. No torch.

data_tools.preprocess writes the token with --prepend-bos. A model that was trained with it has
higher losses on documents without it, and the other way round; no other message would show the
cause.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_slm.checkpoint.folder import read_checkpoint_info
from megatron_slm.config.schema import Config
from megatron_slm.data.corpora import Corpus


def mixed_corpora(corpora: Mapping[str, bool]) -> list[str]:
    """One sentence when only some corpora have the begin token.

    corpora: by prefix, whether its documents begin with it.
    """
    with_token = [prefix for prefix, begins in corpora.items() if begins]
    without = [prefix for prefix, begins in corpora.items() if not begins]
    if not (with_token and without):
        return []
    return [
        f"documents of {', '.join(with_token)} begin with the begin token, those of "
        f"{', '.join(without)} do not: the model learns both, and its export cannot say how a "
        "prompt should begin. Make the corpora alike: preprocess all of them with --prepend-bos, "
        "or none of them"
    ]


def other_than_trained(
    checkpoint: str, tokenizer: Mapping[str, Any], corpora: Mapping[str, bool]
) -> list[str]:
    """One sentence when a checkpoint was trained on documents that begin in another way.

    tokenizer: the tokenizer entry of the checkpoint's model.json; without prepend_bos in it nothing
    is compared. corpora: by prefix, whether its documents begin with the begin token.
    """
    trained = tokenizer.get("prepend_bos")
    differing = [prefix for prefix, begins in corpora.items() if begins != trained]
    if trained is None or not differing:
        return []
    has = "begin with the begin token"
    lacks = "do not begin with the begin token"
    return [
        f"{checkpoint} was trained on documents that {has if trained else lacks}, and those of "
        f"{', '.join(differing)} {lacks if trained else has}: its losses are higher there than "
        f"they need be. Preprocess the text {'with' if trained else 'without'} --prepend-bos"
    ]


def begin_token_warnings(config: Config, corpora: Sequence[Corpus], resumed: bool) -> list[str]:
    """What differs between a run's training corpora, and between them and the checkpoints that it
    starts from or takes as its reference.
    """
    begins = {corpus.prefix: corpus.manifest.prepend_bos for corpus in corpora}
    warnings = mixed_corpora(begins)
    checkpoints = {"selection.reference.checkpoint": config.selection.reference.checkpoint}
    if not resumed:
        checkpoints["checkpoint.initialize_from"] = config.checkpoint.initialize_from
    for setting, path in checkpoints.items():
        if path:
            tokenizer = read_checkpoint_info(path).tokenizer
            warnings += other_than_trained(f"{setting} {path}", tokenizer, begins)
    return warnings
