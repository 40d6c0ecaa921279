"""The demo's tokenizer: whole words and whole numbers, and bytes for everything else.

A coordinate is one token, so a box is four predictions instead of up to twelve; a digit that is read is the same token
as the count or the coordinate it spells. Invariants: any text comes back unchanged; special tokens have the ids of the
tiny presets; plain ``transformers`` loads the folder, chat template and image processor included.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from mimo_megatron.config.model import TOKEN_NAMES, SpecialTokens
from mimo_megatron.config.presets import preset

LARGEST_NUMBER = 199
# A number, a word with the space before it, the two separators of lists, or one character of anything else.
_PIECES = Regex(r"[0-9]+| ?[A-Za-z]+|, |; |[\s\S]")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def build_tokenizer(texts: Iterable[str], tokens: SpecialTokens, vocab_size: int) -> Tokenizer:
    """The tokenizer whose words are the most frequent pieces of ``texts``, as many as the vocabulary holds."""
    pre_tokenizer = Sequence([Split(_PIECES, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    specials = {getattr(tokens, field): name for field, name in TOKEN_NAMES.items()}
    assert sorted(specials) == list(range(len(specials))), "the demo's special tokens are the first ids"
    vocabulary = [specials[place] for place in range(len(specials))]
    vocabulary += sorted(ByteLevel.alphabet())
    vocabulary += [str(number) for number in range(10, LARGEST_NUMBER + 1)]
    counts = Counter(piece for text in texts for piece, _ in pre_tokenizer.pre_tokenize_str(text))
    known = set(vocabulary)
    words = [piece for piece, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0])) if piece not in known]
    vocabulary = (vocabulary + words)[:vocab_size]
    # No merges: a piece is looked up whole, or falls apart into bytes.
    tokenizer = Tokenizer(
        BPE(vocab={piece: place for place, piece in enumerate(vocabulary)}, merges=[], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(
        [AddedToken(specials[place], special=True, normalized=False) for place in range(len(specials))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes what ``AutoTokenizer`` and ``AutoProcessor`` read: tokenizer, chat template, image and video processor."""
    vision = preset("tiny-vl").vision
    assert vision is not None
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Qwen2_5_VLProcessor",
            "eos_token": TOKEN_NAMES["turn_end"],
            "pad_token": TOKEN_NAMES["pad"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
        },
    )
    patches = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "min_pixels": 3136,
        "max_pixels": 12_845_056,
        "processor_class": "Qwen2_5_VLProcessor",
    }
    _write_json(folder / "preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor", **patches})
    _write_json(folder / "video_preprocessor_config.json", {"video_processor_type": "Qwen2VLVideoProcessor", **patches})


def _write_json(path: Path, tree: dict[str, object]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
