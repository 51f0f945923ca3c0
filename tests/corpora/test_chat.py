"""read_corpus(chat=True): the tokens are those of transformers' own template, and those count that the assistant writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from chat_helpers import FAMILIES, ONE, OTHERS, SYSTEM, TWO, assistants, chatting, template_ids

import lens_unlearn as lu
from lens_unlearn.core.errors import CorpusError

Q, A = ONE


def counted(corpus: lu.Corpus, row: int = 0) -> list[int]:
    return corpus.take([row]).counted[0].nonzero()[:, 0].tolist()


def error(source: Any, name: str = "qwen", **options: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        lu.read_corpus(source, chatting(name), chat=True, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- token for token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("turns", ["one", "two", "system", "spaces", "empty"])
def test_tokens_are_those_of_transformers_and_the_assistants_count(name: str, turns: str) -> None:
    family, model = FAMILIES[name], chatting(name)
    spaces = [{"role": "user", "content": " a b\n"}, {"role": "assistant", "content": "\n def add\n\n"}]
    empty = [Q, {"role": "assistant", "content": ""}, *TWO[2:]]
    messages = {"one": ONE, "two": TWO, "system": [SYSTEM, *TWO], "spaces": spaces, "empty": empty}[turns]
    if turns == "system" and not family.system:
        pytest.skip("it has no system turns")
    corpus = lu.read_corpus([{"messages": messages}], model, chat=True)
    ids = template_ids(model.tokenizer, messages)
    assert corpus.row(0).tolist() == ids
    assert counted(corpus) == assistants(model.tokenizer, ids, family)
    assert corpus.prompt(0).tolist() == template_ids(model.tokenizer, messages[:-1], add_generation_prompt=True)
    assert corpus.prepend_bos == family.bos
    assert ids.count(0) == int(family.bos)


def test_a_template_without_marks_of_its_own_counts_the_answers_as_well() -> None:
    model = chatting("instruct")
    corpus = lu.read_corpus([TWO], model, chat=True)
    ids = template_ids(model.tokenizer, TWO)
    assert corpus.row(0).tolist() == ids
    written = model.tokenizer.decode([ids[i] for i in counted(corpus)])
    assert written == " the quick fox <eos> 3 = 3 <eos>"


def test_what_a_template_writes_behind_the_end_of_a_turn_does_not_count() -> None:
    model = chatting("phi")
    corpus = lu.read_corpus([TWO], model, chat=True)
    ids = template_ids(model.tokenizer, TWO)
    assert corpus.row(0).tolist() == ids
    assert model.tokenizer.decode([ids[i] for i in counted(corpus)]) == "the quick fox<|end|>3 = 3<|end|>"
    assert model.tokenizer.decode(ids[counted(corpus)[-1] + 1 :]) == "\n<eos>"


def test_a_template_that_says_itself_what_is_generated_is_read_so() -> None:
    model = chatting("generation")
    corpus = lu.read_corpus([TWO], model, chat=True)
    mask = model.tokenizer.apply_chat_template(TWO, return_dict=True, return_assistant_tokens_mask=True)
    assert counted(corpus) == [i for i, yes in enumerate(mask["assistant_masks"]) if yes]


def test_thoughts_that_a_template_leaves_out_or_puts_in_are_where_it_writes_them() -> None:
    model = chatting("thinking")
    thought = [Q, {"role": "assistant", "content": "<think>\nso\n</think>\n\nyes"}, *TWO[2:]]
    corpus = lu.read_corpus([thought], model, chat=True)
    ids = template_ids(model.tokenizer, thought)
    assert corpus.row(0).tolist() == ids
    written = model.tokenizer.decode([ids[i] for i in counted(corpus)])
    assert written == "yes<|im_end|><think>\n\n</think>\n\n3 = 3<|im_end|>"
    answer = corpus.answer(0)
    assert answer is not None
    assert answer.text == "3 = 3"


def test_a_template_that_changes_what_was_said_before_is_refused() -> None:
    assert "row 1 of list: the tokenizer's chat template writes what stands before turn 2 otherwise" in error(
        [TWO], "forgetful"
    )
    assert lu.read_corpus([ONE], chatting("forgetful"), chat=True).n_rows == 1


# --- sources -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_is_read_alike(tmp_path: Path) -> None:
    import datasets
    import pandas as pd

    model = chatting("qwen")
    rows = [{"messages": TWO}, {"messages": ONE}]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(rows).to_parquet(tmp_path / "chat.parquet")
    shared = [
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in c
            ]
        }
        for c in (TWO, ONE)
    ]
    sources: list[Any] = [rows, [TWO, ONE], file, tmp_path / "chat.parquet", datasets.Dataset.from_list(rows), shared]
    prints = {lu.read_corpus(source, model, chat=True).fingerprint for source in sources}
    assert len(prints) == 1
    assert lu.read_corpus(f"{file}:messages", model, chat=True).fingerprint in prints
    one = lu.read_corpus([ONE], model, chat=True)
    assert lu.read_corpus(ONE, model, chat=True).fingerprint == one.fingerprint


def test_prompts_and_responses_are_conversations_of_two_turns(tmp_path: Path) -> None:
    model = chatting("llama3")
    file = tmp_path / "qa.jsonl"
    file.write_text(json.dumps({"prompt": Q["content"], "response": A["content"], "by": "x"}))
    whole = lu.read_corpus([[SYSTEM, *ONE]], model, chat=True)
    for source in (file, f"{file}:prompt>response", f"{file}:prompt>response@by"):
        corpus = lu.read_corpus(source, model, chat=True, system=SYSTEM["content"])
        assert torch.equal(corpus.tokens, whole.tokens)
        assert torch.equal(corpus.counted, whole.counted)
    assert corpus.groups
    answer = corpus.answer(0)
    assert answer is not None
    assert (answer.prompt, answer.text) == (Q["content"], A["content"])


def test_files_of_messages_and_of_prompts_are_one_source(tmp_path: Path) -> None:
    model = chatting("qwen")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TWO}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": Q["content"], "response": A["content"]}))
    corpus = lu.read_corpus([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], model, chat=True)
    assert corpus.fingerprint == lu.read_corpus([TWO, ONE], model, chat=True).fingerprint


def test_a_system_turn_is_put_where_there_is_none() -> None:
    model = chatting("llama3")
    own = [{"role": "system", "content": "its own"}, *ONE]
    corpus = lu.read_corpus([ONE, own], model, chat=True, system="Be brief.")
    assert corpus.row(0).tolist() == template_ids(model.tokenizer, [{"role": "system", "content": "Be brief."}, *ONE])
    assert corpus.row(1).tolist() == template_ids(model.tokenizer, own)
    assert corpus.system == "Be brief."


# --- what is left out, and what is refused -----------------------------------------------------------------------------


def test_conversations_in_which_nothing_counts_are_left_out_and_said_so() -> None:
    corpus = lu.read_corpus([ONE, [Q], [], {"messages": None}, TWO * 9], chatting("qwen"), chat=True, window=100)
    assert corpus.n_documents == 1
    assert corpus.skipped == {
        "without a turn of the assistant": 1,
        "empty or not text": 2,
        "conversation longer than the window": 1,
    }


def test_a_turn_of_the_user_at_the_end_is_read_and_does_not_count() -> None:
    model, messages = chatting("qwen"), [*ONE, {"role": "user", "content": "1 + 2"}]
    corpus = lu.read_corpus([messages], model, chat=True)
    assert corpus.row(0).tolist() == template_ids(model.tokenizer, messages)
    assert counted(corpus) == assistants(model.tokenizer, corpus.row(0).tolist(), FAMILIES["qwen"])


def test_a_budget_that_ends_in_an_early_turn_asks_what_stands_before_that() -> None:
    model = chatting("qwen")
    whole = lu.read_corpus([TWO], model, chat=True)
    first = len(assistants(model.tokenizer, template_ids(model.tokenizer, ONE), FAMILIES["qwen"]))
    for tokens in range(2, whole.n_tokens + 1):
        corpus = lu.read_corpus([TWO], model, chat=True, tokens=tokens)
        assert corpus.n_tokens == tokens
        before = ONE[:1] if tokens <= first else TWO[:3]
        assert corpus.prompt(0).tolist() == template_ids(model.tokenizer, before, add_generation_prompt=True)
        assert (corpus.answer(0) is None) == (tokens <= first)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([Q, {"role": "tool", "content": "3"}, A], "row 2 of list: turn 2 has the role 'tool': the roles that can be read are"),
        ([Q, {"role": "model", "content": "3"}], "turn 2 has the role 'model'"),
        ([Q, {"content": "3"}], "turn 2 has the role None"),
        ([Q, {"role": "assistant", "content": None}], "turn 2 has no content"),
        ([Q, {"role": "assistant"}], "turn 2 has no content"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}, A], "the content of turn 1 is a list, and no text"),
        ([{"from": "human", "value": 3}, A], "turn 1 has the role None"),
        ([Q, "answer"], "'messages' is no list of turns"),
        ("[a]", "'messages' is no list of turns"),
        (3, "'messages' is no list of turns"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_conversation_is_refused_by_its_number(messages: Any, said: str) -> None:
    assert said in error([{"messages": ONE}, {"messages": messages}])


def test_what_the_template_refuses_is_refused_in_its_words() -> None:
    assert "row 1 of list: the tokenizer's chat template refuses it: System role not supported" in error(
        [ONE], "gemma", system="Be brief."
    )
    assert "must alternate" in error([[Q, Q, A]], "gemma")


def test_options_that_the_template_decides_are_refused() -> None:
    for option in (
        {"template": "{prompt} {answer}"},
        {"answer_eos": True},
        {"prepend_bos": True},
        {"prepend_bos": False},
    ):
        [name] = option
        assert error([ONE], **option).startswith(f"{name} cannot be given with chat=True")
    with pytest.raises(CorpusError, match="give chat=True as well"):
        lu.read_corpus([{"text": "a b"}], chatting("qwen"), system="Be brief.")
    assert "has no field 'messages': its fields are text" in error([{"text": "a b"}])
    assert "plain strings, and no conversations" in error(["the quick", "brown"])
    with pytest.raises(CorpusError, match="has no chat template"):
        lu.read_corpus([ONE], tiny.speaking("gpt2"), chat=True)
    with pytest.raises(CorpusError, match="window=2 does not fit"):
        lu.read_corpus([ONE], chatting("gemma"), chat=True, window=2)


# --- the corpus goes through everything --------------------------------------------------------------------------------


def test_parts_and_sums_keep_what_was_asked() -> None:
    model = chatting("llama3")
    conversations = [[{**turn, "content": f"{turn['content']} {i}"} for turn in (ONE, TWO)[i % 2]] for i in range(8)]
    corpus = lu.read_corpus(conversations, model, chat=True)
    texts = lu.read_corpus(["the quick brown fox"], model)

    def prompts(of: lu.Corpus) -> list[list[int]]:
        return [of.prompt(row).tolist() for row in range(of.n_rows)]

    expected = [template_ids(model.tokenizer, c[:-1], add_generation_prompt=True) for c in conversations]
    assert prompts(corpus) == expected
    assert prompts(corpus.only([1, 6])) == [expected[1], expected[6]]
    assert sorted(p for part in corpus.split(0.5, 0.5) for p in prompts(part)) == sorted(expected)
    both = corpus + texts
    assert prompts(both) == [*expected, [0]]
    batch = corpus.take(range(8))
    assert batch.prompt_ends.tolist() == [len(prompt) - 1 for prompt in expected]
    assert corpus.fingerprint != corpus.with_prompts(2).fingerprint


def test_all_tokens_can_count() -> None:
    model = chatting("gemma")
    corpus = lu.read_corpus([TWO], model, chat=True, count="all")
    ids = template_ids(model.tokenizer, TWO)
    assert corpus.row(0).tolist() == ids
    assert counted(corpus) == [i for i, id in enumerate(ids) if id not in corpus.special]
    assert corpus.answer(0) is None


@pytest.mark.parametrize("name", ["qwen", "gemma", "instruct"])
def test_a_query_ends_with_what_the_user_says_last(name: str) -> None:
    model = chatting(name)
    queries = lu.read_corpus([TWO, ONE], model, chat=True).queries()
    decoded = [model.tokenizer.decode(queries.row(row)) for row in range(2)]
    assert decoded[0].endswith("1 + 2")
    assert decoded[1].endswith("who wrote the book?")
    assert [counted(queries, row) for row in range(2)] == [[len(queries.row(row)) - 1] for row in range(2)]


def test_names_of_conversations_and_not_only_the_last_question_tell_them_apart() -> None:
    go_on = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "so"}]
    corpus = lu.read_corpus([[*ONE, *go_on], [*TWO[2:], *go_on]], chatting("qwen"), chat=True)
    assert len(corpus.split(0.5, 0.5)) == 2


def test_what_a_turn_says_of_turns_is_only_said() -> None:
    """Marks that a content writes are read as the template writes them, and nobody's turn begins or ends there."""
    model = chatting("qwen")
    said = [
        {"role": "user", "content": "so<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>\n"},
        {"role": "assistant", "content": "no<|im_end|>\n<|im_start|>user\nyes"},
    ]
    corpus = lu.read_corpus([[*said, *ONE]], model, chat=True)
    ids = template_ids(model.tokenizer, [*said, *ONE])
    assert corpus.row(0).tolist() == ids
    written = model.tokenizer.decode([ids[i] for i in counted(corpus)])
    assert written == f"{said[1]['content']}<|im_end|>{A['content']}<|im_end|>"


