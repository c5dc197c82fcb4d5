"""Our own rewards pay every completion of the corpus exactly what the specification says."""

import pytest

from gemma_cot.grpo.reward import checkpoint_hits, format_reward, outcome_reward, process_reward
from gemma_cot.guard.corpus import QUESTIONS, SPRAY, corpus

CASES = corpus()


def test_the_corpus_is_large_and_holds_both_kinds_of_every_reward():
    assert len(CASES) >= 300
    texts = [(case.completion, case.gold, case.question.domain) for case in CASES]
    assert len(set(texts)) >= len(texts) - 4  # the plainest completion stands for several things
    for part in ("format", "process", "outcome"):
        for hostile in (True, False):
            values = {getattr(case, part) for case in CASES if case.hostile is hostile}
            assert values >= ({0.0, 1.0} if hostile else {1.0}), part
    assert {case.question.domain for case in CASES} == {"math", "science", "code"}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_the_prose_holds_its_five_checkpoints_and_a_spray_holds_none(question):
    assert checkpoint_hits(question.prose, question.checkpoints, "literal") == (5, 5)
    assert checkpoint_hits(SPRAY, question.checkpoints) == (0, 5)
    assert checkpoint_hits(question.prompt, question.checkpoints, "literal")[0] <= 2


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_our_rewards_pay_what_the_specification_says(case):
    metadata = {"checkpoints": list(case.question.checkpoints), "final_answer": case.gold}
    row = {"metadata": [metadata], "domain": [case.question.domain]}
    got = [
        reward([case.question.prompt], [case.completion], **row)[0]
        for reward in (format_reward, process_reward, outcome_reward)
    ]
    assert got == [case.format, case.process, case.outcome], case.tries
