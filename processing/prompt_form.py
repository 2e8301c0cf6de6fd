"""A processor that completes prompts: some models expect a token behind the pictures and one at the end (PaliGemma, Beyer et
al. 2024: `<image>…<image><bos>caption en\\n`), and their users write neither."""

from collections.abc import Mapping

from transformers import BatchFeature, ProcessorMixin


class PromptFormProcessor(ProcessorMixin):
    """With `prompt_form`, a text that has not yet what belongs behind the pictures gets it, and what belongs at the end.

    `prompt_form` is `{"after_images": …, "end": …}`, or `None`. A text that has the first is taken as complete, so that a
    chat template can write both, and an answer behind them.
    """

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs) -> BatchFeature:
        """As the base class. What is completed is complete: the tokenizer adds nothing (`add_special_tokens`)."""
        if self.prompt_form is not None and text is not None:
            kwargs.setdefault("add_special_tokens", False)
            complete = self.complete_prompt
            text = complete(text) if isinstance(text, str) else [complete(sample) for sample in text]
        return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def complete_prompt(self, text: str) -> str:
        """The text as the model expects it."""
        if self.prompt_form is None or self.prompt_form["after_images"] in text:
            return text
        end = text.rfind(self.image_token)
        end = 0 if end < 0 else end + len(self.image_token)
        return text[:end] + self.prompt_form["after_images"] + text[end:] + self.prompt_form["end"]


def check_prompt_form(prompt_form: Mapping | None) -> None:
    """Raise `ValueError` for anything but `None` or a dict of the two strings."""
    if prompt_form is not None and (set(prompt_form) != {"after_images", "end"} or not prompt_form["after_images"]):
        raise ValueError(
            f'prompt_form must be {{"after_images": …, "end": …}} with something behind the pictures, not {prompt_form}.'
        )
