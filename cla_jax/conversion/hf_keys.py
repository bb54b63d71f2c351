"""The entries of a `config.json` that are known: read, refused unless they are off, or harmless.

What is none of these may change what a model computes, and is to be told.
"""

import json
from typing import Any

from cla_jax._choices import resembled
from cla_jax.conversion.layouts import GPT_NEOX, LLAMA

__all__ = ["WHY", "note_of_unknown", "off_values", "unknown_entries"]

_WIDEST = 40  # characters of a value that a note shows

# Settings that change what a model computes and that ours has nothing for, with the values that
# switch them off.
_OFF: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "cross_attention": (None, False),
    "add_cross_attention": (None, False),
}
_OFF_BY_FAMILY: dict[str, dict[str, tuple[Any, ...]]] = {
    LLAMA: {"attention_bias": (None, False), "mlp_bias": (None, False)},
    GPT_NEOX: {"attention_bias": (None, True)},
}
WHY = {
    "attention_bias": "this library has biases on every projection (GPT-NeoX) or none (Llama)",
    "mlp_bias": "this library has biases on every projection (GPT-NeoX) or none (Llama)",
}

# Read by `from_hf_config`, beside those.
_READ = (
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings", "hidden_act", "initializer_range", "tie_word_embeddings",
    "layer_types", "rope_scaling", "rope_parameters", "sharing_pattern", "separate_kv_norm",
)  # fmt: skip
_READ_BY_FAMILY = {
    LLAMA: ("rms_norm_eps", "rope_theta", "partial_rotary_factor"),
    GPT_NEOX: ("layer_norm_eps", "use_parallel_residual", "rotary_emb_base", "rotary_pct"),
}
# They change no logit of a causal language model that is evaluated: token ids, dropout, labels of
# other heads, how a program is run, how text is drawn, where a file comes from.
_HARMLESS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "attention_dropout", "hidden_dropout", "classifier_dropout", "embedding_dropout",
    "resid_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "attn_pdrop",
    "embd_pdrop", "resid_pdrop", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "torch_dtype", "dtype", "use_bfloat16",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript",
    "gradient_checkpointing", "chunk_size_feed_forward", "pretraining_tp",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_flash_attn_2_enabled", "use_flash_attention", "use_flash_attention_2", "is_decoder",
    "is_encoder_decoder", "tie_encoder_decoder", "max_length", "min_length", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "prefix", "max_window_layers", "_name_or_path",
    "name_or_path", "_commit_hash", "transformers_version", "tokenizer_class", "auto_map",
)  # fmt: skip


def off_values(family: str) -> dict[str, tuple[Any, ...]]:
    """Settings that are not supported in a family, each with the values that switch it off."""
    return {**_OFF, **_OFF_BY_FAMILY[family]}


def unknown_entries(values: dict[str, Any], family: str) -> dict[str, Any]:
    """The entries of a `config.json` that are neither read nor known to be harmless, and not empty.

    Args:
        values: the file's.
        family: `llama` or `gpt_neox`.
    """
    known = _known(family)
    return {
        key: value
        for key, value in sorted(values.items())
        if key not in known and value is not None and value not in ([], {}, "")
    }


def note_of_unknown(values: dict[str, Any], family: str) -> str:
    """A line that names the unknown entries, with their values; empty if there are none.

    One that may be misspelt is told with the known entry that it resembles.

    Args:
        values: the file's.
        family: `llama` or `gpt_neox`.
    """
    unknown = unknown_entries(values, family)
    if not unknown:
        return ""
    known = _known(family)
    entries = ", ".join(
        f"{key}={_short(value)}{resembled(key, known)}" for key, value in unknown.items()
    )
    return (
        "note: config.json has entries that are not known here and were passed over; "
        f"what they change is lost: {entries}"
    )


def _known(family: str) -> set[str]:
    return {*_READ, *_READ_BY_FAMILY[family], *off_values(family), *_HARMLESS}


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}..."