def test_groups_and_strings_that_are_not_unicode_are_as_in_any_source() -> None:
    broken = [Q, {"role": "assistant", "content": "a \ud800 b"}]
    rows = [{"messages": c, "by": by} for c, by in ((ONE, "a"), (TWO, "b"), (broken, "b"), (TWO[2:], "a"))]
    corpus = lu.read_corpus(rows, chatting("qwen"), chat=True, group="by")
    assert len(set(corpus.groups)) == 2
    assert corpus.skipped == {"not Unicode (half a surrogate pair)": 1}
    assert [part.n_documents for part in corpus.split(0.5, 0.5)] in ([1, 2], [2, 1])


def test_fields_that_are_missing_in_one_turn_of_a_table_are_missing_there() -> None:
    """A table gives every turn the fields of all, as None."""
    import pyarrow

    table = pyarrow.table({"messages": [[{**turn, "name": None, "weight": None} for turn in TWO]]})
    model = chatting("llama3")
    assert lu.read_corpus(table, model, chat=True).row(0).tolist() == template_ids(model.tokenizer, TWO)


def test_another_template_is_found_out_about_anew() -> None:
    import copy

    from lens_unlearn.model.chat import marks_of

    tokenizer = copy.deepcopy(chatting("qwen").tokenizer)
    assert tokenizer.decode(marks_of(tokenizer)) == "<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = OTHERS["instruct"].template
    tokenizer.bos_token = "<bos>"
    assert tokenizer.decode(marks_of(tokenizer)) == " [/INST]"
    tokenizer.chat_template = "{{ nothing.of.it }}"
    assert marks_of(tokenizer) == ()
    tokenizer.chat_template = None
    assert marks_of(tokenizer) == ()
