"""The demo model: a 5-million-parameter toy and its draft, shipped inside the package.

They let every command run offline and in seconds. They check the engine; they show nothing about
quality. `python -m jaxserve.demo.train` makes both again from nothing but this folder.
"""

from pathlib import Path

__all__ = ["draft_path", "target_path"]


def target_path() -> Path:
    """The Hugging Face directory of the demo model (`LlamaForCausalLM`, bfloat16)."""
    return Path(__file__).parent / "target"


def draft_path() -> Path:
    """The Hugging Face directory of its draft, a smaller model with the same tokenizer."""
    return Path(__file__).parent / "draft"
