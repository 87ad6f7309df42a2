"""What is exported of a model: a module with plain tensors in and out."""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor, nn

from tools.models.model_list import ANSWER_SPAN, POOLING_MASK, SEQ2SEQ, SEQ2SEQ_MASKED, WITH_TYPES, ModelSpec


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.model = model
        self.settings = {} if spec.family == "encoder" else {"use_cache": False}

    def call(self, **inputs: Tensor) -> Any:
        return self.model(**inputs, **self.settings, return_dict=False)


class OneTensor(Wrapper):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.call(input_ids=input_ids, attention_mask=attention_mask)[0]


class Pooled(OneTensor):
    """The output is the mean over the real tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return mean_where(super().forward(input_ids, attention_mask), attention_mask)


class SentenceEmbedding(Pooled):
    """The mean over the real tokens is scaled to unit length, as sentence-transformers do it with MiniLM's states."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(input_ids, attention_mask), dim=-1)


class PooledWhereTold(OneTensor):
    """The output is the mean over the tokens that the third input marks, such as a query's behind an instruction."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pooling_mask: Tensor) -> Tensor:
        return mean_where(super().forward(input_ids, attention_mask), pooling_mask)


class FirstToken(OneTensor):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(input_ids, attention_mask)[:, 0]


class WithTypes(Wrapper):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.call(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return out[0], out[1]


class AnswerSpan(Wrapper):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.call(input_ids=input_ids, attention_mask=attention_mask)
        return out[0], out[1]


class IdsOnly(Wrapper):
    """Some models take no mask: padding is on the right, and what they mix is theirs."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.call(input_ids=input_ids * attention_mask)[0]


class OfSource(Wrapper):
    """A target of its own length, computed from a source."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.call(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids)[0]


class OfSourceMasked(Wrapper):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        return self.call(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
        )[0]


def mean_where(states: Tensor, marked: Tensor) -> Tensor:
    mask = marked.unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1.0)


BY_OUTPUT = {"mean_pooled": Pooled, "cls": FirstToken, "sentence_embedding": SentenceEmbedding, ANSWER_SPAN: AnswerSpan}


def wrap(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """Wraps a model of transformers. Models of our own are left as they are."""
    if not isinstance(model, transformers.PreTrainedModel):
        return model
    if spec.architecture == "FNetModel":
        return IdsOnly(model, spec)
    by_input = {
        POOLING_MASK: PooledWhereTold,
        WITH_TYPES[-1]: WithTypes,
        SEQ2SEQ[-1]: OfSource,
        SEQ2SEQ_MASKED[-1]: OfSourceMasked,
    }
    return (by_input.get(spec.inputs[-1]) or BY_OUTPUT.get(spec.output, OneTensor))(model, spec)
