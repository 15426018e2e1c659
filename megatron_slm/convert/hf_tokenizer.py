"""The vocabulary of an exported model: a SentencePiece model rewritten as a tokenizer.json that
gives the same ids.

Hugging Face's own LlamaTokenizer replaces the normaliser of what it loads by Llama's, so it is not
used: the exported folder names PreTrainedTokenizerFast, which runs tokenizer.json as it stands. The
ids are compared with SentencePiece's before anything is kept.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer

from megatron_slm.convert.begin_of_text import begin_token, with_beginning
from megatron_slm.convert.beside_tokenizer import read_beside
from megatron_slm.convert.probe_texts import AWKWARD_TEXTS, wider_probe
from megatron_slm.files.atomic import write_json
from megatron_slm.files.export_note import write_export_note
from megatron_slm.tokenization import Tokenizer

SPACE = "\u2581"  # SentencePiece writes a space so


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, sequence_length: int, *, prepend_bos: bool | None = None
) -> None:
    """Write the vocabulary into `folder` for transformers, and the file the corpora were made with.

    On encoding it adds what preprocessing added: the begin token where `prepend_bos` says so, and
    no end token. None, where that is not known, leaves a tokenizer.json as it is and gives a
    SentencePiece model no begin token. What lies beside the tokenizer and belongs to it goes with
    it. ValueError: the vocabulary cannot be expressed exactly.
    """
    original = tokenizer.path.read_bytes()
    beside = read_beside(tokenizer)
    settings = beside.tokenizer_settings
    if tokenizer.kind == "huggingface":
        content = original.decode()
        kept = "tokenizer.json"
    else:
        content = _rewritten(tokenizer)
        kept = "tokenizer.model"
    if prepend_bos is not None:
        content = with_beginning(content, begin_token(tokenizer) if prepend_bos else None)
    if prepend_bos is not None or tokenizer.kind == "sentencepiece":
        settings = settings | {"add_bos_token": bool(prepend_bos), "add_eos_token": False}
    if kept == "tokenizer.json" and content.encode() != original:
        kept = "corpus_tokenizer.json"
    (folder / kept).write_bytes(original)
    (folder / "tokenizer.json").write_bytes(content.encode())
    fixed = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", _special_names(tokenizer, settings) | fixed)
    beside.copy_templates(folder)
    write_export_note(folder, kept, prepend_bos)


def _rewritten(tokenizer: Tokenizer) -> str:
    """A SentencePiece model as the text of a tokenizer.json."""
    fast = from_sentencepiece(tokenizer)
    check_same_ids(fast, tokenizer)
    return fast.to_str(pretty=True)


def _special_names(tokenizer: Tokenizer, settings: dict) -> dict:
    """`settings` with the special tokens of `tokenizer`; an entry that says the same stays."""
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
    }
    name_of = (
        tokenizer.backend.id_to_piece
        if tokenizer.kind == "sentencepiece"
        else tokenizer.backend.id_to_token
    )
    named = {name: name_of(token_id) for name, token_id in ids.items() if token_id is not None}
    return settings | {
        name: text for name, text in named.items() if _content(settings.get(name)) != text
    }


def _content(entry) -> str | None:
    """The text of a special token in tokenizer_config.json, which is a string or a mapping."""
    return entry.get("content") if isinstance(entry, dict) else entry


def from_sentencepiece(tokenizer: Tokenizer) -> FastTokenizer:
    """A `tokenizers.Tokenizer` with SentencePiece's pieces, scores and normalisation."""
    from sentencepiece import sentencepiece_model_pb2

    # protobuf makes the classes of this module when it is imported.
    model_proto = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
    proto = model_proto.FromString(tokenizer.path.read_bytes())
    fast = FastTokenizer(_pieces_model(proto))
    fast.normalizer = _normalizer(proto.normalizer_spec)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence(
        steps + [decoders.Strip(" ", 1, 0)] * proto.normalizer_spec.add_dummy_prefix
    )
    kinds = proto.SentencePiece
    special = [
        AddedToken(p.piece, special=True, normalized=False)
        for p in proto.pieces
        if p.type in (kinds.CONTROL, kinds.UNKNOWN)
    ]
    fast.add_special_tokens(special)
    # SentencePiece writes spaces as SPACE before it looks for user-defined symbols, so one that
    # holds a plain space never matches.
    symbols = [p.piece for p in proto.pieces if p.type == kinds.USER_DEFINED and " " not in p.piece]
    fast.add_tokens([AddedToken(symbol, special=False, normalized=False) for symbol in symbols])
    return fast


def _pieces_model(proto):
    trainer = proto.trainer_spec
    if trainer.model_type == trainer.UNIGRAM:
        return models.Unigram(
            [(p.piece, p.score) for p in proto.pieces],
            unk_id=trainer.unk_id,
            byte_fallback=trainer.byte_fallback,
        )
    if trainer.model_type != trainer.BPE:
        raise ValueError(
            "only BPE and unigram SentencePiece models can be written as a tokenizer.json; this "
            "one is of words or characters"
        )
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    unknown = proto.pieces[trainer.unk_id].piece
    return models.BPE(
        ids,
        _merges(proto, ids),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _merges(proto, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece out of two, best-scored piece first: the order in which
    SentencePiece would merge them.
    """
    normal = {piece.piece for piece in proto.pieces if piece.type == piece.NORMAL}
    ranked = []
    for piece in proto.pieces:
        if piece.type == piece.NORMAL:
            cuts = ((piece.piece[:at], piece.piece[at:]) for at in range(1, len(piece.piece)))
            ranked += [
                (-piece.score, ids[left], ids[right], left, right)
                for left, right in cuts
                if left in normal and right in normal
            ]
    return [(left, right) for *_, left, right in sorted(ranked)]


def _normalizer(spec):
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def check_same_ids(
    fast: FastTokenizer, tokenizer: Tokenizer, texts: tuple[str, ...] = AWKWARD_TEXTS
) -> None:
    """ValueError with the first text on which the rewritten vocabulary gives other ids than
    SentencePiece.
    """
    for text in texts:
        got, expected = fast.encode(text, add_special_tokens=False).ids, tokenizer.encode(text)
        if got != expected:
            raise ValueError(
                f"{tokenizer.path} cannot be written as an exact tokenizer.json: {text[:60]!r} "
                f"gives {expected[:12]} in SentencePiece and {got[:12]} in Hugging Face. Export "
                "with --tokenizer none and ship the .model file beside the weights."
            )


def other_splits(fast: FastTokenizer, tokenizer: Tokenizer) -> tuple[int, int, list[str]]:
    """On how many texts of the wider probe the rewritten vocabulary splits otherwise, of how many,
    and the first few of them.

    A unigram model adds scores in fp32 where Hugging Face's library adds them in fp64, so that ways
    to split a text whose scores are nearly equal (runs of spaces) may fall out differently; and
    the two normalise rare characters differently.
    """
    texts = wider_probe()
    encoded = fast.encode_batch(list(texts), add_special_tokens=False)
    other = [
        text
        for text, encoding in zip(texts, encoded, strict=True)
        if encoding.ids != tokenizer.encode(text)
    ]
    return len(other), len(texts), other[:3]
