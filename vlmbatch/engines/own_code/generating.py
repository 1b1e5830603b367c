"""What the models that answer through ``generate`` of transformers have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from vlmbatch.engines.transformers import END_OF_TURN, TOKENS_AROUND_STOP
from vlmbatch.records import Completion, Sampling


class Generation:
    """How a model's answers are made and where they end.

    ``ends``: the token ids that end an answer, besides those that its generation_config.json and
    its tokenizer name. The rest of generation_config.json is forgotten: how to sample is said by
    the request.
    """

    def __init__(self, model: Any, tokenizer: Any, ends: Sequence[int | None] = ()) -> None:
        from transformers import GenerationConfig

        self._decoder = copy.deepcopy(tokenizer)  # decodes while the other one encodes
        own = model.generation_config
        eos = getattr(own, "eos_token_id", None)
        known = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, *ends}
        vocabulary = tokenizer.get_vocab()
        known |= {vocabulary.get(token) for token in (*END_OF_TURN, "<|end|>")}
        self.ends = sorted(token for token in known if token is not None)
        pad = tokenizer.pad_token_id
        self.pad = self.ends[0] if pad is None and self.ends else pad
        model.generation_config = GenerationConfig(
            bos_token_id=getattr(own, "bos_token_id", None),
            eos_token_id=self.ends or None,
            pad_token_id=self.pad,
        )

    def config(self, sampling: Sampling) -> dict[str, Any]:
        """Settings of ``generate`` that have numbers for values."""
        how: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "num_beams": 1,
            "do_sample": sampling.temperature > 0,
            "repetition_penalty": sampling.repetition_penalty,
            "eos_token_id": self.ends or None,
            "pad_token_id": self.pad,
        }
        if sampling.temperature > 0:
            how |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        if sampling.min_tokens:
            how["min_new_tokens"] = sampling.min_tokens
        return how

    def stopping(self, sampling: Sampling, start: int, is_over: Callable[[], bool]) -> Any:
        """Ends an answer that nobody waits for, or that holds a stop text. ``start``: its first
        token's place in what ``generate`` returns."""
        import torch
        from transformers import StoppingCriteriaList

        most = TOKENS_AROUND_STOP + max((len(text.encode()) for text in sampling.stop), default=0)

        def stopped(ids: Any, *_: Any, **__: Any) -> Any:
            over = is_over()
            if sampling.stop and not over:
                tail = self.text(ids[0, max(start, ids.shape[1] - most) :].tolist())
                over = any(text in tail for text in sampling.stop)
            return torch.full((len(ids),), over, dtype=torch.bool, device=ids.device)

        return StoppingCriteriaList([stopped])

    def completion(self, ids: list[int], sampling: Sampling, prompt_tokens: int) -> Completion:
        """Of the tokens that were generated, without those of the prompt."""
        at = next((i for i, token in enumerate(ids) if token in self.ends), None)
        kept = ids if at is None else ids[:at]
        text = self.text(kept)
        if stops := [place for place in map(text.find, sampling.stop) if place >= 0]:
            return Completion(text[: min(stops)], "stop", prompt_tokens, len(kept))
        reason, tokens = ("length", len(ids)) if at is None else ("stop", len(kept) + 1)
        return Completion(text, reason, prompt_tokens, tokens)

    def text(self, ids: list[int]) -> str:
        """With its special tokens."""
        return str(
            self._decoder.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
