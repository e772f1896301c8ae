"""What the files of a tokenizer are called."""

from typing import Final

TOKENIZER_NAMES: Final = ("tokenizer_config.json", "tokenizer.json")
"""Where one of these is, a tokenizer is."""
TEMPLATE_NAME: Final = "chat_template.jinja"
TEMPLATES_FOLDER: Final = "additional_chat_templates"
