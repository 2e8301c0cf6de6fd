"""Helpers that the model imports late. A line as in the original's documentation:

from .modeling_part import OldStyleLMHeadModel
"""


def make_context(query, system="You are a helpful assistant."):
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"
