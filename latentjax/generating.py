"""What `python -m latentjax.generate` does: prompts as text in, continuations as text out, piece by piece."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers

from latentjax import config as config_lib
from latentjax.data.tokenizers.base import Tokenizer
from latentjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from latentjax.errors import UserError, brief, shown
from latentjax.opening import OpenedModel, open_model
from latentjax.training.completion import Completer, Sampling

_UNKNOWN = "\ufffd"  # what bytes decode to that are no whole character, or none yet
_MOST_WAITING = 8  # ids: no character has more bytes, whatever follows


class TextStream:
    """Turns ids into text as they come: a piece is given out when nothing that follows can change it.

    A character of which bytes are missing waits, and so does what may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        """Begins a text that continues another; it ends before the first of `stops` that it comes to."""
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []  # whose text does not end in a whole character
        self._held = ""
        self.text = ""  # what has been given out
        self.stopped = False  # whether a stop string was met

    def add(self, ids: Sequence[int]) -> str:
        """Adds ids and returns the text that is certain by now."""
        return "".join(self._add(each) for each in ids if not self.stopped)

    def _add(self, index: int) -> str:
        self._ids.append(index)
        text = self._tokenizer.decode(self._ids, continued=True)
        if text.endswith(_UNKNOWN) and len(self._ids) < _MOST_WAITING:
            return ""
        self._ids = []
        return self._release(text)

    def end(self) -> str:
        """Ends the text and returns what was still waiting."""
        text = self._release(self._tokenizer.decode(self._ids, continued=True)) if self._ids else ""
        held = "" if self.stopped else self._held
        self._ids, self._held = [], ""
        self.text += held
        return text + held

    def _release(self, text: str) -> str:
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, kept = True, min(places)
        else:
            kept = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = "" if self.stopped else text[kept:]
        self.text += text[:kept]
        return text[:kept]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((count for count in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:count])), 0)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What became of a prompt.

    Attributes:
      prompt: as it was given; sample: its number.
      text: what follows, without a stop string.
      num_tokens: how many were generated.
      ended_by: "end" (of the document), "stop" (a stop string) or "length".
    """

    prompt: str
    sample: int
    text: str
    num_tokens: int
    ended_by: str


class Generator:
    """Continues texts with one model."""

    def __init__(self, opened: OpenedModel):
        """Takes a model that was opened.

        Raises:
          UserError: it has no tokenizer, or one with more ids than the model has.
        """
        if opened.tokenizer is None:
            raise UserError(
                f"{opened.source} has no tokenizer, without which text is no tokens: put its tokenizer.json (or "
                "tokenizer.model) there"
            )
        self.tokenizer = opened.tokenizer
        if self.tokenizer.vocab_size > opened.model.spec.vocab_size:
            raise UserError(
                f"the tokenizer of {opened.source} has {self.tokenizer.vocab_size} ids, more than the "
                f"{opened.model.spec.vocab_size} of the model: it belongs to another"
            )
        self._first_ids = [] if opened.config is not None else ids_before_text(self.tokenizer)
        self._completer = Completer(
            opened.model,
            opened.params,
            opened.mesh,
            num_ids=self.tokenizer.vocab_size,
            end_ids=[self.tokenizer.eod_id],
        )
        self.max_length = self._completer.max_length

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt; an empty one begins a document, as training has it: behind the end of another.

        Raises:
          UserError: the prompt is no text.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt {shown(prompt, 40)} is no UTF-8: write it so") from error
        ids = [*self._first_ids, *map(int, self.tokenizer.encode(prompt))]
        return ids or [self.tokenizer.eod_id]

    def encode_all(self, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
        """Ids of prompts, of which each leaves room for `max_new_tokens`.

        Raises:
          UserError: one does not, or is no text.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, encoded, strict=True):
            if len(ids) + max_new_tokens > self.max_length:
                raise UserError(
                    f"the prompt {shown(prompt, 40)} has {len(ids)} tokens, and with {max_new_tokens} to come that is "
                    f"more than the model's {self.max_length} positions: shorten it"
                    + (", or lower --max_new_tokens" if max_new_tokens > 1 else "")
                )
        return encoded

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        num_samples: int = 1,
        stops: Sequence[str] = (),
        on_text: Callable[[int, str], None] = lambda index, text: None,
        on_tokens: Callable[[int], None] = lambda count: None,
        tokens_at_once: int = 16,
        batch_tokens: int = 4096,
        prefill_tolerance: float | None = None,
    ) -> list[Continuation]:
        """Continues every prompt `num_samples` times; the samples of a prompt follow one another.

        Args:
          max_new_tokens: most tokens of a continuation.
          stops: strings before which a continuation ends.
          on_text: is called with the index of a continuation and the text that was added to it.
          on_tokens: is called with a number of tokens that were generated.
          tokens_at_once: most tokens between two calls of these.
          batch_tokens, prefill_tolerance: see `Completer.complete`.

        Raises:
          UserError: a prompt and its continuation are more than the model's positions; sampling out of range.
        """
        rows = [(prompt, sample) for prompt in prompts for sample in range(num_samples)]
        encoded = self.encode_all([prompt for prompt, _ in rows], max_new_tokens)
        streams = [TextStream(self.tokenizer, stops) for _ in rows]

        def watch(index: int, ids: list[int]) -> bool:
            on_tokens(len(ids))
            text = streams[index].add(ids)
            if text:
                on_text(index, text)
            return streams[index].stopped

        continued = self._completer.complete(
            encoded,
            max_new_tokens,
            sampling,
            samples=[sample for _, sample in rows],
            watch=watch,
            batch_tokens=batch_tokens,
            tokens_at_once=tokens_at_once,
            prefill_tolerance=prefill_tolerance,
        )
        results = []
        for index, ((prompt, sample), stream, ids) in enumerate(zip(rows, streams, continued, strict=True)):
            if text := stream.end():
                on_text(index, text)
            ended_by = "stop" if stream.stopped else "length" if len(ids) == max_new_tokens else "end"
            results.append(Continuation(prompt, sample, stream.text, len(ids), ended_by))
        return results


