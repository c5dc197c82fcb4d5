"""SentencePiece tokenizer with Gemma 3's control tokens, and the one chat template.

`render_turns` is the only place that builds a prompt's text: SFT, rollout, evaluation, generation
and server all go through it (CHAT_TEMPLATE says the same to transformers). Exactly one <bos>, no
system role: system text goes first inside the user turn. Knows no dataset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from gemma_cot.hf_config import read_json

PAD, EOS, BOS = 0, 1, 2
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

# The same template for transformers (tokenizer_config.json), so that its
# apply_chat_template gives our ids; written for one or more user/model turns.
CHAT_TEMPLATE = (
    "{{ bos_token }}{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set ns.system = message['content'] + '\n\n' -%}"
    "{%- else -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (ns.system if role == 'user' else '')"
    " + message['content'] | trim + '<end_of_turn>\n' }}"
    "{%- if role == 'user' -%}{%- set ns.system = '' -%}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Tokenizer:
    """A loaded SentencePiece model and the stop ids that belong to its checkpoint."""

    processor: sentencepiece.SentencePieceProcessor
    stop_ids: tuple[int, ...]  # sampling ends at any of them; Gemma 3 IT: (1, 106)
    end_of_turn: int  # the id that ends a model turn, the stop token of every SFT target

    @property
    def vocab_size(self) -> int:
        """Number of pieces; at most the rows of the embedding."""
        return self.processor.vocab_size()


def load_tokenizer(model_dir: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Load `tokenizer.model` from a model folder, check Gemma 3's control tokens, read stop ids.

    vocab_size: rows of the embedding; a larger tokenizer is refused. Raises ValueError.
    """
    path = Path(model_dir) / "tokenizer.model"
    if not path.is_file():
        raise ValueError(
            f"{path}: file must exist, got nothing there; copy the SentencePiece tokenizer.model "
            "of the checkpoint into the model folder"
        )
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{path}: must be a SentencePiece model, got {error}; download it again"
        ) from None
    size = processor.vocab_size()
    if vocab_size is not None and size > vocab_size:
        raise ValueError(
            f"{path}: vocabulary must fit the embedding's {vocab_size} rows, got {size} pieces; "
            "tokenizer and weights are of different models"
        )
    found = (processor.pad_id(), processor.eos_id(), processor.bos_id())
    if found != (PAD, EOS, BOS):
        raise ValueError(
            f"{path}: (pad, eos, bos) must be ({PAD}, {EOS}, {BOS}) as in Gemma 3, got {found}; "
            "use Gemma 3's tokenizer"
        )
    turn_ids = []
    for piece in (START_OF_TURN, END_OF_TURN):
        piece_id = processor.piece_to_id(piece)
        if piece_id == processor.unk_id() or processor.encode(piece) != [piece_id]:
            raise ValueError(
                f"{path}: {piece} must be one token, got {processor.encode(piece)}; "
                "use Gemma 3's tokenizer"
            )
        turn_ids.append(piece_id)
    end_of_turn = turn_ids[1]
    return Tokenizer(processor, _stop_ids(Path(model_dir), end_of_turn, size), end_of_turn)


def _stop_ids(model_dir: Path, end_of_turn: int, size: int) -> tuple[int, ...]:
    """Return <eos>, <end_of_turn>, and whatever generation_config.json adds."""
    stops = {EOS, end_of_turn}
    path = model_dir / "generation_config.json"
    if path.is_file():
        listed = read_json(path).get("eos_token_id")
        stops |= set(listed if isinstance(listed, list) else [] if listed is None else [listed])
    bad = [stop for stop in stops if not (isinstance(stop, int) and 0 <= stop < size)]
    if bad:
        raise ValueError(
            f"{path}: eos_token_id must be ids below the vocabulary's {size}, got {bad}; "
            "tokenizer and generation_config.json are of different models"
        )
    return tuple(sorted(stops))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of `text`, no <bos> added; control tokens written in the text are mapped."""
    return tokenizer.processor.encode(text)


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of `ids`; turn tokens are kept as text, <pad>, <eos> and <bos> vanish, and so
    do ids that have no piece: from 4B on the embedding has more rows than the vocabulary pieces."""
    return tokenizer.processor.decode([i for i in map(int, ids) if i < tokenizer.vocab_size])


def render_turns(user: str, system: str = "", earlier: Sequence[tuple[str, str]] = ()) -> str:
    """Return the text after <bos> of a chat that waits for the model's answer to `user`.

    earlier: the (user, model) turns before that; the system text opens the first user turn.
    """
    text, lead = "", f"{system}\n\n" if system else ""
    for question, answer in earlier:
        text += f"{START_OF_TURN}user\n{lead}{question.strip()}{END_OF_TURN}\n"
        text += f"{START_OF_TURN}model\n{answer.strip()}{END_OF_TURN}\n"
        lead = ""
    return text + f"{START_OF_TURN}user\n{lead}{user.strip()}{END_OF_TURN}\n{START_OF_TURN}model\n"


def encode_prompt(
    tokenizer: Tokenizer, user: str, system: str = "", earlier: Sequence[tuple[str, str]] = ()
) -> list[int]:
    """Return <bos> and the ids of the rendered chat: what the model is given."""
    return [BOS, *encode(tokenizer, render_turns(user, system, earlier))]


def encode_target(tokenizer: Tokenizer, completion: str) -> list[int]:
    """Return the ids of a completion ending in the stop token <end_of_turn>: an SFT target."""
    return [*encode(tokenizer, completion), tokenizer.end_of_turn]
