"""Keys of a `config.json` that a model of ours does not read: those without effect on its numbers, and why, and those
that may only say what it does anyway.

With the keys that are read (`ConfigReader`) these are all keys that a config may have: every other one is refused,
since what it says would be passed over. They were collected from the classes of `transformers` since version 4.0 and
from published models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Why keys have no effect on the numbers -> the keys.
WITHOUT_EFFECT: Mapping[str, tuple[str, ...]] = {
    "names": (
        *("model_type", "architectures", "_name_or_path", "name_or_path", "_commit_hash", "transformers_version"),
        *("tokenizer_class", "is_llama_config", "unsloth_fixed", "unsloth_version", "finetuning_task"),
    ),
    "code of the folder, which is never run": ("auto_map",),
    "how weights were written or are read: their own type is in their file": ("torch_dtype", "dtype", "use_bfloat16"),
    "how values start that the folder already has": ("initializer_range",),
    "how it is computed, with equal results but for rounding": (
        *("use_cache", "pretraining_tp", "chunk_size_feed_forward", "gradient_checkpointing", "torchscript"),
        *(
            "attn_implementation",
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_attn_implementation_internal",
        ),
        *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
        *("_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention", "transformers.js_config"),
    ),
    "what is returned beside logits": ("return_dict", "output_hidden_states", "output_attentions", "output_scores"),
    "heads of other tasks, whose tensors are refused": (
        *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "is_decoder"),
        *("tf_legacy_loss", "classifier_dropout"),
    ),
    "padding and text before it, which we do not have": (
        *("pad_token_id", "sep_token_id", "decoder_start_token_id", "prefix"),
    ),
    "lengths that no class reads": ("max_sequence_length", "model_max_length", "tokenizer_model_max_length"),
    "of training alone, where it is refused unless it is 0 (families.require_trainable)": ("attention_dropout",),
    "how text is sampled, which requests say": (
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
        *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
        *("num_return_sequences", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    ),
}

#: Keys of features that a model of ours does not have -> the values that do not ask for them. Null does not, either.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *("mlp_bias", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder", "rope_interleaved"),
            *("use_mrope", "use_qk_norm", "qk_layernorm", "output_router_logits"),
        ),
        (False,),
    ),
    **dict.fromkeys(("hidden_dropout", "resid_pdrop", "embd_pdrop", "mlp_dropout"), (0,)),
    "hidden_act": ("silu", "swish"),
    "pruned_heads": ({},),
    "cross_attention_hidden_size": (),
    "quantization_config": (),
    "per_layer_config": (),
}
