"""The models that export_models.py can export, and how each is built.

Importing this file loads neither torch nor transformers, so that listing the names is fast."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tools.models.model_sources import RANDOM, hub_or_random, minilm, of_hub, smollm2

if TYPE_CHECKING:
    from torch import nn

VOCAB, HIDDEN, HEADS, MAX_TOKENS = 300, 64, 4, 256
POOLING_MASK = "pooling_mask"  # int64 [batch, tokens], 1 where the output is read
WITH_POOLING_MASK = ("input_ids", "attention_mask", POOLING_MASK)
WITH_TYPES = ("input_ids", "attention_mask", "token_type_ids")
ANSWER_SPAN = "(start_logits, end_logits)"  # of an answer in a passage
SEQ2SEQ = ("input_ids", "attention_mask", "decoder_input_ids")  # of a source, and of a target of its own length
SEQ2SEQ_MASKED = (*SEQ2SEQ, "decoder_attention_mask")

EXPORTED = "exported"
# Beside the tiny ones: a shared layer, relative positions, layers of two kinds, sliding windows, a limit by a guard,
# parallel residuals, ALiBi, no token level, an operator that LibTorch lacks, states that are fed back, sources.
_EXPORTED = (
    *(f"zoo-{name}" for name in ("albert", "t5-encoder", "modernbert", "mistral", "gptneo", "gptneox", "bloom")),
    *(f"zoo-{name}" for name in ("deberta-v2", "qwen3moe")),
    *(f"unusual-{name}" for name in ("past-llama", "states-back", "encoder-trace")),
    *(f"seq2seq-{name}" for name in ("t5", "bart", "marian", "bart-masked")),
)

Build = Callable[[], "tuple[nn.Module, str]"]  # -> module, where the weights came from


@dataclass(frozen=True)
class ModelSpec:
    name: str
    family: str  # "encoder" (bidirectional), "decoder" (causal) or "encoder-decoder"
    architecture: str  # transformers model class, or our own
    build: Build
    attention: str = "sdpa"  # "sdpa", "eager" or "none"
    output: str = "last_hidden_state"
    tokenizer: str = "tiny"
    dtype: str = "float32"
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    how: str = "trace"  # "trace", "script", "freeze" or "train"

    @property
    def group(self) -> str:
        head = self.name.split("-")[0]
        groups = {"tiny": "tiny", "unusual": "tiny", "seq2seq": "tiny", "zoo": "zoo", "classify": "zoo"}
        return groups.get(head, "peers" if self.family == "encoder-decoder" else "bench")

    @property
    def groups(self) -> tuple[str, ...]:
        """Its group, and EXPORTED if the tests run it as a program of torch.export too."""
        exportable = self.how != "freeze" and self.name != "tiny-throws"  # it raises, depending on numbers
        tested = self.name.startswith(("tiny-", "classify-")) and exportable
        tested = tested or self.name in _EXPORTED
        return (self.group, EXPORTED) if tested else (self.group,)


def _of_transformers(name: str, architecture: str, build: Build, attention: str = "sdpa", **more: Any) -> ModelSpec:
    """Family and output are those of the model class, if not said otherwise."""
    decoder = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    more = {"output": "logits", **more} if decoder else more
    return ModelSpec(name, "decoder" if decoder else "encoder", architecture, build, attention, **more)


# --- small models with random weights -------------------------------------------------------------

# As most configurations call them; those that have other names translate these (attribute_map).
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": 128,
    "max_position_embeddings": MAX_TOKENS,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# BERT-like models normalise after each layer: at 0.2 all tokens' states become nearly the same vector.
_BERT_LIKE = {"initializer_range": 0.12}
_LLAMA = {"num_key_value_heads": 2}


@dataclass(frozen=True)
class Small:
    """A transformers model of a few thousand weights, all random and large enough to matter.

    Its settings are those of _SMALL but for what is given; None leaves one out."""

    model_class: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, attention: str = "sdpa", dtype: str = "float32") -> tuple[nn.Module, str]:
        import torch
        import transformers

        torch.manual_seed(0)
        settings = {**_SMALL, "attn_implementation": attention if attention != "none" else None, **self.settings}
        model_class = getattr(transformers, self.model_class)
        config = model_class.config_class(**{name: value for name, value in settings.items() if value is not None})
        model = model_class(config)
        with torch.no_grad():  # biases and norms start at 0 and 1: a lost one would go unnoticed
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model.to(getattr(torch, dtype)), RANDOM


_BERT = Small("BertModel", _BERT_LIKE)
_TINY = {
    "bert": _BERT,
    "distilbert": Small("DistilBertModel", {"hidden_dim": 128, "initializer_range": 0.15}),
    "gpt2": Small("GPT2LMHeadModel"),
    "llama": Small("LlamaForCausalLM", {**_LLAMA, "num_hidden_layers": 4}),
}


def _ours(module: str, name: str, *sizes: int, **settings: bool) -> Build:
    """Builds a class of one of the modules beside this one."""

    def build() -> tuple[nn.Module, str]:
        import torch

        torch.manual_seed(0)
        return getattr(importlib.import_module(f"tools.models.{module}"), name)(*sizes, **settings), RANDOM

    return build


def _scripted(**settings: bool) -> Build:
    return _ours("scripted_encoder", "ScriptedEncoder", VOCAB, HIDDEN, 3, HEADS, MAX_TOKENS, **settings)


def _nan() -> tuple[nn.Module, str]:
    model, weights = _BERT()
    model.encoder.layer[1].intermediate.dense.weight.data[3, 5] = float("nan")
    return model, weights


def _tiny_models() -> list[ModelSpec]:
    def spec(kind: str, attention: str, dtype: str = "float32") -> ModelSpec:
        small = _TINY[kind]
        name = f"tiny-{kind}-{attention}" + ("-bf16" if dtype == "bfloat16" else "")
        return _of_transformers(name, small.model_class, lambda: small(attention, dtype), attention, dtype=dtype)

    def bert(name: str, build: Build = _BERT, **more: Any) -> ModelSpec:
        return _of_transformers(f"tiny-{name}", "BertModel", build, **more)

    dropout = Small("BertModel", {**_BERT_LIKE, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1})
    ours = ("encoder", "ScriptedEncoder")
    mlp = _ours("scripted_encoder", "EmbeddingMlp", VOCAB, HIDDEN)
    return [
        *(spec(kind, attention) for kind in _TINY for attention in ("sdpa", "eager")),
        spec("bert", "sdpa", "bfloat16"),
        spec("llama", "sdpa", "bfloat16"),
        spec("gpt2", "eager", "bfloat16"),
        bert("bert-types-sdpa", output="(last_hidden_state, pooler_output)", inputs=WITH_TYPES),
        bert("bert-pooled", output="mean_pooled"),
        bert("bert-pooling-mask", output="mean_pooled", inputs=WITH_POOLING_MASK),
        bert("bert-cls", output="cls"),
        ModelSpec("tiny-scripted", *ours, _scripted(use_sdpa=True), how="script"),
        ModelSpec("tiny-scripted-eager", *ours, _scripted(use_sdpa=False), "eager", how="script"),
        # Models that a wrapper should refuse, or survive.
        bert("bert-frozen", how="freeze"),
        bert("bert-training", dropout, how="train"),
        ModelSpec("tiny-mlp", "encoder", "EmbeddingMlp", mlp, "none"),
        bert("nan", _nan),
        ModelSpec("tiny-throws", *ours, _scripted(use_sdpa=True, throws=True), how="script"),
    ]


# --- of tests only: what a wrapper must refuse in words, or do right ------------------------------


def _with_past(small: Small) -> Build:
    def build() -> tuple[nn.Module, str]:
        from tools.models.unusual_models import WithPast

        model, weights = small()
        return WithPast(model), weights

    return build


def _unusual_models() -> list[ModelSpec]:
    def spec(name: str, family: str, module: str, how: str, attention: str = "sdpa", **settings: bool) -> ModelSpec:
        build = _ours("unusual_models", module, VOCAB, HIDDEN, HEADS, MAX_TOKENS, **settings)
        return ModelSpec(f"unusual-{name}", family, module, build, attention, output="see unusual_models.py", how=how)

    past = {kind: _with_past(_TINY[kind]) for kind in ("gpt2", "llama")}
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
        *(ModelSpec(f"unusual-past-{kind}", "decoder", "WithPast", past[kind], output="with past") for kind in past),
        spec("states-returned", "decoder", "StatesReturned", "script"),
        spec("states-beside", "decoder", "StatesBeside", "script"),
        spec("states-mixed", "decoder", "StatesMixed", "script"),
        spec("states-added", "decoder", "StatesAdded", "script"),
        spec("states-back", "decoder", "StatesFedBack", "script"),
    ]


# --- architectures that nothing was written for, to try generality --------------------------------

_DEBERTA = {
    "relative_attention": True,
    "position_buckets": 16,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
_MODERN_BERT = {
    "num_hidden_layers": 4,
    "global_attn_every_n_layers": 2,
    "local_attention": 8,
    "reference_compile": False,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_GEMMA = {
    **_LLAMA,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 4,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
}
_NEO = {"num_hidden_layers": 4, "window_size": 4, "attention_types": [[["global", "local"], 2]]}
_MIXTURE = {**_LLAMA, "head_dim": 16, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
# Left out: mamba. Its scan over the tokens is a Python loop, which tracing unrolls to the traced length.
_ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: attention, model class, settings that are not those of _SMALL
    "roberta": ("sdpa", "RobertaModel", {**_BERT_LIKE, "pad_token_id": 1}),
    "xlm-roberta": ("sdpa", "XLMRobertaModel", {**_BERT_LIKE, "pad_token_id": 1}),
    "albert": ("sdpa", "AlbertModel", {**_BERT_LIKE, "embedding_size": 32}),
    "t5-encoder": ("sdpa", "T5EncoderModel", {"d_kv": 16, "d_ff": 128, "initializer_factor": 1.0}),
    "mpnet": ("eager", "MPNetModel", {**_BERT_LIKE, "pad_token_id": 1}),
    "deberta-v2": ("eager", "DebertaV2Model", _DEBERTA),
    "electra": ("sdpa", "ElectraModel", {**_BERT_LIKE, "embedding_size": 32}),
    "modernbert": ("sdpa", "ModernBertModel", _MODERN_BERT),
    "gptneox": ("sdpa", "GPTNeoXForCausalLM", {"use_parallel_residual": True}),
    "gptj": ("eager", "GPTJForCausalLM", {"rotary_dim": 8}),
    "opt": ("sdpa", "OPTForCausalLM", {"ffn_dim": 128, "init_std": 0.2, "word_embed_proj_dim": HIDDEN}),
    "bloom": ("eager", "BloomForCausalLM", {}),
    "mistral": ("sdpa", "MistralForCausalLM", {**_LLAMA, "sliding_window": 4}),
    "qwen2": ("sdpa", "Qwen2ForCausalLM", _LLAMA),
    "gemma2": ("eager", "Gemma2ForCausalLM", _GEMMA),
    "gptneo": ("eager", "GPTNeoForCausalLM", _NEO),
    "phi": ("sdpa", "PhiForCausalLM", _LLAMA),
    "falcon": ("sdpa", "FalconForCausalLM", {"multi_query": True, "parallel_attn": True}),
    "xlnet": ("eager", "XLNetModel", {"d_head": HIDDEN // HEADS, "d_inner": 128, "max_position_embeddings": None}),
    "fnet": ("none", "FNetModel", {"num_attention_heads": None}),
    "convbert": (
        "eager",
        "ConvBertModel",
        {**_BERT_LIKE, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3},
    ),
    "qwen3moe": ("sdpa", "Qwen3MoeForCausalLM", _MIXTURE),
}


def _bloom() -> tuple[nn.Module, str]:
    """Bloom's own GELU is a Python autograd function, which TorchScript cannot hold; this one is equal."""
    from torch import nn

    model, weights = Small("BloomForCausalLM")("eager")
    for block in model.transformer.h:
        block.mlp.gelu_impl = nn.GELU(approximate="tanh")
    return model, weights


