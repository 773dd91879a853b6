"""The tokenizer of a base model: its padding token, the date of its chat template, its fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import date
from typing import Any

from fedsb.config.inputs import ModelConfig
from fedsb.models.hub import hub_errors
from fedsb.models.names import resolve_name
from fedsb.utils.errors import UserError

NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def load_tokenizer(config: ModelConfig) -> Any:
    """Loads the model's tokenizer, with a padding token for which the model has an embedding.

    Raises UserError as `load_base` does.
    """
    from transformers import AutoConfig, AutoTokenizer

    name, _ = resolve_name(config.name)
    with hub_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=config.revision, trust_remote_code=False)
    try:
        settings = AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=False)
        vocabulary = getattr(settings.get_text_config(), "vocab_size", None)
    except (OSError, ValueError, KeyError):  # reported when the model is loaded
        vocabulary = None
    _choose_padding(tokenizer, vocabulary)
    if config.template_date is not None and writes_date(tokenizer):
        _fix_date(tokenizer, date.fromisoformat(config.template_date))
        tokenizer.fixed_date = config.template_date
    return tokenizer


def writes_date(tokenizer: Any) -> bool:
    """Returns whether the chat template writes the current date, so that the same rows have other tokens tomorrow."""
    return "strftime_now(" in json.dumps(tokenizer.chat_template or "")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Returns a fingerprint of how text becomes tokens.

    It covers the vocabulary, the normaliser and pre-tokeniser, the special tokens and the chat template.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    facts = [sorted(tokenizer.get_vocab().items()), sorted(special.items()), tokenizer.chat_template]
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        pipeline = json.loads(backend.to_str())
        steps = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens", "model")
        facts += [pipeline.get(step) for step in steps]  # not the truncation and padding of the last call
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _fix_date(tokenizer: Any, day: date) -> None:
    """Makes the chat template write this day: in training, in scores, and when the run is resumed later.

    Raises UserError for a template that computes the format of the date.
    """

    def fixed(template: str) -> str:
        written = NOW.sub(lambda call: json.dumps(day.strftime(call[2])), template)
        if "strftime_now(" in written:
            raise UserError(
                "The chat template writes the current date in a format that it computes, so that no run could be "
                "resumed or scored later with the same prompts. Give the tokenizer a chat_template with a fixed date."
            )
        return written

    found = tokenizer.chat_template
    several = isinstance(found, dict)
    tokenizer.chat_template = {name: fixed(text) for name, text in found.items()} if several else fixed(found)


def _choose_padding(tokenizer: Any, vocabulary: int | None) -> None:
    """Replaces a padding token that was added to the tokenizer and not to the model.

    Any token would do, because the attention mask hides it. It is a special one, because some classifiers look for the
    end of the text.
    """
    if vocabulary is None or tokenizer.pad_token_id is None or tokenizer.pad_token_id < vocabulary:
        return
    special = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.bos_token_id, 0)
    fitting = next(number for number in special if number is not None and number < vocabulary)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(fitting)
