"""Model cards, and Python that loads and uses an adapter or a merged model without fedsb.

Every snippet runs as it is printed, with transformers and peft alone. In a terminal it contains the folders of this
machine. In a card it refers to the current folder, so that the folder can be moved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fedsb.adapters.export import BaseModelInfo
from fedsb.adapters.merge import DENSE, ENCODER
from fedsb.adapters.serving import Serving, serving_lines

PIPELINES = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}


def load_lines(base: BaseModelInfo, adapter: Path | str) -> str:
    """Returns Python that loads the adapter onto the base model of this machine, and uses it."""
    return _adapter_snippet(base, repr(str(adapter)), repr(str(base.name)), names="PeftModel")


def card_lines(base: BaseModelInfo) -> str:
    """Returns Python for a card, to be run in the adapter's own folder."""
    if not base.is_local:
        return _adapter_snippet(base, '"."  # this folder', json.dumps(base.shared_name), names="PeftModel")
    name = "PeftConfig.from_pretrained(adapter).base_model_name_or_path  # the folder of the base model"
    return _adapter_snippet(base, '"."  # this folder', name, names="PeftConfig, PeftModel")


def _adapter_snippet(base: BaseModelInfo, adapter: str, name: str, *, names: str) -> str:
    quantised = ", ".join(f"{key}={value!r}" for key, value in base.quantization.items())
    options = f", revision={base.revision!r}" if base.revision else ""
    options += f", quantization_config=BitsAndBytesConfig({quantised})" if quantised else ""
    options += ", config=config, ignore_mismatched_sizes=True" if base.label_names else ""
    classes = ["AutoConfig"] if base.label_names else []
    classes += [base.auto_class, "AutoTokenizer", *(["BitsAndBytesConfig"] if quantised else [])]
    lines = [
        *([] if base.label_names else ["import torch"]),
        f"from peft import {names}",
        f"from transformers import {', '.join(classes)}",
        "",
        f"adapter = {adapter}",
        f"base_model = {name}",
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
        *(
            ["config = AutoConfig.from_pretrained(adapter)  # with the names of the outputs"]
            if base.label_names
            else []
        ),
        f"base = {base.auto_class}.from_pretrained(base_model{options})",
        "model = PeftModel.from_pretrained(base, adapter).eval()",
        "",
        *_use(base),
    ]
    return "\n".join(lines)


def merged_lines(base: BaseModelInfo, folder: Path | str | None = None) -> str:
    """Returns Python that loads a merged model from `folder` (default: the current folder), and uses it."""
    where = '"."  # this folder' if folder is None else repr(str(folder))
    if not base.averages:
        lines = [
            *([] if base.label_names else ["import torch"]),
            f"from transformers import {base.auto_class}, AutoTokenizer",
            "",
            f"folder = {where}",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            f"model = {base.auto_class}.from_pretrained(folder).eval()",
            *(["config = model.config"] if base.label_names else []),
            "",
            *_use(base),
        ]
        return "\n".join(lines)
    number = base.problem_type == "regression"
    lines = [
        "import json",
        "from pathlib import Path",
        "",
        "import torch",
        "from safetensors.torch import load_file",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        f"folder = {where}",
        f'tokenizer = AutoTokenizer.from_pretrained(folder + "/{ENCODER}")',
        f'encoder = AutoModel.from_pretrained(folder + "/{ENCODER}").eval()',
        f'head = load_file(folder + "/{DENSE}/model.safetensors")',
        *([] if number else ['names = json.loads(Path(folder, "labels.json").read_text())']),
        "",
        *_batch(base),
        "states = encoder(**batch).last_hidden_state",
        *_mean("states"),
        'logits = torch.nn.functional.linear(states, head["linear.weight"], head.get("linear.bias"))',
        *(["print(logits[:, 0].tolist())"] if number else ["print([names[i] for i in logits.argmax(-1).tolist()])"]),
    ]
    return "\n".join(lines)


def _batch(base: BaseModelInfo) -> list[str]:
    texts = ['texts = ["A first text.", "A second, longer text."]']
    texts += ['pairs = ["A pair of the first.", "A pair of the second."]'] if base.pair else []
    read = "texts, pairs" if base.pair else "texts"
    how = f'padding=True, truncation=True, max_length={base.max_tokens}, return_tensors="pt"'
    return [*texts, f"batch = tokenizer({read}, {how})"]


def _mean(name: str) -> list[str]:
    """Returns the lines that average over a text's tokens, without padding."""
    return [
        'mask = batch["attention_mask"].unsqueeze(-1)',
        f"{name} = ({name} * mask).sum(1) / mask.sum(1)  # the mean over each text's tokens",
    ]