def _zoo_models() -> list[ModelSpec]:
    def spec(name: str, attention: str, model_class: str, settings: dict[str, Any]) -> ModelSpec:
        small = Small(model_class, settings)
        build = _bloom if name == "bloom" else lambda: small(attention)
        return _of_transformers(f"zoo-{name}", model_class, build, attention)

    return [spec(name, *entry) for name, entry in _ZOO.items()]


# --- classifiers made of decoders -----------------------------------------------------------------

_CLASSIFY: dict[str, tuple[str, dict[str, Any]]] = {
    # name: model class, settings that are not those of _SMALL
    "gpt2": ("GPT2ForSequenceClassification", {}),
    "llama": ("LlamaForSequenceClassification", _LLAMA),
    "qwen2": ("Qwen2ForSequenceClassification", {**_LLAMA, "pad_token_id": 2}),  # the end of a text pads, too
}


def _classifiers() -> list[ModelSpec]:
    def spec(name: str, model_class: str, settings: dict[str, Any]) -> ModelSpec:
        small = Small(model_class, {"num_labels": 5, **settings})
        return ModelSpec(f"classify-{name}", "decoder", model_class, small, output="logits of the last token")

    return [spec(name, *entry) for name, entry in _CLASSIFY.items()]


# --- encoder-decoders -----------------------------------------------------------------------------

