"""The models of the golden tests, as tables: which config.json, which prompts, and what must show in the logits.

One module per family. Every case is written once in the style of the transformers version its keys come from. `misread` is a change
of the config (or of the weights) that a careless reader would make; make_golden.py refuses a case whose logits would not show it.
"""

from golden_cases import gemma2, gpt2, llama, mistral, moe, phi3, qwen
from golden_cases.case import Case
from golden_cases.smollm2 import SMOLLM2_PROMPTS, SMOLLM2_TOKENS

CASES = (*llama.CASES, *mistral.CASES, *qwen.CASES, *gpt2.CASES, *phi3.CASES, *gemma2.CASES, *moe.CASES)

__all__ = ["CASES", "SMOLLM2_PROMPTS", "SMOLLM2_TOKENS", "Case"]