def open_generator(
    checkpoint: str, step: int | None, dtype: str, overrides: Sequence[str], note: Callable[[str], None]
) -> Generator:
    """Opens the model of a run or of a Hugging Face folder to generate with it.

    Args:
      overrides: `mesh.AXIS=SIZE`; none: one device.

    Raises:
      UserError: what `open_model` and `Generator` raise; an override of something else.
    """
    config = config_lib.default()
    config.mesh.data = 1
    for override in overrides:
        key, _, text = override.partition("=")
        if not key.startswith("mesh."):
            raise UserError(f"--config.{brief(key)}: in generation the group mesh can be set; the rest is the model's")
        config_lib.set_key(config, key, text)
    mesh = config.mesh if overrides else None
    return Generator(open_model(checkpoint, step=step, dtype=dtype, mesh=mesh, mask_documents=True, note=note))


def ids_before_text(tokenizer: Tokenizer) -> list[int]:
    """The control tokens that a Hugging Face tokenizer puts before every text, such as LLaMA's `<s>`."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return []
    encoding = tokenizers.Tokenizer.from_str(tokenizer.definition.decode()).encode("a")
    mask = encoding.special_tokens_mask
    return encoding.ids[: mask.index(0)] if 0 in mask else []


def read_prompts(path: Path) -> list[str]:
    """Reads prompts from a file: a line each; in a .jsonl file JSON texts, or objects with a "prompt".

    Raises:
      UserError: it cannot be read, has no prompts, or a line is neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts_file {path}: {brief(error)}") from error
    if path.suffix != ".jsonl":
        prompts = [line for line in lines if line]
    else:
        prompts = [_prompt_of(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_file {path} has no prompts: write one a line")
    return prompts


def _prompt_of(line: str, place: str) -> str:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({brief(error, 80)}): write a text, or an object with a prompt") from error
    prompt = content.get("prompt") if isinstance(content, dict) else content
    if not isinstance(prompt, str):
        raise UserError(f'{place}: write a text, or an object with a text as its "prompt"')
    return prompt
