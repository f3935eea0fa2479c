"""Small models of every class of Transformers, from configs whose sizes are made small."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

VOCABULARY = 512

# Sizes by the names that configs give them.
SIZES = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff"), 64),
    **dict.fromkeys(("inner_dim", "feed_forward_size", "dff", "d_inner", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "rotary_dim", "d_kv", "dim_head", "attention_head_dim"), 8),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "mamba_ngroups", "n_shared_experts"), 1),
    "first_k_dense_replace": 1,
    **dict.fromkeys(("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("ssm_state_size", "linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank", "qk_head_dim", "mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_key_heads", "linear_num_value_heads"), 4),
    "index_n_heads": 2,
    "index_topk": 128,
    "sliding_window": 16,
    "image_size": 28,
    "patch_size": 14,
}
LAYERS = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers depth".split()
POSITIONS = "max_position_embeddings n_positions max_sequence_length max_seq_len n_ctx max_target_positions".split()

# What a class needs besides: fields of its config, by model type.
DECODER = {"is_decoder": True}
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"), DECODER),
    **dict.fromkeys(("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"), DECODER),
    "xmod": {**DECODER, "languages": ["en_XX"], "default_language": "en_XX"},
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "youtu"), LATENT),
    "bailing_hybrid": {**LATENT, "num_expert_group": 1, "linear_head_dim": 8, "linear_num_heads": 4},
    "blt": {
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
        "encoder_hash_byte_group_vocab": 100,
    },
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2},
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "gemma4": {"text_config": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}},
    **dict.fromkeys(("hunyuan_v1_dense", "ministral"), {"head_dim": 8}),
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        **DECODER,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "attention_head_size": 8,
    },
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def small_fields(config: PreTrainedConfig, positions: int) -> dict[str, Any]:
    """Return fields that make a config small: sizes, special tokens within the vocabulary, and as many layers as it has kinds of them.

    Args:
        config: the default one of its class.
        positions: to set, where the class has them.
    """
    fields = config.to_dict()
    small: dict[str, Any] = {}
    layers = next((fields[name] for name in LAYERS if isinstance(fields.get(name), int)), 0)
    n = 2
    for name, value in fields.items():
        if isinstance(value, list) and layers and len(value) == layers and all(isinstance(entry, (str, int, bool)) for entry in value):
            kinds = list(dict.fromkeys(value))
            n = max(n, min(len(kinds), 6))
            small[name] = kinds
    small = {name: (kinds * n)[:n] if len(kinds) == 1 else (kinds + kinds[-1:] * n)[:n] for name, kinds in small.items()}
    for name, value in fields.items():
        if isinstance(value, bool):
            continue
        if name in LAYERS and isinstance(value, int):
            small[name] = n
        elif name in POSITIONS and isinstance(value, int):
            small[name] = positions
        elif name in SIZES and isinstance(value, int):
            small[name] = SIZES[name]
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            small[name] = 3
        elif name.endswith("_token_id") and isinstance(value, list):
            small[name] = [3]
        elif name == "per_layer_config":
            small[name] = {}
    for name in type(config).sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            small[name] = {**({"model_type": inner.model_type} if inner.model_type else {}), **small_fields(inner, positions)}
    return merged(small, MORE.get(config.model_type, {}))


def merged(fields: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with others on top; those of inner configs one by one."""
    found = dict(fields)
    for name, value in others.items():
        found[name] = merged(found.get(name) or {}, value) if isinstance(value, Mapping) else value
    return found


def small_config(model_type: str, positions: int = 128) -> PreTrainedConfig:
    """Return a small config of a model type."""
    try:
        default = AutoConfig.for_model(model_type)
    except Exception:  # some defaults are invalid
        default = AutoConfig.for_model(model_type, **MORE.get(model_type, {}))
    return AutoConfig.for_model(model_type, **small_fields(default, positions))
