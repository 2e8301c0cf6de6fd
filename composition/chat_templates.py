"""Chat templates that place pictures and videos: the tokenizer's own, extended where it must be, or a plain default."""

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

#: Turns contents that are lists of text, pictures and videos into one string each, which any text-only template takes.
_FLATTEN_CONTENTS = """\
{%- set anyvlm = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message.content is defined and message.content is not none and message.content is not string -%}
    {%- set parts = namespace(text='') -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' -%}{%- set parts.text = parts.text + '<image-token>' -%}
      {%- elif part.type == 'video' -%}{%- set parts.text = parts.text + '<video-token>' -%}
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


#: Turns videos into text, for a template that places pictures itself and knows no videos.
_VIDEOS_AS_TEXT = """\
{%- set anyvlm = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message.content is defined and message.content is not none and message.content is not string -%}
    {%- set parts = namespace(all=[]) -%}
    {%- for part in message.content -%}
      {%- set text = {'type': 'text', 'text': '<video-token>'} -%}
      {%- set parts.all = parts.all + [text if part.type == 'video' else part] -%}
    {%- endfor -%}
    {%- set anyvlm.messages = anyvlm.messages + [dict(message, content=parts.all)] -%}
  {%- else -%}
    {%- set anyvlm.messages = anyvlm.messages + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = anyvlm.messages -%}
"""


def chat_template_with_images(tokenizer: PreTrainedTokenizerBase, image_token: str, video_token: str) -> str:
    """A template that writes `image_token` once for each picture of a message, and `video_token` for each video, where
    it stands.

    The tokenizer's own template is kept as it is if it does so already. If it places pictures alone, videos become
    text in front of it; if neither, all contents do. Without a template, a plain `User: … Assistant: …` format is used.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()))
    before = ""
    if not (own and _places(own, tokenizer, "image", image_token)):
        before = _FLATTEN_CONTENTS
    elif not _places(own, tokenizer, "video", video_token):
        before = _VIDEOS_AS_TEXT
    return before.replace("<image-token>", image_token).replace("<video-token>", video_token) + (own or _DEFAULT)


def _places(template: str, tokenizer: PreTrainedTokenizerBase, kind: str, token: str) -> bool:
    """Render a message with two pictures or videos and see whether both stand where they should."""
    content = [
        {"type": "text", "text": "first"},
        {"type": kind},
        {"type": "text", "text": "second"},
        {"type": kind},
    ]
    try:
        rendered, _ = render_jinja_template(
            conversations=[[{"role": "user", "content": content}]],
            chat_template=template,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError):
        return False
    pieces = rendered[0].split(token)
    return len(pieces) == 3 and "first" in pieces[0] and "second" in pieces[1]
