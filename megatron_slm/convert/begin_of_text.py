"""An exported tokenizer begins a text as the corpora's documents begin, with the begin-of-text
token or without.

tokenizer.json adds special tokens in its post-processor, which preprocessing never runs: documents
get the begin token from --prepend-bos alone, and the end token at their end. A published tokenizer
that adds one by itself (Llama 3's) would therefore feed an exported model what it never saw.
"""

import json

from tokenizers import Tokenizer as FastTokenizer

from megatron_slm.tokenization import Tokenizer

ADDERS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
"""The kinds of post-processor that add tokens; the others adjust offsets."""
SAMPLES = ("", "a", " a b", "x\n\ny 1")


def begin_token(tokenizer: Tokenizer) -> tuple[str, int]:
    """Text and id of the begin-of-text token. ValueError: the vocabulary has none."""
    bos_id = tokenizer.bos_id
    if bos_id is None:
        raise ValueError(
            f"{tokenizer.path} has no begin-of-text token, but the corpora are said to have been "
            "made with --prepend-bos; give the tokenizer they were made with"
        )
    if tokenizer.kind == "sentencepiece":
        return tokenizer.backend.id_to_piece(bos_id), bos_id
    return tokenizer.backend.id_to_token(bos_id), bos_id


def with_beginning(content: str, begin: tuple[str, int] | None) -> str:
    """A tokenizer.json that adds `begin` (text, id), or nothing, before a text, and nothing after
    it.

    `content` itself where it does so already. ValueError: it cannot be made to.
    """
    if _added(content) == _wanted(begin):
        return content
    settings = json.loads(content)
    steps = [step for step in _steps(settings.get("post_processor")) if step["type"] not in ADDERS]
    if begin is not None:
        steps.append(_template(*begin))
    settings["post_processor"] = {"type": "Sequence", "processors": steps} if steps else None
    changed = json.dumps(settings, ensure_ascii=False, indent=2)
    if _added(changed) != _wanted(begin):
        raise ValueError(
            "the tokenizer.json adds tokens to a text in a way that cannot be changed to what "
            "preprocessing did; --tokenizer none exports the weights alone"
        )
    return changed


def begins_texts(content: str) -> bool | None:
    """Whether a tokenizer.json adds something before a text; None when it depends on the text."""
    added = _added(content)
    return None if added is None else bool(added[0])


def _wanted(begin: tuple[str, int] | None) -> tuple[list[int], list[int]]:
    return ([] if begin is None else [begin[1]]), []


def _added(content: str) -> tuple[list[int], list[int]] | None:
    """Ids a tokenizer.json adds before and after a text; None when they are not always the same."""
    fast = FastTokenizer.from_str(content)
    fast.no_truncation()
    fast.no_padding()
    empty = fast.encode("").ids
    for cut in range(len(empty) + 1):
        before, after = empty[:cut], empty[cut:]
        pairs = (
            (fast.encode(text, add_special_tokens=False), fast.encode(text)) for text in SAMPLES
        )
        if all(before + plain.ids + after == full.ids for plain, full in pairs):
            return before, after
    return None


def _steps(post_processor: dict | None) -> list[dict]:
    """The single steps of a post-processor, sequences taken apart."""
    if post_processor is None:
        return []
    if post_processor["type"] != "Sequence":
        return [post_processor]
    return [step for inner in post_processor["processors"] for step in _steps(inner)]


def _template(text: str, token_id: int) -> dict:
    def token(type_id: int) -> dict:
        return {"SpecialToken": {"id": text, "type_id": type_id}}

    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [token(0), first],
        "pair": [token(0), first, token(1), second],
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]}},
    }
