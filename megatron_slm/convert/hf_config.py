"""config.json of an exported model; its family says what stands in it (families/)."""

from collections.abc import Sequence

from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families.family import Family
from megatron_slm.convert.families.registry import family_for
from megatron_slm.tokenization import Tokenizer


def special_ids(tokenizer: Tokenizer | None, end_ids: Sequence[int] = ()) -> dict:
    """bos, eos and pad ids as config.json names them.

    Generation stops at the token that closes documents in the corpora, and at each of `end_ids`. An
    id that there is not is null.
    """
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    ends = [tokenizer.eod_id, *(end for end in end_ids if end != tokenizer.eod_id)]
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_id,
    }


def huggingface_config(
    model: ModelConfig,
    sequence_length: int,
    tokenizer: Tokenizer | None,
    dtype: str,
    end_ids: Sequence[int] = (),
    family: Family | None = None,
) -> dict:
    """config.json of an exported model, in the field names that transformers 4 and 5 both read.

    end_ids: further ids at which generation stops. family: one that can express the model; None =
    the first that can.
    """
    family = family or family_for(model)
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.config(model, sequence_length),
        "use_cache": True,
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype],
    }
    # Also where an id is null: left out it would have the default of transformers' class, and
    # SmolLM3's and Phi-3's padding (128004, 32000) is beyond a smaller vocabulary: the model could
    # not be opened.
    return config | special_ids(tokenizer, end_ids)
