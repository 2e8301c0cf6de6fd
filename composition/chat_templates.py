"""Chat templates that place pictures: the tokenizer's own, extended where it must be, or a plain default."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template


#: For language models that were never taught a chat format.
_DEFAULT = """\
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- 'Assistant:' -}}
    {%- generation -%}
      {{- ' ' + message.content + eos_token -}}
    {%- endgeneration -%}
    {{- '\\n' -}}
  {%- elif message.role == 'system' -%}
    {{- message.content + '\\n' -}}
  {%- else -%}
    {{- 'User: ' + message.content + '\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""

#: Turns contents that are lists of text and pictures into one string each, which any text-only template takes.
_FLATTEN_CONTENTS = """\
{%- set anyvlm = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message.content is defined and message.content is not none and message.content is not string -%}
    {%- set parts = namespace(text='') -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' -%}{%- set parts.text = parts.text + '<image-token>' -%}
      {%- elif part.text is defined -%}{%- set parts.text = parts.text + part.text -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set anyvlm.messages = anyvlm.messages + [dict(message, content=parts.text)] -%}
  {%- else -%}
    {%- set anyvlm.messages = anyvlm.messages + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = anyvlm.messages -%}
"""


def chat_template_with_images(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """A template that writes `image_token` once for each picture of a message, where it stands.

    The tokenizer's own template is kept as it is if it does so already. If not, contents are flattened to text in
    front of it. Without a template, a plain `User: … Assistant: …` format is used.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()))
    if own and _places_images(own, tokenizer, image_token):
        return own
    return _FLATTEN_CONTENTS.replace("<image-token>", image_token) + (own or _DEFAULT)


def _places_images(template: str, tokenizer: PreTrainedTokenizerBase, image_token: str) -> bool:
    """Render a message with two pictures and see whether both stand where they should."""
    content = [
        {"type": "text", "text": "first"},
        {"type": "image"},
        {"type": "text", "text": "second"},
        {"type": "image"},
    ]
    try:
        rendered, _ = render_jinja_template(
            conversations=[[{"role": "user", "content": content}]],
            chat_template=template,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError):
        return False
    pieces = rendered[0].split(image_token)
    return len(pieces) == 3 and "first" in pieces[0] and "second" in pieces[1]
