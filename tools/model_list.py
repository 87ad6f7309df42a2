"""The models that export_models.py can export, and how each is built.

Importing this file loads neither torch nor transformers, so that listing the names is fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from model_sources import RANDOM, hub_or_random, minilm, smollm2

if TYPE_CHECKING:
    from torch import nn

VOCAB, HIDDEN, HEADS, MAX_TOKENS = 300, 64, 4, 256
POOLING_MASK = "pooling_mask"  # int64 [batch, tokens], 1 where the output is read
WITH_POOLING_MASK = ("input_ids", "attention_mask", POOLING_MASK)


@dataclass(frozen=True)
class ModelSpec:
    name: str
    family: str  # "encoder" (bidirectional) or "decoder" (causal)
    architecture: str  # transformers model class, or our own
    build: Callable[[], tuple[nn.Module, str]]  # -> module, where the weights came from
    attention: str = "sdpa"  # "sdpa", "eager" or "none"
    output: str = "last_hidden_state"
    tokenizer: str = "tiny"
    dtype: str = "float32"
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    how: str = "trace"  # "trace", "script", "freeze" or "train"

    @property
    def group(self) -> str:
        head = self.name.split("-")[0]
        if head == "unusual":
            return "tiny"
        return head if head in ("tiny", "zoo") else "bench"


# --- tiny models with random weights --------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A transformers model of a few thousand weights, all random and large enough to matter."""

    model_class: str
    config_class: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, attention: str = "sdpa", dtype: str = "float32") -> tuple[nn.Module, str]:
        import torch
        import transformers

        torch.manual_seed(0)
        settings = {"vocab_size": VOCAB, **self.settings}
        if attention != "none":
            settings["attn_implementation"] = attention
        config = getattr(transformers, self.config_class)(**settings)
        model = getattr(transformers, self.model_class)(config)
        with torch.no_grad():  # biases and norms start at 0 and 1: a lost one would go unnoticed
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model.to(getattr(torch, dtype)), RANDOM


_USUAL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": 128,
    "max_position_embeddings": MAX_TOKENS,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
