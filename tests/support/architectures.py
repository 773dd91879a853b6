"""Tiny random models of many architectures, built from transformers configurations: nothing is downloaded.

`ARCHITECTURES` lists them by model type. `build` writes one as a model folder with a word-level tokenizer, in float32,
in a fraction of a second. Sizes are those of `SMALL` where the configuration knows the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = [f"{kind}{i}" for kind in ("red", "blue", "green", "grey") for i in range(12)]
SPECIAL = ["[PAD]", "[UNK]", "[EOS]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = len(SPECIAL) + len(WORDS)
POSITIONS = 64

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "emb_dim": 32,
    "embedding_size": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "d_inner": 48,
    "n_inner": 48,
    "hidden_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": POSITIONS,
    "n_positions": POSITIONS,
    "n_ctx": POSITIONS,
    "max_sequence_length": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "cls_token_id": 3,
    "sep_token_id": 4,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": True,
}

MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
SSM = {"state_size": 8, "expand": 2, "conv_kernel": 4, "time_step_rank": 4}

NAMES = {
    "encoders": """
        albert bert big_bird camembert canine convbert data2vec-text deberta deberta-v2 distilbert electra
        ernie esm eurobert flaubert fnet ibert longformer luke megatron-bert mobilebert modernbert mpnet mra
        nystromformer rembert roberta roberta-prelayernorm roc_bert roformer squeezebert xlm xlm-roberta
        xlm-roberta-xl xlnet xmod yoso funnel layoutlm nomic_bert
    """,
    "encoder-decoders": """
        bart mbart led mt5 t5 umt5 plbart bigbird_pegasus
    """,
    "decoders": """
        apertus arcee bitnet bloom cohere cohere2 codegen ctrl diffllama ernie4_5 exaone4 falcon gemma
        gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite helium
        hunyuan_v1_dense llama lfm2 mistral ministral mpt nemotron olmo olmo2 olmo3 openai-gpt opt persimmon
        phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 vaultgemma xglm youtu
    """,
    "mixtures of experts": """
        deepseek_v2 deepseek_v3 ernie4_5_moe glm4_moe gpt_oss granitemoe jetmoe minimax mixtral olmoe phimoe
        qwen2_moe qwen3_moe
    """,
    "state spaces and recurrences": """
        bamba falcon_h1 falcon_mamba jamba mamba mamba2 nemotron_h recurrent_gemma rwkv qwen3_next
    """,
}

# What a type needs in addition to SMALL.
OWN: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "canine": {"vocab_size": None},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "esm": {"mask_token_id": 5, "position_embedding_type": "absolute"},
    "longformer": {"attention_window": [8, 8]},
    "luke": {"entity_vocab_size": 10},
    "mobilebert": {"intra_bottleneck_size": 16, "num_feedforward_networks": 1, "trigram_input": False},
    "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 64},
    "roc_bert": {
        "enable_pronunciation": False,
        "enable_shape": False,
        "shape_vocab_size": 8,
        "pronunciation_vocab_size": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "led": {"attention_window": 8, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "t5": {"decoder_start_token_id": 0},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "codegen": {"rotary_dim": 4},
    "ctrl": {"dff": 48},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64},
    "gptj": {"rotary_dim": 4},
    "mpt": {"max_seq_len": POSITIONS},
    "opt": {"word_embed_proj_dim": 32},
    "xglm": {"attention_heads": 4},
    "youtu": MLA,
    "deepseek_v2": MOE | MLA,
    "deepseek_v3": MOE | MLA,
    "ernie4_5_moe": MOE,
    "glm4_moe": MOE | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt_oss": MOE,
    "granitemoe": MOE,
    "jetmoe": MOE | {"kv_channels": 8},
    "minimax": MOE | {"block_size": 8},
    "mixtral": MOE,
    "olmoe": MOE,
    "phimoe": MOE,
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
    "bamba": {
        "mamba_d_state": 8,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "attn_layer_indices": [1],
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "falcon_mamba": SSM,
    "jamba": MOE
    | {
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "mamba": SSM,
    "mamba2": SSM | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "qwen3_next": MOE | {"layer_types": ["linear_attention", "full_attention"]},
}

ARCHITECTURES = [name for names in NAMES.values() for name in names.split()]


def config_of(model_type: str, **changes: Any) -> Any:
    """Returns a tiny configuration of this model type. Keys that its class does not know are left out."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(model_type)
    names = set(known.to_dict()) | set(getattr(type(known), "attribute_map", {}))
    facts = {key: value for key, value in SMALL.items() if key in names}
    own = {**OWN.get(model_type, {}), **changes}
    facts = {key: value for key, value in {**facts, **own}.items() if value is not None}
    return AutoConfig.for_model(model_type, **facts)


def save_tokenizer(folder: Path, *, template: str | None = None, ends: bool = False) -> None:
    """Writes a word-level tokenizer over WORDS, with a chat template where one is given.

    With `ends` it puts [EOS] behind every text, as those of encoder-decoders do.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        inner.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    names = {"pad": 0, "unk": 1, "eos": 2, "cls": 3, "sep": 4, "mask": 5}
    special = {f"{name}_token": SPECIAL[i] for name, i in names.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=POSITIONS, **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def save_byte_tokenizer(folder: Path) -> None:
    """Writes a byte-level BPE tokenizer trained on WORDS: Qwen2's class takes no other kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator([" ".join(WORDS)], trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=POSITIONS, **special).save_pretrained(folder)


def build(folder: Path, model_type: str, auto_class: str, *, seed: int = 0, **changes: Any) -> Path:
    """Writes a tiny random model of this type, as `auto_class` has it, with its tokenizer, and returns the folder.

    Raises ValueError where transformers has no such class for this type.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    config = config_of(model_type, **changes)
    if auto_class == "AutoModelForSequenceClassification":
        config.num_labels = 3
    model = getattr(transformers, auto_class).from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if model_type == "qwen2":
        save_byte_tokenizer(folder)
    else:
        save_tokenizer(folder, ends=config.is_encoder_decoder)
    return folder


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
