"""LLM: one model in this process, for scripts and batches. It runs the engine's steps in the caller's thread."""

from __future__ import annotations

import itertools
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Unpack, overload

from pelton.config import DEFAULT_MODEL, EngineArgs
from pelton.door import BUILDER, ChatOptions, args_from_keywords, chat_prompt, fetch, load_text, log_choices, text_of
from pelton.engine.host import Engine, load_builder
from pelton.engine.step import EngineRequest, Update
from pelton.errors import DeviceLostError, EngineDeadError, RequestError
from pelton.progress import ProgressBar
from pelton.text.output import RequestAssembler
from pelton.text.prompt import Prompts
from pelton.text.tokenizer import Tokenizer
from pelton.types import OnProgress, Prompt, RequestOutput, RequestOutputKind, SamplingParams
from pelton.weights.files import open_model

NO_LIMIT = 1 << 40  # a batch may be as long as memory allows: nobody else waits in its queue

Messages = Sequence[Mapping[str, Any]]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model, loaded: `LLM(model="org/name").generate("Hello")`.

    Several threads may use one LLM; their requests are then computed in the same batches.
    """

    def __init__(self, model: str = DEFAULT_MODEL, tokenizer: str | None = None, **options: Any) -> None:
        """model: a name from the catalogue, a path, or a repository as org/name. tokenizer: the path of another one.

        options: fields of EngineArgs (dtype, max_model_len, device, seed, ...); other arguments of vLLM's are taken
        where they change no answer. What is decided is logged under "pelton". Raises ConfigError for options that are
        unknown or cannot work, ModelNotFoundError, ModelFormatError.
        """
        self._open(args_from_keywords({"model": model, "tokenizer": tokenizer, **options}), None)

    @classmethod
    def from_args(cls, args: EngineArgs, on_progress: OnProgress | None = None) -> LLM:
        """As the constructor. on_progress: called with (bytes done, bytes in all) while the model loads."""
        llm = cls.__new__(cls)
        llm._open(args, on_progress)
        return llm

    @classmethod
    def from_parts(cls, engine: Engine, prompts: Prompts) -> LLM:
        """An LLM of parts that exist already."""
        llm = cls.__new__(cls)
        llm._join(engine, prompts)
        return llm

    def _open(self, args: EngineArgs, on_progress: OnProgress | None) -> None:
        args = fetch(replace(args, max_waiting=args.max_waiting or NO_LIMIT), on_progress)
        make_prompts = load_text(args, open_model(Path(args.model)))
        engine = load_builder(BUILDER)(args, on_progress or (lambda done, total: None))
        log_choices(engine.info)
        self._join(engine, make_prompts(engine.info.max_model_len))

    def _join(self, engine: Engine, prompts: Prompts) -> None:
        self.info = engine.info
        self.prompts = prompts
        self._core = engine.core
        self._lock = threading.RLock()  # held during a step, and by whoever changes what the next one does
        self._jobs: dict[int, _Job] = {}  # by engine request, while it runs
        self._next_id = itertools.count(1)
        self._next_name = itertools.count()
        self._failure: BaseException | None = None

    # --- generating ---------------------------------------------------------------------------------------------

    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt] | None = ..., sampling_params: Params = ..., use_tqdm: bool = ..., *,
        stream: Literal[False] = ..., priority: int | Sequence[int] | None = ...,
        prompt_token_ids: list[int] | list[list[int]] | None = ...,
    ) -> list[RequestOutput]: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Prompt | Sequence[Prompt] | None = ..., sampling_params: Params = ..., use_tqdm: bool = ..., *,
        stream: Literal[True], priority: int | Sequence[int] | None = ...,
        prompt_token_ids: list[int] | list[list[int]] | None = ...,
    ) -> Generator[RequestOutput, None, None]: ...  # fmt: skip
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        stream: bool = False,
        priority: int | Sequence[int] | None = None,
        prompt_token_ids: list[int] | list[list[int]] | None = None,
    ) -> list[RequestOutput] | Generator[RequestOutput, None, None]:
        """Continue one prompt (text, token ids, TextPrompt, TokensPrompt) or a list of them.

        sampling_params: for all prompts, or one for each; by default what the checkpoint suggests. Completions are
        cut where the context ends. use_tqdm: show a progress bar if the batch is long. prompt_token_ids: prompts as
        vLLM once took them.

        Returns one RequestOutput for each prompt, in order. With stream=True: an iterator whose outputs hold what is
        new, prompts mixed as they advance (`request_id` tells them apart); closing it ends what still runs.

        Raises RequestError, before anything is computed, if a prompt or its params cannot be served. A request that
        the engine has to end (for example for logits that are not finite) does not raise: its output has `error` set
        and finish_reason "error", and the others are as if it had not been there.
        """
        many = _as_prompts(prompts if prompt_token_ids is None else prompt_token_ids)
        return self._generate(many, sampling_params, use_tqdm, stream, priority)

    @overload
    def chat(
        self, messages: Messages | Sequence[Messages], sampling_params: Params = ..., use_tqdm: bool = ..., *,
        stream: Literal[False] = ..., **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]: ...  # fmt: skip
    @overload
    def chat(
        self, messages: Messages | Sequence[Messages], sampling_params: Params = ..., use_tqdm: bool = ..., *,
        stream: Literal[True], **options: Unpack[ChatOptions],
    ) -> Generator[RequestOutput, None, None]: ...  # fmt: skip
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput] | Generator[RequestOutput, None, None]:
        """Answer one conversation (a list of messages with role and content), or each of a list of conversations.

        options: chat_template, add_generation_prompt, continue_final_message, tools, documents, chat_template_kwargs;
        see ChatOptions. Otherwise as `generate`.
        """
        conversations: Any = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        prompts = []
        for index, conversation in enumerate(conversations):
            with _naming("conversation", index, len(conversations)):
                prompts.append(chat_prompt(self.prompts, conversation, options))
        return self._generate(prompts, sampling_params, use_tqdm, stream, None)

    def _generate(
        self, prompts: Sequence[Prompt], params: Params, show: bool, stream: bool, priority: int | Sequence[int] | None
    ) -> list[RequestOutput] | Generator[RequestOutput, None, None]:
        params = self.get_default_sampling_params() if params is None else params
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        jobs = []
        for index, (prompt, one, rank) in enumerate(
            zip(prompts, _for_each(prompts, params), _for_each(prompts, priority or 0), strict=True)
        ):
            with _naming("prompt", index, len(prompts)):
                jobs.append(self._job(prompt, one.clone(output_kind=kind), rank))
        outputs = self._run(jobs)
        if stream:
            return outputs
        finished = {}
        with ProgressBar("Processed prompts", len(jobs), show and len(jobs) > 1) as bar, closing(outputs):
            for output in outputs:
                finished[output.request_id] = output
                bar.advance()
        return [finished[job.assembler.request_id] for job in jobs]

    def _job(self, prompt: Prompt, params: SamplingParams, priority: int) -> _Job:
        token_ids = self.prompts.encode(prompt, params)
        requests = self.prompts.requests(
            lambda: next(self._next_id), token_ids, params, priority=priority, clip=True
        )
        name = str(next(self._next_name))
        return _Job(requests, RequestAssembler(name, text_of(prompt), params, self.tokenizer, requests))

    # --- running ------------------------------------------------------------------------------------------------

    def _run(self, jobs: Sequence[_Job]) -> Generator[RequestOutput, None, None]:
        """Outputs as they come. However this ends, nothing of the jobs is left in the engine."""
        outputs: deque[RequestOutput] = deque()
        num_running = len(jobs)
        try:
            self._submit(jobs, outputs)
            while num_running:
                with self._lock:
                    if not outputs:  # else another thread's step made some
                        self._step()
                while outputs:
                    num_running -= outputs[0].finished
                    yield outputs.popleft()
        finally:
            self._withdraw(jobs)

    def _submit(self, jobs: Sequence[_Job], outputs: deque[RequestOutput]) -> None:
        with self._lock, _uninterrupted():
            self._check_engine()
            for index, job in enumerate(jobs):
                job.outputs = outputs
                with _naming("prompt", index, len(jobs)):
                    for request in job.requests:
                        self._core.submit(request)
                        self._jobs[request.request_id] = job

    def _step(self) -> None:
        """One step of the engine, for all jobs of all threads."""
        self._check_engine()
        with _uninterrupted():
            try:
                updates = self._core.step()
            except BaseException as error:  # a step that was left in the middle cannot be repeated
                self._failure = error
                raise
            for update in updates:
                self._push(update)

    def _check_engine(self) -> None:
        if self._failure is not None:
            remedy = "start the program again" if isinstance(self._failure, DeviceLostError) else "make a new LLM"
            raise EngineDeadError(f"this LLM's engine failed before ({self._failure!r}); {remedy}")

    def _push(self, update: Update) -> None:
        job = self._jobs.get(update.request_id)
        if job is None:
            return
        if update.finish_reason is not None:
            del self._jobs[update.request_id]
        output = job.assembler.push(update)
        if output is not None:
            job.outputs.append(output)
        for request_id in job.assembler.take_aborts():
            self._core.abort(request_id)

    def _withdraw(self, jobs: Sequence[_Job]) -> None:
        """Abort what still runs, and give the runner a step to forget it."""
        with self._lock:
            for job in jobs:
                for request in job.requests:
                    if self._jobs.pop(request.request_id, None) is not None:
                        self._core.abort(request.request_id)
            if self._failure is None and not self._jobs and self._core.has_work():
                self._step()

    # --- facts --------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.prompts.tokenizer

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer (vLLM's name for it)."""
        return self.prompts.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The sampling parameters that the checkpoint suggests."""
        return SamplingParams.from_optional(**self.prompts.generation_defaults)


@dataclass
class _Job:
    """One prompt on its way."""

    requests: list[EngineRequest]
    assembler: RequestAssembler
    outputs: deque[RequestOutput] = field(default_factory=deque)  # of all jobs that are run together


def _as_prompts(prompts: Prompt | Sequence[Prompt] | list[list[int]] | None) -> list[Prompt]:
    """One prompt, or several, as several."""
    if prompts is None:
        raise RequestError("give a prompt, or a list of prompts", "prompts")
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    many: list[Any] = list(prompts)
    return [many] if many and type(many[0]) is int else many


def _for_each(prompts: Sequence[Prompt], value: Any) -> list[Any]:
    """`value` for each prompt, or the values that were given, one for each."""
    if isinstance(value, (SamplingParams, int)):
        return [value] * len(prompts)
    if len(value) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts and {len(value)} sampling_params or priorities; give one for each")
    return list(value)


@contextmanager
def _naming(what: str, index: int, count: int) -> Iterator[None]:
    """A RequestError from inside says which of several prompts it is about."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        raise type(error)(f"{what} {index}: {error}", error.param) from None


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; a second one does not."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    pressed = False

    def on_press(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    signal.signal(signal.SIGINT, on_press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt
