"""The words of the test checkpoints: prompt templates, chat templates, text for the tokenizers.

None of it is taken from a release; only the shapes are (paragraphs, tags, turn markers).
"""

AV_TEMPLATE = """You are given one activation vector from the middle of a language model. \
Say in plain words what the text before it is about and what may come next.

The vector stands inside the <concept> tags. \
Answer with two or three short snippets inside <explanation> tags.

<concept>{injection_char}</concept>

Write the explanation of this vector now."""

AR_TEMPLATE = "Summary of the following text: <text>{explanation}</text> <summary>"

MARKERS = {"llama": "㎡", "qwen2": "㈎", "qwen3": "㈎", "gemma3_text": "㈜", "gemma3": "㈜"}

# Explanations of the kind an AV writes, for the AR and for the tokenizers' training text.
EXPLANATIONS = (
    "A cooking recipe in its middle: garlic and onion are in the pan, the next step is salt.",
    "A short news report about the weather; rain is expected in the north.\n\n"
    "It ends on a place name.",
    'Dialogue between two friends, "I will be there", about to be closed by a quotation mark.',
    "Code with braces {explanation} and {injection_char}, such as return {a: b}",
    "  leading and trailing blanks, kept as they are  ",
    "x",
)

_PROSE = """
The text is a recipe. The words before the vector name a pan, some garlic and an onion.
The text is a report about a match; the score is two to three and the next words are a name.
The final token is a comma, so a list of things goes on. A list of towns, of names or of colours.
A letter from a teacher to the parents of her class, about the trip of next week.
The writer thinks about the weather in the north, where rain and wind are expected.
Two friends speak about music, about a song that they heard in the morning, and about money.
A doctor explains what to do when a child has a fever, and when to come again.
This is the middle of a story about a dog and a cat that live in a small house by the sea.
Some code follows: a function that takes a number and gives back the sum of its parts.
The next word is likely to be a place, such as a town, a river, a street or a school.
It stands in the past tense, in the third person, and the tone is calm and a little sad.
A question has been asked; the answer should be short, in plain words, and it should be true.
The text is about the price of bread, of milk and of other goods in the market of the town.
An advice to people who travel by train: take water, take a book, and be there in time.
"""

BPE_TEXT = "\n".join(
    [
        AV_TEMPLATE.replace("{injection_char}", "") + "\n",
        AR_TEMPLATE.replace("{explanation}", ""),
        *EXPLANATIONS,
        _PROSE,
        "<explanation>\nSnippet one.\n\nSnippet two.\n</explanation>\n" * 4,
        "<concept>\n</concept>\n<text>\n</text>\n<summary>\n" * 4,
        "system\nYou are a helpful assistant.\nuser\nassistant\nmodel\n" * 2,
        "1".join("㈎㈜㎡" * 40).join("11"),  # digits stand alone, so no merge reaches over a marker
    ]
)

QWEN2_CHAT = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# No default system message; `enable_thinking=False` writes an empty thought.
QWEN3_CHAT = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# Writes the BOS itself (as the tokenizer's post-processor does too) and always a system turn.
LLAMA_CHAT = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'The text is in plain words.\\n\\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# The assistant is called "model"; a system message goes before the first user turn.
GEMMA_CHAT = """{{- bos_token }}
{%- set ns = namespace(prefix='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.prefix = messages[0]['content'] + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (ns.prefix if loop.first else '') }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] if part['type'] == 'text' %}
            {{- part['text'] | trim }}
        {%- endfor %}
    {%- endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""
