"""Every key of a config.json is used by an import, is known not to change what the model computes,
or is refused by name.

A key that nobody reads may change every logit: transformers' own models follow `is_causal`, and
forks of them follow keys of their own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_GENERATION = frozenset(
    (
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "use_cache",
    )
)
"""Keys of generation that configurations of transformers 4 hold."""
_WITHOUT_EFFECT = _GENERATION | {
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "bos_token_id",
    "decoder_start_token_id",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "max_sequence_length",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
}
"""Identity, tokens, training, storage and outputs: none of them changes a logit in evaluation.

pretraining_tp (transformers 4) splits matrix products and changes their rounding only.
"""
_ONLY: dict[str, Any] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "is_causal": True,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "per_layer_config": {},
    "pruned_heads": {},
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
}
"""Keys with the one value that says what the decoder here does."""
_HINTS = {
    "attention_bias": "this family has no biases in attention here (Llama and GPT-NeoX have)",
    "auto_map": "the model has code of its own; take the key out if its built-in class computes "
    "the same",
    "is_causal": "attention here is causal",
    "mlp_bias": "this family has no biases in its feed-forward layers here (Llama has)",
    "quantization_config": "quantised weights cannot be trained on: dequantise and save the model "
    "first",
}
_ALIASES = (("num_experts", "num_local_experts"), ("dtype", "torch_dtype"))
"""Two names of one setting."""


def key_problems(config: Mapping[str, Any], used: frozenset[str]) -> Iterator[str]:
    """One phrase for each key of a config.json that cannot be followed.

    used: the keys that its family uses. A key that is null is not set.
    """
    for key, value in sorted(config.items()):
        if value is None or key in used or key in _WITHOUT_EFFECT:
            continue
        if key not in _ONLY:
            hint = _HINTS.get(
                key, "nothing here reads it; take it out if it does not change the model's output"
            )
            yield f"{key} {_short(value)}: {hint}"
        elif value != _ONLY[key]:
            hint = _HINTS.get(key, "no such model is implemented")
            yield f"{key} {_short(value)}, expected {_ONLY[key]!r}: {hint}"
    for first, second in _ALIASES:
        both = (config.get(first), config.get(second))
        if None not in both and both[0] != both[1]:
            yield f"{first} {both[0]!r} and {second} {both[1]!r} are one setting: keep one of them"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