def _use(base: BaseModelInfo) -> list[str]:
    """Returns the lines that use `model`, `tokenizer` and, for a classifier, `config`."""
    if base.label_names:
        number = base.problem_type == "regression"
        return [
            *_batch(base),
            "logits = model(**batch).logits",
            *(_mean("logits") if base.averages else []),
            "print(logits[:, 0].tolist())"
            if number
            else "print([config.id2label[i] for i in logits.argmax(-1).tolist()])",
        ]
    prompt = "What is the capital of France?"
    if base.chat:
        lines = [
            f'messages = [{{"role": "user", "content": {json.dumps(prompt)}}}]',
            "text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
        ]
    else:
        text = json.dumps(base.template.replace("{prompt}", prompt))
        lines = [f"text = {text}"]
    lines.append("tokens = tokenizer(text, add_special_tokens=False).input_ids")
    read = "[tokenizer.bos_token_id, *tokens]" if base.starts else "tokens"
    limits = f"max_new_tokens=32, do_sample=False, eos_token_id={list(base.ends) or None}"
    cut = "".join(f".split({json.dumps(stop)})[0]" for stop in base.stops)
    return [
        *lines,
        f"ids = torch.tensor([{read}])",
        f"out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), {limits})",
        f"print(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True){cut})",
    ]


def model_card(base: BaseModelInfo, facts: Mapping[str, str], servers: Sequence[Serving] = ()) -> str:
    """Returns an adapter's card in Markdown: how it was trained, its score, and how to load it."""
    lines = "\n".join(f"- {line}" for line in serving_lines([asdict(server) for server in servers]))
    quantised = (
        "\nThe adapter was trained on the base quantised as above. On the unquantised base, its scores differ.\n"
        if base.quantization
        else ""
    )
    return (
        _front(base, library_name="peft")
        + "# A LoRA adapter, trained with federated learning by fedsb\n\n"
        + _table(base, facts)
        + f"\n## Usage\n\n```python\n{card_lines(base)}\n```\n"
        + quantised
        + _notes(base)
        + (f"\n## Serving\n\n{lines}\n" if lines else "")
        + _outputs(base)
    )


def merged_card(base: BaseModelInfo, facts: Mapping[str, str], licence: str | None = None) -> str:
    """Returns the card of a merged model; `licence` is the base's, if it is known."""
    library = "sentence-transformers" if base.averages else "transformers"
    plain = f"```python\n{merged_lines(base)}\n```\n"
    return (
        _front(base, library_name=library, licence=licence)
        + "# A model, trained with federated learning by fedsb\n\n"
        + "The base model with a LoRA adapter merged into its weights.\n\n"
        + _table(base, facts)
        + f"\n## Usage\n\n{_short_usage(base)}{plain}"
        + _notes(base)
        + _outputs(base)
    )


def _short_usage(base: BaseModelInfo) -> str:
    """Returns how to use a merged classifier with a single call of a library."""
    first = '("A first text.", "A pair of the first.")' if base.pair else '"A first text."'
    if base.averages:
        return (
            "This is a folder of sentence-transformers: an encoder, the mean over a text's tokens, and a linear layer "
            "with one logit per output. transformers has no such class, so its text-classification pipeline refuses "
            "the folder.\n\n```python\nfrom sentence_transformers import SentenceTransformer\n\n"
            f'logits = SentenceTransformer(".").encode([{first}])\n```\n\nWith transformers alone:\n\n'
        )
    if not base.label_names:
        return ""
    if base.pair:
        first = '{"text": "A first text.", "text_pair": "A pair of the first."}'
    return (
        '```python\nfrom transformers import pipeline\n\nmodel = pipeline("text-classification", model=".")\n'
        f"print(model([{first}], truncation=True))\n```\n\nWithout a pipeline:\n\n"
    )


def _front(base: BaseModelInfo, *, library_name: str, licence: str | None = None) -> str:
    """Returns the card's metadata. It contains no local folder, which would mean nothing to others."""
    lines = [] if base.is_local else [f"base_model: {json.dumps(base.shared_name)}"]
    lines += [] if licence is None else [f"license: {json.dumps(licence)}"]
    lines += [f"library_name: {library_name}"]
    lines += [] if base.averages else [f"pipeline_tag: {PIPELINES[base.task_type]}"]
    return "\n".join(["---", *lines, "tags: [lora, federated-learning, fedsb]", "---", "", ""])


def _table(base: BaseModelInfo, facts: Mapping[str, str]) -> str:
    name = f"a local folder, `{Path(base.shared_name).resolve().name}`" if base.is_local else base.shared_name
    name += f": {base.origin}" if base.origin else ""
    rows = {"Base model": name, **facts}
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def _notes(base: BaseModelInfo) -> str:
    """Returns the settings that a user needs to reproduce the scores."""
    if base.label_names:
        return f"\nTexts are truncated to {base.max_tokens} tokens, as in training.\n"
    ends = (
        f"Generation ends at the tokens {', '.join(map(str, base.ends))}. Pass them as `eos_token_id`, since the base "
        "model's own generation config may contain different ones."
        if base.ends
        else "The tokenizer has no end token, so the model was not trained to stop before `max_new_tokens`."
    )
    cut = f" A generated text is cut before {' or '.join(map(repr, base.stops))}." if base.stops else ""
    return f"\n## End of generation\n\n{ends}{cut}\n"


def _outputs(base: BaseModelInfo) -> str:
    if not base.label_names:
        return ""
    heading = "Output" if base.problem_type == "regression" else "Classes"
    return f"\n## {heading}\n\n" + "".join(f"- {i}: {name}\n" for i, name in enumerate(base.label_names))
