"""A template of questions as a chat template of transformers, in Jinja, and the parts of a text that it rendered."""

from __future__ import annotations

from tinygptv_ds.processing.templates import Template
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, IMAGE_TAG

# Messages become turns as the server makes them: consecutive ones of a role are joined by a line break, a system text
# goes before the next question unless the template has a place for it, and an assistant's greeting is left out. The
# images of a question come before its words. The targets of training, answers with the text that ends them, are marked
# as generated, for `return_assistant_tokens_mask`.
_JINJA = """\
{%- if tools or documents -%}
{{- raise_exception('tools and documents: the model was trained with images and text alone') -}}
{%- endif -%}
{%- set ns = namespace(question='', images=0, seen=0, asked=false, answer='', started=false, waiting='') -%}
{%- set ns.system = SYSTEM -%}
{%- for message in messages + [{'role': 'end', 'content': ''}] -%}
{%- set part = namespace(text='', images=0) -%}
{%- if message.content is string -%}
{%- set part.text = message.content -%}
{%- else -%}
{%- for block in message.content or [] -%}
{%- if block.type == 'text' -%}
{%- set part.text = part.text ~ ('\\n' if part.text and block.text else '') ~ block.text -%}
{%- elif block.type in ['image', 'image_url'] and message.role == 'user' -%}
{%- set part.images = part.images + 1 -%}
{%- else -%}
{{- raise_exception(message.role ~ ': content of type ' ~ block.type ~ '; there are text, and images of users') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message.role in ['system', 'developer'] -%}
{%- set ns.waiting = ns.waiting ~ ('\\n' if ns.waiting and part.text else '') ~ part.text -%}
{%- elif message.role == 'user' -%}
{%- if ns.answer -%}
{%- generation -%}
{{- AFTER_ANSWER -}}
{%- endgeneration -%}
{%- set ns.answer = '' -%}
{%- endif -%}
{%- if SYSTEM and not ns.started and not ns.asked and ns.waiting -%}
{%- set ns.system = ns.waiting -%}
{%- set ns.waiting = '' -%}
{%- endif -%}
{%- for text in [ns.waiting, part.text] -%}
{%- set ns.question = ns.question ~ ('\\n' if ns.question and text else '') ~ text -%}
{%- endfor -%}
{%- set ns.waiting = '' -%}
{%- set ns.images = ns.images + part.images -%}
{%- set ns.asked = true -%}
{%- elif message.role in ['assistant', 'end'] -%}
{%- if ns.asked -%}
{%- if message.role == 'end' -%}
{%- set ns.question = ns.question ~ ('\\n' if ns.question and ns.waiting else '') ~ ns.waiting -%}
{%- endif -%}
{%- set placed = ns.question.count(PLACEHOLDER) -%}
{%- if placed and placed != ns.images -%}
{{- raise_exception('a question holds ' ~ placed ~ ' ' ~ PLACEHOLDER ~ ', but has ' ~ ns.images ~ ' image(s)') -}}
{%- endif -%}
{{- BOS -}}
{{- '' if ns.started else ns.system ~ BEFORE -}}
{{- PREFIX -}}
{{- TAG * ns.images ~ ' ' if ns.images and not placed else '' -}}
{{- ns.question -}}
{{- PADDING if (ns.images or ns.seen) and not placed else '' -}}
{{- SUFFIX -}}
{%- set ns.seen = ns.seen + ns.images -%}
{%- set ns.images = 0 -%}
{%- set ns.question = '' -%}
{%- set ns.asked = false -%}
{%- set ns.started = true -%}
{%- endif -%}
{%- if message.role == 'end' -%}
{%- generation -%}
{{- AFTER_ANSWER if ns.answer else '' -}}
{%- endgeneration -%}
{%- elif ns.started -%}
{%- generation -%}
{{- '\\n' if ns.answer == 'text' and part.text else '' -}}
{{- part.text -}}
{%- endgeneration -%}
{%- set ns.answer = 'text' if part.text or ns.answer == 'text' else 'empty' -%}
{%- endif -%}
{%- else -%}
{{- raise_exception('role ' ~ message.role ~ ': there are system, user and assistant') -}}
{%- endif -%}
{%- endfor -%}
"""


def default_chat_template(template: Template) -> str:
    """Return the Jinja text. A question ends with what its answer follows, so that nothing is added to generate one.

    As in training, each question of the training's template begins with the BOS token; see `rendered_parts`.
    """
    prefix, _, suffix = template.question.partition("{}")
    words = {
        "SYSTEM": template.system,
        "BEFORE": template.before,
        "PREFIX": prefix,
        "SUFFIX": suffix,
        "AFTER_ANSWER": template.after_answer,
        "PADDING": " " if template.padded else "",
        "PLACEHOLDER": IMAGE_PLACEHOLDER,
        "TAG": IMAGE_TAG,
    }
    # Jinja reads the escapes of Python's literals in ASCII.
    literals = {name: ascii(text) for name, text in words.items()}
    literals["BOS"] = "bos_token" if template.add_bos_token else "''"
    definitions = "".join(f"{{%- set {name} = {literal} -%}}\n" for name, literal in literals.items())
    return definitions + _JINJA


def rendered_parts(text: str, template: Template, bos_token: str) -> tuple[str, ...]:
    """Split a text that the chat template of a training's template has rendered into what is tokenized separately.

    Every question comes after a BOS token, of which a row has only the first: nothing attends to the later ones in
    training. Answers are separate, too.
    """
    suffix = template.question.partition("{}")[2]
    parts = []
    for turn in text.removeprefix(bos_token).split(bos_token):
        question, end, answer = turn.partition(suffix) if suffix else (turn, "", "")
        parts += [question + end, answer] if answer else [question + end]
    return tuple(parts)