_T5 = {"d_kv": 16, "d_ff": 128, "initializer_factor": 1.0, "num_layers": 3, "decoder_start_token_id": 0}
_BART = {
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "init_std": 0.2,
    "decoder_start_token_id": 2,
}
_SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    # name: model class, settings that are not those of _SMALL
    "t5": ("T5ForConditionalGeneration", _T5),
    "bart": ("BartForConditionalGeneration", _BART),
    "marian": ("MarianMTModel", _BART),
    "mbart": ("MBartForConditionalGeneration", {**_BART, "scale_embedding": True}),
    "pegasus": ("PegasusForConditionalGeneration", {**_BART, "decoder_layers": 2}),
}


def _seq2seq_models() -> list[ModelSpec]:
    def spec(kind: str, name: str = "", attention: str = "sdpa", masked: bool = False, **more: Any) -> ModelSpec:
        model_class, settings = _SEQ2SEQ[kind]
        build = lambda: Small(model_class, settings)(attention, more.get("dtype", "float32"))  # noqa: E731
        inputs = SEQ2SEQ_MASKED if masked else SEQ2SEQ
        name = f"seq2seq-{kind}" + name
        return ModelSpec(name, "encoder-decoder", model_class, build, attention, "logits", inputs=inputs, **more)

    return [
        *(spec(kind) for kind in _SEQ2SEQ),
        spec("t5", "-eager-masked", "eager", masked=True),
        spec("bart", "-eager", "eager"),
        spec("bart", "-masked", masked=True),
        spec("bart", "-bf16", dtype="bfloat16"),
    ]


