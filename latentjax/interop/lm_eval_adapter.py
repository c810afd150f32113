"""Our models as a language model of EleutherAI's lm-evaluation-harness.

Requests mean what they mean to the harness's own `hf` model: where a context ends and its continuation begins, what is
cut off from the left, what an empty context becomes, how a long text is cut into windows. How they are computed is the
scorer's affair. With several processes each runs the whole harness, on the same requests in the same order, and all
compute every batch together.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from latentjax.errors import UserError
from latentjax.interop.harness_text import HarnessText

_NEW_TOKENS = 256  # where a task does not say how many; as the `hf` model
_SAMPLING = ("temperature", "top_k", "top_p")

Scores = list[tuple[float, bool]]


class HarnessScorer(Protocol):
    """What computes; `latentjax.training.scoring.Scorer` is one."""

    max_length: int

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], advance: Callable[[int], None]) -> Scores:
        """Returns the log-likelihood of each continuation behind its context, and whether it is greedy."""
        ...

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        *,
        end_id: int,
        sampling: dict[str, float],
        stops: Callable[[Sequence[int]], bool],
        advance: Callable[[int], None],
    ) -> list[list[int]]:
        """Returns what follows each prompt: up to `num_tokens` ids, to the end of text, or until `stops(ids)`."""
        ...


# (what is done, how many there are of it) -> a context that gives what is called with each number that is done.
Stage = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class LatentjaxLM(TemplateLM):
    """The adapter."""

    def __init__(self, scorer: HarnessScorer, text: HarnessText, stage: Stage):
        """Takes what computes, what tokenises, and what shows how far it is."""
        super().__init__()
        self._scorer, self._text, self._stage = scorer, text, stage

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._text.end_id

    @property
    def prefix_token_id(self) -> int:
        """The id that an empty context becomes, and that stands before a text to be scored whole."""
        return self._text.prefix_id

    @property
    def max_length(self) -> int:
        """Longest input, in tokens."""
        return self._scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in the harness's caches."""
        return self._text.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text."""
        return self._text.encode(string, add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Scores:
        """Scores continuations; see the harness's `LM.loglikelihood`."""
        return super().loglikelihood(requests, disable_tqdm=True)  # which is done in no time

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **ignored: Any
    ) -> Scores:
        count = sum(len(continuation) for _, _, continuation in requests)
        with self._stage("scoring tokens", count) as advance:
            scores = self._scorer.score([(context, continuation) for _, context, continuation in requests], advance)
        for (strings, _, _), score in zip(requests, scores, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts, each by itself, cut into windows of the model's length that predict each token once."""
        windows, counts = [], []
        for (string,) in (request.args for request in requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            of_text = [(None, *make_disjoint_window(window)) for window in cut]
            windows += of_text
            counts.append(len(of_text))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts until a stop string, the end of text or the number of tokens that the task allows."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items(), key=str))].append(number)
        texts = [""] * len(requests)
        with self._stage("continuing contexts", len(requests)) as advance:
            for numbers in alike.values():
                settings = normalize_gen_kwargs(requests[numbers[0]].args[1], _NEW_TOKENS)
                contexts = [requests[number].args[0] for number in numbers]
                for number, text in zip(numbers, self._continue(contexts, settings, advance), strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _continue(self, contexts: list[str], settings: dict[str, Any], advance: Callable[[int], None]) -> list[str]:
        """Continues contexts whose tasks ask for the same settings."""
        stops = handle_stop_sequences(settings.pop("until", None), eos=self._text.end_text)
        num_tokens = settings.pop("max_gen_toks")
        longest = self.max_length - num_tokens
        if longest <= 0:
            raise UserError(
                f"the task asks for {num_tokens} new tokens, but the model has {self.max_length} positions in all"
            )
        sampling = {name: settings.pop(name) for name in _SAMPLING if name in settings}
        if not settings.pop("do_sample", False):
            sampling = {}
        if settings:
            raise UserError(f"the task asks for {', '.join(sorted(settings))} in generation, which is not implemented")
        found = [stop for stop in stops if stop]

        def is_over(ids: Sequence[int]) -> bool:
            text = self._text.decode(ids)
            return any(stop in text for stop in found)

        continued = self._scorer.complete(
            [(self.tok_encode(context) or [self.prefix_token_id])[-longest:] for context in contexts],
            num_tokens,
            end_id=self._text.end_id,
            sampling=sampling,
            stops=is_over,
            advance=advance,
        )
        return [postprocess_generated_text(self._text.decode(ids), stops, None) for ids in continued]


@contextmanager
def silent_stage(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A `Stage` that shows nothing."""
    del label, total
    yield lambda count: None
