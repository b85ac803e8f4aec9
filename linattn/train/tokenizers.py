"""Tokenizers in folders: bytes where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linattn.errors import CheckpointError, DataError, OptionError

BYTES = 256  # a vocabulary of them
TOKENIZER = "tokenizer_config.json"  # what every saved tokenizer has
# what transformers says to files that are none of a tokenizer, or JSON of other kinds
UNFIT = (OSError, ValueError, LookupError, TypeError, AttributeError)
LONGEST = 200  # characters of what transformers says


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder; code that lies in the folder is not run.

    Raises DataError where there is none, or one without a vocabulary of more than special tokens.
    """
    from transformers import AutoTokenizer

    import linattn.models.transnormer  # noqa: F401 (the Auto classes know it then)

    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; --tokenizer needs one that save_pretrained wrote")
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNFIT as error:
        said = " ".join(str(error).split())
        why = said if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {said}"
        raise DataError(f"{folder} holds no tokenizer: {why[:LONGEST]}") from error
    if not found.get_vocab():
        raise DataError(f"{folder} holds a tokenizer without a vocabulary")
    # some classes of transformers do not ask for their files
    files = {"tokenizer.json", *found.vocab_files_names.values()} - {TOKENIZER}
    words = found.get_vocab().keys() - found.get_added_vocab().keys() - {*found.all_special_tokens}
    if not words and not any((folder / name).is_file() for name in files):
        raise DataError(
            f"{folder} holds a tokenizer of special tokens alone: the file of its vocabulary is missing"
        )
    return found


def own_tokenizer(checkpoint: Path, vocab_size: int) -> Any:
    """Return the tokenizer that lies in the folder of a checkpoint, or None: its text is bytes.

    vocab_size: the model's. Raises CheckpointError for a tokenizer that lacks a file or has ids that the
    model does not know, OptionError where there is none and the model is not over bytes.
    """
    if (checkpoint / TOKENIZER).is_file():
        found = load_tokenizer(checkpoint)
        if (size := vocabulary(found)) > vocab_size:
            raise CheckpointError(
                f"{checkpoint} has a tokenizer of {size} tokens for a model of {vocab_size}: they do not "
                "belong together"
            )
        return found
    if there := [name for name in ("tokenizer.json", "tokenizer.model") if (checkpoint / name).is_file()]:
        raise CheckpointError(
            f"{checkpoint} has a {there[0]} but no {TOKENIZER}, which names its special tokens: save the "
            "tokenizer into the folder again"
        )
    check_bytes(vocab_size)
    return None


def unknown(ids: Any, tokenizer: Any) -> int:
    """Return how many ids stand for what a tokenizer does not know: int32 [n]; 0 for bytes."""
    if tokenizer is None:
        return 0
    number = tokenizer.unk_token_id
    if number is None:  # named by nobody but the model in tokenizer.json
        model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        number = tokenizer.get_vocab().get(getattr(model, "unk_token", None))
    if number in (None, tokenizer.eos_token_id):
        return 0  # some tokenizers name their end of text there, for want of another
    return int((ids == number).sum())


def vocabulary(tokenizer: Any) -> int:
    """Return what all ids are below; None stands for bytes. There may be holes."""
    return BYTES if tokenizer is None else max(tokenizer.get_vocab().values()) + 1


def check_bytes(vocab_size: int) -> None:
    """Raise OptionError for a model that is not over bytes."""
    if vocab_size != BYTES:
        raise OptionError(f"text is bytes, so the model's vocabulary must be {BYTES}, it is {vocab_size}")
