"""How a saved PEFT adapter of ours is loaded, for its README.md: the tuner has to be imported first."""

from __future__ import annotations

from pathlib import Path

PLACEHOLDER = "Use the code below to get started with the model.\n\n[More Information Needed]"  # of PEFT's template
IMPORT = "from spectral_diffusion import SpectralConfig"
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
USAGE = """The import of `spectral_diffusion` (`pip install spectral-diffusion`) adds this adapter's type to PEFT;
without it PEFT stops with `KeyError: 'SPECTRAL_DIFFUSION'`.

```python
{lines}
```
"""


def usage(base: str, task: str | None) -> str:
    """The lines that load an adapter of this base."""
    name = CLASSES.get(str(task or ""), "AutoModel")
    lines = [
        "from peft import PeftModel",
        f"{IMPORT}  # adds the adapter's type to PEFT",
        f"from transformers import {name}",
        "",
        f'model = {name}.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(model, "this folder")',
    ]
    return USAGE.format(lines="\n".join(lines))


def add_usage(folder: str, base: str, task: str | None) -> None:
    """Write how the adapter is loaded into the README.md of its folder, once, in the place that PEFT left for it."""
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if IMPORT in text:
        return
    if PLACEHOLDER in text:
        text = text.replace(PLACEHOLDER, usage(base, task), 1)
    else:
        text = f"{text.rstrip()}\n\n## Loading this adapter\n\n{usage(base, task)}".lstrip()
    path.write_text(text, encoding="utf-8")
