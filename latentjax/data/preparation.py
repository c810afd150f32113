"""Making a token store: plan the tasks, have them done, and put the manifest in place last.

The directory of the store is also where it is made. Until the manifest is there it is not a store, but what was done
before an interruption: a plan, and for every task that is done its shards and its record.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import latentjax
from latentjax.data import shards
from latentjax.data.corpus import Corpus
from latentjax.data.output import OutputDirectory
from latentjax.data.progress import Progress, Stage
from latentjax.data.readers.base import Span
from latentjax.data.store import FORMAT, MANIFEST_FILE, PLAN_FILE, SPLITS, TOKENIZER_DIRECTORY, VERSION
from latentjax.data.tasks import RECORDS_DIRECTORY, HeldOut, Job, Task, TaskRecord, too_many_malformed
from latentjax.data.tokenizers.base import Tokenizer
from latentjax.errors import UserError

# Of input, for a task and so for a shard, where the user leaves the size to us.
_SMALLEST_TASK = 64 << 20
_TASKS_OF_A_LARGE_CORPUS = 512  # enough for many workers, few enough to keep every shard's file open
_NAMED_FAILURES = 100  # in the manifest; the rest is counted

RunTasks = Callable[[Job, Sequence[Task], Stage], None]


def prepare_store(
    output: OutputDirectory,
    corpus: Corpus,
    make_tokenizer: Callable[[Sequence[Span]], Tokenizer],
    *,
    recipe: str,
    eval_fraction: float,
    max_malformed: int,
    task_bytes: int,
    run_tasks: RunTasks,
    progress: Progress,
) -> None:
    """Makes the store of a corpus, or goes on with one that was interrupted.

    The files are the same bytes for any way and number of workers, and however often it was interrupted. Several
    processes may make the same store at once: they do no harm to each other.

    Args:
      make_tokenizer: makes the tokenizer from spans of the corpus.
      recipe: hash of all that determines the result, kept in the plan and the manifest.
      eval_fraction: share of documents held out, in (0, 1); by a hash of the document, so that copies of it are on the
        same side. Of two documents or more at least one is on each side; a lone document is cut in two.
      max_malformed: so many malformed documents are passed over; more are an error.
      task_bytes: input of a task; 0: chosen by the size of the corpus.
      run_tasks: does tasks (`run_task`), in any order, and returns when all are done.

    Raises:
      UserError: `output` holds something else, cannot be written, or anything is wrong with the corpus.
    """
    span_bytes = task_bytes or max(_SMALLEST_TASK, corpus.total_bytes // _TASKS_OF_A_LARGE_CORPUS)
    claim(output, recipe)
    output.create()
    try:
        tasks, tokenizer = _planned(output, corpus, recipe, span_bytes, make_tokenizer, progress)
        job = Job(corpus, tokenizer, output, HeldOut(int(eval_fraction * 2**64)), max_malformed)
        job, records = _all_done(job, tasks, eval_fraction, run_tasks, progress)
    except UserError:
        if claim(output, recipe):
            return  # another process was first; it needed our records no more
        if not _records_directory(output).names():
            # Nothing would be lost, and a corpus that is mended now is another one.
            for name in (PLAN_FILE, TOKENIZER_DIRECTORY, RECORDS_DIRECTORY):
                output.remove(name)
            output.remove_if_empty()
        raise
    in_order = [records[task.number] for task in tasks]
    malformed = sum(record.malformed for record in in_order)
    if malformed > max_malformed:
        first = next(record.first_malformed[0] for record in in_order if record.malformed)
        raise too_many_malformed(malformed, max_malformed, first)
    _report_failures(in_order, len(corpus.files), progress)
    if TOKENIZER_DIRECTORY not in output.names():
        _save(tokenizer, output)
    output.write_json(MANIFEST_FILE, _manifest(job, recipe, eval_fraction, in_order))
    _clear(output)


def _clear(output: OutputDirectory) -> None:
    """Removes what was only there to go on after an interruption."""
    for name in (RECORDS_DIRECTORY, PLAN_FILE):
        output.remove(name)


def claim(output: OutputDirectory, recipe: str) -> bool:
    """Returns whether the finished store of `recipe` is at `output`, having made sure that nothing else is.

    Raises:
      UserError: something else is there.
    """
    manifest = output.read_json(MANIFEST_FILE)
    if isinstance(manifest, dict) and manifest.get("recipe") == recipe:
        _clear(output)
        return True
    plan = output.read_json(PLAN_FILE) if manifest is None else None
    if isinstance(plan, dict) and plan.get("recipe") == recipe:
        return False
    if manifest is not None or plan is not None:
        kind = "a store" if manifest is not None else "an unfinished store"
        raise UserError(
            f"the output {output.path} holds {kind} of another corpus, another tokenizer or other settings: remove it "
            "or choose another place"
        )
    if foreign := [name for name in output.names() if not (name.startswith(".") and name.endswith(".tmp"))]:
        raise UserError(
            f"the output {output.path} is in use, and not by a token store (it holds {foreign[0]}): choose another "
            "place"
        )
    return False


def _planned(
    output: OutputDirectory,
    corpus: Corpus,
    recipe: str,
    span_bytes: int,
    make_tokenizer: Callable[[Sequence[Span]], Tokenizer],
    progress: Progress,
) -> tuple[list[Task], Tokenizer]:
    """Returns the tasks and the tokenizer of the plan at `output`, making and writing it if it is not there."""
    plan = output.read_json(PLAN_FILE)
    if plan is not None:
        spans = [[Span(*span) for span in task] for task in plan["tasks"]]
        tokenizer = make_tokenizer([span for task in spans for span in task])
        if tokenizer.fingerprint != plan["fingerprint"]:
            raise UserError(
                f"the tokenizer is not the one that the unfinished store {output.path} was begun with: remove that "
                "directory to begin anew"
            )
    else:
        flat = _spans_of(corpus, span_bytes)
        tokenizer = make_tokenizer(flat)
        _save(tokenizer, output)
        spans = _grouped(flat, span_bytes)
        listed = [[[span.file, span.start, span.stop, span.input_bytes] for span in task] for task in spans]
        output.write_json(PLAN_FILE, {"recipe": recipe, "fingerprint": tokenizer.fingerprint, "tasks": listed})
    return [Task(number, tuple(group)) for number, group in enumerate(spans)], tokenizer


def _save(tokenizer: Tokenizer, output: OutputDirectory) -> None:
    with output.staged(TOKENIZER_DIRECTORY) as directory:
        tokenizer.save(directory)


def _spans_of(corpus: Corpus, span_bytes: int) -> list[Span]:
    # In threads: large compressed files are decompressed to learn their length, files far away are waited for.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        plans = pool.map(lambda number: corpus.plan(number, span_bytes), range(len(corpus.files)))
        return [span for plan in plans for span in plan]


def _grouped(spans: Sequence[Span], span_bytes: int) -> list[list[Span]]:
    groups, size = [], 0
    for span in spans:
        if not groups or size >= span_bytes:
            groups.append([])
            size = 0
        groups[-1].append(span)
        size += span.input_bytes
    return groups


def _all_done(
    job: Job, tasks: Sequence[Task], eval_fraction: float, run_tasks: RunTasks, progress: Progress
) -> tuple[Job, dict[int, TaskRecord]]:
    """Has all tasks done that are not yet; returns the job under the rule that holds now, and the records by number."""
    records = _read_records(job.output, tasks)
    with progress.stage("tokenising", sum(task.input_bytes for task in tasks)) as stage:
        done = [task for task in tasks if task.number in records]
        if done:
            progress.note(f"continuing: {len(done)} of {len(tasks)} shards are there already")
            stage.skip(sum(task.input_bytes for task in done))
        records |= _do(run_tasks, job, [task for task in tasks if task.number not in records], stage)
    # Only now is it known whether both sides have documents.
    job = replace(job, held_out=_rule(job.corpus, records, eval_fraction))
    again = [task for task in tasks if not records[task.number].holds_under(job.held_out)]
    if again:
        with progress.stage("holding some out", sum(task.input_bytes for task in again)) as stage:
            for task in again:
                job.output.remove(task.record_name)
            records |= _do(run_tasks, job, again, stage)
    return job, records


def _do(run_tasks: RunTasks, job: Job, tasks: Sequence[Task], stage: Stage) -> dict[int, TaskRecord]:
    if not tasks:
        return {}
    run_tasks(job, tasks, stage)
    records = _read_records(job.output, tasks)
    if missing := [task.number for task in tasks if task.number not in records]:
        raise UserError(
            f"{len(missing)} tasks left no record in {job.output.path} (the first is {missing[0]}): all workers must "
            "write to the same place; give a path that they share, such as gs://"
        )
    return records


def _records_directory(output: OutputDirectory) -> OutputDirectory:
    return OutputDirectory(f"{output.path}/{RECORDS_DIRECTORY}")


def _read_records(output: OutputDirectory, tasks: Sequence[Task]) -> dict[int, TaskRecord]:
    there = set(_records_directory(output).names())
    records = {}
    for task in tasks:
        if task.record_name.rpartition("/")[2] in there:
            value = output.read_json(task.record_name)
            if value is not None:
                records[task.number] = TaskRecord.from_json(value)
    return records


def _rule(corpus: Corpus, records: dict[int, TaskRecord], eval_fraction: float) -> HeldOut:
    """Returns the rule under which there is something on each side.

    Where all documents fall on one side, the border moves just so far that the nearest falls on the other.

    Raises:
      UserError: there is no text, or too little to hold any out.
    """
    border = int(eval_fraction * 2**64)
    units = sum(record.units for record in records.values())
    if units == 0:
        left_out = sum(record.left_out for record in records.values())
        raise UserError(
            f"the corpus {corpus.path} is empty: {len(corpus.files)} files, no text in them"
            + (f" ({left_out} left out: not UTF-8)" if left_out else "")
        )
    if sum(record.beginnings for record in records.values()) == 1:
        cut = units - max(1, round(eval_fraction * units))
        if cut <= 0:
            raise UserError(f"the corpus {corpus.path} is one document of {units} bytes: too little to hold any out")
        return HeldOut(border, cut)
    lowest = min(record.lowest_hash for record in records.values() if record.lowest_hash is not None)
    highest = max(record.highest_hash for record in records.values() if record.highest_hash is not None)
    if lowest >= border:
        border = lowest + 1
    elif highest < border:
        border = highest
    return HeldOut(border)


def _report_failures(records: Sequence[TaskRecord], num_files: int, progress: Progress) -> None:
    if left_out := sum(record.left_out for record in records):
        first = next(record.first_left_out[0] for record in records if record.left_out)
        progress.note(f"left out {left_out} of {num_files} files, which are not UTF-8 text; the first: {first}")
    if malformed := sum(record.malformed for record in records):
        first = next(record.first_malformed[0] for record in records if record.malformed)
        progress.note(f"left out {malformed} malformed documents; the first: {first}")


def _manifest(job: Job, recipe: str, eval_fraction: float, records: Sequence[TaskRecord]) -> dict:
    splits = {}
    for name in SPLITS:
        parts = [record.splits[name] for record in records]
        splits[name] = {
            "tokens": sum(part.tokens for part in parts),
            "bytes": sum(part.bytes for part in parts),
            "documents": sum(part.documents for part in parts),
            "shards": [part.shard for part in parts if part.shard is not None],
        }
    tokens, text_bytes = (sum(split[key] for split in splits.values()) for key in ("tokens", "bytes"))
    first = [place for record in records for place in record.first_malformed][:_NAMED_FAILURES]
    left_out = [place for record in records for place in record.first_left_out][:_NAMED_FAILURES]
    packages = ("array_record", "numpy", "pyarrow", "sentencepiece", "tokenizers", "xxhash")
    return {
        "format": FORMAT,
        "version": VERSION,
        "recipe": recipe,
        "corpus": {
            "path": job.corpus.path,
            "text_field": job.corpus.options.text_field,
            "packed_rows": job.corpus.options.packed_rows,
            "files": len(job.corpus.files),
            "readers": sorted({type(job.corpus.reader(n)).__name__ for n in range(len(job.corpus.files))}),
            "file_bytes": job.corpus.total_bytes,
            "documents": sum(record.beginnings for record in records),
            "bytes": text_bytes,
            "document_lengths": _document_lengths(records),
            "malformed": sum(record.malformed for record in records),
            "first_malformed": first,
            "left_out": sum(record.left_out for record in records),
            "first_left_out": left_out,
        },
        "held_out": {"fraction": eval_fraction, **asdict(job.held_out)},
        "tokenizer": {
            "kind": job.tokenizer.kind,
            "fingerprint": job.tokenizer.fingerprint,
            "vocab_size": job.tokenizer.vocab_size,
            "eod_id": job.tokenizer.eod_id,
            "bytes_per_token": text_bytes / max(tokens, 1),
        },
        "dtype": job.dtype,
        "block_tokens": shards.BLOCK_TOKENS,
        "splits": splits,
        "versions": {
            "latentjax": latentjax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def _document_lengths(records: Sequence[TaskRecord]) -> dict[str, int]:
    """Returns how many documents have 2**(n-1) to 2**n - 1 tokens, by n (0: none), joining those of several tasks."""
    lengths: dict[int, int] = {}
    open_tokens = 0
    for record in records:
        for digits, count in record.lengths.items():
            lengths[int(digits)] = lengths.get(int(digits), 0) + count
        if record.head is not None:
            digits = (open_tokens + record.head).bit_length()
            lengths[digits] = lengths.get(digits, 0) + 1
            open_tokens = 0
        if record.beginnings or record.head is not None:
            open_tokens = record.tail
        else:
            open_tokens += record.tail
    return {str(digits): lengths[digits] for digits in sorted(lengths)}