# --- models of full size --------------------------------------------------------------------------

_BART_BASE = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
}


def _full_size_models() -> list[ModelSpec]:
    def spec(name: str, model_class: str, build: Build, tokenizer: str = "bert-base-uncased", **more: Any) -> ModelSpec:
        return _of_transformers(name, model_class, build, tokenizer=tokenizer, **more)

    def by_name(name: str, model_class: str, model_id: str, tokenizer: str = "bert-base-uncased") -> ModelSpec:
        return spec(name, model_class, hub_or_random(model_class, model_id), tokenizer)

    def of_source(name: str, model_class: str, model_id: str, **settings: int) -> ModelSpec:
        build = hub_or_random(model_class, model_id, **settings)
        return ModelSpec(name, "encoder-decoder", model_class, build, output="logits", inputs=SEQ2SEQ)

    def trained(name: str, model_class: str, model_id: str, **more: Any) -> ModelSpec:
        """These are trained for SQuAD 2.0, so they exist only with weights of the hub."""
        return spec(name, model_class, of_hub(model_class, model_id), output=ANSWER_SPAN, **more)

    return [
        spec("minilm", "BertModel", minilm),
        spec("minilm-pooled", "BertModel", minilm, output="sentence_embedding"),
        spec("minilm-pooled-mask", "BertModel", minilm, output="mean_pooled", inputs=WITH_POOLING_MASK),
        by_name("bert-base", "BertModel", "bert-base-uncased"),
        by_name("distilbert", "DistilBertModel", "distilbert-base-uncased"),
        trained("bert-base-squad", "BertForQuestionAnswering", "deepset/bert-base-uncased-squad2", inputs=WITH_TYPES),
        trained("distilbert-squad", "DistilBertForQuestionAnswering", "twmkn9/distilbert-base-uncased-squad2"),
        by_name("gpt2", "GPT2LMHeadModel", "gpt2", tokenizer="gpt2"),
        spec("smollm2", "LlamaForCausalLM", smollm2, "smollm2"),
        # Of benchmarks/peers only, which draws ids at random.
        of_source("t5-small", "T5ForConditionalGeneration", "google-t5/t5-small"),
        of_source("bart-base", "BartForConditionalGeneration", "facebook/bart-base", **_BART_BASE),
    ]


_ALL = (*_tiny_models(), *_unusual_models(), *_seq2seq_models(), *_full_size_models(), *_zoo_models(), *_classifiers())
MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _ALL}
GROUPS = ("tiny", "bench", "peers", "zoo", EXPORTED)
