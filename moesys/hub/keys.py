"""Keys of config.json: which of ours each stands for, and those that no number of a model hangs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REQUIRED = object()
"""Default of a key that every config.json of a family has."""


@dataclass(frozen=True)
class Key:
    """A key of config.json, and ours that means the same.

    Attributes:
        theirs: its name; older files may have one of `also` instead, and all are written.
        ours: dotted, below "model."; "attention" is every mixer of the model.
        default: its value where files lack it. None: as our key's default, which an explicit null is, too.
    """

    theirs: str
    ours: str
    default: Any = None
    also: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        """Whether every file has it."""
        return self.default is REQUIRED


_GENERAL = """
    _name_or_path architectures auto_map model_type transformers_version torch_dtype dtype use_cache bos_token_id
    eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id eod_token_id im_start_id im_end_id
    id2label label2id output_hidden_states output_attentions return_dict is_encoder_decoder chunk_size_feed_forward
    problem_type tokenizer_class quantization_config max_position_embeddings max_window_layers pretraining_tp
    attn_implementation _attn_implementation output_router_logits ep_size qk_head_dim num_experts_per_device
    use_return_dict torchscript pruned_heads gradient_checkpointing language_model_only
"""
GENERAL = frozenset(_GENERAL.split())
"""Keys of config.json that no number of the model hangs on."""
_GENERATION = """
    temperature top_k top_p typical_p do_sample max_length min_length max_new_tokens num_beams num_beam_groups
    repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size early_stopping bad_words_ids
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id prefix
    num_return_sequences output_scores remove_invalid_values return_dict_in_generate suppress_tokens
    begin_suppress_tokens
"""
GENERATION = frozenset(_GENERATION.split())
"""Generation settings that older files have in config.json."""
DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "resid_dropout", "classifier_dropout")
"""Keys that must be 0: no part here drops activations."""

COMMON = (
    Key("vocab_size", "vocab_size", REQUIRED),
    Key("hidden_size", "hidden", REQUIRED),
    Key("num_attention_heads", "attention.heads", REQUIRED),
    Key("rms_norm_eps", "norm_eps", 1e-6),
    Key("tie_word_embeddings", "tie_embeddings", False),
    Key("initializer_range", "init_std", 0.02),
)
"""Keys of all families."""
GROUPED = (
    *COMMON,
    Key("num_key_value_heads", "attention.kv_heads"),
    Key("head_dim", "attention.head_dim"),
)
"""Those of families with grouped-query attention."""


def with_defaults(keys: tuple[Key, ...], **defaults: Any) -> tuple[Key, ...]:
    """`keys` with other defaults, by their names in config.json."""
    return tuple(
        Key(key.theirs, key.ours, defaults.get(key.theirs, key.default), key.also) if key.theirs in defaults else key
        for key in keys
    )