# BERT-like models normalise after each layer: at 0.2 all tokens' states become nearly the same vector.
_BERT_LIKE: dict[str, Any] = dict(_USUAL, initializer_range=0.12)
_GPT: dict[str, Any] = {
    "n_embd": HIDDEN,
    "n_layer": 3,
    "n_head": HEADS,
    "n_positions": MAX_TOKENS,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA: dict[str, Any] = dict(_USUAL, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)

_BERT = Tiny("BertModel", "BertConfig", _BERT_LIKE)
_TINY = {
    "bert": ("encoder", _BERT),
    "distilbert": (
        "encoder",
        Tiny(
            "DistilBertModel",
            "DistilBertConfig",
            {
                "dim": HIDDEN,
                "n_layers": 3,
                "n_heads": HEADS,
                "hidden_dim": 128,
                "max_position_embeddings": MAX_TOKENS,
                "initializer_range": 0.15,
            },
        ),
    ),
    "gpt2": ("decoder", Tiny("GPT2LMHeadModel", "GPT2Config", _GPT)),
    "llama": ("decoder", Tiny("LlamaForCausalLM", "LlamaConfig", dict(_LLAMA, num_hidden_layers=4))),
}


def _scripted(**settings: bool) -> Callable[[], tuple[nn.Module, str]]:
    def build() -> tuple[nn.Module, str]:
        import torch
        from scripted_encoder import ScriptedEncoder

        torch.manual_seed(0)
        return ScriptedEncoder(VOCAB, HIDDEN, 3, HEADS, MAX_TOKENS, **settings), RANDOM

    return build


def _mlp() -> tuple[nn.Module, str]:
    import torch
    from scripted_encoder import EmbeddingMlp

    torch.manual_seed(0)
    return EmbeddingMlp(VOCAB, HIDDEN), RANDOM


def _nan() -> tuple[nn.Module, str]:
    model, weights = _BERT()
    model.encoder.layer[1].intermediate.dense.weight.data[3, 5] = float("nan")
    return model, weights


def _training() -> tuple[nn.Module, str]:
    return Tiny(
        "BertModel", "BertConfig", dict(_BERT_LIKE, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    )()


def _tiny_models() -> list[ModelSpec]:
    def spec(kind: str, attention: str, dtype: str = "float32") -> ModelSpec:
        family, tiny = _TINY[kind]
        return ModelSpec(
            f"tiny-{kind}-{attention}" + ("-bf16" if dtype == "bfloat16" else ""),
            family,
            tiny.model_class,
            lambda: tiny(attention, dtype),
            attention,
            dtype=dtype,
            output="logits" if family == "decoder" else "last_hidden_state",
        )

    bert = ("encoder", "BertModel")
    ours = ("encoder", "ScriptedEncoder")
    return [
        *(spec(kind, attention) for kind in _TINY for attention in ("sdpa", "eager")),
        spec("bert", "sdpa", "bfloat16"),
        spec("llama", "sdpa", "bfloat16"),
        spec("gpt2", "eager", "bfloat16"),
        ModelSpec(
            "tiny-bert-types-sdpa",
            *bert,
            _BERT,
            output="(last_hidden_state, pooler_output)",
            inputs=("input_ids", "attention_mask", "token_type_ids"),
        ),
        ModelSpec("tiny-bert-pooled", *bert, _BERT, output="mean_pooled"),
        ModelSpec("tiny-bert-pooling-mask", *bert, _BERT, output="mean_pooled", inputs=WITH_POOLING_MASK),
        ModelSpec("tiny-bert-cls", *bert, _BERT, output="cls"),
        ModelSpec("tiny-scripted", *ours, _scripted(use_sdpa=True), how="script"),
        ModelSpec("tiny-scripted-eager", *ours, _scripted(use_sdpa=False), "eager", how="script"),
        # Models that a wrapper should refuse, or survive.
        ModelSpec("tiny-bert-frozen", *bert, _BERT, how="freeze"),
        ModelSpec("tiny-bert-training", *bert, _training, how="train"),
        ModelSpec("tiny-mlp", "encoder", "EmbeddingMlp", _mlp, "none"),
        ModelSpec("tiny-nan", *bert, _nan),
        ModelSpec("tiny-throws", *ours, _scripted(use_sdpa=True, throws=True), how="script"),
    ]


def _unusual(name: str, **settings: bool) -> Callable[[], tuple[nn.Module, str]]:
    def build() -> tuple[nn.Module, str]:
        import torch
        import unusual_models

        torch.manual_seed(0)
        return getattr(unusual_models, name)(VOCAB, HIDDEN, HEADS, MAX_TOKENS, **settings), RANDOM

    return build


def _with_past(tiny: Tiny) -> Callable[[], tuple[nn.Module, str]]:
    def build() -> tuple[nn.Module, str]:
        from unusual_models import WithPast

        model, weights = tiny()
        return WithPast(model), weights

    return build


def _unusual_models() -> list[ModelSpec]:
    """Of tests only: what a wrapper must refuse in words, or do right."""

    def spec(name: str, family: str, module: str, how: str, attention: str = "sdpa", **settings: bool) -> ModelSpec:
        build = _unusual(module, **settings)
        return ModelSpec(f"unusual-{name}", family, module, build, attention, output="see unusual_models.py", how=how)

    return [
        spec("nested-script", "encoder", "TorchEncoder", "script"),
        spec("nested-trace", "encoder", "TorchEncoder", "trace", "none"),
        spec("nested-pooled", "encoder", "PooledTorchEncoder", "script"),
        spec("encoder-script", "encoder", "TorchEncoder", "script", nested=False),
        spec("encoder-trace", "encoder", "TorchEncoder", "trace", "none", nested=False),
        spec("encoder-layers", "encoder", "TorchLayers", "trace", "none"),
        spec("keys-pairs", "decoder", "KeysInPairs", "script"),
        spec("keys-tuple", "decoder", "KeysInATuple", "trace"),
        spec("keys-stacked", "decoder", "KeysStacked", "script"),
        spec("keys-only", "decoder", "KeysOnly", "script"),
        *(
            ModelSpec(f"unusual-past-{kind}", "decoder", "WithPast", _with_past(_TINY[kind][1]), output="with past")
            for kind in ("gpt2", "llama")
        ),
        spec("states-returned", "decoder", "StatesReturned", "script"),
        spec("states-beside", "decoder", "StatesBeside", "script"),
        spec("states-mixed", "decoder", "StatesMixed", "script"),
        spec("states-added", "decoder", "StatesAdded", "script"),
        spec("states-back", "decoder", "StatesFedBack", "script"),
    ]


# --- architectures that nothing was written for, to try generality --------------------------------

_NEO: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_layers": 4,
    "num_heads": HEADS,
    "intermediate_size": 128,
    "window_size": 4,
    "attention_types": [[["global", "local"], 2]],
    "max_position_embeddings": MAX_TOKENS,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Left out: mamba. Its scan over the tokens is a Python loop, which tracing unrolls to the traced length.
_ZOO: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    # name: family, attention, model class, configuration class, settings
    "roberta": ("encoder", "sdpa", "RobertaModel", "RobertaConfig", dict(_BERT_LIKE, pad_token_id=1)),
    "albert": ("encoder", "sdpa", "AlbertModel", "AlbertConfig", dict(_BERT_LIKE, embedding_size=32)),
    "t5-encoder": (
        "encoder",
        "sdpa",
        "T5EncoderModel",
        "T5Config",
        {"d_model": HIDDEN, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": HEADS, "initializer_factor": 1.0},
    ),
    "mpnet": ("encoder", "eager", "MPNetModel", "MPNetConfig", dict(_BERT_LIKE, pad_token_id=1)),
    "deberta-v2": (
        "encoder",
        "eager",
        "DebertaV2Model",
        "DebertaV2Config",
        dict(
            _USUAL,
            relative_attention=True,
            position_buckets=16,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
        ),
    ),
    "electra": ("encoder", "sdpa", "ElectraModel", "ElectraConfig", dict(_BERT_LIKE, embedding_size=32)),
    "modernbert": (
        "encoder",
        "sdpa",
        "ModernBertModel",
        "ModernBertConfig",
        dict(
            _USUAL,
            num_hidden_layers=4,
            global_attn_every_n_layers=2,
            local_attention=8,
            reference_compile=False,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
    ),
    "gptneox": (
        "decoder",
        "sdpa",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        dict(_USUAL, use_parallel_residual=True, bos_token_id=1, eos_token_id=2),
    ),
    "gptj": ("decoder", "eager", "GPTJForCausalLM", "GPTJConfig", dict(_GPT, rotary_dim=8)),
    "opt": (
        "decoder",
        "sdpa",
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": 3,
            "num_attention_heads": HEADS,
            "ffn_dim": 128,
            "init_std": 0.2,
            "max_position_embeddings": MAX_TOKENS,
            "word_embed_proj_dim": HIDDEN,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bloom": (
        "decoder",
        "eager",
        "BloomForCausalLM",
        "BloomConfig",
        {
            "hidden_size": HIDDEN,
            "n_layer": 3,
            "n_head": HEADS,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "mistral": ("decoder", "sdpa", "MistralForCausalLM", "MistralConfig", dict(_LLAMA, sliding_window=4)),
    "qwen2": ("decoder", "sdpa", "Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "gemma2": (
        "decoder",
        "eager",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        dict(
            _LLAMA,
            num_hidden_layers=4,
            head_dim=16,
            sliding_window=4,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=10.0,
        ),
    ),
    "gptneo": ("decoder", "eager", "GPTNeoForCausalLM", "GPTNeoConfig", _NEO),
    "phi": ("decoder", "sdpa", "PhiForCausalLM", "PhiConfig", _LLAMA),
    "falcon": (
        "decoder",
        "sdpa",
        "FalconForCausalLM",
        "FalconConfig",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": 3,
            "num_attention_heads": HEADS,
            "max_position_embeddings": MAX_TOKENS,
            "initializer_range": 0.2,
            "multi_query": True,
            "parallel_attn": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "xlnet": (
        "encoder",
        "eager",
        "XLNetModel",
        "XLNetConfig",
        {
            "d_model": HIDDEN,
            "n_layer": 3,
            "n_head": HEADS,
            "d_inner": 128,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "fnet": (
        "encoder",
        "none",
        "FNetModel",
        "FNetConfig",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": 3,
            "intermediate_size": 128,
            "max_position_embeddings": MAX_TOKENS,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "convbert": (
        "encoder",
        "eager",
        "ConvBertModel",
        "ConvBertConfig",
        dict(_BERT_LIKE, embedding_size=32, head_ratio=2, conv_kernel_size=3),
    ),
    "qwen3moe": (
        "decoder",
        "sdpa",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        dict(_LLAMA, head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2),
    ),
}


def _bloom() -> tuple[nn.Module, str]:
    """Bloom's own GELU is a Python autograd function, which TorchScript cannot hold; this one is equal."""
    from torch import nn

    _family, attention, *description = _ZOO["bloom"]
    model, weights = Tiny(*description)(attention)
    for block in model.transformer.h:
        block.mlp.gelu_impl = nn.GELU(approximate="tanh")
    return model, weights


def _zoo_models() -> list[ModelSpec]:
    def spec(name: str) -> ModelSpec:
        family, attention, model_class, config_class, settings = _ZOO[name]
        tiny = Tiny(model_class, config_class, settings)
        build = _bloom if name == "bloom" else lambda: tiny(attention)
        return ModelSpec(
            f"zoo-{name}",
            family,
            model_class,
            build,
            attention,
            output="logits" if family == "decoder" else "last_hidden_state",
        )

    return [spec(name) for name in _ZOO]


_FULL_SIZE = [
    ModelSpec("minilm", "encoder", "BertModel", minilm, tokenizer="bert-base-uncased"),
    ModelSpec(
        "minilm-pooled",
        "encoder",
        "BertModel",
        minilm,
        output="sentence_embedding",
        tokenizer="bert-base-uncased",
    ),
    ModelSpec(
        "minilm-pooled-mask",
        "encoder",
        "BertModel",
        minilm,
        output="mean_pooled",
        tokenizer="bert-base-uncased",
        inputs=WITH_POOLING_MASK,
    ),
    ModelSpec(
        "bert-base",
        "encoder",
        "BertModel",
        hub_or_random("BertModel", "BertConfig", "bert-base-uncased"),
        tokenizer="bert-base-uncased",
    ),
    ModelSpec(
        "distilbert",
        "encoder",
        "DistilBertModel",
        hub_or_random("DistilBertModel", "DistilBertConfig", "distilbert-base-uncased"),
        tokenizer="bert-base-uncased",
    ),
    ModelSpec(
        "gpt2",
        "decoder",
        "GPT2LMHeadModel",
        hub_or_random("GPT2LMHeadModel", "GPT2Config", "gpt2"),
        output="logits",
        tokenizer="gpt2",
    ),
    ModelSpec("smollm2", "decoder", "LlamaForCausalLM", smollm2, output="logits", tokenizer="smollm2"),
]

_ALL = (*_tiny_models(), *_unusual_models(), *_FULL_SIZE, *_zoo_models())
MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _ALL}
GROUPS = ("tiny", "bench", "zoo")
