"""Blocks: what holds for any text whatever, natural borders, and which blocks are related."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgrpo_trl.longblocks.builder.cleaning import CleaningConfig
from dgrpo_trl.longblocks.questions import blocks as blocks_module
from dgrpo_trl.longblocks.questions.blocks import Block, BlocksConfig, link_blocks, split_blocks
from dgrpo_trl.longblocks.questions.llm_engine import LLMEngineConfig
from dgrpo_trl.longblocks.questions.rule_engine import RuleEngineConfig


SMALL = BlocksConfig(min_block_chars=30, max_block_chars=80)
ANY_TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=("Cs",)),
        st.sampled_from("\n\n\r\u2028\u2029\x85\t .。!?#`~*=-אبا\U0001f600\x00def(:)"),
    ),
    max_size=400,
)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT, st.sampled_from(["text", "markdown", "code"]), st.sampled_from(["", "a.py", "a.tsx", "a.php"]))
def test_every_character_is_in_one_block_at_its_offsets(document, kind, name):
    blocks = split_blocks(document, kind, SMALL, name)
    position = 0
    for block in blocks:
        assert document[block.start : block.end] == block.text == block.text.strip() != ""
        assert position <= block.start and not document[position : block.start].strip()
        assert len(block.text) <= 80
        position = block.end
    assert not document[position:].strip()
    assert len({block.id for block in blocks}) == len(blocks)


@pytest.mark.parametrize("kind", ["text", "markdown", "code"])
@pytest.mark.parametrize(
    "document", ["word " * 200_000, "x" * 200_000, "天地玄黄" * 50_000], ids=["words", "x", "chinese"]
)
def test_one_huge_line_is_cut(document, kind):
    started = time.perf_counter()
    blocks = split_blocks(document, kind, BlocksConfig(), "a.py")
    assert all(len(block.text) <= 2000 for block in blocks)
    assert "".join(block.text for block in blocks).replace(" ", "") == document.replace(" ", "")
    assert time.perf_counter() - started < 60  # quadratic work would take many minutes


def test_an_edit_leaves_the_ids_of_what_is_elsewhere():
    paragraphs = [
        f"Paragraph {n} is about the thing number {n}, at some length, so that it stands alone." for n in range(20)
    ]
    before = {block.id for block in split_blocks("\n\n".join(paragraphs), "text", SMALL)}
    paragraphs[7] = "Something else stands here, which is about as long as what stood here before it."
    after = {block.id for block in split_blocks("\n\n".join(paragraphs), "text", SMALL)}
    assert 1 <= len(before - after) <= 2


def test_block_ids_are_unique_and_survive_an_edit_elsewhere():
    config = BlocksConfig(min_block_chars=1, max_block_chars=16)
    before = [block.id for block in split_blocks("one thing\n\nanother\n\none thing", config=config)]
    after = [block.id for block in split_blocks("one thing more\n\nanother\n\none thing", config=config)]
    assert len(set(before)) == 3 and before[2] == f"{before[0]}-2"
    assert after[1] == before[1] and after[2] == before[0]


@pytest.mark.parametrize("document", ["", " \n\n \n"])
def test_an_empty_document_has_no_blocks(document):
    assert split_blocks(document) == []


def test_headings_stay_with_what_follows_and_fences_stay_whole():
    document = (
        "# One\n\nFirst paragraph of some length.\n\n## Two\n\n```\na\n\n# no heading\n\nb\n```\n\nLast paragraph."
    )
    config = BlocksConfig(min_block_chars=1, max_block_chars=60)
    assert [block.text for block in split_blocks(document, "markdown", config)] == [
        "# One\n\nFirst paragraph of some length.",
        "## Two\n\n```\na\n\n# no heading\n\nb\n```\n\nLast paragraph.",
    ]


def test_python_is_cut_between_functions():
    functions = [f"@once\ndef f{n}(a):\n    b = a + {n}\n\n    return b" for n in range(6)]
    blocks = split_blocks(
        "\n\n\n".join(functions), "code", BlocksConfig(min_block_chars=1, max_block_chars=60), "f.py"
    )
    assert [block.text for block in blocks] == functions


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("a.js", "function f{n}(a) {{\n  const b = a + {n};\n\n  return b;\n}}"),
        ("a.ts", "function f{n}(a: number) {{\n  const b = a + {n};\n\n  return b;\n}}"),
        ("a.go", "func f{n}(a int) int {{\n\tb := a + {n}\n\n\treturn b\n}}"),
        ("a.rs", "fn f{n}(a: i32) -> i32 {{\n    let b = a + {n};\n\n    b\n}}"),
        ("a.cpp", "int f{n}(int a) {{\n    int b = a + {n};\n\n    return b;\n}}"),
        ("a.rb", "def f{n}(a)\n  b = a + {n}\n\n  b\nend"),
        ("a.sh", "f{n}() {{\n  b=$(($1 + {n}))\n\n  echo $b\n}}"),
    ],
)
def test_other_languages_are_cut_between_functions(name, function):
    functions = [function.format(n=n) for n in range(6)]
    blocks = split_blocks("\n".join(functions), "code", BlocksConfig(min_block_chars=1, max_block_chars=80), name)
    assert [block.text for block in blocks] == functions


def test_every_grammar_can_be_loaded():
    for suffix in blocks_module._GRAMMARS:
        assert split_blocks("a", "code", name=f"file{suffix}")[0].text == "a"


def test_sentences_stay_whole_where_a_paragraph_is_cut():
    document = " ".join(f"Sentence number {n} is not so long." for n in range(30))
    assert all(block.text.endswith(".") for block in split_blocks(document, "text", SMALL))


def make_blocks(texts):
    return [Block(id=str(i), start=i * 1000, end=i * 1000 + len(text), text=text) for i, text in enumerate(texts)]


def test_blocks_that_share_rare_terms_are_linked_and_neighbours_are_not():
    texts = [f"plain filler sentence about weather number{i}" for i in range(20)]
    texts[2] = texts[15] = "the Brandwell lighthouse keeper Ottoline"
    texts[3] = "the Brandwell lighthouse keeper Ottoline"  # a neighbour of 2
    links = link_blocks(make_blocks(texts), BlocksConfig())
    assert links[2] == [15] and set(links[15]) == {2, 3} and links[8] == []


@pytest.mark.parametrize(
    ("filler", "text", "related"),
    [
        ("天気についての普通の文章{}{}", "灯台守の老人は霧笛を鳴らした", "霧笛を鳴らす灯台守の家"),
        ("날씨에 대한 평범한 문장 {}{}", "등대지기는 무적을 울렸다", "무적이 울리는 등대지기의 집"),
    ],
)
def test_blocks_are_linked_by_pairs_of_characters_where_words_are_not_to_be_had(filler, text, related):
    texts = [filler.format(chr(0x4E00 + i), chr(0x5E00 + i)) for i in range(20)]
    texts[1], texts[12] = text, related
    assert link_blocks(make_blocks(texts), BlocksConfig())[1] == [12]


def test_many_blocks_are_linked_in_time():
    rng = random.Random(0)
    words = [f"word{n}" for n in range(5000)]
    blocks = make_blocks([" ".join(rng.choices(words, k=100)) for _ in range(1500)])
    started = time.perf_counter()
    links = link_blocks(blocks, BlocksConfig())
    assert time.perf_counter() - started < 30 and all(len(link) <= 4 for link in links)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (BlocksConfig, {"min_block_chars": 100, "max_block_chars": 50}),
        (CleaningConfig, {"min_tokens": 9, "max_tokens": 8}),
        (RuleEngineConfig, {"engine": "rule", "min_hops": 4, "max_hops": 3}),
        (RuleEngineConfig, {"engine": "rule", "min_gaps": 4, "max_gaps": 3}),
        (LLMEngineConfig, {"engine": "llm", "server": "s", "min_blocks": 4, "max_blocks": 3}),
    ],
)
def test_limits_that_contradict_each_other_are_refused_in_every_section(section, values):
    *_, (least, low), (most, high) = values.items()
    with pytest.raises(ValueError, match=f"`{least}` is {low} and `{most}` {high}"):
        section(**values)
    section(**{**values, least: high})
