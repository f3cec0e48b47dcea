"""Tiny random models of each architecture, and a tokenizer for them. Not a test file."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WORDS = "a red dog sees the blue cat and two 42 birds, near 17 trees. the dog runs; the cat sleeps!"
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<video>", "<image_start>", "<image_end>", "<unk>"]
IMAGE, VIDEO, START, END = 3, 4, 5, 6
VOCABULARY = 320

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MLA |= {"num_key_value_heads": 4}
GROUPS = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3}
MIXTRAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
QWEN = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4}
HYBRID |= {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SHARED = {"shared_expert_intermediate_size": 16}
DEEPSEEK = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, **GROUPS}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
ERNIE = {"moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 1}
GEMMA: dict[str, Any] = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 16}
GEMMA |= {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"]}

# Name of the configuration's class, its keys, and what sites to expect: layers, experts, k.
TEXT: dict[str, tuple[str, dict[str, Any], tuple[list[int], int, int]]] = {
    "dbrx": (
        "DbrxConfig",
        {
            **{"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "vocab_size": VOCABULARY},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 6, "moe_top_k": 2},
        },
        ([0, 1], 6, 2),
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**DEEPSEEK, **MLA, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
        ([1, 2], 8, 3),
    ),
    "deepseek_v3": ("DeepseekV3Config", {**DEEPSEEK, **MLA}, ([1, 2], 8, 3)),
    "dots1": ("Dots1Config", {**DEEPSEEK, "head_dim": 8}, ([1, 2], 8, 3)),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {**ERNIE, "moe_intermediate_size": 16, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
        ([1], 6, 2),
    ),
    "gemma4_text": ("Gemma4TextConfig", GEMMA, ([0, 1], 6, 2)),
    "glm4_moe": ("Glm4MoeConfig", {**DEEPSEEK, "head_dim": 8}, ([1, 2], 8, 3)),
    "gpt_oss": ("GptOssConfig", {**MIXTRAL, "head_dim": 8}, ([0, 1], 6, 2)),
    "granitemoe": ("GraniteMoeConfig", MIXTRAL, ([0, 1], 6, 2)),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {"num_experts": 6, "moe_topk": [2, 2], "head_dim": 8}, ([0, 1], 6, 2)),
    "jamba": (
        "JambaConfig",
        {
            **{"num_experts": 6, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
        },
        ([1], 6, 2),
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1},
            "layer_types": ["conv", "full_attention"],
        },
        ([1], 6, 2),
    ),
    "llama4_text": (
        "Llama4TextConfig",
        {
            **{"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size_mlp": 32},
            **{"num_hidden_layers": 4, "interleave_moe_layer_step": 2},
        },
        ([1, 3], 6, 2),
    ),
    "minimax_m2": ("MiniMaxM2Config", {**MIXTRAL, "head_dim": 8}, ([0, 1], 6, 2)),
    "mixtral": ("MixtralConfig", MIXTRAL, ([0, 1], 6, 2)),
    "olmoe": ("OlmoeConfig", {"num_experts": 6, "num_experts_per_tok": 3}, ([0, 1], 6, 3)),
    "phimoe": ("PhimoeConfig", MIXTRAL, ([0, 1], 6, 2)),
    "qwen2_moe": ("Qwen2MoeConfig", {**QWEN, **SHARED}, ([0, 1], 6, 3)),
    "qwen3_moe": ("Qwen3MoeConfig", {**QWEN, "mlp_only_layers": [0]}, ([1], 6, 3)),
    "qwen3_next": ("Qwen3NextConfig", {**QWEN, **SHARED, **HYBRID}, ([0, 1], 6, 3)),
}


def _vision(**keys: Any) -> dict[str, Any]:
    return {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "patch_size": 4, **keys}


MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
VISION_MARKS = {**MARKS, "vision_start_token_id": START, "vision_end_token_id": END}
IMAGE_MARKS = {**MARKS, "image_start_token_id": START, "image_end_token_id": END}
SEEING: dict[str, tuple[str, dict[str, Any], tuple[list[int], int, int]]] = {
    "aria": (
        "AriaConfig",
        {
            "text_config": {**BASE, "moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1},
            "vision_config": {
                **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
                **{"image_size": 980, "patch_size": 140, "model_type": "idefics3_vision"},
            },
            "projector_patch_to_query_dict": {49: 4},
            "image_token_index": IMAGE,
        },
        ([0, 1], 6, 2),
    ),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeConfig",
        {
            "text_config": {
                **{**BASE, **ERNIE, "moe_intermediate_size": [24, 16]},
                **{"mlp_layer_types": ["dense", "sparse"], "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
            },
            "vision_config": _vision(),
            **IMAGE_MARKS,
        },
        ([1, 1], 6, 2),
    ),
    "gemma4": (
        "Gemma4Config",
        {
            "text_config": {**BASE, **GEMMA},
            "vision_config": {
                **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
                **{"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2},
                "position_embedding_size": 64,
            },
            **{"boi_token_id": START, "eoi_token_id": END, "image_token_id": IMAGE, "video_token_id": VIDEO},
        },
        ([0, 1], 6, 2),
    ),
    "glm4v_moe": (
        "Glm4vMoeConfig",
        {
            "text_config": {
                **BASE,
                **DEEPSEEK,
                "head_dim": 8,
                "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0},
            },
            "vision_config": _vision(out_hidden_size=32, image_size=32),
            **IMAGE_MARKS,
        },
        ([1, 2], 8, 3),
    ),
    "llama4": (
        "Llama4Config",
        {
            "text_config": {**BASE, **MIXTRAL, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 32},
            "vision_config": {
                **{"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
                **{"image_size": 16, "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16},
                **{"projector_output_dim": 16, "pixel_shuffle_ratio": 0.5},
            },
            **{"boi_token_index": START, "eoi_token_index": END, "image_token_index": IMAGE},
        },
        ([0, 1], 6, 1),
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeConfig",
        {
            "text_config": {**BASE, **QWEN, **SHARED, **HYBRID, "rope_parameters": ROPE},
            "vision_config": _vision(out_hidden_size=32, num_position_embeddings=16),
            **VISION_MARKS,
        },
        ([0, 1], 6, 3),
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        {
            "text_config": {**BASE, **QWEN, "rope_parameters": ROPE},
            "vision_config": _vision(out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0]),
            **VISION_MARKS,
        },
        ([0, 1], 6, 3),
    ),
}
EXPECTED = {name: expected for name, (_, _, expected) in (TEXT | SEEING).items()}


def tokenizer() -> Any:
    """Byte-level, like that of most of these models: a token is a part of a word, and keeps the space before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([WORDS] * 4, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    marks = {"image_token": "<image>", "image_start_token": "<image_start>", "image_end_token": "<image_end>"}
    marks |= {f"vision_{side}_token": f"<image_{side}>" for side in ("start", "end")}
    marks |= {"video_token": "<video>", "video_start_token": "<video>", "video_end_token": "<video>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, extra_special_tokens=marks)


def build(name: str) -> nn.Module:
    """The named architecture, tiny, with weights large enough for experts and choices to matter."""
    import transformers

    kind, keys, _ = (TEXT | SEEING)[name]
    config = getattr(transformers, kind)(**({} if name in SEEING or name == "dbrx" else BASE) | keys)
    if name in SEEING:
        model = transformers.AutoModelForImageTextToText.from_config(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("per_expert_scale"):
                parameter.uniform_(0.5, 2.0, generator=generator)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2, generator=generator)
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2, generator=generator)
    return model.eval()


def processor(name: str) -> Any:
    """What the architecture reads images with: an image processor alone, or for Aria the whole processor."""
    import transformers

    if name == "aria":
        reader = transformers.AriaImageProcessor()
        return transformers.AriaProcessor(reader, tokenizer(), size_conversion={490: 2, 980: 4})
    kind = {"ernie4_5_vl_moe": "Ernie4_5_VLMoeImageProcessorPil", "glm4v_moe": "Glm4vImageProcessorPil"}
    size = {"shortest_edge": 64, "longest_edge": 32 * 32}
    if name == "glm4v_moe":  # counts two frames
        size = {key: 2 * value for key, value in size.items()}
    return getattr(transformers, kind.get(name, "Qwen2VLImageProcessorPil"))(patch_size=4, merge_size=2, size=size)


def pixels_of_gemma4(images: list[Any]) -> tuple[int, dict[str, Any]]:
    """Tokens of an image and the tensors that stand for images; Gemma 4's whole processor needs torchvision."""
    import transformers

    reader = transformers.Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    seen = dict(reader(images=images, return_tensors="pt"))
    count = int(seen.pop("num_soft_tokens_per_image")[0])
    return count, seen
