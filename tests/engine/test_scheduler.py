"""Scheduler: admission, order, chunks, preemption, prefix hits, ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pelton.config import CacheConfig, KVGroup, SchedulerConfig
from pelton.engine.scheduler import Scheduler
from pelton.engine.step import EngineRequest, StepPlan, StepResult
from pelton.errors import ConfigError, OutOfMemoryError, OverloadedError, PromptTooLongError, RequestError
from pelton.types import SamplingParams


def prompt(length: int, first: int = 100) -> list[int]:
    return list(range(first, first + length))


def tokens_of(plan: StepPlan) -> dict[int, int]:
    return {chunk.request_id: chunk.num_tokens for chunk in plan.chunks}


# --- admission ----------------------------------------------------------------------------------------------------


def test_what_can_never_run_is_refused_with_the_figures(make_engine) -> None:
    engine = make_engine(num_blocks=9, max_model_len=64)
    with pytest.raises(RequestError, match="prompt is empty"):
        engine.submit([])
    with pytest.raises(PromptTooLongError, match="65 tokens and the context holds 64"):
        engine.submit(prompt(65))
    with pytest.raises(RequestError, match="20 prompt tokens and up to 14 new ones need 9 KV blocks, there are 8"):
        engine.submit(prompt(20), max_tokens=14)
    engine.submit(prompt(20), max_tokens=13)  # the last token's keys are never needed
    assert len(engine.finish()[0].token_ids) == 13


def test_a_window_group_needs_blocks_for_its_window_and_a_chunk(make_engine) -> None:
    engine = make_engine(windows=(4,), num_blocks=5, max_num_batched_tokens=8, max_model_len=1000)
    engine.submit(prompt(500), max_tokens=100)
    assert engine.finish()[0].finish_reason == "length"


def test_the_queue_is_bounded(make_engine) -> None:
    engine = make_engine(max_waiting=2, max_num_seqs=1)
    engine.submit([1])
    engine.submit([1])
    with pytest.raises(OverloadedError, match="2 requests wait"):
        engine.submit([1])
    engine.step()
    engine.submit([1])


def test_an_id_in_use_is_refused(make_engine) -> None:
    engine = make_engine()
    engine.submit([1])
    with pytest.raises(RequestError, match="request 0 exists"):
        engine.scheduler.add(EngineRequest(0, [1], SamplingParams()))


def test_a_prompt_as_long_as_the_context_yields_one_token(make_engine) -> None:
    engine = make_engine(max_model_len=16)
    engine.submit(prompt(16), max_tokens=5)
    engine.submit(prompt(10), max_tokens=None)
    stories = engine.finish()
    assert [(len(s.token_ids), s.finish_reason) for s in stories.values()] == [(1, "length"), (6, "length")]


def test_without_chunked_prefill_a_step_must_hold_a_prompt() -> None:
    cache = CacheConfig(4, 100, (KVGroup(None, (0,)),), True)
    with pytest.raises(ConfigError, match="from 32 to 64"):
        Scheduler(SchedulerConfig(4, 32, 10, 64, enable_chunked_prefill=False), cache)


# --- chunks and order ---------------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_beside_decodes(make_engine) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    engine.submit(prompt(3), max_tokens=9)
    assert tokens_of(engine.step()) == {0: 3}
    engine.submit(prompt(20, 50), max_tokens=2)
    assert [tokens_of(engine.step()) for _ in range(4)] == [{0: 1, 1: 7}, {0: 1, 1: 7}, {0: 1, 1: 6}, {0: 1, 1: 1}]
    assert engine.stories[1].finish_reason == "length"


def test_decodes_never_starve_behind_a_prompt_of_better_rank(make_engine) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    engine.submit(prompt(2), max_tokens=20, priority=5)
    engine.submit(prompt(2, 30), max_tokens=20, priority=5)
    engine.step()
    engine.submit(prompt(30, 60), max_tokens=2, priority=0)
    for _ in range(5):
        assert tokens_of(engine.step()) == {0: 1, 1: 1, 2: 6}


def test_prompts_are_whole_without_chunked_prefill(make_engine) -> None:
    engine = make_engine(max_num_batched_tokens=16, max_model_len=16, chunked=False)
    for first in (0, 20, 40):
        engine.submit(prompt(7, first), max_tokens=2)
    assert tokens_of(engine.step()) == {0: 7, 1: 7}
    assert tokens_of(engine.step()) == {0: 1, 1: 1, 2: 7}
    engine.finish()


def test_waiting_requests_go_by_priority_then_arrival(make_engine) -> None:
    engine = make_engine(max_num_seqs=1)
    for priority in (3, 1, 2, 1):
        engine.submit([1], priority=priority, max_tokens=1)
    assert [next(iter(tokens_of(engine.step()))) for _ in range(4)] == [1, 3, 2, 0]


def test_no_more_requests_than_asked_run_at_once(make_engine) -> None:
    engine = make_engine(max_num_seqs=3)
    for _ in range(7):
        engine.submit([1], max_tokens=3)
    assert engine.step() and engine.scheduler.stats().num_running == 3
    assert engine.scheduler.stats().num_waiting == 4
    engine.finish()


def test_a_chunk_brings_the_table_once_and_then_what_it_writes(make_engine) -> None:
    engine = make_engine(block_size=4, max_num_batched_tokens=6)
    engine.submit(prompt(14), max_tokens=3)
    plans = [engine.step() for _ in range(4)]
    assert [(c.start, c.table_start, c.blocks, c.sample) for plan in plans for c in plan.chunks] == [
        (0, 0, ((1, 2),), False), (6, 1, ((2, 3),), False), (12, 3, ((4,),), True), (14, 3, ((4,),), True),
    ]


def test_the_runner_hears_of_each_request_once_and_of_its_end_once(make_engine) -> None:
    engine = make_engine()
    engine.submit([1], max_tokens=2)
    never_ran = engine.submit([1], max_tokens=2, priority=9)
    engine.scheduler.abort(never_ran)
    plans = [engine.step() for _ in range(4)]
    assert [[spec.request_id for spec in plan.new] for plan in plans] == [[0], [], [], []]
    assert [list(plan.gone) for plan in plans] == [[], [], [0], []]


# --- deterministic ------------------------------------------------------------------------------------------------


def test_prompts_are_cut_into_chunks_of_more_than_eight_tokens(make_engine) -> None:
    engine = make_engine(max_num_batched_tokens=20, deterministic=True)
    for length, sizes in ((6, [6]), (20, [20]), (21, [12, 9]), (38, [20, 18]), (48, [20, 19, 9])):
        request_id = engine.submit(prompt(length, 200 * length), max_tokens=1)
        assert [tokens_of(engine.step()) for _ in sizes] == [{request_id: size} for size in sizes]


def test_a_prompt_waits_for_room_for_a_chunk(make_engine) -> None:
    engine = make_engine(max_num_batched_tokens=17, deterministic=True)
    for first in range(9):
        engine.submit([first], max_tokens=3)
    engine.step()
    engine.submit(prompt(15), max_tokens=1)
    assert [tokens_of(engine.step()).get(9, 0) for _ in range(3)] == [0, 0, 15]


@pytest.mark.parametrize("begins", ["", "late"])
def test_nobody_is_let_in_while_a_prompt_waits_for_room(make_engine, begins: str) -> None:
    """Else short prompts that keep coming would take the room again and again."""
    engine = make_engine(max_num_batched_tokens=17, max_num_seqs=16, deterministic=True, begins=begins)
    for first in range(8):
        engine.submit([first], priority=1, max_tokens=5)
    engine.step()
    request_id = engine.submit(prompt(26), max_tokens=1)
    first = next(tokens for _ in range(9) if (tokens := tokens_of(engine.step()).get(request_id)))
    assert first == 9  # and the other 17 of its prompt are one chunk
    for first in range(20):
        for _ in range(4):
            engine.submit([first], priority=1, max_tokens=5)
        engine.step()
    assert engine.stories[request_id].finish_reason == "length"
    engine.finish()


def test_more_than_eight_tokens_of_a_prompt_are_always_computed(make_engine) -> None:
    engine = make_engine(deterministic=True)
    for length, num_cached in ((28, 0), (28, 16), (29, 20), (20, 8), (8, 0)):
        request_id = engine.submit(prompt(length), max_tokens=2)
        assert engine.finish()[request_id].num_cached_tokens == num_cached


def test_an_answer_is_no_prefix_of_a_prompt(make_engine) -> None:
    """It was computed token by token."""
    engine = make_engine(deterministic=True)
    engine.submit(prompt(10), max_tokens=20, script=range(20))
    engine.finish()
    engine.submit([*prompt(10), *range(20), *prompt(10, 50)], max_tokens=1)
    assert engine.finish()[1].num_cached_tokens == 8


def test_what_was_generated_is_computed_again_in_few(make_engine) -> None:
    engine = make_engine(num_blocks=13, max_num_seqs=2, caching=False, deterministic=True)
    engine.submit(prompt(10), max_tokens=30)
    engine.submit(prompt(10, 50), max_tokens=20)
    while not engine.scheduler.stats().num_preemptions:
        engine.step()
    chunks: list[int] = []
    while len(chunks) < 4:
        chunks += [chunk.num_tokens for chunk in engine.step().chunks if chunk.request_id == 1]
    assert chunks == [10, 8, 7, 1]
    engine.finish()


def test_where_memory_runs_out_no_prompt_is_computed_in_few(make_engine) -> None:
    engine = make_engine(deterministic=True)
    run = engine.runner.run

    def run_few(plan: StepPlan) -> StepResult:
        result: StepResult = run(plan if plan.num_tokens <= 12 else replace(plan, chunks=()))
        if plan.num_tokens > 12:
            raise OutOfMemoryError("no room")
        return result

    engine.runner.run = run_few
    engine.submit(prompt(24), max_tokens=2)
    engine.submit(prompt(17, 50), max_tokens=2)
    assert [tokens_of(engine.step()) for _ in range(4)] == [{0: 24}, {0: 12}, {0: 1}, {1: 17}]
    assert [story.finish_reason for story in engine.finish().values()] == ["length", "error"]


# --- preemption ---------------------------------------------------------------------------------------------------


def test_the_worst_ranked_request_gives_way_and_comes_back_first(make_engine) -> None:
    engine = make_engine(num_blocks=9, caching=False)  # 8 blocks of 4
    engine.submit(prompt(8), max_tokens=14, priority=1)
    engine.submit(prompt(8, 30), max_tokens=14, priority=1)
    engine.submit(prompt(8, 60), max_tokens=8, priority=0)
    alone = make_engine(caching=False)
    alone.submit(prompt(8, 30), max_tokens=14)
    engine.step()
    late = engine.submit([1], max_tokens=1, priority=1)
    while not engine.scheduler.stats().num_preemptions:
        plan = engine.step()
    assert set(tokens_of(plan)) == {0, 2}
    order = []
    while engine.scheduler.has_work():
        order += [i for i in tokens_of(engine.step()) if i in (1, late)]
    assert order[0] == 1
    assert engine.finish()[1].token_ids == alone.finish()[0].token_ids


def test_a_request_waits_rather_than_preempt_a_better_one(make_engine) -> None:
    engine = make_engine(num_blocks=7, block_size=4, caching=False)  # 6 blocks
    engine.submit(prompt(11), max_tokens=5)
    engine.submit(prompt(11, 40), max_tokens=9)
    assert tokens_of(engine.step()) == {0: 11, 1: 11}  # 3 blocks each
    assert tokens_of(engine.step()) == {0: 1, 1: 1}
    assert tokens_of(engine.step()) == {0: 1}  # the first needs a fourth block: the second one goes
    assert engine.scheduler.stats().num_preemptions == 1
    engine.finish()

    engine = make_engine(num_blocks=7, block_size=4, caching=False)
    engine.submit(prompt(10), max_tokens=6)
    engine.submit(prompt(11, 40), max_tokens=3)
    engine.submit([9], max_tokens=1, priority=9)
    engine.step()
    engine.step()
    assert tokens_of(engine.step()) == {0: 1}  # the second needs a fourth block, there is none: it keeps its three
    assert engine.scheduler.stats().num_preemptions == 0
    engine.finish()


def test_nobody_is_let_in_while_a_running_request_lacks_blocks(make_engine) -> None:
    engine = make_engine(num_blocks=14, block_size=1, max_num_batched_tokens=5, caching=False)  # 13 blocks
    engine.submit([1], max_tokens=6)
    engine.submit(prompt(12), max_tokens=1)
    engine.step()
    engine.step()
    engine.submit([2], max_tokens=1)
    assert tokens_of(engine.step()) == {0: 1}  # two blocks are left, and the second request needs four
    engine.finish()


def test_a_prefix_that_others_hold_leaves_room(make_engine) -> None:
    engine = make_engine(num_blocks=7)  # 6 blocks of 4
    engine.submit(prompt(12), max_tokens=8)
    engine.step()
    engine.submit(prompt(13), max_tokens=1)  # needs one block beside the three
    assert tokens_of(engine.step()) == {0: 1, 1: 1}
    engine.finish()


def test_a_preempted_request_finds_its_blocks_again(make_engine) -> None:
    engine = make_engine(num_blocks=12, block_size=2, max_num_batched_tokens=16)
    engine.submit(prompt(4), max_tokens=16)
    engine.submit(prompt(4, 50), max_tokens=12)
    starts: dict[int, int] = {}
    while engine.scheduler.has_work():
        for chunk in engine.step().chunks:
            if engine.scheduler.stats().num_preemptions and chunk.request_id == 1:
                starts.setdefault(1, chunk.start)
    assert starts[1] > 0
    engine.finish()


# --- prefix cache -------------------------------------------------------------------------------------------------


def test_a_prompt_seen_before_is_computed_from_its_last_block_on(make_engine) -> None:
    engine = make_engine(windows=(None, 6))
    for _ in range(2):
        engine.submit(prompt(16), max_tokens=3)
        while engine.scheduler.has_work():
            engine.step()
    first, second = engine.finish().values()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 12)  # one token at least is computed
    assert first.token_ids == second.token_ids
    stats = engine.scheduler.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (32, 12)


def test_generated_tokens_are_found_by_the_next_turn(make_engine) -> None:
    engine = make_engine()
    engine.submit(prompt(6), max_tokens=11)
    answer = engine.finish()[0].token_ids
    engine.submit(prompt(6) + answer + [7, 8], max_tokens=1)
    assert engine.finish()[1].num_cached_tokens == 16


def test_requests_of_one_step_do_not_share_what_is_not_computed_yet(make_engine) -> None:
    engine = make_engine()
    engine.submit(prompt(12), max_tokens=2)
    engine.submit(prompt(12), max_tokens=2)
    assert tokens_of(engine.step()) == {0: 12, 1: 12}
    first, second = engine.finish().values()
    assert first.token_ids == second.token_ids


def test_a_failed_chunk_is_not_shared(make_engine) -> None:
    engine = make_engine()
    failed = engine.submit(prompt(12))
    engine.runner.errors[failed] = "not finite"
    engine.step()
    engine.submit(prompt(12))
    engine.finish()
    assert engine.stories[failed].error == "not finite"
    assert engine.stories[1].num_cached_tokens == 0


# --- prompt_logprobs ----------------------------------------------------------------------------------------------


def entries(length: int, first: int = 100) -> list[tuple[int, float] | None]:
    return [None] + [(first + p, -float(p)) for p in range(1, length)]


def plain(story) -> list[tuple[int, float] | None]:
    return [e and (e.token_ids[0], e.logprobs[0]) for e in story.prompt_logprobs]


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 15])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_prompt_logprobs_are_put_together_over_chunks(make_engine, length: int, max_tokens: int) -> None:
    engine = make_engine(max_num_batched_tokens=5)
    engine.submit(prompt(15), max_tokens=1)
    engine.finish()
    engine.submit(prompt(length), max_tokens=max_tokens, prompt_logprobs=0)
    story = engine.finish()[1]
    assert plain(story) == entries(length)
    assert story.num_cached_tokens == 0  # a cached position would have no entry


def test_prompt_logprobs_survive_preemption(make_engine) -> None:
    engine = make_engine(num_blocks=13, block_size=2, max_num_batched_tokens=4)
    engine.submit(prompt(1), max_tokens=16)
    engine.submit(prompt(18, 40), max_tokens=2, prompt_logprobs=1)
    engine.finish()
    assert engine.scheduler.stats().num_preemptions > 0
    assert plain(engine.stories[1]) == entries(18, 40)


# --- ends ---------------------------------------------------------------------------------------------------------


def test_the_end_of_text_token_is_returned(make_engine) -> None:
    engine = make_engine()
    engine.submit([5], eos=(2,), script=[9, 2], max_tokens=9)
    engine.submit([5], eos=(2,), script=[9, 3], max_tokens=9, stop_token_ids=[3], logprobs=0)
    first, second = engine.finish().values()
    assert (first.token_ids, first.finish_reason, first.stop_reason) == ([9, 2], "stop", None)
    assert (second.token_ids, second.finish_reason, second.stop_reason) == ([9, 3], "stop", 3)
    assert [entry.token_ids for entry in second.logprobs] == [[9], [3]]


def test_max_tokens_zero_computes_the_prompt_only(make_engine) -> None:
    engine = make_engine(max_num_batched_tokens=5)
    engine.submit(prompt(12), max_tokens=0)
    assert not any(chunk.sample for _ in range(3) for chunk in engine.step().chunks)
    story = engine.finish()[0]
    assert (story.token_ids, story.finish_reason) == ([], "length")


def test_the_first_update_says_when_the_request_was_scheduled(make_engine) -> None:
    engine = make_engine(max_num_seqs=1)
    for _ in range(2):
        engine.submit([1], max_tokens=3)
    aborted = engine.submit([1])
    engine.scheduler.abort(aborted)
    stories = engine.finish()
    assert [story.scheduled_times for story in stories.values()] == [[0.0], [3.0], []]


def test_abort_between_schedule_and_commit_drops_the_result(make_engine) -> None:
    engine = make_engine()
    engine.submit(prompt(9), max_tokens=9)
    engine.submit(prompt(9, 50), max_tokens=9)
    engine.step()
    engine.step(while_running=lambda: engine.scheduler.abort(0))
    assert engine.stories[0].finish_reason == "abort"
    assert len(engine.stories[0].token_ids) == 1
    assert set(tokens_of(engine.step())) == {1}
    engine.finish()


def test_what_the_runner_leaves_out_ends_the_request(make_engine) -> None:
    engine = make_engine()
    engine.submit([1], max_tokens=3)
    engine.submit([1], max_tokens=3, logprobs=1)
    engine.submit([1, 2], max_tokens=3, prompt_logprobs=1)
    engine.submit([1], max_tokens=3, logprob_token_ids=[4])
    plan = engine.scheduler.schedule()
    updates = engine.scheduler.commit(plan, StepResult(plan.step_id, token_ids={1: 5, 2: 5, 3: 5}))
    assert [update.error for update in updates] == [
        "the model returned no token",
        "the model returned no log-probabilities",
        "the model did not return 1 prompt log-probabilities",
        "the model returned no log-probabilities",
    ]
    assert not engine.scheduler.has_work()


def test_steps_are_counted_by_their_tokens(make_engine) -> None:
    engine = make_engine()
    engine.submit(prompt(9), max_tokens=3)
    engine.finish()
    stats = engine.scheduler.stats()
    assert (stats.num_tokens, stats.step_sizes[:4]) == (11, (2, 0, 1, 0))  # 9 of the prompt, then 1 and 1
    assert sum(stats.step_sizes) == 3


def test_check_notices_harm(make_engine) -> None:
    engine = make_engine()
    engine.submit(prompt(9))
    engine.step()
    engine.scheduler._running[0].num_computed += 8
    with pytest.raises(AssertionError):
        engine.scheduler.check()
